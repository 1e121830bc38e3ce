"""Parts are whole or do not count; plain Parquet readers see what we see."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt_lab.core import provenance
from igpt_lab.core.storage import held, lock_of
from igpt_lab.features import manifest as manifest_module
from igpt_lab.features.manifest import FeatureKey, StoreError, explain_miss
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter

KEY = FeatureKey(
    model="tiny", weights="w", palette="p", size=4, resample="bilinear", crop="squash", images="a/b c",
    splits={"train": ("f", 5)}, layers={"ln_1": [0, 2]}, pool="mean", alignment="sos", dtype="float32",
)  # fmt: skip
RANDOM = np.random.default_rng(0)
VALUES = {name: RANDOM.normal(size=(5, 3)).astype(np.float32) for name in ("ln_1.0", "ln_1.2")}
STATS = {"ln_1.0": [3.0, 0.5, 0], "ln_1.2": [4.0, 0.0, 1]}


def fill(root, parts=(0, 1)) -> StoreWriter:
    store = StoreWriter.create(root, KEY, {"train": 2})
    for n in parts:
        rows = slice(0, 3) if n == 0 else slice(3, 5)
        values = {name: values[rows] for name, values in VALUES.items()}
        store.write_part("train", n, np.arange(10, 15)[rows], np.array([0, 1, 0, 1, 1])[rows], values, STATS)
    store.close()
    return store


def test_round_trip(tmp_path):
    store = FeatureStore.open(fill(tmp_path, (1, 0)).path)
    assert store.path.name.startswith("tiny-b-c-") and store.splits == ["train"]
    for name, values in VALUES.items():
        features = store.layer("ln_1", int(name[-1]), "train")
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, values)
    assert store.index("train").tolist() == [10, 11, 12, 13, 14] and store.labels("train").tolist() == [0, 1, 0, 1, 1]
    stats = store.stats().set_index("layer")
    assert stats.max_abs.tolist() == [3, 4] and stats.zeros.tolist() == [0.5, 0] and stats.non_finite.tolist() == [0, 2]


def test_arrays_that_are_read_are_the_user_s_own(tmp_path):
    store = fill(tmp_path, (0, 1)).reader()
    for array in (store.index("train"), store.labels("train"), store.layer("ln_1", 0, "train")):
        assert array.flags.writeable and array.flags.owndata


def test_row_groups_one_by_one(tmp_path):
    writer = fill(tmp_path)
    store = writer.reader()
    assert store.row_groups("train") == [(0, 0, 3), (1, 0, 2)]
    groups = [store.row_group("train", *place[:2], ["label", "index", "ln_1.2"]) for place in store.row_groups("train")]
    whole = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    np.testing.assert_array_equal(whole["ln_1.2"], VALUES["ln_1.2"])
    assert whole["index"].tolist() == [10, 11, 12, 13, 14] and whole["label"].tolist() == [0, 1, 0, 1, 1]
    table = pa.concat_tables([pq.read_table(store.part("train", n)) for n in (0, 1)])
    pq.write_table(table, store.part("train", 1), row_group_size=2)  # as another writer may
    store.listed("train")[1]["rows"] = 5
    assert store.row_groups("train")[1:] == [(1, 0, 2), (1, 1, 2), (1, 2, 1)]
    np.testing.assert_array_equal(store.row_group("train", 1, 1, ["ln_1.0"])["ln_1.0"], VALUES["ln_1.0"][2:4])
    writer.write_part("train", 0, np.arange(3), None, {name: column[:3] for name, column in VALUES.items()}, STATS)
    assert store.row_group("train", 0, 0, ["label"])["label"].tolist() == [-1, -1, -1]


def test_any_parquet_reader(tmp_path):
    store = fill(tmp_path).reader()
    table = pd.concat([pd.read_parquet(path) for path in sorted(store.path.rglob("*.parquet"))])
    np.testing.assert_array_equal(np.stack(table["ln_1.2"].to_list()), VALUES["ln_1.2"])
    np.testing.assert_array_equal(np.stack(store.table("train")["ln_1.0"].to_list()), VALUES["ln_1.0"])


def test_same_bytes_in_any_order(tmp_path):
    stores = [fill(tmp_path / "a", (0, 1)), fill(tmp_path / "b", (1, 0, 1))]
    files = [{p.relative_to(s.path.parent): p.read_bytes() for p in s.path.parent.rglob("*.*")} for s in stores]
    assert files[0] == files[1] and len(files[0]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:1], "part-00001-of-00002.parquet is not as listed: it has 1 rows, the manifest lists 2"),
        (lambda table: None, "part-00001-of-00002.parquet is not as listed: .*No such file"),
        (lambda table: table.drop(["ln_1.2"]), "part-00001-of-00002.parquet is not as listed: it has the columns"),
        (lambda table: table.set_column(3, "ln_1.2", table["index"]), "has ln_1.2 as int64"),
        (lambda table: table.set_column(3, "ln_1.2", WIDER), "ln_1.2 9 wide, parts before it 3"),
        (lambda table: table.set_column(3, "ln_1.2", WITHOUT), "ln_1.2 has .* missing|Expected all lists to be"),
        (lambda table: table.set_column(1, "label", pa.array([None, 1], pa.int64())), "1 of 5 rows have no label"),
    ],
    ids=["rows", "absent", "column", "type", "width", "null", "label"],
)
def test_a_part_that_is_not_as_listed_gives_no_numbers(tmp_path, change, message):
    """Without digests, too: an array is filled from every part, or it is not given."""
    store = FeatureStore.open(fill(tmp_path).path, verify=False)
    path = store.part("train", 1)
    changed = change(pq.read_table(path))
    path.unlink()
    if changed is not None:
        pq.write_table(changed, path)
    with pytest.raises(StoreError, match=message):
        store.labels("train")
        store.layer("ln_1", 2, "train")


WIDER = pa.array([[0.0] * 9] * 2, pa.list_(pa.float32(), 9))
WITHOUT = pa.array([None] * 2, pa.list_(pa.float32(), 8))


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
    assert len(StoreWriter.create(tmp_path, KEY, {"train": 2}).problems()) == 2


def test_no_half_written_file(tmp_path, monkeypatch):
    store = fill(tmp_path, (0,))
    before = sorted(store.path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*part-00001-of-00002.parquet was not written"):
        fill(tmp_path, (1,))
    assert sorted(store.path.rglob("*")) == before
    written, calls = provenance.os.replace, []
    monkeypatch.undo()
    monkeypatch.setattr(
        provenance.os, "replace", lambda *a: calls.append(a) or (full if len(calls) > 1 else written)(*a)
    )
    with pytest.raises(OSError, match="No space left"):  # there is room for the part, and none for the manifest
        fill(tmp_path, (1,))
    assert sorted(store.path.rglob("*")) == before and len(calls) == 2


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError, match="no manifest.json"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"key": {"form')
    with pytest.raises(StoreError, match="is not a manifest"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"key": {"format": 99}, "splits": {}}))
    with pytest.raises(StoreError, match="format 99"):
        FeatureStore.open(tmp_path)
    store = fill(tmp_path).reader()
    with pytest.raises(KeyError, match="no ln_1.1"):
        store.layer("ln_1", 1, "train")
    with pytest.raises(KeyError, match="no split 'test'"):
        store.labels("test")


def test_every_field_of_the_key_changes_the_folder():
    folders = {KEY.folder()}
    for field in dataclasses.fields(KEY):
        value = getattr(KEY, field.name)
        others = {dict: {"x": [1]}, int: 7, tuple: ("a",)}
        other = others[type(value)] if type(value) in others else value + "x"
        folders.add(dataclasses.replace(KEY, **{field.name: other}).folder())
    assert len(folders) == 1 + len(dataclasses.fields(KEY))


OTHER = {
    "model": "b", "weights": "x", "palette": "x", "size": 8, "resample": "nearest", "crop": "center", "images": "c",
    "splits": {"train": ("g", 5)}, "layers": {"ln_1": [0, 1, 2]}, "pool": "max", "alignment": "raw",
    "dtype": "bfloat16", "format": 2, "modules": ("a",), "preprocess": "p",
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KEY)])
def test_a_miss_names_the_field(field, tmp_path):
    store = fill(tmp_path)
    other = dataclasses.replace(KEY, **{field: OTHER[field]})
    path, fields = other.nearest(tmp_path)
    assert path == store.path and [name for name, _, _ in fields] == [field]
    assert fields[0][1:] == (other.plain()[field], KEY.plain().get(field))
    new = explain_miss(tmp_path, other)
    if field == "splits":  # of other images
        assert new == ""
        return
    assert new.startswith(f"{field} is ") and new.endswith(f" in {store.path.name}") and ", there " in new


def test_the_nearest_store_is_the_one_named(tmp_path):
    assert KEY.nearest(tmp_path / "none") is None and explain_miss(tmp_path, KEY) == ""
    far = dataclasses.replace(KEY, pool="max", alignment="raw", weights="a" * 64)
    near = dataclasses.replace(KEY, layers={"ln_1": [0, 1, 2, 3]})
    for key in (far, near):
        values = {f"ln_1.{layer}": VALUES["ln_1.0"] for layer in key.layers["ln_1"]}
        StoreWriter.create(tmp_path, key, {"train": 1}).write_part("train", 0, np.arange(5), None, values, {})
    assert explain_miss(tmp_path, KEY) == f"layers is ln_1: [0, 2], there ln_1: 0..3 in {near.folder()}"
    other = dataclasses.replace(far, weights="b" * 64)
    assert explain_miss(tmp_path, other) == f'weights is "bbbbbbbb", there "aaaaaaaa" in {far.folder()}'
    assert explain_miss(tmp_path, far) == ""  # a hit
    of_others = dataclasses.replace(far, images="c", splits={"train": ("g", 5)})
    assert explain_miss(tmp_path, of_others) == ""
    two = dataclasses.replace(far, weights="b" * 64, pool="last")
    assert explain_miss(tmp_path, two) == ""  # two fields differ from every store


def test_a_change_that_cannot_matter_is_a_hit(tmp_path):
    same = dataclasses.replace(KEY, layers={"ln_1": [2, 0, 2]}, splits={"train": ["f", 5]})
    assert same == dataclasses.replace(KEY, splits={"train": ["f", 5]}) and same.folder() == KEY.folder()
    assert StoreWriter.create(tmp_path, same, {"train": 2}).path == fill(tmp_path).path


def test_two_writers_with_their_own_view_make_one_store(tmp_path):
    first, second = (StoreWriter.create(tmp_path / "two", KEY, {"train": 2}) for _ in range(2))
    for store, n in ((first, 0), (second, 1)):
        rows = slice(3 * n, 3 * n + 3)
        values = {name: column[rows] for name, column in VALUES.items()}
        assert list(store.claims([("train", n)])) == [("train", n)]
        store.write_part("train", n, np.arange(10, 15)[rows], np.array([0, 1, 0, 1, 1])[rows], values, STATS)
    assert first.has("train", 1) and list(first.claims([("train", 0), ("train", 1)])) == []
    alone = fill(tmp_path / "one")
    for path in alone.path.rglob("*.*"):
        assert (second.path / path.relative_to(alone.path)).read_bytes() == path.read_bytes()


def test_a_thread_sees_what_another_process_listed_while_its_sibling_still_reads(tmp_path, monkeypatch):
    mine, theirs, seen, read = fill(tmp_path, ()), fill(tmp_path, ()), [], manifest_module.read_manifest
    theirs.write_part("train", 0, np.arange(3), None, {name: column[:3] for name, column in VALUES.items()}, STATS)

    def slow(path):
        monkeypatch.setattr(manifest_module, "read_manifest", read)
        sibling.start()  # a second thread asks while the first is here
        sibling.join(0.2)
        return read(path)

    sibling = threading.Thread(target=lambda: seen.append(mine.has("train", 0)))
    monkeypatch.setattr(manifest_module, "read_manifest", slow)
    assert mine.has("train", 0)
    sibling.join(30)
    assert seen == [True]


def test_a_part_is_claimed_by_one(tmp_path):
    first, second = (StoreWriter.create(tmp_path, KEY, {"train": 2}) for _ in range(2))
    mine = first.claims([("train", 0), ("train", 1)])
    assert next(mine) == ("train", 0)
    theirs = second.claims([("train", 0), ("train", 1)])
    assert next(theirs) == ("train", 1)
    mine.close()
    assert next(theirs) == ("train", 0)
    theirs.close()
    assert list(tmp_path.iterdir()) == []


def test_claims_are_held_after_the_loop_s_end_until_their_part_is_written(tmp_path):
    store, parts = StoreWriter.create(tmp_path, KEY, {"train": 2}), [("train", 0), ("train", 1)]
    locks = [Path(lock_of(store.path, f".train.{n}").lock_file) for n in (0, 1)]
    assert list(store.claims(parts)) == parts and all(map(held, locks))
    store.write_part("train", 0, np.arange(3), None, {name: column[:3] for name, column in VALUES.items()}, STATS)
    assert [held(lock) for lock in locks] == [False, True]
    store.close()
    assert not any(map(held, locks))


def test_stale_manifests_are_found_and_mended(tmp_path):
    store = fill(tmp_path)
    file, good = store.path / "manifest.json", json.loads((store.path / "manifest.json").read_text())

    def stale(message, **changes):
        file.write_text(json.dumps(good | changes))
        with pytest.raises(StoreError, match=message):
            FeatureStore.open(store.path)
        again = StoreWriter.create(tmp_path, KEY, {"train": 2})
        fill(tmp_path, [n for n in (0, 1) if not again.has("train", n)])
        assert json.loads(file.read_text()) == good
        FeatureStore.open(store.path)

    stale("is stale: its key is .*, its folder's .*; delete", key=good["key"] | {"pool": "max"})
    stale("is stale: it lists \\['test'\\]", splits={"test": good["splits"]["train"]})
    stale("part-00000-of-00001.parquet is missing", splits={"train": good["splits"]["train"][:1]})
    stale("part-00000-of-00003.parquet is missing", splits={"train": [*good["splits"]["train"], None]})
    good0 = good["splits"]["train"][0]
    parts = [part | {"rows": part["rows"] + 1} for part in good["splits"]["train"]]
    stale("part-00001-of-00002.parquet is missing or not as listed .1 such", splits={"train": [good0, parts[1]]})
    stale("part-00000-of-00002.parquet is missing or not as listed .2 such", splits={"train": parts})
    stale("is not a manifest", splits={"train": [1, 2]})
    store.part("train", 0).write_bytes(store.part("train", 1).read_bytes())
    stale("train has 4 rows in its parts, 5 in its key", splits={"train": [good["splits"]["train"][1]] * 2})
    file.write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="is not a manifest.*delete .* and extract again"):
        FeatureStore.open(store.path)
    assert not StoreWriter.create(tmp_path, KEY, {"train": 2}).has("train", 0)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    store = fill(tmp_path, (0,))
    left = [store.path / ".manifest.json.abc.tmp", store.path / "train/.part-00001-of-00002.parquet.x.tmp"]
    left += [tmp_path / f".{store.path.name}.train.0.lock", tmp_path / f".{store.path.name}.lock"]
    for file in left:
        file.touch()
    other = StoreWriter.create(tmp_path, KEY, {"train": 2})
    assert not any(file.exists() for file in left) and not other.has("train", 1)
    busy = store.claims([("train", 1)])
    next(busy)
    StoreWriter.create(tmp_path, KEY, {"train": 2})
    assert (tmp_path / f".{store.path.name}.train.1.lock").exists()  # held


def test_rows_without_features_are_listed(tmp_path):
    key = dataclasses.replace(KEY, splits={"train": ("f", 7)})
    store = StoreWriter.create(tmp_path, key, {"train": 3})
    empty = {name: values[:0] for name, values in VALUES.items()}
    store.write_part("train", 0, np.arange(4), None, {n: v[:4] for n, v in VALUES.items()}, STATS, [(4, "cut short")])
    store.write_part("train", 1, np.arange(0), None, empty, {}, skipped=[(5, "no image")])
    store.write_part("train", 2, np.array([6]), None, {n: v[4:] for n, v in VALUES.items()}, STATS)
    store = FeatureStore.open(store.path)
    assert store.skipped("train").to_dict("list") == {"row": [4, 5], "reason": ["cut short", "no image"]}
    assert store.index("train").tolist() == [0, 1, 2, 3, 6] and store.labels("train") is None
    np.testing.assert_array_equal(store.layer("ln_1", 2, "train"), VALUES["ln_1.2"])
    assert len(store.stats()) == 2 and len(store.table("train")) == 5


def test_one_layer_and_no_other(tmp_path, monkeypatch):
    store = fill(tmp_path).reader()
    np.testing.assert_array_equal(store.layer("ln_1", -1, "train"), VALUES["ln_1.2"])
    np.testing.assert_array_equal(store.layer("ln_1", -2, "train"), VALUES["ln_1.0"])
    assert list(store.table("train", [-1])) == ["index", "label", "ln_1.2"]
    assert store.size == sum(path.stat().st_size for path in store.path.rglob("*.parquet"))
    for layer in (-3, 1, 3):
        with pytest.raises(KeyError, match=f"no ln_1.{layer}; it has"):
            store.layer("ln_1", layer, "train")


def test_open_without_digests(tmp_path):
    store = fill(tmp_path)
    store.part("train", 0).write_bytes(b"altered")
    assert FeatureStore.open(store.path, verify=False).splits == ["train"]
    store.part("train", 0).unlink()
    with pytest.raises(StoreError, match="part-00000-of-00002.parquet is missing"):
        FeatureStore.open(store.path, verify=False)


def test_overflow_is_kept_as_json(tmp_path):
    store = StoreWriter.create(tmp_path, KEY, {"train": 1})
    stats = {"ln_1.0": [float("inf"), 0.0, 3], "ln_1.2": [float("nan"), 0.0, 3]}
    store.write_part("train", 0, np.arange(5), None, VALUES, stats)
    json.loads((store.path / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert FeatureStore.open(store.path).stats().max_abs.tolist() == pytest.approx([np.inf, np.nan], nan_ok=True)


def test_the_old_name_of_a_writer_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match="use StoreWriter.create"):
        writer = FeatureStore.create(tmp_path, KEY, {"train": 2})
    assert isinstance(writer, StoreWriter) and writer.path == fill(tmp_path).path


def test_features_of_another_key_are_refused(tmp_path):
    store = StoreWriter.create(tmp_path, KEY, {"train": 1})
    with pytest.raises(ValueError, match="the key of tiny-b-c-.* has"):
        store.write_part("train", 0, np.arange(5), None, {"ln_1.0": VALUES["ln_1.0"]}, STATS)
