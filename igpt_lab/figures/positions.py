"""Tables -> figures of where in an image the class is known: by position, by share seen, by attention or by the mean.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import colour_map, colour_of
from igpt_lab.figures.parts import check_columns, check_once, colour_bar, finish, frameless, head, layer_axis
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import LINE_STYLES, OTHERS, Keywords, axes, points

POSITION_COLUMNS = ("layer", "position", "test_accuracy", "chosen", "n_test")
PREFIX_COLUMNS = ("layer", "share", "test_accuracy", "low", "high", "chosen", "n_test")
ATTENTIVE_COLUMNS = ("layer", "probe", "seed", "test_accuracy", "low", "high", "n_test")
PROBES: dict[str, Keywords] = {"attentive": OTHERS[0], "mean": LINE_STYLES[MODEL]}  # the mean is what every probe sees
RING: Keywords = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}


@plotting
def position_map(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy of single states as colours: positions downwards, layers to the right; rings on each one's chosen layer.

    `table` (POSITION_COLUMNS) as `probe_positions` returns it.
    """
    check_columns(table, POSITION_COLUMNS)
    check_once(table, ["layer", "position"])
    grid = 100 * table.pivot(index="position", columns="layer", values="test_accuracy")
    ax = axes(2.6) if ax is None else ax
    image = ax.imshow(grid, aspect="auto", cmap=colour_map("viridis"), interpolation="none")
    step = math.ceil(len(grid.columns) / 11)
    ax.set_xticks(range(0, len(grid.columns), step), list(map(as_label, grid.columns[::step])))
    step = math.ceil(len(grid) / 16)
    ax.set_yticks(range(0, len(grid), step), list(map(as_label, grid.index[::step])))
    chosen = table[table.chosen.astype(bool)]
    places = grid.columns.get_indexer(chosen.layer), grid.index.get_indexer(chosen.position)
    ring: Keywords = {"color": "white", "path_effects": [withStroke(linewidth=points(2), foreground="black")]}
    ax.plot(*places, markersize=points(5), **RING, **ring)
    ax.set(xlabel="layer", ylabel="position in reading order, downwards")
    frameless(ax)
    colour_bar(ax, image, "test accuracy (%)")
    head(ax, title, f"{int(table.n_test.iloc[0]):,} test images; rings: layers chosen by validation", beside=12)
    return ax


@plotting
def prefix_curve(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy over depth of the mean over the first states, a line for each share of the image, the whole darkest.

    `table` (PREFIX_COLUMNS) as `probe_prefixes` returns it. Bands are 95% intervals over test images, rings mark the
    layer that validation chose for a share.
    """
    check_columns(table, PREFIX_COLUMNS)
    check_once(table, ["layer", "share"])
    ax = axes(2.9) if ax is None else ax
    shades = colour_map("viridis_r")(np.linspace(0.1, 1, table.share.nunique()))
    for share, shade in zip(sorted(table.share.unique()), shades, strict=True):
        rows = table[table.share == share].sort_values("layer")
        ax.fill_between(rows.layer, 100 * rows.low, 100 * rows.high, color=shade, alpha=0.15, linewidth=0)
        ax.plot(rows.layer, 100 * rows.test_accuracy, color=shade, label=f"{100 * share:.0f} % of the image")
        chosen = rows[rows.chosen.astype(bool)]
        ax.plot(chosen.layer, 100 * chosen.test_accuracy, color=shade, markersize=points(5), **RING)
    layer_axis(ax, int(table.layer.max()))
    ax.set_ylabel("test accuracy (%)")
    return finish(ax, title, f"{int(table.n_test.iloc[0]):,} test images; bands: 95 %; rings: chosen layers")


@plotting
def attentive_curve(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy over depth of the attentive probe against that of the mean: dots are seeds, lines their means.

    `table` (ATTENTIVE_COLUMNS) as `probe_attentive` returns it. Bands: the mean over seeds of the 95% intervals over
    test images.
    """
    check_columns(table, ATTENTIVE_COLUMNS)
    check_once(table, ["layer", "probe", "seed"])
    unknown = set(table.probe) - set(PROBES)
    if unknown:
        raise ValueError(f"probe {min(unknown)!r}; expected {' or '.join(PROBES)}")
    ax = axes(2.7) if ax is None else ax
    for probe, style in PROBES.items():
        rows, style = (
            table[table.probe == probe].sort_values("layer"),
            style | {"color": colour_of(probe) or style["color"]},
        )
        if rows.empty:
            continue
        mean = 100 * rows.groupby("layer")[["test_accuracy", "low", "high"]].mean()
        ax.fill_between(mean.index, mean.low, mean.high, color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(mean.index, mean.test_accuracy, **style | {"marker": ""}, label=f"{probe}, mean of seeds")
        dots: Keywords = {"marker": style["marker"], "markersize": points(2.5), "linestyle": "", "alpha": 0.8}
        ax.plot(rows.layer, 100 * rows.test_accuracy, color=style["color"], label=f"{probe}, a seed", **dots)
    layer_axis(ax, int(table.layer.max()))
    ax.set_ylabel("test accuracy (%)")
    note = f"{int(table.n_test.iloc[0]):,} test images, {table.seed.nunique()} seeds; bands: 95 % over images"
    return finish(ax, title, note)
