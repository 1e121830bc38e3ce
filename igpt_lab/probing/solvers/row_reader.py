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

from igpt_lab.core.progress import tqdm
from igpt_lab.features.store import FeatureStore
from igpt_lab.probing.solvers.objective import scale_of

BUFFER = 2**30  # bytes of the rows that are shuffled together, where `buffer` is None
FIT, HELD = 0, 1  # the sides of a split


@dataclass(frozen=True, eq=False)
class Moments:
    """Of some rows their number, and for B layers their mean and the sum of squares about it, float64 (B, D)."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    def merged(self, other: Moments) -> Moments:
        """Those of both sets of rows together (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        share = other.count / max(1, count)
        shift = other.mean - self.mean
        squares = self.squares + other.squares + self.count * share * shift**2
        return Moments(count, self.mean + share * shift, squares)


NO_ROWS = Moments(0, np.zeros(()), np.zeros(()))


@dataclass(frozen=True, eq=False)
class Measured:
    """What a first pass says of a split whose rows are of two sides, those to fit and those held out.

    `groups`: (part, row group, rows) of the G row groups; `counts`: int (G, 2), their rows by side; `present`: of each
    the classes. `classes`: int64 (K,), all of them in order. `moments`: by side. `seconds`: what the pass took.
    """

    holdout: float
    seed: int
    groups: list[tuple[int, int, int]]
    counts: np.ndarray
    classes: np.ndarray
    present: list[np.ndarray]
    moments: list[Moments]
    seconds: float

    def scaling(self, sides: Sequence[int]) -> np.ndarray:
        """Mean and standard deviation, float64 (2, B, 1, D), over `sides`; 1 for a deviation of rounding alone."""
        of_sides = functools.reduce(Moments.merged, [self.moments[side] for side in sides])
        variance = torch.from_numpy(of_sides.squares / of_sides.count)
        scale = scale_of(torch.from_numpy(of_sides.mean), variance, torch.float32)
        return np.stack([of_sides.mean, scale.numpy()])[:, :, None]


def sides_of(index: np.ndarray, holdout: float, seed: int) -> np.ndarray:
    """int (n,), HELD for about `holdout` of the rows and so of each class: a hash of a row in its source and `seed`."""
    start = np.random.default_rng([seed, 14]).integers(2**63, dtype=np.uint64)
    return np.where(pd.util.hash_array(index.astype(np.uint64) + start) < holdout * 2.0**64, HELD, FIT)


def measure(
    store: FeatureStore, split: str, names: Sequence[str], *, holdout: float, seed: int, progress: bool = False
) -> Measured:
    """One pass over a split's columns `names`; ValueError for rows without a label, and values that are not finite."""
    groups, begun = store.row_groups(split), time.perf_counter()
    counts, present = [], []
    moments = [NO_ROWS, NO_ROWS]
    for part, group, _ in tqdm(groups, desc="mean and variance", unit="part", disable=not progress):
        columns = store.row_group(split, part, group, ["index", "label", *names])
        unlabelled = np.sum(columns["label"] < 0)
        if unlabelled:
            raise ValueError(f"a probe needs labels, and {store.part(split, part)} has {unlabelled} rows without one")
        sides = sides_of(columns["index"], holdout, seed)
        for side in (FIT, HELD):
            moments[side] = moments[side].merged(_moments([columns[name] for name in names], sides == side))
            if not np.isfinite(moments[side].squares).all():
                raise ValueError(f"{store.part(split, part)} has values that are not finite; see the store's stats()")
        counts.append(np.bincount(sides, minlength=2))
        present.append(np.unique(columns["label"]))
    classes, total = np.unique(np.concatenate([[], *present])).astype(np.int64), np.sum(counts, axis=0)
    if len(classes) < 2 or not np.all(total):
        raise ValueError(
            f"{split} has {len(classes)} classes and rows to fit and held out {total}, by holdout={holdout}; expected "
            "two classes or more, and rows of both kinds"
        )
    return Measured(holdout, seed, groups, np.array(counts), classes, present, moments, time.perf_counter() - begun)


def _moments(layers: list[np.ndarray], rows: np.ndarray) -> Moments:
    """Of layers (n, D) at `rows` bool (n,)."""
    if not rows.any():
        return NO_ROWS
    if len(widths := {layer.shape[1] for layer in layers}) > 1:
        raise ValueError(f"layers of several widths, {sorted(widths)}; stream those of one width, named by layers=")
    means, squares = [], []
    for layer in layers:
        x = layer[rows].astype(np.float64)
        mean = x.mean(0)
        means.append(mean)
        squares.append(((x - mean) ** 2).sum(0))
    return Moments(int(rows.sum()), np.stack(means), np.stack(squares))


class Rows:
    """Rows of a split on a device, float32 (B, n, D + 1): standardised, with a constant 1 as the last feature.

    Of a `measured` split they are those of `sides`, with labels; of one that is not measured all, and no label is read.
    `scaling` is that of `Measured.scaling`; `counts` int (G,) are the rows of each row group.
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
        self.store, self.split = store, split
        self.names, self.sides = list(names), list(sides)
        self._measured = measured
        if measured is None:
            self.groups = store.row_groups(split)
            self.counts = np.array([n for *_, n in self.groups], int)
        else:
            self.groups = measured.groups
            self.counts = measured.counts[:, self.sides].sum(1)
        self.mean, self.scale = torch.as_tensor(scaling, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def measured(self) -> Measured:
        """What is known of the split; ValueError where it was not measured, and so has no labels here."""
        if self._measured is None:
            raise ValueError(f"the rows of {self.split} were not measured; pass measured=measure(...) to have labels")
        return self._measured

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """x (B, n, D + 1) of row group `number`, and y int64 (n,) in [0, K), or -1 where no label is read."""
        part, group, _ = self.groups[number]
        beside = [] if self._measured is None else ["index", "label"]
        columns = self.store.row_group(self.split, part, group, [*self.names, *beside])
        keep, y = self._labels_of(columns, int(self.counts[number]))
        x = self.mean.new_ones(len(self.names), int(self.counts[number]), self.mean.shape[2] + 1)
        for layer, name in zip(x, self.names, strict=True):
            layer[:, :-1] = torch.as_tensor(columns[name][keep].copy())  # torch takes no array that is read-only
        x[..., :-1].sub_(self.mean).div_(self.scale)
        return x, y

    def _labels_of(self, columns: dict[str, np.ndarray], count: int) -> tuple[slice | np.ndarray, Tensor]:
        """Which rows of a row group are of `sides`, and the labels of these `count` rows."""
        if self._measured is None:
            return slice(None), torch.full((count,), -1, device=self.mean.device)
        keep = np.isin(sides_of(columns["index"], self._measured.holdout, self._measured.seed), self.sides)
        places = np.searchsorted(self._measured.classes, columns["label"][keep])
        return keep, torch.as_tensor(places).to(self.mean.device)

    def scan(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once, in the order of the store, at most `size` at a time, as `read` gives them."""
        for number in range(len(self.groups)):
            x, y = self.read(number)
            for start in range(0, x.shape[1], size):
                yield x[:, start : start + size], y[start : start + size]


class Shuffled:
    """Labelled rows in batches: row groups in a shuffled order, and rows shuffled among those that fill the buffer.

    Every row comes once an epoch, and a batch may reach over from one epoch into the next. `buffer`: in rows, when None
    as many as `BUFFER` bytes hold, and never fewer than the largest row group has.
    """

    def __init__(self, rows: Rows, buffer: int | None = None):
        self.rows, self.seed = rows, rows.measured.seed
        row_bytes = 4 * len(rows.names) * (rows.mean.shape[2] + 1)
        self.buffer = min(len(rows), max(buffer or BUFFER // row_bytes, int(rows.counts.max())))
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.loaded: list[int] = []

    def windows(self, epoch: int) -> list[list[int]]:
        """Row groups in the order of an epoch, as many together as the buffer has room for."""
        windows: list[list[int]] = []
        room = 0
        for number in np.random.default_rng([self.seed, 15, epoch]).permutation(len(self.rows.groups)).tolist():
            if self.rows.counts[number] > room or not windows:
                windows.append([])
                room = self.buffer
            windows[-1].append(number)
            room -= self.rows.counts[number]
        return windows

    def fewest_classes(self) -> int:
        """The least number of classes in a full buffer of the first epoch."""
        windows, present = self.windows(0), self.rows.measured.present
        full = windows[:-1] or windows
        return min(len(np.unique(np.concatenate([present[number] for number in window]))) for window in full)

    def batches(self, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """x (B, size, D + 1) and y (size,) of step `start` and all that follow, without end."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        missing = size
        for x, y, order in self._windows_in_turn(start * size):
            while len(order):
                places, order = order[:missing], order[missing:]
                xs.append(x.index_select(1, places))
                ys.append(y.index_select(0, places))
                missing -= len(places)
                if not missing:
                    yield (torch.cat(xs, 1), torch.cat(ys)) if len(xs) > 1 else (xs[0], ys[0])
                    xs, ys = [], []
                    missing = size

    def _windows_in_turn(self, skip: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The buffer's x and y for each window, and the places of its rows, shuffled, but the first `skip` of all."""
        first, skip = divmod(skip, len(self.rows))
        for epoch in itertools.count(first):
            for number, window in enumerate(self.windows(epoch)):
                count = int(self.rows.counts[window].sum())
                if skip < count:
                    order = np.random.default_rng([self.seed, 16, epoch, number]).permutation(count)[skip:]
                    x, y = self._load(sorted(window))
                    yield x, y, torch.as_tensor(order).to(y.device)
                skip = max(0, skip - count)

    def _load(self, window: list[int]) -> tuple[Tensor, Tensor]:
        """The buffer, x (B, buffer, D + 1) and y (buffer,), with the rows of a window at its front."""
        if self.x is None or self.y is None:
            mean = self.rows.mean
            self.x = mean.new_empty(len(self.rows.names), self.buffer, mean.shape[2] + 1)
            self.y = mean.new_empty(self.buffer, dtype=torch.int64)
        if window != self.loaded:
            start, self.loaded = 0, window
            for number in window:
                end = start + int(self.rows.counts[number])
                self.x[:, start:end], self.y[start:end] = self.rows.read(number)
                start = end
        return self.x, self.y
