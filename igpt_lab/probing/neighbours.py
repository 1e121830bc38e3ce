"""Nearest neighbours by Euclidean distance: the search, exact or by a matrix product alone, and the probe.

Two searches stand elsewhere, as they are of another kind: `likeness.nearest` is scikit-learn's, of one neighbour, and
the palette's is over integers, where a table answers (`palette.ColourTable`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import middle_of_best
from igpt_lab.core.devices import best_device, exact_dtype
from igpt_lab.core.display import MODEL
from igpt_lab.core.progress import tqdm
from igpt_lab.probing.choosing import folds_of
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import Probed, facts_of, layer_by_layer
from igpt_lab.probing.results import ProbeResult

BLOCK = 2**24  # numbers in the largest block of a neighbour search: 64 MiB
SPARE = 8  # neighbours taken from the matrix product beyond those asked for, before distances are measured exactly


def nearest_others(
    x: np.ndarray, count: int, *, device: str | torch.device | None, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's `count` nearest others: indices and distances (N, count), nearest first, at the scale of `scaled`."""
    if len(x) < count + 2:
        raise ValueError(f"{len(x)} different images; expected at least {count + 2} to look for {count} neighbours")
    rows = torch.as_tensor(scaled(x)).to(best_device(device))
    near, distances, sure = _search(rows, count, progress)
    doubtful = (~sure).nonzero()[:, 0]
    if len(doubtful):
        near[doubtful], distances[doubtful] = _search_directly(rows, doubtful, count, progress)
    return near.cpu().numpy(), distances.cpu().numpy()


def scaled(x: np.ndarray) -> np.ndarray:
    """float32 (N, D), columns centred, of mean square 1: the same neighbours and ratios of distances, no overflow."""
    centred = x - x.mean(0, dtype=np.float64).astype(x.dtype)
    size = np.sqrt(np.einsum("nd,nd->", centred, centred, dtype=np.float64) / x.size)
    return (centred / x.dtype.type(size or 1)).astype(np.float32, copy=False)  # 0 of rows that are all the same


def _blocks(rows: int, numbers: int, progress: bool) -> Iterator[slice]:
    """`rows` rows in slices of at most BLOCK numbers, `numbers` a row."""
    step = max(1, BLOCK // numbers)
    starts = tqdm(range(0, rows, step), desc="neighbours", unit="block", delay=2, leave=False, disable=not progress)
    yield from (slice(start, start + step) for start in starts)


def _search(x: Tensor, count: int, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows float32 (N, D) -> indices int64 and distances (N, count) of the nearest others, nearest first; and `sure`.

    Candidates come from a matrix product, which tells nothing about rows that are closer than its rounding; `sure`
    bool (N,) is False where one that is left out might be nearer.
    """
    norms, wide = x.square().sum(1), min(count + SPARE, len(x) - 1)
    rounding = torch.finfo(x.dtype).eps * (x.shape[1] + 4) * (norms + norms.max())  # Higham (2002), section 3.1
    near = torch.empty((len(x), count), dtype=torch.int64, device=x.device)
    lengths = x.new_empty(len(x), count)
    sure = torch.empty(len(x), dtype=torch.bool, device=x.device)  # in place: kept in pieces, glibc's heap tears
    for rows in _blocks(len(x), max(len(x), wide * x.shape[1]), progress):
        part = x[rows]
        rough = _squared_distances(part, x, norms)
        rough.diagonal(rows.start).fill_(torch.inf)
        rough, candidates = rough.topk(wide, largest=False)
        exact, order = (x[candidates] - part[:, None]).norm(dim=-1).sort(stable=True)
        near[rows], lengths[rows] = candidates.gather(1, order)[:, :count], exact[:, :count]
        sure[rows] = exact[:, count - 1].square() + rounding[rows] < rough[:, -1] + norms[rows]
    return near, lengths, sure | (wide == len(x) - 1)


def _squared_distances(queries: Tensor, x: Tensor, norms: Tensor) -> Tensor:
    """(Q, N) of queries (Q, D) to rows x (N, D) with squared norms (N,), less each query's own squared norm."""
    return torch.addmm(norms, queries, x.T, alpha=-2)


def _search_directly(x: Tensor, chosen: Tensor, count: int, progress: bool) -> tuple[Tensor, Tensor]:
    """As `_search` for the `chosen` rows, from differences: exact, and as slow as it has to be."""
    near = torch.empty((len(chosen), count), dtype=torch.int64, device=x.device)
    lengths = x.new_empty(len(chosen), count)
    for rows in _blocks(len(chosen), len(x), progress):
        distances = torch.cdist(x[chosen[rows]], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances.scatter_(1, chosen[rows, None], torch.inf)
        lengths[rows], near[rows] = distances.topk(count, largest=False)
    return near, lengths


@checked
def probe_neighbours(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int] = (1, 3, 10, 30, 100),
    seed: int = 0,
    folds: int = 10,
    control: str = MODEL,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """The k nearest training rows vote, by Euclidean distance of standardised features; a companion without a fit.

    k of each layer, and the layer, are chosen on the same folds as in `probe_layers`; then all of train votes. Of
    classes with as many votes the one with nearer rows wins.

    Args:
        train, test: Features with labels.
        ks: Numbers of neighbours to choose from; those above the rows of a fold are left out.
        seed: Of the folds.
        folds: Of the cross-validation; 1 holds out one tenth.
        control: What the column `control` says.
        device: Where the search runs, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `ProbeResult`, whose `table` is that of `probe_layers` with `k` for C, and without a certificate and
        `log_loss`: a share of votes is no probability, and can be 0 for the right class.

    Raises:
        ValueError: Train and test of other layers, values that are not finite, or `folds` below 1.

    Example:
        >>> voted = lab.probe_neighbours(train, test, ks=[5], folds=2)
        >>> voted.table[["layer", "k", "n_train", "n_test"]]
           layer  k  n_train  n_test
        0      0  5      200     100
        1      1  5      200     100
        2      2  5      200     100
        3      3  5      200     100
    """
    classes, y = np.unique(train.labels, return_inverse=True)
    splits = folds_of(train.labels, folds, seed, train.names)
    ks = [k for k in sorted(ks) if k <= min(len(fit) for fit, _ in splits)]
    device = best_device(device)

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[Probed]:
        for values, others in zip(x, tested, strict=True):
            right = [(_vote(values[fit], y[fit], values[held], ks, device) == y[held]).mean(1) for fit, held in splits]
            scores = np.stack(right)
            place = int(middle_of_best(scores.mean(0)))
            predicted = classes[_vote(values, y, others, [ks[place]], device)[0]]
            row = {"k": ks[place], "validation_accuracy": float(scores[:, place].mean()), "converged": True}
            yield row, predicted, scores[:, place], None

    return layer_by_layer(train, test, probe, facts_of(splits, control, seed), progress)


def _vote(x: np.ndarray, y: np.ndarray, queries: np.ndarray, ks: Sequence[int], device: torch.device) -> np.ndarray:
    """int64 (len(ks), Q): what the nearest of x (N, D) with labels y in [0, K) say of queries (Q, D)."""
    exact = exact_dtype(device)
    narrowed = (torch.as_tensor(values) for values in (x, queries))
    rows, asked = (values.to(device, exact if values.dtype == torch.float64 else values.dtype) for values in narrowed)
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    rows, asked = (rows - mean) / deviation, (asked - mean) / deviation
    votes = torch.nn.functional.one_hot(torch.as_tensor(y, device=device)).to(rows.dtype)
    weight = 1 + 1e-4 / torch.arange(1, max(ks) + 1, device=rows.device)  # nearer rows decide between equals
    norms, answers = (rows**2).sum(1), []
    for some in asked.split(1000):
        nearest = _squared_distances(some, rows, norms).topk(max(ks), largest=False).indices
        counts = (votes[nearest] * weight[:, None]).cumsum(1)
        answers.append(torch.stack([counts[:, k - 1].argmax(1) for k in ks]))
    return torch.cat(answers, 1).cpu().numpy()
