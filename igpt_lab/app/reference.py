"""A run held against the shipped one of the same model and images: the same, within its interval, or differs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from igpt_lab.core.display import MODEL, control_names, p_number, span

SAME, WITHIN, DIFFERS = VERDICTS = ("the same", "within its interval", "differs")
THRESHOLDS = (0.0, 0.001, 0.05, 1.0)  # a p-value is within its interval where it is between the same two
CONTROLS = ("raw pixels", "random network", "permuted labels")
IDENTITY = ("weights", "palette", "splits")  # of a feature store's key: what makes two runs comparable


def numbers(table: pd.DataFrame, comparison: Mapping) -> pd.DataFrame:
    """The numbers of a layer curve by which two runs are compared, and what another run may have in their place.

    Args:
        table: a row for each control ("model" for the model itself) and layer, with `chosen`, `in_peak_set`,
            `test_accuracy` and its 95% interval `low`, `high`, as in layer_curve.csv.
        comparison: the chosen layer minus the last one: `difference`, `low`, `high`, `p_value`.

    Returns:
        Rows `number` (a name), `value` and `allowed`: a pandas Interval, or the frozenset of layers in the peak set.
    """
    yes = {name: table[name].astype(str) == "True" for name in ("chosen", "in_peak_set")}
    ours = control_names(table.control) == MODEL
    chosen = table[ours & yes["chosen"]].iloc[0]
    ends = table[ours].sort_values("layer").iloc[[0, -1]]
    accuracies = {"accuracy, chosen layer": chosen, "accuracy, first layer": ends.iloc[0]}
    accuracies |= {"accuracy, last layer": ends.iloc[1]}
    for control in CONTROLS:
        rows = table[(table.control == control) & yes["chosen"]]
        if len(rows):
            accuracies[f"accuracy, {control}"] = rows.iloc[0]
    peak = frozenset(table.layer[ours & yes["in_peak_set"]].astype(int))
    rows = [("chosen layer", int(chosen.layer), peak)]
    rows += [(name, float(row.test_accuracy), _interval(row)) for name, row in accuracies.items()]
    rows += [("chosen minus last", float(comparison["difference"]), _interval(comparison))]
    rows += [("p, chosen against last", float(comparison["p_value"]), _between(comparison["p_value"]))]
    return pd.DataFrame(rows, columns=["number", "value", "allowed"])


def compare(ours: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Two tables of `numbers` -> rows `number`, `here`, `reference`, `interval` (in words) and `verdict`.

    "the same": equal in all stored digits. "within its interval": the layer is in the reference's peak set, the
    accuracy or difference in its 95% interval, the p-value between the same two of 0, 0.001, 0.05 and 1. Else
    "differs". Numbers that only one of the two has are left out.
    """
    both = ours[["number", "value"]].merge(reference, on="number", suffixes=("_here", "_reference"))
    rows = [
        (row.number, row.value_here, row.value_reference, _words(row.allowed),
         _verdict(row.value_here, row.value_reference, row.allowed))
        for row in both.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["number", "here", "reference", "interval", "verdict"])


def read(folder: Path) -> tuple[dict, pd.DataFrame]:
    """The feature store's key and the `numbers` of a folder of results with layer_curve.csv and .json."""
    config = json.loads((folder / "layer_curve.json").read_text(encoding="utf-8"))["config"]
    table = pd.read_csv(folder / "layer_curve.csv", keep_default_na=False)
    return config["store"], numbers(table, config["comparison"])


def hold_against(run: Path, shipped: Path) -> pd.DataFrame:
    """`compare` of two folders of results; LookupError says why they cannot be compared."""
    if not (shipped / "layer_curve.csv").is_file():
        raise LookupError(f"no run is shipped as {shipped.name}")
    (key, ours), (shipped_key, reference) = read(run), read(shipped)
    if unlike := [name for name in IDENTITY if key.get(name) != shipped_key.get(name)]:
        raise LookupError(f"the run that is shipped as {shipped.name} has other {' and '.join(unlike)}")
    return compare(ours, reference)


def describe(table: pd.DataFrame) -> str:
    """The table of `compare` as text, with a last line that counts the verdicts."""
    shown = table.copy()
    for name in ("here", "reference"):
        shown[name] = list(map(_short, table.number, table[name]))
    counts = table.verdict.value_counts()
    line = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    return f"{shown.to_string(index=False)}\nagainst the reference: {line}"


def _verdict(value: float, reference: float, allowed: pd.Interval | frozenset) -> str:
    if math.isclose(value, reference, rel_tol=1e-12):  # the last bits of a float differ between two processors
        return SAME
    return WITHIN if value in allowed else DIFFERS


def _interval(row: Mapping) -> pd.Interval:
    return pd.Interval(float(row["low"]), float(row["high"]), closed="both")


def _between(p: float) -> pd.Interval:
    """The thresholds around a p-value; a value on a threshold belongs to the interval above it."""
    above = next((i for i, threshold in enumerate(THRESHOLDS) if p < threshold), len(THRESHOLDS) - 1)
    closed = "both" if above == len(THRESHOLDS) - 1 else "left"
    return pd.Interval(THRESHOLDS[above - 1], THRESHOLDS[above], closed=closed)


def _words(allowed: pd.Interval | frozenset) -> str:
    if isinstance(allowed, frozenset):
        return f"layers {span(sorted(allowed))}"
    return f"{round(allowed.left, 4):g} to {round(allowed.right, 4):g}"


def _short(number: str, value: float) -> str:
    if number == "chosen layer":
        return f"{value:.0f}"
    return p_number(value) if number.startswith("p,") else f"{value:.4f}"
