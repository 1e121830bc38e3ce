"""A class head on the mean of a layer of a whole network, and which weights of both learn.

A head on layer l < L is that of a classifier with l blocks whose last norm is block l's first (see the layers in the
README). The classifier shares its weights with the whole network.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from igpt_lab.core.devices import drawing
from igpt_lab.models.imagegpt import Block, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, Norm
from igpt_lab.training.settings import FinetuneConfig


def copied(model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """The same weights, without dropout."""
    config = replace(model.config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with drawing(torch.device("cpu"), 0):  # torch's layers draw weights, of which none stays
        copy = ImageGPTForCausalImageModeling(config, init=None)
    copy.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return copy


def with_head(
    whole: ImageGPTForCausalImageModeling, names: tuple[str, ...], layer: int
) -> ImageGPTForImageClassification:
    """The blocks below a layer, its norm and a new head at zero; parameters but the head's are those of `whole`."""
    config = replace(whole.config, n_layer=layer, num_labels=len(names), id2label=dict(enumerate(names)))
    with torch.device("meta"):
        classifier = ImageGPTForImageClassification(config, init=None)
    backbone, theirs = classifier.transformer, whole.transformer
    backbone.wte, backbone.wpe = theirs.wte, theirs.wpe
    backbone.h = theirs.h[:layer]
    backbone.ln_f = norm_of(whole, layer)
    classifier.score = nn.utils.skip_init(nn.Linear, config.n_embd, len(names), bias=False, device=whole.device)
    nn.init.zeros_(classifier.score.weight)
    return classifier


def norm_of(whole: ImageGPTForCausalImageModeling, layer: int) -> Norm:
    """The norm of a layer 1..L: block l's first one, or the last one of all."""
    backbone = whole.transformer
    return backbone.ln_f if layer == whole.config.n_layer else cast(Block, backbone.h[layer]).ln_1


def trained_weights(
    whole: ImageGPTForCausalImageModeling, classifier: ImageGPTForImageClassification, tuning: FinetuneConfig
) -> dict[str, Tensor]:
    """The parameters that a gradient reaches and nothing freezes, by name."""
    pixels, layer = tuning.draws_pixels, classifier.config.n_layer

    def learns(name: str) -> bool:
        if block := re.match(r"transformer\.h\.(\d+)\.(ln_1)?", name):
            number, norm = int(block[1]), block[2]
            reached = pixels or number < layer or (number == layer and norm)
            return bool(reached) and number >= tuning.freeze_below
        if name.startswith("lm_head"):
            return pixels
        return (pixels or layer == whole.config.n_layer) if "ln_f" in name else not tuning.freeze_below

    chosen: dict[str, Tensor] = {n: w for n, w in whole.named_parameters() if not tuning.head_only and learns(n)}
    return chosen | {"score.weight": classifier.score.weight}
