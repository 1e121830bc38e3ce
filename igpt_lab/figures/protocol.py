"""What the settings of a protocol change: the default, every other one minus it, and each factor.

Accuracy is a fraction in a table, and a percentage or points on an axis.
"""

import itertools
import math

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.options import colour_of
from igpt_lab.figures.parts import (
    check_columns,
    check_room,
    figure_of,
    layer_axis,
    rows_downwards,
    stacked,
    suptitle,
    with_empty_words,
)
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, Keywords, inches, look, narrow, points

PROTOCOL_COLUMNS = "recipe alignment point scaling solver layer test_accuracy low high chosen converged n_test".split()
EFFECT_COLUMNS = ("factor", "a", "b", "others", "at", "difference", "low", "high")
SETTING = ["alignment", "point", "scaling", "solver"]
STOPPED_COLUMNS = ("alignment", "point", "scaling", "at", "layer", "converged", "min", "max")
PROTOCOL_STYLES: dict[tuple[str, str], Keywords] = {  # by scaling and solver
    ("standardised", "converged"): {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    ("standardised", "100 iterations"): {"color": "#332288", "linestyle": "--", "marker": "s"},
    ("unscaled", "converged"): {"color": "#CC79A7", "linestyle": "-", "marker": "^"},
    ("unscaled", "100 iterations"): {"color": "#882255", "linestyle": "--", "marker": "v"},
}
OPTIMUM_STYLE = PROTOCOL_STYLES["standardised", "converged"]
STOPPED_STYLE = PROTOCOL_STYLES["unscaled", "100 iterations"]
TRANSFORMERS_STYLE: Keywords = {"color": "#999933", "linestyle": (0, (1, 1)), "marker": "x"}
EFFECT_STYLES: dict[str, Keywords] = {
    "chosen layer": {"color": "#0072B2", "marker": "o"},
    "last layer": {"color": "#56B4E9", "marker": "D"},
    "drop": {"color": "#000000", "marker": "s"},
}
LINEAR = 5  # points of a difference, beyond which its axis is logarithmic where differences are large


@plotting
def protocol_curves(
    table: pd.DataFrame, effects: pd.DataFrame, stopped: pd.DataFrame | None = None, *, title: str = ""
) -> matplotlib.figure.Figure:
    """What a protocol's settings change: the default's accuracy over depth, every other one minus it, and each factor.

    A panel for each alignment and point has the differences to the default, which is the table's first setting, a line
    for each scaling and solver, hollow where a probe did not converge, the chosen layer ringed. The recipe of
    transformers is plotted in the panel that it resembles. Where differences are large the axis is logarithmic beyond 5
    points. Below: averages of the
    differences with 95% intervals, and as faint dots the pairs of settings that they are averages of; interactions of
    two factors (a x b). Last: from the lowest to the highest accuracy of a stopped solver, over repeats that should all
    be the same, and the accuracy at the optimum.

    Args:
        table: PROTOCOL_COLUMNS, as `ablate_protocol` returns them.
        effects: EFFECT_COLUMNS, of the same.
        stopped: STOPPED_COLUMNS, of the same.
        title: Above the figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Figure.

    Raises:
        ValueError: A column that is missing, more panels than there is room for, or an unknown style.

    Example:
        >>> row = {"recipe": "", "alignment": "sos", "point": "ln_1", "scaling": "standardised", "solver": "converged"}
        >>> columns = ["layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test"]
        >>> effects = pd.DataFrame({"at": ["chosen layer", "last layer", "drop"], "difference": [0.02, 0.01, 0.01]})
        >>> effects = effects.assign(factor="alignment", a="sos", b="raw", others="average", low=0.0, high=0.04)
        >>> figure = lab.figures.protocol_curves(result.table[columns].assign(**row), effects)
        >>> len(figure.subfigs)  # the default, differences to it, effects
        3
    """
    check_columns(table, PROTOCOL_COLUMNS)
    check_columns(effects, EFFECT_COLUMNS)
    table = table.assign(recipe=with_empty_words(table.recipe))
    effects = effects.assign(others=with_empty_words(effects.others))
    settings, transformers = table[table.recipe == ""], table[table.recipe.isin(["transformers", "port"])]
    alignments, places = (settings[name].unique() for name in ("alignment", "point"))
    check_room("alignment and point", len(alignments) * len(places))
    count = len(effects[["factor", "a", "b"]].drop_duplicates())
    heights = [1.75, 1.35 * len(alignments) + 0.9, 0.25 * count + 0.65]
    if stopped is not None:
        check_columns(stopped, STOPPED_COLUMNS)
        heights.append(0.2 * len(stopped) + 0.65)
    figure = Figure(figsize=inches(sum(heights)), layout="constrained")
    top, upper, lower, *last_part = stacked(figure, heights)
    default = _default(settings)
    _plot_default(top.subplots(), default)
    suptitle(top, title)
    panels = upper.subplots(len(alignments), len(places), sharex=True, sharey=True, squeeze=False)
    change = _minus(settings, default)
    for ax, (alignment, point) in zip(panels.flat, itertools.product(alignments, places), strict=True):
        _plot_settings(ax, change[(change.alignment == alignment) & (change.point == point)])
        ax.set_title(as_label(f"{alignment}, {point}"), loc="left", fontweight="normal", pad=points(3))
    if len(transformers):
        recipe = _minus(transformers, default)
        _plot_setting(panels[-1, -1], "recipe of transformers", TRANSFORMERS_STYLE, recipe)
    _finish_changes(upper, panels, int(table.layer.max()))
    _plot_effects(lower.add_subplot(), effects)
    if stopped is not None:
        _plot_stopped(last_part[0].add_subplot(), stopped)
    return figure


def _default(settings: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first setting, by layer."""
    first = settings.iloc[0]
    rows = settings[(settings[SETTING] == first[SETTING]).all(axis=1)]
    return rows.sort_values("layer").set_index("layer")


def _minus(settings: pd.DataFrame, default: pd.DataFrame) -> pd.DataFrame:
    """Other settings with `change`, in points: their accuracy minus that of the default at the same layer."""
    is_default = (settings[SETTING] == default.iloc[0][SETTING]).all(axis=1)
    rows = settings[~is_default]
    return rows.assign(change=100 * (rows.test_accuracy - rows.layer.map(default.test_accuracy)))


def _plot_default(ax: Axes, default: pd.DataFrame) -> None:
    """The accuracy of the default over depth, its chosen layer ringed."""
    style, y = look(MODEL), 100 * default.test_accuracy
    ax.fill_between(default.index, 100 * default.low, 100 * default.high, color=style["color"], alpha=0.2, linewidth=0)
    ax.plot(default.index, y, **style, linewidth=points(1), markersize=points(2.5))
    ring: Keywords = {"marker": "o", "markersize": points(7), "markerfacecolor": "none", "linestyle": ""}
    chosen = default.chosen.astype(bool)
    ax.plot(default.index[chosen], y[chosen], color="black", **ring)
    words = ", ".join(map(str, default.iloc[0][SETTING]))
    look_of: Keywords = {"loc": "left", "fontweight": "normal", "pad": points(3), "fontsize": points(7)}
    ax.set_title(as_label(f"default: {words}", letters()), **look_of)
    layer_axis(ax, int(default.index.max()))
    ax.set(xlabel="", ylabel="test accuracy\n(%)")


def _finish_changes(part: matplotlib.figure.SubFigure, panels: np.ndarray, last: int) -> None:
    """Scale, names and legend of the panels of differences."""
    largest = max(np.abs(ax.dataLim.intervaly).max() for ax in panels.flat)
    unit = "points"
    if largest > 2 * LINEAR:
        panels[0, 0].set_yscale("symlog", linthresh=LINEAR, linscale=1.3)
        marks = [mark for mark in (LINEAR, 4 * LINEAR) if mark <= largest]
        panels[0, 0].yaxis.set_major_locator(ticker.FixedLocator([*(-m for m in marks[::-1]), 0, *marks]))
        panels[0, 0].yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        panels[0, 0].yaxis.set_minor_locator(ticker.NullLocator())
        unit = f"points, log beyond {LINEAR}"
    panels[0, 0].xaxis.set_major_locator(ticker.MultipleLocator(max(1, math.ceil((last + 1) / 6))))
    for ax in panels.flat:
        ax.axhline(0, color="black", linewidth=points(0.6), zorder=0)
    for ax in panels[-1]:
        ax.set_xlabel("layer")
    part.supylabel(f"minus the default ({unit})", fontsize=points(7))
    drawn = [pair for ax in panels.flat[::-1] for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    named = {name: handle for handle, name in drawn}
    part.legend(named.values(), named.keys(), loc="outside lower center", ncols=1 if narrow() else 2)


def _plot_settings(ax: Axes, rows: pd.DataFrame) -> None:
    """The lines of one panel of differences."""
    for (scaling, solver), style in PROTOCOL_STYLES.items():
        line = rows[(rows.scaling == scaling) & (rows.solver == solver)]
        if len(line):
            _plot_setting(ax, f"{scaling}, {solver}", style, line)


def _plot_setting(ax: Axes, label: str, style: Keywords, rows: pd.DataFrame) -> None:
    """One line, its markers hollow where the probe did not converge, and the chosen layer ringed."""
    rows = rows.sort_values("layer")
    y, converged = rows.change, rows.converged.astype(bool)
    style = style | {"color": colour_of(label) or style["color"]}
    line: Keywords = {"linewidth": points(0.8), "markersize": points(2.2), "markeredgewidth": points(0.5)}
    face = style["color"] if converged.all() else "white"
    ax.plot(rows.layer, y, label=as_label(label), **style, **line, markerfacecolor=face)
    if converged.any() and not converged.all():
        ax.plot(rows.layer[converged], y[converged], **style | {"linestyle": ""}, **line)
    ring: Keywords = {"markersize": points(6), "markerfacecolor": "none", "markeredgewidth": points(0.7)}
    best = rows.chosen.astype(bool)
    ax.plot(rows.layer[best], y[best], marker="o", linestyle="", color=style["color"], **ring, zorder=5)


def _plot_effects(ax: Axes, effects: pd.DataFrame) -> None:
    """Differences between levels: averages with intervals, pairs of settings as faint dots."""
    names = list(dict.fromkeys(zip(effects.factor, effects.a, effects.b, strict=True)))
    bars: Keywords = {"linestyle": "", "markersize": points(3), "elinewidth": points(0.8), "capsize": points(1.5)}
    for i, (factor, a, b) in enumerate(names):
        pair = effects[(effects.factor == factor) & (effects.a == a) & (effects.b == b)]
        for j, (at, style) in enumerate(EFFECT_STYLES.items()):
            rows = pair[pair["at"] == at]
            is_whole, y = rows.others.isin(["average", ""]), i + 0.26 * (j - 1)
            whole, pairs = rows[is_whole].iloc[0], rows[~is_whole]
            dots: Keywords = {"color": style["color"], "alpha": 0.3, "markersize": points(3)}
            ax.plot(100 * pairs.difference, [y] * len(pairs), ".", **dots)
            ends = [[100 * (whole.difference - whole.low)], [100 * (whole.high - whole.difference)]]
            ax.errorbar(100 * whole.difference, y, xerr=ends, **style, **bars, label="_" if i else at)
    ax.axvline(0, color="black", linewidth=points(0.6), zorder=0)
    rows_downwards(ax, [f"{a} \u00d7 {b}" if factor == "interaction" else f"{a} minus {b}" for factor, a, b in names])
    ax.set(xlabel="difference (points)" if narrow() else "difference of test accuracy (points)")
    spacing = 1.5 if narrow() else None
    figure_of(ax, root=False).legend(loc="outside lower right", ncols=3, handlelength=1.5, columnspacing=spacing)


def _plot_stopped(ax: Axes, stopped: pd.DataFrame) -> None:
    """What a stopped solver makes of one fit, repeated, and the optimum beside it."""
    places, low = range(len(stopped)), 100 * stopped["min"]
    high = 100 * stopped["max"]
    ax.hlines(places, low, high, color=STOPPED_STYLE["color"], linewidth=points(3), label="100 iterations, repeated")
    ax.plot((low + high) / 2, places, "|", color=STOPPED_STYLE["color"], markersize=points(5))
    optimum: Keywords = OPTIMUM_STYLE | {"linestyle": "", "markersize": points(3)}
    ax.plot(100 * stopped.converged, places, **optimum, label="converged")
    rows_downwards(ax, [f"{row.point}, {row.scaling}, layer {row.layer}" for row in stopped.itertuples()])
    ax.set(xlabel="test accuracy (%)")
    figure_of(ax, root=False).legend(loc="outside lower right", ncols=2, handlelength=1.5)
