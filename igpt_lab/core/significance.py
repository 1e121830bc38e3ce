"""Whether two accuracies differ, and which layers may be the peak: from `correct`, bool (N,), one for each test image.

Intervals and p values are over test images, with the training images, draws and networks as they are. Two functions
add a second uncertainty: `spread` that over draws of training images, `compare_choice` that over the folds that chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import beta, binomtest, norm
from scipy.stats import t as student

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import in_depth
from igpt_lab.core.display import card, line, p_number, span
from igpt_lab.core.progress import tqdm


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
    return _share(np.asarray(permuted, float), observed)


def _outcomes(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many images only a gets right, and how many only b does."""
    return int((a & ~b).sum()), int((~a & b).sum())


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
    (layers, right), alpha = _stacked(getattr(correct, "correct", correct)), check_level(alpha)
    wins = _wins(right)
    sums = _flipped_sums(right[:, right.any(0) & ~right.all(0)], n_boot, seed)  # an image all agree on is a 0
    p_values = {}
    for i, layer in enumerate(layers):
        scale = np.sqrt(np.maximum(wins[:, i] + wins[i], 1))
        beaten = ((wins[:, i] - wins[i]) / scale).max()
        p_values[layer] = _share(((sums - sums[:, [i]]) / scale).max(1), beaten)
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
    layers, right = _stacked(getattr(correct, "correct", correct))
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
    _, right = _stacked(correct_by_draw, "draw")
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


def exact_interval(hits: npt.ArrayLike, n: npt.ArrayLike, *, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share of `hits` in n, by Clopper and Pearson (1934); arrays allowed, n need not be whole."""
    right, alpha = np.asarray(hits, float), check_level(alpha)
    misses = np.asarray(n, float) - right
    low = beta.ppf(alpha / 2, np.where(right > 0, right, 1), misses + 1)
    high = beta.isf(alpha / 2, right + 1, np.where(misses > 0, misses, 1))
    return np.where(right > 0, low, 0.0), np.where(misses > 0, high, 1.0)


def _mcnemar(only_a: int, only_b: int) -> float:
    return float(binomtest(int(only_a), int(only_a + only_b)).pvalue) if only_a + only_b else 1.0


def _against(right: np.ndarray, reference: int, alpha: float, n_boot: int, seed: int) -> dict[str, np.ndarray]:
    """Each row of `right` minus its row `reference`: columns of `layer_table`; 0 and p = 1 for the reference itself."""
    alone = [compare(row, right[reference], alpha=alpha, n_boot=n_boot, seed=seed) for row in right]
    d, low, high, p, gains, losses = np.array(
        [(pair.difference, pair.low, pair.high, pair.p_value, pair.only_a, pair.only_b) for pair in alone]
    ).T
    largest, n = _largest_of_all(right, reference, n_boot, seed), right.shape[1] + 2  # two more, as in `compare`
    z = np.abs(gains - losses) / np.sqrt(np.maximum(gains + losses, 1))
    p_all = np.maximum(p, [_share(largest, statistic) for statistic in z])
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


def _share(by_chance: np.ndarray, observed: float) -> float:
    """Share of chance's values that reach the observed one, which is itself among them (so never 0)."""
    return float((1 + (by_chance >= observed - 1e-9).sum()) / (1 + len(by_chance)))


def _wins(right: np.ndarray) -> np.ndarray:
    """[i, j]: the images that row i gets right and row j does not; float64 (L, L), whole numbers."""
    return right.astype(np.float64) @ ~right.T


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


def _stacked(correct: Mapping[Any, np.ndarray], what: str = "layer") -> tuple[list[Any], np.ndarray]:
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
