"""Features in, rows out: layer-wise linear probes, few-label curves, and a test of best layer against last.

Protocol (Chen et al., 2020): multinomial logistic regression by L-BFGS on pooled features; hyper-parameters are chosen
on a held-out tenth of train, which is folded back before the refit; test is met once. What the paper leaves open is
chosen here: features standardised on the training rows, scikit-learn's C from a grid, L2 on the weights only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.stats import beta, binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from igpt_lab.data import ImageSet, few_per_class, stratified_split
from igpt_lab.pixels import ImageGPTImageProcessorPil
from igpt_lab.store import FeatureStore

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class Features:
    """`layers`: number -> float32 (N, D); `labels`: int64 (N,) in [0, K); `index`: int64 (N,), rows in the source."""

    layers: dict[int, np.ndarray]
    labels: np.ndarray
    index: np.ndarray

    def __post_init__(self):
        if self.labels is None:
            raise ValueError("a probe needs labels, and these features have none; use an image set that has them")
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
    """Standardisation on the training rows, then logistic regression with scikit-learn's C.

    After `fit`: `converged_` and `n_iter_`. One probe may be fitted for a path of Cs on the same rows, each from the
    solution before.
    """

    def __init__(self, C: float = 1.0, *, max_iter: int = 2000, tol: float = 1e-4):
        self.C, self.max_iter, self.tol = C, max_iter, tol

    def fit(self, x: np.ndarray, y: np.ndarray) -> LinearProbe:
        """x (N, D), y int (N,)."""
        return next(self.path(x, y, [self.C]))

    def path(self, x: np.ndarray, y: np.ndarray, Cs: Iterable[float]) -> Iterable[LinearProbe]:
        """This probe after each C in turn, weakest strength first is fastest."""
        self.scaler_ = StandardScaler().fit(x)
        scaled = self.scaler_.transform(x.astype(np.float64))
        self.model_ = LogisticRegression(max_iter=self.max_iter, tol=self.tol, warm_start=True)
        for self.C in Cs:
            self.model_.set_params(C=self.C)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                self.model_.fit(scaled, y)
            self.converged_ = not any(issubclass(each.category, ConvergenceWarning) for each in caught)
            self.n_iter_ = int(self.model_.n_iter_.max())
            yield self

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
    max_iter: int = 2000,
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
    rows, predictions = [], {}
    for layer, x in tqdm(train.layers.items(), desc=f"probe {control}".strip(), unit="layer", disable=not progress):
        C, validation, sure = _best_C(x, labels, [(fit, held)], Cs, max_iter)
        probe = LinearProbe(C, max_iter=max_iter).fit(x, labels)
        predictions[layer] = probe.predict(test.layers[layer])
        rows.append({
            "control": control, "layer": layer, "C": C, "validation_accuracy": validation,
            "converged": probe.converged_ and sure, "iterations": probe.n_iter_, "n_train": len(labels),
            "n_test": len(test.index), "n_features": x.shape[1], "seed": seed,
        })  # fmt: skip
    chosen = max(rows, key=lambda row: row["validation_accuracy"])["layer"]
    correct = _meet_test(predictions, test)
    for row in rows:
        row |= {"chosen": row["layer"] == chosen, **_accuracy(correct[row["layer"]])}
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
    Cs: Sequence[float] = (1e-3, 1e-2, 1e-1),
    max_iter: int = 2000,
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
    rows, subsets, predictions = [], {}, {}
    cases = [(k, draw) for k in ks for draw in range(draws)]
    for k, draw in tqdm(cases, desc=f"few labels {control}".strip(), unit="draw", disable=not progress):
        subset = few_per_class(train.labels, k, seed=seed, draw=draw)
        subsets[k, draw] = train.index[subset]
        y, folds = train.labels[subset], _folds(train.labels[subset], k, seed)
        found = {layer: _best_C(x[subset], y, folds, Cs, max_iter) for layer, x in train.layers.items()}
        best = max(found, key=lambda layer: found[layer][1]) if folds else sorted(found)[len(found) // 2]
        for rule, layer in [("chosen", best), *(("fixed", layer) for layer in dict.fromkeys(fixed))]:
            C, validation, sure = found[layer]
            probe = LinearProbe(C, max_iter=max_iter).fit(train.layers[layer][subset], y)
            predictions[len(rows)] = probe.predict(test.layers[layer])
            rows.append({
                "control": control, "k": k, "draw": draw, "layer_rule": rule, "layer": layer, "C": C,
                "C_rule": f"{len(folds)} of 4 folds" if folds else "fixed", "validation_accuracy": validation,
                "converged": probe.converged_ and sure, "n_train": len(y), "n_test": len(test.index), "seed": seed,
            })  # fmt: skip
    correct = _meet_test(predictions, test)
    table = pd.DataFrame(rows)
    table.insert(6, "test_accuracy", [correct[i].mean() for i in range(len(rows))])
    return FewLabelResult(table, subsets)


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

    p: two-sided binomial test on the images that one layer gets right and the other does not. Interval: percentiles of
    a bootstrap over test images, which for a paired difference is a draw of their four possible outcomes.
    """
    best = result.chosen if best is None else best
    last = max(result.correct) if last is None else last
    right, wrong = result.correct[best], ~result.correct[best]
    only_best, only_last = int((right & ~result.correct[last]).sum()), int((wrong & result.correct[last]).sum())
    n, discordant = len(right), only_best + only_last
    shares = [only_best / n, only_last / n, 1 - discordant / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=n_boot)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    return Comparison(
        best_layer=best, last_layer=last, best_accuracy=float(right.mean()),
        last_accuracy=float(result.correct[last].mean()), difference=(only_best - only_last) / n,
        low=float(low), high=float(high), only_best=only_best, only_last=only_last, n_test=n,
        p_value=float(binomtest(only_best, discordant).pvalue) if discordant else 1.0,
    )  # fmt: skip


def _meet_test(predictions: dict[int, np.ndarray], test: Features) -> dict[int, np.ndarray]:
    """Which predictions are right: the only place where test labels are read."""
    return {key: predicted == test.labels for key, predicted in predictions.items()}


def _accuracy(correct: np.ndarray) -> dict[str, float]:
    """Accuracy with its 95% interval, by Clopper and Pearson (1934): exact for independent test images."""
    n, hits = len(correct), int(correct.sum())
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return {"test_accuracy": hits / n, "low": float(low), "high": float(high)}


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


def _folds(y: np.ndarray, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits inside k labels a class: 4 folds (as many as k allows), only the first of them above k = 50."""
    if k < 2:
        return []
    folds = StratifiedKFold(min(4, k), shuffle=True, random_state=seed).split(np.zeros(len(y)), y)
    return list(folds)[: 1 if k > 50 else None]


def _same_layers(train: Features, test: Features) -> None:
    if list(train.layers) != list(test.layers):
        raise ValueError(f"train has layers {list(train.layers)}, test {list(test.layers)}; expected the same")
