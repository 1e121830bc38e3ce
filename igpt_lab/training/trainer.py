"""One run of optimiser steps on a model, checkpointed whole and resumed exactly, on one process or on several."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.core.devices import memory_kept
from igpt_lab.core.hub import CheckpointError, read_json, write_json
from igpt_lab.core.provenance import atomic_write, digest, versions
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.training import parallel


def check_update(settings) -> None:
    """ValueError for settings of a step, such as a `Recipe`, that `Trainer` cannot take."""
    if settings.accumulate < 1 or settings.batch_size % settings.accumulate:
        raise ValueError(f"batch_size={settings.batch_size} is no multiple of accumulate={settings.accumulate}")
    if settings.optimizer not in ("adam", "muon") or settings.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(
            f"optimizer={settings.optimizer!r}, dtype={settings.dtype!r}; expected 'adam' or 'muon', and 'float32' or "
            "'bfloat16' (float16 overflows in ImageGPT)"
        )


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
        left_out = model.prepare_training(bfloat16=recipe.dtype == "bfloat16")
        self.weights = {n: w for n, w in weights.items() if n not in left_out}
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
        if recipe.compile:
            for block in model.transformer.h:
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
