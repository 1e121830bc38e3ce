"""The processor with Pillow: its steps from images to palette indices and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from igpt_lab.images.palette import ColourTable, nearest_of
from igpt_lab.images.processor.batch import Batch
from igpt_lab.images.processor.pixels import LAYOUTS, check_rgb, covering, flat, read_pixels
from igpt_lab.images.processor.settings import QUANTISERS, Settings, check_within

Pixels = Any  # an array of NumPy here, a tensor in the class with torch, which inherits these methods


class ImageGPTImageProcessorPil(Settings):
    """Images -> palette indices with Pillow's resize, and back; arguments, files and ids as transformers' class.

    Args:
        clusters: The palette (V, 3), in [-1, 1] with the other arguments as they are. None: no palette indices are
            made.
        size: Of the model's image in pixels, an int for a square, {"height", "width"} or (height, width); 256.
        do_resize: Resize images of another size; True.
        resample: Pillow's number of a filter; 2, bilinear.
        do_rescale: Multiply pixels by `rescale_factor`; True.
        rescale_factor: 1 / 255.
        do_normalize: Subtract `image_mean` and divide by `image_std`, after rescaling; True.
        image_mean: A number, or one per channel; 0.5.
        image_std: A number, or one per channel, none of them 0; 0.5.
        do_color_quantize: Return palette indices; True. Else pixel values.
        crop: "squash" resizes an image of another shape straight to `size`, as transformers does; "center", the paper's
            way, resizes its short side and keeps the centre. The default is "squash".
        do_convert_rgb: Convert images of other modes and channels to RGB; True. Else they are a ValueError.

    Raises:
        ValueError: A palette that is not (V, 3) or lies outside the range of scaled pixels, a size that is no number of
            pixels, a mean or deviation that is not finite, or an unknown crop.

    Example:
        >>> processor = lab.ImageGPTImageProcessorPil(np.stack([greys] * 3, axis=1), size=4)
        >>> processor.size, processor.clusters.shape
        ({'height': 4, 'width': 4}, (8, 3))
    """

    def __call__(
        self, images, return_tensors: str | None = None, *, input_data_format: str | None = None,
        data_format: str | None = None, device: str | torch.device | None = None, **changes,
    ) -> Batch:  # fmt: skip
        """Images -> palette indices, in raster order.

        Of an iterator each image is resized before the next one is taken.

        Args:
            images: An image, an array of several, a (nested) list or an iterator. Images are Pillow's (see `to_rgb`),
                or numpy arrays or torch tensors (H, W), (H, W, C), (C, H, W) or several of the latter two, C in 1, 3, 4
                (RGBA). Pixels are integers in [0, 255], uint16, or floats in [0, 255], which with `do_rescale=False`
                are in [0, 1] if they are resized.
            return_tensors: None for a list, "np" or "pt" for one array or tensor.
            input_data_format: "channels_first" or "channels_last", where the shape does not tell.
            data_format: The same of pixel values that are returned; "channels_first" by default.
            device: Where the class with torch works, by default where the images are. Pillow works on the CPU.
            **changes: Arguments of the processor, for this call only.

        Returns:
            {"input_ids": N x int64 (T,)}; with `do_color_quantize=False` {"pixel_values": N x (3, H, W)}, or N x (H, W,
            3).

        Raises:
            ValueError: No images, an array or pixels of another kind, images of several sizes for one array, an unknown
                format, or no palette.
            TypeError: What is no image, or a change that is no argument of the processor.

        Example:
            >>> images = np.zeros((2, 8, 8, 3), np.uint8)
            >>> model.processor(images, return_tensors="np")["input_ids"].shape
            (2, 16)
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
        check_within(centres, -1, 1)
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
            if not self.do_convert_rgb:
                check_rgb(image, layout)
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
