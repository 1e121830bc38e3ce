"""Images <-> tokens: a k-means palette, resize, quantise, and back.

As in the paper (appendix of Chen et al., 2020) and its port: centres lie in [-1, 1], a pixel x in [0, 255] goes to the
centre nearest to x / 127.5 - 1 in squared Euclidean distance, and a centre c comes back as rint(127.5 (c + 1)).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from igpt_lab import checkpoints

CONFIG = "preprocessor_config.json"


def fit_palette(images: np.ndarray, colours: int, *, seed: int = 0) -> np.ndarray:
    """k-means over the pixels of uint8 (N, H, W, 3) -> float32 centres (colours, 3) in [-1, 1], dark to light.

    Equal pixels are clustered once, with their count as weight. Raises ValueError when the images have fewer distinct
    colours than asked for.
    """
    from sklearn.cluster import KMeans

    pixels, counts = np.unique(_pack(_checked(images)).ravel(), return_counts=True)
    if len(pixels) < colours:
        raise ValueError(f"the images have {len(pixels)} distinct colours; ask for at most that, not {colours}")
    points = _unpack(pixels) / 127.5 - 1
    centres = KMeans(colours, n_init=4, random_state=seed).fit(points, sample_weight=counts).cluster_centers_
    return centres[np.argsort(centres @ [0.299, 0.587, 0.114], kind="stable")].astype(np.float32)


class ImageGPTImageProcessorPil:
    """Images -> palette indices with Pillow's resize, and back; files and ids as the port's class of that name.

    `clusters`: float (V, 3) in [-1, 1]. `size`: side of the model's square image, in pixels; an image of another shape
    is squashed to it, as the port does.
    """

    def __init__(self, clusters: np.ndarray, size: int, *, resample: int = Image.Resampling.BILINEAR):
        self.clusters = np.asarray(clusters, dtype=np.float32)
        if self.clusters.ndim != 2 or self.clusters.shape[1] != 3:
            raise ValueError(f"a palette is (colours, 3) in [-1, 1]; this one has shape {self.clusters.shape}")
        self.size, self.resample = int(size), Image.Resampling(resample)
        self._table = np.full(1 << 24, -1, dtype=np.int16)  # RGB -> index, filled for the colours that occur

    @classmethod
    def from_pretrained(cls, source: str | Path) -> ImageGPTImageProcessorPil:
        """From a bundled name, a folder with `preprocessor_config.json` or a Hub name; `size` old style or new."""
        where = checkpoints.resolve(source) / CONFIG
        values = checkpoints.read_json(where)
        size = values.get("size")
        if isinstance(size, dict):
            size = size["height"] if size.get("height") == size.get("width") else None
        if values.get("clusters") is None or not isinstance(size, int):
            raise checkpoints.CheckpointError(
                f"{where} needs `clusters` (colours, 3) and a square `size`; it has {size=}"
            )
        return cls(np.array(values["clusters"]), size, resample=values.get("resample", Image.Resampling.BILINEAR))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `preprocessor_config.json` as the port reads it; returns the folder."""
        values = {
            "image_processor_type": type(self).__name__,
            "clusters": self.clusters.astype(float).tolist(),
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "do_color_quantize": True,
        }
        checkpoints.write_json(Path(folder) / CONFIG, values)
        return Path(folder)

    def resize(self, images: list[Image.Image]) -> np.ndarray:
        """Pillow images of any size and mode -> uint8 (N, size, size, 3)."""
        shape = (self.size, self.size)
        rgb = [image.convert("RGB") for image in images]
        return np.stack([np.asarray(image.resize(shape, self.resample)) for image in rgb])

    def encode(self, images: list[Image.Image] | np.ndarray) -> np.ndarray:
        """Pillow images, or uint8 (N, H, W, 3) in [0, 255] -> int64 palette indices (N, T), raster order."""
        if isinstance(images, np.ndarray):
            images = _checked(images)
            if images.shape[1:3] != (self.size, self.size):
                images = self.resize([Image.fromarray(image) for image in images])
        else:
            images = self.resize(images)
        packed = _pack(images)
        new = np.unique(packed[self._table[packed] < 0])
        for chunk in np.array_split(new, len(new) // 20_000 + 1):
            self._table[chunk] = self._nearest(_unpack(chunk) / 127.5 - 1)
        return self._table[packed].reshape(len(images), -1).astype(np.int64)

    def _nearest(self, points: np.ndarray) -> np.ndarray:
        """float64 (M, 3) -> indices (M,) of the nearest centre; the first of equals."""
        return sum((points[:, i, None] - self.clusters[:, i].astype(float)) ** 2 for i in range(3)).argmin(axis=1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Palette indices (N, T) -> uint8 (N, side, side, 3)."""
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self.clusters)):
            raise ValueError(f"token {tokens.max()} does not lie in this palette of {len(self.clusters)} colours")
        colours = np.rint(127.5 * (self.clusters.astype(float) + 1)).clip(0, 255).astype(np.uint8)
        side = round(tokens.shape[1] ** 0.5)
        return colours[tokens].reshape(len(tokens), side, side, 3)


def _checked(images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected images uint8 (N, H, W, 3); these are {images.dtype} {images.shape}")
    return images


def _pack(images: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> int32 (...): one number a colour."""
    red, green, blue = (images[..., i].astype(np.int32) for i in range(3))
    return red << 16 | green << 8 | blue


def _unpack(packed: np.ndarray) -> np.ndarray:
    """int32 (M,) -> float64 (M, 3) in [0, 255]."""
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(float)
