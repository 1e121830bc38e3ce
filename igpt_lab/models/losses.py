"""Losses of a model over pixels in nats, their mean or that of each image or pixel; and the alignment of its input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.core.devices import widened
from igpt_lab.models.config import ImageGPTConfig

if TYPE_CHECKING:
    from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling


@torch.inference_mode()
def surprise(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 32, progress: bool = True
) -> np.ndarray:
    """-log2 p of every pixel after those before it, in bits, float32 (N, T), of images as palette indices (N, T)."""
    tokens, bits = torch.as_tensor(np.asarray(tokens, np.int64)), []
    for batch in tqdm(tokens.split(batch_size), desc="surprise", disable=not progress):
        batch = batch.to(model.device)
        logits = model(align(batch, "sos", model.config), use_cache=False).logits[..., : model.config.n_colours]
        nats = F.cross_entropy(logits.float().transpose(1, 2), batch, reduction="none")
        bits.append((nats / math.log(2)).cpu())
    return torch.cat(bits).numpy()


def align(tokens: Tensor, alignment: str, config: ImageGPTConfig) -> Tensor:
    """Pixels (N, T) -> the model's input (N, T): `sos` prepends SOS and drops the last pixel, `raw` changes nothing."""
    check_alignment(alignment, config)
    if alignment == "raw":
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], config.vocab_size - 1), tokens[:, :-1]], dim=1)


def check_alignment(alignment: str, config: ImageGPTConfig | None = None) -> None:
    """ValueError for an alignment that there is not, or that a model of this `config`, if it is given, cannot have."""
    if alignment not in ("sos", "raw"):
        raise ValueError(f"alignment {alignment!r}; expected 'sos' or 'raw'")
    if alignment == "sos" and getattr(config, "bidirectional", False):
        raise ValueError("alignment 'sos': a bidirectional model has no SOS; use 'raw'")


def next_pixel_loss(model: ImageGPTForCausalImageModeling, tokens: Tensor, *, reduction: str = "mean") -> Tensor:
    """Mean over N and all T pixels of -log p(pixel | pixels before it), in nats, for pixels int64 (N, T).

    With `reduction="none"` that of each pixel, (N, T).
    """
    if model.config.bidirectional:
        raise ValueError("a bidirectional model predicts masked pixels, so its loss needs masks: see masked_pixel_loss")
    found = cross_entropy(model(align(tokens, "sos", model.config), use_cache=False).logits, tokens, reduction)
    return found.view_as(tokens) if reduction == "none" else found


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


@torch.no_grad()  # not inference_mode, whose tensors a sharded model may not keep for its next step
def losses_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 64, progress: bool = False
) -> np.ndarray:
    """-log p(pixel | pixels before it), its mean over each image of palette indices (N, T): float64 (N,), in nats.

    Start token in front, all T pixels scored. Divided by ln 2 they are bits per pixel, as a token is a pixel.
    """
    found = []
    for start in tqdm(range(0, len(tokens), batch_size), desc="loss", unit="batch", disable=not progress):
        pixels = torch.as_tensor(tokens[start : start + batch_size].astype(np.int64)).to(model.device)
        found.append(next_pixel_loss(model, pixels, reduction="none").mean(1))
    return torch.cat(found).cpu().numpy().astype(np.float64) if found else np.zeros(0)


def next_pixel_loss_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 64, progress: bool = False
) -> float:
    """Mean of `losses_of`, in nats per token."""
    return float(losses_of(model, tokens, batch_size=batch_size, progress=progress).mean())
