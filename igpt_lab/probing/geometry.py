"""The shape of a layer's features, without labels: intrinsic dimension, effective rank.

Layers are `StoredLayers`, `Features`, or a dict layer -> array (N, D), every layer of the same N images. Only
`label_overlap` looks at labels. Distances are Euclidean; no measure changes with the scale of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import MODEL, shown_control
from igpt_lab.core.progress import tqdm
from igpt_lab.core.values import check_finite
from igpt_lab.probing.features import Features, as_layers
from igpt_lab.probing.neighbours import nearest_others, scaled

BLOCK = 2**24  # numbers that are in memory in float64 at once: 128 MiB
NORMAL = 1.959964  # standard errors to either side of a 95% interval
OVERLAP = ("label_overlap", "label_overlap_low", "label_overlap_high", "label_overlap_chance")


@checked
def measure_layers(
    layers: Features | Mapping[int, np.ndarray],
    *,
    labels: np.ndarray | None = None,
    neighbours: int = 10,
    discard: float = 0.1,
    control: str = MODEL,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Every measure of every layer; one neighbour search serves all that need one.

    Of `StoredLayers` one layer is in memory at a time.

    Args:
        layers: Features, or layer -> (N, D).
        labels: int (N,), for the overlap, which is NaN without; those inside `Features` are not read.
        neighbours: Of each image, for the overlap.
        discard: Share of the largest ratios that `intrinsic_dimension` leaves out, from 0 to below 1.
        control: What the column `control` says.
        device: Where the search runs, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        A row per layer: `control`, `layer`; `intrinsic_dimension` and `n_distinct` images; `effective_rank` and
        `participation_ratio`, in dimensions; `label_overlap`, a fraction, with `_chance`; `neighbours`, `discard`; `n`
        images and `n_features`, the width D. `_low` and `_high` are 95% over images.

    Raises:
        ValueError: Layers of several counts of images, fewer than 4 of them, labels of another count, a `discard` out
            of range, or values that are not finite or all the same.
        TypeError: What is neither features nor layers by number.

    Example:
        >>> lab.measure_layers(test, labels=test.labels)[["layer", "n_distinct", "n", "n_features"]]
           layer  n_distinct    n  n_features
        0      0         100  100           8
        1      1         100  100           8
        2      2         100  100           8
        3      3         100  100           8
    """
    rows, search = [], partial(nearest_others, device=device, progress=progress)
    layers, n = as_layers(layers), count_images(layers)
    name = f"geometry {shown_control(control)}".strip()
    for layer in tqdm(layers, desc=name, unit="layer", disable=not progress):
        x = check_matrix(layers[layer], f"layer {layer}", n)
        near, distances = search(x, 2 if labels is None else neighbours + 1)
        variances = _variances(x)
        overlap = dict.fromkeys(OVERLAP, np.nan) if labels is None else _overlap(near, labels)
        rows.append({
            "control": control, "layer": layer, **_dimension(x, near, distances, discard, search),
            "effective_rank": _effective_rank(variances), "participation_ratio": _participation_ratio(variances),
            **overlap, "neighbours": neighbours, "discard": discard, "n": len(x), "n_features": x.shape[1],
        })  # fmt: skip
    return pd.DataFrame(rows)


@checked
def intrinsic_dimension(
    x: np.ndarray, *, discard: float = 0.1, device: str | torch.device | None = None, progress: bool = True
) -> dict[str, float]:
    """Two-NN estimate of the dimension of the set that rows x (N, D) lie on, `_low` and `_high` (95%), `n_distinct`.

    From each row's distances to its two nearest others, r1 and r2: log(r2 / r1) is exponential with the dimension as
    its rate where the density is constant at that scale (Facco et al., 2017). As there, the largest `discard` of the
    ratios are not trusted. In place of their line through the origin the rate is the maximum-likelihood one of an
    exponential of which only the smallest 1 - `discard` are seen (Epstein & Sobel, 1953): the same within noise, with
    a smaller and a known error. That error counts rows which are each other's neighbours as correlated, as their
    ratios share a distance. Rows equal to an earlier one are left out. Above about 10 dimensions every such estimate
    from thousands of rows is too low: use it to compare layers.
    """
    x, search = check_matrix(x, "x"), partial(nearest_others, device=device, progress=progress)
    return _dimension(x, *search(x, 2), discard, search)


@checked
def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of x (N, D), columns centred (Roy & Vetterli, 2007).

    From 1 to min(N - 1, D), reached where all directions have the same variance.
    """
    return _effective_rank(_variances(check_matrix(x, "x")))


def participation_ratio(x: np.ndarray) -> float:
    """Squared sum over sum of squares of the eigenvalues of x's covariance, x (N, D): as the effective rank, 1 to D.

    It weighs directions by variance, not by standard deviation, so weak ones count less.
    """
    return _participation_ratio(_variances(check_matrix(x, "x")))


@checked
def label_overlap(
    x: np.ndarray,
    labels: np.ndarray,
    *,
    neighbours: int = 10,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """How often the nearest neighbours of a row have its label.

    The interval is the jackknife that deletes one image and moves the next neighbour up: an image counts as one that
    has neighbours and as a neighbour of others, so the plain standard error of the mean is too small by about a third.

    Args:
        x: (N, D).
        labels: int (N,).
        neighbours: How many of each row.
        device: Where the search runs, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `label_overlap`, the share in [0, 1], mean over rows, with `label_overlap_low` and `_high`, 95% over images, and
        `label_overlap_chance`, what shuffled labels would give.

    Raises:
        ValueError: Labels of another count, too few images, or values that are not finite.

    Example:
        >>> overlap = lab.label_overlap(test.layers[2], test.labels, neighbours=5)
        >>> {name: round(value, 1) for name, value in overlap.items()}
        {'label_overlap': 0.2, 'label_overlap_low': 0.1, 'label_overlap_high': 0.3, 'label_overlap_chance': 0.1}
    """
    near, _ = nearest_others(check_matrix(x, "x"), neighbours + 1, device=device, progress=progress)
    return _overlap(near, labels)


def count_images(layers: Features | Mapping[int, np.ndarray]) -> int:
    """The number of images, without reading a layer where there is an index."""
    return len(layers.index) if hasattr(layers, "index") else len(next(iter(layers.values())))


def check_matrix(x: np.ndarray, name: str, n: int | None = None) -> np.ndarray:
    x = np.asarray(x)
    x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    if x.ndim != 2 or len(x) < 4 or not x.shape[1]:
        raise ValueError(f"{name} has shape {x.shape}; expected (N, D) with at least 4 images")
    if len(x) != (n or len(x)):
        raise ValueError(f"{name} has shape {x.shape}; expected ({n}, D), the same number of images in every layer")
    check_finite(name, x)
    if (x == x[0]).all():
        raise ValueError(
            f"{name} is the same for all {len(x)} images, so its geometry cannot be measured; leave this layer out"
        )
    return x


def _dimension(
    x: np.ndarray, near: np.ndarray, distances: np.ndarray, discard: float, search: Callable
) -> dict[str, float]:
    """Of rows x and their neighbours; searched again among the distinct rows where some are equal."""
    if not 0 <= discard < 1:
        raise ValueError(f"discard={discard}; expected a share of the ratios, from 0 to below 1")
    if not distances[:, 0].all():
        x = np.unique(scaled(x), axis=0)
        near, distances = search(x, 2)
    first, second = np.maximum(distances[:, :2].astype(float), 1e-30).T
    value, error = _rate(np.log(second / first), near[:, 0], discard)
    low, high = value - NORMAL * error, value + NORMAL * error
    return {
        "intrinsic_dimension": value, "intrinsic_dimension_low": low, "intrinsic_dimension_high": high,
        "n_distinct": len(x),
    }  # fmt: skip


def _rate(waits: np.ndarray, nearest: np.ndarray, discard: float) -> tuple[float, float]:
    """Rate of exponential `waits` (N,), the largest `discard` only known to be larger; and its standard error.

    The score of a row, whose sum is zero at the estimate, is correlated with that of its `nearest` (N,) only.
    """
    kept = int(len(waits) * (1 - discard))
    if kept < 2 or not (cut := np.partition(waits, kept - 1)[kept - 1]):
        raise ValueError(f"{kept} ratios of distances, or most of them 1; too few or too discrete for a dimension")
    seen = np.minimum(waits, cut)
    rate = (kept - 1) / seen.sum()  # without bias for independent waits
    score = (waits <= cut) / rate - seen
    score -= score.mean()
    mutual = nearest[nearest] == np.arange(len(nearest))  # such a pair is met twice
    shared = score * score[nearest]
    variance = score @ score + max(2 * shared.sum() - shared[mutual].sum(), 0)
    return float(rate), float(rate**2 / kept * np.sqrt(variance))


def _variances(x: np.ndarray) -> np.ndarray:
    """Squared singular values of x (N, D), columns centred, from the smaller of its two Gram matrices, in float64."""
    mean, size = x.mean(0, dtype=np.float64), float(np.abs(x).max())
    if len(x) < x.shape[1]:
        centred = (x - mean) / size
        return np.linalg.eigvalsh(centred @ centred.T).clip(0)
    gram, step = np.zeros((x.shape[1], x.shape[1])), max(1, BLOCK // x.shape[1])
    for start in range(0, len(x), step):
        centred = (x[start : start + step] - mean) / size
        gram += centred.T @ centred
    return np.linalg.eigvalsh(gram).clip(0)


def _effective_rank(variances: np.ndarray) -> float:
    values = np.sqrt(variances[variances > 0])
    share = values / values.sum()
    return float(np.exp(-share @ np.log(share)))


def _participation_ratio(variances: np.ndarray) -> float:
    return float(variances.sum() ** 2 / np.square(variances).sum())


def _overlap(near: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of neighbours (N, k + 1), the last of which stands by to replace one that is deleted."""
    labels, (n, k) = np.asarray(labels), (len(near), near.shape[1] - 1)
    if labels.shape != (n,):
        raise ValueError(f"labels of shape {labels.shape} for {n} images; expected one for each image")
    same = (labels[near] == labels[:, None]).astype(float)
    own = same[:, :k].mean(1)
    moved_up = (same[:, k:] - same[:, :k]).ravel() / k
    without = own.sum() - own + np.bincount(near[:, :k].ravel(), moved_up, n)
    error = np.sqrt(n - 1) * (without / (n - 1)).std()  # Efron & Stein (1981): not too small on average
    counts = np.unique(labels, return_counts=True)[1]
    low, high = own.mean() - NORMAL * error, own.mean() + NORMAL * error
    values = own.mean(), max(low, 0), min(high, 1), (counts * (counts - 1)).sum() / (n * (n - 1))
    return dict(zip(OVERLAP, map(float, values), strict=True))
