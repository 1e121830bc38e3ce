"""Next-pixel pretraining by the paper's recipe, checkpointed whole and resumed to the same numbers."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.checkpoints import CheckpointError, read_json, write_json
from igpt_lab.model import ImageGPTConfig, ImageGPTForCausalImageModeling, best_device, next_pixel_loss
from igpt_lab.pixels import ImageGPTImageProcessorPil
from igpt_lab.provenance import atomic_write, digest, versions


@dataclass(frozen=True)
class Recipe:
    """The paper's: Adam 0.9 / 0.95, linear warm-up, cosine to 0, no weight decay, no dropout, no biases.

    A step is one batch of `batch_size` images. `holdout` images are drawn from the data and never trained on; the first
    `validate` of them are scored every `log_every` steps. The full state is written every `save_every` steps, and
    float16 weights at `snapshots` evenly spaced steps.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    holdout: int = 3000
    validate: int = 500
    log_every: int = 100
    save_every: int = 50
    snapshots: int = 6
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(f"expected steps and batch_size above 0 and warmup within steps; got {self}")
        if not 0 < self.validate <= self.holdout:
            raise ValueError(f"validate={self.validate} of holdout={self.holdout} images; expected 1..holdout")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear up to `warmup`, then half a cosine down to 0 at `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def pretrain(
    tokens: np.ndarray,
    config: ImageGPTConfig,
    recipe: Recipe,
    out: str | Path,
    *,
    processor: ImageGPTImageProcessorPil | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Train on palette indices (N, T); returns `out`, a folder in the port's layout.

    `out` gets `config.json`, `model.safetensors` (float32), `preprocessor_config.json`, `log.csv` (a row every
    `log_every` steps: losses in nats per token and bits per pixel, tokens per second), `training.json`,
    `checkpoints/step-*/` (float16) and `state.safetensors`. Called again with the same arguments it goes on where it
    stopped, to the same numbers; with others it raises ValueError and names what differs. Ctrl-C ends it after the step
    at hand, saved.
    """
    out, tokens = Path(out), np.ascontiguousarray(tokens)
    train, held_out = _split(tokens, config, recipe)
    run = {"config": config.to_dict(), "recipe": asdict(recipe), "tokens": digest(tokens.tobytes())}
    _same_run(out / "training.json", run)
    if processor is not None:
        processor.save_pretrained(out)
    trainer = _Trainer(config, recipe, torch.device(device or best_device()), out / "state.safetensors")
    bar = tqdm(total=recipe.steps, initial=trainer.step, desc="pretrain", unit="step", disable=not progress)
    with bar, _interruptible() as interrupted:
        if not trainer.log:
            trainer.report(held_out, bar)
        for positions in _batches(len(train), recipe, trainer.step):
            trainer.update(train[positions])
            bar.update()
            if trainer.step % recipe.log_every == 0 or trainer.step == recipe.steps:
                trainer.report(held_out, bar)
            if trainer.step in snapshot_steps(recipe):
                snapshot = out / "checkpoints" / f"step-{trainer.step:06d}"
                trainer.model.save_pretrained(snapshot, dtype=torch.float16)
                if processor is not None:
                    processor.save_pretrained(snapshot)
            if trainer.step % recipe.save_every == 0 or trainer.step == recipe.steps or interrupted.is_set():
                trainer.save()
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped and saved after step {trainer.step}; call again to go on from there")
    trainer.model.save_pretrained(out)
    return out


def snapshot_steps(recipe: Recipe) -> list[int]:
    """The steps after which float16 weights are kept, the last one among them."""
    return [round(recipe.steps * (i + 1) / recipe.snapshots) for i in range(recipe.snapshots)]


@torch.inference_mode()
def next_pixel_loss_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 64, progress: bool = False
) -> float:
    """Mean of -log p(pixel | pixels before it) over palette indices (N, T), in nats per token."""
    total = torch.zeros((), device=model.device, dtype=torch.float64 if model.device.type != "mps" else torch.float32)
    for start in tqdm(range(0, len(tokens), batch_size), desc="loss", unit="batch", disable=not progress):
        batch = torch.as_tensor(tokens[start : start + batch_size].astype(np.int64), device=model.device)
        total += next_pixel_loss(model, batch) * len(batch)
    return total.item() / len(tokens)


class _Trainer:
    """Model, optimiser, step and log of one run; all of it, and nothing else, is in its state file."""

    def __init__(self, config: ImageGPTConfig, recipe: Recipe, device: torch.device, path: Path):
        self.recipe, self.path, self.step, self.log = recipe, path, 0, []
        generator = torch.Generator().manual_seed(recipe.seed)
        self.model = ImageGPTForCausalImageModeling(config, generator=generator).to(device)
        self.weights = {n: p for n, p in self.model.named_parameters() if not n.endswith("bias")}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.weights)  # the original has no biases: they stay zero
        self.adam = torch.optim.Adam(self.weights.values(), betas=recipe.betas, fused=device.type in ("cpu", "cuda"))
        self.moments = {}
        for name, weight in self.weights.items():
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            self.adam.state[weight] = {"step": torch.zeros((), device=device), **moments}
            self.moments |= {f"{key}.{name}": value for key, value in moments.items()}
        self.total = torch.zeros((), device=device)  # sum of the training losses since the last row of the log
        self.resume()
        self.clock, self.since = time.perf_counter(), self.step

    def tensors(self) -> dict[str, Tensor]:
        return {**{f"model.{n}": w.detach() for n, w in self.weights.items()}, **self.moments, "total": self.total}

    def save(self) -> None:
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        atomic_write(self.path, save(tensors, {"step": str(self.step), "log": json.dumps(self.log)}))
        atomic_write(self.path.parent / "log.csv", pd.DataFrame(self.log).to_csv(index=False, float_format="%.6g"))

    @torch.no_grad()
    def resume(self) -> None:
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                for name, tensor in self.tensors().items():
                    tensor.copy_(file.get_tensor(name))
                self.step, self.log = int(file.metadata()["step"]), json.loads(file.metadata()["log"])
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); delete it to begin again") from error
        for state in self.adam.state.values():
            state["step"].fill_(self.step)

    def update(self, batch: np.ndarray) -> None:
        """One step on palette indices (batch_size, T)."""
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        pixels = torch.as_tensor(batch.astype(np.int64)).to(self.model.device, non_blocking=True)
        self.adam.zero_grad()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            loss = next_pixel_loss(self.model.train(), pixels)
        loss.backward()
        self.adam.step()
        self.total += loss.detach()
        self.step += 1

    def report(self, held_out: np.ndarray, bar: tqdm) -> None:
        """Add a row to the log and print it; raises FloatingPointError when the loss is no longer a number."""
        positions = self.model.config.n_positions
        done = self.step % self.recipe.log_every or min(self.step, self.recipe.log_every)
        trained = self.total.item() / done if self.step else math.nan
        if self.step and not math.isfinite(trained):
            raise FloatingPointError(f"the loss is {trained} at step {self.step}; the last good state is {self.path}")
        speed = (self.step - self.since) * self.recipe.batch_size * positions / (time.perf_counter() - self.clock)
        validated = next_pixel_loss_of(self.model.eval(), held_out[: self.recipe.validate])
        self.log.append({
            "step": self.step,
            "tokens": self.step * self.recipe.batch_size * positions,
            "learning_rate": self.recipe.rate(max(0, self.step - 1)),
            "train_loss": trained,
            "train_bits_per_pixel": trained / math.log(2),
            "validation_loss": validated,
            "validation_bits_per_pixel": validated / math.log(2),
            "tokens_per_second": round(speed),
        })  # fmt: skip
        bar.write(
            f"step {self.step}: {speed:,.0f} tokens/s, train {trained:.4f}, validation {validated:.4f} nats per token"
            f" ({validated / math.log(2):.4f} bits per pixel)"
        )
        self.total.zero_()
        self.clock, self.since = time.perf_counter(), self.step


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


def _batches(rows: int, recipe: Recipe, step: int) -> Iterator[np.ndarray]:
    """Positions of the batches from `step` on: one shuffled pass after another, a function of the seed alone."""
    first = step * recipe.batch_size
    epoch, skip = divmod(first, rows)
    queue = np.random.default_rng([recipe.seed, 2, epoch]).permutation(rows)[skip:]
    for _ in range(step, recipe.steps):
        while len(queue) < recipe.batch_size:
            epoch += 1
            queue = np.concatenate([queue, np.random.default_rng([recipe.seed, 2, epoch]).permutation(rows)])
        yield queue[: recipe.batch_size]
        queue = queue[recipe.batch_size :]


def _same_run(path: Path, run: dict) -> None:
    """Write the run's arguments to `path`, or compare them with those that began it."""
    run = json.loads(json.dumps(run))
    if not path.exists():
        return write_json(path, {**run, "versions": versions()})
    begun = read_json(path)
    config = ImageGPTConfig.from_dict(begun.get("config", {})).to_dict()  # a run may be older than some fields
    begun["config"] = json.loads(json.dumps(config))
    for part in ("config", "recipe", "tokens"):
        if begun.get(part) != run[part]:
            raise ValueError(
                f"{path.parent} holds a run whose {part} differs: {begun.get(part)} there, {run[part]} here; "
                "choose another folder, or the same arguments to go on"
            )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C (and SIGTERM) sets the event instead of raising in the middle of a step."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
