"""What parts left out and windows of attention cost: curves over depth or radius, and heads as a map.

`accuracy_change` is a fraction in a table, and what is lost is percentage points on an axis.
"""

import math

import matplotlib.figure
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm

from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import colour_map
from igpt_lab.figures.parts import (
    check_apart,
    check_columns,
    check_once,
    colour_bar,
    frameless,
    head,
    layer_axis,
    legend,
)
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, Keywords, axes, inches, look, points

LEAVE_OUT_COLUMNS = ("part", "layer", "kind", "nats_change", "low", "high", "n")
HEAD_COLUMNS = (*LEAVE_OUT_COLUMNS, "head")
WINDOW_COLUMNS = ("radius", "first", "last", "nats_change", "low", "high", "n")
ACCURACY_COLUMNS = ("accuracy_change", "accuracy_low", "accuracy_high", "probe_layer")
PARTS = {"block": "block", "attention": "attention", "mlp": "MLP"}  # as a table and as a legend has it
STAND_INS = {"skip": "adds nothing", "mean": "adds its mean", "resample": "adds another image's"}
LINEAR = 0.01  # nats, below which the axis is linear: a part may cost less than nothing
LOG = f"\n(log scale above {LINEAR:g})"


@plotting
def leave_out_curve(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """What leaving out each block, attention and MLP costs over depth: nats of the next pixel and, below, points.

    `table` (LEAVE_OUT_COLUMNS) as `leave_out` returns it. The lower panel is there where the table has
    ACCURACY_COLUMNS: test accuracy that the unchanged probe loses at its layer, which the dashed line marks. Bands are
    95% intervals over test images. The axis of nats is logarithmic above 0.01.
    """
    check_columns(table, LEAVE_OUT_COLUMNS)
    check_once(table[table.part.isin(PARTS)], ["part", "layer"])
    lines = [
        (name, table[table.part == part].sort_values("layer"), look(name, place))
        for place, (part, name) in enumerate(PARTS.items())
        if (table.part == part).any()
    ]
    if not lines:
        raise ValueError(f"the table has no part {', '.join(PARTS)}; heads are for `head_map`")
    figure, panels = _panels(table, lines, "layer")
    if len(panels) > 1:
        panels[1].axvline(
            table.probe_layer.iloc[0], color="black", linestyle="--", linewidth=points(0.7), label="layer of the probe"
        )
    layer_axis(panels[-1], int(max(table.layer.max(), table.get("probe_layer", table.layer).max())))
    head(panels[0], title, f"each {_of(table)}; {int(table.n.iloc[0]):,} images; bands: 95 %")
    legend(panels[-1])
    return figure


@plotting
def head_map(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Nats lost when a head is left out: heads upwards, layers to the right, on a scale that is linear below 0.01.

    `table` (HEAD_COLUMNS) as `leave_out` returns it; rows of other parts are passed over.
    """
    check_columns(table, HEAD_COLUMNS)
    rows = table[table.part == "head"]
    if rows.empty:
        raise ValueError(f"the table has no part head; it has {', '.join(sorted(set(table.part)))}")
    check_once(rows, ["layer", "head"])
    grid = rows.assign(head=rows["head"].astype(int)).pivot(index="head", columns="layer", values="nats_change")
    ax = axes(1.2 + 0.16 * len(grid)) if ax is None else ax
    scale = SymLogNorm(LINEAR, vmin=min(0.0, grid.min(axis=None)), vmax=max(LINEAR, grid.max(axis=None)), base=10)
    look_up: Keywords = {"cmap": colour_map("viridis"), "interpolation": "none", "aspect": "auto"}
    image = ax.imshow(grid, origin="lower", norm=scale, **look_up)
    for axis, numbers, most in (ax.yaxis, grid.index, 8), (ax.xaxis, grid.columns, 12):
        step = math.ceil(len(numbers) / most)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    ax.set(xlabel="layer", ylabel="head")
    frameless(ax)
    colour_bar(ax, image, f"nats lost a pixel{LOG}", format=ticker.FormatStrFormatter("%g")).ax.minorticks_off()
    head(ax, title, f"each {_of(rows)}; {int(rows.n.iloc[0]):,} images", beside=12)
    return ax


@plotting
def window_curve(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """What a window of attention costs over its radius in pixels, a line for each range of blocks.

    `table` (WINDOW_COLUMNS) as `windows` returns it, with ACCURACY_COLUMNS also the points that the unchanged probe
    loses. Bands are 95% intervals over test images. The axis of nats is logarithmic above 0.01.
    """
    check_columns(table, WINDOW_COLUMNS)
    check_once(table, ["first", "last", "radius"])
    ranges = list(table.groupby(["first", "last"]))
    names = [f"blocks {first} to {last}" if first < last else f"block {first}" for (first, last), _ in ranges]
    check_apart("ranges of blocks", names)
    lines = [(name, rows.sort_values("radius"), look(name)) for name, (_, rows) in zip(names, ranges, strict=True)]
    figure, panels = _panels(table, lines, "radius")
    panels[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panels[-1].set_xlabel("radius of the window (pixels)")
    head(panels[0], title, f"{int(table.n.iloc[0]):,} images; bands: 95 % over images")
    legend(panels[-1])
    return figure


def _panels(
    table: pd.DataFrame, lines: list[tuple[str, pd.DataFrame, Keywords]], x: str
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A figure of nats lost and, where the table has them, points lost below: lines of (name, rows, style)."""
    with_points = all(name in table for name in ACCURACY_COLUMNS)
    figure = Figure(figsize=inches(3.8 if with_points else 2.4), layout="constrained")
    panels = list(figure.subplots(1 + with_points, sharex=True, squeeze=False)[:, 0])
    for name, rows, style in lines:
        _band(panels[0], name, rows[x], rows[["nats_change", "low", "high"]], style)
        if with_points:
            _band(panels[1], name, rows[x], -100 * rows[["accuracy_change", "accuracy_low", "accuracy_high"]], style)
    panels[0].set_yscale("symlog", linthresh=LINEAR)
    drawn = pd.concat([rows for _, rows, _ in lines])
    panels[0].set_ylim(min(-0.2 * LINEAR, 1.5 * drawn.low.min()), max(LINEAR, 1.5 * drawn.high.max()))
    panels[0].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    for ax, name in zip(panels, (f"nats lost a pixel{LOG}", "accuracy lost\n(points)"), strict=False):
        ax.axhline(0, color="black", linewidth=points(0.5), zorder=1)
        ax.set_ylabel(name)
    return figure, panels


def _band(ax: Axes, name: str, x: pd.Series, values: pd.DataFrame, style: Keywords) -> None:
    """A line with its interval: `values` are the mean and the two ends."""
    mean, *ends = (values[column] for column in values)
    ax.fill_between(x, *ends, color=style["color"], alpha=0.2, linewidth=0)
    ax.plot(x, mean, label=as_label(name), **style)


def _of(table: pd.DataFrame) -> str:
    """What stands in for what is left out, in words."""
    return ", ".join(STAND_INS.get(kind, kind) for kind in table.kind.unique())
