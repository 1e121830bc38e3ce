"""A probe stopped before its optimum has no one accuracy: the same fit over orders of rows, precisions and threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from torch import Tensor

from igpt_lab.core.progress import tqdm
from igpt_lab.probing.features import Features
from igpt_lab.probing.labels import bits_of, matched, meet_test
from igpt_lab.probing.solvers.logistic import fit_logistic, fit_sklearn

STOPPED, CONVERGED = "100 iterations", "converged"


def repeat_stopped(
    train: Features, test: Features, layer: int, C: float, *, standardise: bool = True, orders: int = 3,
    threads: Sequence[int] = (1, 2), progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """The same probe of one layer again and again, stopped after 100 iterations and at its optimum.

    Nothing that differs between the rows should matter: `order`, the seed that shuffles the training rows (0 leaves
    them as they are), `dtype` of the features, and `threads` of a stopped fit (more than the first with order 0 alone).
    Columns: `solver`, these three, `iterations`, `converged`, `test_accuracy` and `log_loss` in bits.
    """
    classes, y = np.unique(train.labels, return_inverse=True)
    dtypes = ("float32", "float64")
    repeats = [(STOPPED, *setting) for setting in product(range(orders), dtypes, threads[:1])]
    repeats += [(STOPPED, *setting) for setting in product([0], dtypes, threads[1:])]  # slow beside other work
    repeats += [(CONVERGED, *setting) for setting in product(range(orders), dtypes, [1])]
    rows = []
    for solver, order, dtype, count in tqdm(repeats, desc=f"repeats at layer {layer}", disable=not progress):
        place = np.random.default_rng(order).permutation(len(y)) if order else np.arange(len(y))
        x, tested = train.layers[layer][place].astype(dtype), test.layers[layer].astype(dtype)
        if solver == STOPPED:
            fit = fit_sklearn(x, y[place], [C], standardise=standardise, max_iter=100, threads=count)
        else:
            fit = fit_logistic(x, y[place], [C], standardise=standardise)
        facts = {"solver": solver, "order": order, "dtype": dtype, "threads": count}
        facts |= {"iterations": int(fit.iterations[0, 0]), "converged": bool(fit.converged[0, 0])}
        logits = fit.logits(tested)[0]
        right, bits = meet_test({0: classes[logits.argmax(-1).cpu()]}, matched(train, test), partial(_losses, logits))
        rows.append(facts | {"test_accuracy": float(right[0].mean()), "log_loss": float(bits[0].mean())})
    return pd.DataFrame(rows)


def _losses(logits: Tensor, places: np.ndarray) -> dict[int, np.ndarray]:
    return {0: bits_of(logits, places)}


def spread_of(repeats: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Of `repeats`, a row for each group: the accuracy at the optimum, and what the stopped fits make of it.

    `converged`: the median accuracy at the optimum, `converged_min` and `converged_max` over its repeats. `min`, `max`,
    `sd` (n - 1): over the `repeats` stopped fits.
    """
    rows = []
    for key, group in repeats.groupby(list(by), sort=False):
        stopped, at_optimum = (group.test_accuracy[group.solver == solver] for solver in (STOPPED, CONVERGED))
        optimum = {"converged": at_optimum.median(), "converged_min": at_optimum.min()}
        optimum |= {"converged_max": at_optimum.max()}
        ends = {"min": stopped.min(), "max": stopped.max(), "sd": stopped.std(ddof=1), "repeats": len(stopped)}
        rows.append(dict(zip(by, key, strict=True)) | optimum | ends)
    return pd.DataFrame(rows)
