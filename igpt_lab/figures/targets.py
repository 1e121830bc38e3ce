"""How well each layer predicts numbers about an image: R² over depth, a line for each target."""

import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL, control_names, shown_control
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import by_depth, check_columns, check_once, finish, layer_axis
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import CYCLE, Keywords, axes, look, points

TARGET_COLUMNS = ("control", "layer", "target", "test_r2", "low", "high", "chosen", "n_test")
MARKERS, DASHES = "os^Dv<>P", ("-", "--", ":")


@plotting
def target_curves(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """R² of each target over depth, a line with its 95% band over test images; a larger mark is the chosen layer.

    A control of one layer, such as raw pixels, is a mark beside the last layer, in its target's colour. The axis ends
    at -0.25: what is far below 0 predicts worse than the mean, and how much worse is of no account.

    Args:
        table: A row per layer and target, TARGET_COLUMNS, as `probe_targets` returns them; controls may follow.
        title: Above the figure.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, two rows of one control, layer and target, or an unknown style.

    Example:
        >>> numbers = [lab.image_properties(split, model.processor) for split in (train_tokens, tokens)]
        >>> probed = lab.probe_targets(train, test, *(table[["contrast", "symmetry"]] for table in numbers))
        >>> ax = lab.figures.target_curves(probed.table)
        >>> ax.get_ylabel(), ax.get_legend_handles_labels()[1]
        ('R² on test images', ['contrast', 'symmetry'])
    """
    check_columns(table, TARGET_COLUMNS)
    table = table.assign(control=control_names(table.control))
    check_once(table, ["control", "layer", "target"])
    table, called = by_depth(table)
    ax = axes(3.4) if ax is None else ax
    for place, name in enumerate(table.target.unique()):
        rows = table[(table.target == name) & (table.control == MODEL)].sort_values("layer")
        _plot_target(ax, name, rows, place)
    last = int(table.layer[table.control == MODEL].max())
    for control in [name for name in table.control.unique() if name != MODEL]:
        _plot_control(ax, control, table[table.control == control], list(table.target.unique()), last)
    ax.axhline(0, color="black", linewidth=points(0.5), zorder=1)
    layer_axis(ax, last, called)
    ax.set(ylabel="R² on test images", xlim=(-0.5, last + (0.5 if (table.control == MODEL).all() else 1.5)))
    ax.set_ylim(max(ax.get_ylim()[0], -0.25), min(ax.get_ylim()[1], 1.02))
    return finish(ax, title, f"{int(table.n_test.max()):,} test images; bands: 95 % over images")


def _style(name: str, place: int) -> Keywords:
    marks: Keywords = {"marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[place // len(CYCLE) % len(DASHES)]}
    return look(name, place) | marks


def _plot_target(ax: Axes, name: str, rows: pd.DataFrame, place: int) -> None:
    """The line of a target with its band, and its chosen layer."""
    style = _style(name, place)
    ax.fill_between(rows.layer, rows.low, rows.high, color=style["color"], alpha=0.2, linewidth=0)
    marks: Keywords = {"markersize": points(2.5), "linewidth": points(1)}
    ax.plot(rows.layer, rows.test_r2, **style, **marks, label=as_label(name))
    best = rows[rows.chosen.astype(bool)]
    ax.plot(best.layer, best.test_r2, **style | {"linestyle": ""}, markersize=points(5), label="_chosen")


def _plot_control(ax: Axes, control: str, rows: pd.DataFrame, targets: list[str], last: int) -> None:
    """Open marks behind the last layer for the chosen layer of each target of a control, named once."""
    rows = rows[rows.chosen.astype(bool)]
    for number, (name, value) in enumerate(zip(rows.target, rows.test_r2, strict=True)):
        style = _style(name, targets.index(name)) | {"linestyle": "", "markerfacecolor": "white"}
        label = as_label(shown_control(control)) if not number else "_again"
        ax.plot([last + 1], [value], **style, markersize=points(3.5), label=label)
