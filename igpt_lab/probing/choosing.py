"""C and layer, chosen on rows that are held out: a grid of C that extends itself, and the most accurate layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from igpt_lab.probing.solvers.logistic import Fits, fit_logistic

Fold = tuple[np.ndarray, np.ndarray]  # rows to fit, rows held out
Choice = tuple[float, float, bool]  # C, its mean accuracy on the held-out rows, did its fits converge

CHOOSING = 1e-5  # tolerance of the fits that choose C; it moves no validation accuracy by more than a row or two


def choose_C(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[Fold],
    Cs: Sequence[float],
    fitting: Mapping[str, Any],
    solver: Callable[..., Fits] = fit_logistic,
) -> list[Choice]:
    """x (B, N, D) and y (N,) in [0, K) -> for each of B layers the C of the best mean accuracy on held-out rows.

    `fitting` are arguments of `solver`. Of equals the smallest C. A best C at an edge of the grid, and better than its
    neighbour, extends the grid there. Without `folds` C is the middle of the grid, and its accuracy is nan.
    """
    grid = np.array(sorted(Cs), float)
    if not folds:
        return [(grid[len(grid) // 2], math.nan, True)] * len(x)
    accuracies, converged = _validate(x, y, folds, grid, fitting, solver)
    tried = [{C: (accuracies[i, j], converged[i, j]) for j, C in enumerate(grid)} for i in range(len(x))]
    if len(grid) > 1:

        def validate(layers: list[int], Cs: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
            return _validate(x[layers], y, folds, Cs, fitting, solver)

        _extend(tried, grid[1] / grid[0], validate)
    return [_best_C(scores) for scores in tried]


def _extend(tried: list[dict[float, tuple[float, bool]]], ratio: float, validate: Callable) -> None:
    """Add to `tried`, for each layer C -> (accuracy, converged), what lies beyond as long as the best is at an edge.

    `validate` takes the places of layers and for each of them a list of C, and returns what `_validate` does.
    """
    while True:
        beyond: dict[int, float] = {}
        for layer, scores in enumerate(tried):
            C = _beyond(scores, ratio)
            if C is not None:
                beyond[layer] = C
        if not beyond:
            return
        accuracies, converged = validate(list(beyond), [[C] for C in beyond.values()])
        for row, (layer, C) in enumerate(beyond.items()):
            tried[layer][C] = accuracies[row, 0], converged[row, 0]


def _best_C(scores: dict[float, tuple[float, bool]]) -> Choice:
    """Of one layer's C -> (accuracy, converged) the best C, its accuracy, and whether all fits converged."""
    best = max(sorted(scores), key=lambda C: scores[C][0])
    return best, float(scores[best][0]), all(converged for _, converged in scores.values())


def _beyond(scores: dict[float, tuple[float, bool]], ratio: float) -> float | None:
    """The next C where the best of `scores` lies at an edge, strictly; None inside the grid and at 1e-8 and 1e8."""
    Cs = sorted(scores)
    if scores[Cs[0]][0] > max(scores[C][0] for C in Cs[1:]) and Cs[0] > 1e-8:
        return Cs[0] / ratio
    if scores[Cs[-1]][0] > max(scores[C][0] for C in Cs[:-1]) and Cs[-1] < 1e8:
        return Cs[-1] * ratio
    return None


def _validate(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[Fold],
    Cs: np.ndarray | Sequence[Sequence[float]],
    fitting: Mapping[str, Any],
    solver: Callable[..., Fits],
) -> tuple[np.ndarray, np.ndarray]:
    """Of B layers and S strengths the mean accuracy on held-out rows, and whether all fits converged: each (B, S).

    `Cs` are those of all layers (S,), or those of each (B, S).
    """
    accuracies, converged = np.zeros(()), np.ones((), bool)
    for fit, held in folds:
        fits = solver(x[:, fit], y[fit], Cs, tol=CHOOSING, **fitting)
        right = [(fits.predict(values[held], layer) == y[held]).mean(1) for layer, values in enumerate(x)]
        accuracies = accuracies + np.stack(right) / len(folds)
        converged = converged & fits.converged
    return accuracies, converged


def best_layer(choices: Mapping[int, Choice]) -> int:
    """The layer of the best validation accuracy, or the middle one where nothing could be held out."""
    if any(math.isnan(accuracy) for _, accuracy, _ in choices.values()):
        return sorted(choices)[len(choices) // 2]
    return max(choices, key=lambda layer: choices[layer][1])


def folds_of(y: np.ndarray, k: int, seed: int) -> tuple[list[Fold], str]:
    """Splits inside k labels per class: 4 folds or as few as k allows, only the first above k = 50.

    Returned with the rule in words.
    """
    if k < 2:
        return [], "fixed"
    folds = list(StratifiedKFold(min(4, k), shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    used = folds[: 1 if k > 50 else None]
    return used, f"{len(used)} of {len(folds)} folds"
