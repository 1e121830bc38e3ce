"""Accuracy over several draws of the training images: how far other draws, and other test images, may be from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import t as student

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import check_level, exact_interval, stacked


@dataclass(frozen=True)
class Spread:
    """Mean accuracy of several draws, and two uncertainties: over draws, and over test images.

    `standard_deviation` over draws (n - 1; nan for one draw) holds the test images as they are; `low` and `high`, the
    interval of `mean` over test images, hold the draws as they are. `low_all` and `high_all`, the interval over both,
    say how well other draws do on other images (nan for one draw).
    """

    mean: float
    standard_deviation: float
    n_draws: int
    low: float
    high: float
    n_test: int
    low_all: float = math.nan
    high_all: float = math.nan

    def to_dict(self) -> dict:
        """Its fields by name."""
        return asdict(self)


@checked
def spread(
    correct_by_draw: Mapping[int, np.ndarray] | Sequence[np.ndarray], *, overlap: float = 0.0, alpha: float = 0.05
) -> Spread:
    """Accuracy over draws of the training images: bool (N,) for each draw, all on the same N test images.

    The interval over test images is Clopper and Pearson's with as many images as would give the mean its variance
    (Korn and Graubard, 1998): one draw gives `accuracy`, draws that err on the same images give no more than one. The
    interval over draws and images together contains it; `overlap`, in [0, 1], is the mean share of their training
    images that two draws have in common (see `_over_both`).
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap={overlap}; expected the share of training images of two draws, from 0 to 1")
    if not isinstance(correct_by_draw, Mapping):
        correct_by_draw = dict(enumerate(correct_by_draw))
    _, right = stacked(correct_by_draw, "draw")
    draws, n = right.shape
    of_draws, of_images = right.mean(1), right.mean(0)
    mean, variance = of_images.mean(), of_images.var()
    worth = min(n * draws, n * mean * (1 - mean) / variance) if variance > 0 else n * (draws if 0 < mean < 1 else 1)
    low, high = exact_interval(mean * worth, worth, alpha=alpha)
    deviation = float(of_draws.std(ddof=1)) if draws > 1 else float("nan")
    reach = _over_both(right, overlap, check_level(alpha))
    low_all, high_all = np.clip([np.minimum(low, mean - reach), np.maximum(high, mean + reach)], 0, 1).tolist()
    return Spread(float(mean), deviation, draws, float(low), float(high), n, low_all, high_all)


def _over_both(right: np.ndarray, overlap: float, alpha: float) -> float:
    """Half the width of the interval of the mean of bool (R, N), over R draws and N images; nan for one of either.

    Draws and images are crossed random effects: the mean has the variance var_draws / R + var_images / N +
    var_residual / (R N), from the mean squares of a two-way table with one observation a cell (Searle, Casella and
    McCulloch, 1992, chapter 4), and t quantiles with Satterthwaite's (1946) degrees of freedom. A negative var_draws is
    taken as 0. Draws that share training images deviate less from one another than from other draws: as for
    overlapping training sets (Nadeau and Bengio, 2003), their effects are taken to correlate by the share.
    """
    draws, n = right.shape
    if draws < 2 or n < 2 or overlap == 1:
        return math.nan
    of_draws, of_images = right.mean(1, keepdims=True), right.mean(0)
    residual = right - of_draws - of_images + right.mean()
    freedom = np.array([draws - 1, n - 1, (draws - 1) * (n - 1)])
    sums = [n * draws * of_draws.var(), n * draws * of_images.var(), (residual**2).sum()]
    by_draws, by_images, by_rest = sums / freedom
    grown = (1 + (draws - 1) * overlap) / (1 - overlap) if by_draws > by_rest else 0.0
    parts = np.array([grown * by_draws, by_images, -grown * by_rest])  # sum to R N times the variance of the mean
    if not parts.any():
        return 0.0
    degrees = parts.sum() ** 2 / (parts**2 / freedom).sum()
    return float(student.isf(alpha / 2, degrees) * math.sqrt(parts.sum() / right.size))
