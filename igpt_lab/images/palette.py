"""A palette: fitted to images by k-means, and each colour's nearest centre, looked up in a table that fills itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from igpt_lab.core.arguments import checked

CHUNK = 1 << 16  # pixels at a time: what stays in a CPU's cache when looking colours up
ROWS = 1 << 13  # pixels at a time against a whole palette: 32 MB of distances for 512 colours in float64
DISTINCT = 100_000  # colours that k-means gets: minutes
UNSEEN, CONTESTED = -1, -2  # in a table of colours


@checked
def fit_palette(images: np.ndarray, colours: int, *, seed: int = 0) -> np.ndarray:
    """k-means over the pixels of uint8 (N, H, W, 3) -> float32 centres (colours, 3) in [-1, 1], dark to light.

    Equal pixels are clustered once, with their count as weight; of images with more than 100,000 distinct colours, so
    many pixels drawn at random. Raises ValueError when there are fewer distinct colours than asked for.
    """
    from sklearn.cluster import KMeans

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected images uint8 (N, H, W, 3); these are {images.dtype} {images.shape}")
    pixels, counts = np.unique(pack(images), return_counts=True)
    if len(pixels) < colours:
        raise ValueError(f"the images have {len(pixels)} distinct colours; ask for at most that, not {colours}")
    if len(pixels) > DISTINCT:
        counts = np.random.default_rng(seed).multinomial(DISTINCT, counts / counts.sum())
        pixels, counts = pixels[counts > 0], counts[counts > 0]
    points = unpack(pixels) / 127.5 - 1
    centres = KMeans(colours, n_init=4, random_state=seed).fit(points, sample_weight=counts).cluster_centers_
    return centres[np.argsort(centres @ [0.299, 0.587, 0.114], kind="stable")].astype(np.float32)


class ColourTable:
    """Colour -> index of the nearest centre: for 8 bits a table of all 2^24 colours, filled for those that occur.

    A tree finds the two nearest centres exactly. Where their distances are equal up to rounding, `nearest` decides,
    which rounds as transformers does: there, and only there, the answer depends on rounding.
    """

    def __init__(self, levels: np.ndarray, centres: np.ndarray, nearest: Callable):
        """`levels` (256, 3): what each of the 8-bit levels becomes; `centres` (V, 3); `nearest`: as `nearest_of`."""
        from scipy.spatial import cKDTree

        self.levels = levels
        self.centres = centres
        self.nearest = nearest
        self.tree = cKDTree(centres.astype(float))
        self.eps = np.finfo(np.result_type(levels.dtype, centres.dtype)).eps
        self.indices = np.full(1 << 24, UNSEEN, np.int16 if len(centres) <= 1 << 15 else np.int32)

    def of_levels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) -> int64 (n, T)."""
        ids = np.empty((len(pixels), pixels.shape[1] * pixels.shape[2]), np.int64)
        step = max(1, CHUNK // ids.shape[1])
        for start in range(0, len(pixels), step):
            packed = pack(pixels[start : start + step])
            nearest = self.indices[packed]
            if (nearest == UNSEEN).any():
                self._fill(np.unique(packed[nearest == UNSEEN]))
                nearest = self.indices[packed]
            ids[start : start + step] = nearest
        return ids

    def _fill(self, colours: np.ndarray) -> None:
        rgb = unpack(colours).astype(np.uint8)
        self.indices[colours] = self.of_points(np.stack([self.levels[rgb[:, i], i] for i in range(3)], axis=1))

    def of_points(self, points: np.ndarray) -> np.ndarray:
        """Points (M, 3) -> int64 (M,)."""
        workers = -1 if len(points) > ROWS else 1
        distances, indices = self.tree.query(points.astype(float), k=2, workers=workers)  # inf where there is no second
        ids = indices[:, 0].astype(np.int64)
        gap = np.diff(np.square(distances))[:, 0]
        reach = 2 * np.linalg.norm(points.astype(float), axis=1) + distances[:, 1]  # bounds |p| + |c|
        close = np.flatnonzero((gap <= 5 * self.eps * np.square(reach)) & np.isfinite(gap))
        for rows in np.array_split(close, len(close) // ROWS + 1) if len(close) else ():
            rows = np.resize(rows, max(2, len(rows)))  # BLAS rounds the product with a single row in another way
            ids[rows] = self.nearest(points[rows], self.centres)
        return ids


def nearest_of(points: Any, centres: Any, rows: Any = slice(None)) -> Any:
    """(M, 3), (V, 3) -> for those `rows`, the indices of the least |p|^2 - 2 p c + |c|^2, all numpy's or all torch's.

    Computed as in transformers: in this order, and in the precision of the arguments.
    """
    products, points = (points @ centres.T)[rows], points[rows]
    return ((points * points).sum(1)[:, None] - 2 * products + (centres * centres).sum(1)).argmin(1)


def pack(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) -> int32 (N, T): one number per colour."""
    packed = images[..., 0].astype(np.int32)
    for channel in (1, 2):
        packed <<= 8
        packed |= images[..., channel]
    return packed.reshape(len(images), -1)


def unpack(packed: np.ndarray) -> np.ndarray:
    """int32 (M,) -> float64 (M, 3) in [0, 255]."""
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(float)
