"""Features in memory as a store in a temporary folder, so that the explorer opens them as any other."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from igpt_lab.core.depth import in_depth
from igpt_lab.core.provenance import digest
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.networks import POINT
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.probing.features import Features, check_same_layers

GIVEN = "given "  # a fingerprint that begins so is of features, and says nothing of images


def store_of(features: Mapping[str, Features]) -> FeatureStore:
    """A store of the features of splits by name, whose folder is gone with it.

    Raises TypeError for what is no features, and ValueError where there are none or their layers differ.
    """
    splits = dict(features)
    if not splits:
        raise ValueError("there are no features; expected some by split, as in {'train': train}")
    for split, of_split in splits.items():
        if not isinstance(of_split, Features):
            raise TypeError(
                f"{split!r} is a {type(of_split).__name__}; expected features by split, as in {{'train': train}}"
            )
        check_same_layers(next(iter(splits.values())), of_split)
    layers = in_depth(next(iter(splits.values())).layers)
    names = tuple(map(str, layers))
    classes = tuple(dict.fromkeys(name for of_split in splits.values() for name in of_split.names))
    key = FeatureKey(
        model="features", weights="none", palette="none", size=0, resample="none", crop="none", images="memory",
        splits={split: (GIVEN + _digest(of_split), len(of_split.labels)) for split, of_split in splits.items()},
        layers={POINT: list(range(len(layers)))}, pool="none", alignment="none", dtype="float32", modules=names,
    )  # fmt: skip
    root = Path(tempfile.mkdtemp(prefix="igpt-lab-"))
    try:
        store = _written(root, key, splits, classes)
    except BaseException:
        shutil.rmtree(root, True)
        raise
    weakref.finalize(store, shutil.rmtree, root, True)
    return store


def _written(root: Path, key: FeatureKey, splits: dict[str, Features], classes: tuple[str, ...]) -> FeatureStore:
    """The store of these features in a folder."""
    source = {"model": None, "images": dict.fromkeys(splits), "options": {"on_bad_image": "error"}}
    parts = dict.fromkeys(splits, 1)
    with closing(StoreWriter.create(root, key, parts, source=source, classes=classes)) as writer:
        for split, of_split in splits.items():
            layers = enumerate(in_depth(of_split.layers))
            columns = {f"{POINT}.{number}": of_split.layers[layer] for number, layer in layers}
            writer.write_part(split, 0, of_split.index, _numbered(of_split, classes), columns, {})
    return FeatureStore.open(writer.path)


def _numbered(features: Features, classes: tuple[str, ...]) -> np.ndarray:
    """The labels by the classes of all splits."""
    if not features.names:
        return features.labels
    return np.array([classes.index(name) for name in features.names], np.int64)[features.labels]


def _digest(features: Features) -> str:
    arrays = [features.labels, features.index, *(features.layers[layer] for layer in features.layers)]
    return digest([digest(np.ascontiguousarray(array).tobytes()) for array in arrays])
