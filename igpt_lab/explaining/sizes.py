"""On how many images `explain` runs each instrument, and how long that takes about.

Sizes are such that a model of 20 blocks of width 96 on 144 pixels takes about six minutes on two cores.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from igpt_lab.explaining.predictions import RADIUS
from igpt_lab.explaining.readouts import default_states
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import losses_of

TRAIN = {"probe": 2_000, "lens": 2_000, "bits": 2_500, "refit": 1_500, "attentive": 2_000}  # images, or all there are
TEST = {"probe": 1_000, "bits": 1_000, "refit": 1_000, "attentive": 1_000, "lens": 500, "few": 200, "heads": 100}
SHARES, LAYERS = 4, 7  # of prefixes, and those beside c
STEPS = 100  # of the tuned lens
RADII = (1, RADIUS, 7)
MEMORY = 2e9  # bytes of the states that the attentive probe keeps
FITS = 1.6  # all of the time but that of the readouts, over that of the forward passes
PASSES = 700  # over the training states, that the readouts of a layer take, in passes with as many classes as colours


def estimated_seconds(
    model: ImageGPTForCausalImageModeling,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    chosen: int | None = None,
) -> float:
    """How long `explain` takes about: FITS times the time of its forward passes, from that of 16 images, and readouts.

    Where c is not yet chosen it is taken to be in the middle.
    """
    tokens = tokens_of(model, train_images.select(np.arange(min(16, len(train_images)))))
    of_image = _best_time(lambda: losses_of(model, tokens)) / len(tokens)
    passes = image_passes(model.config, len(train_images), len(test_images), chosen)
    return FITS * passes * of_image + _seconds_of_readouts(model, min(TRAIN["bits"], len(train_images)))


def image_passes(config: ImageGPTConfig, n_train: int, n_test: int, chosen: int | None = None) -> float:
    """How many forward passes of an image `explain` takes about, of so many images of the two splits."""
    blocks = config.n_layer
    late = 1 - (blocks // 2 if chosen is None else chosen) / blocks
    test = {name: min(count, n_test) for name, count in TEST.items()}
    both = {name: min(count, n_train) + test[name] for name, count in TRAIN.items()}
    at_once = max(1, int(MEMORY // (state_bytes(config) * max(1, min(TRAIN["attentive"], n_train)))))
    passes: float = both["probe"] + both["bits"] + max(1, 3 / at_once) * both["attentive"] + test["lens"]
    passes += both["refit"] * (1 + blocks * late**2 / 2)
    passes += test["few"] * (1 + len(RADII) * (1 + late) + 3 * blocks / 2)
    return passes + test["heads"] * config.n_head * blocks / 2


def readout_flops(config: ImageGPTConfig, n_train: int) -> float:
    """Floating-point operations of the readouts: PASSES of two products for each layer."""
    images = min(TRAIN["bits"], n_train)
    rows = images * default_states(config, images)
    return PASSES * (config.n_layer + 1) * 4.0 * rows * config.n_embd * config.n_colours


def _seconds_of_readouts(model: ImageGPTForCausalImageModeling, images: int) -> float:
    """PASSES for each layer, from the time of one over random states; their number hardly depends on the images'."""
    config = model.config
    generator, device = torch.Generator().manual_seed(0), model.device
    rows = images * default_states(config, images)
    states = torch.randn(rows, config.n_embd, generator=generator).to(device)
    weights = torch.randn(config.n_embd, config.n_colours, generator=generator).to(device)
    of_pass = _best_time(lambda: (states.T @ (states @ weights).softmax(-1)).sum().item())
    return PASSES * (config.n_layer + 1) * of_pass


def _best_time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of four runs: the first is slower, and any may be disturbed."""
    return min(timeit.repeat(work, number=1, repeat=4))


def state_bytes(config: ImageGPTConfig) -> int:
    """Of the states of an image at one layer."""
    return 4 * config.n_positions * config.n_embd
