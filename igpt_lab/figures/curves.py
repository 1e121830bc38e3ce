"""Tables -> matplotlib Axes: layer curves, few labels, CKA, geometry, protocols. Never sees a model.

Accuracy is a fraction in a table and a percentage on an axis.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import colormaps, patheffects, ticker, transforms
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.figures.style import AMBER, LOOKS, PURPLE, Figure, axes, drawing, inches, letters, narrow, points

LAYER_COLUMNS = ("control", "layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test")
FEW_COLUMNS = ("control", "k", "draw", "layer", "layer_rule", "test_accuracy", "converged")
CKA_COLUMNS = ("layer", "other_layer", "cka", "n", "batches")
MEASURES = {  # column, and its name on an axis; `_low` and `_high` beside it are its interval
    "intrinsic_dimension": "intrinsic dimension",
    "effective_rank": "effective rank",
    "label_overlap": "neighbours with\nthe same label (%)",
}
PROTOCOL_COLUMNS = "recipe alignment point scaling solver layer test_accuracy low high chosen converged n_test".split()
PROTOCOL_LOOKS = {
    ("standardised", "converged"): {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    ("standardised", "100 iterations"): {"color": "#56B4E9", "linestyle": "--", "marker": "s"},
    ("unscaled", "converged"): {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    ("unscaled", "100 iterations"): {"color": "#E69F00", "linestyle": "--", "marker": "v"},
}
PORT_LOOK = {"color": "#767676", "linestyle": (0, (1, 1)), "marker": "x"}
EFFECT_COLUMNS = ("factor", "a", "b", "others", "at", "difference", "low", "high")
EFFECT_LOOKS = {
    "chosen layer": {"color": "#0072B2", "marker": "o"},
    "last layer": {"color": "#D55E00", "marker": "s"},
    "drop": {"color": "#767676", "marker": "D"},
}
METHOD_COLUMNS = ("method", "labels", "draw", "test_accuracy", "low", "high")
DYNAMICS_COLUMNS = ("model", "step", "loss", "loss_error", "layer", "test_accuracy", "low", "high", "chosen")
COMPARED_COLUMNS = ("model", "control", "layer", "test_accuracy", "low", "high", "chosen")
LINE_LOOKS = (LOOKS[MODEL], LOOKS["raw pixels"], AMBER, PURPLE, LOOKS["random network"])
FEATURE_COLUMNS = ("x", "y", "label")
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676", "#B8A800")
COMPARISON = ("best_layer", "last_layer", "difference", "low", "high", "p_value")


@drawing
def layer_curve(
    table: pd.DataFrame, *, title: str = "", comparison: Mapping | None = None, ax: Axes | None = None
) -> Axes:
    """Test accuracy over depth with its 95% interval, controls beside it, the chosen layer marked.

    `table` has a row for each (control, layer), control "model" being the model, and LAYER_COLUMNS. 'raw pixels' has
    one row and becomes a level line. A control that would flatten the model's curve is stated in words at that edge.
    Where the model's rows have a column `in_peak_set` (`peak_set`), a bar on the axis spans the layers in it.
    `comparison` (COMPARISON, such as `compare_layers(...).to_dict()`) is written below the title.
    """
    table = _checked(table, LAYER_COLUMNS)
    main = table[table.control == MODEL]
    chosen, last = main[main.chosen.eq(True)], int(main.layer.max())
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} rows of control {MODEL!r} are marked as chosen; expected exactly one")
    ax = axes(3.0) if ax is None else ax
    shown, low, high = _in_view(table)
    for name in shown:
        _draw_layers(ax, name, table[table.control == name].sort_values("layer"))
    _mark_chosen(ax, chosen.iloc[0], last)
    if "in_peak_set" in main and main.in_peak_set.eq(True).any():
        _mark_peak_set(ax, np.sort(main.layer[main.in_peak_set.eq(True)]))
    far = [(name, rows) for name, rows in table.groupby("control") if name not in shown]
    _limit(ax, low, high, [_state(name, rows, low) for name, rows in far])
    ax.xaxis.set_major_locator(ticker.MultipleLocator(math.ceil((last + 1) / (12 if narrow() else 18))))
    ax.set(xlim=(-0.5, last + 0.5), xlabel="layer", ylabel="test accuracy (%)")
    return _finish(ax, title, _sentence(comparison, int(chosen.n_test.iloc[0])) if comparison else "")


@drawing
def few_label_curve(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Test accuracy over labels per class: mean and standard deviation over draws, each draw a faint dot.

    `table` has a row for each (control, k, draw, layer_rule, layer), control "model" being the model, k labels per
    class, and FEW_COLUMNS. Lines: the chosen layer, each fixed layer, and each control (its chosen layer where it has
    one).
    """
    table = _checked(table, FEW_COLUMNS)
    ax = axes(3.0) if ax is None else ax
    lines = list(_few_lines(table))
    for i, (label, look, rows) in enumerate(lines):
        _draw_draws(ax, label, look, rows, aside=1.05 ** (i - (len(lines) - 1) / 2))
    counts, draws = sorted(set(table.k.astype(int))), table.draw.nunique()
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{k:,}" for k in counts])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlim=(counts[0] / 1.4, counts[-1] * 1.4), xlabel="labels per class", ylabel="test accuracy (%)")
    note = f"mean and standard deviation over {draws} draws; dots are draws" if draws > 1 else "one draw"
    return _finish(ax, title, note)


@drawing
def cka_map(
    table: pd.DataFrame, *, title: str = "", names: Sequence[str] = ("layer", "layer"), ax: Axes | None = None
) -> Axes:
    """CKA of each layer (upwards) with each other layer (to the right), as colours.

    They run from the tenth below the smallest value to 1: where all layers are alike, a scale from 0 shows nothing.
    `table` has a row for each pair, and CKA_COLUMNS, as `cka` returns it. `names` of the two axes, upwards first: say
    there which model's layers they are.
    """
    _has(table, CKA_COLUMNS)
    if table.duplicated(["layer", "other_layer"]).any():
        raise ValueError("more than one row for the same pair of layers; expected one")
    grid = table.pivot(index="layer", columns="other_layer", values="cka")
    ax = axes(3.2) if ax is None else ax
    low = min(math.floor(10 * grid.min(axis=None)) / 10, 0.9)
    image = ax.imshow(grid, origin="lower", vmin=low, vmax=1, cmap="viridis", interpolation="none")
    for axis, layers, name in (ax.yaxis, grid.index, names[0]), (ax.xaxis, grid.columns, names[1]):
        step = math.ceil(len(layers) / 14)
        axis.set_ticks(range(0, len(layers), step), layers[::step])
        axis.set_label_text(name)
    ax.spines[:].set_visible(False)
    ax.get_figure(root=True).colorbar(image, ax=ax, label="linear CKA", shrink=0.8).outline.set_linewidth(points(0.6))
    n, batches = (int(table[name].iloc[0]) for name in ("n", "batches"))
    note = f"unbiased, {n:,} images" + (f" in {batches:,} minibatches" if batches > 1 else "")
    _head(ax, title, note, beside=12)
    return ax


@drawing
def geometry_curves(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Each of MEASURES that `table` has over depth, one above the other, with 95% intervals, controls beside the model.

    `table` has a row for each (control, layer), control "model" being the model, as `measure_layers` returns it. A
    control of one row, such as 'raw pixels', becomes a level line.
    """
    table = _checked(table, ("control", "layer", "n"))
    shown = [name for name in MEASURES if name in table and table[name].notna().any()]
    if not shown:
        raise ValueError(f"the table has none of {', '.join(MEASURES)}; it has {', '.join(table)}")
    figure = Figure(figsize=inches(0.7 + 1.5 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for ax, measure in zip(panels, shown, strict=True):
        for name in _controls(table):
            _draw_measure(ax, name, measure, table[table.control == name].sort_values("layer"))
        _scale_measure(ax, measure)
    last = int(table.layer[table.control == MODEL].max())
    panels[-1].xaxis.set_major_locator(ticker.MultipleLocator(math.ceil((last + 1) / (12 if narrow() else 18))))
    panels[-1].set(xlim=(-0.5, last + 0.5), xlabel="layer")
    _head(panels[0], title, f"{int(table.n.iloc[0]):,} images; bands: 95 % over images")
    _legend(panels[-1])
    return figure


@drawing
def protocol_curves(table: pd.DataFrame, effects: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Test accuracy over depth in every setting of a protocol, and below what each of its factors changes.

    `table` (PROTOCOL_COLUMNS) and `effects` (EFFECT_COLUMNS) as `ablate_protocol` returns them: a panel for each
    alignment and point, a line for each scaling and solver, hollow where a probe did not converge, the chosen layer
    ringed. The port's recipe is drawn in the panel that it resembles. Below: averages of the differences with 95%
    intervals, and as faint dots the pairs of settings that they are averages of.
    """
    _has(table, PROTOCOL_COLUMNS)
    _has(effects, EFFECT_COLUMNS)
    table, effects = table.assign(recipe=_words(table.recipe)), effects.assign(others=_words(effects.others))
    alignments, places = (table[table.recipe == ""][name].unique() for name in ("alignment", "point"))
    figure = Figure(figsize=inches(1.5 * len(alignments) + 2.5), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[1.5 * len(alignments) + 0.6, 1.9])
    panels = upper.subplots(len(alignments), len(places), sharex=True, sharey=True, squeeze=False)
    for ax, (alignment, point) in zip(panels.flat, itertools.product(alignments, places), strict=True):
        cell = table[(table.alignment == alignment) & (table.recipe == "")]
        _draw_settings(ax, cell[cell.point == point])
        ax.set_title(f"{alignment}, {point}", loc="left", fontweight="normal", pad=points(3))
    port = table[table.recipe == "port"]
    if len(port):
        _draw_setting(panels[-1, -1], "the port's recipe", PORT_LOOK, port)
    last = int(table.layer.max())
    panels[0, 0].xaxis.set_major_locator(ticker.MultipleLocator(max(1, math.ceil((last + 1) / 6))))
    for ax in panels[-1]:
        ax.set_xlabel("layer")
    upper.supylabel("test accuracy (%)", fontsize=points(7))
    handles = dict(zip(*reversed(panels[-1, -1].get_legend_handles_labels()), strict=True))
    upper.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 if narrow() else 2)
    upper.suptitle(title, x=0.01, ha="left", fontsize=points(8.4), fontweight="bold")
    _draw_effects(lower.add_subplot(), effects)
    return figure


@drawing
def training_dynamics(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Accuracy over the loss as training goes on, and the curve over depth as it forms: the paper's Figure 3.

    `table` (DYNAMICS_COLUMNS) as `probe_checkpoints` returns it. Of one model: its chosen layer and its last one over
    the loss, which falls to the right, and a curve for each checkpoint, dark lines last. Of several, joined: the chosen
    layer of each, and each one's last curve. Bars are 95% intervals over test images. Step 0, the network before
    training, whose loss is far from the others', and models without such a loss are not drawn over it.
    """
    _has(table, DYNAMICS_COLUMNS)
    lines, curves = _lines_of_dynamics(table)
    beside = letters() > 100
    figure = Figure(figsize=inches(2.2 if beside else 4.6), layout="constrained")
    over_loss, over_depth = figure.subplots(*((1, 2) if beside else (2, 1)))
    for (name, rows), look in zip(lines, LINE_LOOKS, strict=False):
        _draw_falling(over_loss, name, rows[(rows.step > 0) & rows.loss.notna()].sort_values("step"), look)
    over_loss.invert_xaxis()
    over_loss.xaxis.set_major_locator(ticker.MaxNLocator(5))
    for name, rows, look in curves:
        _draw_forming(over_depth, name, rows.sort_values("layer"), look)
    over_loss.set(xlabel="loss on the test images (nats per token)", ylabel="test accuracy (%)")
    over_depth.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    over_depth.set(xlim=(-0.5, table.layer.max() + 0.5), xlabel="layer", ylabel="test accuracy (%)")
    for ax in (over_loss, over_depth):
        ax.legend(fontsize=points(5.5), loc="best")
    figure.suptitle(title, x=0.01, ha="left", fontsize=points(8.4), fontweight="bold")
    return figure


@drawing
def model_comparison(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Models one below the other, in their order: chosen layer, last layer and controls, with 95% intervals.

    `table` (COMPARED_COLUMNS) has a row for each (model, control, layer), control "model" being the model itself, as
    `probe_models` returns it; of a control the chosen row is drawn.
    """
    _has(table, COMPARED_COLUMNS)
    table = table.assign(control=control_names(table.control))
    models = list(dict.fromkeys(table.model))
    own, chosen = table.control == MODEL, table.chosen.astype(bool)
    last = own & (table.layer == table.layer.where(own).groupby(table.model).transform("max"))
    drawn = {"chosen layer": (own & chosen, LOOKS[MODEL]), "last layer": (last, PURPLE)}
    controls = [name for name in dict.fromkeys(table.control) if name != MODEL]
    drawn |= {name: (chosen & (table.control == name), LOOKS.get(name, AMBER)) for name in controls}
    ax = axes(0.28 * len(models) + 1.2) if ax is None else ax
    for i, (name, (rows, look)) in enumerate(drawn.items()):
        rows, aside = table[rows], 0.6 * ((i + 0.5) / len(drawn) - 0.5)
        ends = 100 * np.array([rows.test_accuracy - rows.low, rows.high - rows.test_accuracy])
        style = {"linestyle": "", "markersize": points(3), "elinewidth": points(0.8), "capsize": points(1.5)}
        places = rows.model.map(models.index) + aside
        ax.errorbar(100 * rows.test_accuracy, places, xerr=ends, **look | style, label=name)
    ax.set_yticks(range(len(models)), models)
    ax.set(ylim=(len(models) - 0.5, -0.5), xlabel="test accuracy (%)")
    return _finish(ax, title, "")


@drawing
def confusion_matrix(table: pd.DataFrame, *, title: str = "", note: str = "", ax: Axes | None = None) -> Axes:
    """Counts of test images, a row for each true class (downwards), a column for each predicted one, as shares of rows.

    `table`: square, whole numbers, the same classes in rows and columns, as `Classified.confusion` returns it. `note`
    stands below the title in place of the share on the diagonal.
    """
    _has(table, ())
    if list(table.index) != list(table.columns):
        raise ValueError(f"rows {list(table.index)}, columns {list(table.columns)}; expected the same classes")
    counts, ax = table.to_numpy(float), axes(3.4) if ax is None else ax
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="none")
    for (y, x), count in np.ndenumerate(counts.astype(int)) if len(table) <= 20 else ():
        if count:
            color = "white" if shares[y, x] > 0.5 else "black"
            ax.text(x, y, count, ha="center", va="center", fontsize=points(5), color=color)
    step = math.ceil(len(table) / 24)
    ax.set_xticks(range(0, len(table), step), table.columns[::step], rotation=90)
    ax.set_yticks(range(0, len(table), step), table.index[::step])
    ax.set(xlabel="predicted", ylabel="true")
    ax.spines[:].set_visible(False)
    right = np.trace(counts) / counts.sum()
    note = note or f"{100 * right:.1f} % of {int(counts.sum()):,} test images on the diagonal"
    _head(ax, title, note, beside=10)
    return ax


@drawing
def feature_map(
    table: pd.DataFrame, *, names: Sequence[str], explained: Sequence[float], title: str = "", note: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Images as points on the plane that keeps most of their features' variance, a colour and a marker a class.

    `table` has a row for each image and FEATURE_COLUMNS, `label` being one of `names`, which are drawn in their order.
    `explained`: the shares of the variance along x and y.
    """
    _has(table, FEATURE_COLUMNS)
    ax = axes(3.4) if ax is None else ax
    for i, name in enumerate(names):
        rows, look = table[table.label == name], {"color": CLASS_COLOURS[i % 8], "marker": "os^D"[(i + i // 8) % 4]}
        if len(rows):
            ax.scatter(rows.x, rows.y, s=points(3), linewidths=0, alpha=0.7, label=name, rasterized=True, **look)
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.set(**{f"{axis}label": f"{share:.0%} of the variance" for axis, share in zip("xy", explained, strict=True)})
    _head(ax, title, note)
    if len(names) <= 32:
        columns = 2 if narrow() else 4
        ax.get_figure(root=True).legend(loc="outside lower center", ncols=columns, markerscale=2, columnspacing=1)
    return ax


@drawing
def fine_tuning(table: pd.DataFrame, curves: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Test accuracy of each method, full labels and few; below, layer curves before and after on one axis.

    `table` (METHOD_COLUMNS) has a row for each (method, labels, draw), drawn in its order: means over draws, single
    draws as faint dots, and 95% intervals over test images where there is one draw. `curves` is as for `layer_curve`,
    control "model" being the model before, each other control a model after.
    """
    _has(table, METHOD_COLUMNS)
    curves = curves.assign(control=control_names(curves.control))
    methods, labels = list(dict.fromkeys(table.method)), list(dict.fromkeys(table.labels))
    figure = Figure(figsize=inches(0.24 * len(methods) + 3.6), layout="constrained")
    parts = figure.subfigures(2, height_ratios=[0.24 * len(methods) + 1, 2.6])
    upper, lower = (part.subplots() for part in parts)
    for i, each in enumerate(labels):
        look = list(PROTOCOL_LOOKS.values())[2 * i % 4] | {"linestyle": ""}
        rows = table[table.labels == each]
        rows = rows.assign(y=rows.method.map(methods.index) + 0.15 * (2 * i - 1))
        mean = rows.groupby("y")[["test_accuracy", "low", "high"]].mean()
        lone = rows.groupby("y").size() == 1
        ends = [(mean.test_accuracy - mean.low).where(lone, 0), (mean.high - mean.test_accuracy).where(lone, 0)]
        style = {"elinewidth": points(0.8), "capsize": points(1.5), "markersize": points(3)}
        upper.errorbar(100 * mean.test_accuracy, mean.index, xerr=100 * np.array(ends), **look | style, label=each)
        upper.plot(100 * rows.test_accuracy, rows.y, ".", color=look["color"], alpha=0.3, markersize=points(4))
    upper.set_yticks(range(len(methods)), methods)
    upper.set(ylim=(len(methods) - 0.5, -0.5), xlabel="test accuracy (%)")
    parts[0].legend(loc="outside lower right", title="labels a class", ncols=len(labels), handlelength=1)
    parts[0].suptitle(title, x=0.01, ha="left", fontsize=points(8.4), fontweight="bold")
    for name, look in zip(_controls(curves), (LOOKS[MODEL], PURPLE, AMBER, LOOKS["random network"]), strict=False):
        rows = curves[curves.control == name].sort_values("layer")
        band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        lower.fill_between(rows.layer, 100 * rows.low, 100 * rows.high, **band)
        line = {"linewidth": points(1), "markersize": points(2.2)}
        lower.plot(rows.layer, 100 * rows.test_accuracy, **look, **line, label="before" if name == MODEL else name)
        _mark_failed(lower, rows.layer, 100 * rows.test_accuracy, rows, look)
    lower.set(xlabel="layer", ylabel="accuracy of a probe (%)")
    parts[1].legend(loc="outside lower center", ncols=2)
    return figure


def _has(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse what is no table, lacks one of `columns`, or has no rows."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"a {type(table).__name__} came; expected a pandas DataFrame with columns {', '.join(columns)}")
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table)) or 'no columns'}")
    if table.empty:
        raise ValueError(f"the table is empty; expected rows with {', '.join(columns)}")


def _words(column: pd.Series) -> pd.Series:
    """A column of names with '' for none: a csv file cannot tell '' from nothing."""
    return column.astype(object).fillna("")


def _controls(table: pd.DataFrame) -> list[str]:
    """The model and, in the order of the alphabet, its controls."""
    return [MODEL, *sorted({*table.control} - {MODEL})]


def _checked(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table, fit to draw: all `columns`, some rows, the model among the controls, accuracy a fraction."""
    _has(table, columns)
    table = table.assign(control=control_names(table.control))
    if MODEL not in set(table.control):
        raise ValueError(
            f"no row has control {MODEL!r} (the model itself); controls that came: {sorted(set(table.control))}"
        )
    for name in [name for name in ("test_accuracy", "low", "high") if name in columns]:
        if len(wrong := table[name][~table[name].between(0, 1)]):
            raise ValueError(f"{name} {wrong.iloc[0]} in row {wrong.index[0]}; expected a fraction from 0 to 1")
    return table


def _in_view(table: pd.DataFrame) -> tuple[list[str], float, float]:
    """What to draw, the model first, and its range in %: the model's curve keeps at least a third of the height."""
    ends = table.groupby("control").agg({"low": "min", "high": "max"}) * 100
    shown, (low, high) = [MODEL], ends.loc[MODEL]
    room, others = max(3 * (high - low), 10), ends.drop(MODEL)
    for name in np.maximum(low - others.low, others.high - high).sort_values(kind="stable").index:
        together = min(low, others.low[name]), max(high, others.high[name])
        if together[1] - together[0] <= room:
            shown, (low, high) = [*shown, name], together
    return shown, low, high


def _draw_layers(ax: Axes, name: str, rows: pd.DataFrame) -> None:
    look, weight = LOOKS.get(name, PURPLE), 2 if name == MODEL else 1
    x, y, low, high = rows.layer, *(100 * rows[each] for each in ("test_accuracy", "low", "high"))
    band = {"color": look["color"], "alpha": 0.12 * weight, "linewidth": 0}
    if name == "raw pixels" and len(rows) == 1:  # pixels have no layer: the same at every depth
        ax.axhspan(low.iloc[0], high.iloc[0], **band)
        ax.axhline(y.iloc[0], **look | {"marker": ""}, label=name + _doubt(rows))
        return
    ax.fill_between(x, low, high, **band, zorder=weight)
    label = "ImageGPT, 95 % interval" if name == MODEL else name
    ax.plot(
        x, y, **look, label=label, linewidth=points(0.7) * weight, markersize=points(1.8) * weight, zorder=1 + weight
    )
    _mark_failed(ax, x, y, rows, look)


def _mark_failed(ax: Axes, x: pd.Series, y: pd.Series, rows: pd.DataFrame, look: dict) -> None:
    """Open diamonds on the rows whose probe did not converge, named once in the legend."""
    failed = ~rows.converged.astype(bool)
    if failed.any():
        label = ("_" if "not converged" in ax.get_legend_handles_labels()[1] else "") + "not converged"
        edge = {"marker": "D", "markersize": points(5), "markerfacecolor": "white", "markeredgecolor": look["color"]}
        ax.plot(x[failed], y[failed], linestyle="", label=label, **edge, zorder=4)


def _mark_chosen(ax: Axes, row: pd.Series, last: int) -> None:
    ring = {"marker": "o", "markersize": points(9), "markerfacecolor": "none", "markeredgecolor": "black"}
    ax.plot(row.layer, 100 * row.test_accuracy, linestyle="", label="chosen on validation", **ring, zorder=5)
    side = "left" if row.layer < last / 8 else "right" if row.layer > last * 7 / 8 else "center"
    look = {"ha": side, "va": "top", "path_effects": [patheffects.withStroke(linewidth=points(2), foreground="white")]}
    place = {"xy": (row.layer, 100 * row.low), "xytext": (0, -points(5)), "textcoords": "offset points", "zorder": 6}
    ax.annotate(f"layer {row.layer:.0f}\n{100 * row.test_accuracy:.1f} %", **place, **look)


def _mark_peak_set(ax: Axes, layers: np.ndarray) -> None:
    """A bar on the layer axis under the layers that may be the best; neighbours share one."""
    bar = {"transform": ax.get_xaxis_transform(), "color": "black", "linewidth": points(3), "solid_capstyle": "butt"}
    for i, run in enumerate(np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)):
        label = "_" if i else "may be the best layer"
        ax.plot([run.min() - 0.4, run.max() + 0.4], [0, 0], label=label, clip_on=False, zorder=7, **bar)


def _doubt(rows: pd.DataFrame) -> str:
    return "" if rows.converged.all() else " (not converged)"


def _state(name: str, rows: pd.DataFrame, low: float) -> tuple[str, str, str]:
    """Side, words and colour for a control that is too far away to be drawn."""
    ends = sorted({f"{100 * value:.1f}" for value in (rows.test_accuracy.min(), rows.test_accuracy.max())}, key=float)
    side = "below" if 100 * rows.low.min() < low else "above"
    return side, f"{name}: {' to '.join(ends)} %{_doubt(rows)}", LOOKS.get(name, PURPLE)["color"]


def _limit(ax: Axes, low: float, high: float, notes: Sequence[tuple[str, str, str]]) -> None:
    """Show low to high, and state what lies beyond (side, words, colour) at that edge, in a strip of its own."""
    strip, counts, margin = 0.075, {"below": 0, "above": 0}, 0.06 * (high - low or 1)
    height = (high - low + 2 * margin) / (1 - strip * len(notes))
    for side, words, color in notes:
        edge, y, arrow = ("bottom", 0.02, "↓") if side == "below" else ("top", 0.98, "↑")
        y += strip * counts[side] * (1 if side == "below" else -1)
        look = {"ha": "right", "va": edge, "color": color, "transform": ax.transAxes}
        where = f" ({side} this axis)" if not narrow() else ""
        ax.text(0.99, y, f"{arrow} {words}{where}", **look)
        counts[side] += 1
    ax.set_ylim(low - margin - strip * height * counts["below"], high + margin + strip * height * counts["above"])


def _few_lines(table: pd.DataFrame) -> Iterable[tuple[str, dict, pd.DataFrame]]:
    """Label, look and rows (one for each k and draw) of each line."""
    is_main, is_chosen = table.control == MODEL, table.layer_rule == "chosen"
    if (is_main & is_chosen).any():
        yield "chosen layer", LOOKS[MODEL], table[is_main & is_chosen]
    for i, (layer, rows) in enumerate(table[is_main & ~is_chosen].groupby("layer")):
        yield f"layer {layer:.0f}", (PURPLE, AMBER)[i % 2], rows
    for name, rows in table[~is_main].groupby("control"):
        yield name, LOOKS.get(name, PURPLE), rows[is_chosen[rows.index]] if is_chosen[rows.index].any() else rows


def _draw_draws(ax: Axes, label: str, look: dict, rows: pd.DataFrame, aside: float) -> None:
    """One line; `aside` moves it a little, so that bars of different lines do not lie on one another."""
    if rows.duplicated(["k", "draw"]).any():
        raise ValueError(f"{label}: more than one row for the same k and draw; expected one")
    x, y = rows.k * aside, 100 * rows.test_accuracy
    mean, spread = y.groupby(x).mean(), y.groupby(x).std().fillna(0)
    ax.plot(x, y, linestyle="", marker=".", color=look["color"], alpha=0.3)
    ax.errorbar(mean.index, mean, spread, fmt="none", ecolor=look["color"], elinewidth=points(0.8), capsize=points(1.5))
    ax.plot(mean.index, mean, label=label, **look)
    _mark_failed(ax, x, y, rows, look)


def _draw_measure(ax: Axes, name: str, measure: str, rows: pd.DataFrame) -> None:
    """One line of `geometry_curves`, of rows that have this measure."""
    rows, scale = rows[rows[measure].notna()], 100 if measure == "label_overlap" else 1
    look, weight = LOOKS.get(name, PURPLE), 2 if name == MODEL else 1
    band, ends = {"color": look["color"], "alpha": 0.12 * weight, "linewidth": 0}, [f"{measure}_low", f"{measure}_high"]
    if len(rows) == 1 and name != MODEL:  # pixels have no layer: the same at every depth
        if set(ends) <= set(rows):
            ax.axhspan(*(scale * rows[ends].iloc[0]), **band)
        ax.axhline(scale * rows[measure].iloc[0], **look | {"marker": ""}, label=name)
        return
    if set(ends) <= set(rows):
        ax.fill_between(rows.layer, *(scale * rows[end] for end in ends), **band, zorder=weight)
    style = look | {"linewidth": points(0.7) * weight, "markersize": points(1.8) * weight}
    ax.plot(rows.layer, scale * rows[measure], **style, label="ImageGPT" if name == MODEL else name, zorder=1 + weight)


def _lines_of_dynamics(table: pd.DataFrame) -> tuple[list[tuple], list[tuple]]:
    """(name, rows) of the lines over the loss, and (name, rows, look) of those over depth."""
    models, chosen = list(dict.fromkeys(table.model)), table[table.chosen.astype(bool)]
    if len(models) > len(LINE_LOOKS):
        raise ValueError(f"{len(models)} models; expected at most {len(LINE_LOOKS)}, which can be told apart")
    if len(models) == 1:
        shades = colormaps["viridis_r"](np.linspace(0.1, 1, table.step.nunique()))
        steps = zip(table.groupby("step"), shades, strict=True)
        curves = [(f"step {step:,}", rows, {"color": shade, "marker": "o"}) for (step, rows), shade in steps]
        return [("chosen layer", chosen), ("last layer", table[table.layer == table.layer.max()])], curves
    last = table[table.step == table.groupby("model").step.transform("max")]
    curves = [(name, last[last.model == name], look) for name, look in zip(models, LINE_LOOKS, strict=False)]
    return [(name, chosen[chosen.model == name]) for name in models], curves


def _draw_falling(ax: Axes, name: str, rows: pd.DataFrame, look: dict) -> None:
    """A line of `training_dynamics` over the loss."""
    bars = 100 * np.array([rows.test_accuracy - rows.low, rows.high - rows.test_accuracy])
    style = {"elinewidth": points(0.8), "capsize": points(1.5), "label": name}
    ax.errorbar(rows.loss, 100 * rows.test_accuracy, bars, xerr=1.96 * rows.loss_error, **look, **style)


def _draw_forming(ax: Axes, name: str, rows: pd.DataFrame, look: dict) -> None:
    """A curve of `training_dynamics` over depth, its chosen layer ringed."""
    line = {"linewidth": points(1), "markersize": points(1.8), "label": name}
    ax.plot(rows.layer, 100 * rows.test_accuracy, **look, **line)
    best = rows[rows.chosen.astype(bool)]
    ring = {"markersize": points(6), "markerfacecolor": "none", "markeredgewidth": points(0.7), "linestyle": ""}
    ax.plot(best.layer, 100 * best.test_accuracy, marker="o", color=look["color"], **ring)


def _draw_settings(ax: Axes, rows: pd.DataFrame) -> None:
    """The lines of one panel of `protocol_curves`."""
    for (scaling, solver), look in PROTOCOL_LOOKS.items():
        line = rows[(rows.scaling == scaling) & (rows.solver == solver)]
        if len(line):
            _draw_setting(ax, f"{scaling}, {solver}", look, line)


def _draw_setting(ax: Axes, label: str, look: dict, rows: pd.DataFrame) -> None:
    """One line, its markers hollow where the probe did not converge, and the chosen layer with its interval."""
    rows = rows.sort_values("layer")
    y, converged = 100 * rows.test_accuracy, rows.converged.astype(bool)
    line, face = {"linewidth": points(0.8), "markersize": points(2.2), "markeredgewidth": points(0.5)}, look["color"]
    ax.plot(rows.layer, y, label=label, **look, **line, markerfacecolor=face if converged.all() else "white")
    if converged.any() and not converged.all():
        ax.plot(rows.layer[converged], y[converged], **look | {"linestyle": ""}, **line)
    best = rows[rows.chosen.astype(bool)].iloc[0]
    ends = [[100 * (best.test_accuracy - best.low)], [100 * (best.high - best.test_accuracy)]]
    ring = {"markersize": points(6), "markerfacecolor": "none", "markeredgewidth": points(0.7)}
    ring |= {"elinewidth": points(0.7), "capsize": points(1.5)}
    ax.errorbar(best.layer, 100 * best.test_accuracy, ends, marker="o", color=look["color"], **ring, zorder=5)


def _draw_effects(ax: Axes, effects: pd.DataFrame) -> None:
    """Differences between levels: averages with intervals, pairs of settings as faint dots."""
    names = list(dict.fromkeys(zip(effects.factor, effects.a, effects.b, strict=True)))
    for i, (factor, a, b) in enumerate(names):
        for j, (at, look) in enumerate(EFFECT_LOOKS.items()):
            rows = effects[(effects.factor == factor) & (effects.a == a) & (effects.b == b) & (effects["at"] == at)]
            whole, y = rows[rows.others.isin(["average", ""])].iloc[0], i + 0.26 * (j - 1)
            pairs = rows[~rows.others.isin(["average", ""])]
            ax.plot(100 * pairs.difference, [y] * len(pairs), ".", color=look["color"], alpha=0.3, markersize=points(3))
            ends = [[100 * (whole.difference - whole.low)], [100 * (whole.high - whole.difference)]]
            style = {"linestyle": "", "markersize": points(3), "elinewidth": points(0.8), "capsize": points(1.5)}
            ax.errorbar(100 * whole.difference, y, xerr=ends, **look, **style, label="_" if i else at)
    ax.axvline(0, color="black", linewidth=points(0.6), zorder=0)
    ax.set_yticks(range(len(names)), [f"{a} less {b}" for _, a, b in names])
    ax.set(
        ylim=(len(names) - 0.5, -0.5),
        xlabel="difference (points)" if narrow() else "difference of test accuracy (points)",
    )
    ax.get_figure(root=False).legend(
        loc="outside lower right", ncols=3, handlelength=1.5, columnspacing=1.5 if narrow() else None
    )


def _scale_measure(ax: Axes, measure: str) -> None:
    ax.set_ylabel(MEASURES[measure])
    if measure == "effective_rank":  # pixels have many times that of a layer
        ax.set_yscale("log")
        for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))


def _sentence(comparison: Mapping, n_test: int) -> str:
    """The paired test in words."""
    if missing := [name for name in COMPARISON if name not in comparison]:
        raise ValueError(f"comparison lacks {', '.join(missing)}; it has {', '.join(map(str, comparison))}")
    best, last, difference, low, high, p = (comparison[name] for name in COMPARISON)
    if best == last:
        return f"the chosen layer, {best}, is the last"
    gain = f"{100 * difference:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    value = "p < 1e-300" if p < 1e-300 else f"p = {p:.1g}".replace("e-0", "e-") if p < 0.001 else f"p = {p:.3f}"
    return f"best layer {best} against last layer {last}: {gain},\n{value} (McNemar, {n_test:,} test images)"


def _finish(ax: Axes, title: str, note: str) -> Axes:
    """Title, note and legend."""
    _head(ax, title, note)
    _legend(ax)
    return ax


def _head(ax: Axes, title: str, note: str, *, beside: int = 0) -> None:
    """Title, and the note below it; `beside`: letters' room that something to the right of the axes takes."""
    if narrow():
        room = letters() - 10 - beside
        title, note = textwrap.fill(title, int(0.75 * room)), textwrap.fill(note, room)
    ax.set_title(title, loc="left", pad=points(4 + 9 * len(note.splitlines())))
    ax.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, points(5)), textcoords="offset points")


def _legend(ax: Axes) -> None:
    """Below the axes at a distance in inches, where it covers no line."""
    down = transforms.ScaledTranslation(0, -points(0.38), ax.get_figure(root=True).dpi_scale_trans)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + down,
        ncols=4 if letters() > 100 else 2,
    )
