"""Features in, rows out: layer-wise linear probes.

Protocol (Chen et al., 2020): multinomial logistic regression on pooled features; hyper-parameters are chosen on
held-out rows of train, which are folded back before the refit; test is met once. The paper holds out a tenth; here
every row is held out once, in one of ten folds, as a tenth of few thousand images names neither layer nor C. What the
paper leaves open is chosen here: features standardised on the training rows, scikit-learn's C from a grid that extends
itself while its best lies at an edge, L2 on the weights only, optimisation to convergence (`logistic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import choice_of
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, shown_control
from igpt_lab.core.peaks import peak_set
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy
from igpt_lab.probing.choosing import Fold, choose_C, folds_of
from igpt_lab.probing.features import (
    Features,
    check_same_layers,
    digest_of_layer,
    digest_of_rows,
    over_stacks,
    say_same_rows,
    test_layers,
)
from igpt_lab.probing.labels import Losses, MatchedLabels, bits_of, log_loss_columns, matched, meet_test
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic

if TYPE_CHECKING:
    pass

FIRST = (  # columns of a table; pandas shows the first ten and the last ten, which leaves out the certificate
    "layer", "test_accuracy", "low", "high", "validation_accuracy", "C", "learning_rate", "chosen", "in_peak_set",
    "within_error", "log_loss", "iterations", "objective", "gradient", "control",
)  # fmt: skip
CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Of a layer: row, labels of test (N,), fold accuracies, and features (N, D) -> logits (N, K) where there are any.
Probed = tuple[dict, np.ndarray, np.ndarray, Callable[[np.ndarray], Tensor] | None]


@checked
def probe_layers(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = CS,
    standardise: bool = True,
    seed: int = 0,
    folds: int = 10,
    max_iter: int = 1000,
    control: str = MODEL,
    permute_labels: bool = False,
    solver: Callable[..., Fits] = fit_logistic,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe every layer: C and layer are chosen on train, then each layer is refitted and meets test once.

    C of each layer, and the layer, are those of the best mean accuracy over stratified folds of train; of equal ones
    the middle.

    Args:
        train, test: Features with labels.
        Cs: Inverse strengths of the penalty to choose from; one value fixes C.
        standardise: Bring each feature to mean 0 and variance 1 on the training rows.
        seed: Of the folds.
        folds: Of the cross-validation; 1 holds out one tenth, as the paper does.
        max_iter: Passes of a fit, at most.
        control: What the column `control` says.
        permute_labels: Shuffle the training labels: a control that must fall to chance.
        solver: `fit_logistic`, or for the practice of others `logistic.fit_sklearn`.
        device: Where fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `ProbeResult`, whose `table` has a row per layer: `layer`; `test_accuracy` with `low` and `high`, exact 95% over
        test images; `validation_accuracy` over the `n_validation` held-out rows; `C`; `chosen`; `in_peak_set` (may be
        the best, `peaks.peak_set`); `within_error` (within one standard error of the highest validation
        accuracy); `log_loss`, held-out bits: the mean of -log2 of the probability of an image's class, with
        `log_loss_low` and `log_loss_high`, 95% over test images (infinite where test has a class that train has not);
        `iterations`, `objective` and `gradient`, the certificate of the last fit (passes, mean nats, largest
        derivative), and `converged`, False where it, or a fit that chose its C, missed its tolerance; `control`;
        `seed`, `folds`, `n_validation`, `n_train`, `n_test`, `n_features`. Accuracies are fractions.

    Raises:
        ValueError: Fewer than two classes, other layers in test than in train, values that are not finite, a C that is
            not above 0, or `folds` below 1.

    Example:
        >>> result = lab.probe_layers(train, test, Cs=[0.1], folds=2)
        >>> result.table[["layer", "C", "n_train", "n_test", "n_features"]]
           layer    C  n_train  n_test  n_features
        0      0  0.1      200     100           8
        1      1  0.1      200     100           8
        2      2  0.1      200     100           8
        3      3  0.1      200     100           8
    """
    if permute_labels:
        train = replace(train, labels=np.random.default_rng([seed, 7]).permutation(train.labels))
    classes, y = np.unique(train.labels, return_inverse=True)
    if len(classes) < 2:
        known = [f"class {train.names[label]!r}" if train.names else f"class {label}" for label in classes]
        alone = known[0] if known else "no class"
        raise ValueError(f"the rows of train are of {alone} alone; a probe needs two classes or more")
    splits = folds_of(train.labels, folds, seed, train.names)
    place = best_device(device)
    fitting = {"standardise": standardise, "max_iter": max_iter, "device": place}

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[Probed]:
        choices = choose_C(x, y, splits, Cs, fitting, solver)
        fits = solver(x, y, [[choice.C] for choice in choices], **fitting)
        for layer, choice in enumerate(choices):
            certificate = {
                "iterations": int(fits.iterations[layer, 0]),
                "objective": float(fits.objective[layer, 0]),
                "gradient": float(fits.gradient[layer, 0]),
                "converged": bool(fits.converged[layer, 0]) and choice.converged,
            }
            predicted = classes[fits.predict(tested[layer], layer)[0]]
            row = {"C": float(choice.C), "validation_accuracy": choice.accuracy, **certificate}
            yield row, predicted, choice.folds, partial(_logits, fits, layer)

    facts = facts_of(splits, control, seed)
    return layer_by_layer(train, test, probe, facts, progress, place if solver is fit_logistic else None)


def _logits(fits: Fits, layer: int, x: np.ndarray) -> Tensor:
    """Of the only strength of the layer at this place: x (N, D) -> (N, K)."""
    return fits.logits(x, layer)[0]


@checked
def control_task(
    train_pixels: Features, test_pixels: Features, *, types: int = 100, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of train and of test for a task without meaning, to measure how much a probe learns by itself.

    Images are clustered by their pixels into `types`, at most half as many as there are images, and each cluster is
    given one of the K classes at random. What a layer's probe gains over this one's accuracy is its selectivity (Hewitt
    and Liang, 2019): see `relabelled`.
    """
    (pixels,), (others,) = train_pixels.layers.values(), test_pixels.layers.values()
    types = min(types, len(pixels) // 2)
    clusters = KMeans(types, n_init=1, random_state=seed).fit(pixels)
    classes = np.random.default_rng([seed, 11]).permutation(np.resize(np.unique(train_pixels.labels), types))
    return classes[clusters.labels_], classes[clusters.predict(others)]


def facts_of(splits: Sequence[Fold], control: str, seed: int) -> dict:
    """What the rows of all layers have in common, of a choice on the held-out rows of `splits`."""
    held = sum(len(rows) for _, rows in splits)
    return {"control": control, "seed": seed, "folds": len(splits), "n_validation": held}


def layer_by_layer(
    train: Features, test: Features, probe, facts: dict, progress: bool, device: torch.device | None = None
) -> ProbeResult:
    """What `probe(x, tested)` gives for each of stacked layers (`Probed`), with what test says.

    `facts` (`facts_of`) are those of every row. With a device, that of the probes, layers may run side by side
    (`over_stacks`).
    """

    def of_stack(layers: list[Any], x: np.ndarray) -> tuple[list[Any], int, dict[Any, str], list[Probed]]:
        tested = test_layers(layers, x, test)
        say_same_rows(x[0], tested[0])
        seen = {layer: digest_of_layer(values) for layer, values in zip(layers, tested, strict=True)}
        return layers, x.shape[2], seen, list(probe(x, tested))

    check_same_layers(train, test)
    rows, predictions = [], {}
    folds = []
    digests: dict[Any, str] = {}
    logits: dict[Any, Callable[[np.ndarray], Tensor]] = {}
    name = f"probe {shown_control(facts['control'])}".strip()
    with tqdm(total=len(train.layers), desc=name, unit="layer", disable=not progress) as bar:
        for layers, width, seen, probed in over_stacks(of_stack, train, device):
            digests |= seen
            for layer, (row, predicted, of_folds, of_layer) in zip(layers, probed, strict=True):
                sizes = {"n_train": len(train.labels), "n_test": len(test.index), "n_features": width}
                first, others = {"control": facts["control"], "layer": layer}, {**facts, **sizes}
                rows.append(first | row | {name: others[name] for name in others if name not in first})
                predictions[layer] = predicted
                folds.append(of_folds)
                if of_layer is not None:
                    logits[layer] = of_layer
            bar.update(len(layers))

    def losses(places: np.ndarray) -> dict[Any, np.ndarray]:
        return {layer: bits_of(of_layer(test.layers[layer]), places) for layer, of_layer in logits.items()}

    result = result_of(rows, predictions, matched(train, test), np.stack(folds, axis=1), losses)
    return replace(result, rows=digest_of_rows(train, test, digests))


def result_of(
    rows: list[dict], predictions: dict[Any, np.ndarray], test: MatchedLabels, folds: np.ndarray, losses: Losses
) -> ProbeResult:
    """Rows of layers with their `validation_accuracy`, and what they predict of `test`, which is met here.

    `folds` (K, L): accuracies on the rows that each fold held out. `losses`: the held-out bits of each layer that has
    probabilities, once the places of test labels are known.
    """
    layers, validation = [row["layer"] for row in rows], np.array([row["validation_accuracy"] for row in rows])
    choice = choice_of(layers, validation, rows[0]["n_validation"])
    correct, log_loss = meet_test(predictions, test, losses)
    peak = peak_set(correct).layers if len(correct) > 1 else [choice.layer]
    for row in rows:
        layer = row["layer"]
        row |= {"chosen": layer == choice.layer, "within_error": layer in choice.within_error}
        row |= {"in_peak_set": layer in peak, **accuracy(correct[layer])}
        row |= log_loss_columns(log_loss[layer]) if layer in log_loss else {}
    table = pd.DataFrame(rows)
    table = table[[*(name for name in FIRST if name in table), *(name for name in table if name not in FIRST)]]
    return ProbeResult(table, correct, choice.layer, predictions, folds, log_loss)
