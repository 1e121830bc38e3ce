"""Bits by layer: what a linear readout of a state says about pixels, place, colour and class, over depth."""

import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import colour_of
from igpt_lab.figures.parts import check_columns, check_once, finish, layer_axis, mark_not_converged
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import LINE_STYLES, OTHERS, Keywords, axes, look, narrow, points

BITS_COLUMNS = ("layer", "target", "bits", "low", "high", "entropy", "converged", "n_images", "n_states")
TARGET_STYLES: dict[str, Keywords] = {
    "current pixel": LINE_STYLES["raw pixels"],
    "next pixel": OTHERS[0],  # as the lenses, which say how well it is predicted
    "row": {"color": "#332288", "linestyle": (0, (1, 1)), "marker": "_"},
    "column": {"color": "#332288", "linestyle": "-.", "marker": "|"},
    "mean colour": {"color": "#999933", "linestyle": (0, (6, 1)), "marker": "D"},
    "class": {"color": "#0072B2", "linestyle": (0, (3, 1)), "marker": "^"},
    "class (mean state)": LINE_STYLES[MODEL],  # what a probe of the model reads
}


@plotting
def bits_curve(table: pd.DataFrame, *, relative: bool = False, title: str = "", ax: Axes | None = None) -> Axes:
    """Bits that a linear readout has about each target over depth, a line with its 95% band over test images for each.

    Where there is room, the legend states the entropy H of each target, which is the most that can be read. Bits are
    the default: they are one unit for all lines, so that what a layer gains of one target and loses of another can be
    set against each other, while a share makes an eighth of a bit about the class look like a bit about the pixel.

    Args:
        table: BITS_COLUMNS, as `bits_by_layer` returns them.
        relative: Plot shares of H, in percent, in place of bits.
        title: Above the figure.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, two rows of one layer and target, or an unknown style.

    Example:
        >>> bits = lab.bits_by_layer(model, train_tokens[:50], tokens, targets=["row"], n_states=5)
        >>> ax = lab.figures.bits_curve(bits.table)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('layer', 'read from a state (bits)')
    """
    check_columns(table, BITS_COLUMNS)
    check_once(table, ["layer", "target"])
    ax = axes(3.4) if ax is None else ax
    for name in table.target.unique():
        _plot_target(ax, name, table[table.target == name].sort_values("layer"), relative)
    ax.axhline(0, color="black", linewidth=points(0.5), zorder=1)
    layer_axis(ax, int(table.layer.max()))
    if relative:
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
    ax.set(ylabel="share of H that is read (%)" if relative else "read from a state (bits)")
    images, states = int(table.n_images.max()), int(table.n_states.max())
    return finish(ax, title, f"{states:,} states of {images:,} test images; bands: 95 % over images")


def _plot_target(ax: Axes, name: str, rows: pd.DataFrame, relative: bool) -> None:
    """The line of a target with its band; its entropy differs between layers by no more than rounding."""
    style, entropy = TARGET_STYLES.get(name) or look(name, others=OTHERS[3:]), float(rows.entropy.mean())
    style = style | {"color": colour_of(name) or style["color"]}
    bits, low, high = (rows[column] / (entropy if relative else 1) for column in ("bits", "low", "high"))
    ax.fill_between(rows.layer, low, high, color=style["color"], alpha=0.2, linewidth=0)
    marks: Keywords = {"markersize": points(2.5), "linewidth": points(1)}
    ax.plot(rows.layer, bits, **style, **marks, label=as_label(name) + ("" if narrow() else f", H = {entropy:.1f}"))
    mark_not_converged(ax, rows.layer, bits, rows, style)
