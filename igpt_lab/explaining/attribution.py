"""Attribution that adds up: which part of the network wrote a logit.

The last state is a sum: token embedding, position embedding, and what every attention and every MLP adds. The last norm
takes no mean and the head has no bias, so once the norm's scale is held at what it is, the logits are the same sum read
by the head ("direct logit attribution", Elhage et al., 2021). Biases of the parts are in what the parts add.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import widened
from igpt_lab.core.significance import mean_interval
from igpt_lab.explaining.lenses import batches_of, lens_tokens
from igpt_lab.features.hooks import record
from igpt_lab.models.losses import align, on_device

COLUMNS = ("component", "layer", "head", "part")
Read = Callable[[Tensor], Tensor]  # a part of the last state (n, T, D), before the norm's scale -> (n, ...)


@checked
def attribute(
    model: Any, tokens: np.ndarray, *, heads: bool = False, batch_size: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """What each component adds to the logit of the true pixel less the mean logit of all colours.

    The mean logit is taken off because a constant on all logits changes no probability. A tied head's start token is no
    colour and is left out. Each batch runs once; what is held is a number for each component and pixel.

    Args:
        model: Ours, or transformers' of the same class.
        tokens: Palette indices (N, T).
        heads: Split attention into its heads and its bias.
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        A row per component: `component` (a name, such as "attention 3"), `layer` (-1 of embeddings), `head` (-1 where
        the row is of no single one), `part` ("token embedding", "position embedding", "attention", "MLP"; with `heads`
        "head" and "attention bias" in place of "attention"), `logit` (mean over images and pixels, with its 95%
        interval over images `low` and `high`), `n`. The rows add up to the model's own value: in float64 to 1e-10, in
        float32 to rounding, but not in bfloat16, in which the model rounds its sum after each block.

    Raises:
        ValueError: A bidirectional model, one without a head over colours, or what are no tokens.
        RuntimeError: A model in training mode.

    Example:
        >>> lab.attribute(model, tokens)[["component", "layer", "part", "n"]].head(4)
                    component  layer                part    n
        0     token embedding     -1     token embedding  100
        1  position embedding     -1  position embedding  100
        2         attention 0      0           attention  100
        3               MLP 0      0                 MLP  100
    """
    tokens = lens_tokens(model, tokens)
    weight, gain = _head(model)
    values = []
    with torch.no_grad():
        for part in batches_of(model, tokens, batch_size, "attribution", progress):
            pixels = on_device(model, part)
            toward = gain * (weight[pixels] - weight.mean(0))  # (n, T, D)
            read, scale = _components(model, pixels, partial(_along, toward=toward), heads)
            values.append((read * scale[:, None]).mean(-1))
    of_images = torch.cat(values).cpu().double().numpy()  # (N, components)
    mean, low, high = mean_interval(of_images)
    return _names(model, heads).assign(logit=mean, low=low, high=high, n=len(tokens))


@checked
def attribute_logits(
    model: Any, tokens: np.ndarray, position: int, *, heads: bool = False
) -> tuple[np.ndarray, pd.DataFrame]:
    """What each component adds to all logits at one pixel: (N, components, V), and a table with a row per component.

    The sum over components is the model's logits at `position` of 0..T-1; a tied head's start token is left out. The
    images run in batches of as many as the sizes allow.
    """
    tokens = lens_tokens(model, tokens)
    if not 0 <= position < tokens.shape[1]:
        raise ValueError(f"no position {position}; expected one from 0 to {tokens.shape[1] - 1}")
    weight, gain = _head(model)
    reader = (gain * weight).T  # (D, V)
    values = []
    with torch.no_grad():
        for part in batches_of(model, tokens, None, "attribution", progress=False):
            read, scale = _components(model, on_device(model, part), lambda state: state[:, position] @ reader, heads)
            values.append(read * scale[:, position, None, None])
    return torch.cat(values).cpu().numpy(), _names(model, heads)


def _head(model: Any) -> tuple[Tensor, Tensor]:
    """Rows of the head for colours (V, D), and the last norm's gain (D,), in float32 or wider."""
    weight = widened(model.lm_head.weight.detach()[: model.config.vocab_size - 1])
    return weight, model.transformer.ln_f.weight.detach().to(weight.dtype)


def _along(part: Tensor, toward: Tensor) -> Tensor:
    return (part * toward).sum(-1)


def _components(model: Any, pixels: Tensor, read: Read, heads: bool) -> tuple[Tensor, Tensor]:
    """What `read` gives of each component, (n, components, ...), and the last norm's scale (n, T), still to multiply.

    Parts are read inside the forward pass, in which the scale is known last.
    """
    backbone, blocks = model.transformer, len(model.transformer.h)

    def scale_of(states: Tensor, point: str, layer: int) -> Tensor:
        return (widened(states).square().mean(-1) + backbone.ln_f.eps).rsqrt()

    def reduce(states: Tensor, point: str, layer: int) -> Tensor:
        wide = widened(states)
        if point == "head_out":
            return _of_heads(wide, backbone.h[layer].attn.c_proj, model.config.n_head, read)
        return read(wide)[:, None]

    attention, inputs = "head_out" if heads else "attn_out", align(pixels, "sos", model.config)
    with (
        record(model, ["resid_pre"], layers=[blocks], pool=scale_of) as last,
        record(model, [attention, "mlp_out"], pool=reduce) as added,
    ):
        backbone(inputs, use_cache=False)
    token = widened(backbone.wte(inputs))
    place = widened(backbone.wpe.weight[: inputs.shape[1]]).expand_as(token)
    of_blocks = torch.cat([added[attention], added["mlp_out"]], dim=2).flatten(1, 2)  # (n, blocks * parts, ...)
    return torch.cat([read(token)[:, None], read(place)[:, None], of_blocks], dim=1), last["resid_pre"][:, 0]


def _of_heads(mixed: Tensor, projection: Any, heads: int, read: Read) -> Tensor:
    """Heads side by side (n, T, D) -> what `read` gives of each one's own output, and of the bias: (n, heads + 1, ...).

    `projection`: `attn.c_proj`, with its weight (in, out).
    """
    own = zip(mixed.chunk(heads, dim=-1), projection.weight.chunk(heads), strict=True)
    outputs = [read(values @ weight.to(values.dtype)) for values, weight in own]
    bias = projection.bias.to(mixed.dtype).expand(*mixed.shape[:2], -1)
    return torch.stack([*outputs, read(bias)], dim=1)


def _names(model: Any, heads: bool) -> pd.DataFrame:
    """A row for each component in the order of `_components`, with COLUMNS."""
    rows = [(name, -1, -1, name) for name in ("token embedding", "position embedding")]
    for layer in range(len(model.transformer.h)):
        if heads:
            rows += [(f"head {layer}.{head}", layer, head, "head") for head in range(model.config.n_head)]
            rows.append((f"attention bias {layer}", layer, -1, "attention bias"))
        else:
            rows.append((f"attention {layer}", layer, -1, "attention"))
        rows.append((f"MLP {layer}", layer, -1, "MLP"))
    return pd.DataFrame(rows, columns=list(COLUMNS))
