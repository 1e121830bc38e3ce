"""Stores that are killed, damaged, shared or out of room end as one that never was: the same bytes."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from igpt_lab.features import prepared
from igpt_lab.features.extraction import extract
from igpt_lab.features.manifest import StoreError
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.loading import load_images

# A server that has torch imported, and no threads, forks each process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "igpt_lab.features.extraction", "torch._dynamo", "scipy.spatial", "PIL.PngImagePlugin"]
)
ROWS = 4
OPTIONS = {"device": "cpu", "progress": False}


def fill(model, images, root, pause=0.0, together=None):
    """One process's extraction of both splits; `pause` seconds a part; begins `together` with others."""
    torch.set_num_threads(1)
    prepared.ROWS = ROWS
    write = StoreWriter.write_part

    def slowly(self, *arguments, **named):
        time.sleep(pause)
        write(self, *arguments, **named)
        with (root / f"parts-{os.getpid()}").open("a") as log:
            log.write("1")

    StoreWriter.write_part = slowly
    if together:
        together.wait(60)
    extract(model, [load_images(images, split) for split in ("train", "test")], store=root / "stores", **OPTIONS)


def start(*arguments, **named):
    process = PROCESSES.Process(target=fill, args=arguments, kwargs=named)
    process.start()
    return process


def content(root) -> dict:
    """Every file of the stores below `root`, hidden ones too, without the tokens kept beside them."""
    files = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.parts[0] != "tokens"}


@pytest.fixture(scope="module")
def whole(tiny_folder, tiny_images, tmp_path_factory):
    """What an extraction leaves that nothing disturbed: 15 and 10 parts."""
    root = tmp_path_factory.mktemp("whole")
    process = start(tiny_folder, tiny_images, root)
    process.join()
    assert process.exitcode == 0
    return content(root / "stores")


def test_killed_at_any_moment(whole, tiny_folder, tiny_images, tmp_path):
    chance, kills, cut, root = random.Random(0), 0, set(), tmp_path / "0"
    while kills < 40:
        root.mkdir(exist_ok=True)
        process = start(tiny_folder, tiny_images, root)
        early = time.monotonic() + chance.choice([chance.uniform(0, 0.1), 60, 60, 60])  # before or after a first part
        while process.is_alive() and not (root / f"parts-{process.pid}").exists() and time.monotonic() < early:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        cut.add(len(list(root.rglob("part-*.parquet"))))
        if process.exitcode == 0:  # it was done before
            assert content(root / "stores") == whole
            root = tmp_path / str(kills)
    for root in tmp_path.iterdir():
        process = start(tiny_folder, tiny_images, root)
        process.join()
        assert process.exitcode == 0 and content(root / "stores") == whole
    assert len(cut) > 5  # moments that differ


def test_two_processes_share_the_work(whole, tiny_folder, tiny_images, tmp_path):
    together = PROCESSES.Barrier(2)
    both = [start(tiny_folder, tiny_images, tmp_path, pause=0.02, together=together) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and content(tmp_path / "stores") == whole
    done = [len((tmp_path / f"parts-{process.pid}").read_text()) for process in both]
    assert sum(done) == 25 and min(done) > 0, "no part was computed twice"


def test_one_of_two_is_killed(whole, tiny_folder, tiny_images, tmp_path):
    slow = start(tiny_folder, tiny_images, tmp_path, pause=60)  # it holds its first part
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("stores/.*.0.lock")) and time.monotonic() < deadline:
        time.sleep(0.01)
    other = start(tiny_folder, tiny_images, tmp_path)
    while len(list(tmp_path.rglob("part-*.parquet"))) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert other.is_alive()  # it waits for the part that the first one holds
    slow.kill()
    other.join(30)
    slow.join()
    assert other.exitcode == 0 and content(tmp_path / "stores") == whole


@pytest.fixture
def store(tiny, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 20)
    return extract(tiny, load_images(tiny_images, "train"), store=tmp_path, **OPTIONS)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def relist(path, **changes):
    file = path.parents[1] / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"][1] |= changes
    file.write_text(json.dumps(manifest))


DAMAGE = {
    "a flipped byte": flip,
    "a truncated part": lambda path: os.truncate(path, path.stat().st_size // 2),
    "an empty part": lambda path: os.truncate(path, 0),
    "a deleted part": os.unlink,
    "another part in its place": lambda path: shutil.copy(path.with_name("part-00000-of-00003.parquet"), path),
    "a stale digest": lambda path: relist(path, sha256="0" * 64),
    "stale rows": lambda path: relist(path, rows=19),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_that_part_alone_made_again(damage, store, tiny, train, tmp_path, monkeypatch):
    before = content(tmp_path)
    DAMAGE[damage](store.part("train", 1))
    with pytest.raises(StoreError, match=r"part-00001-of-00003.parquet is missing or not as listed \(1 such\)"):
        FeatureStore.open(store.path)
    written, write = [], StoreWriter.write_part
    monkeypatch.setattr(StoreWriter, "write_part", lambda self, *a, **k: written.append(a[:2]) or write(self, *a, **k))
    extract(tiny, train, store=tmp_path, **OPTIONS)
    assert written == [("train", 1)] and content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": {"format": 1}, "splits": []}', "\0" * 100])
def test_a_garbage_manifest_is_begun_anew(text, store, tiny, train, tmp_path):
    before = content(tmp_path)
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="is not a manifest .*; delete .* and extract again"):
        FeatureStore.open(store.path)
    extract(tiny, train, store=tmp_path, **OPTIONS)
    assert content(tmp_path) == before


def test_a_manifest_of_another_store(store, tiny, train, tmp_path):
    before = content(tmp_path)
    other = extract(tiny, train, store=tmp_path / "other", pool="max", **OPTIONS)
    shutil.copy(other.path / "manifest.json", store.path)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(StoreError, match="is stale: its key is"):
        FeatureStore.open(store.path)
    extract(tiny, train, store=tmp_path, **OPTIONS)
    assert content(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """200 kB to write to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs could be mounted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk, tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 10)
    options = OPTIONS | {"pool": "grid:4"}
    expected = extract(tiny, train, store=tmp_path / "room", **options)
    with (small_disk / "ballast").open("wb") as file:
        file.write(bytes(100_000))
    with pytest.raises(OSError, match=r"No space left on device: .*part-0000\d-of-00006.parquet was not written"):
        extract(tiny, train, store=small_disk / "stores", **options)
    path = small_disk / "stores" / expected.path.name
    files = content(path)
    kept = [name for name in files if name.suffix == ".parquet"]
    assert kept and len(kept) < 6 and set(files) == {*kept, *[n for n in files if n.name == "manifest.json"]}
    assert all(files[name] == content(expected.path)[name] for name in kept)
    listed = json.loads((path / "manifest.json").read_text())["splits"]["train"]
    assert sum(part is not None for part in listed) == len(kept)
    (small_disk / "ballast").unlink()
    extract(tiny, train, store=small_disk / "stores", **options)
    assert content(small_disk / "stores") == content(tmp_path / "room")


@pytest.mark.parametrize(("rows", "batch"), [(1, 8), (5, 8), (8, 8), (19, 8), (20, 1), (21, 8), (41, 7)])
def test_any_number_of_images(rows, batch, tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 20)
    images = train.select(np.arange(60)[:: 60 // rows][:rows])
    store = extract(tiny, images, store=tmp_path, batch_size=batch, **OPTIONS)
    everything = extract(tiny, train, store=tmp_path, **OPTIONS).layer("ln_1", 2, "train")
    assert store.layer("ln_1", 2, "train").shape == (rows, 8)
    np.testing.assert_allclose(store.layer("ln_1", 2, "train"), everything[images.index], atol=1e-5)
    assert store.labels("train").tolist() == train.labels[images.index].tolist()


def test_labels_of_a_shuffled_set_stay_with_their_rows(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 7)
    order = np.random.default_rng(0).permutation(60)
    plain, shuffled = (extract(tiny, images, store=tmp_path, **OPTIONS) for images in (train, train.select(order)))
    assert shuffled.path != plain.path and shuffled.index("train").tolist() == order.tolist()
    assert shuffled.labels("train").tolist() == train.labels[order].tolist()
    np.testing.assert_allclose(shuffled.layer("ln_1", 3, "train"), plain.layer("ln_1", 3, "train")[order], atol=1e-5)
    table = shuffled.table("train", [3]).sort_values("index")
    assert table.label.tolist() == train.labels.tolist()
    np.testing.assert_allclose(np.stack(table["ln_1.3"]), plain.layer("ln_1", 3, "train"), atol=1e-5)


def test_a_store_written_by_the_document_alone(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # layer, row, D
    key = {
        "model": "their model", "weights": "v1", "palette": "p", "size": 4, "resample": "bilinear", "crop": "squash",
        "images": "set", "splits": {"test": ["their images", 3]}, "layers": {"ln_1": [0, 5]}, "pool": "mean",
        "alignment": "sos", "dtype": "float32", "format": 1,
    }  # fmt: skip
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":")).encode()
    folder = tmp_path / f"their-model-set-{hashlib.sha256(canonical).hexdigest()[:8]}"
    part = folder / "test" / "part-00000-of-00001.parquet"
    part.parent.mkdir(parents=True)
    columns = {"index": pa.array([2, 0, 1], pa.int64()), "label": pa.array([None] * 3, pa.int64())}
    for layer, rows in zip((0, 5), values, strict=True):
        columns[f"ln_1.{layer}"] = pa.array(rows.tolist(), pa.list_(pa.float32(), 4))
    pq.write_table(pa.table(columns), part)
    entry = {"rows": 3, "sha256": hashlib.sha256(part.read_bytes()).hexdigest(), "stats": {}}
    (folder / "manifest.json").write_text(json.dumps({"key": key, "versions": {}, "splits": {"test": [entry]}}))

    store = FeatureStore.open(folder)
    np.testing.assert_array_equal(store.layer("ln_1", -1, "test"), values[1])
    assert store.index("test").tolist() == [2, 0, 1] and store.labels("test") is None
    assert len(store.stats()) == len(store.skipped("test")) == 0 and "their-model-set" in repr(store)
    from igpt_lab.features.upkeep import list_stores, verify

    assert verify(folder) == [] and list_stores(tmp_path)["state"].tolist() == ["complete"]
