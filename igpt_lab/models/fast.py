"""Paths of the network that exist for a processor's sake: what `imagegpt` says in plain formulas, computed sooner.

In inference on a CPU: products by the library that is fastest there, norms and activations with fewer passes over
memory. In training: zero biases left out, and attention written out on a CPU. All that the network knows of them are
calls of this module behind a condition; without these calls it computes the same, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from igpt_lab.core.devices import by_onednn, product, widened
from igpt_lab.models.config import ACTIVATIONS, quick_gelu

if TYPE_CHECKING:
    from igpt_lab.models.imagegpt import Block, Linear
    from igpt_lab.models.pretrained import ImageGPTPreTrainedModel

SLOPE = 1.702  # of `quick_gelu`
CHUNK = 128  # queries that training on a CPU attends with at a time
OURS = {nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList}  # modules of torch that the network is made of
FUSED_FROM = 1024  # positions from which on the fused kernel is as fast in float32, and takes less memory


def applies(x: Tensor) -> bool:
    """Whether `x` is on a CPU and nothing follows what happens to it: no autograd, no compiler, no tracer."""
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not followed


def is_plain(model: nn.Module) -> bool:
    """Whether a model is its own classes' alone: no hook, no adapter, no other forward method in any part of it.

    What goes another way to the same numbers asks this first. The shell of a compiled part does not count.
    """
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return False
    return all(hasattr(part, "_orig_mod") or _part_is_plain(part) for part in model.modules())


def _part_is_plain(part: nn.Module) -> bool:
    known = type(part).__module__ == "igpt_lab.models.imagegpt" or type(part) in OURS
    known = known and getattr(part, "act", quick_gelu) in ACTIVATIONS.values()
    return known and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) @ weight (in, out) + bias. A zero bias, as the original has none, would be one pass more."""
    return product(x, weight, bias if bias.any() else None)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * gain over the last axis, in a third of the time of torch's `rms_norm`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(gain)


def hidden(act: Callable[[Tensor], Tensor], x: Tensor, layer: Linear, plain: type) -> Tensor:
    """act(layer(x)), with fewer passes where the layer is of the type `plain` and `is_plain`.

    What oneDNN multiplies, it activates at once: with silu(u) = u sigmoid(u), quick_gelu(u) = silu(SLOPE u) / SLOPE.
    """
    if act is not quick_gelu or not applies(x) or type(layer) is not plain or not is_plain(layer):
        return act(layer(x))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    enough = x.numel() >= layer.nx**2  # rows, so that SLOPE times the weights costs less than is saved
    if not (enough and x.dtype == layer.weight.dtype == torch.float32 and by_onednn(dtype)):
        return quick_gelu_(layer(x))
    weight, bias = (SLOPE * layer.weight).to(dtype), (SLOPE * layer.bias).to(dtype)
    silu = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight.t(), bias, "swish", [], "")
    return silu.mul_(1 / SLOPE)


def quick_gelu_(x: Tensor) -> Tensor:
    """`quick_gelu` in place, to the last bit, a chunk at a time that stays in a CPU's caches."""
    for chunk in x.flatten(0, -2).split(max(1, 2**18 // x.shape[-1])):
        chunk.mul_((SLOPE * chunk).sigmoid_())
    return x


def contiguous(x: Tensor) -> Tensor:
    """Keys or values (N, heads, T, C); many, laid out for the fused kernel, which walks over them again and again."""
    return x.contiguous() if applies(x) and x.shape[2] >= FUSED_FROM else x


def prepare_training(model: ImageGPTPreTrainedModel, *, bfloat16: bool) -> set[str]:
    """See `prepare_training` of the models."""
    zero: set[str] = set()
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            layer = cast("Linear", model.get_submodule(name.removesuffix(".bias")))
            layer.biased = bool(weight.any())
            zero |= set() if layer.biased else {name}
    positions = model.config.n_positions
    written_out = model.device.type == "cpu" and (positions < FUSED_FROM or bfloat16)
    for block in model.backbone.h:
        cast("Block", block).attn.chunks = math.ceil(positions / CHUNK) if written_out else 0
    return zero


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, chunks: int) -> Tensor:
    """Attention of (N, heads, T, C) written out, for training: a causal one in so many chunks of queries.

    On a CPU the backward pass of the fused kernel takes four times as long at a few hundred positions, and in bfloat16
    twice as long at 1,024.
    """
    if causal:
        return ChunkedAttention.apply(query, key, value, scale, chunks)
    scores = query @ key.mT * scale
    return scores.softmax(dim=-1).to(value.dtype) @ value


class ChunkedAttention(torch.autograd.Function):
    """Causal attention written out, a chunk of the queries at a time, each to the keys up to its own end.

    Its own backward pass, as autograd's pads every chunk's gradients to full length. With P the weights and O the
    output, dS = P * (dP - sum(dP * P)) over keys, and that sum is the one of dO * O over channels (Dao et al., 2022).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, chunks: int) -> Tensor:
        edges = [round(i * query.shape[2] / chunks) for i in range(chunks + 1)]
        query = query * scale
        weights, mixed = [], []
        position = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
        for begin, end in pairwise(edges):
            scores = widened(query[:, :, begin:end] @ key[:, :, :end].mT)
            later = position[begin:end, None] < position[:end]
            weights.append(scores.masked_fill(later, -math.inf).softmax(dim=-1).to(value.dtype))
            mixed.append(weights[-1] @ value[:, :, :end])
        output = torch.cat(mixed, dim=2)
        ctx.save_for_backward(query, key, value, output, *weights)
        ctx.scale, ctx.edges = scale, edges
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, *weights = ctx.saved_tensors
        of_sums = (widened(grad) * widened(mixed)).sum(-1, keepdim=True)
        of_query, of_key = [], None
        of_value = None
        for (begin, end), weight in reversed(list(zip(pairwise(ctx.edges), weights, strict=True))):
            chunk = grad[:, :, begin:end]
            of_weights = widened(chunk @ value[:, :, :end].mT)
            of_scores = (widened(weight) * (of_weights - of_sums[:, :, begin:end])).to(grad.dtype)
            of_query.append(of_scores @ key[:, :, :end])
            of_key = _added(of_key, of_scores.mT @ query[:, :, begin:end])
            of_value = _added(of_value, weight.mT @ chunk)
        return torch.cat(of_query[::-1], dim=2) * ctx.scale, of_key, of_value, None, None


def _added(whole: Tensor | None, chunk: Tensor) -> Tensor:
    """`chunk` (N, heads, t, C) added to the first t rows of `whole`."""
    if whole is None:
        return chunk
    end = chunk.shape[2]
    return torch.cat([whole[:, :, :end] + chunk, whole[:, :, end:]], dim=2)
