"""What several figures share: checks of tables, marks, limits, titles and legends.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import cast

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import rcParams, ticker, transforms
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.figures.names import as_label, as_lines, letters
from igpt_lab.figures.options import plot
from igpt_lab.figures.style import CYCLE, Keywords, narrow, points

NUMBERS = set(
    "test_accuracy low high difference loss loss_error cka nats share weight sos x y n n_test batches draw".split()
)
TICK = 24  # letters of a layer's name on an axis, at most
ROOM = 1000  # lines, rows, panels or ticks of a figure, at most: each takes memory


def check_columns(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse what is no table, lacks one of `columns`, has no rows, or more different things than a figure shows."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"the table is a {type(table).__name__}; expected a pandas DataFrame with columns {', '.join(columns)}"
        )
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table)) or 'no columns'}")
    if table.empty:
        raise ValueError(f"the table is empty; expected rows with {', '.join(columns)}")
    for name in set(columns) - NUMBERS:
        check_room(name, table[name].nunique())


def check_room(name: str, count: int) -> None:
    """Refuse more lines, rows, panels or ticks than a figure has room for."""
    if count > ROOM:
        raise ValueError(f"{count:,} different values of {name}; a figure has room for {ROOM:,}")


def check_apart(name: str, names: Sequence[str]) -> None:
    """Refuse more lines than colours, dashes and markers tell apart."""
    if len(names) > len(CYCLE):
        raise ValueError(f"{len(names)} {name}; expected at most {len(CYCLE)}, which can be told apart")


def check_once(table: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse several rows for the same values of these columns, through which a line would go up and down."""
    if table.duplicated(list(names)).any():
        raise ValueError(f"more than one row for the same {', '.join(names[:-1])} and {names[-1]}; expected one")


def checked(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table, fit to plot: all `columns`, some rows, the model among the controls, accuracy a fraction."""
    check_columns(table, columns)
    table = table.assign(control=control_names(table.control))
    if MODEL not in set(table.control):
        raise ValueError(f"no row has control {MODEL!r} (the model itself); it has {sorted(set(table.control))}")
    for name in ("test_accuracy", "low", "high"):
        if name not in columns:
            continue
        wrong = table[name][~table[name].between(0, 1)]
        if len(wrong):
            raise ValueError(f"{name} {wrong.iloc[0]} in row {wrong.index[0]}; expected a fraction from 0 to 1")
    return table


def with_empty_words(column: pd.Series) -> pd.Series:
    """A column of words with '' for none: a csv file cannot tell '' from nothing."""
    return column.astype(object).fillna("")


def controls_of(table: pd.DataFrame) -> list[str]:
    """The model first, and then its controls in the order of the alphabet."""
    return [MODEL, *sorted({*table.control} - {MODEL})]


def interval(rows: pd.DataFrame) -> np.ndarray:
    """Lengths (2, rows) of the error bars of `test_accuracy`, downwards and upwards, in percent."""
    return 100 * np.array([rows.test_accuracy - rows.low, rows.high - rows.test_accuracy])


def mark_not_converged(ax: Axes, x: pd.Series, y: pd.Series, rows: pd.DataFrame, style: Keywords) -> None:
    """Open diamonds on the rows whose probe did not converge, named once in the legend."""
    failed = ~rows.converged.astype(bool)
    if failed.any():
        label = ("_" if "not converged" in ax.get_legend_handles_labels()[1] else "") + "not converged"
        diamond: Keywords = {"marker": "D", "markersize": points(5), "markerfacecolor": "white", "linestyle": ""}
        ax.plot(x[failed], y[failed], label=label, markeredgecolor=style["color"], **diamond, zorder=4)


def by_depth(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A table whose layers may have names, with their places 0, 1, ... as `layer`; and these names, [] of numbers.

    The order is that of the model's rows. A control of one layer, such as raw pixels, has no depth and the place 0.
    `layer_name` is what each row's layer is called, and `network` what the model is, by a column `model` where there is
    one. ValueError for a control with a layer that the model has not.
    """
    network = table.model if "model" in table else MODEL
    if pd.api.types.is_numeric_dtype(table.layer):
        return table.assign(layer_name=[f"{layer:.0f}" for layer in table.layer], network=network), []
    called = table.layer.astype(str)
    control = table.control if "control" in table else pd.Series(MODEL, table.index)
    names = list(dict.fromkeys(called[control == MODEL]))
    alone = control.map(called.groupby(control).nunique()) == 1
    unknown = np.flatnonzero(~called.isin(names) & ~alone)
    if len(unknown):
        first = unknown[0]
        raise ValueError(f"{control.iloc[first]} has the layer {called.iloc[first]!r}, and the model has {names}")
    places = {name: place for place, name in enumerate(names)}
    return table.assign(layer=[places.get(name, 0) for name in called], layer_name=called, network=network), names


def room_below(letters_of_name: int) -> float:
    """Inches that an upright name takes below the axes."""
    return 0.57 * letters_of_name * rcParams["font.size"] / 72


def layer_axis(ax: Axes, last: int, names: Sequence[str] = ()) -> None:
    """The horizontal axis from layer 0 to the last one, with no more numbers than fit, or the names of layers."""
    step = math.ceil((last + 1) / (12 if narrow() else 18))
    if names:
        labels = [as_label(name, TICK) for name in names[::step]]
        ax.set_xticks(range(0, len(names), step), labels)
        if sum(map(len, labels)) + 2 * len(labels) > 0.8 * letters():
            ax.tick_params(axis="x", labelrotation=90)
    else:
        ax.xaxis.set_major_locator(ticker.MultipleLocator(step))
    ax.set(xlim=(-0.5, last + 0.5), xlabel="layer")


def _below(ax: Axes) -> float:
    """Inches that upright names of layers take below the axes."""
    options = ax.xaxis.get_tick_params()
    if 90 not in (options.get("rotation"), options.get("labelrotation")):  # the name differs between versions
        return 0.0
    longest = max(len(label.get_text()) for label in ax.get_xticklabels())
    return room_below(longest)


def rows_downwards(ax: Axes, names: Iterable[str]) -> None:
    """The vertical axis with a name for each row, the first on top."""
    names = list(map(as_label, names))
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5))


def frameless(ax: Axes) -> None:
    """Axes of its own without the lines around what it shows."""
    if plot().ax is None:
        ax.spines[:].set_visible(False)


def colour_bar(ax: Axes, image: ScalarMappable, label: str, **look) -> Colorbar:
    """The scale of colours to the right of the Axes, inside the room of those that were given."""
    if plot().ax is None:
        bar = figure_of(ax).colorbar(image, ax=ax, label=label, **look)
    else:
        look.pop("shrink", None)
        bar = figure_of(ax).colorbar(image, cax=ax.inset_axes((1.03, 0, 0.04, 1)), label=label, **look)
    bar.outline.set_linewidth(points(0.6))
    return bar


def figure_of(ax: Axes, *, root: bool = True) -> matplotlib.figure.Figure:
    """The whole figure that the Axes are in; without `root` the part of it that they are in."""
    return cast(matplotlib.figure.Figure, ax.get_figure(root=root))


def stacked(figure: matplotlib.figure.Figure, heights: Sequence[float]) -> list[matplotlib.figure.SubFigure]:
    """Parts of a figure one below the other, with these shares of its height."""
    return list(cast(np.ndarray, figure.subfigures(len(heights), height_ratios=heights)))


def suptitle(figure: matplotlib.figure.FigureBase, title: str) -> None:
    """The title of a figure of several axes, on its left."""
    figure.suptitle(_title(title, letters()), x=0.01, ha="left", fontsize=points(8.4), fontweight="bold")


def finish(ax: Axes, title: str, note: str) -> Axes:
    """Title, note and legend."""
    head(ax, title, note)
    legend(ax)
    return ax


def head(ax: Axes, title: str, note: str, *, beside: int = 0) -> None:
    """Title, and the note below it; `beside`: letters' room that something to the right of the axes takes.

    Axes that were given get a title where there is one, and no note: what is above them is not ours.
    """
    if plot().ax is not None:
        if title:
            ax.set_title(_title(title, letters()), loc="left")
        return
    room = max(letters() - 10 - beside, 10)
    title, note = _title(title, room), as_lines(note, 2 * letters())
    if narrow():
        note = textwrap.fill(note, room)
    ax.set_title(title, loc="left", pad=points(7 + 8.4 * len(note.splitlines())))
    ax.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, points(5)), textcoords="offset points")


def _title(title: str, room: int) -> str:
    """A title, whose letters are large, in as many lines as it needs where there is room for so many small ones."""
    return textwrap.fill(as_lines(title, 2 * letters()), max(int(0.75 * room), 8))


def columns_of(labels: Iterable[str], most: int) -> int:
    """Columns of a legend: at most `most`, as many as there is room for beside a line for each name."""
    longest = max(map(len, labels := list(labels)), default=0)
    return 1 if any("…" in label for label in labels) else max(1, min(most, letters() // (longest + 5)))


def legend(ax: Axes, most: int | None = None) -> None:
    """Below the axes at a distance in inches, where it covers no line; in at most so many columns.

    Inside those that were given."""
    if plot().ax is not None:
        ax.legend()
        return
    down = transforms.ScaledTranslation(0, -points(0.38) - _below(ax), figure_of(ax).dpi_scale_trans)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + down,
        ncols=columns_of(ax.get_legend_handles_labels()[1], most or (4 if letters() > 100 else 2)),
    )
