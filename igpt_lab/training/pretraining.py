"""Pretraining by the paper's recipe, on the next pixel or on hidden ones, checkpointed whole and resumed exactly.

Speed on a CPU: blocks are compiled, attention is written out (`models.fast`), freed memory is kept
(`core.devices.memory_kept`), and matrix products are bfloat16 where the processor multiplies it. Blocks are compiled
one by one, and the embeddings not at all: their compiled backward pass adds up in an order that changes from run to
run.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device, drawing
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import digest
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import losses_of, masked_loss_of, next_pixel_loss
from igpt_lab.training import parallel
from igpt_lab.training.cards import write_pretraining_card
from igpt_lab.training.resuming import STATE, as_begun, in_use, note_run, palette_digest
from igpt_lab.training.settings import PretrainConfig
from igpt_lab.training.trainer import Trainer, batches, run, step_line, weights_digest


@checked
def pretrain(
    tokens: np.ndarray,
    config: ImageGPTConfig,
    recipe: PretrainConfig,
    out: str | Path,
    *,
    processor: ImageGPTImageProcessorPil | None = None,
    init: ImageGPTForCausalImageModeling | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Train on the next pixel, or on hidden ones, with palette indices.

    A run begins with random weights, or with those of `init`: released ones on images of one's own, or ones whose
    `state.safetensors` is lost. Its steps and its schedule begin at 0. Called again with the same arguments it goes on
    where it stopped, to the same numbers. `steps` and `cooldown` may change while the steps that were taken keep their
    learning rate, so that a run with a cooldown can be made longer or shorter. Under `torchrun` its processes share
    each batch, and a run may go on with another number of them; only the first writes. Ctrl-C ends it after the step at
    hand, saved.

    Args:
        tokens: Palette indices (N, T).
        config: Shape of the network.
        recipe: Settings of the run.
        out: Folder that is written.
        processor: Of the palette, kept beside the weights.
        init: A model of the shape of `config`, whose weights are the first.
        device: By default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `out`, a folder in the layout of transformers: `config.json`, `generation_config.json`, `model.safetensors`
        (float32), `preprocessor_config.json`, `log.csv` (a row every `log_every` steps: losses in nats per token and
        bits per pixel, tokens per second; in `tensorboard/` too, where TensorBoard is installed), `training.json`,
        `README.md` (a model card), `checkpoints/step-*/` (float16) and `state.safetensors`.

    Raises:
        ValueError: Other arguments than those of the run in `out`, which are named; a folder that another run works in,
            or that holds something else; tokens of another shape or palette, no image to train on, `init` of another
            shape.
        CheckpointError: A state file that is damaged, or of another run.
        FloatingPointError: The loss or weights are no numbers, or the loss jumps; the state of the last save stays.

    Example:
        >>> recipe = lab.PretrainConfig(steps=4, batch_size=8, warmup=1, holdout=20, validate=20, snapshots=2)
        >>> out = lab.pretrain(train_tokens, config, recipe, "run", processor=model.processor, progress=False)
        step 0: ...
        >>> log = pd.read_csv(out / "log.csv")
        >>> log[["step", "tokens", "validation_loss"]].head(1).round(3)  # ln 8: the head begins at zero
           step  tokens  validation_loss
        0     0       0            2.079
    """
    out, device = Path(out), best_device(device)
    tokens = np.ascontiguousarray(tokens)
    train, held_out = _split(tokens, config, recipe)
    parallel.check_batch(recipe.batch_size // recipe.accumulate)
    model = _first_weights(config, recipe.seed, init).to(device)
    recipe = as_begun(out / "training.json", "recipe", recipe).settled(config, device)
    made: dict[str, Any] = {"config": config.to_dict(), "recipe": asdict(recipe), "tokens": digest(tokens.tobytes())}
    made["init"] = None if init is None else weights_digest(init)
    made["palette"] = palette_digest(processor)
    with in_use(out):
        with parallel.first_alone():
            identity = note_run(out / "training.json", made, "recipe", recipe, _upgraded)
            if processor is not None and parallel.rank() == 0:
                processor.save_pretrained(out)
        trainer = Trainer(model, recipe, out / STATE, partial(_loss, model), shard=recipe.shard, run=identity)
        quiet = not progress or parallel.rank() != 0
        bar = tqdm(total=recipe.steps, initial=trainer.step, desc="pretrain", unit="step", disable=quiet)
        snapshot = partial(_snapshot, trainer, processor, out)
        with _board(out / "tensorboard", trainer.step) as show:
            report = partial(_report, trainer, recipe, held_out[: recipe.validate], bar, show)
            run(trainer, _batches(trainer, recipe, train), bar, report, snapshot, snapshot_steps(recipe))
        _write(trainer, processor, out)
        if parallel.rank() == 0:
            write_pretraining_card(out, config, recipe, (len(train), len(held_out)), trainer.log)
        parallel.wait()
    return out


def _first_weights(
    config: ImageGPTConfig, seed: int, init: ImageGPTForCausalImageModeling | None
) -> ImageGPTForCausalImageModeling:
    """The network before its first step: random, or with the weights of `init`."""
    with drawing(torch.device("cpu"), seed):  # what torch's layers draw before we do
        model = ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(seed))
    if init is not None:
        try:
            model.load_state_dict(init.state_dict())
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise ValueError(f"init and config are of different shapes: {what}") from error
    return model


def _batches(trainer: Trainer, recipe: PretrainConfig, train: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Pixels (batch_size, T) of the steps to come; of a bidirectional model also which of them are hidden, bool."""
    for positions in batches(len(train), recipe, trainer.step):
        random = np.random.default_rng([recipe.seed, 3, trainer.step])
        pixels = _flipped(train[positions], random) if recipe.flip else train[positions]
        if trainer.model.config.bidirectional:
            yield pixels, random.random(pixels.shape) < recipe.masked
        else:
            yield (pixels,)


def _write(
    trainer: Trainer, processor: ImageGPTImageProcessorPil | None, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the model as it is now; called by all processes of a sharded one."""
    model = trainer.plain()
    if parallel.rank() == 0:
        model.save_pretrained(folder, dtype=dtype)
        if processor is not None:
            processor.save_pretrained(folder)


def _snapshot(trainer: Trainer, processor: ImageGPTImageProcessorPil | None, out: Path) -> None:
    """Write float16 weights."""
    _write(trainer, processor, out / "checkpoints" / f"step-{trainer.step:06d}", torch.float16)


def snapshot_steps(recipe: PretrainConfig) -> list[int]:
    """The steps after which float16 weights are kept, the last one among them."""
    return [round(recipe.steps * (i + 1) / recipe.snapshots) for i in range(recipe.snapshots)]


@contextmanager
def _board(folder: Path, step: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Shows a row of the log in TensorBoard, in place of those after `step`; does nothing where it is not installed."""
    if parallel.rank() or importlib.util.find_spec("tensorboard") is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=step + 1) as writer:

        def show(row: dict[str, float]) -> None:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        yield show


def _report(
    trainer: Trainer, recipe: PretrainConfig, held_out: np.ndarray, bar: tqdm,
    show: Callable[[dict[str, float]], None],
) -> bool:  # fmt: skip
    """Add a row to the log of a pretraining, show and print it; False, as it goes on."""
    row = trainer.progress()
    trained, speed = row["train_loss"], row.pop("tokens_per_second")
    validated = _validation_loss(trainer.model.eval(), held_out, recipe)
    trainer.enter({
        **row,
        "train_bits_per_pixel": trained / math.log(2),
        "validation_loss": validated,
        "validation_bits_per_pixel": validated / math.log(2),
        "tokens_per_second": speed,
    })  # fmt: skip
    show(trainer.log[-1])
    if parallel.rank() == 0:
        bar.write(step_line(trainer.step, trained, validated, "nats per token", speed=speed))
    return False


def _loss(model: ImageGPTForCausalImageModeling, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
    return next_pixel_loss(model, pixels) if hidden is None else model(pixels, masked=hidden, labels=pixels).loss


def _validation_loss(model: ImageGPTForCausalImageModeling, tokens: np.ndarray, recipe: PretrainConfig) -> float:
    """Mean over pixels, and of a bidirectional model over hidden pixels, the same ones each time."""
    if not model.config.bidirectional:
        return float(losses_of(model, tokens, reduction="all"))
    hidden = np.random.default_rng([recipe.seed, 4]).random(tokens.shape) < recipe.masked
    return masked_loss_of(model, tokens, hidden)


def _split(tokens: np.ndarray, config: ImageGPTConfig, recipe: PretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, by a seeded draw; checks the tokens against the configuration."""
    if tokens.ndim != 2 or tokens.shape[1] != config.n_positions:
        raise ValueError(f"tokens of shape {tokens.shape}; expected (N, {config.n_positions})")
    if len(tokens) <= recipe.holdout:
        fewer = f"holdout={len(tokens) // 10 or 1} and a validate of no more"
        raise ValueError(f"holdout={recipe.holdout} of {len(tokens)} images leaves none to train on; try {fewer}")
    if tokens.max() >= config.n_colours:
        raise ValueError(f"token {tokens.max()} >= {config.n_colours} colours; encode with the palette of this model")
    checked_tokens(tokens, config)
    order = np.random.default_rng([recipe.seed, 1]).permutation(len(tokens))
    return tokens[np.sort(order[recipe.holdout :])], tokens[order[: recipe.holdout]]


def _flipped(batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Palette indices (n, T) of square images, every second one mirrored left to right, at random."""
    side = math.isqrt(batch.shape[1])
    images = batch.reshape(len(batch), side, side)
    return np.where(random.random(len(batch))[:, None, None] < 0.5, images[:, :, ::-1], images).reshape(batch.shape)


def _upgraded(begun: dict) -> None:
    """A pretraining may be older than some fields."""
    begun["config"] = json.loads(json.dumps(ImageGPTConfig.from_dict(begun.get("config", {})).to_dict()))
    begun["recipe"] = {"dtype": "float32", "compile": False} | begun["recipe"]
    begun.setdefault("init", None)
