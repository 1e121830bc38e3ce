"""A probe that is not linear: what a support vector machine with a Gaussian kernel makes of pixels, or of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from joblib import Parallel, delayed
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from tqdm.auto import tqdm

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import MODEL
from igpt_lab.probing.probes import Features, ProbeResult, layer_by_layer


@checked
def probe_svm(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = (1.0, 10.0, 100.0),
    gammas: Sequence[float] = (1.0, 3.0),
    folds: int = 3,
    seed: int = 0,
    control: str = MODEL,
    progress: bool = True,
) -> ProbeResult:
    """scikit-learn's SVC with a Gaussian kernel on features as they are; a row a layer, as in `probe_layers`.

    A `gamma` of 1 is scikit-learn's "scale", 1 / (D times the variance of train), so the unit of pixels is of no
    account. C and gamma of each layer, and the layer, are chosen by stratified `folds` of train (ties: the middle one).
    Then all of train is fitted and test is met once. Time grows with the square of the rows: 6,000 of raw pixels take
    half a minute on two cores. It is no certificate: `converged` is libsvm's own word.
    """
    classes, y = np.unique(train.labels, return_inverse=True)
    grid = list(product(sorted(Cs), sorted(gammas)))
    splitter = StratifiedKFold(min(folds, np.bincount(y).min()), shuffle=True, random_state=seed)
    splits = list(splitter.split(y, y))
    facts = {"folds": len(splits), "n_validation": len(y)}

    def right(x: np.ndarray, fold: tuple[np.ndarray, np.ndarray], C: float, gamma: float) -> int:
        fit, held = fold
        return int((_fitted(x[fit], y[fit], C, gamma).predict(x[held]) == y[held]).sum())

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray]]:
        for values, others in zip(x, tested, strict=True):
            unit = 1 / (values.shape[1] * max(values.var(dtype=np.float64), 1e-300))
            jobs = [delayed(right)(values, fold, C, gamma * unit) for C, gamma in grid for fold in splits]
            fits = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(jobs)  # libsvm lets other threads run
            bar = tqdm(fits, f"choose C and gamma {control}", len(jobs), unit="fit", leave=False, disable=not progress)
            scores = np.fromiter(bar, int, len(jobs)).reshape(len(grid), -1).sum(1)
            best = np.flatnonzero(scores == scores.max())
            C, gamma = grid[best[len(best) // 2]]
            machine = _fitted(values, y, C, gamma * unit)
            row = {"C": C, "gamma": gamma, "validation_accuracy": scores.max() / len(y), **facts}
            yield row | {"converged": machine.fit_status_ == 0}, classes[machine.predict(others)]

    return layer_by_layer(train, test, probe, {"control": control, "seed": seed}, progress)


def _fitted(x: np.ndarray, y: np.ndarray, C: float, gamma: float) -> SVC:
    return SVC(C=C, gamma=gamma, cache_size=500).fit(x, y)
