"""Where heads look: a map for each head on one colour scale, and distance and entropy over depth.

All maps are one drawing in vectors: a path for each step of the colour scale.
"""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from igpt_lab.core.display import MODEL
from igpt_lab.figures.parts import check_columns, check_once, check_room, figure_of, head, layer_axis
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, FigureAxes, Keywords, inches, look, points

OFFSET_COLUMNS = ("layer", "head", "dy", "dx", "share", "n", "weighting")
FROM_COLUMNS = ("layer", "head", "row", "column", "weight", "sos", "weighting")
DEPTH_COLUMNS = ("layer", "head", "n", "weighting")
DEPTH_PANELS = {"distance": "distance (pixels)", "entropy": "entropy (nats)"}  # value -> its name on the axis
STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)  # of the colour scale: what is below the first is white
COLOURS = ListedColormap(colormaps["YlGnBu"](np.linspace(0.2, 1, len(STEPS) - 1)))
SCALE = BoundaryNorm(STEPS, COLOURS.N)
ACROSS = 8  # maps beside each other, where a layer has not more heads
LABEL = 0.05  # of the width of all maps: the height of a label
PREDICTED = "#D55E00"
IN_WORDS = {"weights": "attention weights", "values": "shares of |a v W_O|"}


@plotting
def offset_maps(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Where each head looks, measured from the predicted pixel, which is marked: a map for each head of each layer.

    `table` (OFFSET_COLUMNS) is `offsets` of `attention_maps`; above the marked pixel are the rows above it. The heads
    of a layer stand side by side. One scale for all maps, logarithmic, in steps; a share below the first is white.
    """
    check_columns(table, OFFSET_COLUMNS)
    _check_maps(table, ("dy", "dx"))
    reach, up = int(table.dx.abs().max()), int(-table.dy.min())
    corners = _corners(table, 2 * reach + 1, up + 1)
    ax = _framed(ax, corners, 2 * reach + 1, up + 1)
    _plot_cells(ax, table.assign(x=table.dx + reach, y=table.dy + up), "share", corners)
    _plot_boxes(ax, corners, (reach, up, 1, 1), facecolor=PREDICTED, linewidth=0)
    head(ax, title, _note(table, f"{int(table.n.iloc[0]):,} images\norange: the predicted pixel"))
    return ax


@plotting
def attention_from(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Where each head looks in one image, from the state that predicts the marked pixel; what comes later is hatched.

    `table` (FROM_COLUMNS) as `attention_from` of `igpt_lab` returns it, of all layers or some. The cell above each map
    is the start token. The scale is that of `offset_maps`.
    """
    check_columns(table, FROM_COLUMNS)
    _check_maps(table, ("row", "column"))
    unseen = table[table.weight.isna()]
    if unseen.empty:
        raise ValueError("no weight is NaN; expected NaN from the predicted pixel on")
    row, column = min(zip(unseen.row, unseen.column, strict=True))
    side, gap = int(table.row.max()) + 1, 2  # cells from the start token down to the image
    corners = _corners(table, side, side + gap)
    ax = _framed(ax, corners, side, side, gap)
    starts = table.drop_duplicates(["layer", "head"])
    _plot_boxes(ax, corners, (0, 0, 1, 1), facecolor="none", edgecolor="#999999", linewidth=points(0.4))
    _plot_cells(ax, starts.assign(x=0, y=0), "sos", corners)
    _plot_cells(ax, table.assign(x=table.column, y=table.row + gap), "weight", corners)
    later = [(column + 1, row + gap, side - column - 1, 1), (0, row + gap + 1, side, side - row - 1)]
    for box in later:
        _plot_boxes(ax, corners, box, facecolor="none", edgecolor="#999999", linewidth=0, hatch=6 * "/")
    _plot_boxes(ax, corners, (column, row + gap, 1, 1), facecolor=PREDICTED, linewidth=0)
    head(ax, title, _note(table, "orange: the predicted pixel\nhatched: what comes later; cell above: start token"))
    return ax


@plotting
def attention_depth(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Mean distance and entropy of every head over depth, and those of uniform attention over what is visible.

    `table` is that of `attention_maps`: DEPTH_COLUMNS, and `distance` and `entropy` with `_low`, `_high` and
    `_uniform`. Dots are heads, with 95% intervals over images; the line is the mean over the heads of a layer.
    """
    check_columns(table, DEPTH_COLUMNS + tuple(n + e for n in DEPTH_PANELS for e in ("", "_low", "_high", "_uniform")))
    figure = Figure(figsize=inches(3.6), layout="constrained")
    panels = figure.subplots(len(DEPTH_PANELS), sharex=True)
    style, heads = look(MODEL), table["head"].rank(method="dense")
    x = table.layer + 0.5 * ((heads - 0.5) / heads.max() - 0.5)  # heads of a layer side by side
    for ax, (name, label) in zip(panels, DEPTH_PANELS.items(), strict=True):
        ax.vlines(x, table[f"{name}_low"], table[f"{name}_high"], color=style["color"], linewidth=points(0.7))
        ax.plot(x, table[name], color=style["color"], marker="o", linestyle="", markersize=points(2.2), label="a head")
        ax.plot(table.groupby("layer")[name].mean(), color=style["color"], label="mean of the layer's heads")
        uniform = float(table[f"{name}_uniform"].iloc[0])
        ax.axhline(uniform, color="black", linestyle="--", linewidth=points(0.7), label="uniform attention")
        ax.set(ylabel=label)
        ax.set_ylim(bottom=0)
    layer_axis(panels[-1], int(table.layer.max()))
    head(panels[0], title, _note(table, f"{int(table.n.iloc[0]):,} images; bars: 95 % over images"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _check_maps(table: pd.DataFrame, cell: tuple[str, str]) -> None:
    check_once(table, ["layer", "head", *cell])
    check_room("layer and head", len(table.drop_duplicates(["layer", "head"])))


def _note(table: pd.DataFrame, words: str) -> str:
    kind = str(table.weighting.iloc[0])
    return f"{IN_WORDS.get(kind, kind)}; {words}"


def _corners(table: pd.DataFrame, width: int, height: int) -> pd.DataFrame:
    """`left` and `top`, in cells, of the map of each `layer` and `head`: layers in the order of reading."""
    maps = table.drop_duplicates(["layer", "head"])[["layer", "head"]]
    place, column = (maps[name].rank(method="dense").astype(int) - 1 for name in ("layer", "head"))
    heads = int(column.max()) + 1
    beside = min(max(1, ACROSS // max(heads, 2)), int(place.max()) + 1)  # layers in a row
    step = 1.12 * width
    left = (place % beside) * (heads + 0.2) * step + column * step
    line = LABEL * beside * (heads + 0.2) * step  # in cells, of a label
    return maps.assign(left=left, top=(place // beside) * (height + 1.3 * line) + line)


def _framed(ax: Axes | None, corners: pd.DataFrame, width: int, height: int, gap: int = 0) -> Axes:
    """Axes in cells, with a label for each layer, a frame for each map and the colour scale."""
    right, bottom = corners.left.max() + width, corners.top.max() + height + gap
    scale: Keywords = {"location": "bottom", "aspect": 40, "pad": 0.02}
    if ax is None:
        across, unit = inches(1.1)
        figure = Figure(figsize=(across, 0.96 * across * bottom / right + unit), layout="constrained")
        ax = figure.add_subplot(axes_class=FigureAxes)
        scale["ax"] = ax
    else:
        scale = {"cax": ax.inset_axes((0, -0.06, 1, 0.03)), "orientation": "horizontal"}
    ax.set(xlim=(-0.01 * right, 1.01 * right), ylim=(bottom + 0.01 * right, 0), aspect="equal")
    ax.set_axis_off()
    for row in corners.drop_duplicates("layer").itertuples():
        ax.text(row.left, row.top - 0.01 * right, f"layer {row.layer}", va="bottom")
    _plot_boxes(ax, corners, (0, gap, width, height), facecolor="none", edgecolor="#999999", linewidth=points(0.4))
    bar = figure_of(ax).colorbar(ScalarMappable(SCALE, COLOURS), ticks=STEPS, **scale)
    bar.set_label("share of attention (log scale)")
    bar.ax.set_xticklabels(f"{step:g}" for step in STEPS)
    bar.outline.set_linewidth(points(0.6))
    return ax


def _plot_cells(ax: Axes, table: pd.DataFrame, value: str, corners: pd.DataFrame) -> None:
    """Unit cells at `x`, `y` of each map in the colour of their value: a path for each step of the scale."""
    table = table[table[value] >= STEPS[0]].merge(corners, on=["layer", "head"])
    steps = np.clip(np.digitize(table[value], STEPS), 1, COLOURS.N) - 1
    places = np.stack([table.left + table.x, table.top + table.y], axis=1)
    for step in np.unique(steps):
        _add_path(ax, places[steps == step], 1, 1, facecolor=COLOURS(step), linewidth=0)


def _plot_boxes(ax: Axes, corners: pd.DataFrame, box: tuple[int, int, int, int], **look) -> None:
    """The same rectangle x, y, width, height, in cells, in each map."""
    x, y, width, height = box
    if width and height:
        _add_path(ax, corners[["left", "top"]].to_numpy() + [x, y], width, height, **look)


def _add_path(ax: Axes, places: np.ndarray, width: int, height: int, **look) -> None:
    """One path of equal rectangles, whose upper left corners are (M, 2)."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    ax.add_patch(PathPatch(Path.make_compound_path_from_polys(places[:, None] + corners), **look))
