"""Features in, rows out: layer-wise linear probes, few-label curves, and a test of best layer against last.

Protocol (Chen et al., 2020): multinomial logistic regression by L-BFGS on pooled features; hyper-parameters are chosen
on a held-out tenth of train, which is folded back before the refit; test is met once. What the paper leaves open is
chosen here: features standardised on the training rows, scikit-learn's C from a grid, L2 on the weights only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from joblib import Parallel, cpu_count, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from igpt_lab.data import ImageSet, few_per_class, stratified_split
from igpt_lab.pixels import ImageGPTImageProcessorPil
from igpt_lab.significance import accuracy, compare
from igpt_lab.store import FeatureStore

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEWTON = 1500  # parameters up to which Newton's Hessian is cheaper than the iterations that it saves


@dataclass(frozen=True, eq=False)
class Features:
    """`layers`: number -> float32 (N, D); `labels`: int64 (N,) in [0, K); `index`: int64 (N,), rows in the source."""

    layers: dict[int, np.ndarray]
    labels: np.ndarray
    index: np.ndarray

    def __post_init__(self):
        if self.labels is None or np.min(self.labels, initial=0) < 0:
            which = "none" if self.labels is None else f"{np.sum(np.less(self.labels, 0))} rows without one"
            raise ValueError(f"a probe needs labels, and these features have {which}; use an image set that has them")
        for layer, values in self.layers.items():
            if values.ndim != 2 or len(values) != len(self.labels) or len(values) != len(self.index):
                raise ValueError(
                    f"layer {layer} is {values.shape} for {len(self.labels)} labels and {len(self.index)} rows; "
                    "expected (N, D) with the same N"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"layer {layer} has values that are not finite; see the store's stats()")

    @classmethod
    def from_store(cls, store: FeatureStore, split: str, point: str = "ln_1") -> Features:
        """All layers of one point of a feature store."""
        layers = {layer: store.layer(point, layer, split) for layer in store.layers[point]}
        return cls(layers, store.labels(split), store.index(split))

    @classmethod
    def from_pixels(cls, images: ImageSet, processor: ImageGPTImageProcessorPil) -> Features:
        """Raw pixels at the model's resolution as the only layer, 0; of grey images one channel."""
        pixels = np.concatenate([processor.resize(batch) for batch in images.batches(256)])
        if (pixels[..., :1] == pixels).all():
            pixels = pixels[..., :1]
        return cls({0: pixels.reshape(len(images), -1).astype(np.float32)}, images.require_labels(), images.index)


class LinearProbe:
    """Standardisation on the training rows, then multinomial logistic regression with scikit-learn's C.

    After `fit`: `converged_` and `n_iter_`. scikit-learn's own tolerance, 1e-4, stops L-BFGS on correlated features
    with probabilities hundredths away from the optimum, so `fit` goes on to 1e-6, by Newton's method where its Hessian
    is small: the same optimum as the paper's L-BFGS, reached.
    """

    def __init__(self, C: float = 1.0, *, max_iter: int = 10_000):
        self.C, self.max_iter = C, max_iter

    def fit(self, x: np.ndarray, y: np.ndarray) -> LinearProbe:
        """x (N, D), y int (N,)."""
        parameters = len(np.unique(y)) * (x.shape[1] + 1)
        self.model_ = LogisticRegression(solver="newton-cholesky" if parameters <= NEWTON else "lbfgs", tol=1e-6)
        self._solve(self._scale(x), y, self.C)
        return self

    def path(self, x: np.ndarray, y: np.ndarray, Cs: Iterable[float]) -> Iterator[LinearProbe]:
        """This probe after each C in turn, from the solution before, to tolerance 1e-4: to choose among them."""
        self.model_ = LogisticRegression(tol=1e-4, warm_start=True)
        scaled = self._scale(x)
        for C in Cs:
            self._solve(scaled, y, C)
            yield self

    def _scale(self, x: np.ndarray) -> np.ndarray:
        self.scaler_ = StandardScaler().fit(x)
        return self.scaler_.transform(x.astype(np.float64))

    def _solve(self, scaled: np.ndarray, y: np.ndarray, C: float) -> None:
        self.C = C
        self.model_.set_params(C=C, max_iter=self.max_iter)
        # one thread: on matrices as small as these, two take five times as long
        with warnings.catch_warnings(record=True) as caught, threadpool_limits(1):
            warnings.simplefilter("always", ConvergenceWarning)
            self.model_.fit(scaled, y)
        self.converged_ = not any(issubclass(each.category, ConvergenceWarning) for each in caught)
        for each in caught:  # recording holds back every warning, and only the solver's is ours to keep
            if not issubclass(each.category, ConvergenceWarning):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        self.n_iter_ = int(self.model_.n_iter_.max())

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels (N,) of x (N, D)."""
        return self.model_.predict(self.scaler_.transform(x.astype(np.float64)))

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """float64 (N, K)."""
        return self.model_.predict_proba(self.scaler_.transform(x.astype(np.float64)))

    def score(self, x: np.ndarray, y: np.ndarray) -> float:
        """Accuracy, a fraction."""
        return float((self.predict(x) == y).mean())


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """`table`: a row a layer; `correct`: layer -> bool (N_test,); `chosen`: the layer that validation chose."""

    table: pd.DataFrame
    correct: dict[int, np.ndarray]
    chosen: int


def probe_layers(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = CS,
    seed: int = 0,
    holdout: float = 0.1,
    max_iter: int = 10_000,
    control: str = "",
    permute_labels: bool = False,
    progress: bool = True,
) -> ProbeResult:
    """Probe every layer; the table has a row for each, with accuracies as fractions.

    C of each layer, and the layer, are chosen on a stratified `holdout` of train; each layer is then refitted on all of
    train and meets test once. `low` and `high`: 95% over test images (Clopper and Pearson). `converged` is False where
    the refit, or a fit that chose its C, stopped at `max_iter`. `permute_labels` shuffles the training labels: a
    control that must fall to chance.
    """
    _same_layers(train, test)
    labels = train.labels
    if permute_labels:
        labels = np.random.default_rng([seed, 7]).permutation(labels)
    fit, held = stratified_split(labels, holdout, seed=seed)
    jobs = [
        delayed(_probe)(x, labels, [(fit, held)], Cs, max_iter, test.layers[layer]) for layer, x in train.layers.items()
    ]
    rows, predictions = [], {}
    for layer, (row, predicted) in zip(train.layers, _run(jobs, f"probe {control}", "layer", progress), strict=True):
        predictions[layer] = predicted
        rows.append({
            "control": control, "layer": layer, **row, "n_train": len(labels), "n_test": len(test.index),
            "n_features": train.layers[layer].shape[1], "seed": seed,
        })  # fmt: skip
    chosen = max(rows, key=lambda row: row["validation_accuracy"])["layer"]
    correct = _meet_test(predictions, test)
    for row in rows:
        row |= {"chosen": row["layer"] == chosen, **accuracy(correct[row["layer"]])}
    return ProbeResult(pd.DataFrame(rows), correct, chosen)


@dataclass(frozen=True, eq=False)
class FewLabelResult:
    """`table`: a row for each k, draw and layer; `subsets`: (k, draw) -> rows of the source that were used."""

    table: pd.DataFrame
    subsets: dict[tuple[int, int], np.ndarray]

    def subset_lists(self) -> dict[str, list[int]]:
        """`subsets` as plain JSON, keys like `k4-draw0`."""
        return {f"k{k}-draw{draw}": rows.tolist() for (k, draw), rows in self.subsets.items()}


def probe_few_labels(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int] = (4, 25, 100, 400),
    draws: int = 5,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    Cs: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    max_iter: int = 10_000,
    control: str = "",
    progress: bool = True,
) -> FewLabelResult:
    """Probes that see only k labels a class; `draws` nested, stratified subsets for each k, as in the paper's 4.5.

    Rows with `layer_rule` `fixed` are those of `layers` (first and last by default); in the row `chosen` the layer is
    chosen too. C and layer are chosen inside the k labels by cross-validation: 4 folds up to k = 50, one fold of them
    above; with k = 1 nothing can be held out, C is the middle of `Cs`, the layer is the middle one, and `C_rule` says
    `fixed`. Standard deviation over draws is not the interval over test images.
    """
    _same_layers(train, test)
    fixed = [min(train.layers), max(train.layers)] if layers is None else list(layers)
    _known(fixed, train.layers)
    cases = [(k, draw) for k in ks for draw in range(draws)]
    chosen = {case: few_per_class(train.labels, case[0], seed=seed, draw=case[1]) for case in cases}
    jobs = [
        delayed(_probe_few)({layer: x[rows] for layer, x in train.layers.items()}, train.labels[rows], k, fixed, Cs,
                            max_iter, seed, test.layers)
        for (k, _), rows in chosen.items()
    ]  # fmt: skip
    rows, predictions = [], {}
    for (k, draw), found in zip(cases, _run(jobs, f"few labels {control}", "draw", progress), strict=True):
        for row, predicted in found:
            predictions[len(rows)] = predicted
            facts = {"n_train": len(chosen[k, draw]), "n_test": len(test.index), "seed": seed}
            rows.append({"control": control, "k": k, "draw": draw, **row, **facts})
    correct = _meet_test(predictions, test)
    table = pd.DataFrame(rows)
    table.insert(6, "test_accuracy", [correct[i].mean() for i in range(len(rows))])
    return FewLabelResult(table, {case: train.index[rows] for case, rows in chosen.items()})


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


def _meet_test(predictions: dict[int, np.ndarray], test: Features) -> dict[int, np.ndarray]:
    """Which predictions are right: the only place where test labels are read."""
    return {key: predicted == test.labels for key, predicted in predictions.items()}


def _run(jobs: list, what: str, unit: str, progress: bool) -> Iterator:
    """Results of `delayed` jobs, in order, from as many processes as there are cores."""
    results = Parallel(n_jobs=min(len(jobs), cpu_count()), return_as="generator")(jobs)
    return tqdm(results, total=len(jobs), desc=what.strip(), unit=unit, disable=not progress)


def _probe(x, y, folds, Cs, max_iter, x_test) -> tuple[dict, np.ndarray]:
    """One layer: C chosen on `folds`, refit on all rows; its row of the table and its predictions for `x_test`."""
    C, validation, sure = _best_C(x, y, folds, Cs, max_iter)
    probe = LinearProbe(C, max_iter=max_iter).fit(x, y)
    facts = {"C": C, "validation_accuracy": validation, "converged": probe.converged_ and sure}
    return facts | {"iterations": probe.n_iter_}, probe.predict(x_test)


def _probe_few(layers, y, k, fixed, Cs, max_iter, seed, test_layers) -> list[tuple[dict, np.ndarray]]:
    """One subset: rows and predictions of the layer chosen inside it and of the `fixed` ones."""
    folds, how = _folds(y, k, seed)
    found = {layer: _best_C(x, y, folds, Cs, max_iter) for layer, x in layers.items()}
    best = max(found, key=lambda layer: found[layer][1]) if folds else sorted(found)[len(found) // 2]
    rows = []
    for rule, layer in [("chosen", best), *(("fixed", layer) for layer in dict.fromkeys(fixed))]:
        C, validation, sure = found[layer]
        probe = LinearProbe(C, max_iter=max_iter).fit(layers[layer], y)
        row = {"layer_rule": rule, "layer": layer, "C": C, "C_rule": how, "validation_accuracy": validation}
        rows.append((row | {"converged": probe.converged_ and sure}, probe.predict(test_layers[layer])))
    return rows


def _best_C(
    x: np.ndarray, y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], Cs: Sequence[float], max_iter: int
) -> tuple[float, float, bool]:
    """(C, its mean accuracy on the held-out rows, did all fits converge); of equals the smallest C."""
    Cs = sorted(Cs)
    if not folds:
        return Cs[len(Cs) // 2], math.nan, True
    scores, sure = np.zeros(len(Cs)), True
    for fit, held in folds:
        for i, probe in enumerate(LinearProbe(max_iter=max_iter).path(x[fit], y[fit], Cs)):
            scores[i] += probe.score(x[held], y[held]) / len(folds)
            sure &= probe.converged_
    return Cs[int(scores.argmax())], float(scores.max()), sure


def _folds(y: np.ndarray, k: int, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Splits inside k labels a class: 4 folds (as many as k allows), only the first above k = 50; and how, in words."""
    if k < 2:
        return [], "fixed"
    folds = list(StratifiedKFold(min(4, k), shuffle=True, random_state=seed).split(np.zeros(len(y)), y))
    used = folds[: 1 if k > 50 else None]
    return used, f"{len(used)} of {len(folds)} folds"


def _same_layers(train: Features, test: Features) -> None:
    ours, theirs = ({layer: x.shape[1] for layer, x in each.layers.items()} for each in (train, test))
    if ours != theirs or not ours:
        raise ValueError(f"features of each layer: train has {ours}, test {theirs}; expected the same, at least one")


def _known(layers: Sequence[int], known: Iterable[int]) -> None:
    if unknown := [layer for layer in layers if layer not in known]:
        raise ValueError(f"layer {unknown[0]} is not among these features; expected one of {list(known)}")
