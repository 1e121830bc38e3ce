"""What the explorer shows of each layer, as numbers: what its probe predicts, where the images lie, which are alike.

L layers, N images shown, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

from igpt_lab.core.chosen import about_choice
from igpt_lab.core.significance import accuracy
from igpt_lab.probing.features import Features
from igpt_lab.probing.few_labels import probe_few_labels
from igpt_lab.probing.neighbours import nearest_others
from igpt_lab.probing.solvers.linear_probe import LinearProbe

NEAR = 8  # neighbours that are shown


@dataclass(frozen=True, eq=False)
class Answers:
    """What the probes of all layers predict.

    `table` has a row per layer with columns layer, test_accuracy, low, high and converged. `chosen` is the layer that
    validation chose. `predicted` holds labels, int (L, N).
    """

    table: pd.DataFrame
    chosen: int
    predicted: np.ndarray

    @property
    def curve(self) -> list[dict]:
        """accuracy, low, high and converged of each layer."""
        columns = self.table[["test_accuracy", "low", "high", "converged"]]
        return columns.rename(columns={"test_accuracy": "accuracy"}).to_dict("records")

    @property
    def peak(self) -> list[int]:
        """Layers that may be the best, where the table says so."""
        return self.table.layer[self.table.in_peak_set].tolist() if "in_peak_set" in self.table else []

    @property
    def doubts(self) -> list[str]:
        """Which layers are as good as the chosen one within its error, and what is wrong with a poor choice."""
        return about_choice(self.table)


class Spaces(NamedTuple):
    """Where the images lie in each layer: see `survey`.

    `places` is float32 (L, N, 2), `explained` float (L, 2), shares of the variance, and `near` int64 (L, N, k).
    """

    places: np.ndarray
    explained: np.ndarray
    near: np.ndarray


class RowSubset(Mapping):
    """Some rows of layers, each layer read when it is asked for."""

    def __init__(self, layers: Mapping[int, np.ndarray], rows: np.ndarray):
        self.layers = layers
        self.rows = rows

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.layers[layer][self.rows]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class Renumbered(Mapping):
    """Layers that have names by their places, each read when it is asked for."""

    def __init__(self, layers: Mapping[str, np.ndarray]):
        self.layers, self.names = layers, list(layers)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.layers[self.names[layer]]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.names)))

    def __len__(self) -> int:
        return len(self.names)


def take_rows(features: Features, rows: np.ndarray) -> Features:
    """The features of some rows."""
    layers = RowSubset(features.layers, rows)
    return replace(features, layers=layers, labels=features.labels[rows], index=features.index[rows])


def by_number(features: Features) -> Features:
    """The features with layers 0, 1, ... for layers that have names."""
    if not any(isinstance(layer, str) for layer in features.layers):
        return features
    return replace(features, layers=Renumbered(features.layers))


def survey(layers: Mapping[int, np.ndarray]) -> Spaces:
    """Places, shares of the variance and neighbours of the images in layers of features (N, D).

    Features are standardised over these rows, as a probe's are. Places are the two leading principal components at a
    common size. Those of each layer are turned and mirrored to lie on those of the layer before as well as they can
    (orthogonal Procrustes, Schonemann 1966): this changes no distance, and lets the eye follow an image. Neighbours
    are by Euclidean distance, nearest first.
    """
    places, explained = [], []
    near = []
    for features in layers.values():
        x = _standardise(features)
        components, share = _two_components(x)
        turn = orthogonal_procrustes(components, places[-1])[0] if places else np.eye(2)
        places.append((components @ turn).astype(np.float32))
        explained.append(turn.T**2 @ share)  # of the turned axes
        near.append(nearest(x))
    return Spaces(np.stack(places), np.stack(explained), np.stack(near))


def _two_components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two leading principal components (N, 2) of x (N, D) at size 1, and their shares of the variance (2,).

    All are 0 where the rows are all the same.
    """
    if not x.any():
        return np.zeros((len(x), 2)), np.zeros(2)
    pca = PCA(min(2, *x.shape), random_state=0)
    components = pca.fit_transform(x)
    missing = 2 - pca.n_components_
    components = np.pad(components, ((0, 0), (0, missing)))
    components /= max(np.sqrt((components**2).sum(1).mean()), 1e-12)
    return components, np.pad(pca.explained_variance_ratio_, (0, missing))


def _standardise(x: np.ndarray) -> np.ndarray:
    deviation = x.std(0, dtype=np.float64)
    return ((x - x.mean(0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def nearest(x: np.ndarray) -> np.ndarray:
    """The NEAR nearest other rows of each row of x (N, D), nearest first: int64 (N, k), of few rows all others."""
    if len(x) > NEAR + 1:
        return nearest_others(x, NEAR, device=None, progress=False)[0]
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.argsort(axis=1, kind="stable")[:, :-1]


def ask_few(train: Features, shown: Features, count: int) -> Answers:
    """Probes that see `count` labels per class, the first draw of `probe_few_labels`; they choose C and layer."""
    result = probe_few_labels(train, shown, ks=[count], draws=1, layers=list(train.layers), progress=False)
    table = result.table.reset_index(drop=True)
    rows = table.index[table.layer_rule == "fixed"]
    bounds = pd.DataFrame([accuracy(result.correct[row]) for row in rows], index=rows)[["low", "high"]]
    chosen = int(table.layer[table.layer_rule == "chosen"].iloc[0])
    return Answers(table.loc[rows].join(bounds), chosen, np.stack([result.predicted[row] for row in rows]))


def ask_held(rest: Features, held: Features, table: pd.DataFrame) -> Answers:
    """The held-out tenth, by probes of the other nine tenths, with the C and the layer that all of train chose."""
    predicted = []
    for layer, C in zip(table.layer, table.C, strict=True):
        predicted.append(LinearProbe(C).fit(rest.layers[layer], rest.labels).predict(held.layers[layer]))
    accuracies = pd.DataFrame([accuracy(labels == held.labels) for labels in predicted])
    kept = ["layer", "C", "converged", "validation_accuracy", "n_validation"]
    accuracies = accuracies.join(table[kept].reset_index(drop=True))
    return Answers(accuracies, int(table.layer[table.chosen].iloc[0]), np.stack(predicted))


def changes(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of the images whose predictions a and b (N,), of two layers, differ, in three groups."""
    right_a = a == labels
    right_b = b == labels
    groups = {
        "only this layer is right": right_a & ~right_b,
        "only the other is right": ~right_a & right_b,
        "both wrong, differently": ~right_a & ~right_b & (a != b),
    }
    return {name: np.flatnonzero(group) for name, group in groups.items()}
