"""What a probe mistakes for what, and features on a plane: tables -> matplotlib Axes. Never sees a model."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes

from igpt_lab.figures import Figure

# Okabe and Ito's colours, safe for colour-blind readers, and a marker besides: classes are told apart by both.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676", "#B8A800")
MARKERS = "os^D"
CONFUSION_COLUMNS = ("label", "predicted", "count")
FEATURE_COLUMNS = ("x", "y", "label")
TEXT = {"font.family": ["DejaVu Sans"], "font.size": 7, "axes.titleweight": "bold", "legend.frameon": False}
_styled = style.context(["default", TEXT | {"axes.linewidth": 0.6}])


def look(label: int) -> dict[str, str]:
    """Colour and marker of a class: 32 different pairs, then again."""
    return {"color": COLOURS[label % 8], "marker": MARKERS[(label + label // 8) % 4]}


@_styled
def confusion_map(table: pd.DataFrame, *, title: str = "", note: str = "") -> Axes:
    """How many images of each class (a row, upwards last) a probe takes for which (a column).

    `table` has a row for each pair, and CONFUSION_COLUMNS; colours are shares of the row. Counts are written into the
    cells of up to 12 classes.
    """
    names = list(dict.fromkeys(table.label))
    grid = table.pivot(index="label", columns="predicted", values="count").loc[names, names].to_numpy()
    shares = grid / np.maximum(grid.sum(1, keepdims=True), 1)
    ax = _axes(3.2, title, note)
    ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="none")
    step = math.ceil(len(names) / 24)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=90 if max(map(len, map(str, names))) > 2 else 0)
    ax.set_yticks(range(0, len(names), step), names[::step])
    ax.set(xlabel="predicted", ylabel="class")
    for (row, column), count in np.ndenumerate(grid) if len(names) <= 12 else ():
        dark = shares[row, column] > 0.5
        if count:
            ax.text(column, row, f"{count:,}", ha="center", va="center", size=5.5, color="white" if dark else "black")
    return ax


@_styled
def feature_map(
    table: pd.DataFrame, *, names: Sequence[str], explained: Sequence[float], title: str = "", note: str = ""
) -> Axes:
    """Images as points on the plane that keeps most of their features' variance, a colour and a marker a class.

    `table` has a row for each image, and FEATURE_COLUMNS, `label` counting in `names`. `explained`: the shares of the
    variance along x and y.
    """
    ax = _axes(3.4, title, note)
    for label in np.unique(table.label):
        rows = table[table.label == label]
        ax.scatter(rows.x, rows.y, s=3, linewidths=0, alpha=0.7, label=names[label], rasterized=True, **look(label))
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.set(**{f"{axis}label": f"{share:.0%} of the variance" for axis, share in zip("xy", explained, strict=True)})
    if len(names) <= 32:
        ax.get_figure(root=True).legend(loc="outside lower center", ncols=4, markerscale=2, columnspacing=1)
    return ax


def _axes(height: float, title: str, note: str) -> Axes:
    ax = Figure(figsize=(3.5, height), layout="constrained").add_subplot()
    ax.set_title(title, loc="left", pad=4 + 9 * len(note.splitlines()))
    ax.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points")
    return ax
