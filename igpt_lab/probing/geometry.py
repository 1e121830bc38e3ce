"""The shape of a layer's features, without labels: CKA between layers, intrinsic dimension, effective rank.

Layers are `StoredLayers`, `Features`, or a dict layer -> array (N, D), every layer of the same N images. Only
`label_overlap` looks at labels. Distances are Euclidean; no measure changes with the scale of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, shown_control
from igpt_lab.core.progress import tqdm
from igpt_lab.core.values import check_finite
from igpt_lab.features.store import StoredLayers
from igpt_lab.probing.features import Features, as_layers
from igpt_lab.probing.neighbours import nearest_others, scaled

BLOCK = 2**24  # numbers in the largest block of a neighbour search: 64 MiB
GROUP = 2**27  # numbers of minibatches that are in memory at once: 512 MiB
NORMAL = 1.959964  # standard errors to either side of a 95% interval
OVERLAP = ("label_overlap", "label_overlap_low", "label_overlap_high", "label_overlap_chance")


@checked
def cka(
    layers: Features | Mapping[int, np.ndarray],
    other: Features | Mapping[int, np.ndarray] | None = None,
    *,
    batch: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Linear CKA of every layer with every layer of `other`.

    1 for features that differ by a rotation and a scale, 0 in expectation for independent ones. HSIC is estimated
    without bias (Song et al., 2012, eq. 5), so a small sample does not make layers alike, and is averaged over
    minibatches before the ratio is taken (Nguyen et al., 2021, eq. 2). Each layer is read once where all of them fit
    into GROUP numbers, else as many times as they exceed it.

    Args:
        layers: Features, or layer -> (N, D).
        other: The same images in the same order; layers may differ in number and width. By default `layers` again.
        batch: Images of a minibatch, at most.
        seed: Of the minibatches, which are drawn without replacement.
        device: Where products are made, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        A row per pair: `layer`, `other_layer`, `cka`, its `standard_error` by the jackknife over minibatches (NaN where
        there is only one), `n` images, `batches`, `seed`.

    Raises:
        ValueError: Other images, fewer than 4 in a minibatch, no layer, or values that are not finite.
        TypeError: What is neither features nor layers by number.

    Example:
        >>> table = lab.cka(test)
        >>> table.pivot(index="layer", columns="other_layer", values="cka").round(1)
        other_layer    0    1    2    3
        layer
        0            1.0  0.6  0.4  0.3
        1            0.6  1.0  0.8  0.7
        2            0.4  0.8  1.0  0.9
        3            0.3  0.7  0.9  1.0
    """
    sides = [as_layers(each) for each in ([layers] if other is None else [layers, other])]
    rows = _same_images(layers, layers if other is None else other)
    batches = np.array_split(np.random.default_rng(seed).permutation(rows), -(-rows // max(batch, 1)))
    if len(batches[-1]) < 4:
        raise ValueError(f"batch={batch} splits {rows} images into minibatches of {len(batches[-1])}; 4 are needed")
    device = best_device(device)
    found = torch.empty((3, len(batches), len(sides[0]), len(sides[-1])), dtype=torch.float32, device=device)
    pairs = (grams for group in _groups(batches, sides)
             for grams in zip(*(_grams(side, group, rows, device) for side in sides), strict=True))  # fmt: skip
    for i, grams in enumerate(tqdm(pairs, total=len(batches), desc="CKA", unit="batch", delay=1, disable=not progress)):
        left, right = grams[0], grams[-1]
        found[0, i], found[1, i], found[2, i] = (
            left @ right.T,
            left.square().sum(1, keepdim=True),
            right.square().sum(1),
        )
    size = np.array([len(each) for each in batches])[:, None, None]
    value, error = _ratio(*(found.cpu().numpy().astype(float) / (size * (size - 3))))
    table = pd.DataFrame([(a, b) for a in sides[0] for b in sides[-1]], columns=["layer", "other_layer"])
    return table.assign(cka=value.ravel(), standard_error=error.ravel(), n=rows, batches=len(batches), seed=seed)


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
    layers, n = as_layers(layers), _count(layers)
    name = f"geometry {shown_control(control)}".strip()
    for layer in tqdm(layers, desc=name, unit="layer", disable=not progress):
        x = _checked(layers[layer], f"layer {layer}", n)
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
    x, search = _checked(x, "x"), partial(nearest_others, device=device, progress=progress)
    return _dimension(x, *search(x, 2), discard, search)


@checked
def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of x (N, D), columns centred (Roy & Vetterli, 2007).

    From 1 to min(N - 1, D), reached where all directions have the same variance.
    """
    return _effective_rank(_variances(_checked(x, "x")))


def participation_ratio(x: np.ndarray) -> float:
    """Squared sum over sum of squares of the eigenvalues of x's covariance, x (N, D): as the effective rank, 1 to D.

    It weighs directions by variance, not by standard deviation, so weak ones count less.
    """
    return _participation_ratio(_variances(_checked(x, "x")))


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
    near, _ = nearest_others(_checked(x, "x"), neighbours + 1, device=device, progress=progress)
    return _overlap(near, labels)


def _count(layers: Features | Mapping[int, np.ndarray]) -> int:
    """The number of images, without reading a layer where there is an index."""
    return len(layers.index) if hasattr(layers, "index") else len(next(iter(layers.values())))


def _checked(x: np.ndarray, name: str, n: int | None = None) -> np.ndarray:
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


def _same_images(layers, other) -> int:
    """The number of images, after a check that both sides have the same; nothing but it is known of a dict."""
    n, m = _count(layers), _count(other)
    if n != m:
        raise ValueError(f"features of {n} and of {m} images; CKA compares layers on the same images")
    if hasattr(layers, "index") and hasattr(other, "index") and (differs := layers.index != other.index).any():
        raise ValueError(f"{differs.sum()} of {n} rows are of different images; CKA needs the same ones in order")
    sources = [each.fingerprint for each in (layers, other) if isinstance(each, StoredLayers)]
    if len(set(sources)) > 1:
        raise ValueError(
            f"images with fingerprints {sources[0][:8]} and {sources[1][:8]}; CKA compares layers on the same images. "
            "If they are the same in another encoding, give dict(layers) for one of them"
        )
    return n


def _groups(batches: list[np.ndarray], sides: list[Mapping[int, np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Minibatches in turn, as many at once as GROUP numbers hold; all layers are taken to be as wide as the first."""
    numbers = sum(len(side) * np.shape(next(iter(side.values())))[1] for side in sides) * len(batches[0])
    step = max(1, GROUP // numbers)
    yield from (batches[start : start + step] for start in range(0, len(batches), step))


def _grams(
    layers: Mapping[int, np.ndarray], batches: Sequence[np.ndarray], n: int, device: torch.device
) -> Iterator[Tensor]:
    """For each minibatch its U-centred Gram matrices, float32 (L, n * n); every layer at a scale near 1."""
    chosen, parts = np.concatenate(batches), []
    for layer in layers:
        x = _checked(layers[layer], f"layer {layer}", n)
        parts.append((x[chosen] / (float(x.max()) - float(x.min()))).astype(np.float32, copy=False))
    ends = np.cumsum([len(each) for each in batches])
    for rows in map(slice, ends - [len(each) for each in batches], ends):
        block = np.zeros((len(parts), rows.stop - rows.start, max(x.shape[1] for x in parts)), np.float32)
        for each, x in zip(block, parts, strict=True):
            each[:, : x.shape[1]] = x[rows]  # zeros beside it change no inner product
        yield _centred_grams(torch.as_tensor(block).to(device))


def _centred_grams(x: Tensor) -> Tensor:
    """Gram matrices of rows (L, n, D) without their diagonals, U-centred, flat: (L, n * n).

    The inner product of two is n (n - 3) times the unbiased HSIC of Song et al. (Székely & Rizzo, 2014, section 2).
    """
    x, n = x - x.mean(1, keepdim=True), x.shape[1]  # the mean changes nothing but rounding
    grams = x @ x.mT
    diagonal = grams.diagonal(dim1=1, dim2=2)
    diagonal.zero_()
    sums = grams.sum(1) / (n - 2)
    grams -= sums[:, None]
    grams -= sums[:, :, None] - sums.sum(1)[:, None, None] / (n - 1)
    diagonal.zero_()
    return grams.flatten(1)


def _ratio(cross: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CKA and its jackknife error, both (L, M), of HSIC of both, of the left and of the right, each (B, L, M)."""
    totals = [each.sum(0) for each in (cross, left, right)]
    value, count = totals[0] / np.sqrt(totals[1] * totals[2]), len(cross)
    if count == 1:
        return value, np.full_like(value, np.nan)
    rest, a, b = (total - each for total, each in zip(totals, (cross, left, right), strict=True))
    return value, np.sqrt(count - 1) * (rest / np.sqrt(a * b)).std(0)


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
