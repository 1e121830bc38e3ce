"""Tables -> matplotlib Axes of lines: accuracy over depth and over labels, geometry over depth.

Accuracy is a fraction in a table and a percentage on an axis. Nothing here sees a model.
"""

import textwrap
from collections.abc import Iterable, Mapping

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from igpt_lab.core.chosen import about_choice, difference_in_words, with_new_names
from igpt_lab.core.display import MODEL, p_number
from igpt_lab.figures.controls import mark_chance, near_chance, over_draws, plot_control, plot_published
from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.networks import is_of_several, plot_several
from igpt_lab.figures.parts import (
    TICK,
    by_depth,
    checked,
    controls_of,
    finish,
    head,
    layer_axis,
    legend,
    mark_not_converged,
    room_below,
)
from igpt_lab.figures.placing import Beside
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import LINE_STYLES, OTHERS, Figure, Keywords, axes, inches, look, points

LAYER_COLUMNS = ("control", "layer", "test_accuracy", "low", "high", "chosen", "converged", "n_test")
FEW_COLUMNS = ("control", "k", "draw", "layer", "layer_rule", "test_accuracy", "converged")
ASIDE = 1.14  # from one line of `few_label_curve` to the next, so that their bars stand beside each other
COMPARISON = ("chosen_layer", "last_layer", "difference", "low", "high", "p_value")
MEASURES = {  # column, and its name on an axis; `_low` and `_high` beside it are its interval
    "intrinsic_dimension": "intrinsic dimension\n(directions)",
    "effective_rank": "effective rank\n(directions, log scale)",
    "label_overlap": "neighbours with\nthe same label (%)",
}


@plotting
def layer_curve(
    table: pd.DataFrame,
    *,
    title: str = "",
    comparison: Mapping | None = None,
    published: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Test accuracy over depth with its 95% interval, controls beside it, the chosen layer marked.

    A control of one row, such as "raw pixels", has no depth and becomes a level line. Several rows of a control for
    a layer, such as permutations or networks of other random weights, become their mean, with their range as the band.
    A column `n_classes` K puts a dashed line at chance, 1 / K; where that is far below, the axis is cut, and controls
    near chance are drawn there. Where the model's rows have a column `in_peak_set` (`peak_set`), a bar on the axis
    spans the layers in it. What is wrong with a poor choice is written below the title, where the model's rows have
    `validation_accuracy` and `n_validation`. Layers may have
    names, in the order of the rows. Where a column `model` names several networks, such as an encoder beside an
    ImageGPT, each is a curve over relative depth, as of `layer_curves`, with controls of one layer alone.

    Args:
        table: A row per control and layer, control "model" being the model, and LAYER_COLUMNS.
        title: Above the figure.
        comparison: COMPARISON, such as `compare_layers(...).to_dict()`, which is written below the title.
        published: Accuracies that others have published, such as `lab.published("s", "CIFAR-10", "linear probe")`: a
            line for each `source`, with `value` as a fraction at each `layer`; one without a layer is a level line,
            with `std` around it where there is one.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, other than one chosen layer of a model, a published layer that the model
            has not, or an unknown style.

    Example:
        >>> ax = lab.figures.layer_curve(result.table, comparison=lab.compare_layers(result).to_dict())
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('layer', 'test accuracy (%)')
    """
    table = checked(table, LAYER_COLUMNS)
    if is_of_several(table):
        if comparison or published is not None:
            name = "comparison" if comparison else "published"
            raise ValueError(f"{name}= is of one network, and the table has the rows of several; leave it out")
        return plot_several(table, title, axes(3.0) if ax is None else ax)
    table, names = by_depth(table)
    chance = 100 / table.n_classes.max() if "n_classes" in table and table.n_classes.gt(0).any() else None
    table = over_draws(table)
    main = table[table.control == MODEL]
    chosen, last = main[main.chosen.eq(True)], int(main.layer.max())
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} rows of control {MODEL!r} are marked as chosen; expected exactly one")
    ax = axes(3.0 + room_below(min(TICK, max(map(len, names), default=0)))) if ax is None else ax
    controls = table[table.control != MODEL]
    low, high = 100 * main.low.min(), 100 * main.high.max()
    is_far = chance is not None and high - chance > max(3 * (high - low), 10)  # a curve keeps a third of the height
    below = near_chance(controls, chance, low) if chance is not None and is_far else []
    shown = [name for name in controls_of(table) if name not in below]
    for name in [*shown, *below]:
        plot_control(ax, name, table[table.control == name].sort_values("layer"))
    _mark_chosen(ax, chosen.iloc[0])
    if "in_peak_set" in main and main.in_peak_set.eq(True).any():
        _mark_peak_set(ax, np.sort(main.layer[main.in_peak_set.eq(True)]))
    in_view = table[table.control.isin(shown)]
    low, high = 100 * in_view.low.min(), 100 * in_view.high.max()
    if published is not None:
        ends = plot_published(ax, published, last)
        low, high = min(low, ends[0]), max(high, ends[1])
    margin = 0.06 * (high - low or 1)
    ax.set_ylim(low - margin, high + margin)
    layer_axis(ax, last, names)
    ax.set(ylabel="test accuracy (%)")
    if chance is not None:
        mark_chance(ax, chance, table[table.control.isin(below)])
    rows = main.assign(layer=main.layer_name) if names else main
    notes = [_sentence(comparison, int(chosen.n_test.iloc[0])) if comparison else "", _choice_note(rows)]
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
        _plot_draws(ax, label, style, rows, aside=ASIDE ** (i - (len(lines) - 1) / 2))
    counts, draws = sorted(set(table.k.astype(int))), table.draw.nunique()
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{k:,}" for k in counts])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlim=(counts[0] / 1.5, counts[-1] * 1.5), xlabel="labels per class (log scale)", ylabel="test accuracy (%)")
    if "n_classes" in table and table.n_classes.gt(0).any():
        mark_chance(ax, 100 / table.n_classes.max(), table[:0])
    bars = "95 % interval over draws and test images together" if _has_both(table) else "standard deviation over draws"
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
    if "label_overlap" in measures and table.get("label_overlap_chance", pd.Series()).notna().any():
        level: Keywords = {"color": "black", "linestyle": "--", "linewidth": points(0.7), "zorder": 1.5}
        panels[measures.index("label_overlap")].axhline(100 * table.label_overlap_chance.max(), label="chance", **level)
    layer_axis(panels[-1], int(table.layer[table.control == MODEL].max()), names)
    head(panels[0], title, f"{int(table.n.iloc[0]):,} images; bands: 95 % over images")
    legend(panels[-1])
    return figure


def _mark_chosen(ax: Axes, row: pd.Series) -> None:
    """A ring around the chosen layer, with its number and accuracy in words."""
    ring: Keywords = {"marker": "o", "markersize": points(9), "markerfacecolor": "none", "markeredgecolor": "black"}
    ax.plot(row.layer, 100 * row.test_accuracy, linestyle="", label="chosen on validation", **ring, zorder=5)
    words = f"layer {as_label(row.layer_name, TICK)}: {100 * row.test_accuracy:.1f} %"
    ax.add_artist(Beside(words, (row.layer, 100 * row.test_accuracy), clear=points(4.5)))


def _mark_peak_set(ax: Axes, layers: np.ndarray) -> None:
    """A bar on the layer axis under the layers that may be the best; neighbours share one."""
    bar: Keywords = {"color": "black", "linewidth": points(3), "solid_capstyle": "butt", "clip_on": False, "zorder": 7}
    across = ax.get_xaxis_transform()
    for i, run in enumerate(np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)):
        label = "_" if i else "may be the best layer"
        ax.plot([run.min() - 0.4, run.max() + 0.4], [0, 0], label=label, transform=across, **bar)


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
    value = f"p {p_number(p, '= ')}"
    gain = difference_in_words(comparison)
    if "with the choice" in gain:  # two intervals, which need a line of their own
        gain = gain.replace(" points ", " points\n")
    return f"chosen layer {chosen} against last layer {last}: {gain},\n{value} (McNemar, {n_test:,} test images)"


def _choice_note(rows: pd.DataFrame) -> str:
    """What is wrong with a poor choice, in lines that fit; of a good one the layers within one standard error."""
    return textwrap.fill("".join(about_choice(rows)[-1:]), max(letters() - 10, 10))


def _few_label_lines(table: pd.DataFrame) -> Iterable[tuple[str, Keywords, pd.DataFrame]]:
    """Label, style and rows (one for each k and draw) of each line."""
    is_main, is_chosen = table.control == MODEL, table.layer_rule == "chosen"
    if (is_main & is_chosen).any():
        yield "chosen layer", look("chosen layer", 0), table[is_main & is_chosen]
    for layer, rows in table[is_main & ~is_chosen].groupby("layer"):
        name = f"layer {rows.layer_name.iloc[0]}"
        style = (
            look(name, 0, others=(LINE_STYLES["last layer"],))
            if layer == table.layer.max()
            else look(name, others=OTHERS)
        )
        yield name, style, rows
    for name, rows in table[~is_main].groupby("control"):
        chosen = is_chosen[rows.index]
        yield name, look(name, others=OTHERS), rows[chosen] if chosen.any() else rows


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
    ax.plot(mean.index, mean, label=as_label(label), **style, linewidth=points(0.8), markersize=points(3))
    mark_not_converged(ax, x, y, rows, style)


def _plot_measure(ax: Axes, name: str, measure: str, rows: pd.DataFrame) -> None:
    """One line of `geometry_curves`, of rows that have this measure."""
    rows, scale = rows[rows[measure].notna()], 100 if measure == "label_overlap" else 1
    style, weight = look(name, others=OTHERS), 2 if name == MODEL else 1
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
    label = as_label(rows.network.iloc[0] if name == MODEL else name)
    ax.plot(rows.layer, scale * rows[measure], **style | line, label=label)


def _scale_measure(ax: Axes, measure: str) -> None:
    ax.set_ylabel(MEASURES[measure])
    if measure == "effective_rank":  # pixels have many times that of a layer
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
