"""Checks of a model that a user can press: each measures a distance that should be small, and says whether it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device, precision
from igpt_lab.core.progress import tqdm
from igpt_lab.explaining import laws
from igpt_lab.features.hooks import record
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.tokens import checked_tokens, tokenize
from igpt_lab.models.config import ACTIVATIONS
from igpt_lab.models.cost import block_weights
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, KeyValueCache
from igpt_lab.models.loading import load_model
from igpt_lab.models.losses import align

POINTS = ("ln_1", "resid_pre")
FLOPS = 1e12  # of a pass over all images: seconds on two CPU cores
RELATIVE = "of the largest value of the layer"
LAWS = (
    "lens at the last layer against the loss", "lens against the blocks left out", "patched with its own activations",
    "the first state the same for all images", "attributions against the logits",
)  # fmt: skip
ROUNDING = 1e-4  # float32, through a hundred blocks and more


@checked
def check(
    model: ImageGPTForCausalImageModeling | str | Path,
    *,
    device: str | torch.device | None = None,
    images: ImageSet | TokenSet | np.ndarray | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """A row for each check: `check`, `measured`, `allowed`, `unit` and `passed` (<NA> where it does not apply).

    `images`: an image set, or palette indices (N, T); by default random ones, 32 or, for large models, fewer. The model
    is left as it is; the checks run on a float32 copy on `device`. Distances are of pooled features at `ln_1` and
    `resid_pre`, but for causality and cached decoding, which compare the states of single positions.
    """
    model = load_model(model) if isinstance(model, str | Path) else copy.deepcopy(model)
    device = best_device(device)
    model = model.float().to(device).eval()
    tokens, rows = _tokens(model, images), []
    bar = tqdm(_checks(model, tokens, device), total=12, unit="check", disable=not progress)
    with torch.inference_mode(), bar:
        for name, measured, allowed, unit in bar:
            passed = pd.NA if measured is None else bool(measured <= allowed)
            rows.append((name, math.nan if measured is None else measured, allowed, unit, passed))
            bar.set_postfix_str(name)
    table = pd.DataFrame(rows, columns=["check", "measured", "allowed", "unit", "passed"])
    return table.astype({"passed": "boolean"})


def _checks(
    model: ImageGPTForCausalImageModeling, tokens: Tensor, device: torch.device
) -> Iterator[tuple[str, float | None, float, str]]:
    """Name, what was measured (None: does not apply), what is allowed, and the unit or the reason."""
    cpu, causal = torch.device("cpu"), not model.config.bidirectional
    many = len(tokens)
    features = _features(model, tokens)
    yield "hooks against plain formulas", _distance(features, _by_formula(model, tokens)), ROUNDING, RELATIVE
    both_ways = "bidirectional"
    measured = _leak(model, tokens) if causal else None
    yield "causality", measured, 0.0, "largest change before a changed pixel" if causal else both_ways
    measured = _uncached(model, tokens[:2]) if causal else None
    yield "cached decoding against uncached", measured, ROUNDING, RELATIVE if causal else both_ways
    singly = torch.cat([_features(model, tokens[i : i + 1]) for i in range(many)], dim=1)
    yield f"batch of 1 against {many}", _distance(singly, features), ROUNDING, RELATIVE
    with precision(device, bfloat16=True):
        low = _features(model, tokens)
    yield "bfloat16 against float32", _distance(low, features), 0.1, RELATIVE
    if device == cpu:
        yield "device against CPU", None, ROUNDING, "no accelerator"
    else:
        there = _features(model.to(cpu), tokens.to(cpu))
        yield f"{device} against CPU", _distance(features, there), ROUNDING, RELATIVE
    yield from _laws(model, tokens[:4].cpu().numpy()) if causal else ((law, None, 0.0, both_ways) for law in LAWS[:-1])
    wide = model.to("cpu" if device.type == "mps" else device).double()  # MPS has no float64
    exact = _features(wide, tokens.to(wide.device))
    yield "float32 against float64", _distance(features, exact), ROUNDING, RELATIVE
    added = laws.attribution_error(wide, tokens[:2].cpu().numpy()) if causal else None
    yield LAWS[-1], added, 1e-10, "of a logit, in float64" if causal else both_ways


def _laws(model: ImageGPTForCausalImageModeling, tokens: np.ndarray) -> Iterator[tuple[str, float, float, str]]:
    """The laws of the instruments that read and edit, on a few images (N, T)."""
    middle = model.config.n_layer // 2
    yield LAWS[0], laws.lens_against_loss(model, tokens), 1e-5, "nats"
    yield LAWS[1], laws.lens_against_skip(model, tokens, middle), 0.0, f"largest difference of a logit, layer {middle}"
    yield LAWS[2], laws.own_patch(model, tokens, middle), 0.0, f"largest difference of a logit, block {middle}"
    yield LAWS[3], laws.state_0_spread(model, tokens), 1e-5, RELATIVE


def _tokens(model: ImageGPTForCausalImageModeling, images: ImageSet | TokenSet | np.ndarray | None) -> Tensor:
    """Palette indices int64 (N, T) on the model's device: random ones, or the first of `images`."""
    config = model.config
    weights = block_weights(config)
    count = int(min(32, max(2, FLOPS // (2 * weights * config.n_positions))))
    if images is None:
        drawn = torch.randint(config.n_colours, (count, config.n_positions), generator=torch.Generator().manual_seed(0))
        return drawn.to(model.device)
    if isinstance(images, ImageSet | TokenSet):
        images = tokenize(images.select(np.arange(min(count, len(images)))), model.processor, progress=False)
    pixels = checked_tokens(images, config)
    if not len(pixels) or pixels.shape[1] != config.n_positions:
        raise ValueError(f"images of shape {pixels.shape}; expected palette indices (N, {config.n_positions}), N > 0")
    return torch.as_tensor(pixels[:count].astype(np.int64), device=model.device)


def _aligned(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    return align(tokens, "raw" if model.config.bidirectional else "sos", model.config)


def _features(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    """What hooks record: (layers of all points, N, D) in float32, on the CPU."""
    with record(model, POINTS) as pooled:
        model.transformer(_aligned(model, tokens), use_cache=False)
    return torch.cat([pooled[point] for point in POINTS], dim=1).transpose(0, 1).float().cpu()


def _by_formula(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    """The same from the weights alone, one image at a time, by no code of `model` and no hook."""
    pooled = [_states_by_formula(model, image) for image in _aligned(model, tokens)]
    return torch.stack(pooled, dim=1).cpu()


def _states_by_formula(model: ImageGPTForCausalImageModeling, image: Tensor) -> Tensor:
    """Means over positions (2 L + 2, D) for tokens (T,): normed input of each block and of the head, then un-normed."""
    config, weights = model.config, model.transformer.state_dict()
    positions = len(image)
    heads, width = config.n_head, config.n_embd // config.n_head
    later = torch.ones(positions, positions, dtype=torch.bool, device=image.device).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + config.layer_norm_epsilon).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][image] + weights["wpe.weight"][:positions]
    normed, plain = [], []
    for i in range(config.n_layer):
        normed.append(norm(x, f"h.{i}.ln_1"))
        plain.append(x)
        query, key, value = linear(normed[-1], f"h.{i}.attn.c_attn").view(positions, 3, heads, width).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", query, key)
        scores = scores / math.sqrt(width) if config.scale_attn_weights else scores
        scores = scores / (i + 1) if config.scale_attn_by_inverse_layer_idx else scores
        attention = (scores if config.bidirectional else scores.masked_fill(later, -math.inf)).softmax(-1)
        x = x + linear(torch.einsum("hij,jhd->ihd", attention, value).reshape(positions, -1), f"h.{i}.attn.c_proj")
        inner = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        if config.activation_function == "quick_gelu":
            inner = inner / (1 + torch.exp(-1.702 * inner))
        else:
            inner = ACTIVATIONS[config.activation_function](inner)
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    states = [*normed, norm(x, "ln_f"), *plain, x]
    return torch.stack([state.mean(0) for state in states])


def _leak(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> float:
    """Largest change, of any layer, at or before the place of a changed pixel; another pixel of each image."""
    tokens = tokens[:4]
    places = torch.linspace(0, tokens.shape[1] - 1, len(tokens)).long().tolist()
    changed = tokens.clone()
    for image, place in enumerate(places):
        changed[image, place] = (changed[image, place] + 1) % model.config.n_colours
    before, after = (
        model.transformer(_aligned(model, images), use_cache=False, output_hidden_states=True).hidden_states
        for images in (tokens, changed)
    )
    changes = [
        (one[image, : place + 1] - other[image, : place + 1]).abs().max()
        for one, other in zip(before, after, strict=True)
        for image, place in enumerate(places)
    ]
    return torch.stack(changes).max().item()


def _uncached(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> float:
    """Last states by a cache, 16 positions singly, the most in one go, 16 singly, against those of one pass."""
    tokens, length = _aligned(model, tokens), tokens.shape[1]
    cache = KeyValueCache.of(model.config, len(tokens), length, device=model.device, dtype=model.dtype)
    edges = sorted({*range(min(16, length) + 1), *range(max(16, length - 16), length + 1)})
    pieces = (tokens[:, begin:end] for begin, end in pairwise(edges))
    cached = torch.cat([model.transformer(piece, cache).last_hidden_state for piece in pieces], dim=1)
    return _distance(cached[None], model.transformer(tokens, use_cache=False).last_hidden_state[None])


def _distance(measured: Tensor, expected: Tensor) -> float:
    """Largest difference of a layer over the largest value there, in the layer where that is largest."""
    measured, expected = (states.flatten(1).cpu().double() for states in (measured, expected))
    return ((measured - expected).abs().amax(1) / expected.abs().amax(1)).max().item()
