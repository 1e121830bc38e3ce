"""Draw images: free, or completing the upper part of given ones."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import trange

from igpt_lab.model import ImageGPTForCausalImageModeling


def sample(
    model: ImageGPTForCausalImageModeling, count: int, *, temperature: float = 1.0, seed: int = 0, progress: bool = True
) -> np.ndarray:
    """Draw `count` images: palette indices, int64 (S, T). `model.processor.decode` makes them uint8 images.

    As in the paper nothing is cut from the distribution: temperature 1, no top-k, no nucleus.
    """
    return _draw(model, np.empty((count, 0), np.int64), temperature, seed, progress)


def complete(
    model: ImageGPTForCausalImageModeling,
    tokens: np.ndarray,
    *,
    keep: float = 0.5,
    completions: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Keep the upper `keep` of each image, palette indices (S, T), and draw the rest: int64 (S, completions, T).

    The paper's figure keeps the upper half and draws four. Whole rows of pixels are kept.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != model.config.n_positions:
        raise ValueError(f"tokens of shape {tokens.shape}; expected (S, {model.config.n_positions})")
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep}; expected a fraction of the rows, from 0 to below 1")
    prime = tokens[:, : prime_rows(model, keep) * side(model)].repeat(completions, axis=0)
    drawn = _draw(model, prime.astype(np.int64), temperature, seed, progress)
    return drawn.reshape(len(tokens), completions, -1)


def side(model: ImageGPTForCausalImageModeling) -> int:
    """Pixels along a side of the model's square image."""
    return round(model.config.n_positions**0.5)


def prime_rows(model: ImageGPTForCausalImageModeling, keep: float) -> int:
    """Rows of pixels that `keep` leaves as they are."""
    return round(keep * side(model))


@torch.inference_mode()
def _draw(
    model: ImageGPTForCausalImageModeling, prime: np.ndarray, temperature: float, seed: int, progress: bool
) -> np.ndarray:
    """Continue primes int64 (S, p) to (S, T), one pixel a step behind a key-value cache.

    Image i draws with its own numbers, those of the generator [seed, i], by inverting the cumulative distribution: its
    pixels do not depend on what is drawn beside it.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}; expected a number above 0")
    config, device = model.config, model.device
    count, known = prime.shape
    uniform = np.stack([np.random.default_rng([seed, i]).random(config.n_positions) for i in range(count)])
    uniform = torch.as_tensor(uniform, device=device, dtype=torch.float32)
    tokens = torch.full((count, config.n_positions + 1), config.sos_token_id, device=device)
    tokens[:, 1 : known + 1] = torch.as_tensor(prime, device=device)

    def pick(logits: Tensor, column: int) -> Tensor:
        return _pick(logits.float() / temperature, uniform[:, column - 1, None])

    bar = partial(trange, desc="pixels", disable=not progress)
    return model.continue_(tokens, known + 1, pick, bar)[:, 1:].cpu().numpy()


def _pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """Logits (S, V) and uniform numbers (S, 1) in [0, 1) -> indices (S, 1), distributed as the softmax."""
    cumulative = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
