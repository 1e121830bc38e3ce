"""The model card, README.md in the form of Hugging Face, that a run writes beside its weights.

A card whose mark was deleted is a person's, and is left alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from igpt_lab.core.provenance import atomic_write
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.training.settings import FinetuneConfig, PretrainConfig

MARK = "<!-- Written by igpt-lab. Delete this line, and no run writes over your text. -->"
UNKNOWN = "Not known to the run: where the images are from, and their licence. Add both before you share the weights."
LIMITS = "Nothing was tested on other images. Class accuracy and bias are not measured here."


def write_pretraining_card(
    folder: Path, config: ImageGPTConfig, recipe: PretrainConfig, rows: tuple[int, int], log: list[dict]
) -> None:
    """`rows`: numbers of images trained on and held out; `log`: rows of log.csv."""
    objective = "hidden pixels from all others" if config.bidirectional else "the next pixel"
    losses = ("train_loss", "validation_loss", "validation_bits_per_pixel")
    units = ("nats per token, training", "nats per token, held out", "bits per pixel, held out")
    sections = {
        "Model": f"ImageGPT, {shape_of(config)}. It predicts {objective}.",
        "Data": f"{rows[0]:,} images for training, {rows[1]:,} held out, as tokens. {UNKNOWN}",
        "Training": _settings(recipe, log),
        "Evaluation": _table(log, losses, units),
        "Limits": LIMITS,
    }
    _write(folder, "unconditional-image-generation", sections)


def write_finetuning_card(
    folder: Path, config: ImageGPTConfig, tuning: FinetuneConfig, images: str, rows: tuple[int, int], row: dict
) -> None:
    """`images`: their name; `rows` as above; `row`: of log.csv, that of the weights which were kept."""
    layer = config.n_layer if tuning.layer is None else tuning.layer
    losses = ("validation_loss", "validation_accuracy")
    sections = {
        "Model": f"ImageGPT, {shape_of(config)}. A class head sits on layer {layer}. Pixels follow a start token.",
        "Data": f"{_plain(images)}: {rows[0]:,} images for training, {rows[1]:,} held out. {UNKNOWN}",
        "Training": _settings(tuning, [row]),
        "Evaluation": _table([row], losses, ("nats per image, held out", "accuracy, held out, a fraction")),
        "Limits": LIMITS + " The held-out images chose the weights: their accuracy is too high.",
    }
    _write(folder, "image-classification", sections)


def shape_of(config: ImageGPTConfig) -> str:
    """`20 blocks of width 96, 144 positions, 32 colours`."""
    return (
        f"{config.n_layer} blocks of width {config.n_embd} with {config.n_head} heads, "
        f"{config.n_positions} positions, {config.n_colours} colours"
    )


def _settings(settings: PretrainConfig | FinetuneConfig, log: list[dict]) -> str:
    """A table of the settings that matter, and how far the run is."""
    names = ("optimizer", "learning_rate", "warmup", "cooldown", "batch_size", "flip", "clip", "seed", "dtype")
    rows = [f"| {name} | {getattr(settings, name)} |" for name in names if hasattr(settings, name)]
    taken = int(log[-1]["step"]) if log else 0
    return "\n".join(["| setting | value |", "|---|---|", f"| steps | {taken:,} of {settings.steps:,} |", *rows])


def _table(log: list[dict], columns: tuple[str, ...], units: tuple[str, ...]) -> str:
    last: Mapping = log[-1] if log else {}
    rows = [f"| {unit} | {last[name]:.4f} |" for name, unit in zip(columns, units, strict=True) if name in last]
    return "\n".join(["| measure | value |", "|---|---|", *rows])


def _plain(name: str) -> str:
    """A name that may be a stranger's, without what is markup."""
    return re.sub(r"[^\w .,-]", " ", name)[:80]


def _write(folder: Path, task: str, sections: dict[str, str]) -> None:
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    front = f"---\nlibrary_name: igpt-lab\npipeline_tag: {task}\ntags: [imagegpt, pytorch]\n---\n"
    body = [f"## {title}\n\n{text}\n" for title, text in sections.items()]
    about = "Written by a run of igpt-lab. The json file of the run has all settings and versions."
    title = f"# {_plain(folder.resolve().name)}\n\n{about}\n"
    atomic_write(path, "\n".join([front, MARK + "\n", title, *body]))
