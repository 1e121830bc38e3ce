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
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.core.devices import best_device
from igpt_lab.core.provenance import digest
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import losses_of, masked_loss_of, next_pixel_loss
from igpt_lab.training import parallel
from igpt_lab.training.trainer import Trainer, batches, check_update, note_run, run, weights_digest

WORTH_COMPILING = 5e13  # multiply-adds, times 2, of a run: minutes on two CPU cores, where compiling takes half of one


@dataclass(frozen=True)
class Recipe:
    """The paper's: Adam 0.9 / 0.95, linear warm-up, cosine to 0, no weight decay, no dropout, no biases.

    A step is `batch_size` images, in `accumulate` equal parts one after another. `holdout` images are drawn from the
    data and never trained on; the first `validate` of them are scored every `log_every` steps. The full state is
    written every `save_every` steps, and float16 weights at `snapshots` evenly spaced steps.

    `cooldown` above 0 replaces the cosine: the learning rate stays, and falls to 0 in a straight line over the last
    `cooldown` steps. `clip` bounds the gradient's norm. `flip` mirrors every second image, at random. `optimizer`
    "muon" updates the blocks' matrices by Muon (Jordan et al., 2024, at the learning rate of Adam), the rest by Adam.
    Of a bidirectional model the loss is that of the pixels which are hidden from it, each with probability `masked`.
    `spike`: the run stops when the loss of the steps since the last save is so many nats above the lowest before.
    `dtype` of the matrix products, "float32" or "bfloat16"; `compile` the blocks; `recompute` activations in the
    backward pass, for models that are too large. None leaves these to the machine: see `settled`. `shard`: of several
    processes each holds its share of weights, gradients and moments, for models that are larger still.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup: int = 200
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adam"
    clip: float | None = None
    flip: bool = False
    accumulate: int = 1
    holdout: int = 3000
    validate: int = 500
    log_every: int = 100
    save_every: int = 50
    snapshots: int = 6
    spike: float = 1.0
    masked: float = 0.15
    seed: int = 0
    dtype: str | None = None
    compile: bool | None = None
    recompute: bool = False
    shard: bool = False

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.warmup <= self.steps - self.cooldown <= self.steps:
            raise ValueError(f"expected steps and batch_size above 0, warmup and cooldown within steps; got {self}")
        if not 0 < self.validate <= self.holdout:
            raise ValueError(f"validate={self.validate} of holdout={self.holdout} images; expected 1..holdout")
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked}; expected a share of the pixels, above 0 and below 1")
        check_update(self)

    def settled(self, config: ImageGPTConfig, device: torch.device) -> Recipe:
        """With what is None chosen for a device: bfloat16 where it multiplies it, compiled where that pays."""
        on_cpu, dtype = device.type == "cpu", self.dtype
        if dtype is None:
            gains = device.type == "cuda" or on_cpu and torch.cpu.get_capabilities().get("avx512_bf16", False)
            dtype = "bfloat16" if gains else "float32"
        if (compile := self.compile) is None:
            weights = 12 * config.n_layer * config.n_embd**2
            long = 6 * weights * self.steps * self.batch_size * config.n_positions > WORTH_COMPILING
            compile = long and (
                device.type == "cuda" or on_cpu and shutil.which(os.environ.get("CXX", "g++")) is not None
            )
        return replace(self, dtype=dtype, compile=compile)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear up to `warmup`, half a cosine or `cooldown` down to 0 at `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.cooldown:
            return self.learning_rate * min(1, (self.steps - step) / self.cooldown)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def pretrain(
    tokens: np.ndarray,
    config: ImageGPTConfig,
    recipe: Recipe,
    out: str | Path,
    *,
    processor: ImageGPTImageProcessorPil | None = None,
    init: ImageGPTForCausalImageModeling | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Train on palette indices (N, T); returns `out`, a folder in the port's layout.

    A run begins with random weights, or with those of `init`, whose shape must be that of `config`: released ones on
    images of one's own, or ones whose `state.safetensors` is lost. Its steps and its schedule begin at 0.

    `out` gets `config.json`, `model.safetensors` (float32), `preprocessor_config.json`, `log.csv` (a row every
    `log_every` steps: losses in nats per token and bits per pixel, tokens per second; in `tensorboard/` too, where
    TensorBoard is installed), `training.json`, `checkpoints/step-*/` (float16) and `state.safetensors`. Called again
    with the same arguments it goes on where it stopped, to the same numbers; with others it raises ValueError and names
    what differs. `steps` and `cooldown` may change while the steps that were taken keep their learning rate, so that a
    run with a cooldown can be made longer or shorter. Under `torchrun` its processes share each batch, and a run may go
    on with another number of them; only the first writes. Ctrl-C ends it after the step at hand, saved.
    """
    out, tokens, device = Path(out), np.ascontiguousarray(tokens), torch.device(device or best_device())
    train, held_out = _split(tokens, config, recipe)
    parallel.check_batch(recipe.batch_size // recipe.accumulate)
    model = ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(recipe.seed)).to(device)
    if init is not None:
        try:
            model.load_state_dict(init.state_dict())
        except RuntimeError as error:
            raise ValueError(f"init and config are of different shapes: {error}") from error
    with parallel.first_alone():
        recipe = recipe.settled(config, device)
        made = {"config": config.to_dict(), "recipe": asdict(recipe), "tokens": digest(tokens.tobytes())}
        made["init"] = None if init is None else weights_digest(init)
        note_run(out / "training.json", made, "recipe", recipe, _upgraded)
        if processor is not None and parallel.rank() == 0:
            processor.save_pretrained(out)
    trainer = Trainer(model, recipe, out / "state.safetensors", partial(_loss, model))
    quiet = not progress or parallel.rank() != 0
    bar = tqdm(total=recipe.steps, initial=trainer.step, desc="pretrain", unit="step", disable=quiet)

    def write(folder: Path, dtype: torch.dtype | None = None) -> None:
        plain = trainer.plain()
        if parallel.rank() == 0:
            plain.save_pretrained(folder, dtype=dtype)
            if processor is not None:
                processor.save_pretrained(folder)

    def snapshot() -> None:
        if trainer.step in snapshot_steps(recipe):
            write(out / "checkpoints" / f"step-{trainer.step:06d}", torch.float16)

    def batch(positions: np.ndarray) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng([recipe.seed, 3, trainer.step])
        pixels = _flipped(train[positions], random) if recipe.flip else train[positions]
        return (pixels, random.random(pixels.shape) < recipe.masked) if config.bidirectional else (pixels,)

    drawn = (batch(positions) for positions in batches(len(train), recipe, trainer.step))
    with _board(out / "tensorboard", trainer.step) as show:
        run(trainer, drawn, bar, lambda: _report(trainer, held_out[: recipe.validate], bar, show), snapshot)
    write(out)
    parallel.wait()
    return out


def snapshot_steps(recipe: Recipe) -> list[int]:
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


def _report(trainer: Trainer, held_out: np.ndarray, bar: tqdm, show: Callable[[dict[str, float]], None]) -> bool:
    """Add a row to the log of a pretraining, show and print it; False, as it goes on."""
    row = trainer.progress()
    trained, speed = row["train_loss"], row.pop("tokens_per_second")
    with torch.compiler.set_stance("force_eager"):  # once in a while: not worth compiling for
        validated = _validation_loss(trainer.model.eval(), held_out, trainer.recipe)
    trainer.enter({
        **row,
        "train_bits_per_pixel": trained / math.log(2),
        "validation_loss": validated,
        "validation_bits_per_pixel": validated / math.log(2),
        "tokens_per_second": speed,
    })  # fmt: skip
    show(trainer.log[-1])
    if parallel.rank() == 0:
        bar.write(
            f"step {trainer.step}: {speed:,.0f} tokens/s, train {trained:.4f}, validation {validated:.4f} nats per "
            f"token ({validated / math.log(2):.4f} bits per pixel)"
        )
    return False


def _loss(model: ImageGPTForCausalImageModeling, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
    return next_pixel_loss(model, pixels) if hidden is None else model(pixels, masked=hidden, labels=pixels).loss


def _validation_loss(model: ImageGPTForCausalImageModeling, tokens: np.ndarray, recipe: Recipe) -> float:
    """Mean over pixels, and of a bidirectional model over hidden pixels, the same ones each time."""
    if not model.config.bidirectional:
        return float(losses_of(model, tokens, reduction="all"))
    hidden = np.random.default_rng([recipe.seed, 4]).random(tokens.shape) < recipe.masked
    return masked_loss_of(model, tokens, hidden)


def _split(tokens: np.ndarray, config: ImageGPTConfig, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, by a seeded draw; checks the tokens against the configuration."""
    if tokens.ndim != 2 or tokens.shape[1] != config.n_positions or len(tokens) <= recipe.holdout:
        raise ValueError(
            f"tokens of shape {tokens.shape}; expected (N, {config.n_positions}) with N above holdout={recipe.holdout}"
        )
    if tokens.max() >= config.n_colours:
        raise ValueError(f"token {tokens.max()} >= {config.n_colours} colours; encode with the palette of this model")
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
