"""Tables -> figures that compare: models side by side, settings of a protocol, ways of fine-tuning.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import itertools
import math

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import (
    check_columns,
    check_room,
    columns_of,
    controls_of,
    figure_of,
    finish,
    interval,
    mark_not_converged,
    rows_downwards,
    stacked,
    suptitle,
    with_empty_words,
)
from igpt_lab.figures.style import AMBER, LINE_STYLES, PURPLE, Figure, Keywords, axes, inches, narrow, plotting, points

PROTOCOL_COLUMNS = "recipe alignment point scaling solver layer test_accuracy low high chosen converged n_test".split()
EFFECT_COLUMNS = ("factor", "a", "b", "others", "at", "difference", "low", "high")
STOPPED_COLUMNS = ("alignment", "point", "scaling", "at", "layer", "converged", "min", "max")
METHOD_COLUMNS = ("method", "labels", "draw", "test_accuracy", "low", "high")
COMPARED_COLUMNS = ("model", "control", "layer", "test_accuracy", "low", "high", "chosen")
PROTOCOL_STYLES: dict[tuple[str, str], Keywords] = {  # by scaling and solver
    ("standardised", "converged"): {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    ("standardised", "100 iterations"): {"color": "#56B4E9", "linestyle": "--", "marker": "s"},
    ("unscaled", "converged"): {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    ("unscaled", "100 iterations"): {"color": "#E69F00", "linestyle": "--", "marker": "v"},
}
OPTIMUM_STYLE = PROTOCOL_STYLES["standardised", "converged"]
STOPPED_STYLE = PROTOCOL_STYLES["unscaled", "100 iterations"]
TRANSFORMERS_STYLE: Keywords = {"color": "#767676", "linestyle": (0, (1, 1)), "marker": "x"}
EFFECT_STYLES: dict[str, Keywords] = {
    "chosen layer": {"color": "#0072B2", "marker": "o"},
    "last layer": {"color": "#D55E00", "marker": "s"},
    "drop": {"color": "#767676", "marker": "D"},
}
LABEL_STYLES = tuple(style | {"linestyle": ""} for style in list(PROTOCOL_STYLES.values())[::2])  # all labels, few
TUNED_STYLES = (LINE_STYLES[MODEL], PURPLE, AMBER, LINE_STYLES["random network"])  # the model before, and those after


@plotting
def model_comparison(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Models one below the other, in their order: chosen layer, last layer and controls, with 95% intervals.

    `table` (COMPARED_COLUMNS) has a row for each (model, control, layer), control "model" being the model itself, as
    `probe_models` returns it; of a control the chosen row is plotted.
    """
    check_columns(table, COMPARED_COLUMNS)
    table = table.assign(control=control_names(table.control))
    models = list(dict.fromkeys(table.model))
    own, chosen = table.control == MODEL, table.chosen.astype(bool)
    if not pd.api.types.is_numeric_dtype(table.layer):  # names, in the order of depth
        table = table.assign(layer=table.groupby(["model", "control"]).cumcount())
    last = own & (table.layer == table.layer.where(own).groupby(table.model).transform("max"))
    series = {"chosen layer": (own & chosen, LINE_STYLES[MODEL]), "last layer": (last, PURPLE)}
    controls = [name for name in dict.fromkeys(table.control) if name != MODEL]
    series |= {name: (chosen & (table.control == name), LINE_STYLES.get(name, AMBER)) for name in controls}
    below = 0.16 * len(series) if columns_of(map(as_label, series), 2) == 1 else 0  # a legend of long names
    ax = axes(0.28 * len(models) + 1.2 + below) if ax is None else ax
    bars: Keywords = {"linestyle": "", "markersize": points(3), "elinewidth": points(0.8), "capsize": points(1.5)}
    for i, (name, (shown, style)) in enumerate(series.items()):
        rows = table[shown]
        places = rows.model.map(models.index) + 0.6 * ((i + 0.5) / len(series) - 0.5)
        ax.errorbar(100 * rows.test_accuracy, places, xerr=interval(rows), **style | bars, label=as_label(name))
    rows_downwards(ax, models)
    ax.set(xlabel="test accuracy (%)")
    return finish(ax, title, "")


@plotting
def protocol_curves(
    table: pd.DataFrame, effects: pd.DataFrame, stopped: pd.DataFrame | None = None, *, title: str = ""
) -> matplotlib.figure.Figure:
    """Test accuracy over depth in every setting of a protocol, and below what each of its factors changes.

    A panel for each alignment and point, a line for each scaling and solver, hollow where a probe did not converge, the
    chosen layer ringed. The recipe of transformers is plotted in the panel that it resembles. Below: averages of the
    differences with 95% intervals, and as faint dots the pairs of settings that they are averages of; interactions of
    two factors (a x b). Last: from the lowest to the highest accuracy of a stopped solver, over repeats that should all
    be the same, and the accuracy at the optimum.

    Args:
        table: PROTOCOL_COLUMNS, as `ablate_protocol` returns them.
        effects: EFFECT_COLUMNS, of the same.
        stopped: STOPPED_COLUMNS, of the same.
        title: Above the figure.
        style: "paper", "wide" or "talk".

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
        >>> len(figure.subfigs)  # above the curves, below the effects
        2
    """
    check_columns(table, PROTOCOL_COLUMNS)
    check_columns(effects, EFFECT_COLUMNS)
    table = table.assign(recipe=with_empty_words(table.recipe))
    effects = effects.assign(others=with_empty_words(effects.others))
    settings, transformers = table[table.recipe == ""], table[table.recipe.isin(["transformers", "port"])]
    alignments, places = (settings[name].unique() for name in ("alignment", "point"))
    check_room("alignment and point", len(alignments) * len(places))
    count = len(effects[["factor", "a", "b"]].drop_duplicates())
    heights = [1.5 * len(alignments) + 0.6, 0.25 * count + 0.65]
    if stopped is not None:
        check_columns(stopped, STOPPED_COLUMNS)
        heights.append(0.2 * len(stopped) + 0.65)
    figure = Figure(figsize=inches(sum(heights)), layout="constrained")
    upper, lower, *last_part = stacked(figure, heights)
    panels = upper.subplots(len(alignments), len(places), sharex=True, sharey=True, squeeze=False)
    for ax, (alignment, point) in zip(panels.flat, itertools.product(alignments, places), strict=True):
        _plot_settings(ax, settings[(settings.alignment == alignment) & (settings.point == point)])
        ax.set_title(as_label(f"{alignment}, {point}"), loc="left", fontweight="normal", pad=points(3))
    if len(transformers):
        _plot_setting(panels[-1, -1], "recipe of transformers", TRANSFORMERS_STYLE, transformers)
    last = int(table.layer.max())
    panels[0, 0].xaxis.set_major_locator(ticker.MultipleLocator(max(1, math.ceil((last + 1) / 6))))
    for ax in panels[-1]:
        ax.set_xlabel("layer")
    upper.supylabel("test accuracy (%)", fontsize=points(7))
    handles, labels = panels[-1, -1].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    upper.legend(named.values(), named.keys(), loc="outside lower center", ncols=1 if narrow() else 2)
    suptitle(upper, title)
    _plot_effects(lower.add_subplot(), effects)
    if stopped is not None:
        _plot_stopped(last_part[0].add_subplot(), stopped)
    return figure


@plotting
def fine_tuning(table: pd.DataFrame, curves: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Test accuracy of each method, full labels and few; below, layer curves before and after on one axis.

    `table` (METHOD_COLUMNS) has a row for each (method, labels, draw, seed), plotted in its order: means over draws and
    seeds with their standard deviation, single runs as faint dots, and where there is one run the 95% interval over
    test images. `curves` is as for `layer_curve`,
    control "model" being the model before, each other control a model after.
    """
    check_columns(table, METHOD_COLUMNS)
    curves = curves.assign(control=control_names(curves.control))
    count = table.method.nunique()
    figure = Figure(figsize=inches(0.24 * count + 3.6), layout="constrained")
    upper, lower = stacked(figure, [0.24 * count + 1, 2.6])
    methods, depth = upper.subplots(), lower.subplots()
    _plot_methods(methods, table)
    labels = table.labels.nunique()
    upper.legend(loc="outside lower right", title="labels a class", ncols=labels, handlelength=1)
    suptitle(upper, title)
    for name, style in zip(controls_of(curves), TUNED_STYLES, strict=False):
        label = "before" if name == MODEL else name
        _plot_tuned(depth, label, style, curves[curves.control == name].sort_values("layer"))
    depth.set(xlabel="layer", ylabel="accuracy of a probe (%)")
    lower.legend(loc="outside lower center", ncols=columns_of(depth.get_legend_handles_labels()[1], 2))
    return figure


def _plot_settings(ax: Axes, rows: pd.DataFrame) -> None:
    """The lines of one panel of `protocol_curves`."""
    for (scaling, solver), style in PROTOCOL_STYLES.items():
        line = rows[(rows.scaling == scaling) & (rows.solver == solver)]
        if len(line):
            _plot_setting(ax, f"{scaling}, {solver}", style, line)


def _plot_setting(ax: Axes, label: str, style: Keywords, rows: pd.DataFrame) -> None:
    """One line, its markers hollow where the probe did not converge, and the chosen layer with its interval."""
    rows = rows.sort_values("layer")
    y, converged = 100 * rows.test_accuracy, rows.converged.astype(bool)
    line: Keywords = {"linewidth": points(0.8), "markersize": points(2.2), "markeredgewidth": points(0.5)}
    face = style["color"] if converged.all() else "white"
    ax.plot(rows.layer, y, label=label, **style, **line, markerfacecolor=face)
    if converged.any() and not converged.all():
        ax.plot(rows.layer[converged], y[converged], **style | {"linestyle": ""}, **line)
    best = rows[rows.chosen.astype(bool)].iloc[:1]
    ring: Keywords = {"markersize": points(6), "markerfacecolor": "none", "markeredgewidth": points(0.7)}
    ring |= {"elinewidth": points(0.7), "capsize": points(1.5)}
    place = best.layer.iloc[0], 100 * best.test_accuracy.iloc[0]
    ax.errorbar(*place, interval(best), marker="o", color=style["color"], **ring, zorder=5)


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
    rows_downwards(ax, [f"{a} x {b}" if factor == "interaction" else f"{a} less {b}" for factor, a, b in names])
    ax.set(xlabel="difference (points)" if narrow() else "difference of test accuracy (points)")
    spacing = 1.5 if narrow() else None
    figure_of(ax, root=False).legend(loc="outside lower right", ncols=3, handlelength=1.5, columnspacing=spacing)


def _plot_stopped(ax: Axes, stopped: pd.DataFrame) -> None:
    """What a stopped solver makes of one fit, repeated, and the optimum beside it."""
    places, low, high = range(len(stopped)), 100 * stopped["min"], 100 * stopped["max"]
    ax.hlines(places, low, high, color=STOPPED_STYLE["color"], linewidth=points(3), label="100 iterations, repeated")
    ax.plot((low + high) / 2, places, "|", color=STOPPED_STYLE["color"], markersize=points(5))
    optimum: Keywords = OPTIMUM_STYLE | {"linestyle": "", "markersize": points(3)}
    ax.plot(100 * stopped.converged, places, **optimum, label="converged")
    rows_downwards(ax, [f"{row.point}, {row.scaling}, layer {row.layer}" for row in stopped.itertuples()])
    ax.set(xlabel="test accuracy (%)")
    figure_of(ax, root=False).legend(loc="outside lower right", ncols=2, handlelength=1.5)


def _plot_methods(ax: Axes, table: pd.DataFrame) -> None:
    """The methods of `fine_tuning` one below the other, those with all labels a little above those with few."""
    methods = list(dict.fromkeys(table.method))
    bars: Keywords = {"elinewidth": points(0.8), "capsize": points(1.5), "markersize": points(3)}
    for i, labels in enumerate(dict.fromkeys(table.labels)):
        style = LABEL_STYLES[i % 2]
        rows = table[table.labels == labels]
        rows = rows.assign(y=rows.method.map(methods.index) + 0.15 * (2 * i - 1))
        runs = rows.groupby("y")
        mean, deviation = runs[["test_accuracy", "low", "high"]].mean(), 100 * runs.test_accuracy.std(ddof=1)
        ends = np.where(runs.size() == 1, interval(mean), deviation)
        ax.errorbar(100 * mean.test_accuracy, mean.index, xerr=ends, **style | bars, label=as_label(labels))
        ax.plot(100 * rows.test_accuracy, rows.y, ".", color=style["color"], alpha=0.3, markersize=points(4))
    rows_downwards(ax, methods)
    ax.set(xlabel="test accuracy (%)")


def _plot_tuned(ax: Axes, label: str, style: Keywords, rows: pd.DataFrame) -> None:
    """A layer curve of `fine_tuning` with its interval."""
    band: Keywords = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    ax.fill_between(rows.layer, 100 * rows.low, 100 * rows.high, **band)
    y = 100 * rows.test_accuracy
    line: Keywords = {"linewidth": points(1), "markersize": points(2.2)}
    ax.plot(rows.layer, y, **style, **line, label=as_label(label))
    mark_not_converged(ax, rows.layer, y, rows, style)
