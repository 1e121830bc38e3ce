"""Labels of test with those of train: matched by the names of classes, and read in one place.

Held-out bits are -log2 of the probability that a probe gives to the label of a test image. Their mean is the log loss
in bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from igpt_lab.core.display import say_once
from igpt_lab.core.significance import mean_interval
from igpt_lab.probing.features import Features

Key = TypeVar("Key", bound=Hashable)
Losses = Callable[[np.ndarray], dict]  # places of labels among the classes (N,), -1 for none -> key -> bits (N,)


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


def meet_test(
    predictions: Mapping[Key, np.ndarray], test: MatchedLabels, losses: Losses | None = None
) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """Which predictions are right, and the held-out bits by `losses`: the only place where test labels are read."""
    labels = test.labels
    correct = {key: predicted == labels for key, predicted in predictions.items()}
    if losses is None:
        return correct, {}
    places = np.searchsorted(test.classes, labels).clip(max=len(test.classes) - 1)
    return correct, losses(np.where(test.classes[places] == labels, places, -1))


def bits_of(logits: Tensor, places: np.ndarray) -> np.ndarray:
    """Held-out bits float64 (N,) of logits (N, K) and the places of labels; infinite for a class that train has not."""
    logs = logits.cpu().double().log_softmax(-1).numpy()[np.arange(len(places)), places]
    return np.where(places < 0, np.inf, -logs / np.log(2))


def log_loss_columns(bits: np.ndarray) -> dict[str, float]:
    """`log_loss`, the mean of held-out bits (N,), with its 95% t interval over test images, `_low` and `_high`."""
    finite = np.isfinite(bits).all()
    mean, low, high = map(float, mean_interval(bits)) if finite else (np.inf, np.nan, np.nan)
    return {"log_loss": mean, "log_loss_low": low, "log_loss_high": high}


def say_unseen(labels: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> None:
    """Say which classes of test labels (N,) are not among the `classes` of train: no answer can be right there."""
    unseen, counts = np.unique(labels[~np.isin(labels, classes)], return_counts=True)
    if unseen.size:
        told = ", ".join(names[label] if names else str(label) for label in unseen)
        say_once(
            f"classes without rows in train: {told}; the {counts.sum()} of {len(labels)} test images of these count as "
            "wrong"
        )
