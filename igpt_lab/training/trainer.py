"""One run of optimiser steps on a model, checkpointed whole and resumed exactly, on one process or on several."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor

from igpt_lab.core.compiling import Compiled
from igpt_lab.core.devices import drawing, memory_kept, precision
from igpt_lab.core.hub import CheckpointError
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.training import parallel
from igpt_lab.training.resuming import BEGIN_AGAIN, SCHEDULE, import_compiler, interruptible, read_state, write_note
from igpt_lab.training.settings import TrainConfig


def run(
    trainer: Trainer,
    drawn: Iterable[tuple[np.ndarray, ...]],
    bar: tqdm,
    report: Callable[[], bool],
    snapshot: Callable[[], None] = lambda: None,
    snapshots: Container[int] = (),
) -> None:
    """Take a step on each batch, report and save when they are due; `report` returns whether to stop.

    `snapshot` is called after the steps `snapshots`, once their state is checked and before it is saved. Of several
    processes the first one reports and writes; of a sharded model all work on that.
    """
    settings, device = trainer.settings, trainer.model.device
    joins = parallel.rank() == 0 or trainer.sharded
    with bar, memory_kept(), trainer.compiled as compiled, interruptible() as interrupted:
        if joins and not trainer.log:
            report()
        if compiled.modules and trainer.step < settings.steps:
            bar.set_postfix_str("compiling the blocks, up to half a minute")
        told = ""
        for batch in drawn:
            trainer.update(*batch)
            if compiled.news != told:
                told = compiled.news
                bar.set_postfix_str("")
                if compiled.problem or parallel.rank() == 0:
                    bar.write(told)
            bar.update()
            stop = parallel.any_of(interrupted.is_set(), device)
            keeps, reports = trainer.step in snapshots, trainer.is_due(settings.log_every)
            saves = keeps or trainer.is_due(settings.save_every)
            if saves or stop:
                trainer.check()
            ends = reports and parallel.any_of(joins and report(), device)
            if ends and not saves:
                trainer.check()
            if joins:
                if keeps:
                    snapshot()
                if saves or stop or ends:
                    trainer.save()
            if stop:
                raise KeyboardInterrupt(
                    f"stopped and saved after step {trainer.step}; call again to continue from there"
                )
            if ends:
                break


class Trainer:
    """Model, optimisers, step and log of one run; all of it, and nothing else, is in its state file.

    `loss(*parts)` is the mean over the images of a part of a batch. `weights`: the parameters that are trained, by
    name, all by default, but never biases that are all zero: the original has none. `head_rate` times the learning rate
    is that of the `score` head. `kept`: further tensors of the run. With `shard` each of several processes holds its
    share of the model.

    In the state file: `weights`, `moments` (of the optimisers, by the names of the weights), `kept`, `step`, `log` (a
    row each time), `lowest` (loss between two saves), and `total`, the sum of the training losses since the last row.
    """

    def __init__(
        self, model: ImageGPTForCausalImageModeling, settings: TrainConfig, path: Path, loss: Callable[..., Tensor], *,
        weights: dict[str, Tensor] | None = None, head_rate: float = 1.0, kept: dict[str, Tensor] | None = None,
        shard: bool = False, run: str = "",
    ):  # fmt: skip
        self.model, self.settings = model, settings
        self.run = run
        self.path, self.loss = path, loss
        self.kept = kept or {}
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.lowest = math.inf
        self.drops = max(model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) > 0
        self.sharded = shard and parallel.world() > 1
        if self.sharded:
            parallel.shard(model, model.transformer.h)
        weights = dict(model.named_parameters()) if weights is None else weights
        left_out = model.prepare_training(bfloat16=settings.dtype == "bfloat16")
        self.weights = {name: weight for name, weight in weights.items() if name not in left_out}
        model.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_()
        if settings.recompute:
            model.gradient_checkpointing_enable()
        self.compiled = Compiled(model.transformer.h if settings.compile else ())
        self.optimisers: list[torch.optim.Optimizer] = []
        self.moments: dict[str, Tensor] = {}
        import_compiler()
        self._add_optimisers(head_rate)
        self.total = torch.zeros((), device=model.device)
        self.unsaved = torch.zeros((), device=model.device)  # sum of the training losses since the last save
        self.resume()
        self.clock, self.since = time.perf_counter(), self.step
        self.saved = self.step

    def _add_optimisers(self, head_rate: float) -> None:
        """Adam, and with "muon" Muon of the blocks' matrices."""
        settings, weights = self.settings, self.weights
        uses_muon = settings.optimizer == "muon"
        matrices = {name: w for name, w in weights.items() if ".h." in name and w.ndim == 2 and uses_muon}
        others = {name: w for name, w in weights.items() if name not in matrices}
        heads = {name for name in others if name.startswith("score.") and head_rate != 1}
        groups: list[dict] = [
            {"params": [w for name, w in others.items() if name not in heads]},
            {"params": [others[name] for name in heads], "head_rate": head_rate},
        ]
        groups = [group for group in groups if group["params"]]
        fused = self.model.device.type in ("cpu", "cuda")
        self._add(torch.optim.Adam(groups, betas=settings.betas, fused=fused), others, "exp_avg", "exp_avg_sq")
        if matrices:
            muon = torch.optim.Muon(matrices.values(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._add(muon, matrices, "momentum_buffer")

    def _add(self, optimiser: torch.optim.Optimizer, weights: dict[str, Tensor], *moments: str) -> None:
        """Take on an optimiser, with moments that a state file can fill before its first step."""
        for name, weight in weights.items():
            state = {key: torch.zeros_like(weight) for key in moments}
            optimiser.state[weight] = {"step": torch.zeros((), device=weight.device), **state}
            self.moments |= {f"{key}.{name}": value for key, value in state.items()}
        self.optimisers.append(optimiser)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state file."""
        weights = {f"model.{name}": weight.detach() for name, weight in self.weights.items()}
        return {**weights, **self.moments, **self.kept, "total": self.total}

    def plain(self) -> ImageGPTForCausalImageModeling:
        """The model itself, or one on the CPU that has its weights where it is sharded; called by all processes."""
        if not self.sharded:
            return self.model
        whole = {name: parallel.whole(weight).cpu() for name, weight in self.model.state_dict().items()}
        model = ImageGPTForCausalImageModeling(self.model.config)
        model.load_state_dict(whole)
        return model

    def save(self) -> None:
        """Write the state file and `log.csv`; called by all processes of a sharded model."""
        tensors = {name: parallel.whole(tensor).cpu() for name, tensor in self.tensors().items()}
        if parallel.rank():
            return
        schedule = {name: getattr(self.settings, name) for name in SCHEDULE}
        note = {
            "run": self.run, "schedule": json.dumps(schedule), "step": str(self.step), "log": json.dumps(self.log),
            "lowest": repr(self.lowest),
        }  # fmt: skip
        atomic_write(self.path, save(tensors, write_note(tensors, note)))
        atomic_write(self.path.parent / "log.csv", pd.DataFrame(self.log).to_csv(index=False, float_format="%.6g"))

    @torch.no_grad()
    def resume(self) -> None:
        """Take over what the state file holds, where there is one; CheckpointError for that of another run."""
        if not self.path.exists():
            return
        state, tensors = read_state(self.path), self.tensors()
        kinds = [{name: (t.shape, t.dtype) for name, t in held.items()} for held in (tensors, state.tensors)]
        if state.run not in ("", self.run) or kinds[0] != kinds[1] or state.step > self.settings.steps:
            raise CheckpointError(f"{self.path} is the state of another run, at step {state.step}; {BEGIN_AGAIN}")
        for name, tensor in tensors.items():
            parallel.fill(tensor, state.tensors[name])
        self.step, self.log = state.step, state.log
        self.lowest = state.lowest
        for optimiser in self.optimisers:
            for state in optimiser.state.values():
                state["step"].fill_(self.step)

    def is_due(self, every: int) -> bool:
        """Is what happens every so many steps due after this one? After the last step it is."""
        return self.step % every == 0 or self.step == self.settings.steps

    def update(self, *batch: np.ndarray) -> None:
        """One step on integers (batch_size, ...): palette indices (batch_size, T), and what else the loss takes."""
        settings, device = self.settings, self.model.device
        self.model.train()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(self.step) * group.get("head_rate", 1)
        tensors = [torch.as_tensor(array.astype(np.int64)).to(device, non_blocking=True) for array in batch]
        seen = self.compiled.attempt(partial(self._gradients, tensors))
        grads = [] if self.sharded else [w.grad for w in self.weights.values() if w.grad is not None]
        parallel.add_up([*grads, seen])
        self.total += seen
        self.unsaved += seen
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), settings.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1

    def _gradients(self, tensors: list[Tensor]) -> Tensor:
        """Put the gradients of a batch, or of this process's share of it, in place; its share of the step's loss."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        seen = torch.zeros_like(self.total)
        drawn = drawing(self.model.device, self.settings.seed, 5, self.step, parallel.rank())
        with drawn if self.drops else nullcontext():
            for parts in zip(*[tensor.chunk(self.settings.accumulate) for tensor in tensors], strict=True):
                seen += self._backward(parts)
        return seen

    def _backward(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Add the gradients of a part of the batch, or of this process's share of it; its share of the step's loss."""
        settings, world = self.settings, parallel.world()
        mine = [part.tensor_split(world)[parallel.rank()] for part in parts]
        with precision(self.model.device, bfloat16=settings.dtype == "bfloat16"):
            loss = self.loss(*mine) * (len(mine[0]) / len(parts[0])) / settings.accumulate
        (loss * world if self.sharded else loss).backward()  # gradients of shares are averaged, not added up
        return loss.detach()

    @torch.no_grad()
    def check(self) -> None:
        """FloatingPointError before a state is overwritten by one whose loss or weights are no numbers, or that jumps.

        Called by all processes.
        """
        loss = self.unsaved.item() / max(1, self.step - self.saved)
        if not loss < self.lowest + self.settings.spike:
            what = f"the loss of steps {self.saved + 1} to {self.step} is {loss:.4f}, the lowest before"
            raise self._diverged(f"{what} {self.lowest:.4f}")
        norm = torch.nn.utils.get_total_norm(self.weights.values())
        if not parallel.whole(norm).isfinite():
            raise self._diverged(f"weights are not finite after step {self.step}")
        self.lowest, self.saved = min(self.lowest, loss), self.step
        self.unsaved.zero_()

    def _diverged(self, what: str) -> FloatingPointError:
        state = f"{self.path}, of step {self.saved}" if self.saved else "that before the first step"
        ending = "begin again with a lower learning rate or with clip=1"
        return FloatingPointError(f"{what}; the last good state is {state}; {ending}")

    def progress(self) -> dict[str, float]:
        """What a row of the log begins with, of the steps since the last row.

        `compile_seconds`, of a run that compiles: of the first step of this process.
        """
        settings, positions = self.settings, self.model.config.n_positions
        done = self.step % settings.log_every or min(self.step, settings.log_every)
        speed = (self.step - self.since) * settings.batch_size * positions / (time.perf_counter() - self.clock)
        row = {
            "step": self.step,
            "tokens": self.step * settings.batch_size * positions,
            "learning_rate": settings.rate(max(0, self.step - 1)),
            "train_loss": self.total.item() / done if self.step else math.nan,
            "tokens_per_second": round(speed),
        }
        return row | ({"compile_seconds": round(self.compiled.seconds, 1)} if settings.compile else {})

    def enter(self, row: dict[str, float]) -> None:
        """Add a row to the log."""
        self.log.append(row)
        self.total.zero_()
        self.clock, self.since = time.perf_counter(), self.step


def batches(rows: int, settings: TrainConfig, step: int) -> Iterator[np.ndarray]:
    """Positions of the batches from `step` on: one shuffled pass after another, a function of the seed alone."""
    first = step * settings.batch_size
    epoch, skip = divmod(first, rows)
    queue = np.random.default_rng([settings.seed, 2, epoch]).permutation(rows)[skip:]
    for _ in range(step, settings.steps):
        while len(queue) < settings.batch_size:
            epoch += 1
            queue = np.concatenate([queue, np.random.default_rng([settings.seed, 2, epoch]).permutation(rows)])
        yield queue[: settings.batch_size]
        queue = queue[settings.batch_size :]


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all its tensors, wherever they are."""
    return digest(save({name: tensor.cpu() for name, tensor in model.state_dict().items()}))


def step_line(
    step: int, train: float, validation: float, unit: str, more: tuple[str, ...] = (), speed: float = 0
) -> str:
    """A step of a training in a line, without what is not known yet: `step 0: validation 2.3026 nats, 10.0% right`."""
    losses = {"train": train, "validation": validation}
    known = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if math.isfinite(loss))
    words = [f"{known} {unit}"] if known else []
    words += [*more, *[f"{speed:,.0f} tokens/s"] * bool(speed)]
    return f"step {step}: {', '.join(words) or 'begins'}"
