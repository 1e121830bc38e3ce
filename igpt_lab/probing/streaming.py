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

from igpt_lab.core import cluster
from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import Layer
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, shown_control
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import digest
from igpt_lab.core.values import did_you_mean
from igpt_lab.features.store import FeatureStore
from igpt_lab.probing.features import Features
from igpt_lab.probing.labels import MatchedLabels
from igpt_lab.probing.probes import probe_layers, result_of
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.solvers.row_reader import FIT, HELD, Rows, Shuffled, measure
from igpt_lab.probing.solvers.sgd import Heads, Plan, accuracy, certificate, held_out_bits, predict, train_heads

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # the paper: 30, 10, 3 and on, it does not say how far


@checked
def probe_streaming(
    store: FeatureStore,
    *,
    steps: int,
    train: str = "train",
    test: str = "test",
    point: str | None = None,
    layers: Sequence[int | str] | None = None,
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
    """Probe layers of a store by SGD; the paper takes a million steps on ImageNet.

    Features are standardised on the rows trained on. A row is held out by its index and `seed` alone. Parts come in a
    shuffled order, and rows are shuffled among `buffer` of them; UserWarning where these have few of the classes.

    Args:
        store: Read row group by row group.
        steps: Of SGD.
        train, test: Names of the splits.
        point: Place in a block, see `record`; by default "ln_1", or the only point of the store.
        layers: All by default.
        learning_rates: To choose from, by accuracy on the held-out rows.
        batch_size: Rows of a step.
        momentum: From 0 to below 1.
        holdout: Share of each class that is held out, about, between 0 and 1.
        refit: Train once more on all rows. False reports the chosen heads as they are, trained without those rows, in
            half the time.
        buffer: Rows that are shuffled together, by default those of 1 GiB.
        seed: Of the order and of the held-out rows.
        tol: `converged` where no derivative of the mean loss, in nats, is above it, which SGD seldom reaches.
        state: Folder of a run that can go on: called again with the same arguments it does, to the same bits.
        save_every: Steps between two saves.
        control: What the column `control` says.
        device: Where steps run, by default the accelerator where there is one.
        progress: Show a bar and an estimate.

    Returns:
        `ProbeResult`, whose `table` is that of `probe_layers`, with `learning_rate` for C. `at_edge`: the best rate is
        the first or the last. `objective` (mean nats) and `gradient` are without a penalty, over all rows that the head
        was trained on.

    Raises:
        KeyError: A point, layer or split that the store has not.
        ValueError: Rows without labels, settings out of range, or the state of another run.
        CheckpointError: A state that cannot be read.
        FloatingPointError: No rate keeps the weights finite.

    Example:
        >>> streamed = lab.probe_streaming(store, steps=20, layers=[3], progress=False)
        >>> streamed.table[["layer", "iterations", "n_validation", "n_test"]]
           layer  iterations  n_validation  n_test
        0      3          20            20     100
    """
    point, layers = _stored_layers(store, point, layers)
    names = [f"{point}.{layer}" for layer in layers]
    called = [store.names[layer] if store.names else layer for layer in layers]
    device = best_device(device)
    rates = tuple(sorted({float(rate) for rate in learning_rates}))
    plan = Plan(steps, batch_size, momentum, rates, holdout, seed, buffer)
    store.row_groups(test)  # KeyError for an unknown split, before any work
    measured = measure(store, train, names, holdout=holdout, seed=seed, progress=progress)

    def rows_of(sides: list[int], scaled_on: list[int]) -> Rows:
        scaling = measured.scaling(scaled_on)
        return Rows(store, train, names, scaling, measured=measured, sides=sides, device=device)

    fit, held = rows_of([FIT], [FIT]), rows_of([HELD], [FIT])
    whole = rows_of([FIT, HELD], [FIT, HELD])
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
        for i, layer in enumerate(called)
    ]  # fmt: skip
    labels = MatchedLabels(_Labels(store, test), measured.classes, store.classes, store.classes)

    def losses(places: np.ndarray) -> dict[Layer, np.ndarray]:
        return dict(zip(called, held_out_bits(tested, heads, batch_size, places), strict=True))

    return result_of(rows, dict(zip(called, predicted, strict=True)), labels, scores.max(1)[None], losses)


@checked
def probe_on_cluster(
    store: FeatureStore,
    *,
    scheduler: str | None = None,
    workers: int = 1,
    train: str = "train",
    test: str = "test",
    point: str | None = None,
    layers: Sequence[int | str] | None = None,
    steps: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> ProbeResult:
    """Probe layers of a store, each a task on Dask workers; the table is that of one process.

    Workers read the store from its path, a layer at a time. `cluster.run` says what becomes of tasks that fail.

    Args:
        store: On a path that all workers share.
        scheduler: Address of the cluster, such as tcp://host:8786; None starts processes on this machine.
        workers: Number of those processes.
        train, test: Names of the splits.
        point: Place in a block, see `record`; by default "ln_1", or the only point of the store.
        layers: All by default.
        steps: With it a layer is streamed by `probe_streaming`; without it is fitted in memory by `probe_layers`.
        device: Where each worker computes, by default as it chooses.
        progress: Show a bar.
        **options: Further arguments of `probe_layers` or `probe_streaming`.

    Returns:
        `ProbeResult`, as of that function.

    Raises:
        KeyError: A point, layer or split that the store has not.
        TypeError: An option that the function does not have.
        ClusterError: Tasks that failed for a reason of their own.
        OSError: No worker is left.

    Example:
        >>> from distributed import LocalCluster
        >>> with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        ...     there = lab.probe_on_cluster(store, scheduler=cluster.scheduler_address, Cs=[0.1], folds=2)
        >>> there.table[["layer", "C", "n_test"]]
           layer    C  n_test
        0      0  0.1     100
        1      1  0.1     100
        2      2  0.1     100
        3      3  0.1     100
    """
    point, layers = _stored_layers(store, point, layers)
    called = [store.names[layer] if store.names else layer for layer in layers]
    if steps is None:
        _check_options(probe_layers, options)
        probe = partial(_fit_layer, point=point, train=train, test=test, **options)
    else:
        _check_options(probe_streaming, options)
        probe = partial(_stream_layer, point=point, train=train, test=test, steps=steps, **options)
    work = _OnWorker(str(store.path), probe, device)
    tasks = ((f"layer {layer}", (layer,)) for layer in layers)
    rows, predicted = {}, {}
    folds = {}
    log_loss: dict[Layer, np.ndarray] = {}
    with (
        tqdm(total=len(layers), desc="probe", unit="layer", disable=not progress) as bar,
        closing(cluster.run(work, tasks, scheduler=scheduler, workers=workers)) as finished,
    ):
        for _, (row, labels, of_folds, bits) in finished:
            layer = row["layer"]
            rows[layer], predicted[layer] = row, labels
            folds[layer] = of_folds
            log_loss[layer] = bits
            bar.update()
    in_order = [rows[layer] for layer in called]
    of_train = np.unique(_Labels(store, train).labels)
    labels = MatchedLabels(_Labels(store, test), of_train, store.classes, store.classes)
    stacked = np.stack([folds[layer] for layer in called], axis=1)
    return result_of(in_order, {layer: predicted[layer] for layer in called}, labels, stacked, lambda _: log_loss)


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
    """Work for `cluster.run`: a layer of the store at `path` -> row, test labels (N,), fold accuracies, bits (N,)."""

    path: str
    probe: Callable[..., ProbeResult]
    device: str | torch.device | None

    def open(self) -> Callable[[int], tuple[dict, np.ndarray, np.ndarray, np.ndarray]]:
        store = FeatureStore.open(self.path, verify=False)  # whoever asked has it open; to verify is to read all of it
        device = self.device or cluster.device_of_worker(best_device().type)

        def work(layer: int) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
            result = self.probe(store, layer, device=device, progress=False)
            row = result.table.iloc[0].to_dict()
            bits = next(iter(result.log_loss.values()))
            return row, next(iter(result.predicted.values())), result.folds[:, 0], bits

        return work


def _fit_layer(store: FeatureStore, layer: int, *, point: str, train: str, test: str, **options: Any) -> ProbeResult:
    """`probe_layers` of one layer."""
    features = []
    for split in (train, test):
        labels, index = _Labels(store, split).labels, store.index(split)
        name = store.names[layer] if store.names else layer
        features.append(Features({name: store.layer(point, layer, split)}, labels, index, store.classes))
    return probe_layers(*features, **options)


def _stream_layer(store: FeatureStore, layer: int, **options: Any) -> ProbeResult:
    """`probe_streaming` of one layer."""
    return probe_streaming(store, layers=[layer], **options)


def _stored_layers(
    store: FeatureStore, point: str | None, layers: Sequence[int | str] | None
) -> tuple[str, list[int]]:  # fmt: skip
    """The point, and `layers` by number and in order, all when None; KeyError for one that the store does not have."""
    point = store.point_or_default(point)
    stored, place = store.layers.get(point, []), {name: number for number, name in enumerate(store.names)}
    asked = stored if layers is None else layers
    numbers: set[Any] = {place.get(layer, layer) if isinstance(layer, str) else layer for layer in asked}
    if not numbers or not numbers <= set(stored):
        known = list(store.names) or store.layers
        raise KeyError(f"{store.path.name} has no layers {list(layers or [])} at {point!r}; it has {known}")
    return point, sorted(int(number) for number in numbers)


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
    layers, width = len(rows.names), rows.mean.shape[2]
    classes = len(rows.measured.classes)
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
