"""Tables and values as the page of a report shows them: in words, with shares as percent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from igpt_lab.app import captions
from igpt_lab.core.display import p_number, span

PERCENT = {"test_accuracy", "validation_accuracy", "control_accuracy", "label_overlap"}
LAYERS_APART = {"minus_chosen", "minus_last"}
P_VALUES = {
    "p_value",
    "p_holm",
    "drop_p",
    "peak_p",
    *(f"{name}_p{end}" for name in LAYERS_APART for end in ("", "_all")),
}
LESS = {
    "control",
    "iterations",
    "objective",
    "gradient",
    "seed",
    "folds",
    "n_validation",
    "n_train",
    "n_features",
    "n",
    "peak_p",
}
SHOWN = 200  # rows of a table
BROAD = 40  # columns of a table: more are pixels, and are not shown


@dataclass(frozen=True)
class Table:
    """A table as the page shows it: names of the columns, and rows of cells in words.

    `kinds` are classes of the columns: "number" where digits are below each other, "less" where paper has no room.
    """

    names: list[str]
    rows: list[list[str]]
    kinds: list[str]


def table_of(frame: pd.DataFrame) -> Table:
    """The first rows of a table; of one with too many columns, how many there are."""
    if frame.shape[1] > BROAD:
        return Table(["rows", "columns"], [list(map(str, frame.shape))], ["number"] * 2)
    names = list(map(str, frame.columns))
    rows = frame.head(SHOWN).itertuples(index=False)
    shares = PERCENT | ({"low", "high"} if "test_accuracy" in names else set())
    return Table(
        list(map(captions.column_name, names)),
        [[cell(name, value, shares) for name, value in zip(names, row, strict=True)] for row in rows],
        [" ".join(_kinds(name, column)) for name, column in zip(names, frame.dtypes, strict=True)],
    )


def _kinds(name: str, dtype: Any) -> list[str]:
    return ["number"] * (dtype.kind in "if") + ["less"] * (name in LESS or name.endswith("_all"))


def cell(name: str, value: object, shares: Set[str] = PERCENT) -> str:
    """A value in words: as percent in a column of `shares`, or of a difference of shares."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        if name in shares:
            return f"{value:.2%}"
        if name.removesuffix("_all").removesuffix("_low").removesuffix("_high") in LAYERS_APART:
            return f"{value:+.2%}"
        return p_number(value) if name in P_VALUES else f"{value:.4g}"
    return str(value)


def plain(value: object) -> str:
    """A field of a key in words: layers as 0..12, digests by their first digits."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        is_whole = value and all(isinstance(part, int) for part in value)
        return span(value) if is_whole else ", ".join(map(plain, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text
