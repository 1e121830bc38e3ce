"""Tables -> figures that compare: models side by side, ways of fine-tuning.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import plot
from igpt_lab.figures.parts import (
    check_columns,
    columns_of,
    controls_of,
    figure_of,
    finish,
    interval,
    layer_axis,
    mark_not_converged,
    rows_downwards,
    stacked,
    suptitle,
)
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import OTHERS, Figure, Keywords, axes, inches, look, points

METHOD_COLUMNS = ("method", "labels", "draw", "test_accuracy", "low", "high")
COMPARED_COLUMNS = ("model", "control", "layer", "test_accuracy", "low", "high", "chosen")
LABEL_STYLES: tuple[Keywords, ...] = (  # all labels, few
    {"color": "#0072B2", "linestyle": "", "marker": "o"},
    {"color": "#882255", "linestyle": "", "marker": "^"},
)


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
    series = {"chosen layer": (own & chosen, look("chosen layer", 0)), "last layer": (last, look("last layer"))}
    controls = [name for name in dict.fromkeys(table.control) if name != MODEL]
    series |= {name: (chosen & (table.control == name), look(name, others=OTHERS)) for name in controls}
    below = 0.16 * len(series) if columns_of(map(as_label, series), 2) == 1 else 0  # a legend of long names
    ax = axes(0.28 * len(models) + 1.2 + below) if ax is None else ax
    bars: Keywords = {"linestyle": "", "markersize": points(3), "elinewidth": points(0.8), "capsize": points(1.5)}
    for i, (name, (shown, style)) in enumerate(series.items()):
        rows = table[shown]
        places = rows.model.map(models.index) + 0.6 * ((i + 0.5) / len(series) - 0.5)
        ax.errorbar(100 * rows.test_accuracy, places, xerr=interval(rows), **style | bars, label=as_label(name))
    rows_downwards(ax, models)
    ax.set(xlabel="test accuracy (%)")
    if plot().ax is None:  # names of models may leave little room above the axes
        suptitle(figure_of(ax), title)
        title = ""
    return finish(ax, title, "")


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
    upper.legend(loc="outside lower right", title="labels per class", ncols=labels, handlelength=1)
    suptitle(upper, title)
    for name in controls_of(curves):
        label, style = "before" if name == MODEL else name, look(name, others=OTHERS)
        _plot_tuned(depth, label, style, curves[curves.control == name].sort_values("layer"))
    layer_axis(depth, int(curves.layer.max()))
    depth.set(ylabel="test accuracy of a probe (%)")
    lower.legend(loc="outside lower center", ncols=columns_of(depth.get_legend_handles_labels()[1], 2))
    return figure


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
