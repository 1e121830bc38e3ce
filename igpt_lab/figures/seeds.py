"""Runs of several seeds of pretraining -> a figure: curves over relative depth, and what differs between seeds.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.core.seeds import summarise_runs, summarise_seeds
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import check_apart, check_columns, columns_of, rows_downwards, stacked, suptitle
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Figure, Keywords, inches, look, narrow, points

RUN_COLUMNS = "family seed_of_pretraining control layer test_accuracy low high chosen drop drop_low drop_high".split()
GREY: Keywords = {"color": "#767676", "solid_capstyle": "butt"}
MEASURES = {"depth": "depth (%)", "height": "accuracy (%)", "drop": "drop (points)"}


@plotting
def seed_curves(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Accuracy over relative depth, a thin line for each seed of pretraining; below, what differs between them.

    `table` (RUN_COLUMNS) has a row for each run and layer, as `group_by_seed` returns it; controls are not plotted. A
    colour for each family: the mean over seeds is thick, and each seed's chosen layer ringed. Below, depth and height
    (accuracy) of the chosen layer, and its drop to the last one: dots are seeds, coloured bars the 95% t interval of
    their mean, grey bars the interval over test images of one seed, as `summarise_seeds` has them. All seeds share the
    test images, whose common noise is not in the coloured bars.
    """
    check_columns(table, RUN_COLUMNS)
    own = table[control_names(table.control) == MODEL]
    runs = summarise_runs(own)
    families = list(dict.fromkeys(runs.family))
    check_apart("families", families)
    heights = [2.3, 0.26 * len(families) + 1.0]
    figure = Figure(figsize=inches(sum(heights)), layout="constrained")
    upper, lower = stacked(figure, heights)
    curves, panels = upper.subplots(), lower.subplots(1, len(MEASURES), sharey=True)
    for family in families:
        _plot_family(curves, family, look(family), own[own.family == family])
    curves.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
    curves.set(xlim=(-0.03, 1.03), xlabel="depth (share of the last layer, %)", ylabel="test accuracy (%)")
    upper.legend(loc="outside lower center", ncols=columns_of(map(as_label, families), 2 if narrow() else 3))
    suptitle(upper, title)
    for ax, measure in zip(panels, MEASURES, strict=True):
        _plot_measure(ax, measure, runs, summarise_seeds(runs))
    rows_downwards(panels[0], families)
    lower.legend(handles=_handles(), loc="outside lower center", ncols=1 if narrow() else 2)
    return figure


def _plot_family(ax: Axes, family: str, style: Keywords, rows: pd.DataFrame) -> None:
    """A thin line for each seed with its chosen layer ringed, and their mean."""
    curves = rows.pivot(index="layer", columns="seed_of_pretraining", values="test_accuracy") * 100
    if curves.isna().any(axis=None):
        raise ValueError(f"{family}: its seeds have different layers; expected the same ones in each")
    depth = curves.index / max(curves.index.max(), 1)
    thin: Keywords = {"color": style["color"], "linewidth": points(0.5), "alpha": 0.7}
    ax.plot(depth, curves, **thin)
    ax.plot(depth, curves.mean(axis=1), **style, linewidth=points(1.4), markersize=points(2.2), label=as_label(family))
    chosen = rows[rows.chosen.eq(True)]
    ring: Keywords = {"markersize": points(5), "markerfacecolor": "none", "markeredgewidth": points(0.6)}
    places = chosen.layer / max(curves.index.max(), 1), 100 * chosen.test_accuracy
    ax.plot(*places, marker="o", linestyle="", color=style["color"], **ring, zorder=5)


def _plot_measure(ax: Axes, measure: str, runs: pd.DataFrame, summary: pd.DataFrame) -> None:
    """`measure` of each family in a row: seeds as dots, the t interval of their mean, and the interval over images."""
    for i, family in enumerate(summary.to_dict("records")):
        style = look(family["family"])
        seeds = 100 * runs[measure][runs.family == family["family"]]
        ax.plot(seeds, [i - 0.22] * len(seeds), ".", color=style["color"], markersize=points(4))
        mean, low, high = (100 * family[f"{measure}_{part}"] for part in ("mean", "low", "high"))
        bars: Keywords = {"marker": "|", "markersize": points(6), "elinewidth": points(1), "capsize": points(2)}
        if np.isfinite(low):
            ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], color=style["color"], linestyle="", **bars)
        ends = [100 * family.get(f"{measure}_images_{end}", np.nan) for end in ("low", "high")]
        ax.plot(ends, [i + 0.22] * 2, **GREY, linewidth=points(2))
    if measure == "drop":
        ax.axvline(0, color="black", linewidth=points(0.6), zorder=0)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    ax.set_xlabel(MEASURES[measure])


def _handles() -> list[Line2D]:
    """What the marks mean, for the legend."""
    ring: Keywords = {"marker": "o", "markerfacecolor": "none", "markersize": points(5), "linestyle": ""}
    return [
        Line2D([], [], color="black", label="chosen layer of a seed", **ring),
        Line2D([], [], color="black", label="a seed", marker=".", markersize=points(4), linestyle=""),
        Line2D([], [], color="black", label="mean, 95 % over seeds", marker="|", linewidth=points(1)),
        Line2D([], [], label="95 % over images", **GREY, linewidth=points(2)),
    ]
