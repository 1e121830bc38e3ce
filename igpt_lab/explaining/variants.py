"""Changed copies of a model for `passes`: with a part left out, or with a window of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from igpt_lab.explaining.edits import Edits, edit, window
from igpt_lab.explaining.parts import constant, means_of, resample, skip
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling


@dataclass(frozen=True)
class Variant:
    """A changed model: its columns of the table, its first changed block, and the `with` block of a model and n images.

    `skipped`: that block does nothing, so it does not run.
    """

    columns: dict[str, Any]
    first: int
    changed: Callable[[ImageGPTForCausalImageModeling, int], AbstractContextManager]
    skipped: bool = False


def without_parts(
    model: ImageGPTForCausalImageModeling, parts: Sequence[str], kind: str, blocks: list[int],
    train_tokens: np.ndarray | None, batch_size: int | None, progress: bool,
) -> list[Variant]:  # fmt: skip
    """The model with each part of each block left out."""
    means: dict = {}
    if kind == "mean":
        if train_tokens is None:
            raise ValueError("kind 'mean' needs train_tokens: a mean over test images would make each depend on all")
        means = means_of(model, train_tokens, parts, layers=blocks, batch_size=batch_size, progress=progress)
    variants = []
    for part in parts:
        for layer in blocks:
            for head in range(model.config.n_head) if part == "head" else (None,):
                columns = {"part": part, "layer": layer, "head": head, "kind": kind}
                block = _Without(part, layer, head, kind, means.get((part, layer)))
                variants.append(Variant(columns, layer, block, skipped=(part, kind) == ("block", "skip")))
    return variants


def with_windows(
    model: ImageGPTForCausalImageModeling, radii: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> list[Variant]:
    """The model with each window of attention in each range of blocks; ValueError for one that there is not."""
    variants = []
    for pair in ranges:
        first, last = _range(pair, model.config.n_layer)
        for radius in radii:
            with window(model, radius):  # says what is wrong with it before any work
                columns = {"radius": radius, "first": first, "last": last}
            variants.append(Variant(columns, first, _Window(radius, range(first, last + 1))))
    return variants


def _range(pair: Any, blocks: int) -> tuple[int, int]:
    """The first and the last block of a range, checked."""
    numbers = pair if isinstance(pair, tuple | list) else ()
    if len(numbers) != 2 or not all(isinstance(number, int | np.integer) for number in numbers):
        raise ValueError(f"range {pair!r}; expected two whole numbers, the first block and the last")
    first, last = numbers
    if not 0 <= first <= last < blocks:
        raise ValueError(
            f"blocks {first} to {last}; expected the first and then the last, of this model's blocks 0..{blocks - 1}"
        )
    return int(first), int(last)


@dataclass(frozen=True)
class _Without:
    """A part left out; called with the n images of a batch, behind which their donors stand if there are any."""

    part: str
    layer: int
    head: int | None
    kind: str
    mean: Tensor | None

    def __call__(self, model: ImageGPTForCausalImageModeling, n: int) -> AbstractContextManager:
        return edit(model, self._edits(model, n))

    def _edits(self, model: ImageGPTForCausalImageModeling, n: int) -> Edits:
        place = model, self.part, self.layer
        if self.kind == "resample":
            return resample(*place, np.tile(np.arange(n, 2 * n), 2), head=self.head)
        if self.mean is not None:
            return constant(*place, self.mean, head=self.head)
        return skip(*place, head=self.head)


@dataclass(frozen=True)
class _Window:
    radius: int
    blocks: range

    def __call__(self, model: ImageGPTForCausalImageModeling, n: int) -> AbstractContextManager:
        return window(model, self.radius, layers=self.blocks)
