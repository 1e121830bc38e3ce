"""Softmax regressions by SGD over streamed rows: many heads share each pass, and a run goes on where it was stopped.

A head is one layer at one learning rate. Letters: B layers, S rates, D features and a constant 1 beside them, K
classes. The schedule is the paper's for ImageNet (Chen et al., 2020): momentum, and a cosine down from each rate.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from igpt_lab.core.devices import exact_dtype
from igpt_lab.core.hub import CheckpointError
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import atomic_write
from igpt_lab.probing.solvers.row_reader import Rows, Shuffled


@dataclass(frozen=True)
class Plan:
    """What decides the numbers of a run, beside its store; ValueError for what cannot be."""

    steps: int
    batch_size: int
    momentum: float
    learning_rates: tuple[float, ...]
    holdout: float
    seed: int
    buffer: int | None

    def __post_init__(self) -> None:
        if not (self.steps > 0 and self.batch_size > 0 and (self.buffer is None or self.buffer > 0)):
            raise ValueError(f"expected steps, batch_size and buffer above 0; got {self}")
        if not (0 < self.holdout < 1 and 0 <= self.momentum < 1):
            raise ValueError(f"expected 0 < holdout < 1 and 0 <= momentum < 1; got {self}")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates}; expected one or more numbers above 0")


class Heads:
    """Softmax regressions of B layers at learning rates (B, S), from zero; `weights`, `velocity` (B, D + 1, S, K)."""

    def __init__(self, features: int, classes: int, rates: np.ndarray, momentum: float, device: torch.device):
        self.rates = torch.as_tensor(rates, dtype=torch.float32, device=device)[:, None, :, None]
        self.weights = torch.zeros(len(rates), features + 1, rates.shape[1], classes, device=device)
        self.velocity, self.momentum = torch.zeros_like(self.weights), momentum

    def logits(self, x: Tensor) -> Tensor:
        """x (B, n, D + 1) -> (B, n, S, K)."""
        return (x @ self.weights.flatten(2)).unflatten(2, self.weights.shape[2:])

    def step(self, x: Tensor, y: Tensor, share: float) -> None:
        """One step of SGD on rows x (B, n, D + 1) with labels y int64 (n,), at `share` of each learning rate."""
        residual = _less_labels(self.logits(x).softmax(3), y)
        self.velocity.flatten(2).baddbmm_(x.mT, residual.flatten(2), beta=self.momentum, alpha=1 / len(y))
        self.weights.addcmul_(self.velocity, self.rates, value=-share)

    def only(self, chosen: np.ndarray) -> Heads:
        """One head for each layer, that of the rate at the place `chosen` int (B,)."""
        layers, places = torch.arange(len(chosen)), torch.as_tensor(chosen)
        _, width, _, classes = self.weights.shape
        few = Heads(width - 1, classes, np.ones((len(chosen), 1)), 0.0, self.weights.device)
        few.weights = self.weights[layers, :, places][:, :, None]
        return few


def _less_labels(p: Tensor, y: Tensor) -> Tensor:
    """Probabilities (B, n, S, K), in place less 1 at their row's label y (n,)."""
    index = y[None, :, None, None].expand(*p.shape[:3], 1)
    return p.scatter_add_(3, index, p.new_full((), -1.0).expand(index.shape))


def train_heads(
    rows: Rows,
    rates: np.ndarray,
    *,
    bar: tqdm,
    name: str,
    plan: Plan,
    run: dict,
    state: str | Path | None,
    save_every: int,
) -> Heads:
    """Heads at `rates` (B, S) after the steps of the plan, some of them perhaps from an earlier call.

    With a folder `state` they are saved every `save_every` steps as `<name>.safetensors`, beside `run`, which names
    the rows. ValueError for a file of another run, CheckpointError for one that cannot be read.
    """
    heads = Heads(rows.mean.shape[2], len(rows.measured.classes), rates, plan.momentum, rows.mean.device)
    path = None if state is None else Path(state) / f"{name}.safetensors"
    run = json.loads(json.dumps({**run, **asdict(plan), "rates": rates.tolist(), "sides": rows.sides}))
    begin = 0 if path is None or not path.exists() else _resume(path, run, heads)
    bar.update(begin)
    batches = Shuffled(rows, plan.buffer).batches(plan.batch_size, begin)
    for step in range(begin, plan.steps):
        heads.step(*next(batches), share=(1 + math.cos(math.pi * step / plan.steps)) / 2)
        bar.update()
        if path is not None and ((step + 1) % save_every == 0 or step + 1 == plan.steps):
            tensors = {"weights": heads.weights.cpu(), "velocity": heads.velocity.cpu()}
            about = json.dumps({"step": step + 1, "run": run})  # as one: the order of several is left to chance
            atomic_write(path, save(tensors, {"about": about}))
    return heads


def _resume(path: Path, run: dict, heads: Heads) -> int:
    """Fill the heads from a state, and return the steps that they took."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            step, theirs = about["step"], about["run"]
            differing = [name for name in run if theirs.get(name) != run[name]]
            if not differing:
                heads.weights.copy_(file.get_tensor("weights"))
                heads.velocity.copy_(file.get_tensor("velocity"))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); delete it to begin again") from error
    if differing:
        differences = "; ".join(f"{name} is {theirs.get(name)} there, {run[name]} here" for name in differing)
        raise ValueError(
            f"{path} is of another run: {differences}; choose another folder, or give the same arguments to continue"
        )
    return step


def accuracy(rows: Rows, heads: Heads, size: int) -> np.ndarray:
    """float (B, S), the share of rows that each head has right; FloatingPointError where a layer has no finite one.

    Rows pass in batches of `size`, here and below.
    """
    finite = heads.weights.isfinite().all(3).all(1)
    if not finite.any(1).all():
        raise FloatingPointError("weights are not finite at any learning rate; begin again with lower learning_rates")
    right = torch.zeros_like(finite, dtype=torch.int64)
    for x, y in rows.scan(size):
        right += (heads.logits(x).argmax(3) == y[:, None]).sum(1)
    return torch.where(finite, right, -1).cpu().numpy() / len(rows)


def certificate(rows: Rows, heads: Heads, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of -log p over all rows and its largest derivative by a weight or intercept, (B,) for one head a layer."""
    exact = exact_dtype(heads.weights.device)
    gradient = torch.zeros_like(heads.weights, dtype=exact)
    value = gradient.new_zeros(len(gradient))
    for x, y in rows.scan(size):
        logs = heads.logits(x).log_softmax(3)
        value -= logs[:, torch.arange(len(y), device=y.device), 0, y].sum(1)
        gradient += (x.mT @ _less_labels(logs.exp_(), y).flatten(2)).view_as(gradient)
    return (value / len(rows)).cpu().numpy(), (gradient.abs().amax((1, 2, 3)) / len(rows)).cpu().numpy()


def predict(rows: Rows, heads: Heads, size: int) -> np.ndarray:
    """int64 (B, N), the place in `classes` of what each layer's only head says of each row."""
    places, finite = [], torch.ones((), dtype=torch.bool, device=heads.weights.device)
    for x, _ in rows.scan(size):
        finite &= x.isfinite().all()
        places.append(heads.logits(x)[:, :, 0].argmax(2))
    if not finite:
        raise ValueError(f"{rows.split} has values that are not finite; see the store's stats()")
    return torch.cat(places, 1).cpu().numpy()


def held_out_bits(rows: Rows, heads: Heads, size: int, places: np.ndarray) -> np.ndarray:
    """float64 (B, N), -log2 of what each layer's only head gives to the class at each row's place, -1 for none."""
    bits, start = np.full((len(heads.weights), len(places)), np.inf), 0
    for x, _ in rows.scan(size):
        logs = heads.logits(x)[:, :, 0].log_softmax(2).cpu().double().numpy()
        some = places[start : start + logs.shape[1]]
        known = np.flatnonzero(some >= 0)
        bits[:, start + known] = -logs[:, known, some[known]] / np.log(2)
        start += len(some)
    return bits
