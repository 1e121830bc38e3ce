"""Features in, rows out: layer-wise linear probes, and the chosen layer against the last.

Protocol (Chen et al., 2020): multinomial logistic regression on pooled features; hyper-parameters are chosen on
held-out rows of train, which are folded back before the refit; test is met once. The paper holds out a tenth; here
every row is held out once, in one of ten folds, as a tenth of few thousand images names neither layer nor C. What the
paper leaves open is chosen here: features standardised on the training rows, scikit-learn's C from a grid that extends
itself while its best lies at an edge, L2 on the weights only, optimisation to convergence (`logistic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from tqdm.auto import tqdm

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import Choice, choice_of, compare_choice
from igpt_lab.core.chosen import difference_in_words
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, card, line, say_once, shown_control, span, spark
from igpt_lab.core.significance import accuracy, compare, peak_set
from igpt_lab.features.store import FeatureStore, StoredLayers
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.probing.choosing import Fold, choose_C, folds_of
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

    `predicted`: layer -> labels (N_test,), what the probe says. `folds`: float64 (K, L), accuracies of the layers, in
    the table's order, on the rows that each of K folds held out.
    """

    table: pd.DataFrame
    correct: dict[int, np.ndarray]
    chosen: int
    predicted: dict[int, np.ndarray] = field(default_factory=dict)
    folds: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def choice(self) -> Choice:
        """The chosen layer, and how sure the choice is."""
        return choice_of(
            self.table.layer.tolist(), self.table.validation_accuracy.to_numpy(), int(self.table.n_validation.iloc[0])
        )

    def __repr__(self) -> str:
        return line("ProbeResult", self._facts())

    def _repr_html_(self) -> str:
        values, facts = self.table.test_accuracy.tolist(), self._facts()
        curve = spark(values, self.table.layer.tolist().index(self.chosen), words="test accuracy over layers")
        return card("ProbeResult", facts, below=curve if len(values) > 1 else "")

    def _facts(self) -> dict[str, str]:
        table, choice = self.table.set_index("layer"), self.choice
        chosen, last, failed = table.loc[self.chosen], table.index.max(), table.index[~table.converged.astype(bool)]
        accuracies = {
            layer: f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
            for layer, row in table.loc[[self.chosen, last]].iterrows()
        }
        near = span(choice.within_error) if len(choice.within_error) > 1 else ""
        return {
            "control": shown_control(self.table.control.iloc[0]),
            "chosen layer": f"{self.chosen} of {span(table.index)}, by validation: {accuracies[self.chosen]}",
            "within one standard error": near,
            "last layer": f"{last}: {accuracies[last]}" if last != self.chosen else "",
            "may be the best": span(table.index[table.in_peak_set.astype(bool)]),
            "beware": choice.words(),
            "not converged": span(failed),
            "images": f"{int(chosen.n_train):,} train, {int(chosen.n_test):,} test",
        }


@checked
def probe_layers(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = CS,
    standardise: bool = True,
    seed: int = 0,
    folds: int = 10,
    max_iter: int = 1000,
    control: str = MODEL,
    permute_labels: bool = False,
    solver: Callable[..., Fits] = fit_logistic,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe every layer; the table has a row for each, with accuracies as fractions.

    C of each layer, and the layer, are those of the best mean accuracy over stratified `folds` of train; of equal ones
    the middle. `folds=1` holds out one tenth, as the paper does. Each layer is then refitted on all of train and meets
    test once. `low` and `high`: 95% over test images (Clopper and Pearson). `validation_accuracy` is over the
    `n_validation` held-out rows, `within_error` says where it is within one standard error of the highest.
    `in_peak_set`: the layer may be the best (`significance.peak_set`). `iterations`, `objective` and `gradient` are the
    refit's certificate; `converged` is False where it, or a fit that chose its C, missed its tolerance. One value in
    `Cs` fixes C.
    `permute_labels` shuffles the training labels: a control that must fall to chance. `solver` is `fit_logistic`, or
    for the practice of others `logistic.fit_sklearn`.
    """
    labels = np.random.default_rng([seed, 7]).permutation(train.labels) if permute_labels else train.labels
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        known = [train.names[label] if train.names else label for label in classes]
        raise ValueError(f"the rows of train are of {known or 'no class'} alone; a probe needs two classes or more")
    splits = folds_of(labels, folds, seed)
    fitting = {"standardise": standardise, "max_iter": max_iter, "device": best_device(device)}

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        choices = choose_C(x, y, splits, Cs, fitting, solver)
        fits = solver(x, y, [[choice.C] for choice in choices], **fitting)
        for layer, choice in enumerate(choices):
            certificate = {
                "iterations": int(fits.iterations[layer, 0]),
                "objective": float(fits.objective[layer, 0]),
                "gradient": float(fits.gradient[layer, 0]),
                "converged": bool(fits.converged[layer, 0]) and choice.converged,
            }
            predicted = classes[fits.predict(tested[layer], layer)[0]]
            row = {"C": float(choice.C), "validation_accuracy": choice.accuracy, **certificate}
            yield row, predicted, choice.folds

    return layer_by_layer(train, test, probe, facts_of(splits, control, seed), progress)


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
    """Chosen layer against last on the same test images; `difference` of accuracies with two 95% intervals.

    `low`, `high`: over test images, with the layers as they are. `choice_low`, `choice_high`: over the folds that chose
    the layer and test images together; nan where another layer was named. `only_chosen`, `only_last`: test images that
    only one of the two gets right. `p_value`: McNemar's exact test.
    """

    chosen_layer: int
    last_layer: int
    chosen_accuracy: float
    last_accuracy: float
    difference: float
    low: float
    high: float
    choice_low: float
    choice_high: float
    only_chosen: int
    only_last: int
    n_test: int
    p_value: float

    def __repr__(self) -> str:
        return line("Comparison", self._facts())

    def _repr_html_(self) -> str:
        return card("Comparison", self._facts())

    def _facts(self) -> dict[str, str]:
        return {
            "chosen layer": f"{self.chosen_layer}: {self.chosen_accuracy:.1%}",
            "last layer": f"{self.last_layer}: {self.last_accuracy:.1%}",
            "difference": difference_in_words(self.to_dict()),
            "only one right": f"{self.only_chosen:,} images the chosen, {self.only_last:,} the last",
            "p": f"{self.p_value:.2g} (McNemar's exact test, {self.n_test:,} test images)",
        }

    def to_dict(self) -> dict:
        return asdict(self)


@checked
def compare_layers(
    result: ProbeResult, layer: int | None = None, last: int | None = None, *, n_boot: int = 10_000, seed: int = 0
) -> Comparison:
    """The paired test of a `layer` (by default the chosen one) against `last` (by default the last one).

    p, intervals and their sources: `significance.compare` and `choice.compare_choice`.
    """
    layer = result.chosen if layer is None else layer
    last = max(result.correct) if last is None else last
    check_known([layer, last], result.correct)
    paired = compare(result.correct[layer], result.correct[last], n_boot=n_boot, seed=seed)
    ends = (math.nan, math.nan)
    if layer == result.chosen and result.folds.size:
        ends = compare_choice(result.correct, result.folds, last, n_boot=n_boot, seed=seed)
    return Comparison(
        chosen_layer=layer, last_layer=last, chosen_accuracy=paired.accuracy_a, last_accuracy=paired.accuracy_b,
        difference=paired.difference, low=paired.low, high=paired.high, choice_low=ends[0], choice_high=ends[1],
        only_chosen=paired.only_a, only_last=paired.only_b, n_test=paired.n_test, p_value=paired.p_value,
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


def facts_of(splits: Sequence[Fold], control: str, seed: int) -> dict:
    """What the rows of all layers have in common, of a choice on the held-out rows of `splits`."""
    held = sum(len(rows) for _, rows in splits)
    return {"control": control, "seed": seed, "folds": len(splits), "n_validation": held}


def layer_by_layer(train: Features, test: Features, probe, facts: dict, progress: bool) -> ProbeResult:
    """The rows, predictions and fold accuracies that `probe(x, tested)` gives for stacked layers, with what test says.

    `facts` (`facts_of`) are those of every row.
    """
    check_same_layers(train, test)
    rows, predictions, folds = [], {}, []
    name = f"probe {shown_control(facts['control'])}".strip()
    with tqdm(total=len(train.layers), desc=name, unit="layer", disable=not progress) as bar:
        for layers, x in stacks(train):
            tested = test_layers(layers, x, test)
            say_same_rows(x[0], tested[0])
            for layer, (row, predicted, of_folds) in zip(layers, probe(x, tested), strict=True):
                sizes = {"n_train": len(train.labels), "n_test": len(test.index), "n_features": x.shape[2]}
                first, others = {"control": facts["control"], "layer": layer}, {**facts, **sizes}
                rows.append(first | row | {name: others[name] for name in others if name not in first})
                predictions[layer] = predicted
                folds.append(of_folds)
            bar.update(len(layers))
    return result_of(rows, predictions, matched(train, test), np.stack(folds, axis=1))


def result_of(rows: list[dict], predictions: dict[int, np.ndarray], test: Labelled, folds: np.ndarray) -> ProbeResult:
    """Rows of layers with their `validation_accuracy`, and what they predict of `test`, which is met here.

    `folds` (K, L): accuracies on the rows that each fold held out.
    """
    layers, validation = [row["layer"] for row in rows], np.array([row["validation_accuracy"] for row in rows])
    choice = choice_of(layers, validation, rows[0]["n_validation"])
    correct = meet_test(predictions, test)
    peak = peak_set(correct).layers if len(correct) > 1 else [choice.layer]
    for row in rows:
        layer = row["layer"]
        row |= {"chosen": layer == choice.layer, "within_error": layer in choice.within_error}
        row |= {"in_peak_set": layer in peak, **accuracy(correct[layer])}
    return ProbeResult(pd.DataFrame(rows), correct, choice.layer, predictions, folds)


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
