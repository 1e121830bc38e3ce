"""Fine-tuning by the paper's recipe: L_gen + L_clf, a class head on the mean of a layer, stopped early on validation.

A head on layer l < L is that of a classifier with l blocks whose last norm is block l's first (see the layers in the
README), so what is written loads as any ImageGPT does, here and in transformers. It was fed pixels with the start token
in front, as in pretraining: so must whoever loads it (`classify` does, or `model.align`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import CheckpointError, read_json, resolve
from igpt_lab.core.provenance import digest
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.splits import few_per_class, stratified_split
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
from igpt_lab.models.loading import load_model, tokens_of
from igpt_lab.models.losses import align
from igpt_lab.training import parallel
from igpt_lab.training.classifier import logits_of
from igpt_lab.training.pretraining import Recipe
from igpt_lab.training.trainer import Trainer, batches, check_update, note_run, run, weights_digest


@dataclass(frozen=True)
class Tuning:
    """The paper's: L_gen + L_clf, Adam 0.9 / 0.95, a constant tenth of pretraining's learning rate, early stop.

    A step is `batch_size` images, in `accumulate` parts. `learning_rate` None: a tenth of that in the model's
    `training.json`, or else of `Recipe`'s; the class head learns at `head_rate` times it. With `cooldown` above 0,
    which the paper has not, it falls to 0 in a straight line over the last so many steps. `generative` and
    `classifying` weigh L_gen (nats per token) and L_clf (nats per image). The head sits on the mean over positions of
    `layer` 1..L, None for the last, `ln_f`. Below the layer `freeze_below` nothing learns, with `head_only` nothing but
    the head. `per_class` labels of each class are used, the subset `draw` of `few_per_class`, and nothing else.

    `class_weights`: one a class, or "balanced", inverse to its images; scaled to a mean of 1 over the training images.
    `flip` mirrors every second image at random, `pad` > 0 reflects so many pixels around it and crops its size at
    random; `augment` "tokens" does so to the tokens, "images" before they are resized; None takes tokens where the
    images have the model's size, and both give the same. `holdout`, a fraction of each class, is scored every
    `log_every` steps: the lowest L_clf, finer than an accuracy, decides which weights are kept, and `patience`
    scores without a lower one end the run. Without a holdout it ends after `steps`, with the last weights.
    `seed` draws the split, the batches and the augmentation. What else there is, is as in `Recipe`.
    """

    steps: int = 2000
    batch_size: int = 128
    learning_rate: float | None = None
    cooldown: int = 0
    head_rate: float = 1.0
    generative: float = 1.0
    classifying: float = 1.0
    layer: int | None = None
    freeze_below: int = 0
    head_only: bool = False
    per_class: int | None = None
    draw: int = 0
    class_weights: str | tuple[float, ...] | None = None
    flip: bool = True
    pad: int = 4
    augment: str | None = None
    holdout: float = 0.1
    patience: int = 10
    log_every: int = 50
    save_every: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adam"
    clip: float | None = None
    accumulate: int = 1
    spike: float = 1.0
    seed: int = 0
    dtype: str | None = None
    compile: bool | None = None
    recompute: bool = False

    settled = Recipe.settled

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.patience, self.log_every, self.save_every) < 1:
            raise ValueError(f"expected steps, batch_size, patience, log_every and save_every above 0; got {self}")
        check_update(self)
        if not 0 <= self.cooldown <= self.steps:
            raise ValueError(f"cooldown={self.cooldown}; expected 0 to steps={self.steps}")
        if self.generative < 0 or self.classifying <= 0 or not 0 <= self.holdout < 1:
            raise ValueError(f"expected generative >= 0, classifying > 0 and holdout in [0, 1); got {self}")
        if self.augment not in (None, "tokens", "images") or self.pad < 0:
            raise ValueError(
                f"augment={self.augment!r}, pad={self.pad}; expected 'tokens', 'images' or None, and pad >= 0 (flip "
                "False and pad 0 change no image)"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: the same until `cooldown` begins."""
        return self.learning_rate * min(1, (self.steps - step) / self.cooldown) if self.cooldown else self.learning_rate

    @property
    def draws_pixels(self) -> bool:
        """Is there an L_gen that anything learns from?"""
        return self.generative > 0 and not self.head_only


def finetune(
    model: ImageGPTForCausalImageModeling | str | Path,
    images: ImageSet | TokenSet,
    tuning: Tuning,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Fine-tune a copy of `model` on labelled images; returns `out`, a classifier's folder in the port's layout.

    `out` gets `config.json`, `model.safetensors`, `preprocessor_config.json`, `log.csv` (a row every `log_every` steps:
    losses in nats, accuracy as a fraction), `finetuning.json`, `state.safetensors`, and in `causal/` the whole network
    with its pixel head, for `load_model` and `extract`. Both hold the weights that were best on validation. Called
    again with the same arguments it goes on where it stopped, to the same numbers; with others it raises ValueError and
    names what differs. `steps` and `cooldown` may change while the steps that were taken keep their learning rate.
    Under `torchrun` its processes share each batch, as in `pretrain`. Ctrl-C ends it after the step at hand, saved.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    out, device, processor = Path(out), torch.device(device or best_device()), model.processor
    whole = _copied(model).to(device)
    tuning = _checked(tuning, model, images).settled(whole.config, device)
    parallel.check_batch(tuning.batch_size // tuning.accumulate)
    if tuning.per_class is not None:
        images = images.select(few_per_class(images.require_labels(), tuning.per_class, seed=0, draw=tuning.draw))
    tokens, labels = tokens_of(model, images, progress=progress), images.require_labels()
    names = images.label_names or tuple(map(str, range(labels.max() + 1)))
    train, held = stratified_split(labels, tuning.holdout, seed=tuning.seed) if tuning.holdout else (
        np.arange(len(labels)), np.zeros(0, np.int64))  # fmt: skip
    made = {
        "tuning": asdict(tuning), "alignment": "sos",
        "images": digest(tokens.tobytes() + labels.astype("<i8").tobytes()),
        "model": weights_digest(whole),
    }  # fmt: skip
    with parallel.first_alone():
        note_run(out / "finetuning.json", made, "tuning", tuning)
        if processor is not None and parallel.rank() == 0:
            processor.save_pretrained(out), processor.save_pretrained(out / "causal")
    classifier = _classifier(whole, names, tuning.layer)
    weights = _trained(whole, classifier, tuning)
    best = {f"best.{name}": weight.detach().clone() for name, weight in weights.items()}
    loss = _loss(whole, classifier, tuning, _class_weights(labels[train], len(names), tuning.class_weights).to(device))
    trainer = Trainer(
        whole, tuning, out / "state.safetensors", loss, weights=weights, faster=tuning.head_rate, kept=best
    )
    changed = _augmentation(images.select(train), tokens[train], processor, tuning)
    drawn = ((changed(rows, trainer.step), labels[train][rows]) for rows in batches(len(train), tuning, trainer.step))
    quiet = not progress or parallel.rank() != 0
    bar = tqdm(total=tuning.steps, initial=trainer.step, desc="finetune", unit="step", disable=quiet)
    if not _is_over(trainer.log, tuning):
        run(trainer, drawn, bar, lambda: _report(trainer, classifier, tokens[held], labels[held], bar))
    with parallel.first_alone():
        if parallel.rank() == 0:  # whose validation chose
            with torch.no_grad():
                for name, weight in weights.items() if tuning.holdout else ():
                    weight.copy_(best[f"best.{name}"])
            whole.save_pretrained(out / "causal"), classifier.save_pretrained(out)
    return out


def _checked(tuning: Tuning, model: ImageGPTForCausalImageModeling, images: ImageSet | TokenSet) -> Tuning:
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
    rate = Recipe(steps=200).learning_rate
    source = getattr(model, "source", {"name": ""})["name"]
    try:
        rate = read_json(resolve(source, weights=False) / "training.json")["recipe"]["learning_rate"]
    except (CheckpointError, KeyError, TypeError):
        pass
    return rate / 10


def _copied(model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """The same weights, without dropout."""
    config = replace(model.config, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    copy = ImageGPTForCausalImageModeling(config, init=None)
    copy.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return copy


def _classifier(
    whole: ImageGPTForCausalImageModeling, names: tuple[str, ...], layer: int
) -> ImageGPTForImageClassification:
    """The blocks below a layer, its norm and a new head at zero; parameters but the head's are those of `whole`."""
    config = replace(whole.config, n_layer=layer, num_labels=len(names), id2label=dict(enumerate(names)))
    with torch.device("meta"):
        classifier = ImageGPTForImageClassification(config, init=None)
    trunk, theirs = classifier.transformer, whole.transformer
    trunk.wte, trunk.wpe, trunk.h = theirs.wte, theirs.wpe, theirs.h[:layer]
    trunk.ln_f = theirs.ln_f if layer == whole.config.n_layer else theirs.h[layer].ln_1
    classifier.score = nn.Linear(config.n_embd, config.num_labels, bias=False, device=whole.device)
    nn.init.zeros_(classifier.score.weight)
    return classifier


def _trained(
    whole: ImageGPTForCausalImageModeling, classifier: ImageGPTForImageClassification, tuning: Tuning
) -> dict[str, Tensor]:
    """The parameters that a gradient reaches and nothing freezes, by name."""
    pixels, last = tuning.draws_pixels, whole.config.n_layer

    def learns(name: str) -> bool:
        if block := re.match(r"transformer\.h\.(\d+)\.(ln_1)?", name):
            number, norm = int(block[1]), block[2]
            reached = pixels or number < tuning.layer or number == tuning.layer and norm
            return bool(reached) and number >= tuning.freeze_below
        if name.startswith("lm_head"):
            return pixels
        return (pixels or tuning.layer == last) if "ln_f" in name else not tuning.freeze_below

    chosen = {n: w for n, w in whole.named_parameters() if not tuning.head_only and learns(n)}
    return chosen | {"score.weight": classifier.score.weight}


def _loss(
    whole: ImageGPTForCausalImageModeling, classifier: ImageGPTForImageClassification, tuning: Tuning, weights: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of pixels (n, T) and labels (n,) that is trained: generative L_gen + classifying L_clf."""
    blocks, middle = whole.transformer.h, tuning.layer < whole.config.n_layer
    if tuning.recompute:
        classifier.gradient_checkpointing_enable()

    def losses(pixels: Tensor, labels: Tensor) -> Tensor:
        ids, drawn = align(pixels, "sos", whole.config), 0.0
        if tuning.draws_pixels:
            found = whole.transformer(ids, use_cache=False, output_hidden_states=middle)
            last = found.last_hidden_state
            state = blocks[tuning.layer].ln_1(found.hidden_states[tuning.layer]) if middle else last
            drawn = F.cross_entropy(whole.lm_head(last)[..., : whole.config.n_colours].flatten(0, 1).float(),
                                    pixels.flatten())  # fmt: skip
        else:
            with torch.set_grad_enabled(not tuning.head_only):
                state = classifier.transformer.train()(ids, use_cache=False).last_hidden_state
        each = F.cross_entropy(classifier.score(state.mean(1)).float(), labels, reduction="none")
        return tuning.generative * drawn + tuning.classifying * (weights[labels] * each).mean()

    return losses


def _class_weights(labels: np.ndarray, classes: int, given: str | Sequence[float] | None) -> Tensor:
    """float32 (K,), with a mean of 1 over `labels` (N,); "balanced" is inverse to the images of each class."""
    counts = np.bincount(labels, minlength=classes)
    named = given is None or given == "balanced"
    if not named and (isinstance(given, str) or len(given) != classes):
        raise ValueError(f"class_weights={given!r}; expected 'balanced', or a number for each of {classes} classes")
    if given is None:
        weights = np.ones(classes)
    else:
        weights = 1 / np.maximum(counts, 1) if given == "balanced" else np.asarray(given, float)
    return torch.as_tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def _augmentation(
    images: ImageSet | TokenSet, tokens: np.ndarray, processor, tuning: Tuning
) -> Callable[[np.ndarray, int], np.ndarray]:
    """The function that gives the tokens (n, T) of rows (n,), moved at random, a function of the seed and the step."""
    side = math.isqrt(tokens.shape[1])
    if not tuning.flip and not tuning.pad:
        return lambda rows, step: tokens[rows]

    def changed(rows: np.ndarray, step: int) -> np.ndarray:
        random = np.random.default_rng([tuning.seed, 4, step])
        moves = random.random(len(rows)) < 0.5 * tuning.flip, random.integers(0, 2 * tuning.pad + 1, (len(rows), 2))
        if tuning.augment == "tokens":
            return moved(tokens[rows].reshape(-1, side, side), *moves, tuning.pad).reshape(len(rows), -1)
        given = [np.asarray(image) for image in images.images(rows)]
        return processor.encode([moved(image[None], *(each[i : i + 1] for each in moves), tuning.pad)[0]
                                 for i, image in enumerate(given)])  # fmt: skip

    return changed


def moved(images: np.ndarray, flipped: np.ndarray, corners: np.ndarray, pad: int) -> np.ndarray:
    """Images or tokens (n, H, W, ...), mirrored where bool (n,) says so, reflected `pad` around and cropped again.

    `corners`: (n, 2), the crop's upper left in the padded image, 0 to 2 pad. Pixels move and none is computed, so to
    move the tokens of an image is to move the image.
    """
    height, width = images.shape[1:3]
    mirrored = np.where(flipped.reshape(-1, *[1] * (images.ndim - 1)), images[:, :, ::-1], images)
    padded = np.pad(mirrored, [(0, 0), (pad, pad), (pad, pad), *[(0, 0)] * (images.ndim - 3)], mode="reflect")
    return np.stack([each[y : y + height, x : x + width] for each, (y, x) in zip(padded, corners, strict=True)])


def _report(
    trainer: Trainer, classifier: ImageGPTForImageClassification, tokens: np.ndarray, labels: np.ndarray, bar: tqdm
) -> bool:
    """Add a row to the log, keep the weights if they are the best so far; whether to stop."""
    row = trainer.progress()
    speed = row.pop("tokens_per_second")
    row |= {"validation_loss": math.nan, "validation_accuracy": math.nan}
    if len(labels):
        with torch.compiler.set_stance("force_eager"):
            logits = logits_of(classifier.eval(), tokens, 32, False)
        truth = torch.as_tensor(labels)
        row["validation_loss"] = F.cross_entropy(logits, truth).item()
        row["validation_accuracy"] = (logits.argmax(1) == truth).float().mean().item()
    trainer.enter(row | {"tokens_per_second": speed})
    if len(labels) and _best(trainer.log) == len(trainer.log) - 1:
        for name, weight in trainer.weights.items():
            trainer.kept[f"best.{name}"].copy_(weight.detach())
    bar.write(
        f"step {trainer.step}: {speed:,.0f} tokens/s, train {row['train_loss']:.4f}, validation "
        f"{row['validation_loss']:.4f} nats per image, {row['validation_accuracy']:.1%} right"
    )
    return _is_over(trainer.log, trainer.recipe)


def _best(log: list[dict]) -> int:
    """The first row with the lowest validation loss."""
    return min(range(len(log)), key=lambda i: log[i]["validation_loss"])


def _is_over(log: list[dict], tuning: Tuning) -> bool:
    """Has the best row of the log been the best for `patience` rows, or is the last step taken?"""
    if not log:
        return False
    return log[-1]["step"] >= tuning.steps or tuning.holdout > 0 and len(log) - 1 - _best(log) >= tuning.patience
