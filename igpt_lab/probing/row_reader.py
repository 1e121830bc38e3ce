"""Rows of a feature store too large for memory: measured in one pass, then read in a seeded shuffled order.

At no time are there more rows in memory than `buffer` (or the largest row group, if that is more), twice a row group,
and a batch. Beside them each row costs 8 bytes at most, for the classes of its row group.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.features.store import FeatureStore

BUFFER = 2**30  # bytes of the rows that are shuffled together, where `buffer` is None
FIT, HELD = 0, 1  # the sides of a split


@dataclass(frozen=True, eq=False)
class Measured:
    """What a first pass finds in a split whose rows are of two sides, those to fit and those held out.

    `groups` are (part, row group, rows), `present` the classes in each, `counts` its rows int (G, 2) by side.
    `moments` are for each side its rows, their mean and the sum of squares about it, float64 (B, D).
    """

    holdout: float
    seed: int
    groups: list[tuple[int, int, int]]
    counts: np.ndarray
    classes: np.ndarray
    present: list[np.ndarray]
    moments: list[tuple[int, np.ndarray, np.ndarray]]
    seconds: float

    def scaling(self, sides: Sequence[int]) -> np.ndarray:
        """Mean and standard deviation, float64 (2, B, 1, D), over `sides`; 1 for a deviation of rounding alone."""
        count, mean, squares = functools.reduce(_merged, [self.moments[side] for side in sides])
        deviation = np.sqrt(squares / count)
        varies = deviation > 10 * np.finfo(np.float32).eps * np.abs(mean)
        return np.stack([mean, np.where(varies, deviation, 1)])[:, :, None]


def sides_of(index: np.ndarray, holdout: float, seed: int) -> np.ndarray:
    """int (n,), HELD for about `holdout` of the rows and so of each class: a hash of a row in its source and `seed`."""
    start = np.random.default_rng([seed, 14]).integers(2**63, dtype=np.uint64)
    return np.where(pd.util.hash_array(index.astype(np.uint64) + start) < holdout * 2.0**64, HELD, FIT)


def measure(
    store: FeatureStore, split: str, names: Sequence[str], *, holdout: float, seed: int, progress: bool = False
) -> Measured:
    """One pass over a split's columns `names`; ValueError for rows without a label, and values that are not finite."""
    groups, begun = store.row_groups(split), time.perf_counter()
    counts, present, moments = [], [], [(0, np.zeros(()), np.zeros(()))] * 2
    for part, group, _ in tqdm(groups, desc="mean and variance", unit="part", disable=not progress):
        found = store.row_group(split, part, group, ["index", "label", *names])
        if bad := np.sum(found["label"] < 0):
            raise ValueError(f"a probe needs labels, and {store.part(split, part)} has {bad} rows without one")
        sides = sides_of(found["index"], holdout, seed)
        for side in (FIT, HELD):
            moments[side] = _merged(moments[side], _moments([found[name] for name in names], sides == side))
            if not np.isfinite(moments[side][2]).all():
                raise ValueError(f"{store.part(split, part)} has values that are not finite; see the store's stats()")
        counts.append(np.bincount(sides, minlength=2))
        present.append(np.unique(found["label"]))
    classes, total = np.unique(np.concatenate([[], *present])).astype(np.int64), np.sum(counts, axis=0)
    if len(classes) < 2 or not np.all(total):
        raise ValueError(
            f"{split} has {len(classes)} classes and rows to fit and held out {total}, by holdout={holdout}; expected "
            "two classes or more, and rows of both kinds"
        )
    return Measured(holdout, seed, groups, np.array(counts), classes, present, moments, time.perf_counter() - begun)


def _moments(layers: list[np.ndarray], rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Of layers (n, D) at `rows` bool (n,) their count, mean and sum of squares about it, float64 (B, D)."""
    if not rows.any():
        return 0, np.zeros(()), np.zeros(())
    parts = (x[rows].astype(np.float64) for x in layers)
    means, squares = zip(*((mean := x.mean(0), ((x - mean) ** 2).sum(0)) for x in parts), strict=True)
    return int(rows.sum()), np.stack(means), np.stack(squares)


def _merged(one: tuple, other: tuple) -> tuple[int, np.ndarray, np.ndarray]:
    """Moments of two sets of rows together (Chan, Golub and LeVeque, 1983)."""
    (n, mean, squares), (more, theirs, their_squares) = one, other
    share, shift = more / max(1, n + more), theirs - mean
    return n + more, mean + share * shift, squares + their_squares + n * share * shift**2


class Rows:
    """Rows of a split on a device, float32 (B, n, D + 1): standardised, with a constant 1 as the last feature.

    Of a `measured` split they are those of `sides`, with labels; of one that is not measured all, and no label is read.
    """

    def __init__(
        self,
        store: FeatureStore,
        split: str,
        names: Sequence[str],
        scaling: np.ndarray,
        *,
        measured: Measured | None = None,
        sides: Sequence[int] = (FIT, HELD),
        device: str | torch.device = "cpu",
    ):
        self.store, self.split, self.names, self.measured, self.sides = store, split, list(names), measured, list(sides)
        self.groups = measured.groups if measured else store.row_groups(split)
        self.counts = measured.counts[:, self.sides].sum(1) if measured else np.array([n for *_, n in self.groups], int)
        self.mean, self.scale = torch.as_tensor(scaling, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def read(self, number: int) -> tuple[Tensor, Tensor | None]:
        """x (B, n, D + 1) of row group `number`, and y int64 (n,) in [0, K)."""
        part, group, _ = self.groups[number]
        beside = ["index", "label"] if self.measured else []
        found, keep, y = self.store.row_group(self.split, part, group, [*self.names, *beside]), slice(None), None
        if self.measured:
            keep = np.isin(sides_of(found["index"], self.measured.holdout, self.measured.seed), self.sides)
            y = torch.as_tensor(np.searchsorted(self.measured.classes, found["label"][keep])).to(self.mean.device)
        x = self.mean.new_ones(len(self.names), int(self.counts[number]), self.mean.shape[2] + 1)
        for layer, name in zip(x, self.names, strict=True):
            layer[:, :-1] = torch.as_tensor(found[name][keep].copy())  # torch takes no array that is read-only
        x[..., :-1].sub_(self.mean).div_(self.scale)
        return x, y

    def scan(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All rows once, in the order of the store, at most `size` at a time."""
        for number in range(len(self.groups)):
            x, y = self.read(number)
            for at in range(0, x.shape[1], size):
                yield x[:, at : at + size], None if y is None else y[at : at + size]


class Shuffled:
    """Labelled rows in batches: row groups in a shuffled order, and rows shuffled among those that fill the buffer.

    Every row comes once an epoch, and a batch may reach over from one epoch into the next.
    """

    def __init__(self, rows: Rows, buffer: int | None = None):
        self.rows, self.seed, row = rows, rows.measured.seed, 4 * len(rows.names) * (rows.mean.shape[2] + 1)
        self.buffer = min(len(rows), max(buffer or BUFFER // row, int(rows.counts.max())))
        self.x = self.y = self.loaded = None

    def windows(self, epoch: int) -> list[list[int]]:
        """Row groups in the order of an epoch, as many together as the buffer has room for."""
        windows, room = [], 0
        for number in np.random.default_rng([self.seed, 15, epoch]).permutation(len(self.rows.groups)).tolist():
            if self.rows.counts[number] > room or not windows:
                windows, room = [*windows, []], self.buffer
            windows[-1].append(number)
            room -= self.rows.counts[number]
        return windows

    def fewest_classes(self) -> int:
        """In a full buffer of the first epoch."""
        windows = self.windows(0)
        present = [np.concatenate([self.rows.measured.present[n] for n in each]) for each in windows[:-1] or windows]
        return min(len(np.unique(each)) for each in present)

    def batches(self, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """x (B, size, D + 1) and y (size,) of step `start` and all that follow, without end."""
        rest, missing = [], size
        for order in self._orders(start * size):
            while len(order):
                some, order = order[:missing], order[missing:]
                rest.append((self.x.index_select(1, some), self.y.index_select(0, some)))
                missing -= len(some)
                if not missing:
                    xs, ys = zip(*rest, strict=True)
                    yield (torch.cat(xs, 1), torch.cat(ys)) if len(rest) > 1 else rest[0]
                    rest, missing = [], size

    def _orders(self, skip: int) -> Iterator[Tensor]:
        """Windows loaded in turn, and of each the places of its rows, shuffled; not of the first `skip` rows of all."""
        first, skip = divmod(skip, len(self.rows))
        for epoch in itertools.count(first):
            for number, window in enumerate(self.windows(epoch)):
                count = int(self.rows.counts[window].sum())
                if skip < count:
                    order = np.random.default_rng([self.seed, 16, epoch, number]).permutation(count)[skip:]
                    self._load(sorted(window))
                    yield torch.as_tensor(order).to(self.y.device)
                skip = max(0, skip - count)

    def _load(self, window: list[int]) -> None:
        if window == self.loaded:
            return
        if self.x is None:
            mean = self.rows.mean
            self.x = mean.new_empty(len(self.rows.names), self.buffer, mean.shape[2] + 1)
            self.y = mean.new_empty(self.buffer, dtype=torch.int64)
        at, self.loaded = 0, window
        for number in window:
            end = at + int(self.rows.counts[number])
            self.x[:, at:end], self.y[at:end] = self.rows.read(number)
            at = end
