"""Tables -> matplotlib Axes of a plane: CKA of layers, confused classes, images by their features."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.figures.names import as_label
from igpt_lab.figures.options import colour_map, colour_of, plot
from igpt_lab.figures.parts import check_columns, colour_bar, columns_of, figure_of, frameless, head
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import Keywords, axes, narrow, points

CKA_COLUMNS = ("layer", "other_layer", "cka", "n", "batches")
FEATURE_COLUMNS = ("x", "y", "label")
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676", "#B8A800")


@plotting
def cka_map(
    table: pd.DataFrame, *, title: str = "", names: Sequence[str] = ("layer", "layer"), lowest: float = 0.0,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """CKA of each layer (upwards) with each other layer (to the right), as colours.

    They run from 0 to 1 by default, so that several maps can be compared.

    Args:
        table: A row per pair, CKA_COLUMNS, as `cka` returns them.
        title: Above the figure.
        names: Of the two axes, upwards first: say there which model's layers they are.
        lowest: CKA at which the scale of colours begins; where all layers are alike, 0.9 shows more.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, two rows of one pair, or an unknown style.

    Example:
        >>> ax = lab.figures.cka_map(lab.cka(test), names=["tiny, layer", "tiny, layer"])
        >>> ax.get_ylabel(), ax.images[0].get_array().shape
        ('tiny, layer', (4, 4))
    """
    check_columns(table, CKA_COLUMNS)
    if table.duplicated(["layer", "other_layer"]).any():
        raise ValueError("more than one row for the same pair of layers; expected one")
    grid = table.pivot(index="layer", columns="other_layer", values="cka")
    if not pd.api.types.is_numeric_dtype(table.layer):  # names come in the order of depth
        grid = grid.reindex(index=list(dict.fromkeys(table.layer)))
    if not pd.api.types.is_numeric_dtype(table.other_layer):
        grid = grid.reindex(columns=list(dict.fromkeys(table.other_layer)))
    ax = axes(3.5) if ax is None else ax
    image = ax.imshow(grid, origin="lower", vmin=lowest, vmax=1, cmap=colour_map("viridis"), interpolation="none")
    for axis, layers, name in (ax.yaxis, grid.index, names[0]), (ax.xaxis, grid.columns, names[1]):
        step = math.ceil(len(layers) / 14)
        axis.set_ticks(range(0, len(layers), step), list(map(as_label, layers[::step])))
        axis.set_label_text(as_label(name))
    frameless(ax)
    colour_bar(ax, image, "linear CKA (1: alike)", shrink=0.8)
    n, batches = (int(table[name].iloc[0]) for name in ("n", "batches"))
    note = f"unbiased, {n:,} images" + (f" in {batches:,} minibatches" if batches > 1 else "")
    head(ax, title, note, beside=12)
    return ax


@plotting
def confusion_matrix(table: pd.DataFrame, *, title: str = "", note: str = "", ax: Axes | None = None) -> Axes:
    """Counts of test images, a row for each true class (downwards), a column for each predicted one, as shares of rows.

    Args:
        table: Square, whole numbers, the same classes in rows and columns, as `Classified.confusion` returns it.
        title: Above the figure.
        note: Below the title, in place of the share on the diagonal.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Other classes in rows than in columns, or an unknown style.

    Example:
        >>> counts = pd.DataFrame([[8, 2], [1, 9]], index=["cat", "dog"], columns=["cat", "dog"])
        >>> ax = lab.figures.confusion_matrix(counts)
        >>> [text.get_text() for text in ax.texts]
        ['8', '2', '1', '9', '85.0 % of 20 test images on the diagonal']
    """
    check_columns(table, ())
    if list(table.index) != list(table.columns):
        raise ValueError(f"rows {list(table.index)}, columns {list(table.columns)}; expected the same classes")
    counts = table.to_numpy(float)
    ax = axes(3.4) if ax is None else ax
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, vmin=0, vmax=1, cmap=colour_map("Blues"), interpolation="none")
    if len(table) <= 20:
        _write_counts(ax, counts.astype(int), shares)
    step = math.ceil(len(table) / 24)
    ax.set_xticks(range(0, len(table), step), list(map(as_label, table.columns[::step])), rotation=90)
    ax.set_yticks(range(0, len(table), step), list(map(as_label, table.index[::step])))
    ax.set(xlabel="predicted class", ylabel="true class")
    frameless(ax)
    right = np.trace(counts) / counts.sum()
    note = note or f"{100 * right:.1f} % of {int(counts.sum()):,} test images on the diagonal"
    head(ax, title, note, beside=10)
    return ax


@plotting
def feature_map(
    table: pd.DataFrame, *, names: Sequence[str], explained: Sequence[float], title: str = "", note: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Images as points on the plane that keeps most of their features' variance; each class has a colour and a marker.

    Args:
        table: A row per image, FEATURE_COLUMNS: `label`, `x`, `y`.
        names: Classes in the order in which they are plotted.
        explained: Shares of the variance along x and y, as fractions.
        title: Above the figure.
        note: Below the title.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: A column that is missing, shares of other than two axes, or an unknown style.

    Example:
        >>> plane = pd.DataFrame({"label": ["cat", "dog", "dog"], "x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.5]})
        >>> ax = lab.figures.feature_map(plane, names=["cat", "dog"], explained=[0.6, 0.3])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('60% of the variance', '30% of the variance')
    """
    check_columns(table, FEATURE_COLUMNS)
    ax = axes(3.4) if ax is None else ax
    for i, name in enumerate(names):
        rows = table[table.label == name]
        style: Keywords = {"color": colour_of(name) or CLASS_COLOURS[i % 8], "marker": "os^D"[(i + i // 8) % 4]}
        if len(rows):
            ax.scatter(
                rows.x, rows.y, s=points(3), linewidths=0, alpha=0.7, label=as_label(name), rasterized=True, **style
            )
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.set(**{f"{axis}label": f"{share:.0%} of the variance" for axis, share in zip("xy", explained, strict=True)})
    head(ax, title, note)
    if plot().ax is not None:
        ax.legend(markerscale=2)
    elif len(names) <= 32:
        columns = columns_of(map(as_label, names), 2 if narrow() else 4)
        figure_of(ax).legend(loc="outside lower center", ncols=columns, markerscale=2, columnspacing=1)
    return ax


def _write_counts(ax: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """The counts that are not 0 into their cells, in white where a cell is dark."""
    for (y, x), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[y, x] > 0.5 else "black"
            ax.text(x, y, count, ha="center", va="center", fontsize=points(5), color=color)
