"""Images -> matplotlib Axes: galleries in which a pixel of an image is whole pixels of the png. Never sees a model."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes

from igpt_lab.figures.names import as_label, letters
from igpt_lab.figures.plotting import plotting
from igpt_lab.figures.style import DPI, STYLES, Figure, FigureAxes, check_pixels, points

STRIP = 20  # png pixels above an image for a line of its title
LETTER = 12  # png pixels that a letter beside an image may take
ABOVE = 10  # and one above it


@plotting
def gallery(
    images: np.ndarray, *, columns: int = 8, scale: int = 4, titles: Sequence[str] | None = None, title: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Images in rows: one array, one Axes, no smoothing.

    Gaps are as wide as one pixel of an image. With many columns and a scale of 1 it is a contact sheet of thousands.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
        columns: Images in a row.
        scale: A pixel of an image becomes `scale` x `scale` pixels of the png.
        titles: One above each image, in lines of its width.
        title: Above all of them, such as which model they are from and which images it saw.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Images that are not uint8, other than one title for each, a figure of too many pixels, or an unknown
            style.

    Example:
        >>> ax = lab.figures.gallery(model.processor.decode(tokens[:12]), columns=6)
        >>> ax.images[0].get_array().shape  # pixels of the png
        (36, 116, 3)
    """
    images = _images(images, "images", 1)
    if titles is not None and (isinstance(titles, str) or len(titles) != len(images)):
        raise ValueError(f"titles {titles!r}; expected a list of {len(images)} strings, one for each image")
    width = images.shape[2] * scale
    words = [_in_lines(text, width) for text in titles or []]
    array, corners = _tile(images, min(columns, len(images)), scale, _strip(words))
    places = [(x + width / 2, y, text) for (y, x), text in zip(corners, words, strict=False)]
    return _show(array, places, title, ax)


@plotting
def completion_gallery(
    primes: np.ndarray, completions: np.ndarray, originals: np.ndarray, *, prime_rows: int, title: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """A row for each prime: what the model was given, what it drew, what it was.

    The rest of the prime is hatched, whatever it holds.

    Args:
        primes: uint8 (S, H, W) or (S, H, W, 3).
        completions: uint8 (S, n, H, W) or (S, n, H, W, 3).
        originals: As `primes`.
        prime_rows: Rows of pixels, from the top, that the model was given.
        title: Above all rows.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Images that are not uint8, of other shapes than each other's, `prime_rows` above their height, or an
            unknown style.

    Example:
        >>> drawn = lab.complete(model, tokens[:2], completions=3)
        >>> originals = model.processor.decode(tokens[:2])
        >>> completions = model.processor.decode(drawn.tokens.reshape(6, -1)).reshape(2, 3, 4, 4, 3)
        >>> ax = lab.figures.completion_gallery(originals, completions, originals, prime_rows=2)
        >>> [text.get_text() for text in ax.texts]
        ['prime', 'completions', 'original']
    """
    primes, originals = _images(primes, "primes", 1), _images(originals, "originals", 1)
    completions = _images(completions, "completions", 2)
    if not primes.shape == originals.shape == completions[:, 0].shape:
        shapes = f"{primes.shape}, {completions.shape}, {originals.shape}"
        raise ValueError(f"primes, completions, originals of shapes {shapes}; expected the same S, H and W")
    count, (height, width) = completions.shape[1], primes.shape[1:3]
    if not 0 <= prime_rows <= height:
        raise ValueError(f"prime_rows={prime_rows}; expected 0 to {height}, the height of the images")
    y, x = np.mgrid[:height, :width, :1][:2]
    masked = np.where(y < prime_rows, primes, np.where((y + x) % 4 == 0, 160, 215).astype(np.uint8))
    rows = np.concatenate([masked[:, None], completions, originals[:, None]], axis=1)
    scale = max(1, round(112 / width))  # wide enough for the headings
    array, _ = _tile(rows.reshape(-1, *rows.shape[2:]), count + 2, scale, 0)
    array = np.pad(array, ((STRIP, 0), (0, 0), (0, 0)), constant_values=255)
    places = (0, "prime"), ((count + 1) / 2, "completions" if count > 1 else "completion"), (count + 1, "original")
    step = (width + 1) * scale
    return _show(array, [(column * step + width * scale / 2, STRIP, text) for column, text in places], title, ax)


@plotting
def row_gallery(
    images: np.ndarray, *, labels: Sequence[str], scale: int | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Rows of images, each with its label on the left: a row for each temperature, for each model, for each snapshot.

    Args:
        images: uint8 (R, n, H, W) or (R, n, H, W, 3).
        labels: One for each of the R rows.
        scale: A pixel becomes `scale` x `scale` pixels of the png, by default as many as make an image about 64 wide.
        title: Above all rows.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Images that are not uint8, other than one label for each row, a figure of too many pixels, or an
            unknown style.

    Example:
        >>> rows = model.processor.decode(tokens[:6]).reshape(2, 3, 4, 4, 3)
        >>> ax = lab.figures.row_gallery(rows, labels=["first", "second"])
        >>> [text.get_text() for text in ax.texts]
        ['first', 'second']
    """
    images = _images(images, "images", 2)
    if isinstance(labels, str) or len(labels) != len(images):
        raise ValueError(f"labels {labels!r}; expected a list of {len(images)} strings, one for each row")
    count, (height, width) = images.shape[1], images.shape[2:4]
    scale = max(1, round(64 / width)) if scale is None else scale
    array, corners = _tile(images.reshape(-1, *images.shape[2:]), count, scale, 0)
    labels = list(map(as_label, labels))
    margin = LETTER * max(map(len, labels)) + LETTER
    ax = _show(np.pad(array, ((0, 0), (margin, 0), (0, 0)), constant_values=255), [], title, ax)
    for (y, _), label in zip(corners[::count], labels, strict=True):
        ax.text(margin - LETTER, y + height * scale / 2, label, ha="right", va="center", fontsize=points(6))
    return ax


@plotting
def neighbour_gallery(
    samples: np.ndarray, nearest: Mapping[str, np.ndarray], *, columns: int = 4, title: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Beside each sample the image nearest to it, by every measure: whether a model repeats what it saw.

    Args:
        samples: uint8 (S, H, W) or (S, H, W, 3).
        nearest: Name of a measure, such as "pixels" and "features", -> images of the same shape.
        columns: Samples with their neighbours in a row, under the names.
        title: Above all rows.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Images that are not uint8, or of other shapes than the samples, or an unknown style.

    Example:
        >>> samples, images = (model.processor.decode(rows) for rows in (tokens[:2], train_tokens[:2]))
        >>> ax = lab.figures.neighbour_gallery(samples, {"pixels": images}, columns=1)
        >>> [text.get_text() for text in ax.texts]
        ['sample', 'pixels']
    """
    sets = [_images(samples, "samples", 1), *(_images(near, name, 1) for name, near in nearest.items())]
    if any(images.shape != sets[0].shape for images in sets):
        raise ValueError(f"shapes {[images.shape for images in sets]}; expected the shape of the samples for all")
    scale = max(1, round(112 / sets[0].shape[2]))  # wide enough for the headings
    columns, width = min(columns, len(sets[0])), sets[0].shape[2] * scale
    gap = np.full((*sets[0].shape[:2], 1, 3), 255, np.uint8)  # a group ends in one, and the tiles add another
    groups = np.concatenate([part for images in sets for part in (images, gap)], axis=2)
    array, corners = _tile(groups, columns, scale, 0)
    names = [_in_lines(name, width) for name in ["sample", *nearest]]
    strip = _strip(names)
    array = np.pad(array, ((strip, 0), (0, 0), (0, 0)), constant_values=255)
    places = [(x + i * (width + scale) + width / 2, strip, name) for _, x in corners[:columns]
              for i, name in enumerate(names)]  # fmt: skip
    return _show(array[:, :-scale], places, title, ax)


@plotting
def surprise_gallery(
    images: np.ndarray, bits: np.ndarray, *, columns: int = 8, scale: int = 4, largest: float | None = None,
    title: str = "", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Under each image the surprise of its pixels, from dark to light.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
        bits: (N, H, W).
        columns: Images in a row.
        scale: A pixel of an image becomes `scale` x `scale` pixels of the png.
        largest: Bits at which the scale ends, by default the next whole number above 99% of the pixels; beyond it is as
            bright.
        title: Above all rows.
        ax: Axes to plot into, by default of a new figure.
        **options: Those of every figure, see `Options`.

    Returns:
        The Axes.

    Raises:
        ValueError: Images that are not uint8, bits of another shape, a figure of too many pixels, or an unknown style.

    Example:
        >>> images = model.processor.decode(tokens[:4])
        >>> ax = lab.figures.surprise_gallery(images, np.full((4, 4, 4), 3.0), columns=4)
        >>> [text.get_text() for text in ax.texts]
        ['3 bits', '0']
    """
    images, bits = _images(images, "images", 1), np.asarray(bits, float)
    if bits.shape != images.shape[:3]:
        raise ValueError(f"bits {bits.shape}; expected {images.shape[:3]}, one for each pixel of the images")
    largest = math.ceil(np.quantile(bits, 0.99)) or 1 if largest is None else largest
    maps = _heat(bits / largest)
    columns = min(columns, len(images))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    rows = [np.concatenate([pictures, blank]).reshape(-1, columns, *images.shape[1:]) for pictures in (images, maps)]
    array, _ = _tile(np.stack(rows, axis=1).reshape(-1, *images.shape[1:]), columns, scale, 0)
    height, width = array.shape[:2]
    label, right = f"{largest:g} bits", width + 2 * LETTER
    array = np.pad(array, ((0, 0), (0, (4 + len(label)) * LETTER), (0, 0)), constant_values=255)
    array[:, width + LETTER : right] = _heat(np.linspace(1, 0, height))[:, None]
    ax = _show(array, [], title, ax)
    for y, edge, text in ((0, "top", label), (height, "bottom", "0")):
        ax.text(right + LETTER / 2, y, text, ha="left", va=edge, fontsize=points(6))
    return ax


def _heat(values: np.ndarray) -> np.ndarray:
    """Numbers, 0 to 1 and beyond, as uint8 colours (..., 3) of a scale that prints well in grey."""
    return matplotlib.colormaps["inferno"](np.clip(values, 0, 1), bytes=True)[..., :3]


def _images(images: np.ndarray, name: str, leading: int) -> np.ndarray:
    """The same images with three colours; `leading` dimensions come before H and W."""
    images, axes = np.asarray(images), "N, H, W" if leading == 1 else "S, n, H, W"
    coloured = images.ndim == leading + 3 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not images.size or not (coloured or images.ndim == leading + 2):
        raise ValueError(f"{name}: {images.dtype} {images.shape}; expected uint8 ({axes}, 3) or ({axes}), not empty")
    return images if coloured else np.repeat(images[..., None], 3, axis=-1)


def _tile(images: np.ndarray, columns: int, scale: int, strip: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """uint8 (N, H, W, 3) -> one array with white gaps, and the (y, x) of each image in it; `strip` rows above each."""
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}; expected both at least 1")
    height, width = (side * scale for side in images.shape[1:3])
    down, right = height + scale + strip, width + scale
    corners = [(strip + i // columns * down, i % columns * right) for i in range(len(images))]
    check_pixels(columns * right, corners[-1][0] + height)
    array = np.full((corners[-1][0] + height, columns * right - scale, 3), 255, np.uint8)
    for image, (y, x) in zip(images, corners, strict=True):
        array[y : y + height, x : x + width] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return array, corners


def _in_lines(text: str, width: int) -> str:
    """A name in lines that fit above an image which is `width` pixels wide; beyond four they are left out."""
    return textwrap.fill(as_label(text), max(4, width // ABOVE), max_lines=4, placeholder="…")


def _strip(names: Sequence[str]) -> int:
    """Pixels above an image for its name."""
    lines = max([name.count("\n") + 1 for name in names], default=0)
    return STRIP * lines + (lines > 1) * STRIP // 2


def _show(array: np.ndarray, titles: Iterable[tuple[float, float, str]], title: str, ax: Axes | None) -> Axes:
    """The array, titles (x middle, y below, text), and a title in a strip of its own.

    In a figure of its own, on paper, a pixel of the array is one of the png, in a wider style 2 x 2.
    """
    rows, columns = array.shape[:2]
    title = textwrap.fill(as_label(title, 2 * letters()), max(12, int(columns / (1.1 * LETTER)))) if title else ""
    above = (STRIP + 6) * (title.count("\n") + 1) + 4 if title and ax is None else 0
    array = np.pad(array, ((above, 0), (0, 0), (0, 0)), constant_values=255)
    if ax is None:  # the hundredth keeps int(width / DPI * DPI) from losing a pixel
        times = 2 if rcParams["figure.figsize"][0] > STYLES["paper"].width else 1
        width, height = ((side * times + 0.01) / DPI for side in array.shape[1::-1])
        ax = Figure(figsize=(width, height)).add_axes((0, 0, 1, 1), axes_class=FigureAxes)
        if title:
            ax.text(0, -above + 4, title, va="top", fontsize=points(7), fontweight="bold")
    elif title:
        ax.set_title(title, loc="left")
    ax.imshow(array, interpolation="none", aspect="equal", extent=(-0.5, columns - 0.5, rows - 0.5, -above - 0.5))
    ax.set_axis_off()
    for x, y, text in titles:
        ax.text(x, y - 3, text, ha="center", va="bottom", fontsize=points(6))
    return ax
