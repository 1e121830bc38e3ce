"""Augmentation of fine-tuning: images are mirrored and cropped, or their tokens are, to the same end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.training.settings import FinetuneConfig


def augmentation(
    images: ImageSet | TokenSet,
    tokens: np.ndarray,
    processor: ImageGPTImageProcessorPil | None,
    tuning: FinetuneConfig,
) -> Callable[[np.ndarray, int], np.ndarray]:
    """The function that gives the tokens (n, T) of rows (n,), moved at random, a function of the seed and the step.

    `tokens` (N, T) are those of the images, before any of them is moved.
    """
    if not tuning.flip and not tuning.pad:
        return lambda rows, step: tokens[rows]
    if tuning.augment == "tokens":
        return partial(_move_tokens, tokens, tuning)
    if isinstance(images, TokenSet) or processor is None:
        raise ValueError(f"augment={tuning.augment!r} of {images.name}; expected images, and a model with a palette")
    return partial(_move_images, images, processor, tuning)


def _moves(tuning: FinetuneConfig, count: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images of a step are mirrored, bool (n,), and the corners of their crops, (n, 2)."""
    random = np.random.default_rng([tuning.seed, 4, step])
    flipped = random.random(count) < 0.5 * tuning.flip
    return flipped, random.integers(0, 2 * tuning.pad + 1, (count, 2))


def _move_tokens(tokens: np.ndarray, tuning: FinetuneConfig, rows: np.ndarray, step: int) -> np.ndarray:
    side = math.isqrt(tokens.shape[1])
    flipped, corners = _moves(tuning, len(rows), step)
    return moved(tokens[rows].reshape(-1, side, side), flipped, corners, tuning.pad).reshape(len(rows), -1)


def _move_images(
    images: ImageSet, processor: ImageGPTImageProcessorPil, tuning: FinetuneConfig, rows: np.ndarray, step: int
) -> np.ndarray:
    """Tokens of the images, each of which has a size of its own, moved before they are resized."""
    flipped, corners = _moves(tuning, len(rows), step)
    pictures = (np.asarray(images[row])[None] for row in rows)
    return processor.encode(
        moved(picture, flipped[[i]], corners[[i]], tuning.pad)[0] for i, picture in enumerate(pictures)
    )


def moved(images: np.ndarray, flipped: np.ndarray, corners: np.ndarray, pad: int) -> np.ndarray:
    """Images or tokens (n, H, W, ...), mirrored where bool (n,) says so, reflected `pad` around and cropped again.

    `corners`: (n, 2), the crop's upper left in the padded image, 0 to 2 pad. Pixels move and none is computed, so to
    move the tokens of an image is to move the image.
    """
    height, width = images.shape[1:3]
    mirrored = np.where(flipped.reshape(-1, *[1] * (images.ndim - 1)), images[:, :, ::-1], images)
    padded = np.pad(mirrored, [(0, 0), (pad, pad), (pad, pad), *[(0, 0)] * (images.ndim - 3)], mode="reflect")
    return np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])
