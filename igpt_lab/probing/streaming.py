"""Linear probes of feature stores too large for memory: softmax regression by SGD, as the paper's for ImageNet.

Momentum 0.9, and a cosine down from each of several learning rates (Chen et al., 2020). Every layer and rate is a head
of its own, and all share the passes over the store: a step is two products of matrices for each layer. The rate is
chosen on a held-out tenth of train, which is folded back before the refit; test is met once (`probes.result_of`).

Memory, whatever the number of rows: the rows of `row_reader`, and 8 bytes for each weight of each head, of which a
class has as many as a layer has features, and one. To save a state takes as much again.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.core import cluster
from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import CheckpointError
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.features.store import FeatureStore
from igpt_lab.probing.probes import Features, ProbeResult, probe_layers, result_of
from igpt_lab.probing.row_reader import FIT, HELD, Rows, Shuffled, measure

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # the paper: 30, 10, 3 and on, it does not say how far


def probe_streaming(
    store: FeatureStore,
    *,
    steps: int,
    train: str = "train",
    test: str = "test",
    point: str = "ln_1",
    layers: Sequence[int] | None = None,
    learning_rates: Sequence[float] = RATES,
    batch_size: int = 256,
    momentum: float = 0.9,
    holdout: float = 0.1,
    refit: bool = True,
    buffer: int | None = None,
    seed: int = 0,
    tol: float = 1e-6,
    state: str | Path | None = None,
    save_every: int = 5000,
    control: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe `layers` (all when None) of a store by `steps` steps of SGD; the paper takes a million on ImageNet.

    The table is that of `probe_layers`, with `learning_rate` for C. `at_edge`: the best rate is the first or the last.
    `objective` and `gradient` are without a penalty, over all rows that the head was trained on; `converged` asks for
    the same `tol` as there, which SGD seldom reaches. Features are standardised on the rows trained on. A row is held
    out by its index and `seed` alone, about `holdout` of each class. `refit=False` reports the chosen heads as they
    are, trained without those rows, in half the time.

    Parts come in a shuffled order, and rows are shuffled among `buffer` of them, those of 1 GiB when None; UserWarning
    where these have few of the classes. With a folder `state`, a run is saved every `save_every` steps and, called
    again with the same arguments, goes on to the same bits. ValueError for the state of another run, CheckpointError
    for one that cannot be read, FloatingPointError where no rate keeps the weights finite.
    """
    layers = _known(store, point, layers)
    names, device = [f"{point}.{layer}" for layer in layers], torch.device(device or best_device())
    plan = _Plan(steps, batch_size, momentum, sorted({float(rate) for rate in learning_rates}), holdout, seed, buffer)
    tested = store.row_groups(test)  # KeyError for an unknown split, before any work
    found = measure(store, train, names, holdout=holdout, seed=seed, progress=progress)
    fit, whole = (
        Rows(store, train, names, found.scaling(sides), measured=found, sides=sides, device=device)
        for sides in ((FIT,), (FIT, HELD))
    )
    held = Rows(store, train, names, found.scaling([FIT]), measured=found, sides=[HELD], device=device)
    _warn_of_few_classes(fit, plan)
    run = {"store": digest(store.key), "parts": digest(store.manifest["splits"][train]), "layers": names}
    how = {"plan": plan, "run": run, "state": state, "save_every": save_every}
    with tqdm(total=steps * (1 + refit), desc=f"probe {control}".strip(), unit="step", disable=not progress) as bar:
        if progress:
            bar.write(_estimate(fit, plan, 1 + refit))
        heads = _train(fit, np.tile(plan.learning_rates, (len(names), 1)), bar=bar, name="choose", **how)
        scores = _accuracy(held, heads, batch_size)
        best = scores.argmax(1)
        if refit:
            heads = _train(whole, np.array(plan.learning_rates)[best][:, None], bar=bar, name="refit", **how)
        else:
            heads, whole = heads.only(best), fit
    objective, gradient = _certificate(whole, heads, batch_size)
    tested = Rows(store, test, names, found.scaling(whole.sides), device=device)
    predicted = found.classes[_predict(tested, heads, batch_size)]
    edges = {0, len(plan.learning_rates) - 1} if len(plan.learning_rates) > 1 else ()
    rows = [
        {
            "control": control, "layer": layer, "learning_rate": plan.learning_rates[best[i]],
            "validation_accuracy": float(scores[i, best[i]]), "iterations": steps, "objective": float(objective[i]),
            "gradient": float(gradient[i]), "converged": bool(gradient[i] <= tol), "at_edge": int(best[i]) in edges,
            "n_train": len(whole), "n_test": len(tested), "n_features": heads.weights.shape[1] - 1, "seed": seed,
        }
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    return result_of(rows, dict(zip(layers, predicted, strict=True)), _Labels(store, test))


def probe_on_cluster(
    store: FeatureStore,
    *,
    scheduler: str | None = None,
    workers: int = 1,
    train: str = "train",
    test: str = "test",
    point: str = "ln_1",
    layers: Sequence[int] | None = None,
    progress: bool = True,
    **how,
) -> ProbeResult:
    """`probe_layers`, or where `how` has `steps` `probe_streaming`, each layer a task on Dask workers; the same table.

    Workers read the store from its path, and one has a layer at a time: in whole, or streamed as `row_reader` reads it.
    `how` are further arguments of those functions, `scheduler` and `workers` those of `cluster.run`, which says what
    becomes of tasks that fail.
    """
    layers, found = _known(store, point, layers), {}
    work = _ALayer(str(store.path), point, train, test, how)
    tasks = ((f"layer {layer}", (layer,)) for layer in layers)
    with (
        tqdm(total=len(layers), desc="probe", unit="layer", disable=not progress) as bar,
        closing(cluster.run(work, tasks, scheduler=scheduler, workers=workers)) as made,
    ):
        for _, (row, predicted) in made:
            found[row["layer"]] = row, predicted
            bar.update()
    rows = [found[layer][0] for layer in layers]
    return result_of(rows, {layer: found[layer][1] for layer in layers}, _Labels(store, test))


@dataclass(frozen=True)
class _ALayer:
    """Work for `cluster.run`: a layer of a store -> its row of the table, and what its probe predicts of test."""

    path: str
    point: str
    train: str
    test: str
    how: dict

    def open(self) -> Callable[[int], tuple[dict, np.ndarray]]:
        store = FeatureStore.open(self.path, verify=False)  # whoever asked has it open; to verify is to read all of it
        device = cluster.device_of_worker(best_device().type)
        how = {"device": device, "progress": False, **self.how}

        def probe(layer: int) -> tuple[dict, np.ndarray]:
            if "steps" in how:
                splits = {"train": self.train, "test": self.test}
                result = probe_streaming(store, point=self.point, layers=[layer], **splits, **how)
            else:
                result = probe_layers(*(self.features(store, layer, split) for split in (self.train, self.test)), **how)
            return result.table.iloc[0].to_dict(), result.predicted[layer]

        return probe

    def features(self, store: FeatureStore, layer: int, split: str) -> Features:
        return Features({layer: store.layer(self.point, layer, split)}, store.labels(split), store.index(split))


def _known(store: FeatureStore, point: str, layers: Sequence[int] | None) -> list[int]:
    stored = store.layers.get(point, [])
    layers = stored if layers is None else sorted(set(layers))
    if not layers or not set(layers) <= set(stored):
        raise KeyError(f"{store.path.name} has no layers {list(layers)} at {point!r}; it has {store.layers}")
    return list(layers)


@dataclass(frozen=True)
class _Plan:
    """What decides the numbers of a run, beside its store."""

    steps: int
    batch_size: int
    momentum: float
    learning_rates: list[float]
    holdout: float
    seed: int
    buffer: int | None

    def __post_init__(self):
        if not (self.steps > 0 and self.batch_size > 0 and (self.buffer is None or self.buffer > 0)):
            raise ValueError(f"expected steps, batch_size and buffer above 0; got {self}")
        if not (0 < self.holdout < 1 and 0 <= self.momentum < 1):
            raise ValueError(f"expected 0 < holdout < 1 and 0 <= momentum < 1; got {self}")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates}; expected one or more numbers above 0")


class _Labels:
    """Labels of a split, read when they are asked for."""

    def __init__(self, store: FeatureStore, split: str):
        self.store, self.split = store, split

    @property
    def labels(self) -> np.ndarray:
        if (labels := self.store.labels(self.split)) is None:
            raise ValueError(f"a probe needs labels, and {self.split} of {self.store.path.name} has none")
        return labels


class _Heads:
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

    def only(self, chosen: np.ndarray) -> _Heads:
        """One head for each layer."""
        rows, picked = torch.arange(len(chosen)), torch.as_tensor(chosen)
        few = _Heads(
            self.weights.shape[1] - 1, self.weights.shape[3], np.ones((len(rows), 1)), 0.0, self.weights.device
        )
        few.weights = self.weights[rows, :, picked][:, :, None]
        return few


def _less_labels(p: Tensor, y: Tensor) -> Tensor:
    """Probabilities (B, n, S, K), in place less 1 at their row's label y (n,)."""
    index = y[None, :, None, None].expand(*p.shape[:3], 1)
    return p.scatter_add_(3, index, p.new_full((), -1.0).expand(index.shape))


def _train(
    rows: Rows,
    rates: np.ndarray,
    *,
    bar: tqdm,
    name: str,
    plan: _Plan,
    run: dict,
    state: str | Path | None,
    save_every: int,
) -> _Heads:
    """Heads at `rates` (B, S) after the steps of the plan, some of them perhaps from an earlier call."""
    heads = _Heads(rows.mean.shape[2], len(rows.measured.classes), rates, plan.momentum, rows.mean.device)
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


def _resume(path: Path, run: dict, heads: _Heads) -> int:
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
        told = "; ".join(f"{name} is {theirs.get(name)} there, {run[name]} here" for name in differing)
        raise ValueError(f"{path} is of another run: {told}; choose another folder, or the same arguments to go on")
    return step


def _accuracy(rows: Rows, heads: _Heads, size: int) -> np.ndarray:
    """float (B, S), the share of rows that each head has right; FloatingPointError where a layer has no finite one."""
    finite = heads.weights.isfinite().all(3).all(1)
    if not finite.any(1).all():
        raise FloatingPointError("weights are not finite at any learning rate; begin anew with lower learning_rates")
    right = torch.zeros_like(finite, dtype=torch.int64)
    for x, y in rows.scan(size):
        right += (heads.logits(x).argmax(3) == y[:, None]).sum(1)
    return torch.where(finite, right, -1).cpu().numpy() / len(rows)


def _certificate(rows: Rows, heads: _Heads, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of -log p over all rows and its largest derivative by a weight or intercept, (B,) for one head a layer."""
    exact = torch.float32 if heads.weights.device.type == "mps" else torch.float64
    gradient = torch.zeros_like(heads.weights, dtype=exact)
    value = gradient.new_zeros(len(gradient))
    for x, y in rows.scan(size):
        logs = heads.logits(x).log_softmax(3)
        value -= logs[:, torch.arange(len(y), device=y.device), 0, y].sum(1)
        gradient += (x.mT @ _less_labels(logs.exp_(), y).flatten(2)).view_as(gradient)
    return (value / len(rows)).cpu().numpy(), (gradient.abs().amax((1, 2, 3)) / len(rows)).cpu().numpy()


def _predict(rows: Rows, heads: _Heads, size: int) -> np.ndarray:
    """int64 (B, N), the place in `classes` of what each layer's only head says of each row."""
    found, finite = [], torch.ones((), dtype=torch.bool, device=heads.weights.device)
    for x, _ in rows.scan(size):
        finite &= x.isfinite().all()
        found.append(heads.logits(x)[:, :, 0].argmax(2))
    if not finite:
        raise ValueError(f"{rows.split} has values that are not finite; see the store's stats()")
    return torch.cat(found, 1).cpu().numpy()


def _warn_of_few_classes(rows: Rows, plan: _Plan) -> None:
    """A store in the order of its classes is hardly shuffled by a small buffer."""
    shuffled, classes = Shuffled(rows, plan.buffer), len(rows.measured.classes)
    if (fewest := shuffled.fewest_classes()) < min(classes, shuffled.buffer) / 2:
        warnings.warn(
            f"the {shuffled.buffer:,} rows that are shuffled together may have {fewest} of {classes} classes: raise "
            "buffer, or extract images in a shuffled order", stacklevel=3,
        )  # fmt: skip


def _estimate(rows: Rows, plan: _Plan, runs: int) -> str:
    """What a run will take: memory by arithmetic, seconds by timing two steps and by those of the first pass."""
    layers, width, classes = len(rows.names), rows.mean.shape[2], len(rows.measured.classes)
    heads = _Heads(width, classes, np.ones((layers, len(plan.learning_rates))), plan.momentum, rows.mean.device)
    batch = rows.mean.new_ones(layers, plan.batch_size, width + 1), rows.mean.new_zeros(plan.batch_size).long()
    for _ in range(2):  # the first is slower
        begun = time.perf_counter()
        heads.step(*batch, share=0.0)
        heads.weights[0, 0, 0, 0].item()
    seconds = (time.perf_counter() - begun) * plan.steps * runs
    passes, buffer = plan.steps * runs * plan.batch_size / len(rows), Shuffled(rows, plan.buffer).buffer
    seconds += rows.measured.seconds * (passes if buffer < len(rows) else runs)
    memory = 4 * layers * (width + 1) * (buffer + 2 * max(n for *_, n in rows.groups)) + 8 * heads.weights.numel()
    return (
        f"{layers} layers, {len(plan.learning_rates)} rates, {classes} classes, {passes:,.3g} passes over "
        f"{len(rows):,} rows: {memory / 1e9:,.2g} GB of memory, about {seconds:,.0f} s on {rows.mean.device}"
    )
