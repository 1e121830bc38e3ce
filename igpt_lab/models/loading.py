"""A model with its name and its image processor, from a bundled name, a folder or the Hub; tokens as it reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from igpt_lab.core import hub
from igpt_lab.core.arguments import checked, local
from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import resolve
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.processor import CONFIG, ImageGPTImageProcessorPil
from igpt_lab.images.tokens import tokenize
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification


@checked
def load_model(
    source: str | Path, *, revision: str | None = None, random: bool = False, seed: int = 0
) -> ImageGPTForCausalImageModeling:
    """A model with its `name` and image `processor`, by a bundled name, a folder in transformers' layout or a Hub name.

    `revision` is a branch, tag or commit on the Hub. Without a palette, in its `preprocessor_config.json`, the
    processor is None: then token sets are all that can be fed. `random=True` keeps the shape and draws the weights anew
    with `seed`: the control that was never trained.
    """
    model = ImageGPTForCausalImageModeling.from_pretrained(source, revision=revision)
    model.name = Path(source).name
    if random:
        model.initialise(generator=torch.Generator().manual_seed(seed))
        model.name += "-random"
    here = local(source)
    known = str(source) in hub.bundled() or not here.is_dir()
    model.source = {"name": str(source if known else here.resolve()), "random": random, "seed": seed}
    model.processor = processor = processor_of(source, revision)
    if processor is not None and not _fit(processor, model.config):
        height, width = processor.size.values()
        raise hub.CheckpointError(
            f"{source}: the palette has {_colours(processor)} colours, its images {height} x {width} pixels; "
            f"the model has {model.config.n_colours} colours and {model.config.n_positions} positions; they do not fit"
        )
    return model


def processor_of(source: str | Path, revision: str | None) -> ImageGPTImageProcessorPil | None:
    """The image processor of a source, if it has one with a palette."""
    folder = hub.resolve(source, revision=revision, weights=False)
    if not (folder / CONFIG).is_file():
        return None
    processor = ImageGPTImageProcessorPil.from_pretrained(folder)
    return None if processor.clusters is None else processor


def _fit(processor: ImageGPTImageProcessorPil, config: ImageGPTConfig) -> bool:
    height, width = processor.size.values()
    return _colours(processor) == config.n_colours and height == width and height * width == config.n_positions


def _colours(processor: ImageGPTImageProcessorPil) -> int:
    return 0 if processor.clusters is None else len(processor.clusters)


def tokens_of(
    model: ImageGPTForCausalImageModeling | ImageGPTForImageClassification,
    images: ImageSet | TokenSet,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Palette indices uint16 (N, T) for a model, which for a token set may be without a processor."""
    if isinstance(images, TokenSet):
        return images.encoded(model.config.n_positions, model.config.n_colours)
    return tokenize(images, model.processor, progress=progress)


@checked
def load_classifier(
    source: str | Path, *, revision: str | None = None, device: str | torch.device | None = None
) -> ImageGPTForImageClassification:
    """A fine-tuned model with its `name` and image `processor` (None without a palette), for `classify`."""
    model = ImageGPTForImageClassification.from_pretrained(source, revision=revision).to(best_device(device))
    folder = resolve(source, revision=revision, weights=False)
    model.name = Path(source).name
    model.processor = ImageGPTImageProcessorPil.from_pretrained(folder) if (folder / CONFIG).is_file() else None
    return model
