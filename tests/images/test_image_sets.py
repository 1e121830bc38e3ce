"""Image sets against independent readers, every kind of source, and sources that are damaged."""

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from igpt_lab.bundled import make_fashion
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.loading import load_images

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ROOT.parent / "shared" / "cifar10"
MINI = ROOT / "igpt_lab" / "bundled" / "fashion-mini"
debian = pytest.mark.skipif(not make_fashion.SOURCE.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
NAMES = ["cat", "dog", "eel"]
COUNTS = {"train": 4, "test": 2}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images.images()])


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[list[bytes], list[int]]]:
    """By split: PNG bytes of 5 x 5 colour images, and their labels, sorted by class."""
    generator = np.random.default_rng(0)
    return {
        split: (
            [png(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(3 * count)],
            np.repeat(range(3), count).tolist(),
        )
        for split, count in COUNTS.items()
    }


def hub_table(images, labels, image="image", label="label") -> datasets.Dataset:
    kinds = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    cells = [{"bytes": data, "path": None} for data in images]
    return datasets.Dataset.from_dict({image: cells, label: labels}, features=kinds)


def as_folders(root, rows):
    for split, (images, labels) in rows.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            (root / split / NAMES[label]).mkdir(parents=True, exist_ok=True)
            (root / split / NAMES[label] / f"{i:02d}.png").write_bytes(image)
    (root / "train" / ".DS_Store").write_bytes(b"")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


def as_parquet(root, rows):
    for split, (images, labels) in rows.items():
        hub_table(images, labels, "img").to_parquet(root / f"{split}.parquet")
    return root


def as_hub_shards(root, rows):
    (root / "plain_text").mkdir()
    for split, (images, labels) in rows.items():
        half = len(images) // 2
        for n, part in enumerate((slice(None, half), slice(half, None))):
            table = hub_table(images[part], labels[part])
            table.to_parquet(root / "plain_text" / f"{split}-{n:05d}-of-00002.parquet")
    return root


def as_converted(root, rows):
    for split, (images, labels) in rows.items():
        (root / "default" / split).mkdir(parents=True)
        hub_table(images, labels).to_parquet(root / "default" / split / "0000.parquet")
    return root


def as_plain(root, rows):
    """Parquet by pandas: no features; bytes and words."""
    for split, (images, labels) in rows.items():
        frame = pd.DataFrame({"id": range(len(images)), "image": images, "label": [NAMES[i] for i in labels]})
        frame.to_parquet(root / f"{split}.parquet")
    return root


def as_saved(root, rows):
    tables = {split: hub_table(images, labels) for split, (images, labels) in rows.items()}
    datasets.DatasetDict(tables).save_to_disk(root)
    return root


KINDS = [as_folders, as_parquet, as_hub_shards, as_converted, as_plain, as_saved]


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_the_same_images(write, rows, tmp_path):
    (tmp_path / "set").mkdir()
    root = write(tmp_path / "set", rows)
    for split, (images, labels) in rows.items():
        loaded = load_images(root, split)
        expected = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in images])
        np.testing.assert_array_equal(pixels_of(loaded), expected)
        np.testing.assert_array_equal(loaded.labels, labels)
        np.testing.assert_array_equal(loaded.index, np.arange(len(images)))
        assert loaded.labels.dtype == loaded.index.dtype == np.int64
        assert (loaded.name, loaded.split, loaded.label_names) == ("set", split, tuple(NAMES))
        plain = ImageSet("x", "y", np.arange(len(images)), np.array(labels), (), pa.chunked_array([images]), root)
        assert loaded.fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has test, train"):
        load_images(root, "validation")


def test_sources_without_splits(rows, tmp_path):
    images, labels = rows["test"]
    as_folders(tmp_path / "tree", rows)
    table = hub_table(images, labels)
    table.to_parquet(tmp_path / "garments.parquet")
    table.save_to_disk(tmp_path / "saved")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(images):
        (flat / f"{i}.png").write_bytes(image)
    sources = [tmp_path / "tree" / "test", tmp_path / "garments.parquet", tmp_path / "saved", flat]
    sets = [load_images(source, "test") for source in sources]
    for images in sets:
        np.testing.assert_array_equal(pixels_of(images), pixels_of(sets[0]))
    assert [images.name for images in sets] == ["tree", "garments", "saved", "flat"]
    assert len({images.fingerprint for images in sets[:3]}) == 1
    assert sets[3].labels is None and sets[3].fingerprint != sets[0].fingerprint
    with pytest.raises(ValueError, match="flat test has no labels.*folder of their own"):
        sets[3].require_labels()
    assert sets[0].require_labels() is sets[0].labels


@pytest.mark.parametrize("train, test", [("train", "test"), ("seg_train/seg_train", "seg_test/seg_test")])
def test_folders_of_splits_loaded_one_by_one_are_one_set(tmp_path, train, test):
    for folder in (train, test):
        (tmp_path / "photos" / folder / "cat").mkdir(parents=True)
        Image.new("L", (4, 4), len(folder)).save(tmp_path / "photos" / folder / "cat/0.png")
    sets = [load_images(tmp_path / "photos" / folder) for folder in (train, test)]
    assert [(images.name, images.split) for images in sets] == [("photos", "train"), ("photos", "test")]


def test_a_file_named_after_its_split_serves_no_other(rows, tmp_path):
    root = as_parquet(tmp_path, rows)
    assert load_images(root / "test.parquet").name == root.name
    with pytest.raises(ValueError, match="no split 'train'; it has test"):
        load_images(root / "test.parquet", "train")


def test_classes_are_numbered_over_all_splits(rows, tmp_path):
    root = as_folders(tmp_path, rows)
    shutil.rmtree(root / "test" / "cat")
    assert load_images(root, "test").label_names == tuple(NAMES)
    assert load_images(root, "test").labels.tolist() == [1, 1, 2, 2]


def test_the_fingerprint_by_hand(rows, tmp_path):
    """Each image behind its length in 8 bytes, then labels, then row numbers: the keys of stores depend on it."""
    images, labels = rows["test"]
    some = load_images(as_parquet(tmp_path, rows), "test").select([5, 0])
    content = b"".join(len(images[row]).to_bytes(8, "little") + images[row] for row in (5, 0))
    content += np.array([labels[5], labels[0]], "<i8").tobytes() + np.array([5, 0], "<i8").tobytes()
    assert some.fingerprint == hashlib.sha256(content).hexdigest()


def test_fingerprint_is_of_the_content(rows, tmp_path):
    root = as_folders(tmp_path / "a", rows)
    first = load_images(root, "train")
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    shutil.copytree(root, tmp_path / "b")
    assert load_images(root, "train").fingerprint == load_images(tmp_path / "b", "train").fingerprint
    prints = {first.fingerprint, load_images(root, "test").fingerprint, first.select([1, 0]).fingerprint}
    path = tmp_path / "b/train/cat/00.png"
    whole = path.read_bytes()
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    path.write_bytes(png(pixels))
    prints.add(load_images(tmp_path / "b", "train").fingerprint)  # one pixel differs
    path.write_bytes(whole)
    last = tmp_path / "b/train/cat/03.png"
    last.rename(tmp_path / "b/train/dog/03.png")
    prints.add(load_images(tmp_path / "b", "train").fingerprint)  # same bytes, same order, one label differs
    assert len(prints) == 5 and re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert first.fingerprint == first.select(np.arange(len(first))).fingerprint


def test_select_images_and_batches(rows, tmp_path):
    images = load_images(as_parquet(tmp_path, rows), "train")
    part = images.select([7, 2, 5]).select([0, 2])
    assert part.index.tolist() == [7, 5] and part.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(pixels_of(part), pixels_of(images)[[7, 5]])
    assert images.select(images.labels == 2).index.tolist() == [8, 9, 10, 11]
    assert len(images.select([])) == 0
    assert [len(batch) for batch in images.batches(5)] == [5, 5, 2]
    assert all(image.mode == "RGB" for image in images.images([0, 3])) and len(images.images([0, 3])) == 2
    assert repr(images).endswith("train: 12 images, 3 classes: cat, dog, eel>")
    with pytest.raises(ValueError):
        images.labels[0] = 1
    with pytest.raises(IndexError):
        images.select([12])


def test_limit_is_stratified_nested_and_seeded():
    sets = {n: load_images("fashion-mini", "test", limit=n) for n in (50, 205, 4000, 9999)}
    assert [len(images) for images in sets.values()] == [50, 205, 4000, 4000]
    assert (np.bincount(sets[50].labels) == 5).all() and set(np.bincount(sets[205].labels)) == {20, 21}
    assert set(sets[50].index) < set(sets[205].index) and (np.diff(sets[205].index) > 0).all()
    assert sets[50].fingerprint == load_images("fashion-mini", limit=50).fingerprint
    assert sets[50].fingerprint != load_images("fashion-mini", limit=50, seed=1).fingerprint
    with pytest.raises(ValueError, match="limit=0"):
        load_images("fashion-mini", limit=0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mini_by_pyarrow(split):
    table = pq.ParquetFile(MINI / f"{split}.parquet", pre_buffer=False).read(use_threads=False)
    images = load_images("fashion-mini", split)
    np.testing.assert_array_equal(images.labels, table["label"].to_numpy())
    assert (np.bincount(images.labels) == make_fashion.PER_CLASS[split]).all()
    assert images.label_names == make_fashion.NAMES and len(images.label_names) == 10
    first = np.asarray(Image.open(io.BytesIO(table["image"][0]["bytes"].as_py())))
    np.testing.assert_array_equal(np.asarray(images[0]), np.stack([first] * 3, axis=2))
    source = table["source_index"].to_numpy()
    assert len(set(source)) == len(source) and source.max() < {"train": 60_000, "test": 10_000}[split]


def test_fashion_mini_is_what_its_readme_says():
    text = (MINI / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"`([\w.-]+)` \|.*`([0-9a-f]{64})`", text))
    assert {name: listed.pop(name) for name in make_fashion.SHA256} == make_fashion.SHA256
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MINI.glob("*.parquet")}
    assert sum(path.stat().st_size for path in MINI.iterdir()) < 8e6
    assert "Copyright 2017 Zalando SE" in text and "Permission is hereby granted" in text


def test_fashion_mini_as_datasets_reads_it(tmp_path):
    theirs = datasets.load_dataset(
        "parquet", data_files=str(MINI / "test.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert isinstance(theirs.features["image"], datasets.Image) and theirs.features["label"].names[9] == "Ankle boot"
    ours = load_images("fashion-mini")
    for row in (0, 1717, 3999):
        np.testing.assert_array_equal(np.asarray(theirs[row]["image"].convert("RGB")), np.asarray(ours[row]))


@debian
def test_fashion_mini_against_the_official_files():
    def raw(name: str, header: int) -> bytes:
        return gzip.decompress((make_fashion.SOURCE / name).read_bytes())[header:]

    for split, prefix in (("train", "train"), ("test", "t10k")):
        official = np.frombuffer(raw(f"{prefix}-images-idx3-ubyte.gz", 16), np.uint8).reshape(-1, 28, 28)
        labels = np.frombuffer(raw(f"{prefix}-labels-idx1-ubyte.gz", 8), np.uint8)
        source = pq.read_table(MINI / f"{split}.parquet", columns=["source_index"], use_threads=False)[0].to_numpy()
        images = load_images("fashion-mini", split)
        np.testing.assert_array_equal(images.labels, labels[source])
        np.testing.assert_array_equal(pixels_of(images)[..., 0], official[source])


@debian
def test_fashion_mini_is_made_again_byte_for_byte(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_fashion", "--check"])
    differs, printed = make_fashion.main(), capsys.readouterr().out
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    if f"\npyarrow=={pa.__version__}\n" in lock:
        assert not differs, printed
    assert not differs or printed.count("the same images and labels in other bytes") == 2
    assert make_fashion.check(tmp_path / "x", b"") == "absent"


def test_make_fashion_refuses_other_sources(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_fashion", "--check", "--source", str(tmp_path)])
    assert make_fashion.main() == 1 and "dataset-fashion-mnist" in capsys.readouterr().err
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"other")
    assert make_fashion.main() == 1 and "the official file has b0564c" in capsys.readouterr().err


@pytest.mark.skipif(not CIFAR.is_dir(), reason="shared/cifar10 is not beside the checkout")
def test_cifar10_in_the_hubs_layout():
    images = load_images(CIFAR, "test", limit=40)
    assert (images.name, len(images), images.label_names[0]) == ("cifar10", 40, "airplane")
    table = pq.ParquetFile(CIFAR / "test.parquet", pre_buffer=False).read(use_threads=False)
    for position in (0, 39):
        cell = table["img"][int(images.index[position])].as_py()
        np.testing.assert_array_equal(np.asarray(images[position]), np.asarray(Image.open(io.BytesIO(cell["bytes"]))))
    assert (np.bincount(images.labels) == 4).all()


# Damaged and unknown sources.


def refused(message: str, name, split: str = "test") -> None:
    """Loading, and decoding all, ends in one clear line."""
    with pytest.raises(ValueError, match=message) as caught:
        load_images(name, split).images()
    assert "\n" not in str(caught.value)


def test_an_image_cut_short(rows, tmp_path):
    root = as_folders(tmp_path / "set", rows)
    path = root / "test/dog/03.png"
    path.write_bytes(path.read_bytes()[:70])
    refused(r"set test row 3 \(test/dog/03.png\) is not a readable image, is it cut short\?", root)
    path.write_bytes(b"")
    refused(r"row 3 \(test/dog/03.png\).*its format is unknown \(0 bytes\)", root)
    images = load_images(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"row 3 \(test/dog/03.png\) cannot be read: No such file"):
        images.fingerprint  # noqa: B018
    whole, labels = rows["test"]
    hub_table([*whole[:4], whole[4][:60], whole[5]], labels).to_parquet(tmp_path / "x.parquet")
    refused("x test row 4 is not a readable image", tmp_path / "x.parquet")
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.jpg").write_bytes(jpeg.getvalue()[:-40])
    refused(r"cut test row 0 \(a.jpg\).*truncated", tmp_path / "cut")


def test_damaged_parquet(rows, tmp_path):
    root = as_parquet(tmp_path, rows)
    path = root / "test.parquet"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PAR1" + bytes(99),
    ):
        path.write_bytes(damaged)
        refused(r"test\.parquet cannot be read as Parquet, is it cut short\?", root)
    path.write_bytes(whole)
    pq.write_table(pq.read_table(path)[:0], path)
    refused("test has no images", root)


def test_missing_and_mixed_parquet_files(rows, tmp_path):
    root = as_hub_shards(tmp_path, rows)
    (root / "plain_text/test-00001-of-00002.parquet").unlink()
    refused("test has 1 files where their names say 2: test-00000-of-00002.parquet", root)
    hub_table(*rows["test"]).to_parquet(root / "plain_text/test.parquet")
    hub_table(*rows["test"]).to_parquet(root / "plain_text/test-00001-of-00002.parquet")
    refused("test has 3 files where their names say 2", root)
    (root / "other").mkdir()
    hub_table(*rows["train"]).to_parquet(root / "other/train.parquet")
    refused("'train' in several folders: other, plain_text", root, "train")


def test_damaged_saved_folders(rows, tmp_path):
    root = as_saved(tmp_path / "set", rows)
    arrow = next((root / "test").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    refused("set cannot be read as a folder saved by `datasets`", root)
    (root / "dataset_dict.json").write_text("{")
    refused("set cannot be read as a folder saved by `datasets`", root)


def test_columns_are_found_or_listed(rows, tmp_path):
    images, labels = rows["test"]

    def write(**columns) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    assert load_images(write(image=images, coarse=labels)).labels is None
    assert load_images(write(image=images, coarse=labels, fine_label=labels)).labels.tolist() == labels
    assert load_images(write(image=images, label=[-1] * 6)).labels is None
    refused("no column with the image; name one 'image'. Its columns are text, label", write(text=["a"], label=[1]))
    cells = [{"bytes": data, "path": None} for data in images]
    refused("several columns that may hold the image.*Its columns are a, b", write(a=cells, b=cells))
    refused(
        "x.parquet test row 5 has no label among its 3 classes: None", write(image=images, label=[*labels[:5], None])
    )
    refused("'label' is double; expected integers or words", write(image=images, label=[0.5] * 6))
    refused("x test row 2 is not a readable image", write(image=[*images[:2], b"junk"]))


def test_folders_without_images(rows, tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    refused("empty has no images; expected Parquet files, or folders", tmp_path / "empty")
    root = as_folders(tmp_path / "set", rows)
    (root / "test/stray.png").write_bytes(rows["test"][0][0])
    refused("stray.png lies beside the class folders", root)
    (tmp_path / "x.csv").write_text("a")
    refused("x.csv is no Parquet file", tmp_path / "x.csv")


def test_a_misspelt_name_gets_the_closest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("no image set 'fashon-mini'; expected a bundled name .*; did you mean 'fashion-mini'", "fashon-mini")
    (tmp_path / "flowers").mkdir()
    refused(f"did you mean '{tmp_path}/flowers'", tmp_path / "flovers")
    refused(r"no image set 'zzz'; expected a bundled name \(fashion-mini\), a folder", "zzz")


def test_offline_a_hub_name_fails_soon():
    code = "import igpt_lab as lab\ntry: lab.load_images('nobody/nothing')\nexcept ValueError as error: print(error)"
    begun = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert time.perf_counter() - begun < 15
    assert done.stdout.startswith("there is no image set 'nobody/nothing': it is neither bundled (fashion-mini) nor")
    assert "without a network, copy its Parquet files" in done.stdout and done.stdout.count("\n") == 1


class Hub:
    """Stands in for the Hub: a folder as repository; keeps what was asked."""

    def __init__(self, root: Path, monkeypatch, online: bool = True):
        self.root, self.online, self.asked = root, online, []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def dataset_info(self, name, revision, timeout):
        if not self.online:
            raise ConnectionError("no route to host")
        files = [path.relative_to(self.root / revision).as_posix() for path in (self.root / revision).rglob("*.*")]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(self, name, *, repo_type, revision, allow_patterns=None, local_files_only=False):
        self.asked.append((revision, allow_patterns, local_files_only))
        if local_files_only and not (self.root / revision).is_dir():
            raise FileNotFoundError("not in the cache")
        return str(self.root / revision)


def test_hub_names(rows, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    (tmp_path / "main").mkdir()
    as_hub_shards(tmp_path / "main", rows)
    images = load_images("owner/name", "test")
    assert images.name == "name" and images.labels.tolist() == rows["test"][1]
    files = [f"plain_text/test-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert hub.asked == [("main", files, False)]  # the other split is not downloaded
    refused("owner/name has no split 'validation'; it has test, train", "owner/name", "validation")
    hub.online = False
    assert load_images("owner/name", "test").fingerprint == images.fingerprint
    assert hub.asked[-1] == ("main", None, True)


def test_words_of_a_hub_name_are_numbered_over_all_its_splits(rows, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    (tmp_path / "main").mkdir()
    images, labels = rows["test"]
    as_plain(tmp_path / "main", {"train": rows["train"], "test": (images[2:], labels[2:])})  # test has no cat
    assert load_images("owner/name", "test").labels.tolist() == [1, 1, 2, 2]
    assert hub.asked[0] == ("main", ["test.parquet"], False)
    assert sorted(hub.asked[1][1]) == ["test.parquet", "train.parquet"]


def test_hub_names_without_parquet(rows, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    as_folders(tmp_path / "main", rows)
    as_converted(tmp_path / "refs/convert/parquet", rows)
    assert load_images("owner/name", "train").labels.tolist() == rows["train"][1]
    assert hub.asked == [("refs/convert/parquet", ["default/train/0000.parquet"], False)]
    shutil.rmtree(tmp_path / "refs")
    refused("no image set 'owner/name'.*LookupError: it has no Parquet files", "owner/name")


def test_a_configuration_of_several(rows, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    for config, other in (("full", "train"), ("small", "test")):
        (tmp_path / "main" / config).mkdir(parents=True)
        hub_table(*rows[other]).to_parquet(tmp_path / "main" / config / "test-00000-of-00001.parquet")
    refused("'test' in several folders: full, small; give one as config=, or its path", "owner/name")
    for name in ("owner/name", tmp_path / "main"):
        for config, other in (("full", "train"), ("small", "test")):
            images = load_images(name, "test", config=config)
            assert images.labels.tolist() == rows[other][1] and images.source["config"] == config
        with pytest.raises(ValueError, match=r"has no configuration 'tiny'; it has full, small"):
            load_images(name, "test", config="tiny")
    assert hub.asked[-1] == ("main", ["small/test-00000-of-00001.parquet"], False)
    as_converted(tmp_path / "refs/convert/parquet", rows)
    assert load_images("owner/name", "test", config="default").labels.tolist() == rows["test"][1]
    for name in ("fashion-mini", as_saved(tmp_path / "saved", rows)):
        with pytest.raises(
            ValueError, match="has no configuration 'x'|has none: sets of the Hub and folders of Parquet"
        ):
            load_images(name, "test", config="x")
