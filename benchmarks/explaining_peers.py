"""Plain loops over transformers' ImageGPT that make the numbers of `logit_lens` and of `attention_maps`.

Written as a user of transformers would write them, and as fast as one could: a layer's numbers of a batch at a time,
all measures of offsets in one matrix product. Makers for `harness.race`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENS_COLUMNS = ("nats", "error_to_final", "entropy", "rgb_error")
OF_OFFSETS = ("wrap", "left", "above", "same_row", "same_column", "distance")
ATTENTION_COLUMNS = ("entropy", "entropy_ratio", "sos", *OF_OFFSETS)


@dataclass(frozen=True)
class Port:
    """A folder that transformers loads, tokens (N, T) and the palette (V, 3)."""

    folder: str
    tokens: np.ndarray
    palette: np.ndarray

    def model(self):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.ImageGPTForCausalImageModeling.from_pretrained(self.folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            model(self.inputs(1)[0], use_cache=False)
        return model

    def inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Batches with the start token, V, in front."""
        tokens = torch.as_tensor(self.tokens)
        return F.pad(tokens[:, :-1], (1, 0), value=len(self.palette)).split(batch)


def fastest(make: Callable, count: int) -> Callable:
    """Maker: the batch size that suits `make(batch, limit)` best, as `benchmarks.extract` looks for it."""

    def call() -> int:
        taken = {}
        for batch in BATCHES:
            if batch > count:
                break
            images = min(count, max(2, batch))
            trial, begun = make(batch, images), time.perf_counter()
            trial()
            taken[batch] = (time.perf_counter() - begun) / images
            if taken[batch] > 1.1 * min(taken.values()):
                break
        return min(taken, key=taken.get)

    return call


def lens_of_port(port: Port, whole: bool, batch: int, limit: int | None = None) -> Callable:
    """Means over images and pixels of LENS_COLUMNS, float64 (layers, 4), or of nats alone, (layers, 1)."""
    model, palette = port.model(), torch.as_tensor((port.palette + 1) / 2, dtype=torch.float32)
    inputs, labels = port.inputs(batch), torch.as_tensor(port.tokens).split(batch)
    squares = palette.square().sum(-1)

    def columns(log_p: torch.Tensor, last: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        p, true = log_p.exp(), palette[y]
        error = p @ squares - 2 * ((p @ palette) * true).sum(-1) + squares[y]
        return [(last.exp() * (last - log_p)).sum(-1), -(p * log_p).sum(-1), error]

    @torch.inference_mode()
    def call() -> np.ndarray:
        values, done = [], 0
        for x, y in zip(inputs, labels, strict=True):
            *states, normed = model.transformer(x, output_hidden_states=True, use_cache=False).hidden_states
            last = model.lm_head(normed).log_softmax(-1)
            means = []
            for state in (*states, None):
                log_p = last if state is None else model.lm_head(model.transformer.ln_f(state)).log_softmax(-1)
                nats = -log_p.gather(-1, y[..., None])[..., 0]
                numbers = [nats, *(columns(log_p, last, y) if whole else [])]
                means.append(torch.stack([number.mean(1) for number in numbers], -1))
            values.append(torch.stack(means, 1))
            done += len(x)
            if limit and done >= limit:
                break
        return torch.cat(values).double().mean(0).numpy()

    return call


def attention_of_port(port: Port, batch: int, limit: int | None = None) -> Callable:
    """Means over images of ATTENTION_COLUMNS for each layer and head, and behind them each offset's share."""
    model, side = port.model(), round(port.tokens.shape[1] ** 0.5)
    model.set_attn_implementation("eager")
    inputs, offsets, measures = port.inputs(batch), *offsets_of(side)
    count = side * side
    sizes = torch.arange(2, count + 1).log()  # of what a state sees, from state 1 on

    @torch.inference_mode()
    def call() -> np.ndarray:
        total, values, done = 0, [], 0
        for x in inputs:
            of_layers = []
            attentions = model.transformer(x, output_attentions=True, use_cache=False).attentions
            for weights in attentions:  # (n, heads, T, T)
                seen = weights[:, :, 1:]
                entropy = torch.special.entr(seen).sum(-1)
                sums = seen.flatten(2) @ measures / (count - 1)  # of OF_OFFSETS, and of all offsets
                first = torch.stack([entropy.mean(-1), (entropy / sizes).mean(-1), seen[..., 0].mean(-1)], -1)
                distance = sums[..., 5:6] / sums[..., 6:]
                of_layers.append(torch.cat([first, sums[..., :5], distance], -1))
            total = total + torch.stack([weights.sum(0) for weights in attentions])  # (layers, heads, T, T)
            values.append(torch.stack(of_layers, 1))
            done += len(x)
            if limit and done >= limit:
                break
        means = torch.cat(values).double().mean(0).numpy()
        weights = total[:, :, 1:].flatten(0, 1).flatten(1).double().numpy() / done / (count - 1)
        shares = np.stack([np.bincount(offsets, row, offsets.max() + 1)[1:] for row in weights])
        return np.concatenate([means.ravel(), shares.ravel()])

    return call


def offsets_of(side: int) -> tuple[np.ndarray, torch.Tensor]:
    """Of pairs of a state from 1 on and a slot, P: the offset's number (P,), and what OF_OFFSETS weigh it by (P, 7).

    Numbers are 0 for no offset, then row by row upwards and from left to right. The last weight is of all offsets.
    """
    count = side * side
    state, slot = np.meshgrid(np.arange(1, count), np.arange(count), indexing="ij")
    pixel = slot - 1
    dy, dx = pixel // side - state // side, pixel % side - state % side
    wrap = (pixel == state - 1) & (state % side == 0)
    there = (slot > 0) & (pixel < state) & ~wrap
    of_measures = [wrap, (dy == 0) & (dx == -1), (dy == -1) & (dx == 0), dy == 0, dx == 0, np.hypot(dy, dx), 1]
    masks = np.stack([values * (there | (values is wrap)) for values in of_measures], -1)
    _, numbers = np.unique(np.where(there, -dy * 2 * side + dx + side, -1), return_inverse=True)
    return numbers.ravel(), torch.as_tensor(masks.reshape(-1, 7), dtype=torch.float32)
