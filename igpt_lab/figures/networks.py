"""Layer curves of several networks in one figure, over layers or over relative depth, with controls beside them.

Accuracy is a fraction in a table and a percentage on an axis.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.controls import mark_chance, over_draws
from igpt_lab.figures.curves import plot_control
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import checked, finish, layer_axis, mark_not_converged
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Keywords, axes, look, points

NETWORK_COLUMNS = ("layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test")


@plotting
def layer_curves(
    tables: Mapping[str, pd.DataFrame] | pd.DataFrame, *, controls: pd.DataFrame | None = None, relative: bool = False,
    title: str = "", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Test accuracy over depth of several networks, a line with its 95% band for each, its chosen layer ringed.

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
        ValueError: No network, a column that is missing, or an unknown style.

    Example:
        >>> ax = lab.figures.layer_curves({"tiny": result, "twin": result}, relative=True)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['tiny', 'twin', 'chosen on validation']
    """
    networks = _networks(tables)
    ax = axes(3.0) if ax is None else ax
    last = max(int(rows.place.max()) for rows in networks.values())
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
        rows = rows[rows.control == MODEL]
        if pd.api.types.is_numeric_dtype(rows.layer):
            networks[name] = rows.sort_values("layer").assign(place=rows.layer)
        else:  # names of layers come in the order of depth
            networks[name] = rows.assign(place=range(len(rows)))
    return networks


def _plot_network(ax: Axes, name: str, rows: pd.DataFrame, *, relative: bool) -> None:
    style, x = look(name), rows.place / max(rows.place.max(), 1) if relative else rows.place
    y = 100 * rows.test_accuracy
    ax.fill_between(x, 100 * rows.low, 100 * rows.high, color=style["color"], alpha=0.2, linewidth=0)
    line: Keywords = {"linewidth": points(1.2), "markersize": points(2.8), "zorder": 3}
    ax.plot(x, y, **style, **line, label=as_label(name))
    mark_not_converged(ax, x, y, rows, style)
    chosen = rows.chosen.eq(True)
    _ring(ax, x[chosen], y[chosen], "_")


def _ring(ax: Axes, x: Sequence[float] | pd.Series, y: Sequence[float] | pd.Series, label: str) -> None:
    ring: Keywords = {"marker": "o", "markersize": points(8), "markerfacecolor": "none", "linestyle": ""}
    ax.plot(x, y, color="black", label=label, **ring, zorder=5)


def _plot_controls(ax: Axes, table: pd.DataFrame, last: int, *, relative: bool) -> None:
    """Each control as `layer_curve` has it."""
    table = over_draws(table[table.control != MODEL])
    if relative:
        table = table.assign(layer=table.layer / max(last, 1))
    for name, rows in table.groupby("control", sort=False):
        plot_control(ax, str(name), rows.sort_values("layer"))
