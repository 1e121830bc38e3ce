"""What a forward pass costs, by arithmetic on a model's shape."""

from __future__ import annotations

import os

import torch

from igpt_lab.models.config import ImageGPTConfig


def inner_width(config: ImageGPTConfig) -> int:
    """Width between the two matrices of a block's MLP: `n_inner`, or 4 D."""
    return config.n_inner or 4 * config.n_embd


def block_weights(config: ImageGPTConfig) -> int:
    """Numbers in the matrices of all L blocks, without biases and norms: 12 L D^2 where the MLP is 4 D wide."""
    return config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner_width(config))


def check_room(config: ImageGPTConfig) -> None:
    """ValueError for a model whose weights this machine has no memory for, before any is made."""
    vectors = 2 * config.vocab_size + config.n_positions + config.num_labels
    needed = 4 * (block_weights(config) + vectors * config.n_embd)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > memory and not torch.empty(0).is_meta:
        sizes = ", ".join(f"{n} {getattr(config, n)}" for n in ("n_layer", "n_embd", "vocab_size", "n_positions"))
        raise ValueError(f"{sizes}: {needed / 1e9:,.1f} GB of weights, and this machine has {memory / 1e9:,.1f} GB")


def flops(config: ImageGPTConfig, *, head: bool = False, square: bool = False) -> float:
    """Floating-point operations of a forward pass over an image of T positions; a training step takes three times that.

    A multiply-add is two. Only matrix products count.

    Args:
        config: Shape of the model.
        head: Count the output layer as well, D x V.
        square: Count attention over all T x T pairs, as is common elsewhere; else over the pairs that each position
            sees, T (T + 1) / 2.

    >>> from igpt_lab.models.config import SIZES
    >>> f"{flops(SIZES['L']):.2e}"
    '2.94e+12'
    """
    positions, width = config.n_positions, config.n_embd
    seen = positions if square else (positions + 1) / 2
    weights = block_weights(config) + head * width * config.n_colours
    return positions * (2 * weights + 4 * config.n_layer * width * seen)
