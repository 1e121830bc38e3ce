"""Losses of a model over pixels, and the alignment of its input.

For a batch of tokens on the model's device, with gradients: `next_pixel_loss`, `masked_pixel_loss`. Over images of any
number, without: `losses_of`, `masked_loss_of`, and in bits for each pixel `surprisal`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import widened, without_autocast
from igpt_lab.core.progress import tqdm
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.config import ImageGPTConfig

if TYPE_CHECKING:
    from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling


@checked
def align(tokens: Tensor, alignment: str, config: Any) -> Tensor:
    """Pixels (N, T) -> the model's input (N, T): `sos` prepends SOS and drops the last pixel, `raw` changes nothing.

    `record(alignment=)` takes what this made as it is.
    """
    check_alignment(alignment, config)
    if alignment == "raw":
        return tokens
    ids: Any = torch.cat([torch.full_like(tokens[:, :1], config.vocab_size - 1), tokens[:, :-1]], dim=1)
    if not torch.compiler.is_compiling():
        ids.is_aligned = True
    return ids


def is_aligned(ids: Any) -> bool:
    """Whether these are what `align` made of pixels, and no longer pixels."""
    return getattr(ids, "is_aligned", False)


def check_alignment(alignment: str, config: ImageGPTConfig | None = None) -> None:
    """ValueError for an alignment that there is not, or that a model of this `config`, if it is given, cannot have."""
    if alignment not in ("sos", "raw"):
        raise ValueError(f"alignment {alignment!r}; expected 'sos' or 'raw'")
    if alignment == "sos" and getattr(config, "bidirectional", False):
        raise ValueError("alignment 'sos': a bidirectional model has no SOS; use 'raw'")


def check_causal(config: Any) -> None:
    """ValueError for the configuration of a model that does not predict pixels in their order."""
    if getattr(config, "bidirectional", False):
        raise ValueError("a bidirectional (BERT) model predicts hidden pixels, not the next one; use a causal model")


def next_pixel_loss(model: ImageGPTForCausalImageModeling, tokens: Tensor, *, reduction: str = "mean") -> Tensor:
    """Mean over N and all T pixels of -log p(pixel | pixels before it), in nats, for pixels int64 (N, T).

    With `reduction="none"` that of each pixel, (N, T).
    """
    losses = cross_entropy(_next_pixel_logits(model, tokens), tokens, reduction)
    return losses.view_as(tokens) if reduction == "none" else losses


def masked_pixel_loss(model: ImageGPTForCausalImageModeling, tokens: Tensor, masked: Tensor) -> Tensor:
    """Mean over the masked pixels of -log p(pixel | pixels shown), in nats, of a bidirectional model.

    `tokens` int64 (N, T); `masked` (N, T), true or not 0 with 15% in the original's BERT pretraining. Raises ValueError
    where nothing is masked.
    """
    if not masked.is_meta and not masked.any():
        raise ValueError("no pixel is masked; expected at least one, to be scored")
    return model(tokens, masked=masked, labels=tokens).loss


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of -log p over (..., V) and int64 (...) where the label is not -100, in float32 or wider."""
    return F.cross_entropy(widened(logits.flatten(0, -2)), labels.flatten(), reduction=reduction)


@without_autocast()
def losses_of(
    model: ImageGPTForCausalImageModeling,
    tokens: np.ndarray,
    *,
    reduction: str = "image",
    batch_size: int = 64,
    progress: bool = False,
) -> np.ndarray:
    """-log p(pixel | pixels before it) of images as palette indices (N, T), in nats: float64.

    Start token in front, all T pixels scored. `reduction`: "pixel" gives (N, T), "image" (N,) the mean over an image's
    pixels, "all" () the mean over images. Divided by ln 2 they are bits, and the latter two bits per pixel, as a token
    is a pixel. Raises ValueError for another reduction.
    """
    if reduction not in ("pixel", "image", "all"):
        raise ValueError(f"reduction {reduction!r}; expected 'pixel', 'image' or 'all'")
    if not len(tokens):
        return np.zeros((0, *tokens.shape[1:]) if reduction == "pixel" else 0)
    loss = _of_each_pixel if reduction == "pixel" else _of_each_image
    losses = _over(model, tokens, loss, batch_size, progress).astype(np.float64)
    return losses.mean() if reduction == "all" else losses


@without_autocast()
def masked_loss_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, masked: np.ndarray, *, batch_size: int = 64
) -> float:
    """`masked_pixel_loss` of images as palette indices (N, T), mean over all masked pixels, bool (N, T): in nats."""
    tokens = checked_tokens(tokens, model.config)
    total: Tensor | float = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            pixels, hidden = on_device(model, tokens[rows]), on_device(model, masked[rows])
            total += model(pixels, masked=hidden, labels=pixels).loss * hidden.sum()
    return float(total) / int(masked.sum())


@checked
def surprisal(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 32, progress: bool = True
) -> np.ndarray:
    """-log2 p of every pixel after those before it, in bits, float32 (N, T), of images as palette indices (N, T).

    The mean is the loss in bits per pixel: p is over all outcomes of the model, which with tied embeddings are V + 1,
    the start token among them.
    """
    return _over(model, tokens, _bits_of_each_pixel, batch_size, progress)


def surprise(*args, **kwargs) -> np.ndarray:
    """The earlier name of `surprisal`."""
    warnings.warn("`surprise` is now called `surprisal`", DeprecationWarning, stacklevel=2)
    return surprisal(*args, **kwargs)


@torch.no_grad()  # not inference_mode, whose tensors a sharded model may not keep for its next step
def _over(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, loss: Callable, batch_size: int, progress: bool
) -> np.ndarray:
    """`loss(model, pixels)` of all images, a batch at a time."""
    tokens = checked_tokens(tokens, model.config)
    starts = range(0, len(tokens), batch_size)
    bar = tqdm(starts, desc="loss", unit="batch", disable=not progress)
    losses = [loss(model, on_device(model, tokens[start : start + batch_size])) for start in bar]
    return torch.cat(losses).cpu().numpy()


def on_device(model: Any, numbers: np.ndarray) -> Tensor:
    """Numbers of any shape as int64 on the model's device."""
    return torch.as_tensor(np.asarray(numbers, np.int64)).to(model.device)


def _of_each_image(model: ImageGPTForCausalImageModeling, pixels: Tensor) -> Tensor:
    return next_pixel_loss(model, pixels, reduction="none").mean(1)


def _of_each_pixel(model: ImageGPTForCausalImageModeling, pixels: Tensor) -> Tensor:
    """`next_pixel_loss` without a reduction, up to rounding: torch sums in another order over a middle axis.

    Published surprisals were made in this one.
    """
    return F.cross_entropy(_next_pixel_logits(model, pixels).float().transpose(1, 2), pixels, reduction="none")


def _bits_of_each_pixel(model: ImageGPTForCausalImageModeling, pixels: Tensor) -> Tensor:
    return _of_each_pixel(model, pixels) / math.log(2)


def _next_pixel_logits(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    """Logits for pixels (N, T) from the pixels before them: (N, T, V), or V + 1 with tied embeddings."""
    if model.config.bidirectional:
        raise ValueError("a bidirectional model predicts masked pixels, so its loss needs masks: see masked_pixel_loss")
    return model(align(tokens, "sos", model.config), use_cache=False).logits
