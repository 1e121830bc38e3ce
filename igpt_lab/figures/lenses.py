"""What each layer says about the next pixel: nats over depth, and one image through depth."""

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.core.display import MODEL, control_names
from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import colour_map
from igpt_lab.figures.parts import check_columns, check_once, columns_of, head, layer_axis, suptitle
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import OTHERS, Figure, Keywords, inches, look, narrow, points

LENS_COLUMNS = ("layer", "kind", "nats", "low", "high", "n")
BASELINE_COLUMNS = ("baseline", "nats")
PROBE_COLUMNS = ("layer", "test_accuracy", "low", "high")
STRIP_COLUMNS = (
    "layer", "kind", "row", "column", "nats", "settled", "red", "green", "blue", "true_red", "true_green", "true_blue",
)  # fmt: skip
DASHES = ("--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))  # of level lines
LAYERS_SHOWN = 6  # of a strip, unless others are asked for


@plotting
def lens_curve(
    table: pd.DataFrame, probe: pd.DataFrame | None = None, *, marks: pd.DataFrame | None = None, title: str = ""
) -> matplotlib.figure.Figure:
    """How well each layer predicts the next pixel, in nats; below it, on the same axis of layers, a probe's accuracy.

    Bands are 95% intervals over images.

    Args:
        table: LENS_COLUMNS, as `logit_lens` and `tuned_lens` return them: a line for each `kind`, and a level line at
            what the last of these layers reaches.
        probe: PROBE_COLUMNS, as `probe_layers(...).table` has them; of a table with controls only the model's rows are
            drawn, and the layer that is `chosen` has a ring.
        marks: BASELINE_COLUMNS, as `pixel_baselines` returns them: a level line a row.
        title: Above the figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Figure.

    Raises:
        ValueError: A column that is missing, two rows of one layer and kind, or an unknown style.

    Example:
        >>> figure = lab.figures.lens_curve(lab.logit_lens(model, tokens), result.table)
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['surprise of the next\\npixel (nats)', 'test accuracy (%)']
    """
    check_columns(table, LENS_COLUMNS)
    check_once(table, ["layer", "kind"])
    count = 1 if probe is None else 2
    figure = Figure(figsize=inches(3.0 if probe is None else 4.2), layout="constrained")
    panels = figure.subplots(count, sharex=True, squeeze=False, height_ratios=[3, 2][:count])[:, 0]
    _plot_kinds(panels[0], table)
    _mark_levels(panels[0], table, marks)
    last = int(table.layer.max())
    if probe is not None:
        _plot_probe(panels[1], probe)
        last = max(last, int(probe.layer.max()))
    layer_axis(panels[-1], last)
    head(panels[0], title, f"{int(table.n.max()):,} images; bands: 95 % over images")
    lines = [line for ax in panels for line in ax.get_legend_handles_labels()[0]]
    columns = columns_of([str(line.get_label()) for line in lines], 1 if narrow() else 2)
    figure.legend(handles=lines, loc="outside lower center", ncols=columns)
    return figure


@plotting
def lens_strip(table: pd.DataFrame, *, layers: list[int] | None = None, title: str = "") -> matplotlib.figure.Figure:
    """One image through depth: a row for each layer with the colours that it expects and the nats of each true pixel.

    `table` (STRIP_COLUMNS) as `lens_strip` of `igpt_lab` returns it; `layers`: those shown, by default up to 6 from the
    first to the last. On the right the image itself, and the layer at which the most probable colour of each pixel
    settles: from there on it is the one of the last layer.
    """
    check_columns(table, STRIP_COLUMNS)
    check_once(table, ["layer", "row", "column"])
    shown = _shown(table, layers)
    figure = Figure(figsize=inches(0.55 + 0.95 * max(len(shown), 2)), layout="constrained")
    grid = figure.add_gridspec(max(len(shown), 2), 3)
    largest = max(1.0, float(np.ceil(table.nats[table.layer.isin(shown)].quantile(0.99))))
    right = []
    for place, layer in enumerate(shown):
        rows = table[table.layer == layer]
        ax = _picture(figure.add_subplot(grid[place, 0]), _colours(rows, ""))
        ax.set_ylabel(f"layer {layer}")
        right.append(figure.add_subplot(grid[place, 1]))
        _picture(right[-1], _plane(rows, "nats"), vmin=0, vmax=largest, cmap=colour_map("viridis"))
        if not place:
            ax.set_title(as_label(table.kind.iloc[0], 31))
            right[0].set_title("surprise")
    _bar(figure, right, "nats of the true pixel")
    rows, half = table[table.layer == shown[-1]], grid.nrows // 2
    _picture(figure.add_subplot(grid[:half, 2]), _colours(rows, "true_")).set_title("image")
    ax = figure.add_subplot(grid[half:, 2])
    _picture(ax, _plane(rows, "settled"), vmin=0, vmax=int(table.layer.max()), cmap="cividis").set_title("settles")
    _bar(figure, [ax], "from this layer on")
    suptitle(figure, title)
    return figure


def _plot_kinds(ax: Axes, table: pd.DataFrame) -> None:
    for kind, rows in table.groupby("kind", sort=False):
        rows, style = rows.sort_values("layer"), look(str(kind), others=OTHERS)
        ax.fill_between(rows.layer, rows.low, rows.high, color=style["color"], alpha=0.2, linewidth=0)
        ax.plot(rows.layer, rows.nats, label=as_label(kind), **style)
    ax.set(ylabel="surprise of the next\npixel (nats)")


def _mark_levels(ax: Axes, table: pd.DataFrame, marks: pd.DataFrame | None) -> None:
    """Level lines with their values in the legend: the baselines, and the last of the layers."""
    last = int(table.layer.max())
    levels = [(f"layer {last}", table.nats[table.layer == last].iloc[0])]
    if marks is not None:
        check_columns(marks, BASELINE_COLUMNS)
        levels += zip(marks.baseline, marks.nats, strict=True)
    for place, (name, nats) in enumerate(levels):
        line: Keywords = {"linestyle": DASHES[place % len(DASHES)], "linewidth": points(0.7)}
        ax.axhline(nats, color="black", label=f"{as_label(name)}: {nats:.2f}", **line)


def _plot_probe(ax: Axes, probe: pd.DataFrame) -> None:
    check_columns(probe, PROBE_COLUMNS)
    if "control" in probe:
        probe = probe[control_names(probe.control) == MODEL]
    rows, style = probe.sort_values("layer"), look(MODEL)
    ax.fill_between(rows.layer, 100 * rows.low, 100 * rows.high, color=style["color"], alpha=0.2, linewidth=0)
    ax.plot(rows.layer, 100 * rows.test_accuracy, label="class, linear probe", **style)
    if "chosen" in rows:
        chosen = rows[rows.chosen.astype(bool)]
        ring: Keywords = {"marker": "o", "markersize": points(9), "markerfacecolor": "none", "linestyle": ""}
        ax.plot(chosen.layer, 100 * chosen.test_accuracy, color="black", label="chosen layer", **ring)
    ax.set(ylabel="test accuracy (%)")


def _shown(table: pd.DataFrame, layers: list[int] | None) -> list[int]:
    there = sorted(set(table.layer.astype(int)))
    if layers is None:
        places = np.linspace(0, len(there) - 1, min(LAYERS_SHOWN, len(there))).round().astype(int)
        return [there[place] for place in places]
    if unknown := [layer for layer in layers if layer not in there]:
        raise ValueError(f"layer {unknown[0]} is not in the table; it has {there}")
    return list(layers)


def _plane(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column of the rows of one layer as an image (H, W)."""
    return rows.pivot(index="row", columns="column", values=name).to_numpy(float)


def _colours(rows: pd.DataFrame, prefix: str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    channels = np.stack([_plane(rows, f"{prefix}{name}") for name in ("red", "green", "blue")], axis=-1)
    if not np.isfinite(channels).all():
        raise ValueError("the table has no colours: its model has no palette; load one with its preprocessor_config")
    return channels.round().clip(0, 255).astype(np.uint8)


def _picture(ax: Axes, image: np.ndarray, **options) -> Axes:
    ax.imshow(image, interpolation="none", **options)
    ax.set(xticks=[], yticks=[], anchor="N")
    ax.spines[:].set_visible(False)
    return ax


def _bar(figure: Figure, panels: list[Axes], name: str) -> None:
    bar = figure.colorbar(panels[-1].images[0], ax=panels, location="bottom", label=name)
    bar.outline.set_linewidth(points(0.6))
