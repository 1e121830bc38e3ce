"""C and layer, chosen on held-out rows of train: folds, a grid of C that extends itself, the layer of the best mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold

from igpt_lab.core.choice import middle_of_best
from igpt_lab.core.depth import Layer, in_depth
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing.solvers.logistic import Fits, fit_folds, fit_logistic

Fold = tuple[np.ndarray, np.ndarray]  # rows to fit, rows held out
CHOOSING = 1e-4  # tolerance of the fits that choose C: against 1e-6, 0.2 of 600 held-out rows change on average


class ChosenC(NamedTuple):
    """The C of one layer; `folds` (K,), the accuracy on what each fold holds out; whether the fits converged."""

    C: float
    folds: np.ndarray
    converged: bool

    @property
    def accuracy(self) -> float:
        """The mean over folds; nan where nothing was held out."""
        return float(np.mean(self.folds)) if len(self.folds) else math.nan


def folds_of(labels: np.ndarray, folds: int, seed: int, names: Sequence[str] = ()) -> list[Fold]:
    """Stratified folds of labels int (N,), at most as many as the smallest class has rows; of 1, a tenth is held out.

    Cross-validation of that many folds is what Kohavi (1995) found best for choosing a model; a tenth is what the paper
    holds out. ValueError where a class has a single row, with its name where there are `names` of the labels.
    """
    if folds < 1:
        raise ValueError(f"folds={folds}; expected 1 for a tenth that is held out, or the number of folds")
    smallest = np.unique(labels, return_counts=True)[1].min()
    if folds == 1 or smallest < 2:
        return [stratified_split(labels, 0.1, seed=seed, names=names)]
    splitter = StratifiedKFold(min(folds, int(smallest)), shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels))


def choose_C(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[Fold],
    Cs: Sequence[float],
    fitting: Mapping[str, Any],
    solver: Callable[..., Fits] = fit_logistic,
) -> list[ChosenC]:
    """x (B, N, D) and y (N,) in [0, K) -> for each of B layers the C of the best mean accuracy over the folds.

    `fitting` are arguments of `solver`. Of equal C the middle one. A best C at an edge of the grid, and better than its
    neighbour, extends the grid there. Without `folds` C is the middle of the grid.
    """
    grid = np.array(sorted(Cs), float)
    if not folds:
        return [ChosenC(grid[len(grid) // 2], np.empty(0), True)] * len(x)

    def validate(layers: list[int], strengths: np.ndarray) -> None:
        accuracies, converged = _validate(x[layers], y, folds, strengths, fitting, solver)
        for row, layer in enumerate(layers):
            of_layer = zip(strengths[row], accuracies[:, row].T, converged[row], strict=True)
            tried[layer] |= {C: ChosenC(C, scores, bool(done)) for C, scores, done in of_layer}

    tried: list[dict[float, ChosenC]] = [{} for _ in x]
    validate(list(range(len(x))), np.tile(grid, (len(x), 1)))
    while len(grid) > 1:
        beyond = {layer: C for layer, choices in enumerate(tried) if (C := _beyond(choices, grid[1] / grid[0]))}
        if not beyond:
            break
        validate(list(beyond), np.array(list(beyond.values()))[:, None])
    return [_best(choices) for choices in tried]


def _best(choices: Mapping[float, ChosenC]) -> ChosenC:
    """The C of the best mean, of equal ones the middle; converged, if all fits of the layer are."""
    Cs = sorted(choices)
    place = middle_of_best(np.array([choices[C].accuracy for C in Cs]))
    return choices[Cs[place]]._replace(converged=all(choice.converged for choice in choices.values()))


def _beyond(choices: Mapping[float, ChosenC], ratio: float) -> float | None:
    """The next C where the best lies at an edge, strictly; None inside the grid and at 1e-8 and 1e8."""
    Cs = sorted(choices)
    means = [choices[C].accuracy for C in Cs]
    if means[0] > max(means[1:]) and Cs[0] > 1e-8:
        return Cs[0] / ratio
    if means[-1] > max(means[:-1]) and Cs[-1] < 1e8:
        return Cs[-1] * ratio
    return None


def _validate(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[Fold],
    Cs: np.ndarray,
    fitting: Mapping[str, Any],
    solver: Callable[..., Fits],
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies (K, B, S) of B layers with strengths Cs (B, S) on the rows of K folds, and what converged (B, S)."""
    if solver is fit_logistic:
        fits_of_folds = fit_folds(x, y, folds, Cs, tol=CHOOSING, **fitting)
    else:
        fits_of_folds = (solver(x[:, fit], y[fit], Cs, tol=CHOOSING, **fitting) for fit, _ in folds)
    accuracies, converged = [], np.ones(Cs.shape, bool)
    for (_, held), fits in zip(folds, fits_of_folds, strict=True):
        right = [(fits.predict(values[held], layer) == y[held]).mean(1) for layer, values in enumerate(x)]
        accuracies.append(np.stack(right))
        converged &= fits.converged
    return np.stack(accuracies), converged


def chosen_layer(choices: Mapping[Layer, ChosenC]) -> Layer:
    """The layer of the best mean, of equal ones the middle; the middle of all where nothing could be held out."""
    layers = in_depth(choices)
    means = np.array([choices[layer].accuracy for layer in layers])
    return layers[int(middle_of_best(np.nan_to_num(means)))]


def folds_inside(y: np.ndarray, k: int, seed: int) -> tuple[list[Fold], str]:
    """Splits inside k labels per class: 4 folds or as few as k allows, only the first above k = 50.

    Returned with the rule in words.
    """
    if k < 2:
        return [], "fixed"
    folds = folds_of(y, min(4, k), seed)
    used = folds[: 1 if k > 50 else None]
    return used, f"{len(used)} of {len(folds)} folds"
