"""Fine-tuning by the paper's recipe: L_gen + L_clf, a class head on the mean of a layer, stopped early on validation.

What is written loads as any ImageGPT does, here and in transformers. It was fed pixels with the start token in front,
as in pretraining: so must whoever loads it (`classify` does, or `losses.align`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import CheckpointError, read_json, resolve
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import digest
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.images.splits import few_per_class, stratified_split
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
from igpt_lab.models.loading import load_model, tokens_of
from igpt_lab.models.losses import align, cross_entropy
from igpt_lab.training import parallel
from igpt_lab.training.augmentation import augmentation
from igpt_lab.training.cards import write_finetuning_card
from igpt_lab.training.classifier import logits_of
from igpt_lab.training.heads import copied, norm_of, trained_weights, with_head
from igpt_lab.training.resuming import STATE, as_begun, in_use, note_run, palette_digest
from igpt_lab.training.settings import FinetuneConfig, PretrainConfig, fitted
from igpt_lab.training.trainer import Trainer, batches, run, step_line, weights_digest


@dataclass(frozen=True, eq=False)
class _Data:
    """What a run sees: `tokens` (N, T), `labels` (N,) of the classes `names`; rows to train on and rows held out."""

    images: ImageSet | TokenSet
    tokens: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray


@checked
def finetune(
    model: ImageGPTForCausalImageModeling | str | Path,
    images: ImageSet | TokenSet,
    tuning: FinetuneConfig,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Fine-tune a copy of a model on labelled images.

    Called again with the same arguments it goes on where it stopped, to the same numbers. `steps` and `cooldown` may
    change while the steps that were taken keep their learning rate. Under `torchrun` its processes share each batch, as
    in `pretrain`. Ctrl-C ends it after the step at hand, saved.

    Args:
        model: One that predicts pixels in their order, or what `load_model` takes.
        images: With labels; a part is held out as `tuning` says.
        tuning: Settings of the run.
        out: Folder that is written.
        device: By default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `out`, a classifier's folder for transformers too: `config.json`, `model.safetensors`,
        `preprocessor_config.json`, `log.csv` (a row every `log_every` steps: losses in nats, accuracy as a fraction),
        `finetuning.json`, `README.md` (a model card), `state.safetensors`, and in `causal/` the whole network with its
        pixel head, for `load_model` and `extract`. Both hold the weights that were best on validation.

    Raises:
        ValueError: Other arguments than those of the run in `out`, which are named; a folder that another run works in,
            or that holds something else; a bidirectional model, images without labels, or settings that do not fit the
            model.
        CheckpointError: A state file that is damaged, or of another run.
        FloatingPointError: The loss or weights are no numbers, or the loss jumps; the state of the last save stays.

    Example:
        >>> tuning = lab.FinetuneConfig(steps=2, batch_size=8, pad=0)
        >>> out = lab.finetune("tiny", train_images, tuning, "tuned", progress=False)
        step 0: ...
        >>> lab.classify(out, test_images, progress=False).probabilities.shape  # images, classes
        (100, 10)
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    out, device = Path(out), best_device(device)
    whole = copied(model).to(device)
    tuning = as_begun(out / "finetuning.json", "tuning", _checked(tuning, model, images))
    tuning = tuning.settled(whole.config, device)
    parallel.check_batch(tuning.batch_size // tuning.accumulate)
    data = _data(model, images, tuning, progress)
    with in_use(out):
        identity = _note(out, whole, data, tuning, model.processor)
        classifier = with_head(whole, data.names, tuning.layer or whole.config.n_layer)
        trainer = _trainer(whole, classifier, data, tuning, out, identity)
        quiet = not progress or parallel.rank() != 0
        bar = tqdm(total=tuning.steps, initial=trainer.step, desc="finetune", unit="step", disable=quiet)
        if not _is_over(trainer.log, tuning):
            report = partial(_report, trainer, tuning, classifier, data, bar)
            run(trainer, _batches(trainer, data, tuning, model.processor), bar, report)
        with parallel.first_alone():
            if parallel.rank() == 0:  # whose validation chose
                if tuning.holdout:
                    _take_best(trainer)
                whole.save_pretrained(out / "causal")
                classifier.save_pretrained(out)
                _write_card(out, whole, tuning, data, trainer.log)
    return out


def _write_card(
    out: Path, whole: ImageGPTForCausalImageModeling, tuning: FinetuneConfig, data: _Data, log: list[dict]
) -> None:
    """The card tells of the weights that were kept: the best on held-out images, or the last ones."""
    row = log[_best(log) if tuning.holdout else -1]
    write_finetuning_card(out, whole.config, tuning, data.images.name, (len(data.train), len(data.held_out)), row)


def _data(
    model: ImageGPTForCausalImageModeling, images: ImageSet | TokenSet, tuning: FinetuneConfig, progress: bool
) -> _Data:
    """The labels that may be used, all or few of each class, and their split."""
    if tuning.per_class is not None:
        subset = {"seed": 0, "draw": tuning.draw, "draws": tuning.draws}
        images = images.select(few_per_class(images.require_labels(), tuning.per_class, **subset))
    tokens, labels = tokens_of(model, images, progress=progress), images.require_labels()
    names = images.label_names or tuple(map(str, range(labels.max() + 1)))
    train, held_out = np.arange(len(labels)), np.zeros(0, np.int64)
    if tuning.holdout:
        train, held_out = stratified_split(labels, tuning.holdout, seed=tuning.seed, names=names)
    return _Data(images, tokens, labels, names, train, held_out)


def _note(
    out: Path, whole: ImageGPTForCausalImageModeling, data: _Data, tuning: FinetuneConfig,
    processor: ImageGPTImageProcessorPil | None,
) -> str:  # fmt: skip
    """Note what the run is made of, or compare it with what began the run in `out`; write the processor.

    Returns the digest of the run.
    """
    made = {
        "tuning": asdict(tuning),
        "alignment": "sos",
        "images": digest(data.tokens.tobytes() + data.labels.astype("<i8").tobytes()),
        "model": weights_digest(whole),
        "palette": palette_digest(processor),
        "classes": list(data.names),
        "pictures": data.images.fingerprint if tuning.augment == "images" else None,  # what is moved before it is read
    }
    with parallel.first_alone():
        identity = note_run(out / "finetuning.json", made, "tuning", tuning)
        if processor is not None and parallel.rank() == 0:
            processor.save_pretrained(out)
            processor.save_pretrained(out / "causal")
    return identity


def _trainer(
    whole: ImageGPTForCausalImageModeling, classifier: ImageGPTForImageClassification, data: _Data,
    tuning: FinetuneConfig, out: Path, identity: str,
) -> Trainer:  # fmt: skip
    """The run, which keeps the weights that were best on validation beside those of the last step."""
    weights = trained_weights(whole, classifier, tuning)
    best = {f"best.{name}": weight.detach().clone() for name, weight in weights.items()}
    of_classes = _class_weights(data.labels[data.train], len(data.names), tuning.class_weights).to(whole.device)
    loss, rate = _loss(whole, classifier, tuning, of_classes), tuning.head_rate
    return Trainer(whole, tuning, out / STATE, loss, weights=weights, head_rate=rate, kept=best, run=identity)


def _batches(
    trainer: Trainer, data: _Data, tuning: FinetuneConfig, processor: ImageGPTImageProcessorPil | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (batch_size, T), augmented, and labels (batch_size,) of the steps to come."""
    augmented = augmentation(data.images.select(data.train), data.tokens[data.train], processor, tuning)
    labels = data.labels[data.train]
    for rows in batches(len(labels), tuning, trainer.step):
        yield augmented(rows, trainer.step), labels[rows]


def _checked(
    tuning: FinetuneConfig, model: ImageGPTForCausalImageModeling, images: ImageSet | TokenSet
) -> FinetuneConfig:
    """With the layer, the learning rate and the place of the augmentation filled in."""
    blocks, config = model.config.n_layer, model.config
    if config.bidirectional:
        raise ValueError("fine-tuning puts the start token in front, and a bidirectional model has none")
    layer = blocks if tuning.layer is None else tuning.layer
    if not 1 <= layer <= blocks or not 0 <= tuning.freeze_below <= layer:
        raise ValueError(
            f"layer={layer}, freeze_below={tuning.freeze_below} of a model with {blocks} blocks; expected a layer from "
            f"1 to {blocks}, and freeze_below from 0 to that layer"
        )
    side, augment = math.isqrt(config.n_positions), tuning.augment
    if augment is None:
        augment = "tokens" if isinstance(images, TokenSet) or images[0].size == (side, side) else "images"
    if augment == "images" and isinstance(images, TokenSet):
        raise ValueError(f"{images.name} holds tokens: augment='images' needs the images they were made from")
    if augment == "tokens" and tuning.pad >= side:
        raise ValueError(f"pad={tuning.pad} of images of {side} x {side} pixels; expected less than a side")
    return replace(tuning, layer=layer, augment=augment, learning_rate=tuning.learning_rate or _tenth(model))


def _tenth(model: ImageGPTForCausalImageModeling) -> float:
    """A tenth of the learning rate that a model was pretrained with, or else of the recipe's."""
    usual = PretrainConfig(steps=200).learning_rate
    try:
        record = resolve(getattr(model, "source", {"name": ""})["name"], weights=False) / "training.json"
    except CheckpointError:  # the model is of no folder
        return usual / 10
    recipe = read_json(record).get("recipe") if record.is_file() else None
    rate = recipe.get("learning_rate", usual) if isinstance(recipe, dict) else usual
    try:
        return fitted(rate, float) / 10
    except TypeError as error:
        raise ValueError(f"{record}: learning_rate is {rate!r}; expected a number, or give a learning_rate") from error


def _loss(
    whole: ImageGPTForCausalImageModeling, classifier: ImageGPTForImageClassification, tuning: FinetuneConfig,
    weights: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """The function of pixels (n, T) and labels (n,) that is trained: generative L_gen + classifying L_clf."""
    layer, colours = classifier.config.n_layer, whole.config.n_colours
    in_the_middle = layer < whole.config.n_layer
    if tuning.recompute:
        classifier.gradient_checkpointing_enable()

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        ids = align(pixels, "sos", whole.config)
        generative: Tensor | float = 0.0
        if tuning.draws_pixels:
            output = whole.transformer(ids, use_cache=False, output_hidden_states=in_the_middle)
            states = last = output.last_hidden_state
            if in_the_middle:
                states = norm_of(whole, layer)(output.hidden_states[layer])
            generative = cross_entropy(whole.lm_head(last)[..., :colours], pixels)
        else:
            with torch.set_grad_enabled(not tuning.head_only):
                states = classifier.transformer.train()(ids, use_cache=False).last_hidden_state
        of_images = cross_entropy(classifier.score(states.mean(1)), labels, "none")
        return tuning.generative * generative + tuning.classifying * (weights[labels] * of_images).mean()

    return loss


def _class_weights(labels: np.ndarray, classes: int, setting: str | Sequence[float] | None) -> Tensor:
    """float32 (K,), with a mean of 1 over `labels` (N,); "balanced" is inverse to the images of each class."""
    counts = np.bincount(labels, minlength=classes)
    if setting is None:
        weights = np.ones(classes)
    elif setting == "balanced":
        weights = 1 / np.maximum(counts, 1)
    elif isinstance(setting, str) or len(setting) != classes:
        raise ValueError(f"class_weights={setting!r}; expected 'balanced', or a number for each of {classes} classes")
    else:
        weights = np.asarray(setting, float)
    if not (weights * counts).sum() > 0:
        raise ValueError(f"class_weights={setting!r} of {counts.tolist()} images; none is above 0 where images are")
    return torch.as_tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def _report(
    trainer: Trainer, tuning: FinetuneConfig, classifier: ImageGPTForImageClassification, data: _Data, bar: tqdm
) -> bool:
    """Add a row to the log, keep the weights if they are the best so far; whether to stop."""
    row = trainer.progress()
    speed = row.pop("tokens_per_second")
    row |= {"validation_loss": math.nan, "validation_accuracy": math.nan}
    validates = len(data.held_out) > 0
    if validates:
        logits = logits_of(classifier.eval(), data.tokens[data.held_out], 32, False)
        labels = torch.as_tensor(data.labels[data.held_out])
        row["validation_loss"] = cross_entropy(logits, labels).item()
        row["validation_accuracy"] = (logits.argmax(1) == labels).float().mean().item()
    trainer.enter(row | {"tokens_per_second": speed})
    if validates and _best(trainer.log) == len(trainer.log) - 1:
        for name, weight in trainer.weights.items():
            trainer.kept[f"best.{name}"].copy_(weight.detach())
    right = (f"{row['validation_accuracy']:.1%} right",) if validates else ()
    bar.write(step_line(trainer.step, row["train_loss"], row["validation_loss"], "nats", right, speed))
    return _is_over(trainer.log, tuning)


@torch.no_grad()
def _take_best(trainer: Trainer) -> None:
    """Put the weights that were best on validation into the network."""
    for name, weight in trainer.weights.items():
        weight.copy_(trainer.kept[f"best.{name}"])


def _best(log: list[dict]) -> int:
    """The first row with the lowest validation loss."""
    return min(range(len(log)), key=lambda i: log[i]["validation_loss"])


def _is_over(log: list[dict], tuning: FinetuneConfig) -> bool:
    """Has the best row of the log been the best for `patience` rows, or is the last step taken?"""
    if not log:
        return False
    return log[-1]["step"] >= tuning.steps or (tuning.holdout > 0 and len(log) - 1 - _best(log) >= tuning.patience)
