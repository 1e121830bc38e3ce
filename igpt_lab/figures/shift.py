"""Corrupted test images -> figures: how deep the fall is and where the peak lies as the corruption rises.

Accuracy is a fraction in a table and a percentage on an axis.
"""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import check_apart, check_columns, check_room, columns_of, suptitle
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, Keywords, inches, look, narrow, points

SHIFT_MEASURES = {
    "height": "accuracy, chosen\nlayer (%)",
    "drop": "drop, chosen\nlayer (points)",
    "drop_best": "drop, best\nlayer (points)",
    "drop_change": "change of\ndrop (points)",
    "best_depth": "depth, best\nlayer (%)",
}
ENDS = "mean low high images_low images_high".split()
SHIFT_COLUMNS = [
    *"family point corruption level n_seeds".split(),
    *(f"{measure}_{end}" for measure in SHIFT_MEASURES for end in ENDS),
]
AXES = {"contrast": "contrast left (share)", "blur": "blur (pixels)"}
Cell = tuple[str, pd.DataFrame, str]  # name of a row of panels, its rows of the table, the measure that it shows


@plotting
def shift_curves(table: pd.DataFrame, *, point: str | None = None, title: str = "") -> matplotlib.figure.Figure:
    """Accuracy, drop and depth of the peak against the level of each corruption, a line for each family, at one point.

    `table` (SHIFT_COLUMNS) as `summarise_shift` returns it; `point`: by default ln_1, or else the table's first. Bars
    are 95% t intervals over seeds, bands the interval over test images of one seed, as `summarise_shift` has them. The
    chosen layer is that of clean training images, the best one is picked on the images that are scored.
    """
    check_columns(table, SHIFT_COLUMNS)
    known = list(dict.fromkeys(table.point))
    point = point or ("ln_1" if "ln_1" in known else known[0])
    if point not in known:
        raise ValueError(f"the table has no point {point!r}; it has {', '.join(known)}")
    rows = table[table.point == point]
    cells = [(name, rows, measure) for measure, name in SHIFT_MEASURES.items() if measure != "drop_change"]
    return _grid(cells, f"{title}, {point}".removeprefix(", "))


@plotting
def shift_points(table: pd.DataFrame, *, measure: str = "drop", title: str = "") -> matplotlib.figure.Figure:
    """A `measure` against the level of each corruption, a row of panels for each point of the block, on one scale.

    `table` (SHIFT_COLUMNS) as `summarise_shift` returns it; `measure` is one of SHIFT_MEASURES. Lines, bars and bands
    as in `shift_curves`.
    """
    check_columns(table, SHIFT_COLUMNS)
    if measure not in SHIFT_MEASURES:
        raise ValueError(f"measure {measure!r}; expected one of {', '.join(SHIFT_MEASURES)}")
    cells = [(as_label(point), rows, measure) for point, rows in table.groupby("point", sort=False)]
    words = SHIFT_MEASURES[measure].replace("\n", " ")
    return _grid(cells, f"{title}: {words}".removeprefix(": "), one_scale=True)


def _grid(cells: Sequence[Cell], title: str, *, one_scale: bool = False) -> matplotlib.figure.Figure:
    """A row of panels for each cell, a column for each corruption; each row has a vertical scale, or all one."""
    corruptions = list(dict.fromkeys(cells[0][1].corruption))
    families = list(dict.fromkeys(cells[0][1].family))
    check_room("panels", len(cells) * len(corruptions))
    check_apart("families", families)
    figure = Figure(figsize=inches(1.1 * len(cells) + 1.2), layout="constrained")
    sharing: Keywords = {"sharex": "col", "sharey": "all" if one_scale else "row"}
    panels = figure.subplots(len(cells), len(corruptions), squeeze=False, **sharing)
    for row, (name, rows, measure) in zip(panels, cells, strict=True):
        for ax, corruption in zip(row, corruptions, strict=True):
            _plot(ax, rows[rows.corruption == corruption], measure, families)
        row[0].set_ylabel(name)
    for ax, corruption in zip(panels[-1], corruptions, strict=True):
        levels = cells[0][1].level[cells[0][1].corruption == corruption]
        falling = ", falling" if levels.iloc[0] > levels.iloc[-1] else ""
        ax.set_xlabel(AXES.get(corruption, as_label(corruption)) + falling)
    suptitle(figure, title)
    names = [as_label(family) for family in families]
    figure.legend(handles=_handles(families), loc="outside lower center", ncols=columns_of(names, 1 if narrow() else 2))
    return figure


def _plot(ax: Axes, rows: pd.DataFrame, measure: str, families: Sequence[str]) -> None:
    """A line for each family over the levels in the table's order, the families a little beside each other."""
    levels = list(dict.fromkeys(rows.level))
    for i, family in enumerate(families):
        own, style = rows[rows.family == family], look(family)
        if own.level.tolist() != levels:
            raise ValueError(f"{family}: levels {own.level.tolist()}; expected {levels}, those of the first family")
        x = np.arange(len(levels)) + 0.12 * (i - (len(families) - 1) / 2)
        mean, low, high, images_low, images_high = (100 * own[f"{measure}_{end}"].to_numpy() for end in ENDS)
        ax.fill_between(x, images_low, images_high, color=style["color"], alpha=0.15, linewidth=0)
        bars: Keywords = {"capsize": points(1.5), "elinewidth": points(0.8), "linewidth": points(1)}
        ax.errorbar(x, mean, yerr=[mean - low, high - mean], **style, **bars, markersize=points(2.5))
    if measure.startswith("drop"):
        ax.axhline(0, color="black", linewidth=points(0.5), zorder=0)
    ax.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    ax.yaxis.set_major_locator(ticker.MaxNLocator(4))


def _handles(families: Sequence[str]) -> list[Line2D | Patch]:
    """What lines and marks mean, for the legend."""
    lines = [Line2D([], [], **look(family), label=as_label(family)) for family in families]
    bar = Line2D([], [], color="black", marker="|", markersize=points(6), linestyle="", label="95 % over seeds")
    return [*lines, bar, Patch(color="black", alpha=0.15, linewidth=0, label="95 % over images")]
