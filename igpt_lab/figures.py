"""Tables and arrays -> matplotlib Axes -> files. Never sees a model; the same input gives the same bytes."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure

from igpt_lab.provenance import RunRecord, atomic_write, digest

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = {"": "#0072B2", "raw pixels": "#009E73", "random network": "#D55E00", "permuted labels": "#767676"}
SPARE = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.titlesize": 9, "legend.frameon": False, "legend.fontsize": 8}  # fmt: skip
FILES = {"svg.hashsalt": "igpt-lab", "svg.fonttype": "path", "pdf.fonttype": 42, "path.simplify": True}
METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}


class Figure(_Figure):
    """A figure that a notebook shows when it is the last thing in a cell, without pyplot's state."""

    def _repr_png_(self) -> bytes:
        return _bytes(self, "png", dpi=100)


def layer_curve(table: pd.DataFrame, *, title: str = "", comparison=None, ax: Axes | None = None) -> Axes:
    """Accuracy over depth from the rows of `probe_layers`: main curve (control ""), its controls, the chosen layer.

    Bands are the table's `low` and `high`; a crossed-out point did not converge. A control far below the curve is named
    with its accuracy instead of drawn, so that the curve can be read. `comparison`: what `compare_layers` gave.
    """
    _need(table, "control layer test_accuracy low high chosen converged n_test")
    ours = table[table.control == ""].sort_values("layer")
    if ours.empty:
        raise ValueError("no rows with control '' in the table: the curve itself is missing")
    with _style():
        ax = ax or _axes(6.0, 4.0)
        span = max(0.05, ours.high.max() - ours.low.min())
        for number, (control, rows) in enumerate(_controls(table)):
            colour = _colour(control, number)
            if rows.test_accuracy.max() < ours.low.min() - 2 * span:
                ax.plot([], [], color=colour, linestyle=":", label=f"{control}: {_range(rows.test_accuracy)} (below)")
            else:
                _layer_line(ax, rows, ours.layer, colour, control)
        _layer_line(ax, ours, ours.layer, COLOURS[""], "trained network")
        _mark_chosen(ax, ours)
        ax.set(xlabel="layer", ylabel="test accuracy (%)", xticks=_ticks(ours.layer))
        ax.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1.0))
        ax.set_title("\n".join(filter(None, [title, _comparison_line(comparison)])), pad=44)
    return ax


def few_label_curve(table: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy over labels a class from the rows of `probe_few_labels`: mean and standard deviation over draws.

    One line for the layer chosen inside the labels, one for each fixed layer, one for each control's chosen layer; each
    draw is a faint dot.
    """
    _need(table, "control k draw layer_rule layer test_accuracy")
    ours = table[table.control == ""]
    lines = [("chosen layer", ours[ours.layer_rule == "chosen"])]
    for layer, rows in ours[ours.layer_rule == "fixed"].groupby("layer"):
        lines.append((f"layer {layer}", rows))
    lines += [(control, rows[rows.layer_rule == "chosen"]) for control, rows in _controls(table)]
    with _style():
        ax = ax or _axes(6.0, 4.0)
        for number, (label, rows) in enumerate(lines):
            colour = COLOURS[""] if number == 0 else _colour(label, number - 1)
            shift = 1.03 ** (number - (len(lines) - 1) / 2)
            stats = rows.groupby("k").test_accuracy.agg(["mean", "std"])
            ax.plot(rows.k * shift, 100 * rows.test_accuracy, ".", color=colour, alpha=0.3, markersize=4)
            mean, spread = 100 * stats["mean"], 100 * stats["std"].fillna(0)
            style = {"marker": "o", "markersize": 4, "capsize": 2, "linestyle": "-" if number == 0 else "--"}
            ax.errorbar(stats.index * shift, mean, spread, color=colour, label=label, **style)
        ks = sorted(table.k.unique())
        ax.set_xscale("log")
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="labels per class", ylabel="test accuracy (%)", title=title)
        ax.legend(loc="lower right")
    return ax


def gallery(images: np.ndarray, *, columns: int = 8, scale: int = 4, title: str = "", ax: Axes | None = None) -> Axes:
    """uint8 (N, H, W) or (N, H, W, 3) as one picture, `scale` screen pixels a pixel, one white pixel between images."""
    images = _images(images)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    canvas = np.full((math.ceil(count / columns) * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return _picture(canvas, scale, title, ax)


def completion_gallery(
    primes: np.ndarray,
    completions: np.ndarray,
    originals: np.ndarray,
    *,
    prime_rows: int,
    scale: int = 4,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A row an image: prime (S, H, W, 3), masked from row `prime_rows` on; completions (S, n, H, W, 3); original."""
    primes, originals = _images(primes).copy(), _images(originals)
    completions = np.stack([_images(each) for each in completions])
    if not len(primes) == len(completions) == len(originals):
        counts = f"{len(primes)} primes, {len(completions)} completions and {len(originals)} originals"
        raise ValueError(f"{counts}; expected as many of each")
    primes[:, prime_rows:] = 210
    count, columns, width = len(primes), completions.shape[1] + 2, primes.shape[2]
    tiles = np.concatenate([primes[:, None], completions, originals[:, None]], axis=1)
    ax = gallery(tiles.reshape(count * columns, *primes.shape[1:]), columns=columns, scale=scale, title=title, ax=ax)
    middle = (completions.shape[1] + 2) / 2 * (width + 1)
    for x, text in ((width / 2, "given"), (middle, "completions"), ((columns - 0.5) * (width + 1), "original")):
        ax.text(x - 0.5, -1.5, text, ha="center", va="bottom", fontsize=8, fontfamily="DejaVu Sans")
    return ax


def save_figure(figure: Axes | _Figure, stem: str | Path, *, data: pd.DataFrame, record: RunRecord) -> list[Path]:
    """Write STEM.png, .pdf, .svg, .csv (`data`: what is drawn) and .json (how it was made); each whole or absent.

    The same figure, data and record give the same bytes, in any process.
    """
    figure = figure.figure if isinstance(figure, Axes) else figure
    stem = Path(stem)
    table = data.to_csv(index=False, lineterminator="\n")
    made = {**record.to_dict(), "csv_sha256": digest(table.encode())}
    files = {f".{kind}": _bytes(figure, kind, dpi=200) for kind in METADATA}
    files |= {".csv": table, ".json": json.dumps(made, indent=2, sort_keys=True) + "\n"}
    return [atomic_write(stem.with_name(stem.name + suffix), content) for suffix, content in files.items()]


def _bytes(figure: _Figure, kind: str, dpi: int) -> bytes:
    """The figure as a file's bytes, without dates, versions or random ids."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, **FILES}), _epoch():
        if figure.get_layout_engine() is not None:  # it is iterative: laid out once, so that a second file is the same
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=METADATA[kind])
    return buffer.getvalue()


@contextmanager
def _epoch() -> Iterator[None]:
    """Fonts inside a PDF carry the time; this is the standard way to fix it."""
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
        else:
            os.environ["SOURCE_DATE_EPOCH"] = before


def _style():
    return matplotlib.rc_context(STYLE)


def _axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def _layer_line(ax: Axes, rows: pd.DataFrame, layers: pd.Series, colour: str, label: str) -> None:
    """A curve with its band; a control with one row becomes a horizontal line across all layers."""
    if len(rows) == 1:
        rows = rows.loc[rows.index.repeat(2)].assign(layer=[layers.min(), layers.max()])
    ours = label == "trained network"
    style = {"marker": "o", "markersize": 4} if ours else {"linestyle": "--", "linewidth": 1.2}
    ax.fill_between(rows.layer, 100 * rows.low, 100 * rows.high, color=colour, alpha=0.18, linewidth=0)
    ax.plot(rows.layer, 100 * rows.test_accuracy, color=colour, label=label, **style)
    lost = rows[~rows.converged.astype(bool)]
    if len(lost):
        ax.plot(lost.layer, 100 * lost.test_accuracy, "x", color="black", label=f"{label}: not converged", markersize=7)


def _mark_chosen(ax: Axes, ours: pd.DataFrame) -> None:
    best = ours[ours.chosen.astype(bool)]
    label = f"chosen on validation: layer {best.layer.iloc[0]}" if len(best) else None
    ax.plot(best.layer, 100 * best.test_accuracy, "o", markersize=11, fillstyle="none", color="black", label=label)


def _controls(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    names = [name for name in table.control.unique() if name]
    return [(name, table[table.control == name]) for name in names]


def _colour(name: str, number: int) -> str:
    return COLOURS.get(name, SPARE[number % len(SPARE)])


def _range(values: pd.Series) -> str:
    low, high = (f"{100 * value:.0f}" for value in (values.min(), values.max()))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _ticks(layers: pd.Series) -> list[int]:
    step = max(1, math.ceil(len(layers) / 17))
    return list(layers)[::step]


def _comparison_line(comparison) -> str:
    if comparison is None:
        return ""
    each = comparison if isinstance(comparison, Mapping) else asdict(comparison) if is_dataclass(comparison) else {}
    low, high, difference = (100 * each[name] for name in ("low", "high", "difference"))
    return (
        f"layer {each['best_layer']} against layer {each['last_layer']}: {difference:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}], p = {each['p_value']:.2g}, {each['n_test']:,} test images"
    )


def _picture(canvas: np.ndarray, scale: int, title: str, ax: Axes | None) -> Axes:
    """One crisp image without axes, `scale` screen pixels (1/100 inch) a pixel."""
    with _style():
        ax = ax or _axes(canvas.shape[1] * scale / 100 + 0.1, canvas.shape[0] * scale / 100 + 0.3)
        ax.imshow(canvas, interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title)
    return ax


def _images(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3) -> (N, H, W, 3)."""
    images = np.asarray(images)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"expected images uint8 (N, H, W, 3), N above 0; these are {images.dtype} {images.shape}")
    return images


def _need(table: pd.DataFrame, columns: str) -> None:
    missing = [name for name in columns.split() if name not in table]
    if missing or table.empty:
        raise ValueError(f"the table has {len(table)} rows and lacks {missing}; expected rows with {columns.split()}")
