"""Images in memory: arrays, tensors, and whatever has a length and gives an image, or an image and its label.

An image set asks for encoded pictures. What is in memory becomes a binary PPM picture, a header and the RGB pixels,
when it is asked for: one image at a time is copied. A path becomes the bytes of its file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from igpt_lab.images.columns import BadItem, NoPicture
from igpt_lab.images.opening import first_line, formats, read_named

KINDS = "Pillow images, paths, arrays (H, W) or (H, W, C), tensors (C, H, W), or pairs of one of these and a label"
CHANNELS = (1, 3, 4)


def ppm(image: Image.Image) -> bytes:
    """A Pillow image of any mode as a binary PPM picture, see `to_rgb`."""
    from igpt_lab.images.processor.pixels import to_rgb  # with torch, which a reader of files does without

    rgb = to_rgb(image)
    return b"P6 %d %d 255\n" % rgb.size + rgb.tobytes()


class Pixels:
    """Images as one array (N, H, W), (N, H, W, C) or torch tensor (N, C, H, W), which is not copied."""

    files: Sequence[str]

    def __init__(self, array: Any):
        shape = tuple(array.shape)
        if len(shape) == 3 and shape[2] in CHANNELS and shape[1] != shape[2]:
            raise ValueError(
                f"an array {shape} may be one image, or {shape[0]} of {shape[1]} x {shape[2]}; give images[None]"
            )
        self.array = _channels_last(array)
        self.files = _Blank(len(self.array))
        check_pixels(self.array, "they are")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> bytes:
        return ppm(_picture(self.array[row]))


class Items:
    """Images of anything with `len` and `[i]`, such as a list, or a set of torchvision with pairs of image and label.

    `listed`: the labels that the items have, which are compared with those that come with the images; None where they
    are not looked at. One item is asked for at a time, as few sets may be asked by several threads.
    """

    def __init__(self, items: Any, listed: list | None = None):
        self.items = items
        self.listed = listed
        self._free = threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self._free:
            picture, label = self.pair(row)
            if self.listed is not None and label != self.listed[row]:
                raise NoPicture(
                    f"has the label {label!r}, and {self.listed[row]!r} in its list of labels; give labels="
                )
            return {"bytes": _encoded(picture), "path": _file_of(picture)}

    def pair(self, row: int) -> tuple[Any, Any]:
        """The picture of an item as it is, and its label or None."""
        try:
            item = self.items[row]
        except Exception as error:  # the user's own code
            raise BadItem(f"cannot be read: {type(error).__name__}: {first_line(error)}") from error
        if isinstance(item, tuple | list):
            if len(item) != 2:
                raise NoPicture(f"has {len(item)} parts; expected an image, or an image and its label")
            return item[0], plain_label(item[1])
        return item, None

    @cached_property
    def files(self) -> Sequence[str]:
        """The path of each; of an ImageFolder the paths that it lists."""
        samples = getattr(self.items, "samples", None)
        if isinstance(samples, list) and len(samples) == len(self) and isinstance(samples[0], tuple):
            return [str(sample[0]) for sample in samples]
        if isinstance(self.items, list | tuple):
            return [_file_of(self.pair(row)[0]) for row in range(len(self))]
        return _Blank(len(self))


class _Blank(Sequence):
    """So many empty file names."""

    def __init__(self, count: int):
        self.size = count

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: Any) -> str:
        return ""


def hold(source: Any) -> Pixels | Items:
    """The images of an array, a tensor or a sequence; ValueError or TypeError says what came and what was expected."""
    source = source.tolist() if _is_series(source) else source
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return Pixels(source)
    kind = type(source).__name__
    if kind == "DataLoader":
        raise TypeError("a DataLoader gives batches; expected its set: loader.dataset")
    if kind == "DataFrame":
        raise TypeError("a DataFrame; expected its column of paths, frame['path'], with labels=frame['label']")
    if isinstance(source, Iterator) or not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        advice = "; list(itertools.islice(it, 1000)) makes one of its first" if isinstance(source, Iterable) else ""
        raise TypeError(f"source is of type {kind}; expected a name, a path, an array, or what has a length{advice}")
    if not len(source):
        raise ValueError(f"{kind} of length 0 has no images; expected one or more")
    items = Items(source)
    try:
        items[0]
    except NoPicture as error:
        raise ValueError(f"{kind} of length {len(source):,}: item 0 {error}") from error
    return items


def listed_labels(items: Items) -> list | None:
    """The labels of all items, None where they have none: of a list `targets` or `labels` where there is one.

    Else each item is asked for once. Raises ValueError where some have a label and others none.
    """
    first = items.pair(0)[1]
    source = items.items
    if not isinstance(source, list | tuple):
        if first is None:
            return None
        for name in ("targets", "labels"):
            values = getattr(source, name, None)
            if values is None or getattr(source, "target_transform", None) is not None or len(values) != len(source):
                continue
            listed = [plain_label(value) for value in values]
            if listed[0] == first:
                return listed
    labels = [items.pair(row)[1] for row in range(len(items))]
    without = [row for row, label in enumerate(labels) if label is None]
    if without and len(without) < len(labels):
        raise ValueError(f"item {without[0]} has no label, and others have; give one to all, or to none")
    return None if without else labels


def plain_label(label: Any) -> Any:
    """A label as Python's own number or word; NoPicture for what is neither."""
    label = label.item() if hasattr(label, "item") and np.ndim(label) == 0 else label
    if label is None or isinstance(label, int | float | str):
        return label
    raise NoPicture(f"has a label of type {type(label).__name__}; expected a whole number or a word; or give labels=")


def names_of_classes(source: Any) -> tuple[str, ...]:
    """The attribute `classes` of a set, or of the set that it is a subset of: names in the order of their numbers."""
    while not hasattr(source, "classes") and hasattr(source, "dataset"):
        source = source.dataset
    names = getattr(source, "classes", None)
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and is_list and len(set(names)) == len(names) else ()


def name_of(source: Any) -> str:
    """A short name: that of the class, as cifar10 of torchvision's CIFAR10; "images" for lists and arrays."""
    while type(source).__name__ == "Subset" and hasattr(source, "dataset"):
        source = source.dataset
    plain = isinstance(source, list | tuple | np.ndarray) or _is_tensor(source) or _is_series(source)
    return "images" if plain else type(source).__name__.lower()


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "numpy")


def _is_series(value: Any) -> bool:
    """Is it a column of pandas, or an array of words? Both hold paths."""
    is_words = isinstance(value, np.ndarray) and value.dtype.kind in "UT" and value.ndim == 1
    is_column = type(value).__name__ in ("Series", "Index") and type(value).__module__.split(".")[0] == "pandas"
    return is_words or is_column


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor as an array, which on the CPU shares its memory."""
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    try:
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise NoPicture(f"a tensor that numpy cannot hold: {first_line(error)}") from error


def _channels_last(array: Any) -> np.ndarray:
    """(N, H, W[, C]) of an array, or of a tensor (N, C, H, W); ValueError for other shapes."""
    expected, hint = "an array (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels", ""
    if _is_tensor(array):
        expected = "a tensor (N, H, W) or (N, C, H, W) with 1, 3 or 4 channels"
        pixels = _numpy(array)
        pixels = np.moveaxis(pixels, 1, -1) if pixels.ndim == 4 else pixels
        wrong_order = pixels.ndim == 4 and pixels.shape[2] in CHANNELS
        hint = "; channels come second: images.permute(0, 3, 1, 2)" if wrong_order else ""
    else:
        pixels = np.asarray(array)
        wrong_order = pixels.ndim == 4 and pixels.shape[1] in CHANNELS
        hint = "; channels come last: images.transpose(0, 2, 3, 1)" if wrong_order else ""
    shape = tuple(array.shape)
    if pixels.dtype == object:
        raise ValueError(
            f"an array of objects {shape}; expected numbers: np.stack(list(images)), or a list for any sizes"
        )
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in CHANNELS):
        rows = "; images.reshape(-1, height, width) makes images of rows" if pixels.ndim == 2 else hint
        raise ValueError(f"images of shape {shape}; expected {expected}{rows}")
    if 0 in shape:
        raise ValueError(f"images of shape {shape}: there are none; expected one or more")
    return pixels


def check_pixels(pixels: np.ndarray, are: str = "it is") -> None:
    """ValueError for pixels of another type or range than uint8, uint16 or floats in [0, 1]."""
    expected = "expected uint8, uint16, or floats in [0, 1]"
    if pixels.dtype in (np.uint8, np.uint16) and not (pixels.dtype == np.uint16 and 0 < pixels.max() <= 255):
        return
    if pixels.dtype.kind not in "iuf":
        raise NoPicture(f"{pixels.dtype} pixels; {expected}")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and 0 <= low <= high <= 1:
        return
    advice = ""
    if pixels.dtype.kind == "f":
        advice = ": load them without normalisation" if low < 0 else ": divide by 255" if high <= 255 else ""
    elif 0 <= low <= high <= 255:
        advice = f": if {are} of 8 bits, images.astype('uint8')"
    raise NoPicture(f"{pixels.dtype} pixels from {low:g} to {high:g}; {expected}{advice}")


def _picture(pixels: np.ndarray) -> Image.Image:
    """An image of checked pixels (H, W) or (H, W, C)."""
    from igpt_lab.images.processor.pixels import from_16_bits

    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype.kind == "f":
        pixels = np.rint(np.asarray(pixels, np.float32) * 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = from_16_bits(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _encoded(picture: Any) -> bytes:
    """A picture of whatever kind as an encoded one; NoPicture for what is none."""
    if isinstance(picture, bytes):
        return picture
    try:
        if isinstance(picture, str | Path):
            return read_named(picture)
        if isinstance(picture, Image.Image):
            if picture.format not in (None, *formats()):  # Pillow starts programs for some of them
                raise ValueError(f"is of the format {picture.format}; expected {', '.join(formats())}")
            return ppm(picture)
        if isinstance(picture, np.ndarray) or _is_tensor(picture):
            pixels = _channels_last(picture[None])[0]
            check_pixels(pixels)
            return ppm(_picture(pixels))
    except (ValueError, OSError) as error:
        of = f"({picture}) " if isinstance(picture, str | Path) else ""
        raise NoPicture(f"{of}is no image that can be read: {getattr(error, 'strerror', None) or error}") from error
    raise NoPicture(f"is of type {type(picture).__name__}; expected {KINDS}")


def _file_of(picture: Any) -> str:
    if isinstance(picture, str | Path):
        return str(picture)
    name = getattr(picture, "filename", "")
    return name if isinstance(name, str) else ""


def label_array(labels: Any, count: int, title: str) -> pa.Array:
    """Labels of `count` images, (N,), as an Arrow array; ValueError, which begins with `title`, for another shape."""
    labels = _numpy(labels) if _is_tensor(labels) else labels
    if not hasattr(labels, "__len__") or isinstance(labels, str | bytes | Mapping):
        raise ValueError(f"{title}: labels are of type {type(labels).__name__}; expected a list or an array (N,)")
    shape: tuple[int, ...] = getattr(labels, "shape", (len(labels),))
    if len(shape) > 1:
        advice = ": labels.argmax(1)" if len(shape) == 2 and shape[1] > 1 else ""
        raise ValueError(f"{title}: labels of shape {tuple(shape)}; expected (N,), a class for each image{advice}")
    if len(labels) != count:
        raise ValueError(f"{title}: {len(labels):,} labels came for {count:,} images; expected one for each, in order")
    try:
        return pa.array([plain_label(label) for label in labels], from_pandas=True)
    except NoPicture as error:
        raise ValueError(f"{title}: an image {error}".removesuffix("; or give labels=")) from error
    except OverflowError as error:
        raise ValueError(f"{title}: a label has more than 64 bits; expected numbers of classes, or words") from error
    except pa.ArrowException as error:
        raise ValueError(f"{title}: labels of several types, numbers and words; expected one of them") from error
