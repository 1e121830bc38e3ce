"""Images <-> tokens: resize, quantise to a palette, and back.

As in the paper (appendix of Chen et al., 2020) and its port: centres lie in [-1, 1], a pixel x in [0, 255] goes to the
centre nearest to x / 127.5 - 1 in squared Euclidean distance, and a centre c comes back as rint(127.5 (c + 1)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from igpt_lab.core import hub
from igpt_lab.images.palette import CHUNK, CONTESTED, ColourTable, nearest_of

CONFIG = "preprocessor_config.json"
DEFAULTS = {
    "do_resize": True, "size": 256, "resample": Image.Resampling.BILINEAR, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5, "do_color_quantize": True,
    "crop": "squash",
}  # fmt: skip
QUANTISERS = {"clusters", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
ORIENTATION = 0x0112  # the EXIF tag
LAYOUTS = {"channels_first": -3, "channels_last": -1}


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode -> mode RGB, upright.

    The camera's orientation is applied. Greys are repeated, 16-bit greys divided by 257 and rounded, palettes looked
    up, CMYK and others converted as Pillow does; transparency is laid over white. Raises ValueError for an animation or
    several pages (but not for the extra pictures in a photograph's MPO file), for floating-point pixels and for mode I
    with at most 255, whose ranges are unknown, and for an image without pixels.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"an image of {frames} frames; choose one: image.seek(number), then image.copy()")
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is empty")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save them with 8 or 16 bits")
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        greys = np.asarray(image)
        if image.mode == "I" and 0 < greys.max() <= 255:
            raise ValueError("mode I with pixels of at most 255: of 8 or of 16 bits? Convert the image to L or I;16")
        clear = image.info.get("transparency")  # the one grey, of 16 bits, that a PNG may declare transparent
        levels = _from_16_bits(greys)
        image = Image.fromarray(levels if clear is None else np.where(greys == clear, np.uint8(255), levels))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" and type(image) is Image.Image else image.convert("RGB")


class Batch(dict):
    """What a processor returns, by name or as attributes: `batch["input_ids"]` is `batch.input_ids`."""

    def __getattr__(self, name: str):
        if name not in self:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}")
        return self[name]

    def to(self, device: str | torch.device) -> Batch:
        """The same with its tensors on `device`."""
        return Batch({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()})


class ImageGPTImageProcessorPil:
    """Images -> palette indices with Pillow's resize, and back; arguments, files and ids as the port's class.

    `clusters`: the palette (V, 3), in [-1, 1] with the other arguments as they are. `size`: of the model's image in
    pixels, an int for a square or {"height", "width"}. `crop`: "squash" (default) resizes an image of another shape
    straight to `size`, as the port does; "center", the paper's way, resizes its short side and keeps the centre.
    None means the default. Raises ValueError for what does not fit, in one line.
    """

    def __init__(
        self, clusters=None, size: int | dict | None = None, *, do_resize: bool | None = None,
        resample: int | None = None, do_rescale: bool | None = None, rescale_factor: float | None = None,
        do_normalize: bool | None = None, image_mean=None, image_std=None, do_color_quantize: bool | None = None,
        crop: str | None = None,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
        for name, value in (DEFAULTS | given).items():
            setattr(self, name, value)
        self.size, self.resample = _size(self.size), Image.Resampling(self.resample)
        self.rescale_factor = float(self.rescale_factor)
        self.image_mean, self.image_std = _three(self.image_mean, "image_mean"), _three(self.image_std, "image_std")
        if self.do_normalize and 0 in self.image_std:
            raise ValueError(f"image_std is {self.image_std}; it divides, so expected no 0")
        if self.crop not in ("squash", "center"):
            raise ValueError(f"crop={self.crop!r}; expected 'squash' (as the port) or 'center' (as the paper)")
        self._centres = None if clusters is None else _palette(clusters)

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
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **changes):
        """From a bundled name, a folder with `preprocessor_config.json` or a Hub name; `changes` are arguments.

        Old files and new ones, of either class. Raises CheckpointError, which names the file, for one that is broken.
        """
        where = hub.resolve(source, revision=revision, weights=False) / CONFIG
        found = hub.read_json(where)
        values = {name: found.get(name) for name in ("clusters", *DEFAULTS)} | changes
        if values["clusters"] is None and values["do_color_quantize"] is not False:
            raise hub.CheckpointError(f"{where} needs `clusters`, the palette (colours, 3)")
        try:
            return cls(**values)
        except ValueError as error:
            raise hub.CheckpointError(f"{where}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `preprocessor_config.json` as the port reads it, with `crop`, which it ignores; returns the folder."""
        values = self.arguments() | {"image_processor_type": "ImageGPTImageProcessor", "resample": int(self.resample)}
        values["clusters"] = None if self._centres is None else self._centres.astype(float).tolist()
        Path(folder).mkdir(parents=True, exist_ok=True)
        hub.write_json(Path(folder) / CONFIG, values)
        return Path(folder)

    def __call__(
        self, images, return_tensors: str | None = None, *, input_data_format=None, data_format=None, device=None,
        **changes,
    ):  # fmt: skip
        """An image, an array of several or a (nested) list -> {"input_ids": N x int64 (T,)}, raster order.

        With `do_color_quantize=False` {"pixel_values": N x (3, H, W)}, or N x (H, W, 3) with the `data_format`
        "channels_last". Without `return_tensors` a list, with "np" or "pt" one array or tensor. `changes` are arguments
        for this call only. Images are Pillow's (see `to_rgb`), or numpy arrays or torch tensors (H, W), (H, W, C),
        (C, H, W) or several of the latter two, C in 1, 3, 4 (RGBA); `input_data_format` says "channels_first" or
        "channels_last" where the shape does not tell. Pixels are integers in [0, 255], uint16, or floats in [0, 255],
        which with `do_rescale=False` are in [0, 1] if they are resized. Raises ValueError for others. `device` is for
        the class with torch.
        """
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}; expected None, 'np' or 'pt'")
        if data_format not in (None, *LAYOUTS):
            raise ValueError(f"data_format={data_format!r}; expected 'channels_first' or 'channels_last'")
        processor = self._changed(changes) if changes else self
        found = processor._process(list(_flat(images)), input_data_format, device)
        name = "input_ids" if processor.do_color_quantize else "pixel_values"
        if name == "pixel_values" and data_format == "channels_last":
            found = [batch.swapaxes(1, 2).swapaxes(2, 3) for batch in found]
        if return_tensors is None:
            return Batch({name: [row for batch in found for row in batch]})
        if len({batch.shape[1:] for batch in found}) > 1:
            raise ValueError("images of several sizes make no single array; resize them, or pass return_tensors=None")
        together = self._concatenate(found) if len(found) > 1 else found[0]
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
        raw = {"do_resize": True, "do_rescale": False, "do_normalize": False, "do_color_quantize": False}
        return np.moveaxis(self(images, "np", **raw)["pixel_values"], 1, -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Palette indices (N, T) -> uint8 (N, height, width, 3), square where T is not that of `size`."""
        tokens = tokens.numpy(force=True) if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        centres, (height, width) = self._palette(), self.size.values()
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}; expected integers (images, tokens an image)")
        if tokens.shape[1] != height * width:
            height = width = math.isqrt(tokens.shape[1])
            if not 0 < height**2 == tokens.shape[1]:
                raise ValueError(f"{tokens.shape[1]} tokens make no square, nor an image of {self.size}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(centres)):
            worst = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise ValueError(f"token {worst} does not lie in this palette of {len(centres)} colours")
        colours = np.rint(127.5 * (centres.astype(float) + 1)).clip(0, 255).astype(np.uint8)
        return colours[tokens].reshape(len(tokens), height, width, 3)

    def _changed(self, changes: dict):
        """This processor with other arguments, and the same table of colours where they leave colours alone."""
        other = type(self)(**self.arguments() | changes)
        if self._centres is not None and not QUANTISERS & changes.keys():
            other._table = self._table
        return other

    def _palette(self) -> np.ndarray:
        if self._centres is None:
            raise ValueError("a palette is needed: give `clusters` (colours, 3), or pass do_color_quantize=False")
        return self._centres

    def _process(self, images: list, layout: str | None, device) -> list:
        """Palette indices (n, T) or pixel values (n, 3, H, W), in order, of as many images at once as can be."""
        if not images:
            raise ValueError("no images; expected at least one")
        device = device or next((each.device for each in images if isinstance(each, torch.Tensor)), "cpu")
        fitted = [self._fit(self._read(each, layout), device) for each in images]
        if len({(each.shape[1:], each.dtype) for each in fitted}) == 1:
            fitted = [self._concatenate(fitted)] if len(fitted) > 1 else fitted
        return [self._ids(each) if self.do_color_quantize else self._pixel_values(each) for each in fitted]

    def _read(self, image, layout: str | None) -> Image.Image | np.ndarray | torch.Tensor:
        """A Pillow image in mode RGB, or (n, H, W, 3) uint8 or floating; a tensor only if it stays on its device."""
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if not isinstance(image, np.ndarray | torch.Tensor):
            raise TypeError(f"expected Pillow images, numpy arrays or torch tensors; got {type(image).__name__}")
        array = _channels_last(image, layout)
        if isinstance(array, torch.Tensor):
            if not array.is_cpu and array.dtype == torch.uint8 and array.shape[-1] == 3:
                return array
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy(force=True)
        if array.dtype.kind == "f":
            array = self._checked(array)
        elif array.dtype == np.uint16:
            if 0 < array.max() <= 255:
                raise ValueError("uint16 pixels of at most 255: of 8 or of 16 bits? Pass 8-bit pixels as uint8")
            array = _from_16_bits(array)
        elif array.dtype.kind not in "iu":
            raise ValueError(f"pixels of type {array.dtype}; expected integers in [0, 255], uint16 or floats")
        elif array.dtype != np.uint8:
            if array.min() < 0 or array.max() > 255:
                raise ValueError(f"{array.dtype} pixels in [{array.min()}, {array.max()}]; expected [0, 255]")
            array = array.astype(np.uint8)
        if array.shape[-1] == 4:
            if array.dtype != np.uint8:
                raise ValueError(f"{array.dtype} pixels of 4 channels; expected RGBA as uint8, or RGB")
            array = np.stack([np.asarray(to_rgb(Image.fromarray(each))) for each in np.ascontiguousarray(array)])
        return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array

    def _checked(self, array: np.ndarray) -> np.ndarray:
        """Floating-point pixels (n, H, W, C) in the range that the arguments mean, at least float32."""
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("some pixels are NaN or infinite")
        if self.do_rescale and not 0 <= low <= high <= 255:
            raise ValueError(f"float pixels in [{low:g}, {high:g}]; with do_rescale=True expected [0, 255]")
        if self.do_rescale and 0 < high <= 1:
            raise ValueError(f"float pixels in [{low:g}, {high:g}]: if they are in [0, 1], pass do_rescale=False")
        if not self.do_rescale and self._resizes(array.shape) and not 0 <= low <= high <= 1:
            raise ValueError(f"float pixels in [{low:g}, {high:g}]; to resize with do_rescale=False expected [0, 1]")
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _resizes(self, shape: tuple[int, ...]) -> bool:
        return self.do_resize and tuple(shape[1:3]) != tuple(self.size.values())

    def _fit(self, pixels: Image.Image | np.ndarray, device) -> np.ndarray:
        """To `size`: (n, height, width, 3). Pillow resizes 8 bits, so floats are rounded to a 255th of their range."""
        if isinstance(pixels, Image.Image):
            return np.asarray(self._resized(pixels) if self.do_resize else pixels)[None]
        pixels = pixels.numpy(force=True) if isinstance(pixels, torch.Tensor) else pixels
        if not self._resizes(pixels.shape):
            return pixels
        unit = pixels.dtype.kind == "f" and not self.do_rescale
        levels = np.ascontiguousarray(np.rint(pixels * (255 if unit else 1)).astype(np.uint8))
        resized = np.stack([np.asarray(self._resized(Image.fromarray(each))) for each in levels])
        return (resized / 255).astype(np.float32) if unit else resized

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.size.values()
        if image.size == (width, height):
            return image
        if self.crop == "squash":
            return image.resize((width, height), self.resample)
        down, across = _covering(image.height, image.width, height, width)
        left, top = (across - width) // 2, (down - height) // 2
        return image.resize((across, down), self.resample).crop((left, top, left + width, top + height))

    _concatenate = staticmethod(np.concatenate)

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Rescaled and normalised (..., 3), rounded in the order in which the port does."""
        if self.do_rescale:
            pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            pixels = pixels if pixels.dtype.kind == "f" else pixels.astype(np.float32)
            pixels = (pixels - np.array(self.image_mean, pixels.dtype)) / np.array(self.image_std, pixels.dtype)
        return pixels

    def _pixel_values(self, pixels: np.ndarray) -> np.ndarray:
        return np.moveaxis(self._scaled(pixels), -1, 1)

    def _ids(self, pixels: np.ndarray) -> np.ndarray:
        """(n, H, W, 3) -> int64 (n, T)."""
        if pixels.dtype == np.uint8:
            return self._table.of_levels(pixels)
        return self._table.of_points(self._scaled(pixels).reshape(-1, 3)).reshape(len(pixels), -1)

    @cached_property
    def _table(self) -> ColourTable:
        levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        return ColourTable(self._scaled(levels), self._palette(), nearest_of)


class ImageGPTImageProcessor(ImageGPTImageProcessorPil):
    """The same with torch, on the device of the images or on `device`; resizes as the port's class of this name.

    `resample` is one of Pillow's NEAREST, BILINEAR and BICUBIC. Floats are resized as they are.
    """

    MODES = {
        Image.Resampling.NEAREST: "nearest-exact",
        Image.Resampling.BILINEAR: "bilinear",
        Image.Resampling.BICUBIC: "bicubic",
    }

    @property
    def resampling(self) -> str:
        return f"{self.resample.name.lower()} (torch)"

    def _fit(self, pixels: Image.Image | np.ndarray | torch.Tensor, device) -> torch.Tensor:
        """To `size`: (n, 3, height, width), 8 bits staying 8 bits."""
        if isinstance(pixels, Image.Image):
            pixels = np.asarray(pixels)[None]
        pixels = pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(np.array(pixels))
        pixels = pixels.movedim(-1, 1).to(device).contiguous()
        if not self.do_resize:
            return pixels
        height, width = self.size.values()
        down, across = (height, width) if self.crop == "squash" else _covering(*pixels.shape[2:], height, width)
        top, left = (down - height) // 2, (across - width) // 2
        return self._interpolated(pixels, (down, across))[:, :, top : top + height, left : left + width]

    def _interpolated(self, pixels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        if tuple(pixels.shape[2:]) == shape:
            return pixels
        mode = self.MODES.get(self.resample)
        if mode is None:
            raise ValueError(f"resample {self.resample.name} is not in torch; use ImageGPTImageProcessorPil")
        if mode == "nearest-exact":
            return F.interpolate(pixels, shape, mode=mode)
        eight_bit = pixels.dtype == torch.uint8
        if eight_bit and not pixels.is_cpu:  # only CPUs resize integers
            pixels = pixels.float()
        resized = F.interpolate(pixels, shape, mode=mode, align_corners=False, antialias=True)
        return resized.clamp(0, 255).round().to(torch.uint8) if eight_bit else resized

    _concatenate = staticmethod(torch.cat)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescaled and normalised (n, 3, ...), rounded in the order in which the port does, which is another here."""
        if not self.do_normalize:
            return pixels * self.rescale_factor if self.do_rescale else pixels
        unit = 1 / self.rescale_factor if self.do_rescale else 1.0
        shape = (3, *[1] * (pixels.ndim - 2))
        mean = (torch.tensor(self.image_mean) * unit).view(shape).to(pixels.device)
        std = (torch.tensor(self.image_std) * unit).view(shape).to(pixels.device)
        return (pixels.float() - mean) / std

    def _pixel_values(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._scaled(pixels)

    def _ids(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> int64 (n, T); on a CPU by the table, elsewhere against the whole palette.

        On a CPU torch's product of matrices rounds differently with their shapes, so that for contested colours it is
        made again for the whole image, alone, as the port does for all.
        """
        centres = torch.from_numpy(self._palette()).float().to(pixels.device)
        if not pixels.is_cpu:
            parts = [nearest_of(part, centres) for part in self._points(pixels).split(CHUNK)]
            return torch.cat(parts).view(len(pixels), -1)
        if pixels.dtype == torch.uint8:
            ids = self._table.of_levels(pixels.movedim(1, -1).numpy())
        else:
            ids = self._table.of_points(self._points(pixels).numpy()).reshape(len(pixels), -1)
        for i in np.flatnonzero(ids.min(axis=1) < 0):
            rows = np.flatnonzero(ids[i] < 0)
            ids[i, rows] = nearest_of(self._points(pixels[i : i + 1]), centres, rows)
        return torch.from_numpy(ids)

    def _points(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> float32 (n * T, 3)."""
        return self._scaled(pixels).float().movedim(1, -1).reshape(-1, 3)

    @cached_property
    def _table(self) -> ColourTable:
        levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256)
        points = self._scaled(levels)[0].T.float().contiguous()
        return ColourTable(points.numpy(), self._palette().astype(np.float32), lambda *_: CONTESTED)


def _flat(images) -> Iterator:
    """The images or arrays in a (nested) list, in order, or the one given."""
    if isinstance(images, list | tuple):
        for each in images:
            yield from _flat(each)
    else:
        yield images


def _channels_last(array: np.ndarray | torch.Tensor, layout: str | None) -> np.ndarray | torch.Tensor:
    """(H, W), (H, W, C), (C, H, W), or several of the latter two -> (n, H, W, C), C in 1, 3, 4."""
    shape = tuple(array.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(f"an array of shape {shape}; expected (H, W), (H, W, C), (C, H, W) or several of those")
    if len(shape) == 2:
        return array[None, ..., None]
    array = array[None] if len(shape) == 3 else array
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"input_data_format={layout!r}; expected 'channels_first' or 'channels_last'")
    axes = [LAYOUTS[layout]] if layout else LAYOUTS.values()
    fits = [axis for axis in axes if shape[axis] == 3] or [axis for axis in axes if shape[axis] in (1, 4)]
    if not fits:
        raise ValueError(f"an array of shape {shape} has no 1, 3 or 4 channels, {layout or 'first or last'}")
    if len(fits) > 1 and shape[-1] * shape[-3] != 1:
        raise ValueError(f"shape {shape}: pass input_data_format, 'channels_first' or 'channels_last'; both would fit")
    return array.movedim(fits[0], -1) if isinstance(array, torch.Tensor) else np.moveaxis(array, fits[0], -1)


def _covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """The smallest height and width of this shape that cover the least ones, the longer rounded down."""
    if least_width * height >= least_height * width:
        return least_width * height // width, least_width
    return least_height, least_height * width // height


def _from_16_bits(greys: np.ndarray) -> np.ndarray:
    if greys.min() < 0 or greys.max() > 65535:
        raise ValueError(f"pixels in [{greys.min()}, {greys.max()}]; expected 16 bits, [0, 65535]")
    return ((greys.astype(np.int64) + 128) // 257).astype(np.uint8)


def _size(size) -> dict[str, int]:
    """An int, {"height", "width"} or (height, width) -> {"height", "width"}."""
    if isinstance(size, dict) or hasattr(size, "height"):  # the latter: the port's SizeDict
        pair = [size.get("height"), size.get("width")]
    else:
        pair = size if isinstance(size, list | tuple) else [size, size]
    whole = [n for n in pair if isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"size={size!r}; expected pixels as an int, or as {{'height': ..., 'width': ...}}")
    return {"height": int(pair[0]), "width": int(pair[1])}


def _three(value, name: str) -> tuple[float, float, float]:
    """One number for all channels, or one each."""
    values = tuple(np.broadcast_to(np.asarray(value, float), 3).tolist()) if np.size(value) in (1, 3) else ()
    if not values or not np.isfinite(values).all():
        raise ValueError(f"{name}={value!r}; expected a number, or one for each of 3 channels")
    return values


def _palette(clusters) -> np.ndarray:
    """(V, 3) in float32 if it came so, else float64: the port's rounding depends on it."""
    array = clusters.numpy(force=True) if isinstance(clusters, torch.Tensor) else np.array(clusters)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a palette is (colours, 3), finite, in [-1, 1]; this one has shape {array.shape}")
    return array
