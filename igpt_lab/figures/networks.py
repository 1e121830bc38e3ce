"""Layer curves of several networks in one figure, over layers or over relative depth, with controls beside them.

Accuracy is a fraction in a table and a percentage on an axis.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.controls import mark_chance, over_draws, plot_control
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import TICK, by_depth, checked, finish, layer_axis, mark_not_converged
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Keywords, axes, look, points

NETWORK_COLUMNS = ("layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test")


@plotting
def layer_curves(
    tables: Mapping[str, pd.DataFrame] | pd.DataFrame, *, controls: pd.DataFrame | None = None, relative: bool = False,
    title: str = "", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Test accuracy over depth of several networks, a line with its 95% band for each, its chosen layer ringed.

    The legend has the names, and each network's chosen layer with its accuracy. Layers may have names too.
    Dashes and markers tell lines apart too. Colours begin again where there are more networks than colours; the first
    network has the colour that the model has in other figures.

    Args:
        tables: Name of each network -> what `probe_layers` returns, or its table (NETWORK_COLUMNS). Or one table with a
            column `model`, as `probe_models` returns it. Of a table with controls the model's rows are plotted.
        controls: Rows of controls as for `layer_curve`, beside the networks; a column `n_classes` K puts a dashed line
            at chance, 1 / K.
        relative: Plot over the share of each network's last layer, in percent, in place of layers: for networks of
            different depth.
        title: Above the figure.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: No network, a column that is missing, other than one chosen layer of a network, or an unknown style.

    Example:
        >>> ax = lab.figures.layer_curves({"tiny": result, "twin": result}, relative=True)
        >>> [text.get_text().partition(":")[0] for text in ax.get_legend().get_texts()]
        ['tiny', 'twin', 'chosen on validation']
    """
    return _plot(_networks(tables), controls, relative, title, axes(3.0) if ax is None else ax)


def is_of_several(table: pd.DataFrame) -> bool:
    """Has the table a column `model` with the rows of several networks?"""
    return "model" in table and table.model[table.control == MODEL].nunique() > 1


def plot_several(table: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """A table of several networks as `layer_curves` plots it over relative depth, with controls of one layer."""
    others = table[table.control != MODEL]
    alone = others[others.groupby(["control", "model"]).layer.transform("size") == 1]
    alone = alone.drop_duplicates(["control", "test_accuracy"])
    is_shared = alone.groupby("control").control.transform("size") == 1
    alone = alone.assign(control=alone.control.where(is_shared, alone.control + ", " + alone.model.astype(str)))
    return _plot(_networks(table), alone if len(alone) else None, True, title, ax)


def _plot(
    networks: Mapping[str, pd.DataFrame], controls: pd.DataFrame | None, relative: bool, title: str, ax: Axes
) -> Axes:
    """`layer_curves` of what `_networks` gives."""
    last = max(int(rows.layer.max()) for rows in networks.values())
    if controls is not None:
        _plot_controls(ax, controls, last, relative=relative)
    for name, rows in networks.items():
        _plot_network(ax, name, rows, relative=relative)
    _ring(ax, [], [], "chosen on validation")
    if relative:
        ax.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
        ax.set(xlim=(-0.03, 1.03), xlabel="depth (share of the last layer, %)")
    else:
        layer_axis(ax, last)
    ax.set_ylabel("test accuracy (%)")
    chance = 100 / controls.n_classes.max() if controls is not None and "n_classes" in controls else None
    if chance is not None:
        mark_chance(ax, chance, pd.DataFrame())
    counts = sorted({int(rows.n_test.iloc[0]) for rows in networks.values()})
    return finish(ax, title, f"{' or '.join(f'{n:,}' for n in counts)} test images; bands: 95 % over images")


def _networks(tables: Mapping[str, pd.DataFrame] | pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The model's rows of each network by its name, with the place of each layer in the order of depth."""
    if isinstance(tables, pd.DataFrame):
        if "model" not in tables:
            raise ValueError("the table lacks model; give a dict from names to tables, or a table as of `probe_models`")
        tables = {str(name): rows for name, rows in tables.groupby("model", sort=False)}
    if not tables:
        raise ValueError("there is no network; expected a dict from names to tables")
    networks = {}
    for name, table in tables.items():
        rows = checked(table if "control" in table else table.assign(control=MODEL), NETWORK_COLUMNS)
        networks[name] = by_depth(rows[rows.control == MODEL])[0].sort_values("layer")
        if (chosen := int(rows.chosen[rows.control == MODEL].eq(True).sum())) != 1:
            raise ValueError(f"{chosen} rows of {name} are marked as chosen; expected exactly one")
    return networks


def _plot_network(ax: Axes, name: str, rows: pd.DataFrame, *, relative: bool) -> None:
    style, x = look(name), rows.layer / max(rows.layer.max(), 1) if relative else rows.layer
    y = 100 * rows.test_accuracy
    ax.fill_between(x, 100 * rows.low, 100 * rows.high, color=style["color"], alpha=0.2, linewidth=0)
    line: Keywords = {"linewidth": points(1.2), "markersize": points(2.8), "zorder": 3}
    chosen = rows.chosen.eq(True)
    best = f"layer {as_label(rows.layer_name[chosen].iloc[0], TICK)}, {y[chosen].iloc[0]:.1f} %"
    ax.plot(x, y, **style, **line, label=f"{as_label(name, 31)}: {best}")
    mark_not_converged(ax, x, y, rows, style)
    _ring(ax, x[chosen], y[chosen], "_")


def _ring(ax: Axes, x: Sequence[float] | pd.Series, y: Sequence[float] | pd.Series, label: str) -> None:
    ring: Keywords = {"marker": "o", "markersize": points(8), "markerfacecolor": "none", "linestyle": ""}
    ax.plot(x, y, color="black", label=label, **ring, zorder=5)


def _plot_controls(ax: Axes, table: pd.DataFrame, last: int, *, relative: bool) -> None:
    """Each control as `layer_curve` has it."""
    table = over_draws(table[table.control != MODEL])
    if relative and pd.api.types.is_numeric_dtype(table.layer):
        table = table.assign(layer=table.layer / max(last, 1))
    for name, rows in table.groupby("control", sort=False):
        plot_control(ax, str(name), rows.sort_values("layer"))
