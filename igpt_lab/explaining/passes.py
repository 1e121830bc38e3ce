"""Forward passes of a model and of changed copies of it, over the same images.

What comes before the first block that a copy changes is computed once for all of them, a layer at a time.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import at_once, check_wanted, side_by_side
from igpt_lab.explaining.parts import derangement
from igpt_lab.explaining.variants import Variant
from igpt_lab.features.hooks import is_compiled, numbers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.cost import inner_width
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import cross_entropy, on_device

MEMORY = 1 << 30  # bytes of a default batch's states


@dataclass(frozen=True)
class Passes:
    """The model as it is and every variant of it, over images."""

    model: ImageGPTForCausalImageModeling
    variants: list[Variant]
    feature_layer: int | None = None  # where features are read
    with_donors: bool = False
    batch_size: int | None = None
    progress: bool = True
    seed: int = 0

    def over(self, tokens: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Of a batch after another: nats (1 + variants, n) of each image, and features float32 (1 + variants, n, D).

        The model as it is comes first. Features are on the CPU, and of no width where none are read. Batches run
        `side_by_side`, but those of a model with hooks or modules of others, or a compiled one.
        """
        tokens = checked_tokens(tokens, self.model.config)
        donors = [tokens[derangement(len(tokens), seed=self.seed)]] if self.with_donors else []
        device = self.model.device
        size, numbers, at_most = self._sizes()
        threads = at_once(device, numbers, at_most)
        of_thread = _OfThread(self) if threads > 1 else None
        # As many batches for each thread: a batch goes through the model once for each variant.
        batches = np.array_split(np.arange(len(tokens)), threads * math.ceil(len(tokens) / (size * threads)))
        total = len(tokens) * (1 + len(self.variants))
        with tqdm(total=total, desc="left out", unit="image", disable=not self.progress) as bar:

            def results(rows: np.ndarray) -> tuple[Tensor, Tensor]:
                pixels = on_device(self.model, np.concatenate([images[rows] for images in (tokens, *donors)]))
                if of_thread is None:
                    return self._batch(pixels, len(rows), bar.update)
                return of_thread.passes._batch(pixels, len(rows), lambda _: check_wanted())

            for nats, features in side_by_side(results, filter(len, batches), device, numbers, at_most):
                bar.update(0 if of_thread is None else nats.numel())
                yield nats, features

    def _sizes(self) -> tuple[int, int, int]:
        """Images of a batch, the numbers of its states (`numbers_of`), and how many batches MEMORY holds at once."""
        config = self.model.config
        width = 2 * inner_width(config) + 10 * config.n_embd + 3 * config.n_colours  # of what a block and the head hold
        room = MEMORY // (4 * config.n_positions * width * (1 + self.with_donors))  # images whose states fit
        size = self.batch_size or default_batch(config, self.model.device)
        threads = at_once(self.model.device, self._numbers(size))
        size = self.batch_size or max(1, min(size, room // threads))
        return size, self._numbers(size), max(1, room // size)

    def _numbers(self, size: int) -> int:
        return 0 if is_compiled(self.model) else numbers_of(self.model, size)

    @torch.no_grad()
    def _batch(self, pixels: Tensor, count: int, step: Callable[[int], Any]) -> tuple[Tensor, Tensor]:
        """`pixels` (n, T) of `count` images, and behind them of their donors; `step` is called after each pass."""
        with record(self.model, ["resid_pre"], layers=[0], pool=lambda x, *_: x, alignment="sos") as embedded:
            embedded.run(pixels, use_cache=False)
        x, own = embedded["resid_pre"][:, 0], pixels[:count]
        read: Tensor | None = None
        results: dict[int, tuple[Tensor, Tensor | None]] = {}
        end = max((variant.first for variant in self.variants), default=-1) + 1
        for layer in range(end):
            if layer == self.feature_layer:
                read = self._features(x[:count], layer)
            for place, variant in enumerate(self.variants):
                if variant.first == layer:
                    with variant.changed(self.model, count):
                        results[place] = self._onwards(x, layer + variant.skipped, own)
                    step(count)
            x = self._block(x, layer)
        nats, features = self._onwards(x[:count], end, own)
        step(count)
        if read is None:
            read = nats.new_zeros(count, 0) if features is None else features
        ordered = [(nats, read), *(results[place] for place in range(len(self.variants)))]
        features_of_all = [read if features is None else features for _, features in ordered]
        return torch.stack([losses for losses, _ in ordered]), torch.stack(features_of_all).cpu()

    def _onwards(self, x: Tensor, first: int, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """States before block `first` -> nats (n,) and features (n, D), None where they are read before it."""
        backbone = self.model.transformer
        features: Tensor | None = None
        for layer in range(first, len(backbone.h) + 1):
            if layer == self.feature_layer:
                features = self._features(x[: len(pixels)], layer)
            if layer < len(backbone.h):
                x = self._block(x, layer)[: len(pixels)]
        logits = self.model.lm_head(backbone.ln_f(x))
        return cross_entropy(logits, pixels, "none").view_as(pixels).mean(1), features

    def _features(self, x: Tensor, layer: int) -> Tensor:
        """Mean-pooled `ln_1` of a layer, as an extraction has it."""
        backbone = self.model.transformer
        norm: Any = backbone.ln_f if layer == len(backbone.h) else backbone.h[layer].ln_1
        return norm(x).mean(dim=1, dtype=torch.float32)

    def _block(self, x: Tensor, layer: int) -> Tensor:
        backbone = self.model.transformer
        bias, causal = backbone._bias(x, 0, None, self.model.config.reorder_and_upcast_attn)
        return backbone.h[layer](x, bias=bias, causal=causal)[0]


class _OfThread(threading.local):
    """In each thread passes of a copy of the model, which shares its weights: an edit is of a whole model."""

    def __init__(self, passes: Passes):
        self.passes = replace(passes, model=_twin(passes.model))


def _twin(module: nn.Module) -> Any:
    """A module with modules and hooks of its own; its tensors, and whatever else it holds, are those of `module`."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.startswith("_") and isinstance(value, dict):  # torch's, of hooks, tensors and modules
            vars(twin)[name] = value.copy()
    for name, part in module._modules.items():
        twin._modules[name] = None if part is None else _twin(part)
    return twin
