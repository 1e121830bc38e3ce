"""How alike the features of two layers are, without labels: linear CKA, estimated without bias over minibatches.

Layers are `StoredLayers`, `Features`, or a dict layer -> array (N, D), every layer of the same N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.progress import tqdm
from igpt_lab.features.store import StoredLayers
from igpt_lab.probing.features import Features, as_layers
from igpt_lab.probing.geometry import check_matrix, count_images

GROUP = 2**27  # numbers of minibatches that are in memory at once: 512 MiB


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
    sides = [as_layers(asked) for asked in ([layers] if other is None else [layers, other])]
    rows = _same_images(layers, layers if other is None else other)
    batches = np.array_split(np.random.default_rng(seed).permutation(rows), -(-rows // max(batch, 1)))
    if len(batches[-1]) < 4:
        raise ValueError(f"batch={batch} splits {rows} images into minibatches of {len(batches[-1])}; 4 are needed")
    device = best_device(device)
    estimates = torch.empty((3, len(batches), len(sides[0]), len(sides[-1])), dtype=torch.float32, device=device)
    pairs = (grams for group in _groups(batches, sides)
             for grams in zip(*(_grams(side, group, rows, device) for side in sides), strict=True))  # fmt: skip
    for i, grams in enumerate(tqdm(pairs, total=len(batches), desc="CKA", unit="batch", delay=1, disable=not progress)):
        left, right = grams[0], grams[-1]
        estimates[0, i] = left @ right.T
        estimates[1, i], estimates[2, i] = left.square().sum(1, keepdim=True), right.square().sum(1)
    size = np.array([len(minibatch) for minibatch in batches])[:, None, None]
    value, error = _ratio(*(estimates.cpu().numpy().astype(float) / (size * (size - 3))))
    table = pd.DataFrame([(a, b) for a in sides[0] for b in sides[-1]], columns=["layer", "other_layer"])
    return table.assign(cka=value.ravel(), standard_error=error.ravel(), n=rows, batches=len(batches), seed=seed)


def _same_images(layers, other) -> int:
    """The number of images, after a check that both sides have the same; nothing but it is known of a dict."""
    n, m = count_images(layers), count_images(other)
    if n != m:
        raise ValueError(f"features of {n} and of {m} images; CKA compares layers on the same images")
    if hasattr(layers, "index") and hasattr(other, "index") and (differs := layers.index != other.index).any():
        raise ValueError(f"{differs.sum()} of {n} rows are of different images; CKA needs the same ones in order")
    sources = [side.fingerprint for side in (layers, other) if isinstance(side, StoredLayers)]
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
        x = check_matrix(layers[layer], f"layer {layer}", n)
        parts.append((x[chosen] / (float(x.max()) - float(x.min()))).astype(np.float32, copy=False))
    ends = np.cumsum([len(batch) for batch in batches])
    for rows in map(slice, ends - [len(batch) for batch in batches], ends):
        block = np.zeros((len(parts), rows.stop - rows.start, max(x.shape[1] for x in parts)), np.float32)
        for room, x in zip(block, parts, strict=True):
            room[:, : x.shape[1]] = x[rows]  # zeros beside it change no inner product
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
    totals = [sums.sum(0) for sums in (cross, left, right)]
    value, count = totals[0] / np.sqrt(totals[1] * totals[2]), len(cross)
    if count == 1:
        return value, np.full_like(value, np.nan)
    rest, a, b = (total - sums for total, sums in zip(totals, (cross, left, right), strict=True))
    return value, np.sqrt(count - 1) * (rest / np.sqrt(a * b)).std(0)
