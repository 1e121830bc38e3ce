"""Which rows: seeded stratified draws, few per class, and some held out; pure functions of labels and seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igpt_lab.core.arguments import checked


def stratified_draw(labels: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
    """Sorted int64 positions of min(limit, N) of the rows with these labels (N,), each class by its proportion.

    The rows for a smaller limit lie within those for a larger one. Raises ValueError for a limit under 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}; expected at least 1 image")
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels))  # where a row stands in the order of its class, in (0, 1)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        turn[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


@checked
def few_per_class(labels: np.ndarray, k: int, *, seed: int = 0, draw: int = 0, draws: int = 5) -> np.ndarray:
    """k rows of each class that occurs: subset `draw` of `draws`.

    A pure function of the labels, `seed`, k, `draw` and `draws`; draw 0 is the same for any number of draws. The rows
    for a smaller k lie within those for a larger one. Draws start evenly spaced on a circle of the shuffled rows of
    each class: they are disjoint where a class has draws * k rows or more, and else share as few rows as can be on
    average over pairs.

    Args:
        labels: int (N,).
        k: Rows per class, 1 or more.
        seed: Of the shuffle.
        draw: Which subset, 0..draws - 1.
        draws: How many subsets there are.

    Returns:
        int64 (K * k,), sorted positions in `labels`, for K classes.

    Raises:
        ValueError: A class with fewer than k rows, k below 1, or a draw that there is not.

    Example:
        >>> rows = lab.few_per_class(train.labels, 2)
        >>> len(rows), np.bincount(train.labels[rows]).tolist()
        (20, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if k < 1:
        raise ValueError(f"{k} labels per class; expected at least 1")
    if not 0 <= draw < draws:
        raise ValueError(f"draw={draw} of draws={draws}; expected 0 to {draws - 1}")
    chosen = []
    for label, rows in _classes(labels).items():
        if len(rows) < k:
            raise ValueError(f"class {label} has {len(rows)} rows; {k} per class were asked for")
        circle = np.random.default_rng([seed, 0, label]).permutation(rows)
        chosen.append(np.roll(circle, -(draw * len(rows) // draws))[:k])
    return np.sort(np.concatenate(chosen))


def stratified_split(
    labels: np.ndarray, fraction: float, *, seed: int, names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): sorted int64 positions, disjoint and together all; `fraction` of each class is held out.

    Of a class with n rows that is `fraction * n` rounded, at least 1 and at most n - 1. Raises ValueError for n = 1,
    with the class by its name where there are `names`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}; expected a number between 0 and 1")
    held = np.zeros(len(labels), bool)
    for label, rows in _classes(labels).items():
        if len(rows) < 2:
            named = repr(names[label]) if names else label
            raise ValueError(f"class {named} has 1 row; a split needs at least 2 of each class: give more images")
        count = min(max(int(fraction * len(rows) + 0.5), 1), len(rows) - 1)
        held[np.random.default_rng([seed, label]).permutation(rows)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _classes(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each class, in order."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(f"expected labels as integers (N,); these are {labels.dtype} {labels.shape}")
    return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
