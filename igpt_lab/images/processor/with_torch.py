"""The processor with torch: the same steps on tensors, on any device."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from igpt_lab.images.palette import CHUNK, CONTESTED, ColourTable, nearest_of
from igpt_lab.images.processor.pixels import covering
from igpt_lab.images.processor.with_pillow import ImageGPTImageProcessorPil


class ImageGPTImageProcessor(ImageGPTImageProcessorPil):
    """The same with torch, on the device of the images or on `device`; resizes as transformers' class of this name.

    Arguments are those of `ImageGPTImageProcessorPil`; `resample` is one of Pillow's NEAREST, BILINEAR and BICUBIC.
    Floats are resized as they are.
    """

    MODES: ClassVar = {
        Image.Resampling.NEAREST: "nearest-exact",
        Image.Resampling.BILINEAR: "bilinear",
        Image.Resampling.BICUBIC: "bicubic",
    }

    @property
    def resampling(self) -> str:
        return f"{self.resample.name.lower()} (torch)"

    def _fit(self, pixels: Image.Image | np.ndarray | torch.Tensor, device: str | torch.device) -> torch.Tensor:
        """To `size`: (n, 3, height, width), 8 bits staying 8 bits."""
        if isinstance(pixels, Image.Image):
            pixels = np.asarray(pixels)[None]
        pixels = pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(np.array(pixels))
        pixels = pixels.movedim(-1, 1).to(device).contiguous()
        if not self.do_resize:
            return pixels
        height, width = self.size.values()
        down, across = height, width
        if self.crop == "center":
            down, across = covering(pixels.shape[2], pixels.shape[3], height, width)
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

    def _concatenate(self, groups: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(groups)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescaled and normalised (n, 3, ...), rounded in the order of transformers' class, which is another here."""
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
        made again for the whole image, alone, as transformers does for all.
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
