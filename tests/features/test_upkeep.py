"""Every problem of a store is told, bad parts alone are made again, and nothing of use is pruned."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt_lab.core.provenance import digest
from igpt_lab.features import extraction, prepared, upkeep
from igpt_lab.features.manifest import FeatureKey, StoreError
from igpt_lab.features.settings import ExtractionSettings
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.loading import load_images
from igpt_lab.models import loading


@pytest.fixture
def store(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)  # 60 rows: 3 parts
    return extraction.extract(tiny, train, store=tmp_path / "stores", device="cpu", progress=False)


def texts(store) -> list[str]:
    return [problem.removeprefix(f"{store.path}/train/") for _, _, problem in upkeep.verify(store.path)]


def replaced(store, number, table) -> None:
    """Another writer's part: its digest is as listed."""
    path, file = store.part("train", number), store.path / "manifest.json"
    pq.write_table(table, path)
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"][number] |= {"sha256": digest(path)}
    file.write_text(json.dumps(manifest))


def test_every_problem_is_listed(store):
    assert texts(store) == []
    store.part("train", 0).unlink()
    data = store.part("train", 1).read_bytes()
    store.part("train", 1).write_bytes(data[: len(data) // 2])
    store.part("train", 2).write_bytes(bytes([*data[:2000], data[2000] ^ 1, *data[2001:]]))
    problems = texts(store)
    assert problems[0] == "part-00000-of-00003.parquet is missing"
    assert "part-00001-of-00003.parquet has the digest" in problems[1] and "not readable as Parquet" in problems[2]
    assert (
        "part-00002-of-00003.parquet has the digest" in problems[3]
        and "has 25 rows, the manifest lists 10" in problems[4]
    )
    assert len(problems) == 5


def test_columns_and_index_are_compared_with_the_key(store):
    part, floats = pq.read_table(store.part("train", 1)), pa.array(np.zeros(75, np.float32))
    for table, message in (
        (part.drop_columns(["ln_1.3"]), "has the columns"),
        (part.rename_columns([*part.column_names[:-1], "ln_1.9"]), "has the columns"),
        (part.set_column(0, "index", part["index"].cast(pa.int32())), "has index as int32"),
        (part.set_column(2, "ln_1.0", part["label"]), "has ln_1.0 as int64"),
        (part.set_column(2, "ln_1.0", pa.FixedSizeListArray.from_arrays(floats, 3)), "different width: [3, 8]"),
        (part.set_column(0, "index", pa.array(np.arange(24, 49))), "a row twice, or one that was skipped: 24"),
        (part.set_column(0, "index", pa.array([25] * 25)), "a row twice, or one that was skipped: 25"),
        (part.slice(1), "has 24 rows, the manifest lists 25"),
    ):  # fmt: skip
        replaced(store, 1, table)
        problems = upkeep.verify(store.path)
        assert [number for _, number, _ in problems] == [1] and message in problems[0][2]
    replaced(store, 1, part)
    assert texts(store) == []


def test_the_index_is_read_in_pieces_and_only_of_a_part_with_the_listed_rows(store, monkeypatch):
    """Of another writer's part nothing says how large it becomes in memory."""
    part = pq.read_table(store.part("train", 1))
    largest, batches = [], pq.ParquetFile.iter_batches

    def noted(file, batch_size, columns, **options):
        assert columns == ["index"]
        for batch in batches(file, batch_size, columns=columns, **options):
            largest.append(len(batch))
            yield batch

    monkeypatch.setattr(upkeep, "PIECE", 10)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("a whole column was read"))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    assert texts(store) == [] and max(largest) == 10 and sum(largest) == 60
    index = np.arange(25, 50)
    index[23] = 26  # in the third piece, of the first
    replaced(store, 1, part.set_column(0, "index", pa.array(index)))
    assert texts(store) == ["part-00001-of-00003.parquet: `index` has a row twice, or one that was skipped: 26"]
    replaced(store, 1, pa.concat_tables([part] * 40))
    largest.clear()
    assert texts(store)[0] == "part-00001-of-00003.parquet has 1000 rows, the manifest lists 25"
    assert sum(largest) == 35  # of the other two parts


def test_a_repair_makes_the_bad_parts_alone(store, monkeypatch):
    good = {path: path.read_bytes() for path in store.path.rglob("*.*")}
    replaced(store, 1, pq.read_table(store.part("train", 1)).drop_columns(["label"]))
    store.part("train", 2).unlink()
    written, write = [], StoreWriter.write_part
    monkeypatch.setattr(StoreWriter, "write_part", lambda self, *a, **k: written.append(a[1]) or write(self, *a, **k))
    upkeep.repair(store.path, upkeep.verify(store.path))
    assert written == [1, 2] and {path: path.read_bytes() for path in store.path.rglob("*.*")} == good


def test_a_repair_needs_the_same_model_and_images(tiny_folder, tiny_images, tmp_path):
    model, images = tmp_path / "model", tmp_path / "images"
    shutil.copytree(tiny_folder, model), shutil.copytree(tiny_images, images)
    loaded = loading.load_model(model)
    store = extraction.extract(loaded, load_images(images, limit=8), store=tmp_path / "a", progress=False)
    part = store.part("test", 0)
    good, bad = part.read_bytes(), b"bad"

    def refused(message, error=StoreError):
        part.write_bytes(bad)
        with pytest.raises(error, match=message):
            upkeep.repair(store.path, upkeep.verify(store.path))
        assert part.read_bytes() == bad  # nothing was changed

    next(loaded.parameters()).data += 1
    loaded.save_pretrained(model)
    refused('of its model and images, weights is "[0-9a-f]{8}", there "[0-9a-f]{8}"; nothing was changed')
    shutil.rmtree(model), shutil.copytree(tiny_folder, model)
    for path in images.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    refused("of its model and images, splits is test: .*, there test: .*; nothing was changed")
    shutil.rmtree(images)
    refused("no image set", ValueError)
    shutil.copytree(tiny_images, images)
    moved = store.path.rename(tmp_path / "renamed")
    with pytest.raises(
        StoreError, match=f"was renamed; name it again as it was written, to repair it: {store.path.name}"
    ):
        upkeep.repair(moved, upkeep.verify(moved))
    moved.rename(store.path)
    upkeep.repair(store.path, upkeep.verify(store.path))
    assert part.read_bytes() == good
    loaded = loading.load_model(tiny_folder)
    del loaded.source
    store = extraction.extract(loaded, load_images(images, limit=9), store=tmp_path / "a", progress=False)
    with pytest.raises(StoreError, match="does not say where its model and images are; run the same extraction again"):
        upkeep.repair(store.path, [("test", 0, "bad")])


def test_what_is_asked_is_repaired_too(tiny, train, test, tmp_path):
    asked = {"points": ["mlp_out", "ln_1"], "layers": [-1, 0], "pool": "grid:2", "alignment": "raw", "batch_size": 7}
    splits = [train.select(np.arange(60)), test]
    store = extraction.extract(tiny, splits, store=tmp_path, device="cpu", progress=False, **asked)
    good = store.part("test", 0).read_bytes()
    store.part("test", 0).write_bytes(b"")
    upkeep.repair(store.path, upkeep.verify(store.path))
    assert store.part("test", 0).read_bytes() == good
    shuffled = train.select(np.random.default_rng(0).permutation(60))
    store = extraction.extract(tiny, shuffled, store=tmp_path, device="cpu", progress=False)
    with pytest.raises(StoreError, match="splits is train: "):  # chosen in code; the source alone does not give it
        upkeep.repair(store.path, [("train", 0, "bad")])


def test_of_a_stranger_s_manifest_only_settings_are_used(store, monkeypatch):
    part, file = store.part("train", 1), store.path / "manifest.json"
    good, manifest = part.read_bytes(), json.loads(file.read_text())
    options = manifest["source"]["options"]
    hostile = {
        "engine": "dask",
        "scheduler": "tcp://stranger:8786",
        "part": [1, 2],
        "store": "/elsewhere",
        "device": "x",
    }
    monkeypatch.setattr("igpt_lab.core.cluster.connected", lambda *_: pytest.fail("a cluster was asked"))
    called, prepare = [], prepared.prepare
    monkeypatch.setattr(prepared, "prepare", lambda *a, **named: called.append((a[2], named)) or prepare(*a, **named))
    file.write_text(json.dumps(manifest | {"source": manifest["source"] | {"options": options | hostile}}))
    part.unlink()
    upkeep.repair(store.path, upkeep.verify(store.path))
    assert part.read_bytes() == good and called == [
        (ExtractionSettings.from_options(options), {"store": store.path.parent})
    ]
    for wrong, message in (({"pool": "none"}, "its options"), ({"layers": [5]}, "layer 5 at ln_1"), ({"pool": 3}, "")):
        file.write_text(json.dumps(manifest | {"source": manifest["source"] | {"options": options | wrong}}))
        part.write_bytes(b"bad")
        with pytest.raises(StoreError, match=f"cannot be repaired: {message}"):
            upkeep.repair(store.path, [("train", 1, "bad")])
        assert part.read_bytes() == b"bad"
    file.write_text(json.dumps(manifest | {"source": manifest["source"] | {"options": options | {"layers": [0]}}}))
    with pytest.raises(StoreError, match="layers is .*; nothing was changed"):  # other layers than the key's
        upkeep.repair(store.path, [("train", 1, "bad")])


def test_stores_are_listed(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "stores" / "garbage-12345678")
    (tmp_path / "stores/garbage-12345678/manifest.json").write_text("{")
    (tmp_path / "stores/notes").mkdir()
    whole, bad = upkeep.list_stores(tmp_path / "stores").iloc[::-1].to_dict("records")
    assert (whole["rows"], whole["layers"], whole["state"]) == ("train 60", "ln_1 4", "complete")
    assert (whole["alignment"], whole["pool"]) == (store.key["alignment"], store.key["pool"])
    assert whole["key8"] == store.path.name[-8:] and whole["MB"] == store.size / 1e6
    assert "is not a manifest" in bad["state"]
    store.part("train", 2).unlink()
    assert upkeep.list_stores(store.path)["state"].tolist() == ["2 of 3 parts"]


def test_nothing_of_use_is_pruned(store, tmp_path):
    root = store.path.parent
    begun = root / "begun-01234567"
    shutil.copytree(store.path / "train", begun / "train")
    newer, other = root / "newer-01234567", root / "thesis-01234567"
    newer.mkdir(), other.mkdir()
    (newer / "manifest.json").write_text(json.dumps({"key": {"format": 99}}))
    (other / "manifest.txt").write_text("mine")
    key = FeatureKey(**store.key)
    unfinished = StoreWriter.create(root, dataclasses.replace(key, pool="max"), {"train": 3})
    table = {f"ln_1.{layer}": store.layer("ln_1", layer, "train")[:25] for layer in range(4)}
    unfinished.write_part("train", 0, np.arange(25), None, table, {})
    (unfinished.path / "notes.txt").write_text("mine")
    (store.path / "train/part-00000-of-00002.parquet").write_bytes(b"orphan")
    (store.path / "train/.part-00000-of-00003.parquet.abc.tmp").write_bytes(b"half")
    (root / f".{store.path.name}.lock").touch()
    for age in (0, 7200):  # another process may be at the newer one
        tokens = root / f"tokens/set-01234567/.part-{age}.tmp"
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_bytes(b"half")
        os.utime(tokens, (time.time() - age, time.time() - age))
    kept = {path: path.read_bytes() for path in store.path.rglob("part-*-of-00003.parquet")}
    busy = unfinished.claims([("train", 1)])
    next(busy)
    sizes = {
        (leftover.what, leftover.path.relative_to(root).as_posix()): leftover.size
        for leftover in upkeep.leftovers(root)
    }
    assert sizes == {
        ("incomplete store", "begun-01234567"): store.size,
        ("temporary file", f"{store.path.name}/train/.part-00000-of-00003.parquet.abc.tmp"): 4,
        ("part that the manifest does not list", f"{store.path.name}/train/part-00000-of-00002.parquet"): 6,
        ("lock of a process that is gone", f".{store.path.name}.lock"): 0,
        ("temporary file", "tokens/set-01234567/.part-7200.tmp"): 4,
    }
    busy.close()
    for useless in upkeep.leftovers(root):
        upkeep.remove(useless)
    assert upkeep.leftovers(root) == [] and not begun.exists()
    assert [path.name for path in unfinished.path.iterdir()] == ["notes.txt"]
    assert (newer / "manifest.json").exists() and (other / "manifest.txt").exists()
    assert {path: path.read_bytes() for path in store.path.rglob("*.parquet")} == kept
    FeatureStore.open(store.path)
