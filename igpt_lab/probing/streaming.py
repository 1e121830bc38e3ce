"""Linear probes of feature stores too large for memory: softmax regression by SGD, as the paper's for ImageNet.

Momentum 0.9, and a cosine down from each of several learning rates (Chen et al., 2020). Every layer and rate is a head
of its own, and all share the passes over the store: a step is two products of matrices for each layer. The rate is
chosen on a held-out tenth of train, which is folded back before the refit; test is met once (`probes.result_of`).
On a cluster each layer is a task, streamed or fitted in memory.

Memory, whatever the number of rows: the rows of `row_reader`, and 8 bytes for each weight of each head, of which a
class has as many as a layer has features, and one. To save a state takes as much again.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt_lab.core import cluster
from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, shown_control
from igpt_lab.core.provenance import digest
from igpt_lab.core.values import did_you_mean
from igpt_lab.features.store import FeatureStore
from igpt_lab.probing.features import Features
from igpt_lab.probing.labels import MatchedLabels
from igpt_lab.probing.probes import ProbeResult, probe_layers, result_of
from igpt_lab.probing.solvers.row_reader import FIT, HELD, Rows, Shuffled, measure
from igpt_lab.probing.solvers.sgd import Heads, Plan, accuracy, certificate, predict, train_heads

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # the paper: 30, 10, 3 and on, it does not say how far


@checked
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
    control: str = MODEL,
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
    layers = _stored_layers(store, point, layers)
    names = [f"{point}.{layer}" for layer in layers]
    device = best_device(device)
    rates = tuple(sorted({float(rate) for rate in learning_rates}))
    plan = Plan(steps, batch_size, momentum, rates, holdout, seed, buffer)
    store.row_groups(test)  # KeyError for an unknown split, before any work
    measured = measure(store, train, names, holdout=holdout, seed=seed, progress=progress)

    def rows_of(sides: list[int], scaled_on: list[int]) -> Rows:
        scaling = measured.scaling(scaled_on)
        return Rows(store, train, names, scaling, measured=measured, sides=sides, device=device)

    fit, held, whole = rows_of([FIT], [FIT]), rows_of([HELD], [FIT]), rows_of([FIT, HELD], [FIT, HELD])
    _warn_of_few_classes(fit, plan)
    run = {"store": digest(store.key), "parts": digest(store.manifest["splits"][train]), "layers": names}
    name = f"probe {shown_control(control)}".strip()
    with tqdm(total=steps * (1 + refit), desc=name, unit="step", disable=not progress) as bar:
        if progress:
            bar.write(_estimate(fit, plan, 1 + refit))
        trained = partial(train_heads, plan=plan, run=run, state=state, save_every=save_every, bar=bar)
        heads = trained(fit, np.tile(rates, (len(names), 1)), name="choose")
        scores = accuracy(held, heads, batch_size)
        best = scores.argmax(1)
        heads = trained(whole, np.array(rates)[best][:, None], name="refit") if refit else heads.only(best)
    seen = whole if refit else fit
    objective, gradient = certificate(seen, heads, batch_size)
    tested = Rows(store, test, names, measured.scaling(seen.sides), device=device)
    predicted = measured.classes[predict(tested, heads, batch_size)]
    edges = {0, len(rates) - 1} if len(rates) > 1 else set()
    rows = [
        {
            "control": control, "layer": layer, "learning_rate": rates[best[i]],
            "validation_accuracy": float(scores[i, best[i]]), "iterations": steps, "objective": float(objective[i]),
            "gradient": float(gradient[i]), "converged": bool(gradient[i] <= tol), "at_edge": int(best[i]) in edges,
            "n_train": len(seen), "n_test": len(tested), "n_features": heads.weights.shape[1] - 1, "seed": seed,
            "folds": 1, "n_validation": len(held),
        }
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    labels = MatchedLabels(_Labels(store, test), measured.classes, store.classes, store.classes)
    return result_of(rows, dict(zip(layers, predicted, strict=True)), labels, scores.max(1)[None])


@checked
def probe_on_cluster(
    store: FeatureStore,
    *,
    scheduler: str | None = None,
    workers: int = 1,
    train: str = "train",
    test: str = "test",
    point: str = "ln_1",
    layers: Sequence[int] | None = None,
    steps: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> ProbeResult:
    """Probe `layers` (all when None) of a store, each a task on Dask workers; the table is that of one process.

    With `steps` a layer is streamed by `probe_streaming`, without them it is fitted in memory by `probe_layers`.
    `options` are further arguments of that function; TypeError for one that it does not have. Workers read the store
    from its path, a layer at a time, and compute on `device`, each on its own when None. `scheduler` and `workers` are
    those of `cluster.run`, which says what becomes of tasks that fail.
    """
    layers = _stored_layers(store, point, layers)
    if steps is None:
        _check_options(probe_layers, options)
        probe = partial(_fit_layer, point=point, train=train, test=test, **options)
    else:
        _check_options(probe_streaming, options)
        probe = partial(_stream_layer, point=point, train=train, test=test, steps=steps, **options)
    work = _OnWorker(str(store.path), probe, device)
    tasks = ((f"layer {layer}", (layer,)) for layer in layers)
    rows, predicted, folds = {}, {}, {}
    with (
        tqdm(total=len(layers), desc="probe", unit="layer", disable=not progress) as bar,
        closing(cluster.run(work, tasks, scheduler=scheduler, workers=workers)) as finished,
    ):
        for _, (row, labels, of_folds) in finished:
            layer = row["layer"]
            rows[layer], predicted[layer], folds[layer] = row, labels, of_folds
            bar.update()
    in_order = [rows[layer] for layer in layers]
    of_train = np.unique(_Labels(store, train).labels)
    labels = MatchedLabels(_Labels(store, test), of_train, store.classes, store.classes)
    stacked = np.stack([folds[layer] for layer in layers], axis=1)
    return result_of(in_order, {layer: predicted[layer] for layer in layers}, labels, stacked)


def _check_options(function: Callable[..., ProbeResult], options: Mapping[str, Any]) -> None:
    """TypeError, before any work, for options that are not among the function's own."""
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            which = "with steps= probe_streaming runs, without it probe_layers"
            raise TypeError(f"{function.__name__} takes no {name!r} ({which}); {did_you_mean(name, known)}")


@dataclass(frozen=True)
class _OnWorker:
    """Work for `cluster.run`: a layer of the store at `path` -> row, labels of test (N,), fold accuracies."""

    path: str
    probe: Callable[..., ProbeResult]
    device: str | torch.device | None

    def open(self) -> Callable[[int], tuple[dict, np.ndarray, np.ndarray]]:
        store = FeatureStore.open(self.path, verify=False)  # whoever asked has it open; to verify is to read all of it
        device = self.device or cluster.device_of_worker(best_device().type)

        def work(layer: int) -> tuple[dict, np.ndarray, np.ndarray]:
            result = self.probe(store, layer, device=device, progress=False)
            return result.table.iloc[0].to_dict(), result.predicted[layer], result.folds[:, 0]

        return work


def _fit_layer(store: FeatureStore, layer: int, *, point: str, train: str, test: str, **options: Any) -> ProbeResult:
    """`probe_layers` of one layer."""
    features = []
    for split in (train, test):
        labels, index = _Labels(store, split).labels, store.index(split)
        features.append(Features({layer: store.layer(point, layer, split)}, labels, index, store.classes))
    return probe_layers(*features, **options)


def _stream_layer(store: FeatureStore, layer: int, **options: Any) -> ProbeResult:
    """`probe_streaming` of one layer."""
    return probe_streaming(store, layers=[layer], **options)


def _stored_layers(store: FeatureStore, point: str, layers: Sequence[int] | None) -> list[int]:
    """`layers` in order, all that the store has at `point` when None; KeyError for one that it does not have."""
    stored = store.layers.get(point, [])
    layers = stored if layers is None else sorted(set(layers))
    if not layers or not set(layers) <= set(stored):
        raise KeyError(f"{store.path.name} has no layers {list(layers)} at {point!r}; it has {store.layers}")
    return list(layers)


class _Labels:
    """Labels int64 (N,) of a split, read when they are asked for; ValueError where it has none."""

    def __init__(self, store: FeatureStore, split: str):
        self.store, self.split = store, split

    @property
    def labels(self) -> np.ndarray:
        labels = self.store.labels(self.split)
        if labels is None:
            raise ValueError(f"a probe needs labels, and {self.split} of {self.store.path.name} has none")
        return labels


def _warn_of_few_classes(rows: Rows, plan: Plan) -> None:
    """A store in the order of its classes is hardly shuffled by a small buffer."""
    shuffled, classes = Shuffled(rows, plan.buffer), len(rows.measured.classes)
    fewest = shuffled.fewest_classes()
    if fewest < min(classes, shuffled.buffer) / 2:
        warnings.warn(
            f"the {shuffled.buffer:,} rows that are shuffled together may have {fewest} of {classes} classes: raise "
            "buffer, or extract images in a shuffled order", stacklevel=4,
        )  # fmt: skip


def _estimate(rows: Rows, plan: Plan, runs: int) -> str:
    """What a run will take: memory by arithmetic, seconds by timing two steps and by those of the first pass."""
    layers, width, classes = len(rows.names), rows.mean.shape[2], len(rows.measured.classes)
    heads = Heads(width, classes, np.ones((layers, len(plan.learning_rates))), plan.momentum, rows.mean.device)
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
