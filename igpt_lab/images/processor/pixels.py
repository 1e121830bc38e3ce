"""Pillow images, arrays and tensors of every supported kind -> RGB pixels: upright, opaque, with channels last."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # the EXIF tag
LAYOUTS = {"channels_first": -3, "channels_last": -1}


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode -> mode RGB, upright.

    The camera's orientation is applied. Greys are repeated, 16-bit greys divided by 257 and rounded, palettes looked
    up, CMYK and others converted as Pillow does; transparency is laid over white. Raises ValueError for an animation or
    several pages (but not for the extra pictures in a photograph's MPO file), for floating-point pixels and for mode I
    with at most 255, whose ranges are unknown, for CIELab that only a profile tells, and for an image without pixels.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"an image of {frames} frames; choose one: image.seek(number), then image.copy()")
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is empty")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save them with 8 or 16 bits")
    if image.mode != "LAB" and image.info.get("icc_profile", b"")[16:20] == b"Lab ":  # the data's colour space
        raise ValueError(f"an image in CIELab that says mode {image.mode}; convert it to RGB")
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bit_greys(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" and type(image) is Image.Image else image.convert("RGB")


def _eight_bit_greys(image: Image.Image) -> Image.Image:
    """Mode I or I;16 -> mode L; the one grey that a PNG may declare transparent becomes white."""
    greys = np.asarray(image)
    if image.mode == "I" and 0 < greys.max() <= 255:
        raise ValueError("mode I with pixels of at most 255 may have 8 or 16 bits; convert the image to L or I;16")
    clear = image.info.get("transparency")  # of 16 bits, too
    levels = from_16_bits(greys)
    return Image.fromarray(levels if clear is None else np.where(greys == clear, np.uint8(255), levels))


def flat(images: object) -> Iterator:
    """The images or arrays in a (nested) list or of an iterator, in order and none of them held, or the single one."""
    if isinstance(images, list | tuple | Iterator):
        for image in images:
            yield from flat(image)
            del image  # before the next one is made
    else:
        yield images


def read_pixels(
    image: Image.Image | np.ndarray | torch.Tensor, layout: str | None, *, rescale: bool, size: tuple[int, int] | None
) -> Image.Image | np.ndarray | torch.Tensor:
    """A Pillow image in mode RGB, or (n, H, W, 3) uint8 or floating; a tensor only if it stays on its device.

    Args:
        image: a Pillow image, or an array or tensor (H, W), (H, W, C), (C, H, W) or several of the latter two.
        layout: "channels_first", "channels_last" or None, which takes the one that fits.
        rescale: floats are in [0, 255], and will be rescaled.
        size: (height, width) that the image is resized to afterwards; None: it stays as it is.

    Raises:
        TypeError: for what is no image.
        ValueError: for a shape, type or range that is not supported or has two readings.
    """
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
        array = _checked_floats(array, rescale, size is not None and array.shape[1:3] != size)
    else:
        array = _eight_bits(array)
    if array.shape[-1] == 4:
        if array.dtype != np.uint8:
            raise ValueError(f"{array.dtype} pixels of 4 channels; expected RGBA as uint8, or RGB")
        array = np.stack([np.asarray(to_rgb(Image.fromarray(rgba))) for rgba in np.ascontiguousarray(array)])
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def check_rgb(image: Image.Image | np.ndarray | torch.Tensor, layout: str | None) -> None:
    """ValueError for what `read_pixels` would convert to RGB."""
    if isinstance(image, Image.Image):
        kind = "" if image.mode == "RGB" else f"mode {image.mode}"
    elif isinstance(image, np.ndarray | torch.Tensor):
        channels = _channels_last(image, layout).shape[-1]
        kind = "" if channels == 3 else f"{channels} channels"
    else:
        return
    if kind:
        raise ValueError(f"an image of {kind} with do_convert_rgb=False; expected RGB")


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
    axes = [LAYOUTS[layout]] if layout else list(LAYOUTS.values())
    fits = [axis for axis in axes if shape[axis] == 3] or [axis for axis in axes if shape[axis] in (1, 4)]
    if not fits:
        raise ValueError(f"an array of shape {shape} has no 1, 3 or 4 channels, {layout or 'first or last'}")
    if len(fits) > 1 and shape[-1] * shape[-3] != 1:
        raise ValueError(f"shape {shape}: pass input_data_format, 'channels_first' or 'channels_last'; both would fit")
    return array.movedim(fits[0], -1) if isinstance(array, torch.Tensor) else np.moveaxis(array, fits[0], -1)


def _checked_floats(array: np.ndarray, rescale: bool, resize: bool) -> np.ndarray:
    """Floating-point pixels in the range that the processor's arguments mean, at least float32."""
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("some pixels are NaN or infinite")
    if rescale and not 0 <= low <= high <= 255:
        raise ValueError(f"float pixels in [{low:g}, {high:g}]; with do_rescale=True expected [0, 255]")
    if rescale and 0 < high <= 1:
        raise ValueError(f"float pixels in [{low:g}, {high:g}]: if they are in [0, 1], pass do_rescale=False")
    if not rescale and resize and not 0 <= low <= high <= 1:
        raise ValueError(f"float pixels in [{low:g}, {high:g}]; to resize with do_rescale=False expected [0, 1]")
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Integers in [0, 255], or uint16 -> uint8."""
    if array.dtype == np.uint16:
        if 0 < array.max() <= 255:
            raise ValueError("uint16 pixels of at most 255 may have 8 or 16 bits; pass 8-bit pixels as uint8")
        return from_16_bits(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"pixels of type {array.dtype}; expected integers in [0, 255], uint16 or floats")
    if array.dtype == np.uint8:
        return array
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"{array.dtype} pixels in [{array.min()}, {array.max()}]; expected [0, 255]")
    return array.astype(np.uint8)


def from_16_bits(greys: np.ndarray) -> np.ndarray:
    """Greys in [0, 65535] -> uint8: a 257th, rounded."""
    if greys.min() < 0 or greys.max() > 65535:
        raise ValueError(f"pixels in [{greys.min()}, {greys.max()}]; expected 16 bits, [0, 65535]")
    return ((greys.astype(np.int64) + 128) // 257).astype(np.uint8)


def covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """The smallest height and width of this shape that cover the least ones, the longer rounded down."""
    if least_width * height >= least_height * width:
        return least_width * height // width, least_width
    return least_height, least_height * width // height
