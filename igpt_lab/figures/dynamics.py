"""Accuracy over the loss as training goes on, and the curve over depth as it forms.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.options import colour_map
from igpt_lab.figures.parts import check_apart, check_columns, interval, layer_axis, suptitle
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, Keywords, inches, look, points

DYNAMICS_COLUMNS = ("model", "step", "loss", "loss_error", "layer", "test_accuracy", "low", "high", "chosen")


@plotting
def training_dynamics(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Accuracy over the loss as training goes on, and the curve over depth as it forms: the paper's Figure 3.

    `table` (DYNAMICS_COLUMNS) as `probe_checkpoints` returns it. Of one model: its chosen layer and its last one over
    the loss, which falls to the right, and a curve for each checkpoint, dark lines last. Of several, joined: the chosen
    layer of each, and each one's last curve. Bars are 95% intervals over test images. Step 0, the network before
    training, whose loss is far from the others', and models without such a loss are not plotted over it.
    """
    check_columns(table, DYNAMICS_COLUMNS)
    lines, curves = _dynamics_lines(table)
    beside = letters() > 100
    figure = Figure(figsize=inches(2.2 if beside else 4.6), layout="constrained")
    over_loss, over_depth = figure.subplots(*((1, 2) if beside else (2, 1)))
    for name, rows, style in lines:
        _plot_over_loss(over_loss, name, style, rows[(rows.step > 0) & rows.loss.notna()].sort_values("step"))
    over_loss.invert_xaxis()
    over_loss.xaxis.set_major_locator(ticker.MaxNLocator(5))
    for name, rows, style in curves:
        _plot_over_depth(over_depth, name, style, rows.sort_values("layer"))
    over_loss.set(xlabel="loss on the test images (nats per token), falling", ylabel="test accuracy (%)")
    layer_axis(over_depth, int(table.layer.max()))
    over_depth.set(ylabel="test accuracy (%)")
    for ax in (over_loss, over_depth):
        ax.legend(fontsize=points(5.5), loc="best")
    suptitle(figure, title)
    return figure


def _dynamics_lines(table: pd.DataFrame) -> tuple[list[tuple], list[tuple]]:
    """Name, rows and style of the lines over the loss, and of those over depth."""
    models, chosen = list(dict.fromkeys(table.model)), table[table.chosen.astype(bool)]
    check_apart("models", models)
    if len(models) == 1:
        shades = colour_map("viridis_r")(np.linspace(0.1, 1, table.step.nunique()))
        steps = zip(table.groupby("step"), shades, strict=True)
        curves = [(f"step {step:,}", rows, {"color": shade, "marker": "o"}) for (step, rows), shade in steps]
        last = table[table.layer == table.layer.max()]
        return [("chosen layer", chosen, look("chosen layer", 0)), ("last layer", last, look("last layer"))], curves
    last = table[table.step == table.groupby("model").step.transform("max")]
    curves = [(name, last[last.model == name], look(name)) for name in models]
    return [(name, chosen[chosen.model == name], look(name)) for name in models], curves


def _plot_over_loss(ax: Axes, name: str, style: Keywords, rows: pd.DataFrame) -> None:
    """A line of `training_dynamics` over the loss."""
    bars: Keywords = {"elinewidth": points(0.8), "capsize": points(1.5), "label": as_label(name)}
    ax.errorbar(rows.loss, 100 * rows.test_accuracy, interval(rows), xerr=1.96 * rows.loss_error, **style, **bars)


def _plot_over_depth(ax: Axes, name: str, style: Keywords, rows: pd.DataFrame) -> None:
    """A curve of `training_dynamics` over depth, its chosen layer ringed."""
    line: Keywords = {"linewidth": points(1), "markersize": points(1.8), "label": as_label(name)}
    ax.plot(rows.layer, 100 * rows.test_accuracy, **style, **line)
    chosen = rows[rows.chosen.astype(bool)]
    ring: Keywords = {"markersize": points(6), "markerfacecolor": "none", "markeredgewidth": points(0.7)}
    ax.plot(chosen.layer, 100 * chosen.test_accuracy, marker="o", linestyle="", color=style["color"], **ring)
