"""The choice of a layer by validation: how sure it is, and the interval of a drop that counts it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import plain_layer
from igpt_lab.core.display import card, line, span
from igpt_lab.core.significance import check_level, check_right

NAMED = 0.025  # the standard error of a validation accuracy above which it names no layer
ROUNDING = 1e-12  # of a mean of fold accuracies; less is a tie


@dataclass(frozen=True, repr=False)
class Choice:
    """The `layer`, a number or a name, that validation chose, and how sure that is, from `n` held-out images.

    `tied`: layers with the same, highest `accuracy`; the middle one of them is chosen. `within_error`: layers at most
    one standard error, `error`, below it (Breiman et al., 1984, section 3.4.3). `enough`: held-out images with which
    the choice would not be `poor`, if accuracies stay as they are; None where no number of them would do.
    """

    layer: Any
    tied: list[Any]
    within_error: list[Any]
    n_layers: int
    accuracy: float
    error: float
    n: int
    enough: int | None

    def __repr__(self) -> str:
        return line("Choice", self._facts())

    def _repr_html_(self) -> str:
        return card("Choice", self._facts())

    def _facts(self) -> dict[str, str]:
        near = span(self.within_error) if len(self.within_error) > 1 else ""
        return {
            "layer": f"{self.layer} of {self.n_layers} layers",
            "validation accuracy": f"{self.accuracy:.1%}, standard error {self.error:.1%}, {self.n:,} held-out images",
            "tied": span(self.tied) if len(self.tied) > 1 else "",
            "within one standard error": near,
            "beware": self.words(),
        }

    @property
    def poor(self) -> bool:
        """More than half of the layers are within one standard error, or that is above 2.5 points."""
        return self.n_layers > 2 and (self.error > NAMED or 2 * len(self.within_error) > self.n_layers)

    def words(self) -> str:
        """What is wrong with a poor choice, and how many images would do; "" for a good one."""
        if not self.poor:
            return ""
        error, many = f"{100 * self.error:.1f} points on {self.n:,} held-out images", len(self.within_error)
        why = f"one standard error is {error}"
        if 2 * many > self.n_layers:
            why = f"{many} of {self.n_layers} layers are within one standard error ({error})"
        would = f"about {self.enough:,} would do" if self.enough else "these layers differ too little for any number"
        return f"a poor choice: {why}; {would}"


@checked
def choice_of(layers: Sequence[int | str], accuracies: Sequence[float] | np.ndarray, n: int) -> Choice:
    """The choice among `layers` by their `accuracies` (L,), each over the same n held-out images.

    Columns `layer`, `validation_accuracy` and `n_validation` of a table of probes have them.
    """
    means, count = np.asarray(accuracies, float), len(layers)
    if means.shape != (count,) or not count or not np.isfinite(means).all() or n < 1:
        raise ValueError(
            f"{means.size} accuracies of {count} layers on {n} images; expected one finite accuracy for each layer"
        )
    place, top = int(middle_of_best(means)), float(means.max())
    error = math.sqrt(top * (1 - top) / n)
    tied, near = means >= top - ROUNDING, means >= top - max(error, ROUNDING)
    gap = top - np.sort(means)[::-1][count // 2] if count > 2 else math.inf  # to the first that must not be within
    factor = max((error / gap) ** 2 if gap > ROUNDING else math.inf, (error / NAMED) ** 2)
    enough = max(n, _rounded_up(n * factor)) if math.isfinite(factor) else None
    names = list(map(plain_layer, layers))
    among = [[names[i] for i in np.flatnonzero(held)] for held in (tied, near)]
    return Choice(names[place], among[0], among[1], count, top, error, int(n), enough)


def middle_of_best(means: np.ndarray) -> np.ndarray:
    """Places int (...) of the largest of `means` (..., L); of equal ones the middle, of two the later."""
    tied = means >= means.max(-1, keepdims=True) - ROUNDING
    return (tied.cumsum(-1) > tied.sum(-1, keepdims=True) // 2).argmax(-1)


def _rounded_up(number: float) -> int:
    """To one digit, or to one and a half below 20: 1,700 -> 2,000, 1,200 -> 1,500."""
    unit = 10 ** math.floor(math.log10(max(number, 1)))
    step = unit / 2 if number < 2 * unit else unit
    return int(math.ceil(number / step) * step)


@checked
def compare_choice(
    correct: Mapping[Any, np.ndarray],
    folds: np.ndarray,
    last: int | str,
    *,
    alpha: float = 0.05,
    n_boot: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of chosen layer minus layer `last`: a bootstrap over the folds that choose and over test images.

    `correct`: layer -> bool (N,); `folds` (K, L): accuracies of these layers, in this order, on the rows that each of K
    folds held out. Each draw takes K folds with replacement and chooses the layer again: how far that layer's
    difference lies from the mean over draws is what the choice adds, shrunk by what the test images alone make of it.
    It is added to the draws of `compare` for the layer that all folds choose: where every draw chooses that one, the
    interval is that of `compare`.
    What is covered is the difference that this way of choosing has on average over images; the probes' training rows
    stay as they are.
    """
    layers, right = list(correct), np.stack([check_right(correct[layer], f"layer {layer}") for layer in correct])
    folds = np.asarray(folds, float)
    if folds.ndim != 2 or folds.shape[1] != len(layers) or last not in layers:
        raise ValueError(f"folds {folds.shape} of layers {layers}, the last {last}; expected (K, L), and one of them")
    count = len(folds)
    of_folds, of_images = np.random.default_rng([seed, 1]), np.random.default_rng(seed)  # the latter as in `compare`
    means = of_folds.multinomial(count, np.full(count, 1 / count), size=n_boot) @ folds / count
    places, times = np.unique(middle_of_best(means), return_counts=True)
    lost = right.astype(float) - right[layers.index(last)]
    added = np.repeat(_beyond_noise(lost[places], times / n_boot), times)
    row = lost[int(middle_of_best(folds.mean(0)))]
    gains, losses = (row > 0).sum(), (row < 0).sum()
    n = len(row)
    drawn = of_images.multinomial(n + 2, np.array([gains + 1, losses + 1, n - gains - losses]) / (n + 2), size=n_boot)
    draws = (drawn[:, 0] - drawn[:, 1]) / (n + 2) + added
    low, high = np.quantile(draws, [check_level(alpha) / 2, 1 - alpha / 2])
    return float(low), float(high)


def _beyond_noise(differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How far the mean of each row of differences (L, N) lies from the rows' weighted mean, less the images' noise.

    The means differ also because these images are a sample; their spread is shrunk by the variance of that.
    """
    centred = differences - weights @ differences
    shifts = centred.mean(1)
    spread, noise = weights @ shifts**2, weights @ centred.var(1) / differences.shape[1]
    return shifts * math.sqrt(max(0.0, 1 - noise / spread)) if spread > 0 else shifts
