"""Features in, rows out: layer-wise linear and nearest-neighbour probes, few-label curves, best layer against last.

Protocol (Chen et al., 2020): multinomial logistic regression on pooled features; hyper-parameters are chosen on a
held-out tenth of train, which is folded back before the refit; test is met once. What the paper leaves open is chosen
here: features standardised on the training rows, scikit-learn's C from a grid that extends itself while its best lies
at an edge, L2 on the weights only, optimisation to convergence (`logistic`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm.auto import tqdm

from igpt_lab.core.devices import best_device
from igpt_lab.core.display import card, line, span, spark
from igpt_lab.core.significance import accuracy, compare, peak_set
from igpt_lab.features.store import FeatureStore, StoredLayers
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHOOSING = 1e-5  # tolerance of the fits that choose C; it moves no validation accuracy by more than a row or two
STACKED = 2**24  # values of the layers that are fitted together, 64 MB
LOADED = 2**30  # bytes of a store up to which its features are kept in memory
PAPER = {"ks": (4, 25, 400), "draws": 5}  # Chen et al. (2020), section 4.5


@dataclass(frozen=True, eq=False)
class Features:
    """`layers`: number -> float32 (N, D); `labels`: int64 (N,), from 0; `index`: int64 (N,), rows in the source."""

    layers: Mapping[int, np.ndarray]
    labels: np.ndarray
    index: np.ndarray

    def __post_init__(self):
        if self.labels is None or np.min(self.labels, initial=0) < 0:
            which = "none" if self.labels is None else f"{np.sum(np.less(self.labels, 0))} rows without one"
            raise ValueError(f"a probe needs labels, and these features have {which}; use an image set that has them")
        if isinstance(self.layers, dict):
            for layer, values in self.layers.items():
                _check_layer(layer, values, len(self.labels), len(self.index))

    @classmethod
    def from_store(cls, store: FeatureStore, split: str, point: str = "ln_1") -> Features:
        """All layers of one point of a feature store; of a large one, each is read when it is asked for."""
        layers, labels = StoredLayers(store, split, point), store.labels(split)
        return cls(dict(layers) if store.size <= LOADED else layers, labels, layers.index)

    @classmethod
    def from_pixels(cls, images: ImageSet, processor: ImageGPTImageProcessorPil) -> Features:
        """Raw pixels at the model's resolution as the only layer, 0; of grey images one channel."""
        pixels = np.concatenate([processor.resize(batch) for batch in images.batches(256)])
        if (pixels[..., :1] == pixels).all():
            pixels = pixels[..., :1]
        return cls({0: pixels.reshape(len(images), -1).astype(np.float32)}, images.require_labels(), images.index)

    def joined(self, layers: Sequence[int]) -> Features:
        """Several layers side by side as one, which has the number of the middle one: the paper's best five, say."""
        _known(layers, self.layers)
        return replace(
            self, layers={sorted(layers)[len(layers) // 2]: np.hstack([self.layers[each] for each in layers])}
        )

    def relabelled(self, labels: np.ndarray) -> Features:
        """The same rows with other labels, int (N,)."""
        if np.shape(labels) != self.labels.shape:
            raise ValueError(f"{np.shape(labels)} labels for {len(self.labels)} rows; expected one a row")
        return replace(self, labels=np.asarray(labels))


def _check_layer(layer: int, values: np.ndarray, labels: int, rows: int) -> None:
    if values.ndim != 2 or len(values) != labels or len(values) != rows:
        raise ValueError(
            f"layer {layer} is {values.shape} for {labels} labels and {rows} rows; expected (N, D) with the same N"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"layer {layer} has values that are not finite; see the store's stats()")


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression as a scikit-learn estimator, on features that it standardises.

    The same optimum as `LogisticRegression(C=C)` on standardised features, or with `standardise=False` on those given,
    reached: the largest derivative is at most `tol`, or fit warns. After `fit`: `coef_` (K, D), or (1, D) of two
    classes, and `intercept_`, of features as given; `converged_`, `n_iter_`, and the certificate `objective_`,
    `gradient_` (see `logistic.Fits`).
    """

    def __init__(self, C: float = 1.0, *, standardise: bool = True, tol: float = 1e-6, max_iter: int = 1000):
        self.C, self.standardise, self.tol, self.max_iter = C, standardise, tol, max_iter

    def fit(self, X: np.ndarray, y: np.ndarray) -> LinearProbe:
        """X (N, D), y (N,) of two classes or more."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"the data has one class, {self.classes_[0]!r}; a probe needs two or more")
        fits = fit_logistic(X, y, [self.C], standardise=self.standardise, tol=self.tol, max_iter=self.max_iter)
        weights = fits.weights[0, 0]
        self.coef_ = weights.T.numpy()
        self.intercept_ = (fits.intercepts[0, 0] - fits.mean[0] @ weights).numpy()
        self.converged_, self.n_iter_ = bool(fits.converged[0, 0]), int(fits.iterations[0, 0])
        self.objective_, self.gradient_ = float(fits.objective[0, 0]), float(fits.gradient[0, 0])
        if not self.converged_:
            warnings.warn(
                f"largest derivative {self.gradient_:.1e} after {self.n_iter_} iterations, above tol={self.tol}; "
                "raise max_iter or lower C", ConvergenceWarning, stacklevel=2,
            )  # fmt: skip
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """float64 (N, K), or of two classes the log-odds (N,) of the second."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        scores = X.astype(np.float64) @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Labels (N,) of X (N, D)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """float64 (N, K)."""
        scores = torch.as_tensor(self.decision_function(X))
        return (torch.stack([torch.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores).softmax(1).numpy()


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
            "control": self.table.control.iloc[0],
            "best layer": f"{self.chosen} of {span(table.index)}, chosen on validation: {said[self.chosen]}",
            "last layer": f"{last}: {said[last]}" if last != self.chosen else "",
            "may be the best": span(table.index[table.in_peak_set.astype(bool)]),
            "not converged": span(failed),
            "images": f"{int(best.n_train):,} train, {int(best.n_test):,} test",
        }


def probe_layers(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = CS,
    standardise: bool = True,
    seed: int = 0,
    holdout: float = 0.1,
    max_iter: int = 1000,
    control: str = "",
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
    folds = [stratified_split(labels, holdout, seed=seed)]
    how = {"standardise": standardise, "max_iter": max_iter, "device": device or best_device()}

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray]]:
        chosen = _choose_C(x, y, folds, Cs, how, solver)
        fits = solver(x, y, [[C] for C, *_ in chosen], **how)
        for i, (others, (C, validation, sure)) in enumerate(zip(tested, chosen, strict=True)):
            facts = {"iterations": int(fits.iterations[i, 0]), "objective": float(fits.objective[i, 0])}
            facts |= {"gradient": float(fits.gradient[i, 0]), "converged": bool(fits.converged[i, 0]) and sure}
            predicted = classes[fits.predict(others, i)[0]]
            yield {"C": float(C), "validation_accuracy": validation, **facts}, predicted

    return _layer_by_layer(train, test, probe, {"control": control, "seed": seed}, progress)


def probe_neighbours(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int] = (1, 3, 10, 30, 100),
    seed: int = 0,
    holdout: float = 0.1,
    control: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """The k nearest training rows vote, by Euclidean distance of standardised features; a companion without a fit.

    k of each layer, and the layer, are chosen on the same held-out rows as in `probe_layers`; then all of train votes.
    Of classes with as many votes the one with nearer rows wins.
    """
    classes, y = np.unique(train.labels, return_inverse=True)
    fit, held = stratified_split(train.labels, holdout, seed=seed)
    ks = [k for k in sorted(ks) if k <= len(fit)]
    device = device or best_device()

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[tuple[dict, np.ndarray]]:
        for values, others in zip(x, tested, strict=True):
            scores = (_vote(values[fit], y[fit], values[held], ks, device) == y[held]).mean(1)
            k, validation = ks[int(scores.argmax())], float(scores.max())
            predicted = classes[_vote(values, y, others, [k], device)[0]]
            yield {"k": k, "validation_accuracy": validation, "converged": True}, predicted

    return _layer_by_layer(train, test, probe, {"control": control, "seed": seed}, progress)


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
    found = KMeans(types, n_init=1, random_state=seed).fit(pixels)
    drawn = np.random.default_rng([seed, 11]).permutation(np.resize(np.unique(train_pixels.labels), types))
    return drawn[found.labels_], drawn[found.predict(others)]


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


def compare_layers(
    result: ProbeResult, best: int | None = None, last: int | None = None, *, n_boot: int = 10_000, seed: int = 0
) -> Comparison:
    """The paired test of layer `best` (by default the chosen one) against `last` (by default the last one).

    p, interval and their sources: `significance.compare`.
    """
    best = result.chosen if best is None else best
    last = max(result.correct) if last is None else last
    _known([best, last], result.correct)
    found = compare(result.correct[best], result.correct[last], n_boot=n_boot, seed=seed)
    return Comparison(
        best_layer=best, last_layer=last, best_accuracy=found.accuracy_a, last_accuracy=found.accuracy_b,
        difference=found.difference, low=found.low, high=found.high, only_best=found.only_a, only_last=found.only_b,
        n_test=found.n_test, p_value=found.p_value,
    )  # fmt: skip


class Labelled(Protocol):
    """Whatever has `labels`, int64 (N,): `Features`, or a split of a store that reads them when they are asked for."""

    @property
    def labels(self) -> np.ndarray: ...


def _meet_test(predictions: dict[int, np.ndarray], test: Labelled) -> dict[int, np.ndarray]:
    """Which predictions are right: the only place where test labels are read."""
    return {key: predicted == test.labels for key, predicted in predictions.items()}


def _layer_by_layer(train: Features, test: Features, probe, facts: dict, progress: bool) -> ProbeResult:
    """The rows and predictions that `probe(x, tested)` gives for stacked layers, with what test makes of them."""
    _same_layers(train, test)
    rows, predictions = [], {}
    with tqdm(
        total=len(train.layers), desc=f"probe {facts['control']}".strip(), unit="layer", disable=not progress
    ) as bar:
        for layers, x in _stacks(train):
            for layer, (row, predicted) in zip(layers, probe(x, _tested(layers, x, test)), strict=True):
                sizes = {"n_train": len(train.labels), "n_test": len(test.index), "n_features": x.shape[2]}
                rows.append({"control": facts["control"], "layer": layer, **row, **sizes, "seed": facts["seed"]})
                predictions[layer] = predicted
            bar.update(len(layers))
    return result_of(rows, predictions, test)


def result_of(rows: list[dict], predictions: dict[int, np.ndarray], test: Labelled) -> ProbeResult:
    """Rows of layers with their `validation_accuracy`, and what they predict of `test`, which is met here."""
    chosen = max(rows, key=lambda row: row["validation_accuracy"])["layer"]
    correct = _meet_test(predictions, test)
    peak = peak_set(correct).layers if len(correct) > 1 else [chosen]
    for row in rows:
        layer = row["layer"]
        row |= {"chosen": layer == chosen, "in_peak_set": layer in peak, **accuracy(correct[layer])}
    return ProbeResult(pd.DataFrame(rows), correct, chosen, predictions)


def _stacks(features: Features) -> Iterator[tuple[list[int], np.ndarray]]:
    """Layers of one width together, as (B, N, D), as many as `STACKED` allows."""
    layers, stack = [], []
    for layer, x in features.layers.items():
        _check_layer(layer, x, len(features.labels), len(features.index))
        if stack and (x.shape != stack[0].shape or (len(stack) + 1) * x.size > STACKED):
            yield layers, np.stack(stack)
            layers, stack = [], []
        layers, stack = [*layers, layer], [*stack, x]
    if stack:
        yield layers, np.stack(stack) if len(stack) > 1 else stack[0][None]


def _choose_C(
    x: np.ndarray, y: np.ndarray, folds: list, Cs: Sequence[float], how: dict, solver: Callable = fit_logistic
) -> list[tuple[float, float, bool]]:
    """x (B, N, D) -> for each layer (C, its mean accuracy on the held-out rows, did its fits converge).

    Of equals the smallest C. A best C at an edge of the grid, and better than its neighbour, extends the grid there.
    Without `folds` C is the middle of the grid, and its accuracy is nan.
    """
    grid = np.array(sorted(Cs), float)
    if not folds:
        return [(grid[len(grid) // 2], math.nan, True)] * len(x)
    accuracies, converged = _validate(x, y, folds, grid, how, solver)
    tried = [{C: (accuracies[i, j], converged[i, j]) for j, C in enumerate(grid)} for i in range(len(x))]
    if len(grid) > 1:
        _extend(tried, grid[1] / grid[0], lambda layers, Cs: _validate(x[layers], y, folds, Cs, how, solver))
    return [_best_C(scores) for scores in tried]


def _extend(tried: list[dict[float, tuple[float, bool]]], ratio: float, validate: Callable) -> None:
    """Add to `tried`, for each layer C -> (accuracy, converged), what lies beyond as long as the best is at an edge.

    `validate` takes the places of layers and for each of them a list of C, and returns what `_validate` does.
    """
    while True:
        beyond: dict[int, float] = {}
        for layer, scores in enumerate(tried):
            C = _beyond(scores, ratio)
            if C is not None:
                beyond[layer] = C
        if not beyond:
            return
        accuracies, converged = validate(list(beyond), [[C] for C in beyond.values()])
        for row, (layer, C) in enumerate(beyond.items()):
            tried[layer][C] = accuracies[row, 0], converged[row, 0]


def _best_C(scores: dict[float, tuple[float, bool]]) -> tuple[float, float, bool]:
    """Of one layer's C -> (accuracy, converged) the best C, its accuracy, and whether all fits converged."""
    best = max(sorted(scores), key=lambda C: scores[C][0])
    return best, float(scores[best][0]), all(converged for _, converged in scores.values())


def _beyond(scores: dict[float, tuple[float, bool]], ratio: float) -> float | None:
    """The next C where the best of `scores` lies at an edge, strictly; None inside the grid and at 1e-8 and 1e8."""
    Cs = sorted(scores)
    if scores[Cs[0]][0] > max(scores[C][0] for C in Cs[1:]) and Cs[0] > 1e-8:
        return Cs[0] / ratio
    if scores[Cs[-1]][0] > max(scores[C][0] for C in Cs[:-1]) and Cs[-1] < 1e8:
        return Cs[-1] * ratio
    return None


def _validate(
    x: np.ndarray, y: np.ndarray, folds: list, Cs, how: dict, solver: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy (B, S) on the folds' held-out rows, and whether all of their fits converged."""
    scores, sure = 0.0, True
    for fit, held in folds:
        fits = solver(x[:, fit], y[fit], Cs, tol=CHOOSING, **how)
        right = [(fits.predict(each[held], i) == y[held]).mean(1) for i, each in enumerate(x)]
        scores, sure = scores + np.stack(right) / len(folds), sure & fits.converged
    return scores, sure


def _best_layer(found: dict[int, tuple[float, float, bool]]) -> int:
    """The layer of the best validation accuracy, or the middle one where nothing could be held out."""
    if any(math.isnan(validation) for _, validation, _ in found.values()):
        return sorted(found)[len(found) // 2]
    return max(found, key=lambda layer: found[layer][1])


def _vote(x: np.ndarray, y: np.ndarray, queries: np.ndarray, ks: Sequence[int], device) -> np.ndarray:
    """int64 (len(ks), Q): what the nearest of x (N, D) with labels y in [0, K) say of queries (Q, D)."""
    x, queries, y = (torch.as_tensor(each, device=device) for each in (x, queries, y))
    deviation, mean = torch.std_mean(x, 0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    votes = torch.nn.functional.one_hot(y).to(x.dtype)
    weight = 1 + 1e-4 / torch.arange(1, max(ks) + 1, device=x.device)  # nearer rows decide between equals
    norms, found = (x**2).sum(1), []
    for some in queries.split(1000):
        nearest = (norms - 2 * some @ x.T).topk(max(ks), largest=False).indices
        counts = (votes[nearest] * weight[:, None]).cumsum(1)
        found.append(torch.stack([counts[:, k - 1].argmax(1) for k in ks]))
    return torch.cat(found, 1).cpu().numpy()


def _folds(y: np.ndarray, k: int, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Splits inside k labels a class: 4 folds (as many as k allows), only the first above k = 50; and how, in words."""
    if k < 2:
        return [], "fixed"
    folds = list(StratifiedKFold(min(4, k), shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    used = folds[: 1 if k > 50 else None]
    return used, f"{len(used)} of {len(folds)} folds"


def _same_layers(train: Features, test: Features) -> None:
    if list(train.layers) != list(test.layers) or not train.layers:
        raise ValueError(
            f"layers of train: {list(train.layers)}, of test: {list(test.layers)}; expected the same, some"
        )


def _tested(layers: list[int], x: np.ndarray, test: Features) -> list[np.ndarray]:
    """The layers of test, read once and of the width of x."""
    found = [test.layers[layer] for layer in layers]
    for layer, theirs in zip(layers, found, strict=True):
        _check_layer(layer, theirs, len(theirs), len(test.index))
        if theirs.shape[1] != x.shape[2]:
            raise ValueError(
                f"layer {layer} has {x.shape[2]} features in train, {theirs.shape[1]} in test; expected the same"
            )
    return found


def _known(layers: Sequence[int], known: Iterable[int]) -> None:
    if unknown := [layer for layer in layers if layer not in known]:
        raise ValueError(f"layer {unknown[0]} is not among these features; expected one of {list(known)}")
