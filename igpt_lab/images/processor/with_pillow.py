"""The processor with Pillow: its arguments and files, and its steps from images to palette indices and back."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from igpt_lab.core import hub
from igpt_lab.core.values import check
from igpt_lab.images.palette import ColourTable, nearest_of
from igpt_lab.images.processor.pixels import LAYOUTS, covering, flat, read_pixels

CONFIG = "preprocessor_config.json"
LARGEST_SIDE = 4096  # pixels of an image that a file may ask for
DEFAULTS: dict[str, Any] = {
    "do_resize": True, "size": 256, "resample": Image.Resampling.BILINEAR, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5, "do_color_quantize": True,
    "crop": "squash",
}  # fmt: skip
KINDS = {  # of arguments in a file
    "clusters": "list[list[float]]", "resample": "int", "rescale_factor": "float", "crop": "str",
    "image_mean": "float | list[float]", "image_std": "float | list[float]",
}  # fmt: skip
QUANTISERS = {"clusters", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
Pixels = Any  # an array of NumPy here, a tensor in the class with torch, which inherits these methods


class Batch(dict):
    """What a processor returns, by name or as attributes: `batch["input_ids"]` is `batch.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}")
        return self[name]

    def to(self, device: str | torch.device) -> Batch:
        """The same with its tensors on `device`."""
        return Batch({name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self.items()})


class ImageGPTImageProcessorPil:
    """Images -> palette indices with Pillow's resize, and back; arguments, files and ids as transformers' class.

    `clusters`: the palette (V, 3), in [-1, 1] with the other arguments as they are. `size`: of the model's image in
    pixels, an int for a square or {"height", "width"}. `crop`: "squash" (default) resizes an image of another shape
    straight to `size`, as transformers does; "center", the paper's way, resizes its short side and keeps the centre.
    None means the default. Raises ValueError for what does not fit, in one line.
    """

    size: dict[str, int]
    resample: Image.Resampling
    do_resize: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    do_color_quantize: bool
    crop: str

    def __init__(
        self, clusters=None, size: int | dict | tuple | None = None, *, do_resize: bool | None = None,
        resample: int | None = None, do_rescale: bool | None = None, rescale_factor: float | None = None,
        do_normalize: bool | None = None, image_mean=None, image_std=None, do_color_quantize: bool | None = None,
        crop: str | None = None,
    ):  # fmt: skip
        arguments = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
        for name, value in (DEFAULTS | arguments).items():
            setattr(self, name, value)
        self.size = _size(self.size)
        self.resample = Image.Resampling(self.resample)
        self.rescale_factor = float(self.rescale_factor)
        self.image_mean = _three(self.image_mean, "image_mean")
        self.image_std = _three(self.image_std, "image_std")
        if self.do_normalize and 0 in self.image_std:
            raise ValueError(f"image_std is {self.image_std}; it divides, so expected no 0")
        if self.crop not in ("squash", "center"):
            raise ValueError(f"crop={self.crop!r}; expected 'squash' (as transformers) or 'center' (as the paper)")
        self._centres = None if clusters is None else _palette(clusters)
        if self._centres is not None and self.do_rescale:  # without, pixels may have any range
            self._check_range(self._centres)

    def _check_range(self, centres: np.ndarray) -> None:
        """ValueError for a palette of another range than that of scaled pixels: one colour would be nearest to all."""
        ends = np.multiply([[0], [255]], self.rescale_factor)
        if self.do_normalize:
            ends = (ends - self.image_mean) / self.image_std
        low, high = min(-1, ends.min()), max(1, ends.max())
        _check_within(centres, low, high)

    @property
    def clusters(self) -> np.ndarray | None:
        """The palette, float32 (V, 3)."""
        return None if self._centres is None else self._centres.astype(np.float32)

    @property
    def side(self) -> int:
        """Height and width of the model's image; ValueError where they differ."""
        height, width = self.size.values()
        if height != width:
            raise ValueError(f"images of {height} x {width} pixels are not square")
        return height

    @property
    def resampling(self) -> str:
        """The resize that made the tokens, for records of it."""
        return self.resample.name.lower()

    def arguments(self) -> dict:
        """What makes this processor again: `type(it)(**it.arguments())`."""
        return {"clusters": self._centres} | {name: getattr(self, name) for name in DEFAULTS}

    def __reduce__(self):  # without the table of colours
        return partial(type(self), **self.arguments()), ()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **changes) -> Self:
        """From a bundled name, a folder with `preprocessor_config.json` or a Hub name; `changes` are arguments.

        Old files and new ones, of either class. Raises CheckpointError, which names the file, for one that is broken.
        """
        file = hub.resolve(source, revision=revision, weights=False) / CONFIG
        saved = hub.read_json(file)
        values = {name: saved.get(name) for name in ("clusters", *DEFAULTS)} | changes
        if values["clusters"] is None and values["do_color_quantize"] is not False:
            raise hub.CheckpointError(f"{file} needs `clusters`, the palette (colours, 3)")
        try:
            for name in {"clusters", *DEFAULTS} - {"size"}:  # of which `_size` tells more
                check(name, saved.get(name), f"{KINDS.get(name, 'bool')} | None", -1e6, 1e6)
            if len({len(row) for row in saved.get("clusters") or ()}) > 1:
                raise ValueError("clusters has rows of several lengths; expected 3 numbers each")
            processor = cls(**values)
            for side, pixels in processor.size.items():
                check(f"size, the {side},", pixels, "int", 1, LARGEST_SIDE)
            return processor
        except ValueError as error:
            raise hub.CheckpointError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `preprocessor_config.json`, and return `folder`; transformers reads the file and ignores its `crop`."""
        values = self.arguments() | {"image_processor_type": "ImageGPTImageProcessor", "resample": int(self.resample)}
        values["clusters"] = None if self._centres is None else self._centres.astype(float).tolist()
        Path(folder).mkdir(parents=True, exist_ok=True)
        hub.write_json(Path(folder) / CONFIG, values)
        return Path(folder)

    def __call__(
        self, images, return_tensors: str | None = None, *, input_data_format: str | None = None,
        data_format: str | None = None, device: str | torch.device | None = None, **changes,
    ) -> Batch:  # fmt: skip
        """An image, an array of several, a (nested) list or an iterator -> {"input_ids": N x int64 (T,)}, raster order.

        With `do_color_quantize=False` {"pixel_values": N x (3, H, W)}, or N x (H, W, 3) with the `data_format`
        "channels_last". Without `return_tensors` a list, with "np" or "pt" one array or tensor. `changes` are arguments
        for this call only. Images are Pillow's (see `to_rgb`), or numpy arrays or torch tensors (H, W), (H, W, C),
        (C, H, W) or several of the latter two, C in 1, 3, 4 (RGBA); `input_data_format` says "channels_first" or
        "channels_last" where the shape does not tell. Pixels are integers in [0, 255], uint16, or floats in [0, 255],
        which with `do_rescale=False` are in [0, 1] if they are resized. Raises ValueError for others. `device` is for
        the class with torch. Of an iterator each image is resized before the next one is taken.
        """
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}; expected None, 'np' or 'pt'")
        if data_format not in (None, *LAYOUTS):
            raise ValueError(f"data_format={data_format!r}; expected 'channels_first' or 'channels_last'")
        processor = self._changed(changes) if changes else self
        groups = processor._process(images, input_data_format, device)
        name = "input_ids" if processor.do_color_quantize else "pixel_values"
        if name == "pixel_values" and data_format == "channels_last":
            groups = [group.swapaxes(1, 2).swapaxes(2, 3) for group in groups]
        if return_tensors is None:
            return Batch({name: [row for group in groups for row in group]})
        if len({group.shape[1:] for group in groups}) > 1:
            raise ValueError("images of several sizes make no single array; resize them, or pass return_tensors=None")
        together = self._concatenate(groups) if len(groups) > 1 else groups[0]
        if return_tensors == "np" and isinstance(together, torch.Tensor):
            together = together.numpy(force=True)
        return Batch({name: torch.as_tensor(together) if return_tensors == "pt" else together})

    preprocess = __call__

    def encode(self, images, **changes) -> np.ndarray:
        """Images as for a call -> int64 palette indices (N, T), raster order; arrays (N, H, W, 3) are channels last."""
        last = isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[-1] == 3
        changes = {"input_data_format": "channels_last" if last else None, "do_color_quantize": True} | changes
        return self(images, "np", **changes)["input_ids"]

    def resize(self, images) -> np.ndarray:
        """8-bit images as for a call -> uint8 (N, height, width, 3)."""
        batch = self(images, "np", do_resize=True, do_rescale=False, do_normalize=False, do_color_quantize=False)
        return np.moveaxis(batch["pixel_values"], 1, -1)

    def decode(self, tokens: np.ndarray | torch.Tensor) -> np.ndarray:
        """Palette indices (N, T) -> uint8 (N, height, width, 3), square where T is not that of `size`."""
        tokens = tokens.numpy(force=True) if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        centres = self._palette()
        _check_within(centres, -1, 1)
        height, width = self.size.values()
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}; expected integers (images, tokens per image)")
        if tokens.shape[1] != height * width:
            height = width = math.isqrt(tokens.shape[1])
            if not 0 < height**2 == tokens.shape[1]:
                raise ValueError(
                    f"{tokens.shape[1]} tokens per image make neither a square nor an image of {self.size}"
                )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(centres)):
            worst = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise ValueError(f"token {worst} does not lie in this palette of {len(centres)} colours")
        colours = np.rint(127.5 * (centres.astype(float) + 1)).clip(0, 255).astype(np.uint8)
        return colours[tokens].reshape(len(tokens), height, width, 3)

    def _changed(self, changes: dict) -> Self:
        """This processor with other arguments, and the same table of colours where they leave colours alone."""
        other = type(self)(**self.arguments() | changes)
        if self._centres is not None and not QUANTISERS & changes.keys():
            other._table = self._table
        return other

    def _palette(self) -> np.ndarray:
        if self._centres is None:
            raise ValueError("a palette is needed: give `clusters` (colours, 3), or pass do_color_quantize=False")
        return self._centres

    def _process(self, images: Any, layout: str | None, device: str | torch.device | None) -> list[Pixels]:
        """Palette indices (n, T) or pixel values (n, 3, H, W), in order, of as many images at once as can be."""
        held = () if isinstance(images, Iterator) else flat(images)
        device = device or next((image.device for image in held if isinstance(image, torch.Tensor)), "cpu")
        height, width = self.size.values()
        size = (height, width) if self.do_resize else None

        def fit(image: Any) -> Pixels:
            return self._fit(read_pixels(image, layout, rescale=self.do_rescale, size=size), device)

        groups = list(map(fit, flat(images)))  # a loop would hold an image while the next one is made
        if not groups:
            raise ValueError("no images; expected at least one")
        if len({(group.shape[1:], group.dtype) for group in groups}) == 1:
            groups = [self._concatenate(groups)] if len(groups) > 1 else groups
        return [self._ids(group) if self.do_color_quantize else self._pixel_values(group) for group in groups]

    def _fit(self, pixels: Image.Image | np.ndarray | torch.Tensor, device: str | torch.device) -> Pixels:
        """To `size`: (n, height, width, 3). Pillow resizes 8 bits, so floats are rounded to a 255th of their range."""
        if isinstance(pixels, Image.Image):
            return np.asarray(self._resized(pixels) if self.do_resize else pixels)[None]
        pixels = pixels.numpy(force=True) if isinstance(pixels, torch.Tensor) else pixels
        if not self.do_resize or pixels.shape[1:3] == tuple(self.size.values()):
            return pixels
        unit = pixels.dtype.kind == "f" and not self.do_rescale
        levels = np.ascontiguousarray(np.rint(pixels * (255 if unit else 1)).astype(np.uint8))
        resized = np.stack([np.asarray(self._resized(Image.fromarray(image))) for image in levels])
        return (resized / 255).astype(np.float32) if unit else resized

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.size.values()
        if image.size == (width, height):
            return image
        if self.crop == "squash":
            return image.resize((width, height), self.resample)
        down, across = covering(image.height, image.width, height, width)
        left, top = (across - width) // 2, (down - height) // 2
        return image.resize((across, down), self.resample).crop((left, top, left + width, top + height))

    def _concatenate(self, groups: list[Pixels]) -> Pixels:
        return np.concatenate(groups)

    def _scaled(self, pixels: Pixels) -> Pixels:
        """Rescaled and normalised (..., 3), rounded in the order in which transformers does."""
        if self.do_rescale:
            pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            pixels = pixels if pixels.dtype.kind == "f" else pixels.astype(np.float32)
            pixels = (pixels - np.array(self.image_mean, pixels.dtype)) / np.array(self.image_std, pixels.dtype)
        return pixels

    def _pixel_values(self, pixels: Pixels) -> Pixels:
        return np.moveaxis(self._scaled(pixels), -1, 1)

    def _ids(self, pixels: Pixels) -> Pixels:
        """(n, H, W, 3) -> int64 (n, T)."""
        if pixels.dtype == np.uint8:
            return self._table.of_levels(pixels)
        return self._table.of_points(self._scaled(pixels).reshape(-1, 3)).reshape(len(pixels), -1)

    @cached_property
    def _table(self) -> ColourTable:
        levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        return ColourTable(self._scaled(levels), self._palette(), nearest_of)


def _size(size: Any) -> dict[str, int]:
    """An int, {"height", "width"} or (height, width) -> {"height", "width"}."""
    if isinstance(size, dict) or hasattr(size, "height"):  # the latter: transformers' SizeDict
        pair = (size.get("height"), size.get("width"))
    else:
        pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = [n for n in pair if isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"size={reprlib.repr(size)}; expected pixels as an int, or as {{'height': ..., 'width': ...}}")
    return {"height": int(pair[0]), "width": int(pair[1])}


def _three(value: Any, name: str) -> tuple[float, float, float]:
    """One number for all channels, or one each."""
    if np.size(value) in (1, 3):
        red, green, blue = np.broadcast_to(np.asarray(value, float), 3).tolist()
        if np.isfinite([red, green, blue]).all():
            return red, green, blue
    raise ValueError(f"{name}={value!r}; expected a number, or one for each of 3 channels")


def _check_within(centres: np.ndarray, low: float, high: float) -> None:
    """ValueError for a palette that lies out of a range by more than rounding."""
    slack = (high - low) / 100
    if centres.min() < low - slack or centres.max() > high + slack:
        raise ValueError(
            f"a palette from {centres.min():g} to {centres.max():g}; expected {low:g} to {high:g}, "
            "where a level of 0 to 255 is level / 127.5 - 1"
        )


def _palette(clusters: Any) -> np.ndarray:
    """(V, 3) in float32 if it came so, else float64: the rounding in transformers depends on it."""
    array = clusters.numpy(force=True) if isinstance(clusters, torch.Tensor) else np.array(clusters)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a palette is (colours, 3), finite, in [-1, 1]; this one has shape {array.shape}")
    return array
