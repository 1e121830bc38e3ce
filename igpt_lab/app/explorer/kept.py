"""Answers of probes that were fitted before: kept in a file beside the store, or in a result that the user has."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pandas as pd

from igpt_lab.app.explorer.layers import Answers
from igpt_lab.core.provenance import atomic_write, digest, made_by
from igpt_lab.core.significance import accuracy
from igpt_lab.features.store import FeatureStore
from igpt_lab.figures.saving import read_regular
from igpt_lab.probing.features import Features, digest_of_rows
from igpt_lab.probing.results import ProbeResult

FLAGS = {"converged", "chosen", "within_error", "in_peak_set"}  # columns that are kept
SHARES = {"test_accuracy", "low", "high", "validation_accuracy", "overlap"}
COUNTS = {"layer", "iterations", "seed", "folds", "n_validation", "n_train", "n_test", "n_features", "k", "draw"}
OTHERS = {"C", "objective", "gradient", "log_loss", "log_loss_low", "log_loss_high"}
OF_TEST = ["in_peak_set", "log_loss", "log_loss_low", "log_loss_high"]  # columns that other test rows would change


def answers_of(result: ProbeResult, train: Features, split: Features, shown: Features) -> Answers:
    """The answers in a result for the rows shown, which are some of those of the split.

    ValueError where its layers, rows, labels or features are not those of train and of the split.
    """
    layers = list(result.table.layer)
    if len(layers) != len(split.layers) or set(result.predicted) != set(layers):
        raise ValueError(
            f"the result has {len(result.predicted)} layers with predictions; expected {len(split.layers)}"
        )
    predicted = np.stack([result.predicted[layer] for layer in layers])
    correct = np.stack([result.correct[layer] for layer in layers])
    n = len(split.labels)
    if predicted.shape[1] != n or not np.array_equal(predicted == split.labels, correct):
        raise ValueError(f"the result is of other images: expected {n:,}, with the labels of the split that is shown")
    if result.rows != digest_of_rows(train, split):
        raise ValueError(
            "the result is of other features, such as those of another model, point or pooling; expected what "
            "probe_layers returned for train and the split that is shown, at the point that opens"
        )
    numbers = list(split.layers)
    table = result.table.assign(layer=numbers).reset_index(drop=True)
    chosen = numbers[layers.index(result.chosen)]
    if len(shown.labels) == n:
        return Answers(table, chosen, predicted)
    predicted = predicted[:, np.isin(split.index, shown.index)]
    own = pd.DataFrame([accuracy(labels == shown.labels) for labels in predicted])
    table = table.drop(columns=[name for name in OF_TEST if name in table]).assign(**own)
    return Answers(table, chosen, predicted)


def keep(store: FeatureStore, asked: tuple, answers: Answers) -> None:
    """Write answers beside the store, where its folder is on this disk and can be written to."""
    if hasattr(store.path, "put"):
        return
    table = answers.table[[name for name in answers.table if name in FLAGS | SHARES | COUNTS | OTHERS]].to_dict("list")
    content = {"of": _key(store, asked), "table": table, "chosen": int(answers.chosen)}
    content["predicted"] = answers.predicted.tolist()
    with suppress(OSError):
        atomic_write(_file(store, asked), json.dumps(content))


def kept(store: FeatureStore, asked: tuple, shown: Features, train: Features) -> Answers | None:
    """The answers of probes of train that were kept for the rows shown; None where there are none, or any is odd.

    A file may be a stranger's, as the store may be: all that can be computed from its predictions must be so.
    """
    if hasattr(store.path, "put"):
        return None
    layers, labels = store.layers[asked[1]], shown.labels
    largest = 10 * len(layers) * len(labels) + 10_000 * (len(layers) + 1)  # bytes of what `keep` writes, at most
    try:
        content = json.loads(read_regular(_file(store, asked), largest))
        table, predicted = pd.DataFrame(content["table"]), np.array(content["predicted"])
        chosen = content["chosen"]
        sound = (
            content["of"] == _key(store, asked)
            and predicted.dtype.kind == "i"
            and predicted.shape == (len(layers), len(labels))
            and np.isin(predicted, train.labels).all()
            and _is_sound(table)
            and table.layer.tolist() == list(layers)
            and _are_accuracies(table, predicted == labels)
            and type(chosen) is int
            and chosen in layers
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return Answers(table, chosen, predicted) if sound else None


def _is_sound(table: pd.DataFrame) -> bool:
    """Whether all columns are known ones, of their kinds and in their ranges."""
    kinds = {name: column.dtype.kind for name, column in table.items()}
    return (
        kinds.keys() <= FLAGS | SHARES | COUNTS | OTHERS
        and all(kinds[name] == "b" for name in FLAGS & kinds.keys())
        and all(kinds[name] == "i" and table[name].between(0, 2**53).all() for name in COUNTS & kinds.keys())
        and all(kinds[name] in "if" and table[name].between(0, 1).all() for name in SHARES & kinds.keys())
        and all(kinds[name] in "if" and (table[name] >= 0).all() for name in OTHERS & kinds.keys())
        and ("n_validation" not in table or table.n_validation.min() > 0)
    )


def _are_accuracies(table: pd.DataFrame, correct: np.ndarray) -> bool:
    """Whether accuracies and intervals are those of predictions that are right where `correct` (L, N) is."""
    own = pd.DataFrame([accuracy(of_layer) for of_layer in correct])
    return np.allclose(table[list(own)], own, rtol=0, atol=1e-9) and table.converged.notna().all()


def _key(store: FeatureStore, asked: tuple) -> dict:
    """What answers depend on: the features, the choice, and the code and the packages that fit."""
    return {"asked": list(asked), "manifest": digest(store.manifest), "made_by": made_by("app/explorer/layers")}


def _file(store: FeatureStore, asked: tuple):
    return store.path.with_name(f".{store.path.name}.{digest(_key(store, asked))[:16]}.answers.json")
