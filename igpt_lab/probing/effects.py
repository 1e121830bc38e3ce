"""What the factors of a protocol change, alone and in pairs, on the same test images: a row for each difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pandas as pd
from scipy.stats import binom

from igpt_lab.core.significance import compare, holm, mean_difference

AT = ("chosen layer", "last layer", "drop")
ENDS = ("difference", "low", "high")
AVERAGE = "average"
Setting = tuple[str, ...]
Correct = Mapping[Setting, Mapping[str, np.ndarray]]  # of each setting, at the first two of AT: bool (N,)


def effects_of(correct: Correct, factors: Mapping[str, tuple[str, str]], recipe: Setting) -> pd.DataFrame:
    """Rows for every factor, for the first levels of all against the setting `recipe`, and for pairs of factors.

    The columns are those of `Ablation.effects`. `p_holm` corrects within a family: the pairs of settings, the averages,
    the three differences to the recipe, the interactions.
    """
    ours = tuple(own for own, _ in factors.values())
    rows = [*_factor_rows(correct, factors), *_recipe_rows(correct, ours, recipe), *_interactions(correct, factors)]
    table = pd.DataFrame(rows)
    own = table.factor.isin(list(factors))
    family = table.factor.where(~own, np.where(table.others == AVERAGE, AVERAGE, "pair"))
    return with_holm(table, family)


def with_holm(table: pd.DataFrame, family: pd.Series | None = None) -> pd.DataFrame:
    """The table with `p_holm` behind `p_value`: corrected within each family of its rows, by default all of them."""
    families = pd.Series("", table.index) if family is None else family
    corrected = pd.Series(np.nan, table.index)
    for _, p_values in table.p_value.groupby(families):
        corrected.update(pd.Series(holm(p_values.to_dict())))
    table = table.drop(columns="p_holm", errors="ignore")
    table.insert(table.columns.get_loc("p_value") + 1, "p_holm", corrected)
    return table


def average_difference(differences: np.ndarray) -> dict:
    """Mean of paired differences (P, N) over pairs and N test images, with its interval and p, both over images.

    Differences are whole numbers: 1, 0 or -1, or differences of these. Interval: `significance.mean_difference`. p: the
    exact two-sided test of Fisher's randomisation (1935), which flips the sign of all that one image adds; for one pair
    McNemar's.
    """
    return mean_difference(differences) | {"p_value": sign_flip_p(differences.sum(0))}


def sign_flip_p(sums: np.ndarray) -> float:
    """How often random signs make |sum| of whole numbers (N,) as large as it is: exact, by convolution."""
    sums = np.rint(sums).astype(int)
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chance = np.ones(1)  # of each sum of those numbers whose sign is +
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(size * count + 1)
        steps[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, steps)
    beyond = (np.abs(sums).sum() + abs(sums.sum())) // 2
    return min(1.0, 2 * float(chance[beyond:].sum()))


def _factor_rows(correct: Correct, factors: Mapping[str, tuple[str, str]]) -> Iterator[dict]:
    """Of each factor: pairs of settings that differ in it alone, then their average."""
    for factor, (a, b) in factors.items():
        contexts = list(product(*[levels for name, levels in factors.items() if name != factor]))
        place = list(factors).index(factor)
        pairs = [(rest[:place] + (a,) + rest[place:], rest[:place] + (b,) + rest[place:]) for rest in contexts]
        names = {"factor": factor, "a": a, "b": b}
        for at in AT[:2]:
            for rest, pair in zip(contexts, pairs, strict=True):
                yield names | {"others": ", ".join(rest), "at": at} | _compared(correct, pair, at)
        for at in AT:
            differences = np.stack([_paired(correct, pair, at) for pair in pairs])
            yield names | {"others": AVERAGE, "at": at} | average_difference(differences)


def _recipe_rows(correct: Correct, ours: Setting, recipe: Setting) -> Iterator[dict]:
    names = {"factor": "recipe", "a": "ours", "b": "transformers", "others": ""}
    for at in AT[:2]:
        yield names | {"at": at} | _compared(correct, (ours, recipe), at)
    yield names | {"at": "drop"} | average_difference(_paired(correct, (ours, recipe), "drop")[None])


def _interactions(correct: Correct, factors: Mapping[str, tuple[str, str]]) -> Iterator[dict]:
    """Of each pair of factors how much more the first one's choice gains beside the second one's choice than without.

    That is the difference of differences, averaged over the levels of the other factors.
    """
    for first, second in combinations(factors, 2):
        rest = [name for name in factors if name not in (first, second)]
        for at in AT:
            differences = []
            for levels in product(*[factors[name] for name in rest]):
                fixed = dict(zip(rest, levels, strict=True))
                named = [fixed | {first: a, second: b} for a, b in product(factors[first], factors[second])]
                ours, first_alone, second_alone, neither = [tuple(map(names.__getitem__, factors)) for names in named]
                gain_beside, gain_without = (ours, second_alone), (first_alone, neither)
                differences.append(_paired(correct, gain_beside, at) - _paired(correct, gain_without, at))
            row = {"factor": "interaction", "a": first, "b": second, "others": "", "at": at}
            yield row | average_difference(np.stack(differences))


def _compared(correct: Correct, pair: tuple[Setting, Setting], at: str) -> dict:
    """`significance.compare` of two settings at one layer."""
    compared = compare(*[correct[setting][at] for setting in pair])
    return {name: getattr(compared, name) for name in (*ENDS, "p_value", "n_test")}


def _paired(correct: Correct, pair: Sequence[Setting], at: str) -> np.ndarray:
    """What each test image adds to the difference of two settings: int (N,)."""
    if at == "drop":
        return _paired(correct, pair, AT[0]) - _paired(correct, pair, AT[1])
    a, b = (correct[setting][at].astype(int) for setting in pair)
    return a - b
