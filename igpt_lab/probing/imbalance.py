"""Information imbalance: what the nearest neighbour in one layer is worth in another, or in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import mean_interval
from igpt_lab.probing.features import Features, as_array, as_layers

BLOCK = 2**23  # distances that are in memory at once: 64 MiB
Layers = Features | Mapping[int, np.ndarray]


@checked
def information_imbalance(layers: Layers, other: Layers | None = None, *, progress: bool = True) -> pd.DataFrame:
    """Information imbalance between every layer and every layer of `other`, in both directions (Glielmo et al., 2022).

    The imbalance from a to b is 2 / N times the mean, over images, of the rank in b of the image's nearest neighbour in
    a: 2 / N where neighbours in a are neighbours in b, 1 where a says nothing of b. Where it is low from a to b, and
    high from b to a, b has less to say. Ranks are among all other images, by Euclidean distance: N² distances a layer.

    Args:
        layers: Features, `StoredLayers`, or layer -> (N, D).
        other: The same images in the same order, such as `Features.from_pixels`. By default `layers` again.
        progress: Show a bar.

    Returns:
        A row per pair: `layer`, `other_layer`; `imbalance` from layer to other layer, and `back`, from other layer to
        layer, each with `_low` and `_high`, 95% over images (their ranks taken as independent); `n` images.

    Raises:
        ValueError: Other numbers of images, fewer than 3, or values that are not finite.
        TypeError: What is neither features nor layers by number.
    """
    sides = [_matrices(layers), _matrices(layers if other is None else other)]
    counts = sorted({len(x) for side in sides for x in side.values()})
    if len(counts) > 1 or counts[0] < 3:
        raise ValueError(f"layers of {' and '.join(map(str, counts))} images; expected the same three or more")
    near = [np.stack([_nearest(x) for x in side.values()]) for side in sides]
    steps = tqdm(total=sum(map(len, sides)), desc="imbalance", unit="layer", disable=not progress)
    with steps as bar:
        there = [_ranks(x, near[0], bar) for x in sides[1].values()]  # of the neighbours in each layer, in an other
        back = there if other is None else [_ranks(x, near[1], bar) for x in sides[0].values()]
    rows = []
    for a, layer in enumerate(sides[0]):
        for b, other_layer in enumerate(sides[1]):
            ends = _columns("imbalance", there[b][a]) | _columns("back", back[a][b])
            rows.append({"layer": layer, "other_layer": other_layer, **ends, "n": counts[0]})
    return pd.DataFrame(rows)


def _columns(name: str, ranks: np.ndarray) -> dict[str, float]:
    """The imbalance of ranks (N,), with its interval."""
    value, low, high = mean_interval(2 * ranks / len(ranks))
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def _matrices(layers: Layers) -> dict[Any, np.ndarray]:
    values = as_layers(layers)
    matrices = {layer: as_array(values[layer]).astype(np.float64) for layer in values}
    for layer, x in matrices.items():
        if x.ndim != 2 or not np.isfinite(x).all():
            raise ValueError(f"layer {layer} has shape {x.shape}, or values that are not finite; expected (N, D)")
    return matrices


def _blocks(x: np.ndarray):
    """Rows in slices, each with its distances to all of x, those of a row to itself below all others."""
    step = max(1, BLOCK // len(x))
    for start in range(0, len(x), step):
        distances = cdist(x[start : start + step], x)
        own = np.arange(len(distances))
        distances[own, start + own] = -1
        yield slice(start, start + step), distances


def _nearest(x: np.ndarray) -> np.ndarray:
    """int64 (N,): each row's nearest other, of equal ones the first."""
    nearest = []
    for rows, distances in _blocks(x):
        own = np.arange(len(distances))
        distances[own, rows.start + own] = np.inf
        nearest.append(distances.argmin(1))
    return np.concatenate(nearest)


def _ranks(x: np.ndarray, near: np.ndarray, bar: tqdm) -> np.ndarray:
    """float64 (L, N): the ranks, from 1, that rows near (L, N) have among the neighbours of each row of x."""
    ranks = np.empty(near.shape)
    for rows, distances in _blocks(x):
        asked = np.take_along_axis(distances, near[:, rows].T, axis=1)
        ordered = np.sort(distances, axis=1)
        for i, (row, wanted) in enumerate(zip(ordered, asked, strict=True)):
            ranks[:, rows.start + i] = np.searchsorted(row, wanted)  # itself is the first
    bar.update()
    return ranks
