"""What figures of layer curves need for controls: draws as a range, chance, a cut axis; what others published;
and selectivity over depth.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.options import in_words
from igpt_lab.figures.parts import by_depth, check_columns, head, layer_axis, legend, mark_not_converged
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import LINE_STYLES, OTHERS, Figure, Keywords, inches, look, narrow, points

SELECTIVITY_COLUMNS = (
    "layer", "test_accuracy", "low", "high", "control_accuracy", "control_low", "control_high", "selectivity",
    "selectivity_low", "selectivity_high", "chosen", "n_test",
)  # fmt: skip
PUBLISHED_COLUMNS = ("source", "layer", "value")
PANELS: dict[str, tuple[str, str, str, Keywords]] = {  # name on the axis: value, ends of its interval, style
    "accuracy (%)": ("test_accuracy", "low", "high", LINE_STYLES[MODEL]),
    "control task (%)": ("control_accuracy", "control_low", "control_high", LINE_STYLES["permuted labels"]),
    "selectivity (points)": ("selectivity", "selectivity_low", "selectivity_high", OTHERS[0]),
}
CUT = (0.2, 0.26)  # of an axis' height, where the part that is left out would be


def over_draws(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each control and layer: of several `draws` their mean, and their range as `low` and `high`."""
    table = table.assign(draws=table.groupby(["control", "layer"]).layer.transform("size"))
    several = (table.draws > 1) & (table.control != MODEL)
    if not several.any():
        return table
    columns = {"test_accuracy": "mean", "low": "min", "high": "max", "converged": "all", "draws": "first"}
    columns = {name: kind for name, kind in columns.items() if name in table}
    drawn = table[several].assign(low=table.test_accuracy, high=table.test_accuracy)
    means = drawn.groupby(["control", "layer"], as_index=False, sort=False).agg(columns)
    return pd.concat([table[~several], means], ignore_index=True)


def near_chance(table: pd.DataFrame, chance: float, low: float) -> list[str]:
    """The controls whose mean is nearer to `chance` than to `low`, the model's lower end: all in %."""
    means = 100 * table.groupby("control").test_accuracy.mean()
    return [name for name, mean in means.items() if abs(mean - chance) < low - mean]


def mark_chance(ax: Axes, chance: float, rows: pd.DataFrame) -> None:
    """A dashed line at `chance`, in %; where it lies below the axis, the axis goes on there, with what is between cut.

    `rows`: the controls that are drawn beside that line, as they are in the table.
    """
    ax.axhline(chance, color="black", linestyle="--", linewidth=points(0.7), label="chance", zorder=1.5)
    bottom, top = ax.get_ylim()
    ends = 100 * np.array([rows.low.min(), rows.high.max()]) if len(rows) else np.array([chance, chance])
    margin = 0.02 * (top - bottom)
    low, high = min(ends[0], chance) - margin, max(ends[1], chance) + margin
    if high > bottom - 0.5 * (top - bottom):
        ax.set_ylim(min(low, bottom), max(high, top))
        return
    values, places = [low, high, bottom, top], [0, *CUT, 1]
    ax.set_yscale(
        "function", functions=(lambda y: np.interp(y, values, places), lambda y: np.interp(y, places, values))
    )
    ax.set_ylim(low, top)
    ticks = [y for y in ticker.MaxNLocator(6).tick_values(bottom, top) if bottom <= y <= top]
    ticks += [chance, *(end for end in ends if abs(end - chance) > 0.3 * (high - low) and not narrow())]
    ax.yaxis.set_major_locator(ticker.FixedLocator(ticks))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:.1f}".removesuffix(".0")))
    across: Keywords = {"transform": ax.transAxes, "clip_on": False, "zorder": 8}
    ax.plot([0, 0], CUT, color="white", linewidth=points(2), **across)
    slash: Keywords = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": points(6), "markeredgewidth": points(0.7)}
    ax.plot([0, 0], CUT, color="black", linestyle="", **slash, **across)


def plot_control(ax: Axes, name: str, rows: pd.DataFrame) -> None:
    """The line of the model or of a control over depth, with its interval; one row is a level line."""
    kind = name.partition(", ")[0]  # of "raw pixels, a network", which is as that network sees them
    known = name in LINE_STYLES or kind not in LINE_STYLES
    style, weight = look(name if known else kind, others=OTHERS), 2 if name == MODEL else 1
    y, low, high = (100 * rows[column] for column in ("test_accuracy", "low", "high"))
    band: Keywords = {"color": style["color"], "alpha": 0.12 * weight, "linewidth": 0}
    if name != MODEL and len(rows) == 1:  # such as pixels, which have no layer
        ax.axhspan(low.iloc[0], high.iloc[0], **band)
        ax.axhline(y.iloc[0], **style | {"marker": ""}, label=as_label(name) + _doubt(rows))
        return
    ax.fill_between(rows.layer, low, high, **band, zorder=weight)
    label = (
        f"{as_label(rows.network.iloc[0])}, {in_words('interval', '95 % interval')}"
        if name == MODEL
        else as_label(name)
    )
    if (draws := int(rows.draws.max())) > 1:
        label += f" ({draws})" if narrow() else f", {draws} draws"
    line: Keywords = {"linewidth": points(0.7) * weight, "markersize": points(1.8) * weight, "zorder": 1 + weight}
    ax.plot(rows.layer, y, **style, label=label, **line)
    mark_not_converged(ax, rows.layer, y, rows, style)


def plot_published(ax: Axes, table: pd.DataFrame, last: int) -> tuple[float, float]:
    """A line for each source of published accuracies, with layers up to `last`; returns the ends of all, in %."""
    check_columns(table, PUBLISHED_COLUMNS)
    table = table.reset_index(drop=True)
    wrong = table[~table.value.between(0, 1) | ~(table.layer.isna() | table.layer.isin(range(last + 1)))]
    if len(wrong):
        row = wrong.iloc[0]
        raise ValueError(
            f"published value {row.value} at layer {row.layer}; expected fractions from 0 to 1, at layers 0 to {last} "
            "or at none"
        )
    reach = table["std"].fillna(0) if "std" in table else pd.Series(0.0, table.index)
    for source, rows in table.groupby("source", sort=False):
        name = f"published: {source}"
        style, label = look(name, others=OTHERS), as_label(name, letters() - 12)
        curve = rows[rows.layer.notna()].sort_values("layer")
        if len(curve):
            line: Keywords = {"linewidth": points(0.7), "markersize": points(2.5)}
            ax.plot(curve.layer, 100 * curve.value, **style, **line, label=label)
        level: Keywords = style | {"marker": "", "linewidth": points(0.7)}
        for i, value in rows[rows.layer.isna()].value.items():
            seen = label in ax.get_legend_handles_labels()[1]
            ax.axhline(100 * value, **level, label="_" + label if seen else label)
            ax.axhspan(*(100 * (value + side * reach[i]) for side in (-1, 1)), color=style["color"], alpha=0.12, lw=0)
    return 100 * (table.value - reach).min(), 100 * (table.value + reach).max()


def _doubt(rows: pd.DataFrame) -> str:
    return "" if rows.converged.all() else " (not converged)"


@plotting
def selectivity(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Accuracy, that of a task without meaning, and their difference, the selectivity, over depth, one below the other.

    `table` (SELECTIVITY_COLUMNS) as `selectivity` returns it. Bands are 95% intervals over test images, rings mark the
    chosen layer. All panels have the same scale, so that their slopes can be compared.
    """
    check_columns(table, SELECTIVITY_COLUMNS)
    table, names = by_depth(table)
    table = table.sort_values("layer")
    figure = Figure(figsize=inches(4.2), layout="constrained")
    panels = figure.subplots(len(PANELS), sharex=True)
    extents = [100 * np.array([table[low].min(), table[high].max()]) for _, low, high, _ in PANELS.values()]
    reach = 0.55 * max(high - low for low, high in extents)
    for ax, (name, (value, low, high, style)), ends in zip(panels, PANELS.items(), extents, strict=True):
        ax.fill_between(table.layer, 100 * table[low], 100 * table[high], color=style["color"], alpha=0.2, linewidth=0)
        ax.plot(table.layer, 100 * table[value], **style, label="_")
        chosen = table[table.chosen.astype(bool)]
        ring: Keywords = {"marker": "o", "markersize": points(9), "markerfacecolor": "none", "linestyle": ""}
        ax.plot(chosen.layer, 100 * chosen[value], color="black", label="chosen layer", **ring)
        ax.set(ylabel=name, ylim=(ends.mean() - reach, ends.mean() + reach))
    layer_axis(panels[-1], int(table.layer.max()), names)
    head(panels[0], title, f"{int(table.n_test.iloc[0]):,} test images; bands: 95 % over images")
    legend(panels[-1])
    return figure
