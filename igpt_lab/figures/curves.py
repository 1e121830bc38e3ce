"""Tables -> matplotlib Axes of lines: accuracy over depth, over labels and over training, geometry over depth.

Accuracy is a fraction in a table and a percentage on an axis. Nothing here sees a model.
"""

import textwrap
from collections.abc import Iterable, Mapping

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import colormaps, patheffects, ticker
from matplotlib.axes import Axes

from igpt_lab.core.chosen import about_choice, difference_in_words, with_new_names
from igpt_lab.core.display import MODEL
from igpt_lab.figures.beside import is_of_several, plot_beside
from igpt_lab.figures.controls import mark_chance, near_chance, over_draws
from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.parts import (
    TICK,
    by_depth,
    check_columns,
    checked,
    controls_of,
    finish,
    head,
    interval,
    layer_axis,
    legend,
    limit,
    mark_not_converged,
    suptitle,
)
from igpt_lab.figures.style import AMBER, LINE_STYLES, PURPLE, Figure, Keywords, axes, inches, narrow, plotting, points

LAYER_COLUMNS = ("control", "layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test")
FEW_COLUMNS = ("control", "k", "draw", "layer", "layer_rule", "test_accuracy", "converged")
DYNAMICS_COLUMNS = ("model", "step", "loss", "loss_error", "layer", "test_accuracy", "low", "high", "chosen")
COMPARISON = ("chosen_layer", "last_layer", "difference", "low", "high", "p_value")
MEASURES = {  # column, and its name on an axis; `_low` and `_high` beside it are its interval
    "intrinsic_dimension": "intrinsic dimension",
    "effective_rank": "effective rank",
    "label_overlap": "neighbours with\nthe same label (%)",
}
DYNAMICS_STYLES = (LINE_STYLES[MODEL], LINE_STYLES["raw pixels"], AMBER, PURPLE, LINE_STYLES["random network"])


@plotting
def layer_curve(
    table: pd.DataFrame, *, title: str = "", comparison: Mapping | None = None, ax: Axes | None = None
) -> Axes:
    """Test accuracy over depth with its 95% interval, controls beside it, the chosen layer marked.

    "raw pixels", or a control whose name begins so, has one row and becomes a level line. Several rows of a control for
    a layer, such as permutations or networks of other random weights, become their mean, with their range as the band.
    A control that would flatten the model's curve is stated in words at that edge. A column `n_classes` K puts a dashed
    line at chance, 1 / K; where that is far below, the axis is cut, and controls near chance are drawn there. Where the
    model's rows have a column `in_peak_set` (`peak_set`), a bar on the axis spans the layers in it. What is wrong with
    a poor choice is written below the title, where the model's rows have `validation_accuracy` and `n_validation`.
    Layers may have names, in the order of the rows. Where a column `model` names several networks, such as an encoder
    beside an ImageGPT, each is a curve over relative depth, with controls of one layer alone.

    Args:
        table: A row per control and layer, control "model" being the model, and LAYER_COLUMNS.
        title: Above the figure.
        comparison: COMPARISON, such as `compare_layers(...).to_dict()`, which is written below the title.
        ax: Axes to plot into, by default of a new figure.
        style: "paper", "wide" or "talk".

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, other than one chosen layer of a model, or an unknown style.

    Example:
        >>> ax = lab.figures.layer_curve(result.table, comparison=lab.compare_layers(result).to_dict())
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('layer', 'test accuracy (%)')
    """
    table = checked(table, LAYER_COLUMNS)
    if is_of_several(table):
        if comparison:
            raise ValueError("comparison= is of one network, and the table has the rows of several; leave it out")
        return plot_beside(table, title, axes(3.0) if ax is None else ax)
    table, names = by_depth(table)
    chance = 100 / table.n_classes.max() if "n_classes" in table and table.n_classes.gt(0).any() else None
    table = over_draws(table)
    main = table[table.control == MODEL]
    chosen, last = main[main.chosen.eq(True)], int(main.layer.max())
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} rows of control {MODEL!r} are marked as chosen; expected exactly one")
    ax = axes(3.0) if ax is None else ax
    shown, low, high = _in_view(table)
    below = [] if chance is None else near_chance(table[~table.control.isin(shown)], chance, low)
    for name in [*shown, *below]:
        _plot_layers(ax, name, table[table.control == name].sort_values("layer"))
    _mark_chosen(ax, chosen.iloc[0], last)
    if "in_peak_set" in main and main.in_peak_set.eq(True).any():
        _mark_peak_set(ax, np.sort(main.layer[main.in_peak_set.eq(True)]))
    far = [(name, rows) for name, rows in table.groupby("control") if name not in [*shown, *below]]
    limit(ax, low, high, [_describe(name, rows, low) for name, rows in far])
    layer_axis(ax, last, names)
    ax.set(ylabel="test accuracy (%)")
    if chance is not None:
        mark_chance(ax, chance, table[table.control.isin(below)])
    notes = [_sentence(comparison, int(chosen.n_test.iloc[0])) if comparison else "", _choice_note(main)]
    return finish(ax, title, ";\n".join(filter(None, notes)))


@plotting
def few_label_curve(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Test accuracy over labels per class: mean over draws with its interval, each draw a faint dot.

    `table` has a row for each (control, k, draw, layer_rule, layer), control "model" being the model, k labels per
    class, and FEW_COLUMNS. Lines: the chosen layer, each fixed layer, and each control (its chosen layer where it has
    one). Bars: from `low_all` to `high_all`, the 95% interval over draws and test images together; in a table without
    them, as one of a single draw, the standard deviation over draws.
    """
    table, _ = by_depth(checked(table, FEW_COLUMNS))
    ax = axes(3.0) if ax is None else ax
    lines = list(_few_label_lines(table))
    for i, (label, style, rows) in enumerate(lines):
        _plot_draws(ax, label, style, rows, aside=1.05 ** (i - (len(lines) - 1) / 2))
    counts, draws = sorted(set(table.k.astype(int))), table.draw.nunique()
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{k:,}" for k in counts])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlim=(counts[0] / 1.4, counts[-1] * 1.4), xlabel="labels per class", ylabel="test accuracy (%)")
    bars = "95% interval over draws and test images together" if _has_both(table) else "standard deviation over draws"
    return finish(ax, title, f"mean of {draws} draws, which are the dots;\nbars: {bars}" if draws > 1 else "one draw")


@plotting
def geometry_curves(table: pd.DataFrame, *, title: str = "") -> matplotlib.figure.Figure:
    """Each of MEASURES that `table` has over depth, one above the other, with 95% intervals, controls beside the model.

    `table` has a row for each (control, layer), control "model" being the model, as `measure_layers` returns it. A
    control of one row, such as 'raw pixels', becomes a level line.
    """
    table, names = by_depth(checked(table, ("control", "layer", "n")))
    measures = [name for name in MEASURES if name in table and table[name].notna().any()]
    if not measures:
        raise ValueError(f"the table has none of {', '.join(MEASURES)}; it has {', '.join(table)}")
    figure = Figure(figsize=inches(0.7 + 1.5 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), sharex=True, squeeze=False)[:, 0]
    for ax, measure in zip(panels, measures, strict=True):
        for name in controls_of(table):
            _plot_measure(ax, name, measure, table[table.control == name].sort_values("layer"))
        _scale_measure(ax, measure)
    layer_axis(panels[-1], int(table.layer[table.control == MODEL].max()), names)
    head(panels[0], title, f"{int(table.n.iloc[0]):,} images; bands: 95 % over images")
    legend(panels[-1])
    return figure


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
    for (name, rows), style in zip(lines, DYNAMICS_STYLES, strict=False):
        _plot_over_loss(over_loss, name, style, rows[(rows.step > 0) & rows.loss.notna()].sort_values("step"))
    over_loss.invert_xaxis()
    over_loss.xaxis.set_major_locator(ticker.MaxNLocator(5))
    for name, rows, style in curves:
        _plot_over_depth(over_depth, name, style, rows.sort_values("layer"))
    over_loss.set(xlabel="loss on the test images (nats per token)", ylabel="test accuracy (%)")
    over_depth.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    over_depth.set(xlim=(-0.5, table.layer.max() + 0.5), xlabel="layer", ylabel="test accuracy (%)")
    for ax in (over_loss, over_depth):
        ax.legend(fontsize=points(5.5), loc="best")
    suptitle(figure, title)
    return figure


def _in_view(table: pd.DataFrame) -> tuple[list[str], float, float]:
    """The lines to plot, the model first, and their range in %: its curve keeps at least a third of the height."""
    ends = table.groupby("control").agg({"low": "min", "high": "max"}) * 100
    low, high = ends.loc[MODEL]
    shown, room, others = [MODEL], max(3 * (high - low), 10), ends.drop(MODEL)
    for name in np.maximum(low - others.low, others.high - high).sort_values(kind="stable").index:
        lower, higher = min(low, others.low[name]), max(high, others.high[name])
        if higher - lower <= room:
            shown.append(name)
            low, high = lower, higher
    return shown, low, high


def _plot_layers(ax: Axes, name: str, rows: pd.DataFrame) -> None:
    """The line of the model or of a control over depth, with its interval."""
    style, weight = LINE_STYLES.get(name, PURPLE), 2 if name == MODEL else 1
    y, low, high = (100 * rows[column] for column in ("test_accuracy", "low", "high"))
    band: Keywords = {"color": style["color"], "alpha": 0.12 * weight, "linewidth": 0}
    if name.startswith("raw pixels") and len(rows) == 1:  # pixels have no layer: the same at every depth
        ax.axhspan(low.iloc[0], high.iloc[0], **band)
        ax.axhline(y.iloc[0], **style | {"marker": ""}, label=as_label(name) + _doubt(rows))
        return
    ax.fill_between(rows.layer, low, high, **band, zorder=weight)
    label = "ImageGPT, 95 % interval" if name == MODEL else as_label(name)
    if (draws := int(rows.draws.max())) > 1:
        label += f" ({draws})" if narrow() else f", {draws} draws"
    line: Keywords = {"linewidth": points(0.7) * weight, "markersize": points(1.8) * weight, "zorder": 1 + weight}
    ax.plot(rows.layer, y, **style, label=label, **line)
    mark_not_converged(ax, rows.layer, y, rows, style)


def _mark_chosen(ax: Axes, row: pd.Series, last: int) -> None:
    """A ring around the chosen layer, with its number and accuracy in words."""
    ring: Keywords = {"marker": "o", "markersize": points(9), "markerfacecolor": "none", "markeredgecolor": "black"}
    ax.plot(row.layer, 100 * row.test_accuracy, linestyle="", label="chosen on validation", **ring, zorder=5)
    side = "left" if row.layer < last / 8 else "right" if row.layer > last * 7 / 8 else "center"
    words = f"layer {as_label(row.layer_name, TICK)}\n{100 * row.test_accuracy:.1f} %"
    text: Keywords = {"xytext": (0, -points(5)), "textcoords": "offset points", "ha": side, "va": "top", "zorder": 6}
    outline = [patheffects.withStroke(linewidth=points(2), foreground="white")]
    ax.annotate(words, (row.layer, 100 * row.low), **text, path_effects=outline)


def _mark_peak_set(ax: Axes, layers: np.ndarray) -> None:
    """A bar on the layer axis under the layers that may be the best; neighbours share one."""
    bar: Keywords = {"color": "black", "linewidth": points(3), "solid_capstyle": "butt", "clip_on": False, "zorder": 7}
    across = ax.get_xaxis_transform()
    for i, run in enumerate(np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)):
        label = "_" if i else "may be the best layer"
        ax.plot([run.min() - 0.4, run.max() + 0.4], [0, 0], label=label, transform=across, **bar)


def _doubt(rows: pd.DataFrame) -> str:
    return "" if rows.converged.all() else " (not converged)"


def _describe(name: str, rows: pd.DataFrame, low: float) -> tuple[str, str, str]:
    """Side, words and colour for a control that is too far away to be plotted."""
    ends = sorted({f"{100 * value:.1f}" for value in (rows.test_accuracy.min(), rows.test_accuracy.max())}, key=float)
    side = "below" if 100 * rows.low.min() < low else "above"
    return side, f"{as_label(name)}: {' to '.join(ends)} %{_doubt(rows)}", LINE_STYLES.get(name, PURPLE)["color"]


def _sentence(comparison: Mapping, n_test: int) -> str:
    """The paired test in words."""
    if not isinstance(comparison, Mapping):
        raise TypeError(
            f"comparison is a {type(comparison).__name__}; expected a dict, such as compare_layers(...).to_dict()"
        )
    comparison = with_new_names(comparison)
    missing = [name for name in COMPARISON if name not in comparison]
    if missing:
        raise ValueError(f"comparison lacks {', '.join(missing)}; it has {', '.join(map(str, comparison))}")
    chosen, last, p = (comparison[name] for name in ("chosen_layer", "last_layer", "p_value"))
    if chosen == last:
        return f"the chosen layer, {chosen}, is the last"
    value = "p < 1e-300" if p < 1e-300 else f"p = {p:.1g}".replace("e-0", "e-") if p < 0.001 else f"p = {p:.3f}"
    gain = difference_in_words(comparison)
    if "with the choice" in gain:  # two intervals, which need a line of their own
        gain = gain.replace(" points ", " points\n")
    return f"chosen layer {chosen} against last layer {last}: {gain},\n{value} (McNemar, {n_test:,} test images)"


def _choice_note(rows: pd.DataFrame) -> str:
    """What is wrong with a poor choice, in lines that fit; of a good one the layers within one standard error."""
    return textwrap.fill("".join(about_choice(rows)[-1:]), letters() - 10)


def _few_label_lines(table: pd.DataFrame) -> Iterable[tuple[str, Keywords, pd.DataFrame]]:
    """Label, style and rows (one for each k and draw) of each line."""
    is_main, is_chosen = table.control == MODEL, table.layer_rule == "chosen"
    if (is_main & is_chosen).any():
        yield "chosen layer", LINE_STYLES[MODEL], table[is_main & is_chosen]
    for i, (_, rows) in enumerate(table[is_main & ~is_chosen].groupby("layer")):
        yield f"layer {rows.layer_name.iloc[0]}", (PURPLE, AMBER)[i % 2], rows
    for name, rows in table[~is_main].groupby("control"):
        chosen = is_chosen[rows.index]
        yield name, LINE_STYLES.get(name, PURPLE), rows[chosen] if chosen.any() else rows


def _has_both(table: pd.DataFrame) -> bool:
    """Whether there is an interval over draws and test images together."""
    return {"low_all", "high_all"} <= set(table) and bool(table.low_all.notna().any())


def _plot_draws(ax: Axes, label: str, style: Keywords, rows: pd.DataFrame, aside: float) -> None:
    """One line; `aside` moves it a little, so that bars of different lines do not lie on one another."""
    if rows.duplicated(["k", "draw"]).any():
        raise ValueError(f"{label}: more than one row for the same k and draw; expected one")
    x, y = rows.k * aside, 100 * rows.test_accuracy
    mean, reach = y.groupby(x).mean(), y.groupby(x).std().fillna(0)
    if _has_both(rows):
        low, high = (100 * rows[end].groupby(x).first() for end in ("low_all", "high_all"))
        reach = np.maximum([mean - low, high - mean], 0)
    ax.plot(x, y, linestyle="", marker=".", color=style["color"], alpha=0.3)
    bars: Keywords = {"fmt": "none", "ecolor": style["color"], "elinewidth": points(0.8), "capsize": points(1.5)}
    ax.errorbar(mean.index, mean, reach, **bars)
    ax.plot(mean.index, mean, label=as_label(label), **style)
    mark_not_converged(ax, x, y, rows, style)


def _plot_measure(ax: Axes, name: str, measure: str, rows: pd.DataFrame) -> None:
    """One line of `geometry_curves`, of rows that have this measure."""
    rows, scale = rows[rows[measure].notna()], 100 if measure == "label_overlap" else 1
    style, weight = LINE_STYLES.get(name, PURPLE), 2 if name == MODEL else 1
    band: Keywords = {"color": style["color"], "alpha": 0.12 * weight, "linewidth": 0}
    ends = [f"{measure}_low", f"{measure}_high"]
    has_interval = set(ends) <= set(rows)
    if len(rows) == 1 and name != MODEL:  # pixels have no layer: the same at every depth
        if has_interval:
            ax.axhspan(*(scale * rows[ends].iloc[0]), **band)
        ax.axhline(scale * rows[measure].iloc[0], **style | {"marker": ""}, label=as_label(name))
        return
    if has_interval:
        ax.fill_between(rows.layer, *(scale * rows[end] for end in ends), **band, zorder=weight)
    line: Keywords = {"linewidth": points(0.7) * weight, "markersize": points(1.8) * weight, "zorder": 1 + weight}
    ax.plot(rows.layer, scale * rows[measure], **style | line, label="ImageGPT" if name == MODEL else as_label(name))


def _scale_measure(ax: Axes, measure: str) -> None:
    ax.set_ylabel(MEASURES[measure])
    if measure == "effective_rank":  # pixels have many times that of a layer
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))
        ax.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))


def _dynamics_lines(table: pd.DataFrame) -> tuple[list[tuple], list[tuple]]:
    """(name, rows) of the lines over the loss, and (name, rows, style) of those over depth."""
    models, chosen = list(dict.fromkeys(table.model)), table[table.chosen.astype(bool)]
    if len(models) > len(DYNAMICS_STYLES):
        raise ValueError(f"{len(models)} models; expected at most {len(DYNAMICS_STYLES)}, which can be told apart")
    if len(models) == 1:
        shades = colormaps["viridis_r"](np.linspace(0.1, 1, table.step.nunique()))
        steps = zip(table.groupby("step"), shades, strict=True)
        curves = [(f"step {step:,}", rows, {"color": shade, "marker": "o"}) for (step, rows), shade in steps]
        return [("chosen layer", chosen), ("last layer", table[table.layer == table.layer.max()])], curves
    last = table[table.step == table.groupby("model").step.transform("max")]
    curves = [(name, last[last.model == name], style) for name, style in zip(models, DYNAMICS_STYLES, strict=False)]
    return [(name, chosen[chosen.model == name]) for name in models], curves


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
