"""Commands that train a model and use what was trained: pretrain, finetune, classify."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app.commands.options import (
    CONFIG,
    DEVICE,
    IMAGES,
    LABEL,
    LIMIT,
    MODEL,
    ON_BAD_IMAGE,
    REVISION,
    argument,
    command,
    loaded,
    train_and_test,
)

SHAPE = {"side": 20, "colours": 32, "layers": 16, "width": 64, "heads": 2}  # of a network that pretrain begins anew
SHAPE_HELP = {
    "side": "side of the images, in pixels", "colours": "number of colours of the palette",
    "layers": "number of blocks", "width": "width of the states", "heads": "number of attention heads in a block",
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@command(
    IMAGES,
    argument("--out", required=True, help="folder for the model, its log and its checkpoints"),
    argument(
        "--init", metavar="MODEL", help="begin with this model's weights, shape and palette, not with random ones"
    ),
    # No default in the parser: --init has to know which of them were given.
    *(argument(f"--{name}", type=int, help=f"{SHAPE_HELP[name]} (default: {SHAPE[name]})") for name in SHAPE),
    argument(
        "--bert", action="store_true", help="predict hidden pixels from all others, as the paper's BERT models do"
    ),
    LIMIT,
    ON_BAD_IMAGE,
    DEVICE,
    REVISION,
    config="PretrainConfig",
    examples=(
        "photos --out runs/mine --steps 2000",
        "photos --out runs/more --init runs/mine --steps 500 --cooldown 400",
    ),
)
def pretrain(
    images: str, out: str, init: str | None, bert: bool, limit: int | None, on_bad_image: str,
    device: str | None, revision: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Train an ImageGPT on the train split of an image set; the same command goes on where it stopped."""
    from igpt_lab.models.loading import tokens_of
    from igpt_lab.training import parallel
    from igpt_lab.training.resuming import in_use

    chosen = {name: options.pop(name) for name in SHAPE}
    shape = {name: default if chosen[name] is None else chosen[name] for name, default in SHAPE.items()}
    recipe = lab.PretrainConfig(**options)
    source = loaded(images, "train", on_bad_image, limit=limit)
    if init is not None and (bert or any(value is not None for value in chosen.values())):
        raise ValueError(f"--init {init} sets the shape of the network; leave out --bert, --{', --'.join(SHAPE)}")
    with parallel.together(), in_use(Path(out)):
        if init is not None:
            begun = lab.load_model(init, revision=revision)
            tokens, config = tokens_of(begun, source), replace(begun.config, **NO_DROPOUT)
            print(lab.pretrain(tokens, config, recipe, out, processor=begun.processor, init=begun, device=device))
            return
        with parallel.first_alone():
            _save_palette(source, Path(out), shape)
        processor = lab.ImageGPTImageProcessorPil.from_pretrained(out)  # as every later call reads it, to the last bit
        config = lab.ImageGPTConfig(
            vocab_size=shape["colours"] + 1, n_positions=shape["side"] ** 2, n_embd=shape["width"],
            n_layer=shape["layers"], n_head=shape["heads"], bidirectional=bert, **NO_DROPOUT,
        )  # fmt: skip
        print(lab.pretrain(lab.tokenize(source, processor), config, recipe, out, processor=processor, device=device))


def _save_palette(source: Any, out: Path, shape: dict[str, int]) -> None:
    """Fit the palette of a new model to its images and write it into `out`, unless that of the same images is there."""
    import numpy as np

    from igpt_lab.core.hub import read_json, write_json

    palette, note = out / "preprocessor_config.json", out / "palette.json"
    made = {"images": source.fingerprint}
    made |= {name: shape[name] for name in ("side", "colours")}
    if palette.exists():
        older = (out / "training.json").exists() and not note.exists()  # its tokens say whether it is the same run
        if not older and (not note.exists() or read_json(note) != made):
            raise ValueError(
                f"{out} holds a palette ({palette.name}) of other images, side or colours, as {note.name} says; "
                "choose another folder, or give the same arguments to continue"
            )
        return
    blank = lab.ImageGPTImageProcessorPil(np.zeros((1, 3)), shape["side"])
    fitted = lab.ImageGPTImageProcessorPil(lab.fit_palette(blank.resize(iter(source)), shape["colours"]), shape["side"])
    write_json(note, made)
    fitted.save_pretrained(out)


@command(
    MODEL,
    IMAGES,
    argument("--out", required=True, help="folder for the classifier, its log, and what it gets wrong"),
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    argument("--random", action="store_true", help="train from scratch, with random weights"),
    DEVICE,
    REVISION,
    argument("--class-weights", choices=["balanced"], help="weigh each class by the inverse of its number of images"),
    config="FinetuneConfig",
    examples=("fashion-xs fashion-mini --out runs/tuned", "runs/mine photos --out runs/tuned --layer 8 --per-class 25"),
)
def finetune(
    model: str, images: str, out: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, random: bool,
    device: str | None, revision: str | None,
    **tuning: Any,
) -> None:  # fmt: skip
    """Fine-tune a model on the labels of the train split, then meet the test split once; resumes as `pretrain` does."""
    from igpt_lab.training import parallel
    from igpt_lab.training.resuming import in_use

    settings = lab.FinetuneConfig(**tuning)
    train, test = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    if len(train) == len(test) and train.fingerprint == test.fingerprint:
        raise ValueError(
            f"{images} gives the same images for train and test; expected images in folders train and test"
        )
    network = lab.load_model(model, revision=revision, random=random)
    with parallel.together(), in_use(Path(out)):
        lab.finetune(network, train, settings, out, device=device)
        if not parallel.rank():
            _meet(model, images, network, train, test, Path(out), device, settings.seed)


def _meet(
    model: str, images: str, network: Any, train: Any, test: Any, out: Path, device: str | None, seed: int
) -> None:
    """Print and draw what the classifier in `out` says of the test split."""
    import numpy as np

    from igpt_lab.probing.labels import say_unseen

    classified = lab.classify(lab.load_classifier(out, device=device), test)
    say_unseen(test.require_labels(), np.unique(train.labels), train.label_names)
    accuracy, counts = classified.accuracy(), classified.confusion()
    record = lab.RunRecord("finetune", {"model": model, "images": images, **accuracy}, seed=seed)
    confusion = lab.figures.confusion_matrix(counts, title=f"{network.name}, fine-tuned on {train.name}")
    files = lab.figures.save_figure(confusion, out / "confusion", data=counts, record=record)
    mistakes = classified.mistakes()
    if len(mistakes) and hasattr(test, "column"):
        table = classified.table().iloc[mistakes]
        titles = [f"{row.predicted}, not {row.label}" for row in table.itertuples()]
        pictures = network.processor.resize(test.images(mistakes))
        title = f"{network.name}, fine-tuned on {train.name}: mistakes"
        gallery = lab.figures.gallery(pictures, columns=4, scale=12, titles=titles, title=title)
        files += lab.figures.save_figure(gallery, out / "mistakes", data=table, record=record)
    interval = f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
    print(f"{classified.correct.mean():.1%} {interval} of {len(test):,} test images right", *files, sep="\n")


@command(
    argument("folder", help="folder that finetune wrote, or Hub name of a classifier"),
    argument("files", nargs="+", metavar="FILE", help="picture files"),
    argument("--top", type=int, default=3, help="labels to print of each file"),
    DEVICE,
    REVISION,
    examples=("runs/tuned photo.png", "runs/tuned one.png two.jpg --top 5"),
)
def classify(folder: str, files: list[str], top: int, device: str | None, revision: str | None) -> int:
    """Print the most probable labels of picture files, by a model that `finetune` wrote; 1 where one cannot be read."""
    read: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*this head starts at zero")  # `lab.classify` refuses it in a line
        model = lab.load_classifier(folder, revision=revision, device=device)
    pictures = _pictures(files, read)
    first = next(pictures, None)
    if first is None:
        return 1
    classified = lab.classify(model, chain([first], pictures))
    for file, probabilities in zip(read, classified.probabilities, strict=True):
        best = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])[:top]
        names = [" ".join(classified.names[k].split()) for k in best]  # on one line, whatever a stranger's model says
        print(f"{file}  " + "  ".join(f"{name} {probabilities[k]:.1%}" for name, k in zip(names, best, strict=True)))
    return int(len(read) < len(files))


def _pictures(files: list[str], read: list[str]) -> Iterator[Any]:
    """The pictures that can be read, whose files are added to `read`; stderr names each of the others."""
    from igpt_lab.images.opening import read_image

    for file in files:
        try:
            picture = read_image(file)
        except (ValueError, OSError) as error:
            print(f"igpt-lab: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            read.append(file)
            yield picture
