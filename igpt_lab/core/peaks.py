"""Which layers may be the peak, and every layer against the chosen and the last: from `correct`, bool (N,) of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import card, line, span
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy, check_level, compare, share_reached, stacked


@dataclass(frozen=True, repr=False)
class PeakSet:
    """`layers` that may be the best; `p_values`: layer -> p of the hypothesis that no layer is better than it."""

    layers: list[Any]
    p_values: dict[Any, float]
    alpha: float
    n_test: int

    def __repr__(self) -> str:
        return line("PeakSet", self._facts())

    def _repr_html_(self) -> str:
        return card("PeakSet", self._facts())

    def _facts(self) -> dict[str, str]:
        return {
            "may be the best": f"{span(self.layers)} of {span(self.p_values)}",
            "level": f"{1 - self.alpha:.0%} for all layers together, {self.n_test:,} test images",
        }

    def to_dict(self) -> dict:
        """Its fields by name."""
        return asdict(self)


@checked
def peak_set(
    correct: Mapping[Any, np.ndarray] | Any, *, alpha: float = 0.05, n_boot: int = 10_000, seed: int = 0
) -> PeakSet:
    """The layers that may be the best one: the best of all is among them with probability 1 - alpha or more.

    `correct`: layer -> bool (N,), all on the same test images, or a result that has it, as of `probe_layers`; nothing
    needs to be chosen beforehand. A layer is out if
    some other layer beats it by more than chance, corrected for taking the strongest of all others: the subset
    selection of Gupta (1965) and Hsu (1984), in which each layer in turn is compared with all others. The statistic is
    the largest of McNemar's z; what chance makes of it comes from flipping, for each test image, the sign of all its
    differences at once (the wild bootstrap over images of Liu, 1988). Of two layers that is McNemar's exact test; of
    more it keeps their correlation over images, and is exact in the limit of many discordant images. As what was seen
    counts among the cases, p is never 0. Of several equal best layers, each by itself has that probability.
    """
    (layers, right), alpha = stacked(getattr(correct, "correct", correct)), check_level(alpha)
    wins = _wins(right)
    sums = _flipped_sums(right[:, right.any(0) & ~right.all(0)], n_boot, seed)  # an image all agree on is a 0
    p_values = {}
    for i, layer in enumerate(layers):
        scale = np.sqrt(np.maximum(wins[:, i] + wins[i], 1))
        beaten = ((wins[:, i] - wins[i]) / scale).max()
        p_values[layer] = share_reached(((sums - sums[:, [i]]) / scale).max(1), beaten)
    return PeakSet([layer for layer in layers if p_values[layer] > alpha], p_values, alpha, right.shape[1])


@checked
def layer_table(
    correct: Mapping[Any, np.ndarray] | Any,
    *,
    chosen: int | str,
    last: int | str | None = None,
    alpha: float = 0.05,
    n_boot: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of every layer, its difference to the layers `chosen` and `last`, and whether it may be the peak.

    Args:
        correct: Layer -> bool (N,), right or wrong on the same test images, or a result that has it.
        chosen: A layer that was chosen without these images, on validation. For the best layer on them: `peak_set`.
        last: The layer to compare with besides, by default the last one.
        alpha: Chance that an interval misses: 0.05 for 95%.
        n_boot: Bootstrap draws.
        seed: Of the draws.

    Returns:
        A row per layer, accuracies and differences as fractions in [-1, 1]: `layer`; `test_accuracy` with its exact
        interval `low`, `high`; `minus_chosen` and `minus_last`, this layer less that one. Of either difference `_low`,
        `_high` and `_p` for this layer alone (`compare`), and `_low_all`, `_high_all` and `_p_all` that hold for all
        layers at once (Dunnett, 1955, with the layers' own covariance). `peak_p` and `in_peak_set` are of `peak_set`.

    Raises:
        ValueError: `chosen` or `last` is not in `correct`, or rows that are not bool (N,) of one length.

    Example:
        >>> correct = {0: np.arange(100) < 60, 1: np.arange(100) < 80, 2: np.arange(100) < 70}
        >>> table = lab.layer_table(correct, chosen=1)
        >>> table[["layer", "test_accuracy", "minus_chosen", "in_peak_set"]].round(2)
           layer  test_accuracy  minus_chosen  in_peak_set
        0      0            0.6          -0.2        False
        1      1            0.8           0.0         True
        2      2            0.7          -0.1        False
    """
    layers, right = stacked(getattr(correct, "correct", correct))
    last = layers[-1] if last is None else last
    if unknown := [layer for layer in (chosen, last) if layer not in layers]:
        raise ValueError(f"layer {unknown[0]} is not in `correct`; expected one of {layers}")
    peak = peak_set(correct, alpha=alpha, n_boot=n_boot, seed=seed)
    table = pd.DataFrame(
        [{"layer": layer, **accuracy(row, alpha=alpha)} for layer, row in zip(layers, right, strict=True)]
    )
    for name, layer in (("minus_chosen", chosen), ("minus_last", last)):
        columns = _against(right, layers.index(layer), alpha, n_boot, seed)
        table = table.assign(**{name + ending: values for ending, values in columns.items()})
    return table.assign(peak_p=[peak.p_values[layer] for layer in layers], in_peak_set=table.layer.isin(peak.layers))


def _against(right: np.ndarray, reference: int, alpha: float, n_boot: int, seed: int) -> dict[str, np.ndarray]:
    """Each row of `right` minus its row `reference`: columns of `layer_table`; 0 and p = 1 for the reference itself."""
    alone = [compare(row, right[reference], alpha=alpha, n_boot=n_boot, seed=seed) for row in right]
    d, low, high, p, gains, losses = np.array(
        [(pair.difference, pair.low, pair.high, pair.p_value, pair.only_a, pair.only_b) for pair in alone]
    ).T
    largest, n = _largest_of_all(right, reference, n_boot, seed), right.shape[1] + 2  # two more, as in `compare`
    z = np.abs(gains - losses) / np.sqrt(np.maximum(gains + losses, 1))
    p_all = np.maximum(p, [share_reached(largest, statistic) for statistic in z])
    middle = (gains - losses) / n
    error = np.sqrt(((gains + losses + 2) / n - middle**2) / n)  # Bonett and Price's standard error
    reach = max(norm.isf(alpha / 2), np.quantile(largest, 1 - alpha)) * error
    low_all, high_all = np.clip([np.minimum(low, middle - reach), np.maximum(high, middle + reach)], -1, 1)
    ends = {"_low": low, "_high": high, "_low_all": low_all, "_high_all": high_all}
    for end in ends.values():
        end[reference] = 0
    return {"": d, **ends, "_p": p, "_p_all": p_all}


def _largest_of_all(right: np.ndarray, reference: int, n_boot: int, seed: int) -> np.ndarray:
    """What chance makes of the largest |z| of all differences to row `reference`: float64 (n_boot,).

    Accuracies of many test images are normal, with the covariance of the rows (Hothorn, Bretz and Westfall, 2008).
    """
    covariance = np.atleast_2d(np.cov(right, bias=True))
    variance = np.diag(covariance) + covariance[reference, reference] - 2 * covariance[reference]
    scale = np.where(variance > 1e-12, np.sqrt(np.abs(variance)), np.inf)  # 0: the same images right, no difference
    draws = np.random.default_rng(seed).multivariate_normal(np.zeros(len(right)), covariance, n_boot)
    return np.abs((draws - draws[:, [reference]]) / scale).max(1)


def _flipped_sums(right: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Sums over images of bool (L, N) with random signs, one sign an image, the same for all L: (n_boot, L)."""
    generator, columns = np.random.default_rng(seed), right.T.astype(np.float32)  # exact: whole numbers below 2^24
    n, sums = len(columns), []
    for start in tqdm(range(0, n_boot, 256), desc="peak set", leave=False, delay=2):
        size = min(256, n_boot - start), -(-n // 8)
        bits = np.unpackbits(generator.integers(0, 256, size, np.uint8), axis=1, count=n)
        sums.append(2 * (bits.astype(np.float32) @ columns) - columns.sum(0))
    return np.concatenate(sums).astype(np.float64)


def _wins(right: np.ndarray) -> np.ndarray:
    """[i, j]: the images that row i gets right and row j does not; float64 (L, L), whole numbers."""
    return right.astype(np.float64) @ ~right.T
