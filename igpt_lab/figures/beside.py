"""Layer curves of several networks in one Axes, over relative depth.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label
from igpt_lab.figures.parts import TICK, by_depth, finish
from igpt_lab.figures.style import AMBER, LINE_STYLES, PURPLE, Keywords, points

NETWORK_STYLES = (LINE_STYLES[MODEL], PURPLE, AMBER, LINE_STYLES["random network"], LINE_STYLES["permuted labels"])


def is_of_several(table: pd.DataFrame) -> bool:
    """Has the table a column `model` with the rows of several networks?"""
    return "model" in table and table.model[table.control == MODEL].nunique() > 1


def plot_beside(table: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """A curve for each `model` with its interval and a ring on its chosen layer; of controls those of one layer."""
    own = table[table.control == MODEL]
    models = list(dict.fromkeys(own.model))
    if len(models) > len(NETWORK_STYLES):
        raise ValueError(f"{len(models)} models; expected at most {len(NETWORK_STYLES)}, which can be told apart")
    for model, style in zip(models, NETWORK_STYLES, strict=False):
        _plot_network(ax, str(model), style, own[own.model == model])
    others = table[table.control != MODEL].drop_duplicates(["control", "test_accuracy"])
    for name, rows in others.groupby("control", sort=False):
        if len(rows) == 1:
            style = LINE_STYLES.get(str(name), PURPLE) | {"marker": ""}
            ax.axhline(100 * rows.test_accuracy.iloc[0], **style, label=as_label(name))
    ax.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    ax.set(xlim=(-0.03, 1.03), xlabel="depth (share of the last layer)", ylabel="test accuracy (%)")
    counts = sorted({f"{int(n):,}" for n in own.n_test})
    return finish(
        ax, title, f"{' and '.join(counts)} test images; bands: 95 % over images; rings: chosen on validation"
    )


def _plot_network(ax: Axes, model: str, style: Keywords, rows: pd.DataFrame) -> None:
    """One network's curve over relative depth."""
    rows = by_depth(rows)[0].sort_values("layer")
    chosen = rows[rows.chosen.astype(bool)]
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} rows of {model} are marked as chosen; expected exactly one")
    last = max(rows.layer.max(), 1)
    y, low, high = (100 * rows[column] for column in ("test_accuracy", "low", "high"))
    ax.fill_between(rows.layer / last, low, high, color=style["color"], alpha=0.15, linewidth=0)
    line: Keywords = {"linewidth": points(1.2), "markersize": points(2.5)}
    best = f"layer {as_label(chosen.layer_name.iloc[0], TICK)}, {100 * chosen.test_accuracy.iloc[0]:.1f} %"
    ax.plot(rows.layer / last, y, **style, **line, label=f"{as_label(model, TICK)}: {best}")
    ring: Keywords = {"marker": "o", "markersize": points(8), "markerfacecolor": "none", "linestyle": ""}
    ax.plot(chosen.layer / last, 100 * chosen.test_accuracy, color=style["color"], **ring, zorder=5)
