"""Pretraining by the paper's recipe, on the next pixel or on hidden ones, checkpointed whole and resumed exactly.

Speed on a CPU: blocks are compiled, attention is written out (`model.Attention.parts`), freed memory is kept
(`model.memory_kept`), and matrix products are bfloat16 where the processor multiplies it. Blocks are compiled one by
one, and the embeddings not at all: their compiled backward pass adds up in an order that changes from run to run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab import parallel
from igpt_lab.checkpoints import CheckpointError, read_json, write_json
from igpt_lab.model import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    best_device,
    memory_kept,
    next_pixel_loss,
)
from igpt_lab.pixels import ImageGPTImageProcessorPil
from igpt_lab.provenance import atomic_write, digest, versions

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


def check_update(settings) -> None:
    """ValueError for settings of a step, such as a `Recipe`, that `Trainer` cannot take."""
    if settings.accumulate < 1 or settings.batch_size % settings.accumulate:
        raise ValueError(f"batch_size={settings.batch_size} is no multiple of accumulate={settings.accumulate}")
    if settings.optimizer not in ("adam", "muon") or settings.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(
            f"optimizer={settings.optimizer!r}, dtype={settings.dtype!r}; expected 'adam' or 'muon', and 'float32' or "
            "'bfloat16' (float16 overflows in ImageGPT)"
        )


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


def run(
    trainer: Trainer,
    drawn: Iterable[tuple[np.ndarray, ...]],
    bar: tqdm,
    report: Callable[[], bool],
    snapshot: Callable[[], None] = lambda: None,
) -> None:
    """Take a step on each batch, report and save when they are due; `report` returns whether to stop.

    Of several processes the first one reports and writes; of a sharded model all work on that.
    """
    recipe, device, joins = trainer.recipe, trainer.model.device, parallel.rank() == 0 or trainer.sharded
    with bar, memory_kept(), _interruptible() as interrupted:
        if joins and not trainer.log:
            report()
        for batch in drawn:
            trainer.update(*batch)
            bar.update()
            stop, last = parallel.any_of(interrupted.is_set(), device), trainer.step == recipe.steps
            saves, reports = (trainer.step % every == 0 or last for every in (recipe.save_every, recipe.log_every))
            if saves or stop:
                trainer.check()
            ends = reports and parallel.any_of(joins and report(), device)
            if joins:
                snapshot()
                if saves or stop or ends:
                    trainer.save()
            if stop:
                raise KeyboardInterrupt(f"stopped and saved after step {trainer.step}; call again to go on from there")
            if ends:
                break


def snapshot_steps(recipe: Recipe) -> list[int]:
    """The steps after which float16 weights are kept, the last one among them."""
    return [round(recipe.steps * (i + 1) / recipe.snapshots) for i in range(recipe.snapshots)]


@torch.no_grad()  # not inference_mode, whose tensors a sharded model may not keep for its next step
def losses_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 64, progress: bool = False
) -> np.ndarray:
    """-log p(pixel | pixels before it), its mean over each image of palette indices (N, T): float64 (N,), in nats.

    Start token in front, all T pixels scored. Divided by ln 2 they are bits per pixel, as a token is a pixel.
    """
    found = []
    for start in tqdm(range(0, len(tokens), batch_size), desc="loss", unit="batch", disable=not progress):
        pixels = torch.as_tensor(tokens[start : start + batch_size].astype(np.int64)).to(model.device)
        found.append(next_pixel_loss(model, pixels, reduction="none").mean(1))
    return torch.cat(found).cpu().numpy().astype(np.float64) if found else np.zeros(0)


def next_pixel_loss_of(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, *, batch_size: int = 64, progress: bool = False
) -> float:
    """Mean of `losses_of`, in nats per token."""
    return float(losses_of(model, tokens, batch_size=batch_size, progress=progress).mean())


class Trainer:
    """Model, optimisers, step and log of one run; all of it, and nothing else, is in its state file.

    `loss(*parts)` is the mean over the images of a part of a batch. `weights`: the parameters that are trained, all by
    default, but never biases that are all zero: the original has none. `faster` times the learning rate is that of the
    `score` head. `kept`: further tensors of the run.
    """

    def __init__(
        self, model: torch.nn.Module, recipe, path: Path, loss: Callable[..., Tensor], *,
        weights: dict[str, Tensor] | None = None, faster: float = 1.0, kept: dict[str, Tensor] | None = None,
    ):  # fmt: skip
        self.model, self.recipe, self.path, self.loss, self.kept = model, recipe, path, loss, kept or {}
        self.step, self.log, self.lowest, device = 0, [], math.inf, model.device
        self.sharded = getattr(recipe, "shard", False) and parallel.world() > 1
        if self.sharded:
            parallel.shard(model, model.transformer.h)
        weights = dict(model.named_parameters()) if weights is None else weights
        biased = {n.removesuffix(".bias"): bool(w.any()) for n, w in model.named_parameters() if n.endswith(".bias")}
        for name, found in biased.items():
            model.get_submodule(name).biased = found
        self.weights = {n: w for n, w in weights.items() if biased.get(n.removesuffix(".bias"), True)}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_()
        self.optimisers, self.moments = [], {}
        matrices = {n: w for n, w in self.weights.items() if ".h." in n and w.ndim == 2 and recipe.optimizer == "muon"}
        others = {n: w for n, w in self.weights.items() if n not in matrices}
        heads = {n for n in others if n.startswith("score.") and faster != 1}
        groups = [{"params": [w for n, w in others.items() if n not in heads]}]
        if heads:
            groups.append({"params": [others[n] for n in heads], "faster": faster})
        adam = torch.optim.Adam(
            [group for group in groups if group["params"]], betas=recipe.betas, fused=device.type in ("cpu", "cuda")
        )
        self.add(adam, others, "exp_avg", "exp_avg_sq")
        if matrices:
            muon = torch.optim.Muon(matrices.values(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.add(muon, matrices, "momentum_buffer")
        if recipe.recompute:
            model.gradient_checkpointing_enable()
        positions = model.config.n_positions
        # in float32 and from 1,024 positions on the fused kernel is as fast on a CPU too, and takes less memory
        written = device.type == "cpu" and (positions < 1024 or recipe.dtype == "bfloat16")
        for block in model.transformer.h:
            block.attn.parts = math.ceil(positions / 128) if written else 0
            if recipe.compile:
                block.compile()
        self.total = torch.zeros((), device=device)  # sum of the training losses since the last row of the log
        self.unsaved = torch.zeros((), device=device)  # and since the last save
        self.resume()
        self.clock, self.since, self.saved = time.perf_counter(), self.step, self.step

    def add(self, optimiser: torch.optim.Optimizer, weights: dict[str, Tensor], *moments: str) -> None:
        """Take on an optimiser, with moments that a state file can fill before its first step."""
        for name, weight in weights.items():
            state = {key: torch.zeros_like(weight) for key in moments}
            optimiser.state[weight] = {"step": torch.zeros((), device=weight.device), **state}
            self.moments |= {f"{key}.{name}": value for key, value in state.items()}
        self.optimisers.append(optimiser)

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": weight.detach() for name, weight in self.weights.items()}
        return {**weights, **self.moments, **self.kept, "total": self.total}

    def plain(self) -> torch.nn.Module:
        """The model itself, or one on the CPU that has its weights where it is sharded; called by all processes."""
        if not self.sharded:
            return self.model
        whole = {name: parallel.whole(weight).cpu() for name, weight in self.model.state_dict().items()}
        model = ImageGPTForCausalImageModeling(self.model.config)
        model.load_state_dict(whole)
        return model

    def save(self) -> None:
        tensors = {name: parallel.whole(tensor).cpu() for name, tensor in self.tensors().items()}
        if parallel.rank():
            return
        about = {"step": str(self.step), "log": json.dumps(self.log), "lowest": repr(self.lowest)}
        atomic_write(self.path, save(tensors, about))
        atomic_write(self.path.parent / "log.csv", pd.DataFrame(self.log).to_csv(index=False, float_format="%.6g"))

    @torch.no_grad()
    def resume(self) -> None:
        if not self.path.exists():
            return
        with _opened(self.path) as file:
            for name, tensor in self.tensors().items():
                parallel.fill(tensor, file.get_tensor(name))
            about = file.metadata()
        self.step, self.log = int(about["step"]), json.loads(about["log"])
        self.lowest = float(about.get("lowest", "inf"))
        for optimiser in self.optimisers:
            for state in optimiser.state.values():
                state["step"].fill_(self.step)

    def update(self, *batch: np.ndarray) -> None:
        """One step on integers (batch_size, ...): palette indices (batch_size, T), and what else the loss takes."""
        recipe, device = self.recipe, self.model.device
        self.model.train()
        for optimiser in self.optimisers:
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(self.step) * group.get("faster", 1)
        whole = (torch.as_tensor(each.astype(np.int64)).to(device, non_blocking=True) for each in batch)
        seen = torch.zeros_like(self.total)
        for parts in zip(*(each.chunk(recipe.accumulate) for each in whole), strict=True):
            mine = [part.tensor_split(parallel.world())[parallel.rank()] for part in parts]
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                loss = self.loss(*mine) * (len(mine[0]) / len(parts[0])) / recipe.accumulate
            (loss * parallel.world() if self.sharded else loss).backward()  # shares are averaged, not added up
            seen += loss.detach()
        grads = () if self.sharded else (w.grad for w in self.weights.values() if w.grad is not None)
        parallel.add_up([*grads, seen])
        self.total += seen
        self.unsaved += seen
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), recipe.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1

    def check(self) -> None:
        """FloatingPointError before a state is overwritten by one whose loss is no number, or far above the lowest."""
        loss = self.unsaved.item() / max(1, self.step - self.saved)
        if not loss < self.lowest + self.recipe.spike:
            raise FloatingPointError(
                f"the loss of steps {self.saved + 1} to {self.step} is {loss:.4f}, the lowest before {self.lowest:.4f};"
                f" the last good state is {self.path}, of step {self.saved}; begin anew with a lower learning rate or "
                "with clip=1"
            )
        self.lowest, self.saved = min(self.lowest, loss), self.step
        self.unsaved.zero_()

    def progress(self) -> dict[str, float]:
        """What a row of the log begins with, of the steps since the last row."""
        positions = self.model.config.n_positions
        done = self.step % self.recipe.log_every or min(self.step, self.recipe.log_every)
        speed = (self.step - self.since) * self.recipe.batch_size * positions / (time.perf_counter() - self.clock)
        return {
            "step": self.step,
            "tokens": self.step * self.recipe.batch_size * positions,
            "learning_rate": self.recipe.rate(max(0, self.step - 1)),
            "train_loss": self.total.item() / done if self.step else math.nan,
            "tokens_per_second": round(speed),
        }

    def enter(self, row: dict[str, float]) -> None:
        """Add a row to the log."""
        self.log.append(row)
        self.total.zero_()
        self.clock, self.since = time.perf_counter(), self.step


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
        return next_pixel_loss_of(model, tokens)
    hidden, total = np.random.default_rng([recipe.seed, 4]).random(tokens.shape) < recipe.masked, 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 64):
            parts = (each[start : start + 64].astype(np.int64) for each in (tokens, hidden))
            pixels, masked = (torch.as_tensor(each).to(model.device) for each in parts)
            total += _loss(model, pixels, masked) * masked.sum()
    return float(total) / int(hidden.sum())


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


def batches(rows: int, recipe, step: int) -> Iterator[np.ndarray]:
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


def _flipped(batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Palette indices (n, T) of square images, every second one mirrored left to right, at random."""
    side = math.isqrt(batch.shape[1])
    images = batch.reshape(len(batch), side, side)
    return np.where(random.random(len(batch))[:, None, None] < 0.5, images[:, :, ::-1], images).reshape(batch.shape)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all its tensors, wherever they are."""
    return digest(save({name: tensor.cpu() for name, tensor in model.state_dict().items()}))


def note_run(path: Path, run: dict, part: str, settings, upgrade: Callable[[dict], None] = lambda begun: None) -> None:
    """Note in a file what a run is made of, or compare it with what began the run: ValueError names what differs.

    `run[part]` are `settings`, whose `steps` and `cooldown` may change while the steps that were taken keep their
    learning rates. `upgrade` fills in what the file of an older run has not.
    """
    run = json.loads(json.dumps(run))
    if not path.exists():
        write_json(path, run | {"versions": versions()})
        return
    begun = read_json(path)
    upgrade(begun)
    earlier = type(settings)(**begun[part])
    begun[part] = json.loads(json.dumps(asdict(earlier)))
    if _same_rates(path.parent, earlier, settings):
        begun[part] |= {name: run[part][name] for name in ("steps", "cooldown")}
    for name in run:
        if begun.get(name) != run[name]:
            raise ValueError(
                f"{path.parent} holds a run whose {name} differs: {begun.get(name)} there, {run[name]} here; "
                "choose another folder, or the same arguments to go on"
            )
    write_json(path, begun)


def _upgraded(begun: dict) -> None:
    """A pretraining may be older than some fields."""
    begun["config"] = json.loads(json.dumps(ImageGPTConfig.from_dict(begun.get("config", {})).to_dict()))
    begun["recipe"] = {"dtype": "float32", "compile": False} | begun["recipe"]
    begun.setdefault("init", None)


def _same_rates(out: Path, begun, recipe) -> bool:
    """Would the steps that were taken have had the same learning rates?"""
    state, taken = out / "state.safetensors", 0
    if state.exists():
        with _opened(state) as file:
            taken = int(file.metadata()["step"])
    return taken <= recipe.steps and all(begun.rate(step) == recipe.rate(step) for step in range(taken))


@contextmanager
def _opened(state: Path) -> Iterator[safe_open]:
    """A state file; CheckpointError where it cannot be read."""
    try:
        with safe_open(state, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{state} cannot be read ({error}); delete it to begin again") from error


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
