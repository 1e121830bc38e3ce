"""Labels of test with those of train: matched by the names of classes, and read in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from igpt_lab.core.display import say_once
from igpt_lab.probing.features import Features


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


def matched(train: Features, test: Features) -> MatchedLabels:
    """The labels of test with those of train; nothing is read before they are asked for."""
    return MatchedLabels(test, np.unique(train.labels), train.names, test.names)


def meet_test(predictions: dict[Any, np.ndarray], test: Labelled) -> dict[Any, np.ndarray]:
    """Which predictions are right: the only place where test labels are read."""
    labels = test.labels
    return {key: predicted == labels for key, predicted in predictions.items()}


def say_unseen(labels: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> None:
    """Say which classes of test labels (N,) are not among the `classes` of train: no answer can be right there."""
    unseen, counts = np.unique(labels[~np.isin(labels, classes)], return_counts=True)
    if unseen.size:
        told = ", ".join(names[label] if names else str(label) for label in unseen)
        say_once(
            f"classes without rows in train: {told}; the {counts.sum()} of {len(labels)} test images of these count as "
            "wrong"
        )
