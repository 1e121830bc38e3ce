"""Edits that take a part away: what stands in for what a block, attention, MLP or head adds to the residual stream.

    with edit(model, skip(model, "head", 3, head=0) | mean_of(model, "mlp", 5, training_tokens)):
        model(tokens)

Edits can be joined by `|`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import exact_dtype
from igpt_lab.core.progress import tqdm
from igpt_lab.explaining.edits import Edits, Function, Place
from igpt_lab.features.hooks import backbone_of, check_eval, layers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import check_causal, on_device

ADDED = {"attention": "attn_out", "mlp": "mlp_out", "head": "head_out"}  # where what a part adds can be replaced
PARTS = ("block", *ADDED)


@checked
def skip(model: nn.Module, part: str, layer: int, *, head: int | None = None) -> Edits:
    """Edits for `edit`: a part of a layer, one of PARTS, adds nothing. Position-wise.

    A block's output is its input; attention and MLP add zero; the slice (N, T, D / heads) of `head_out` that is a
    head's is zero. So all heads of a layer leave the bias of `attn.c_proj`, which is zero in released weights.
    Raises ValueError for a part, layer or head that there is not.
    """
    return _replace(model, part, layer, head, torch.zeros_like)


@checked
def mean_of(
    model: ImageGPTForCausalImageModeling, part: str, layer: int, tokens: np.ndarray, *, head: int | None = None,
    batch_size: int | None = None, progress: bool = True,
) -> Edits:  # fmt: skip
    """Edits for `edit`: a part adds its mean over images, position by position, made here, once.

    A mean over the images that are tested, or over a batch of them, makes an image's result depend on the others. Of a
    block it is the mean of what it adds: that of its output would end the stream.

    Args:
        model: One that predicts pixels in their order, in eval mode.
        part: "block", "attention", "mlp" or "head".
        layer: Its block; negative ones count from the end.
        tokens: Training images, int (N, T).
        head: Its number, of a head only.
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        {(point, layer): function}, for `edit`.

    Raises:
        ValueError: A part, layer or head that there is not, what are no tokens, or a bidirectional model.
        RuntimeError: A model in training mode.

    Example:
        >>> edits = lab.mean_of(model, "mlp", 1, train_tokens)
        >>> with torch.no_grad(), lab.edit(model, edits):
        ...     out = model(ids)
        >>> list(edits), out.logits.shape
        ([('mlp_out', 1)], torch.Size([2, 16, 8]))
    """
    layer = check_part(model, part, layer, head)
    means = means_of(model, tokens, [part], layers=[layer], batch_size=batch_size, progress=progress)
    return constant(model, part, layer, means[part, layer], head=head)


@checked
def resample(
    model: nn.Module, part: str, layer: int, donors: Sequence[int] | np.ndarray, *, head: int | None = None
) -> Edits:
    """Edits for `edit`: in image i of a batch a part adds what it adds in image `donors[i]` of the batch.

    Args:
        model: Ours, or transformers' of the same class.
        part: "block", "attention", "mlp" or "head".
        layer: Its block; negative ones count from the end.
        donors: int (N,), such as `derangement(N)`, in which no image is its own donor.
        head: Its number, of a head only.

    Returns:
        {(point, layer): function}, for `edit`. The function raises ValueError for a batch of another size.

    Raises:
        ValueError: A part, layer or head that there is not, or donors that are no rows of a batch.

    Example:
        >>> edits = lab.resample(model, "head", 1, [1, 0], head=0)
        >>> with torch.no_grad(), lab.edit(model, edits):
        ...     logits = model(ids).logits
        >>> list(edits), logits.shape
        ([('head_out', 1)], torch.Size([2, 16, 8]))
    """
    numbers = np.asarray(donors)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not 0 <= numbers.min() <= numbers.max() < len(numbers):
        raise ValueError(
            f"donors {numbers.dtype} {numbers.shape}; expected rows of the batch, int (N,), from 0 below N"
        )
    rows = torch.as_tensor(numbers, device=next(model.parameters()).device)

    def of_donors(added: Tensor) -> Tensor:
        if len(added) != len(rows):
            raise ValueError(
                f"a batch of {len(added)} images for {len(rows)} donors; expected one donor for each image"
            )
        return added[rows]

    return _replace(model, part, layer, head, of_donors)


@checked
def derangement(count: int, *, seed: int = 0) -> np.ndarray:
    """int64 (count,): a random order, one cycle, in which none is in its own place; ValueError below 2."""
    if count < 2:
        raise ValueError(f"{count} images; expected two or more, so that each can have another's value")
    order, donors = np.random.default_rng(seed).permutation(count), np.empty(count, np.int64)
    donors[order] = np.roll(order, 1)
    return donors


def constant(model: nn.Module, part: str, layer: int, values: Tensor, *, head: int | None = None) -> Edits:
    """Edits in which a part adds `values` (T, D), those of its slice where it is a head, in every image."""
    columns = slice(None) if head is None else head_slice(model, head)

    def of_positions(added: Tensor) -> Tensor:
        if added.shape[1] > len(values):
            raise ValueError(f"{added.shape[1]} positions, and the mean is of {len(values)}; expected no more")
        return values[: added.shape[1], columns].to(added.dtype).expand_as(added)

    return _replace(model, part, layer, head, of_positions)


def _replace(model: nn.Module, part: str, layer: int, head: int | None, stand_in: Function) -> Edits:
    """Edits that put `stand_in(added)` in the place of what a part adds, (N, T, D) or of a head (N, T, D / heads)."""
    layer = check_part(model, part, layer, head)
    if head is not None:
        columns = head_slice(model, head)

        def one_head(x: Tensor) -> Tensor:
            changed = x.clone()
            changed[..., columns] = stand_in(x[..., columns])
            return changed

        return Edits({("head_out", layer): one_head})
    if part != "block":
        return Edits({(ADDED[part], layer): stand_in})
    begun: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        begun[:] = [x]
        return x

    def end(x: Tensor) -> Tensor:
        before = begun.pop()
        return before + stand_in(x - before)

    return Edits({("resid_pre", layer): keep, ("resid_post", layer): end})


def check_part(model: nn.Module, part: str, layer: int, head: int | None) -> int:
    """The layer, counted from 0; ValueError for a part, layer or head that is not there, or a head of another part."""
    if part not in PARTS:
        raise ValueError(f"part {part!r}; expected one of {', '.join(PARTS)}")
    blocks = len(backbone_of(model).h)
    if not -blocks <= layer < blocks:
        raise ValueError(f"{part} of layer {layer}; this model has blocks 0..{blocks - 1}")
    config: Any = model.config
    if (head is None) != (part != "head"):
        raise ValueError(f"head {head} of part {part!r}; a head has a number, and only a head")
    if head is not None and not 0 <= head < config.n_head:
        raise ValueError(f"head {head}; this model has heads 0..{config.n_head - 1}")
    return layer % blocks


def head_slice(model: nn.Module, head: int) -> slice:
    """The columns of a head in `head_out`."""
    config: Any = model.config
    width = config.n_embd // config.n_head
    return slice(head * width, (head + 1) * width)


@torch.no_grad()
def means_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, parts: Sequence[str], *,
    layers: Sequence[int] | None = None, batch_size: int | None = None, progress: bool = True,
) -> dict[Place, Tensor]:  # fmt: skip
    """What parts add, mean over images position by position: {(part, layer): (T, D) in float32 or wider}.

    Of `head` it is the heads' side by side. Sums are in float64 where the device has it, so that a batch's size changes
    no more than what its products round.
    """
    check_causal(model.config)
    check_eval(model)
    tokens = checked_tokens(tokens, model.config)
    if not len(tokens):
        raise ValueError(f"tokens {tokens.shape}; expected one training image or more")
    points = {"block": ("resid_pre", "resid_post")} | {part: (point,) for part, point in ADDED.items()}
    exact = exact_dtype(model.device)
    wide = torch.promote_types(model.dtype, torch.float32)
    sums: dict[Place, Tensor] = {}

    def add(states: Tensor, point: str, layer: int) -> Tensor:
        total = states.sum(0, dtype=exact)
        sums[point, layer] = sums[point, layer] + total if (point, layer) in sums else total
        return states.new_zeros(())

    blocks = layers_of("resid_post", len(model.transformer.h), layers)
    wanted = [point for part in parts for point in points[part]]
    size = batch_size or default_batch(model.config, model.device)
    with record(model, wanted, layers=blocks, pool=add, alignment="sos") as pooled:
        for start in tqdm(range(0, len(tokens), size), desc="means", unit="batch", disable=not progress):
            pooled.run(on_device(model, tokens[start : start + size]), use_cache=False)
    ends = {part: [sums[points[part][-1], layer] for layer in blocks] for part in parts}
    if "block" in parts:
        ends["block"] = [sums["resid_post", layer] - sums["resid_pre", layer] for layer in blocks]
    pairs = {(part, layer): total for part, totals in ends.items() for layer, total in zip(blocks, totals, strict=True)}
    return {place: (total / len(tokens)).to(wide) for place, total in pairs.items()}
