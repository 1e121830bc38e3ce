"""Parts are whole or do not count; plain Parquet readers see what we see."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from igpt_lab import provenance
from igpt_lab.store import FeatureKey, FeatureStore, StoreError

KEY = FeatureKey(
    model="tiny", weights="w", palette="p", size=4, resample="bilinear", crop="squash", images="a/b c",
    splits={"train": ("f", 5)}, layers={"ln_1": [0, 2]}, pool="mean", alignment="sos", dtype="float32",
)  # fmt: skip
RANDOM = np.random.default_rng(0)
VALUES = {name: RANDOM.normal(size=(5, 3)).astype(np.float32) for name in ("ln_1.0", "ln_1.2")}
STATS = {"ln_1.0": [3.0, 0.5, 0], "ln_1.2": [4.0, 0.0, 1]}


def fill(root, parts=(0, 1)) -> FeatureStore:
    store = FeatureStore.create(root, KEY, {"train": 2})
    for n in parts:
        rows = slice(0, 3) if n == 0 else slice(3, 5)
        values = {name: values[rows] for name, values in VALUES.items()}
        store.write_part("train", n, np.arange(10, 15)[rows], np.array([0, 1, 0, 1, 1])[rows], values, STATS)
    return store


def test_round_trip(tmp_path):
    store = FeatureStore.open(fill(tmp_path, (1, 0)).path)
    assert store.path.name.startswith("tiny-b-c-") and store.splits == ["train"]
    for name, values in VALUES.items():
        found = store.layer("ln_1", int(name[-1]), "train")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values)
    assert store.index("train").tolist() == [10, 11, 12, 13, 14] and store.labels("train").tolist() == [0, 1, 0, 1, 1]
    stats = store.stats().set_index("layer")
    assert stats.max_abs.tolist() == [3, 4] and stats.zeros.tolist() == [0.5, 0] and stats.non_finite.tolist() == [0, 2]


def test_any_parquet_reader(tmp_path):
    store = fill(tmp_path)
    table = pd.concat([pd.read_parquet(path) for path in sorted(store.path.rglob("*.parquet"))])
    np.testing.assert_array_equal(np.stack(table["ln_1.2"].to_list()), VALUES["ln_1.2"])
    np.testing.assert_array_equal(np.stack(store.table("train")["ln_1.0"].to_list()), VALUES["ln_1.0"])


def test_same_bytes_in_any_order(tmp_path):
    stores = [fill(tmp_path / "a", (0, 1)), fill(tmp_path / "b", (1, 0, 1))]
    files = [{p.relative_to(s.path): p.read_bytes() for p in s.path.rglob("*.*")} for s in stores]
    assert files[0] == files[1] and len(files[0]) == 3


def test_unfinished_altered_and_missing_parts_are_named(tmp_path):
    store = fill(tmp_path, (0,))
    with pytest.raises(StoreError, match="part-00001-of-00002.parquet is not finished"):
        FeatureStore.open(store.path)
    store.part("train", 1).write_bytes(store.part("train", 0).read_bytes())  # there, but the manifest does not list it
    with pytest.raises(StoreError, match="is not finished"):
        FeatureStore.open(store.path)
    store = fill(tmp_path)
    data = bytearray(store.part("train", 0).read_bytes())
    data[50] ^= 1
    store.part("train", 0).write_bytes(data)
    with pytest.raises(StoreError, match="part-00000-of-00002.parquet is missing or not as listed"):
        FeatureStore.open(store.path)
    store.part("train", 1).unlink()
    assert len(FeatureStore.create(tmp_path, KEY, {"train": 2}).problems()) == 2


def test_no_half_written_file(tmp_path, monkeypatch):
    store = fill(tmp_path, (0,))
    before = sorted(store.path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path, (1,))
    assert sorted(store.path.rglob("*")) == before


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError, match="no manifest.json"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"key": {"form')
    with pytest.raises(StoreError, match="is not a manifest"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"key": {"format": 99}, "splits": {}}))
    with pytest.raises(StoreError, match="format 99"):
        FeatureStore.open(tmp_path)
    store = fill(tmp_path)
    with pytest.raises(KeyError, match="no ln_1.1"):
        store.layer("ln_1", 1, "train")
    with pytest.raises(KeyError, match="no split 'test'"):
        store.labels("test")


def test_every_field_of_the_key_changes_the_folder():
    folders = {KEY.folder()}
    for field in dataclasses.fields(KEY):
        value = getattr(KEY, field.name)
        other = {"x": 1} if isinstance(value, dict) else 7 if isinstance(value, int) else value + "x"
        folders.add(dataclasses.replace(KEY, **{field.name: other}).folder())
    assert len(folders) == 1 + len(dataclasses.fields(KEY))
