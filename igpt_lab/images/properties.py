"""Properties of images that need no label: colour, brightness, contrast, frequencies, orientation, symmetry.

They are of the image that a network sees: its tokens, looked up in the palette. Letters: N images of H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from igpt_lab.core.arguments import checked
from igpt_lab.images.tokens import tokenize

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: Rec. ITU-R BT.601
ROWS = 1000  # images that are looked at together
TINY = np.finfo(float).tiny


@checked
def image_properties(images: Any, processor: Any, *, cutoff: float = 0.25, progress: bool = True) -> pd.DataFrame:
    """Properties of each image as its tokens show it, for `probe_targets`: no labels are needed.

    Luma is that of Rec. ITU-R BT.601, from 0 to 1. An image of one colour has no high frequencies and no orientation
    (0), and is its own mirror image (1).

    Args:
        images: Palette indices, integers (N, T) of whole images, or what `tokenize` takes.
        processor: The model's image processor, whose palette gives tokens their colours.
        cutoff: Cycles per pixel, from 0 to below 0.5: a frequency above it, in any direction, is high.
        progress: Show a bar while images become tokens.

    Returns:
        A row per image, in order. `red`, `green`, `blue`: the mean colour, in [0, 1]. `brightness`: mean luma, in
        [0, 1]. `contrast`: its standard deviation over pixels (Peli, 1990). `high_frequency`: the share of luma's
        power, without its mean, at spatial frequencies above `cutoff`, in [0, 1]. `orientation_cos`,
        `orientation_sin`: the dominant direction a of luma's gradient by the structure tensor (Bigün and Granlund,
        1987), as c cos 2a and c sin 2a. A direction has no sign, so its angle is doubled; the coherence c is 1 where
        all gradients have one direction, and 0 where none dominates and a means nothing. Cosine 1 is a gradient along
        the rows, as of a vertical edge, -1 one along the columns. `symmetry`: the correlation of luma with its
        left-right mirror image, in [-1, 1].

    Raises:
        ValueError: Tokens that are not those of whole images or not colours of the palette, a `cutoff` out of range,
            or no palette.

    Example:
        >>> table = lab.image_properties(tokens, model.processor)
        >>> table.shape, bool(table.symmetry.between(-1, 1).all())
        ((100, 9), True)
    """
    if not 0 <= cutoff < 0.5:
        raise ValueError(f"cutoff={cutoff}; expected cycles per pixel, from 0 to below 0.5")
    if not hasattr(processor, "decode"):
        what = f"processor of type {type(processor).__name__}"
        raise ValueError(f"{what}; expected the model's image processor, whose palette gives tokens colours")
    tokens = np.asarray(images) if getattr(images, "ndim", 0) == 2 else tokenize(images, processor, progress=progress)
    if not len(tokens):
        raise ValueError(f"tokens {tokens.shape}; expected one image or more")
    parts = np.array_split(tokens, -(-len(tokens) // ROWS))
    return pd.concat([_properties(processor.decode(part) / 255, cutoff) for part in parts], ignore_index=True)


def _properties(rgb: np.ndarray, cutoff: float) -> pd.DataFrame:
    """The table of colours in [0, 1], float64 (N, H, W, 3)."""
    luma = rgb @ LUMA
    centred, flat = luma - luma.mean((1, 2), keepdims=True), np.ptp(luma, axis=(1, 2)) < 1e-9
    means = dict(zip(("red", "green", "blue"), rgb.mean((1, 2)).T, strict=True))
    cosine, sine = _orientation(luma)
    of_shape = {
        "high_frequency": np.where(flat, 0, _high_share(centred, cutoff)),
        "orientation_cos": np.where(flat, 0, cosine),
        "orientation_sin": np.where(flat, 0, sine),
        "symmetry": np.where(flat, 1, _mirrored(centred)),
    }
    return pd.DataFrame(means | {"brightness": luma.mean((1, 2)), "contrast": luma.std((1, 2))} | of_shape)


def _high_share(centred: np.ndarray, cutoff: float) -> np.ndarray:
    """Share (N,) of the power of images (N, H, W) without their means above a radial frequency in cycles per pixel."""
    power = np.abs(np.fft.fft2(centred)) ** 2
    down, right = (np.fft.fftfreq(side) for side in centred.shape[1:])
    high = np.hypot(down[:, None], right) > cutoff
    return power[:, high].sum(1) / np.maximum(power.sum((1, 2)), TINY)


def _orientation(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coherence times cosine and sine, each (N,), of twice the angle of the gradient of images (N, H, W)."""
    if min(luma.shape[1:]) < 2:
        return np.zeros(len(luma)), np.zeros(len(luma))
    down, right = np.gradient(luma, axis=(1, 2))
    energy = np.maximum((right**2 + down**2).sum((1, 2)), TINY)
    return (right**2 - down**2).sum((1, 2)) / energy, 2 * (right * down).sum((1, 2)) / energy


def _mirrored(centred: np.ndarray) -> np.ndarray:
    """Pearson's correlation (N,) of images (N, H, W) without their means with their left-right mirror images."""
    return (centred * centred[:, :, ::-1]).sum((1, 2)) / np.maximum(np.square(centred).sum((1, 2)), TINY)
