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
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import ProbeResult

OF_TEST = ["in_peak_set", "log_loss", "log_loss_low", "log_loss_high"]  # columns that other test rows would change


def answers_of(result: ProbeResult, split: Features, shown: Features) -> Answers:
    """The answers in a result for the rows shown, which are some of those of the split.

    ValueError where its layers, rows or labels are not those of the split.
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
    table = answers.table.select_dtypes(["number", "bool"]).to_dict("list")
    content = {"of": _key(store, asked), "table": table, "chosen": int(answers.chosen)}
    content["predicted"] = answers.predicted.tolist()
    with suppress(OSError):
        atomic_write(_file(store, asked), json.dumps(content))


def kept(store: FeatureStore, asked: tuple, labels: np.ndarray) -> Answers | None:
    """The answers that were kept for rows with these labels; None where there are none, or they are damaged.

    A file may be a stranger's, as the store may be: it must fit the store, and its accuracies its predictions.
    """
    if hasattr(store.path, "put"):
        return None
    try:
        content = json.loads(_file(store, asked).read_bytes())
        table = pd.DataFrame(content["table"])
        predicted = np.array(content["predicted"], np.int64)
        accuracies = (predicted == labels).mean(1)
        layers = store.layers[asked[1]]
        sound = (
            content["of"] == _key(store, asked)
            and predicted.shape == (len(layers), len(labels))
            and 0 <= predicted.min() <= predicted.max() < 2**16
            and all(kind.kind in "iufb" for kind in table.dtypes)
            and {"low", "high", "converged"} <= set(table)
            and np.array_equal(table.test_accuracy, accuracies)
            and table.layer.tolist() == list(layers)
            and content["chosen"] in layers
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Answers(table, content["chosen"], predicted) if sound else None


def _key(store: FeatureStore, asked: tuple) -> dict:
    """What answers depend on: the features, the choice, and the code and the packages that fit."""
    return {"asked": list(asked), "manifest": digest(store.manifest), "made_by": made_by("app/explorer/layers")}


def _file(store: FeatureStore, asked: tuple):
    return store.path.with_name(f".{store.path.name}.{digest(_key(store, asked))[:16]}.answers.json")
