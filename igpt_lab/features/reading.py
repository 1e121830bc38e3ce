"""Images -> what a network takes of them: the user's `preprocess`, in threads that read ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_lab.features.modules import Inputs, described, in_a_line
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.opening import BadImage
from igpt_lab.images.tokens import Part


class Batch(NamedTuple):
    """Inputs of the images at `positions` of a set, and (row, reason) of those left out."""

    positions: np.ndarray
    inputs: Inputs
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class Reader:
    """Images -> what a network takes of them, by the user's `preprocess`; `skips` those that cannot be decoded."""

    preprocess: Callable[[Image.Image], Any]
    skips: bool

    def read(self, picture: Image.Image) -> Inputs:
        """Of one picture, without a first axis; ValueError for what is no tensor."""
        made = self.preprocess(picture)
        if isinstance(made, Mapping):
            if not made:
                raise ValueError("preprocess gives a dict of nothing; expected what the network's arguments are called")
            return {str(name): _only(as_tensor(value), str(name)) for name, value in made.items()}
        return {"": as_tensor(made)}

    def ahead(self, part: Part, size: int, like: Inputs, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """A part's images in batches of `size`, read in the threads of `pool` while the batch before is computed."""
        coming: deque[list[Future]] = deque()
        try:
            for start in range(0, len(part.positions), size):
                some = part.positions[start : start + size].tolist()
                coming.append([pool.submit(self._one, part.images, position, like) for position in some])
                if len(coming) > 1:
                    yield _together([future.result() for future in coming.popleft()])
            while coming:
                yield _together([future.result() for future in coming.popleft()])
        finally:
            for future in (future for futures in coming for future in futures):
                future.cancel()

    def _one(self, images: ImageSet | TokenSet, position: int, like: Inputs) -> tuple[int, Inputs | tuple[int, str]]:
        """An image as inputs of the shapes of `like`, or (row, reason) where it is left out."""
        try:
            picture = images[position]
        except BadImage as error:
            if not self.skips:
                raise ValueError(f"{error} (on_bad_image='skip' leaves such images out)") from error
            return position, (int(images.index[position]), str(error))
        row = f"{images.name} {images.split} row {images.index[position]}"
        try:
            inputs = self.read(picture)
        except Exception as error:  # it is the user's function
            raise ValueError(f"preprocess fails on {row}: {type(error).__name__} {error}") from error
        shapes, expected = ([(name, x.shape, x.dtype) for name, x in held.items()] for held in (inputs, like))
        if shapes != expected:
            raise ValueError(
                f"preprocess gives {described(inputs)} for {row}, and {described(like)} for the first image; let it "
                "resize"
            )
        return position, inputs


def _together(read: Sequence[tuple[int, Inputs | tuple[int, str]]]) -> Batch:
    inputs = [made for _, made in read if isinstance(made, dict)]
    positions = np.array([position for position, made in read if isinstance(made, dict)], np.int64)
    skipped = [made for _, made in read if not isinstance(made, dict)]
    stacked = {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]} if inputs else {}
    return Batch(positions, stacked, skipped)


def floats(picture: Image.Image) -> Tensor:
    """float32 (3, H, W) in [0, 1] of an RGB picture: what a network gets without a `preprocess`."""
    return torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1) / 255)


def as_tensor(value: Any) -> Tensor:
    """A tensor on the CPU, of whole numbers int64; ValueError for what is none, such as a picture."""
    expected = f"preprocess gives a {type(value).__name__}; expected a tensor, an array, or a dict of these"
    if isinstance(value, Image.Image) or value is None:
        raise ValueError(expected)
    try:
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            value = torch.stack(list(value))
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:  # words, lists of several lengths, the meta device
        raise ValueError(f"{expected} ({in_a_line(error)})") from error
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.long() if is_whole else tensor


def _only(value: Tensor, name: str) -> Tensor:
    """What a dict has of its only image."""
    if not value.ndim or len(value) != 1:
        raise ValueError(f"preprocess gives {name} {tuple(value.shape)}; expected a first axis of 1, for the one image")
    return value[0]


def first_picture(images: ImageSet | TokenSet) -> Image.Image:
    """The first image that can be decoded; ValueError where there is none."""
    problem: Exception | None = None
    for position in range(len(images)):
        try:
            return images[position]
        except BadImage as error:
            problem = problem or error
    raise ValueError(f"{images.name} {images.split} has no image that can be read") from problem
