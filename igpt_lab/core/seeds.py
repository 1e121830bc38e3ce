"""The third uncertainty: what another seed of pretraining changes, of a table with a row for each run and layer.

All seeds are judged on the same test images. Noise of these images that is common to all seeds is not in an interval
over seeds, and how seeds differ is not in an interval over images: both are shown, and never merged.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import MODEL, control_names, span
from igpt_lab.core.significance import holm, mean_interval

SEEDED = re.compile(r"(?P<family>.+)-seed-(?P<seed>\d+)")
OVER_IMAGES = {  # measure of a run -> columns with its interval over images
    "depth": ("peak_low", "peak_high"),
    "height": ("low", "high"),
    "drop": ("drop_low", "drop_high"),
}


@dataclass(frozen=True)
class OverSeeds:
    """`mean` of n seeds, `standard_deviation` (n - 1), and the t interval `low`, `high` of the mean.

    Of one seed the deviation and both ends are nan.
    """

    mean: float
    standard_deviation: float
    low: float
    high: float
    n_seeds: int

    def to_dict(self) -> dict:
        """Its fields by name."""
        return asdict(self)


@checked
def over_seeds(values: Sequence[float] | np.ndarray, *, alpha: float = 0.05) -> OverSeeds:
    """Mean of (n,) values, one for each seed of pretraining, and its t interval (Student, 1908).

    The interval is of the mean over all seeds, where values of seeds are normal. All seeds share the test images: image
    noise that is common to them moves all values alike and is not in this interval, however many seeds there are. The
    interval of seeds that are all alike, as chosen layers may be, has no width, which says nothing of other seeds.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values {values.tolist()}; expected one finite number for each seed")
    mean, low, high = map(float, mean_interval(values, alpha=alpha))
    deviation = float(values.std(ddof=1)) if len(values) > 1 else np.nan
    return OverSeeds(mean, deviation, low, high, len(values))


def is_seeded(name: str) -> bool:
    """Whether a run is named NAME-seed-S."""
    return SEEDED.fullmatch(name) is not None


def families_of(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Name of a run -> its family and seed: NAME-seed-S is seed S of NAME; any other name is seed 0 of itself."""
    parts = {name: SEEDED.fullmatch(name) for name in names}
    keys = {name: (part["family"], int(part["seed"])) if part else (name, 0) for name, part in parts.items()}
    if twice := [name for name, key in keys.items() if list(keys.values()).count(key) > 1]:
        raise ValueError(f"{', '.join(twice)} are of the same family and seed; expected one run of each seed")
    return keys


@checked
def group_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `family` and `seed_of_pretraining` in front, from the names in its column `model`.

    A run NAME-seed-S is of family NAME, with seed S; a run NAME has the seed 0, `pretrain`'s default.
    """
    keys = families_of(table.model)
    families, seeds = zip(*map(keys.__getitem__, table.model), strict=True)
    table = table.drop(columns=["family", "seed_of_pretraining"], errors="ignore")
    table.insert(0, "family", families)
    table.insert(1, "seed_of_pretraining", seeds)
    return table


@checked
def summarise_runs(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each run of a table of `group_by_seed`: where its curve begins, peaks and ends.

    `depth`: chosen layer as a share of the last one. `height`, `low`, `high`: accuracy of the chosen layer and its
    interval over images; `first`, `last`: accuracies of the ends. `drop`: chosen less last, with `drop_low` and
    `drop_high` over images, `drop_p`, and `drop_p_holm`, corrected for all runs of the table. `peak_set`: the layers
    that may be the best (`peaks.peak_set`), as words, and `peak_low`, `peak_high`: the first and last of them as
    shares. Layers are those that were probed.
    """
    own = table[control_names(table.control) == MODEL] if "control" in table else table
    rows = [_run(run.sort_values("layer")) for _, run in own.groupby(["family", "seed_of_pretraining"], sort=False)]
    runs = pd.DataFrame(rows)
    return runs.assign(drop_p_holm=_holm(runs.drop_p)) if "drop_p" in runs else runs


def _run(run: pd.DataFrame) -> dict[str, object]:
    """The row of `summarise_runs` for the layers of one run, in order."""
    chosen, name = run[run.chosen.eq(True)], f"{run.family.iloc[0]}, seed {run.seed_of_pretraining.iloc[0]}"
    if len(chosen) != 1:
        raise ValueError(f"{name}: {len(chosen)} layers are marked as chosen; expected one, of one checkpoint")
    best, last = chosen.iloc[0], run.iloc[-1]
    deepest = max(last.layer, 1)
    row: dict[str, object] = {column: best[column] for column in ("family", "seed_of_pretraining")}
    row |= {column: best[column] for column in ("step", "loss", "loss_error", "n_test") if column in run}
    row |= {"chosen_layer": best.layer, "last_layer": last.layer, "depth": best.layer / deepest}
    row |= {"height": best.test_accuracy, "low": best.low, "high": best.high}
    row |= {"first": run.test_accuracy.iloc[0], "last": last.test_accuracy}
    row |= {"drop": best.test_accuracy - last.test_accuracy}
    row |= {column: best[column] for column in run if column.startswith("drop_")}
    if "in_peak_set" in run and run.in_peak_set.eq(True).any():
        peak = [int(layer) for layer in run.layer[run.in_peak_set.eq(True)]]
        row |= {"peak_low": peak[0] / deepest, "peak_high": peak[-1] / deepest, "peak_set": span(peak)}
    return row


@checked
def summarise_seeds(
    runs: pd.DataFrame, *, alpha: float = 0.05, measures: Mapping[str, tuple[str, str]] = OVER_IMAGES
) -> pd.DataFrame:
    """A row for each family of `summarise_runs`: `depth`, `height` and `drop` over its seeds, beside those over images.

    `measures`: columns of `runs`, by default these three, each with the two that hold its interval over images.
    Of each: `_mean`, `_sd` (n - 1) and the t interval `_low`, `_high` over seeds (`over_seeds`). Beside it,
    `_images_low`, `_images_high`: the ends of the runs' intervals over test images, averaged over runs, which is how
    sure one run is on these images; of depth, the first and last layer that may be the best. The two are not merged.
    All seeds share the test images, so that image noise common to all seeds is not in the t interval. `loss_mean` is
    of the runs that have a loss in nats per token.
    """
    rows = []
    for family, of_family in runs.groupby("family", sort=False):
        row: dict[str, object] = {"family": family, "n_seeds": len(of_family)}
        if "loss" in of_family:
            row["loss_mean"] = of_family.loss.mean()
        for name, images in measures.items():
            seeds = over_seeds(of_family[name].to_numpy(), alpha=alpha)
            row |= {f"{name}_mean": seeds.mean, f"{name}_sd": seeds.standard_deviation}
            row |= {f"{name}_low": seeds.low, f"{name}_high": seeds.high}
            ends = zip(("low", "high"), images, strict=False)
            row |= {f"{name}_images_{end}": of_family[column].mean() for end, column in ends if column in of_family}
        rows.append(row)
    return pd.DataFrame(rows)


@checked
def compare_families(runs: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """A row for each pair of families of `summarise_runs` and measure: does one have more, over seeds?

    `difference` of means, family `a` less family `b`, with the t interval `low`, `high` and `p_value` of Welch (1947),
    and `p_holm`, corrected for all rows; nan where the seeds of each family are all alike, as chosen layers may be.
    Families of one seed are left out. Test images are held as they are.
    """
    families = {name: rows for name, rows in runs.groupby("family", sort=False) if len(rows) > 1}
    rows = []
    for (a, of_a), (b, of_b) in combinations(families.items(), 2):
        for measure in OVER_IMAGES:
            difference = of_a[measure].mean() - of_b[measure].mean()
            low = high = p_value = np.nan
            if max(of_a[measure].nunique(), of_b[measure].nunique()) > 1:
                with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # seeds of one are all alike
                    test = ttest_ind(of_a[measure], of_b[measure], equal_var=False)
                (low, high), p_value = test.confidence_interval(1 - alpha), float(test.pvalue)
            rows.append((a, b, measure, difference, low, high, p_value))
    table = pd.DataFrame(rows, columns="a b measure difference low high p_value".split())
    return table.assign(p_holm=_holm(table.p_value))


def _holm(p_values: pd.Series) -> pd.Series:
    """Corrected for all of them that are numbers."""
    return pd.Series(holm(p_values.dropna().to_dict()), index=p_values.index, dtype=float)
