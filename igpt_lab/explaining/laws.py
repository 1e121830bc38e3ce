"""Laws that the reading instruments keep on any causal model, each as a distance that is 0 but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_lab.explaining.attribution import attribute_logits
from igpt_lab.explaining.edits import edit
from igpt_lab.explaining.lenses import head_logits, lens_tokens, logit_lens
from igpt_lab.features.hooks import record
from igpt_lab.models.losses import align, losses_of, on_device


def lens_against_loss(model: Any, tokens: np.ndarray) -> float:
    """|the lens at layer L - the model's loss|, in nats."""
    last = logit_lens(model, tokens, layers=[len(model.transformer.h)], progress=False)
    return abs(float(last.nats.iloc[0]) - float(losses_of(model, lens_tokens(model, tokens), reduction="all")))


def lens_against_skip(model: Any, tokens: np.ndarray, layer: int) -> float:
    """Largest difference of logits between the lens of a layer and the model without blocks layer..L-1."""
    pixels = on_device(model, lens_tokens(model, tokens))
    by_lens = lens_logits(model, pixels, layer)
    with torch.no_grad(), without_blocks_from(model, layer):
        skipped = model(align(pixels, "sos", model.config), use_cache=False).logits
    return float((by_lens - skipped).abs().max())


@torch.no_grad()
def own_patch(model: Any, tokens: np.ndarray, layer: int) -> float:
    """Largest difference of logits when what a block's parts give is put in the place of itself."""
    pixels, points = align(on_device(model, lens_tokens(model, tokens)), "sos", model.config), ("attn_out", "mlp_out")
    with record(model, points, layers=[layer], pool=lambda states, *_: states) as pooled:
        logits = model(pixels, use_cache=False).logits
    own = [pooled[point][:, 0] for point in points]
    with edit(model, {(points[0], layer): lambda _: own[0], (points[1], layer): lambda _: own[1]}):
        patched = model(pixels, use_cache=False).logits
    return float((patched - logits).abs().max())


def state_0_spread(model: Any, tokens: np.ndarray) -> float:
    """Largest difference between images of the state at position 0, over the largest value of the layer.

    It has seen the start token alone.
    """
    pixels = on_device(model, lens_tokens(model, tokens))
    with torch.no_grad(), record(model, ["resid_pre"], pool="at:0", alignment="sos") as pooled:
        pooled.run(pixels, use_cache=False)
    states = pooled["resid_pre"]
    return float(((states - states[:1]).abs().amax((0, 2)) / states.abs().amax((0, 2))).max())


def attribution_error(model: Any, tokens: np.ndarray, position: int = -1) -> float:
    """Largest |sum of all components - logit| at one position, by heads."""
    tokens = lens_tokens(model, tokens)
    position = position % tokens.shape[1]
    parts, _ = attribute_logits(model, tokens, position, heads=True)
    with torch.no_grad():
        logits = model(align(on_device(model, tokens), "sos", model.config), use_cache=False).logits
    return float(np.abs(parts.sum(1) - logits[:, position, : parts.shape[-1]].cpu().numpy()).max())


@contextmanager
def without_blocks_from(model: Any, layer: int) -> Iterator[None]:
    """A block in which the model ends after block layer - 1: the same weights, and afterwards all blocks again."""
    blocks = model.transformer.h
    try:
        model.transformer.h = nn.ModuleList(blocks[:layer])
        yield
    finally:
        model.transformer.h = blocks


@torch.no_grad()
def lens_logits(model: Any, pixels: Tensor, layer: int) -> Tensor:
    """The lens' logits (N, T, V) of a few images."""

    def read(states: Tensor, point: str, layer: int) -> Tensor:
        return head_logits(model, states)

    with record(model, ["resid_pre"], layers=[layer], pool=read, alignment="sos") as pooled:
        pooled.run(pixels, use_cache=False)
    return pooled["resid_pre"][:, 0]
