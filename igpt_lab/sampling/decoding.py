"""The next pixel of many images, one position a call: a step whose shapes and buffers are always the same.

It computes what `ImageGPTForCausalImageModeling` computes behind a key-value cache, in the model's own precision. A
step of few images is bound by reading every weight once, and a step of a small model by the number of operations: so
results go into buffers that are made once, residuals are added by the matrix product itself, and on a CPU the large
weights are laid out once as oneDNN reads them fastest.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_lab.models.fast import is_plain
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, KeyValueCache
from igpt_lab.models.losses import align

LARGE = 2**20  # multiplications in a product of at least 8 rows from which on that pays


class Decoder:
    """A model's logits for the next pixel of `batch` images: `fill` with what is given, then `step` by step.

    Weights are taken as they are now. On a CPU the large ones are copied: the memory of the weights once more. The
    cache has room for a whole image from the start. No gradients; dropout never. A model with hooks, adapters or other
    parts than its own steps by its own forward pass, so that they count.
    """

    @torch.inference_mode()
    def __init__(self, model: ImageGPTForCausalImageModeling, batch: int):
        config = model.config
        if config.bidirectional:
            raise ValueError("a bidirectional model predicts masked pixels, and continues no image")
        if getattr(model.transformer, "edits", 0):
            raise ValueError("a model inside an `edit` block draws no images by steps; use model.generate there")
        self.model, self.config = model, config
        self.batch = batch
        self.plain = is_plain(model)
        options = {"device": model.device, "dtype": model.dtype}
        self.cache = KeyValueCache.of(config, batch, config.n_positions, **options)
        self.positions = torch.arange(config.n_positions, device=model.device)
        if self.plain:
            self._lay_out(options)

    def _lay_out(self, options: dict) -> None:
        """The buffers that every step uses, and the weights as they are read fastest."""
        model, config = self.model, self.config
        batch = self.batch
        width, heads = config.n_embd, config.n_head
        backbone = model.transformer
        self.state, self.mixed, self.query = (torch.empty(batch, width, **options) for _ in range(3))
        inner = backbone.h[0].mlp.c_fc.weight.shape[1]
        self.qkv, self.inner, self.logits = (
            _Product(torch.empty(batch, size, **options)) for size in (3 * width, inner, config.n_colours)
        )
        self.residual = _Product(self.state, add=True)
        self.blocks = [_weights(block, batch) for block in backbone.h]
        self.head = _laid_out(model.lm_head.weight[: config.n_colours].t(), batch)
        # Views of the buffers that every block uses: (3, N, heads, 1, D / heads), (N heads, 1, D / heads).
        self.parts = self.qkv.out.view(batch, 3, heads, 1, width // heads).transpose(0, 1)
        self.heads = [buffer.view(batch * heads, 1, width // heads) for buffer in (self.query, self.mixed)]

    @torch.inference_mode()
    def fill(self, prime: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels int64 (N, t) in one pass, equal rows once -> logits (N, V) of pixel t, and log p (N, t) of the given.

        Log p is of each given pixel after those before it, float32, in nats.
        """
        distinct, which = np.unique(prime, axis=0, return_inverse=True)
        device, known = self.model.device, prime.shape[1]
        tokens, which = torch.as_tensor(distinct, device=device), torch.as_tensor(which.reshape(-1), device=device)
        fed = align(F.pad(tokens, (0, 1)), "sos", self.config)
        cache = KeyValueCache.of(self.config, len(fed), known + 1, device=device, dtype=self.model.dtype)
        logits = self.model(fed, cache, return_dict=True).logits[..., : self.config.n_colours].float()
        self.cache.room[:, :, :, :, : known + 1] = cache.room.index_select(2, which)
        log_p = logits[:, :known].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return logits[:, known].index_select(0, which), log_p.index_select(0, which)

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: Tensor, *, seen: int | None = None) -> Tensor:
        """Tokens int64 (N,) at `position`, int64 (1,) -> logits (N, V) of the next pixel, in a buffer of all steps.

        Attention reads the whole cache and masks what lies behind the position: the same shapes at every step and
        nothing read by the host, so that the step can be captured in a CUDA graph. With `seen`, which must be the
        position + 1, it reads what is filled and no more: faster where operations have no fixed shapes to keep.
        """
        if not self.plain:
            self.cache.filled = int(position) if seen is None else seen - 1
            return self.model.next_logits(tokens[:, None], self.cache)
        backbone, state = self.model.transformer, self.state
        room = self.cache.room
        later = None if seen else (self.positions > position)[None, None]
        torch.add(backbone.wte.weight.index_select(0, tokens), backbone.wpe.weight.index_select(0, position), out=state)
        keys, values = (half.flatten(1, 2)[..., :seen, :].unbind(0) for half in room.unbind(1))
        slots = room[..., seen - 1 : seen, :].unbind(0) if seen else room.unbind(0)
        for block, weights, *memory in zip(backbone.h, self.blocks, slots, keys, values, strict=True):
            self.qkv(block.ln_1(state), *weights[0])
            self._attend(block.attn.scale, position if seen is None else None, later, *memory)
            self.residual(self.mixed, *weights[1])
            inner = self.inner(block.ln_2(state), *weights[2])
            self.residual(block.mlp.act(inner), *weights[3])
        return self.logits(backbone.ln_f(state), self.head, None)

    def _attend(
        self, scale: float, position: Tensor | None, later: Tensor | None, slot: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Put the buffer `qkv` behind keys and values (N heads, t, D / heads), and what it finds there into `mixed`.

        `slot` (2, N, heads, 1 or T, D / heads) is where they go, at `position` if that is given.
        """
        query, mixed = self.heads
        torch.mul(self.parts[0], scale, out=self.query.view(self.parts[0].shape))
        if position is None:  # a copy takes a third of the time
            slot.copy_(self.parts[1:])
        else:
            slot.index_copy_(3, position, self.parts[1:])
        scores = torch.bmm(query, keys.mT)
        if later is not None:
            scores.masked_fill_(later, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        torch.bmm(scores.softmax(-1, dtype=wide).to(values.dtype), values, out=mixed)


class _Product:
    """x @ weight + bias into the buffer `out` (N, n), or with `add` onto what is there."""

    def __init__(self, out: Tensor, *, add: bool = False):
        self.out, self.beta = out, float(add)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return self.out.add_(product) if self.beta else self.out.copy_(product)
        self.out.addmm_(x, weight, beta=self.beta)
        return self.out if bias is None else self.out.add_(bias)


def _weights(block: nn.Module, batch: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a block's four products; a bias that is all zero, as the original has none, is left out."""
    maps = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
    biases = [linear.bias if linear.bias.is_meta or linear.bias.any() else None for linear in maps]
    return [(_laid_out(linear.weight, batch), bias) for linear, bias in zip(maps, biases, strict=True)]


def _laid_out(weight: Tensor, batch: int) -> Tensor:
    """A weight (in, out) as it is, or as oneDNN wants it where a CPU multiplies few rows with it faster."""
    fits = weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not fits or weight.numel() * max(batch, 8) < LARGE:
        return weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous(), batch)
