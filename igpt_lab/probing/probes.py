"""Features in, rows out: layer-wise linear and nearest-neighbour probes, few-label curves, best layer against last.

Protocol (Chen et al., 2020): multinomial logistic regression on pooled features; hyper-parameters are chosen on a
held-out tenth of train, which is folded back before the refit; test is met once. What the paper leaves open is chosen
here: features standardised on the training rows, scikit-learn's C from a grid that extends itself while its best lies
at an edge, L2 on the weights only, optimisation to convergence (`logistic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from tqdm.auto import tqdm

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, card, line, say_once, shown_control, span, spark
from igpt_lab.core.significance import accuracy, compare, peak_set
from igpt_lab.features.store import FeatureStore, StoredLayers
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing.choosing import choose_C
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
STACKED = 2**24  # values of the layers that are fitted together, 64 MB
LOADED = 2**30  # bytes of a store up to which its features are kept in memory


@dataclass(frozen=True, eq=False)
class Features:
    """`layers`: number -> float32 (N, D); `labels`: int64 (N,), from 0; `index`: int64 (N,), rows in the source.

    `names`: the classes in the order of their numbers, by which those of train and test are matched; () for no names.
    """

    layers: Mapping[int, np.ndarray]
    labels: np.ndarray
    index: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.labels is None or np.min(self.labels, initial=0) < 0:
            which = "none" if self.labels is None else f"{np.sum(np.less(self.labels, 0))} rows without one"
            raise ValueError(f"a probe needs labels, and these features have {which}; use an image set that has them")
        if self.names and np.max(self.labels, initial=0) >= len(self.names):
            raise ValueError(f"the label {np.max(self.labels)} is none of the {len(self.names)} classes")
        if isinstance(self.layers, dict):
            for layer, values in self.layers.items():
                _check_layer(layer, values, len(self.labels), len(self.index))

    def __repr__(self) -> str:
        classes = f"{len(self.names or np.unique(self.labels))} classes"
        return f"<Features: {len(self.labels):,} rows, {classes}, layers {span(list(self.layers))}>"

    @classmethod
    @checked
    def from_store(cls, store: FeatureStore, split: str, point: str = "ln_1") -> Features:
        """All layers of one point of a feature store; of a large one, each is read when it is asked for."""
        layers, labels = StoredLayers(store, split, point), store.labels(split)
        values = dict(layers) if store.size <= LOADED else layers
        return cls(values, labels, layers.index, store.classes)  # type: ignore[arg-type]  # None is refused with advice

    @classmethod
    @checked
    def from_pixels(cls, images: ImageSet, processor: ImageGPTImageProcessorPil) -> Features:
        """Raw pixels at the model's resolution as the only layer, 0; of grey images one channel."""
        pixels = processor.resize(iter(images))
        if (pixels[..., :1] == pixels).all():
            pixels = pixels[..., :1]
        rows = pixels.reshape(len(images), -1).astype(np.float32)
        return cls({0: rows}, images.require_labels(), images.index, images.label_names)

    @checked
    def joined(self, layers: Sequence[int]) -> Features:
        """Several layers side by side as one, which has the number of the middle one: the paper's best five, say."""
        check_known(layers, self.layers)
        return replace(
            self, layers={sorted(layers)[len(layers) // 2]: np.hstack([self.layers[each] for each in layers])}
        )

    def relabelled(self, labels: np.ndarray) -> Features:
        """The same rows with other labels, int (N,), of classes without names."""
        if np.shape(labels) != self.labels.shape:
            raise ValueError(f"{np.shape(labels)} labels for {len(self.labels)} rows; expected one a row")
        return replace(self, labels=np.asarray(labels), names=())


def _check_layer(layer: int, values: np.ndarray, labels: int, rows: int) -> None:
    if values.ndim != 2 or len(values) != labels or len(values) != rows:
        raise ValueError(
            f"layer {layer} is {values.shape} for {labels} labels and {rows} rows; expected (N, D) with the same N"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"layer {layer} has values that are not finite; see the store's stats()")


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """`table`: a row a layer; `correct`: layer -> bool (N_test,); `chosen`: the layer that validation chose.

    `predicted`: layer -> labels (N_test,), what the probe says.
    """

    table: pd.DataFrame
    correct: dict[int, np.ndarray]
    chosen: int
    predicted: dict[int, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        return line("ProbeResult", self._facts())

    def _repr_html_(self) -> str:
        values, facts = self.table.test_accuracy.tolist(), self._facts()
        curve = spark(values, self.table.layer.tolist().index(self.chosen), words="test accuracy over layers")
        return card("ProbeResult", facts, below=curve if len(values) > 1 else "")

    def _facts(self) -> dict[str, str]:
        table = self.table.set_index("layer")
        best, last, failed = table.loc[self.chosen], table.index.max(), table.index[~table.converged.astype(bool)]
        said = {
            layer: f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
            for layer, row in table.loc[[self.chosen, last]].iterrows()
        }
        return {
            "control": shown_control(self.table.control.iloc[0]),
            "best layer": f"{self.chosen} of {span(table.index)}, chosen on validation: {said[self.chosen]}",
            "last layer": f"{last}: {said[last]}" if last != self.chosen else "",
            "may be the best": span(table.index[table.in_peak_set.astype(bool)]),
            "not converged": span(failed),
            "images": f"{int(best.n_train):,} train, {int(best.n_test):,} test",
        }


@checked
def probe_layers(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = CS,
    standardise: bool = True,
    seed: int = 0,
    holdout: float = 0.1,
    max_iter: int = 1000,
    control: str = MODEL,
    permute_labels: bool = False,
    solver: Callable[..., Fits] = fit_logistic,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe every layer; the table has a row for each, with accuracies as fractions.

    C of each layer, and the layer, are chosen on a stratified `holdout` of train; each layer is then refitted on all of
    train and meets test once. `low` and `high`: 95% over test images (Clopper and Pearson). `in_peak_set`: the layer
    may be the best (`significance.peak_set`). `iterations`, `objective` and `gradient` are the refit's certificate;
    `converged` is False where it, or a fit that chose its C, missed its tolerance. One value in `Cs` fixes C.
    `permute_labels` shuffles the training labels: a control that must fall to chance. `solver` is `fit_logistic`, or
    for the practice of others `logistic.fit_sklearn`.
    """
    labels = np.random.default_rng([seed, 7]).permutation(train.labels) if permute_labels else train.labels
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        known = [train.names[label] if train.names else label for label in classes]
        raise ValueError(f"the rows of train are of {known or 'no class'} alone; a probe needs two classes or more")
    folds = [stratified_split(labels, holdout, seed=seed)]
    fitting = {"standardise": standardise, "max_iter": max_iter, "device": best_device(device)}

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray]]:
        choices = choose_C(x, y, folds, Cs, fitting, solver)
        fits = solver(x, y, [[C] for C, *_ in choices], **fitting)
        for layer, (C, validation, converged) in enumerate(choices):
            certificate = {
                "iterations": int(fits.iterations[layer, 0]),
                "objective": float(fits.objective[layer, 0]),
                "gradient": float(fits.gradient[layer, 0]),
                "converged": bool(fits.converged[layer, 0]) and converged,
            }
            predicted = classes[fits.predict(tested[layer], layer)[0]]
            yield {"C": float(C), "validation_accuracy": validation, **certificate}, predicted

    return layer_by_layer(train, test, probe, {"control": control, "seed": seed}, progress)


@checked
def control_task(
    train_pixels: Features, test_pixels: Features, *, types: int = 100, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of train and of test for a task without meaning, to measure how much a probe learns by itself.

    Images are clustered by their pixels into `types`, at most half as many as there are images, and each cluster is
    given one of the K classes at random. What a layer's probe gains over this one's accuracy is its selectivity (Hewitt
    and Liang, 2019): see `relabelled`.
    """
    (pixels,), (others,) = train_pixels.layers.values(), test_pixels.layers.values()
    types = min(types, len(pixels) // 2)
    clusters = KMeans(types, n_init=1, random_state=seed).fit(pixels)
    classes = np.random.default_rng([seed, 11]).permutation(np.resize(np.unique(train_pixels.labels), types))
    return classes[clusters.labels_], classes[clusters.predict(others)]


@dataclass(frozen=True)
class Comparison:
    """Best layer against last on the same test images; `difference` of accuracies with its 95% interval.

    `only_best`, `only_last`: test images that only one of the two gets right. `p_value`: McNemar's exact test.
    """

    best_layer: int
    last_layer: int
    best_accuracy: float
    last_accuracy: float
    difference: float
    low: float
    high: float
    only_best: int
    only_last: int
    n_test: int
    p_value: float

    def to_dict(self) -> dict:
        return asdict(self)


@checked
def compare_layers(
    result: ProbeResult, best: int | None = None, last: int | None = None, *, n_boot: int = 10_000, seed: int = 0
) -> Comparison:
    """The paired test of layer `best` (by default the chosen one) against `last` (by default the last one).

    p, interval and their sources: `significance.compare`.
    """
    best = result.chosen if best is None else best
    last = max(result.correct) if last is None else last
    check_known([best, last], result.correct)
    paired = compare(result.correct[best], result.correct[last], n_boot=n_boot, seed=seed)
    return Comparison(
        best_layer=best, last_layer=last, best_accuracy=paired.accuracy_a, last_accuracy=paired.accuracy_b,
        difference=paired.difference, low=paired.low, high=paired.high, only_best=paired.only_a,
        only_last=paired.only_b, n_test=paired.n_test, p_value=paired.p_value,
    )  # fmt: skip


class Labelled(Protocol):
    """Whatever has `labels`, int64 (N,): `Features`, or a split of a store that reads them when they are asked for."""

    @property
    def labels(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MatchedLabels:
    """The labels of `test`, numbered as in train, which has the `classes` of the names `train_names`."""

    test: Labelled
    classes: np.ndarray
    train_names: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,); a class that train has not is said, and keeps a number of its own."""
        labels, names = self.test.labels, self.test_names
        if self.train_names and names and names != self.train_names:
            names = tuple(dict.fromkeys([*self.train_names, *self.test_names]))
            labels = np.array([names.index(name) for name in self.test_names])[labels]
        say_unseen(labels, self.classes, names)
        return labels


def say_unseen(labels: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> None:
    """Say which classes of test labels (N,) are not among the `classes` of train: no answer can be right there."""
    unseen, counts = np.unique(labels[~np.isin(labels, classes)], return_counts=True)
    if unseen.size:
        told = ", ".join(names[label] if names else str(label) for label in unseen)
        say_once(
            f"classes without rows in train: {told}; the {counts.sum()} of {len(labels)} test images of these count as "
            "wrong"
        )


def say_same_rows(x: np.ndarray, tested: np.ndarray) -> None:
    """Say where a layer of train and of test is the same (N, D), and not one row over and over, as at position 0."""
    if np.array_equal(x, tested) and np.ptp(x, axis=0).any():
        say_once("train and test are the same images, so this is no test accuracy; give the features of each split")


def matched(train: Features, test: Features) -> MatchedLabels:
    """The labels of test with those of train; nothing is read before they are asked for."""
    return MatchedLabels(test, np.unique(train.labels), train.names, test.names)


def meet_test(predictions: dict[int, np.ndarray], test: Labelled) -> dict[int, np.ndarray]:
    """Which predictions are right: the only place where test labels are read."""
    labels = test.labels
    return {key: predicted == labels for key, predicted in predictions.items()}


def layer_by_layer(train: Features, test: Features, probe, facts: dict, progress: bool) -> ProbeResult:
    """The rows and predictions that `probe(x, tested)` gives for stacked layers, with what test makes of them."""
    check_same_layers(train, test)
    rows, predictions = [], {}
    name = f"probe {shown_control(facts['control'])}".strip()
    with tqdm(total=len(train.layers), desc=name, unit="layer", disable=not progress) as bar:
        for layers, x in stacks(train):
            tested = test_layers(layers, x, test)
            say_same_rows(x[0], tested[0])
            for layer, (row, predicted) in zip(layers, probe(x, tested), strict=True):
                sizes = {"n_train": len(train.labels), "n_test": len(test.index), "n_features": x.shape[2]}
                rows.append({"control": facts["control"], "layer": layer, **row, **sizes, "seed": facts["seed"]})
                predictions[layer] = predicted
            bar.update(len(layers))
    return result_of(rows, predictions, matched(train, test))


def result_of(rows: list[dict], predictions: dict[int, np.ndarray], test: Labelled) -> ProbeResult:
    """Rows of layers with their `validation_accuracy`, and what they predict of `test`, which is met here."""
    chosen = max(rows, key=lambda row: row["validation_accuracy"])["layer"]
    correct = meet_test(predictions, test)
    peak = peak_set(correct).layers if len(correct) > 1 else [chosen]
    for row in rows:
        layer = row["layer"]
        row |= {"chosen": layer == chosen, "in_peak_set": layer in peak, **accuracy(correct[layer])}
    return ProbeResult(pd.DataFrame(rows), correct, chosen, predictions)


def stacks(features: Features) -> Iterator[tuple[list[int], np.ndarray]]:
    """Layers of one width together, as (B, N, D), as many as `STACKED` allows."""
    layers: list[int] = []
    stack: list[np.ndarray] = []
    for layer, x in features.layers.items():
        _check_layer(layer, x, len(features.labels), len(features.index))
        if stack and (x.shape != stack[0].shape or (len(stack) + 1) * x.size > STACKED):
            yield layers, np.stack(stack)
            layers, stack = [], []
        layers, stack = [*layers, layer], [*stack, x]
    if stack:
        yield layers, np.stack(stack) if len(stack) > 1 else stack[0][None]


def check_same_layers(train: Features, test: Features) -> None:
    if list(train.layers) != list(test.layers) or not train.layers:
        raise ValueError(
            f"layers of train: {list(train.layers)}, of test: {list(test.layers)}; expected the same, some"
        )


def test_layers(layers: list[int], x: np.ndarray, test: Features) -> list[np.ndarray]:
    """The layers of test, read once and of the width of x."""
    values = [test.layers[layer] for layer in layers]
    for layer, tested in zip(layers, values, strict=True):
        _check_layer(layer, tested, len(tested), len(test.index))
        if tested.shape[1] != x.shape[2]:
            raise ValueError(
                f"layer {layer} has {x.shape[2]} features in train, {tested.shape[1]} in test; expected the same"
            )
    return values


def check_known(layers: Sequence[int], known: Iterable[int]) -> None:
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise ValueError(f"layer {unknown[0]} is not among these features; expected one of {list(known)}")
