"""Commands over models: the loss of one, and OpenAI's originals into a folder of ours."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from pathlib import Path

import igpt_lab as lab
from igpt_lab.app.commands.options import (
    DEVICE,
    IMAGES,
    LIMIT,
    LIST,
    MODEL,
    ON_BAD_IMAGE,
    REVISION,
    SPLIT,
    STEP,
    argument,
    command,
    in_lines,
    loaded,
)


@command(
    MODEL,
    IMAGES,
    SPLIT,
    LIMIT,
    ON_BAD_IMAGE,
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "runs/mine photos --split train --limit 500"),
)
def evaluate(
    model: str, images: str, split: str, limit: int | None, on_bad_image: str, device: str | None, revision: str | None
) -> None:  # fmt: skip
    """A model's loss over the images of a split, start token in front, with its standard error over images."""
    from igpt_lab.core.devices import best_device
    from igpt_lab.models.loading import tokens_of
    from igpt_lab.models.losses import losses_of

    network = lab.load_model(model, revision=revision).to(best_device(device))
    if network.config.bidirectional:
        raise ValueError(f"{model} predicts masked pixels, so its loss needs masks: see igpt_lab.masked_pixel_loss")
    tokens = tokens_of(network, loaded(images, split, on_bad_image, limit=limit), progress=True)
    nats = losses_of(network, tokens, progress=True)
    error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    print(in_lines(f"{model} on {len(tokens):,} images of {images} {split}:"))
    print(f"{nats.mean():.4f} nats per token (standard error {error:.4f})")
    print(f"{nats.mean() / math.log(2):.4f} bits per pixel ({error / math.log(2):.4f})")


@command(
    argument("folder", help="folder with model.ckpt-STEP.index and its data files, or that prefix"),
    argument("out", help="folder for the model"),
    argument("--palette", metavar="FILE", help="its kmeans_centers.npy, when that is not in the folder"),
    argument("--step", type=int, help="step of the checkpoint, where the folder has several"),
    argument("--bert", action="store_true", default=None, help="fail unless it is a BERT model"),
    examples=("downloads/imagegpt-s runs/imagegpt-s", "downloads runs/imagegpt-s --step 131000"),
)
def convert_openai(folder: str, out: str, palette: str | None, step: int | None, bert: bool | None) -> None:
    """An original TensorFlow checkpoint into a model's folder; TensorFlow is not needed."""
    from igpt_lab.models import openai

    print(openai.describe(openai.find_openai(folder, step=step)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = openai.convert_openai(folder, out, palette=palette, step=step, bert=bert)
    for warning in caught:
        if warning.category is UserWarning:  # a missing palette
            print(f"igpt-lab: {warning.message}", file=sys.stderr)
    print(path)


@command(
    argument("--size", choices=["s", "m", "l"], help="size of the checkpoint (default: no checkpoint is fetched)"),
    argument("--step", **STEP, help="step of pretraining"),
    argument("--bert", action="store_true", help="the BERT model in place of the autoregressive one"),
    argument("--datasets", **LIST, choices=["cifar10", "imagenet"], help="32 x 32 images as tokens (default: none)"),
    argument(
        "--cache",
        metavar="FOLDER",
        help="where files are kept (default: igpt-lab/openai under ~/.cache or XDG_CACHE_HOME)",
    ),
    examples=("--size s --datasets cifar10", "--size s --step 131000 --cache downloads"),
)
def download_openai(size: str | None, step: int, bert: bool, datasets: list[str] | None, cache: str | None) -> None:
    """Fetch what OpenAI published: a checkpoint with its palette, and images as tokens; prints what comes next."""
    from igpt_lab.models import openai

    names = datasets or []
    folder = openai.download_openai(size, step, bert=bert, datasets=names, cache=cache)
    if size:
        print(f"igpt-lab convert-openai {shlex.quote(str(folder))} OUT")
    for name in names:
        tokens = Path(cache or openai.cache_folder()) / "datasets" / name
        print(f"igpt-lab extract {'OUT' if size else 'MODEL'} {shlex.quote(str(tokens))}")
