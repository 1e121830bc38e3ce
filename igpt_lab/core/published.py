"""What others have published of OpenAI's models, with its source, and the rule by which a number of ours agrees.

`published.csv` has the numbers as they are printed: percent, points of accuracy, or nats per token. No number of it is
an estimate of this package.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from igpt_lab.core.arguments import checked

FILE = Path(__file__).with_name("published.csv")
UNITS = {"percent": (0.01, "fraction"), "points": (0.01, "fraction"), "nats": (1.0, "nats")}  # printed -> factor, ours
SETS = {  # images of train and test, by `plain` names
    "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "stl10": (5_000, 8_000), "imagenet": (1_281_167, 50_000),
}  # fmt: skip
LOSS_TOLERANCE = 0.001  # nats per token: what another order of summation or another precision may change


@checked
def published(size: str | None = None, images: str | None = None, experiment: str | None = None) -> pd.DataFrame:
    """Published numbers of the released models, a row each.

    Columns: `source`; `experiment`, one of "loss", "linear probe", "best layer less last" and "few labels"; `size`;
    `images`; `setting`; `layer`, nan where none is named; `value` and its standard deviation `std`, nan where none is
    printed, as fractions or in nats per token, as `unit` says; `tolerance`, half a unit of the last digit printed, of a
    loss LOSS_TOLERANCE. Layers are counted as here, from the input of the first block.

    Args:
        size: "s", "m" or "l", by default all.
        images: Such as "CIFAR-10", however it is spelt; by default all.
        experiment: One of those above, by default all.

    Example:
        >>> lab.published("l", "cifar10", "few labels")[["setting", "value", "std"]]
                    setting  value    std
        0    4 labels a class  0.732  0.015
        1   25 labels a class  0.876  0.006
        2  400 labels a class  0.943  0.001
    """
    table = pd.read_csv(FILE, dtype={"value": str}, keep_default_na=False, na_values={"layer": [""], "std": [""]})
    asked = {"size": size, "images": images, "experiment": experiment}
    for column, name in asked.items():
        if name is not None:
            table = table[table[column].map(plain) == plain(name)]
    factors = table.unit.map(lambda unit: UNITS[unit][0]).astype(float)
    decimals = table.value.map(lambda text: len(text.partition(".")[2]))
    tolerance = (0.5 * 10.0 ** -decimals.astype(float) * factors).where(table.unit != "nats", LOSS_TOLERANCE)
    numbers = {"value": table.value.astype(float) * factors, "std": table["std"].astype(float) * factors}
    units = table.unit.map(lambda unit: UNITS[unit][1])
    return table.assign(**numbers, unit=units, tolerance=tolerance).reset_index(drop=True)


def plain(name: str) -> str:
    """A name without capitals and marks: cifar10 of CIFAR-10."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def verdict(ours: float, low: float, high: float, theirs: pd.Series) -> str:
    """ "agrees" or "differs by ...", ours less theirs, of a number with its 95% interval and a row of `published`.

    It agrees where the interval, made wider at both ends by the row's `tolerance` and `std`, holds its value.
    """
    reach = theirs.tolerance + (0.0 if pd.isna(theirs["std"]) else theirs["std"])
    if low - reach <= theirs.value <= high + reach:
        return "agrees"
    difference = ours - theirs.value
    return (
        f"differs by {difference:+.4f} nats" if theirs.unit == "nats" else f"differs by {100 * difference:+.1f} points"
    )
