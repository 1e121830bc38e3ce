"""Whether two accuracies differ: from `correct`, bool (N,), one for each test image.

Intervals and p values are over test images, with the training images, draws and networks as they are. `draws.spread`
adds the uncertainty over draws of training images, `choice.compare_choice` that over the folds that chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import beta, binomtest
from scipy.stats import t as student

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import in_depth
from igpt_lab.core.display import card, line, p_number


@dataclass(frozen=True, repr=False)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same test images: `difference`, with its interval by bootstrap.

    `only_a`, `only_b`: test images that only one of the two gets right. `p_value`: McNemar's exact test.
    """

    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    n_test: int
    p_value: float

    def __repr__(self) -> str:
        return line("PairedDifference", self._facts())

    def _repr_html_(self) -> str:
        return card("PairedDifference", self._facts())

    def _facts(self) -> dict[str, str]:
        return {
            "accuracy": f"{self.accuracy_a:.1%} of a, {self.accuracy_b:.1%} of b",
            "difference": f"{100 * self.difference:+.1f} points [{100 * self.low:.1f}, {100 * self.high:.1f}]",
            "only one right": f"{self.only_a:,} images a, {self.only_b:,} b",
            "p": f"{p_number(self.p_value)} (McNemar's exact test, {self.n_test:,} test images)",
        }

    def to_dict(self) -> dict:
        """Its fields by name."""
        return asdict(self)


@checked
def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of one family of claims, corrected so that any false one has probability p or less (Holm, 1979)."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


@checked
def claims(comparisons: Mapping[str, PairedDifference], *, alpha: float = 0.05) -> pd.DataFrame:
    """A family of claims, each that a difference is above 0.

    A row per claim: `claim`; `difference` with its interval `low`, `high`; `p_value`, and `p_holm`, corrected for the
    family (`holm`); `n_test`; `verdict`: "holds" or "the opposite holds" where `p_holm` is at most `alpha`, else "not
    resolved".
    """
    corrected, rows = holm({name: paired.p_value for name, paired in comparisons.items()}), []
    for name, paired in comparisons.items():
        sign = "holds" if paired.difference > 0 else "the opposite holds"
        verdict = sign if corrected[name] <= check_level(alpha) else "not resolved"
        ends = {"difference": paired.difference, "low": paired.low, "high": paired.high}
        tests = {"p_value": paired.p_value, "p_holm": corrected[name], "n_test": paired.n_test}
        rows.append({"claim": name, **ends, **tests, "verdict": verdict})
    return pd.DataFrame(rows)


def accuracy(correct: np.ndarray, *, alpha: float = 0.05) -> dict[str, float]:
    """Accuracy of bool (N,) with its interval, by Clopper and Pearson (1934): exact for independent test images."""
    right = check_right(correct, "correct")
    low, high = exact_interval(right.sum(), len(right), alpha=alpha)
    return {"test_accuracy": float(right.mean()), "low": float(low), "high": float(high)}


@checked
def compare(
    a: np.ndarray,
    b: np.ndarray,
    *,
    index_a: np.ndarray | None = None,
    index_b: np.ndarray | None = None,
    alpha: float = 0.05,
    n_boot: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Any two layers, models or settings, paired: which of them is right more often on the same N test images?

    The interval is a percentile bootstrap over test images, which for a paired difference is a draw of their four
    possible outcomes. To the N images come two more, one that only a gets right and one that only b does (Bonett and
    Price, 2012): without them the interval of two that agree on all images would have no width, and where they rarely
    differ it would be too narrow.

    Args:
        a, b: bool (N,), right or wrong on each test image.
        index_a, index_b: int (N,), rows of the images in their source; both or neither. They must be equal.
        alpha: Chance that the interval misses the difference: 0.05 for 95%.
        n_boot: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `PairedDifference`: accuracies and their difference as fractions, the ends of its interval, how many images only
        one of the two gets right, and the p of McNemar's exact test (1947), two-sided.

    Raises:
        ValueError: Not bool (N,), another number of images, other images by their index, or `alpha` outside (0, 1).

    Example:
        >>> a = np.array([True] * 70 + [False] * 30)
        >>> b = np.array([True] * 55 + [False] * 45)
        >>> paired = lab.compare(a, b)
        >>> round(paired.difference, 2), paired.only_a, paired.only_b, round(paired.p_value, 6)
        (0.15, 15, 0, 6.1e-05)
    """
    a, b = check_right(a, "a"), check_right(b, "b")
    _same_images(a, b, index_a, index_b)
    (only_a, only_b), n = _outcomes(a, b), len(a)
    shares = np.array([only_a + 1, only_b + 1, n - only_a - only_b]) / (n + 2)
    draws = np.random.default_rng(seed).multinomial(n + 2, shares, size=n_boot)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / (n + 2), [check_level(alpha) / 2, 1 - alpha / 2])
    return PairedDifference(
        accuracy_a=float(a.mean()), accuracy_b=float(b.mean()), difference=(only_a - only_b) / n, low=float(low),
        high=float(high), only_a=only_a, only_b=only_b, n_test=n, p_value=_mcnemar(only_a, only_b),
    )  # fmt: skip


def mean_difference(differences: np.ndarray, *, alpha: float = 0.05, n_boot: int = 10_000, seed: int = 0) -> dict:
    """Mean of paired differences (P, N) over pairs and N test images, with its interval: a bootstrap over images.

    A pair may be of two accuracies, or of two drops. As in `compare`, two images come to the N, one that speaks wholly
    for either side. No p value.
    """
    of_images = np.append(differences.mean(0), [1.0, -1.0])
    values, counts = np.unique(of_images, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(of_images), counts / len(of_images), size=n_boot)
    low, high = np.quantile(draws @ values / len(of_images), [check_level(alpha) / 2, 1 - alpha / 2])
    ends = {"difference": float(differences.mean()), "low": float(low), "high": float(high)}
    return ends | {"p_value": float("nan"), "n_test": differences.shape[1]}


def mean_interval(values: np.ndarray, *, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) over the first axis of (N, ...), of images or seeds: Student's t interval, NaN of one."""
    values, n = np.asarray(values, float), len(values)
    mean, level = values.mean(0), check_level(alpha)
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    reach = student.isf(level / 2, n - 1) * values.std(0, ddof=1) / math.sqrt(n)
    return mean, mean - reach, mean + reach


@checked
def permutation_p(observed: float, permuted: Sequence[float] | np.ndarray | pd.Series) -> float:
    """p of an accuracy: the share of accuracies under permuted labels that reach it, itself among them.

    p is never 0 (Phipson and Smyth, 2010): with ten permutations it is 1 / 11 or more.
    """
    return share_reached(np.asarray(permuted, float), observed)


def _outcomes(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many images only a gets right, and how many only b does."""
    return int((a & ~b).sum()), int((~a & b).sum())


def exact_interval(hits: npt.ArrayLike, n: npt.ArrayLike, *, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share of `hits` in n, by Clopper and Pearson (1934); arrays allowed, n need not be whole."""
    right, alpha = np.asarray(hits, float), check_level(alpha)
    misses = np.asarray(n, float) - right
    low = beta.ppf(alpha / 2, np.where(right > 0, right, 1), misses + 1)
    high = beta.isf(alpha / 2, right + 1, np.where(misses > 0, misses, 1))
    return np.where(right > 0, low, 0.0), np.where(misses > 0, high, 1.0)


def _mcnemar(only_a: int, only_b: int) -> float:
    return float(binomtest(int(only_a), int(only_a + only_b)).pvalue) if only_a + only_b else 1.0


def share_reached(by_chance: np.ndarray, observed: float) -> float:
    """Share of chance's values that reach the observed one, which is itself among them (so never 0)."""
    return float((1 + (by_chance >= observed - 1e-9).sum()) / (1 + len(by_chance)))


def check_level(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha}; expected the chance of an error, between 0 and 1, such as 0.05 for 95 %")
    return alpha


def check_right(correct: np.ndarray, name: str) -> np.ndarray:
    correct = np.asarray(correct)
    if correct.dtype != bool or correct.ndim != 1 or not len(correct):
        raise ValueError(
            f"{name} is {correct.dtype} {correct.shape}; expected bool (N,), N > 0: such as predictions == labels"
        )
    return correct


def stacked(correct: Mapping[Any, np.ndarray], what: str = "layer") -> tuple[list[Any], np.ndarray]:
    """Keys in ascending order, names in theirs, and bool (L, N)."""
    rows = {key: check_right(correct[key], f"{what} {key}") for key in in_depth(correct)}
    if len({len(row) for row in rows.values()}) != 1:
        lengths = {key: len(row) for key, row in rows.items()} or f"no {what}"
        raise ValueError(f"test images: {lengths}; expected at least one {what}, and the same images for each")
    return list(rows), np.stack(list(rows.values()))


def _same_images(a: np.ndarray, b: np.ndarray, index_a: np.ndarray | None, index_b: np.ndarray | None) -> None:
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} test images and b {len(b)}; a paired test needs the same ones")
    if (index_a is None) != (index_b is None):
        raise ValueError("only one of index_a and index_b is given; expected both, or neither")
    if index_a is None or index_b is None:
        return
    for name, index in (("index_a", index_a), ("index_b", index_b)):
        if np.shape(index) != a.shape:
            raise ValueError(f"{name} is {np.shape(index)} for {len(a)} test images; expected {a.shape}")
    differ = int(np.not_equal(index_a, index_b).sum())
    if differ:
        raise ValueError(
            f"{differ} of {len(a)} test images differ between a and b; "
            "sort both by index, and keep the images that both have"
        )
