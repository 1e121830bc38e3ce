"""Folders of images: splits and classes by hand and as `datasets` reads them, labels beside, what is left out."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_lab.images.folders import split_of
from igpt_lab.images.loading import load_images


def fill(root, *paths):
    """An image at each path, none like another."""
    for shade, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), shade).save(root / path, "PNG" if "." not in (root / path).name[1:] else None)
    return root


def rows(images) -> list[tuple[int, str | None]]:
    """Shade and class of each image."""
    names = [None] * len(images) if images.labels is None else [images.label_names[label] for label in images.labels]
    return [(image.getpixel((0, 0))[0], name) for image, name in zip(images.images(), names, strict=True)]


PAIRS = [
    ("Train", "Test"), ("training", "testing"), ("seg_train", "seg_test"), ("train_set", "test_set"), ("TRAIN", "eval"),
    ("1-train", "2-test"), ("train images", "test.images"), ("train", "Evaluation"),
]  # fmt: skip


@pytest.mark.parametrize("train, test", PAIRS)
def test_words_for_splits(train, test, tmp_path):
    fill(tmp_path, f"{train}/cat/0.png", f"{train}/dog/1.png", f"{test}/dog/2.png")
    assert rows(load_images(tmp_path, "train")) == [(0, "cat"), (1, "dog")]
    assert rows(load_images(tmp_path, "test")) == rows(load_images(tmp_path, test)) == [(2, "dog")]
    assert load_images(tmp_path, "test").label_names == ("cat", "dog")
    with pytest.raises(ValueError, match=f"no split 'validation'; it has {', '.join(sorted([train, test]))}"):
        load_images(tmp_path, "validation")


@pytest.mark.parametrize(
    "folder", ["train", "training", "my_train", "valid", "dev-2", "eval", "trains", "strain", "bus"]
)
def test_a_word_for_a_split_is_one_for_datasets_too(folder, tmp_path):
    fill(tmp_path, f"{folder}/cat/0.png", f"{folder}/dog/1.png")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "cache"))
    expected = split_of(folder) or "train"  # their name for what has no splits
    assert list(theirs) == [expected]


def test_the_split_is_named_by_its_folder(tmp_path):
    fill(tmp_path, "seg_train/cat/0.png", "Validation/cat/1.png", "test/cat/2.png")
    assert [load_images(tmp_path / name).split for name in ("seg_train", "Validation", "test")] == [
        "train", "validation", "test",
    ]  # fmt: skip
    assert load_images(tmp_path).split == "test" and load_images(tmp_path / "test", "train").split == "train"


def test_a_folder_within_one_of_its_own_name(tmp_path):
    fill(tmp_path, "seg_train/seg_train/cat/0.png", "seg_train/seg_train/dog/1.png", "seg_test/seg_test/dog/2.png")
    assert rows(load_images(tmp_path, "train")) == [(0, "cat"), (1, "dog")]
    assert load_images(tmp_path, "test").labels.tolist() == [1]


def test_a_class_named_like_a_split(tmp_path, capsys):
    fill(tmp_path, "bus/0.png", "car/1.png", "train/2.png")
    assert rows(load_images(tmp_path)) == [(0, "bus"), (1, "car"), (2, "train")]
    assert "the folder train is taken for a class, as it lies among bus, car" in capsys.readouterr().err


@pytest.mark.parametrize(
    "paths",
    [
        ("bus/0.png", "train/cat/1.png"),
        ("bus/red/0.png", "train/steam/1.png"),
        ("extra/0.png", "train/1.png", "test/2.png"),
        ("extra/0.png", "train/cat/1.png", "test/2.png"),
    ],
)
def test_splits_or_classes_is_asked(paths, tmp_path):
    fill(tmp_path, *paths)
    with pytest.raises(ValueError, match="which may be splits, beside (bus|extra), which are none; move or rename"):
        load_images(tmp_path, "train")


@pytest.mark.parametrize(
    "paths",
    [
        ["trainset/cat/0.png", "testset/cat/1.png"], ["trainA/0.png", "testA/1.png"], ["trainx/0.png", "valx/1.png"],
        ["data/train/cat/0.png", "data/test/cat/1.png"], ["images/train/0.png", "images/val/1.png"],
        ["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"],
    ],
)  # fmt: skip
def test_splits_are_not_read_as_classes(paths, tmp_path):
    with pytest.raises(ValueError, match="may be splits or classes|has the splits .* below"):
        load_images(fill(tmp_path, *paths), "test")


@pytest.mark.parametrize("paths", [["trainer/0.png", "bus/1.png"], ["trains/0.png"], ["cat/test/0.png", "cat/1.png"]])
def test_classes_are_not_read_as_splits(paths, tmp_path):
    images = load_images(fill(tmp_path, *paths), "test")
    assert set(images.label_names) == {path.split("/")[0] for path in paths}


def test_folders_beside_the_splits_are_told(tmp_path, capsys):
    fill(tmp_path, "seg_pred/0.png", "seg_train/cat/1.png", "seg_test/cat/2.png", "cover.png")
    images = load_images(tmp_path, "test")
    assert rows(images) == [(2, "cat")]
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path}: left out: the folders seg_pred beside the splits") and line.count("\n") == 1
    assert "1 x image beside the splits" in line and "the folders seg_pred" in images._repr_html_()


def test_two_folders_for_one_split(tmp_path, capsys):
    fill(tmp_path, "val/cat/0.png", "validation/cat/1.png", "train/cat/2.png")
    assert (
        rows(load_images(tmp_path, "val")) == [(0, "cat")] and "also named after validation" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="several folders for the split 'dev': val, validation; give the name of one"):
        load_images(tmp_path, "dev")


def test_one_class_in_two_unicode_forms(tmp_path):
    fill(tmp_path, "train/bar/0.png", "train/caf\u00e9/1.png", "test/cafe\u0301/2.png")
    assert (
        load_images(tmp_path, "train").label_names == load_images(tmp_path, "test").label_names == ("bar", "caf\u00e9")
    )
    assert load_images(tmp_path, "test").labels.tolist() == [1]


def test_classes_that_differ_in_capitals(tmp_path):
    fill(tmp_path, "train/cat/0.png", "test/Cat/1.png")
    with pytest.raises(ValueError, match="its splits have the classes 'Cat' and 'cat'; use the same names"):
        load_images(tmp_path, "test")


def test_what_is_left_out_is_told_once(tmp_path, capsys):
    fill(tmp_path, "cat/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/1.png", "dog/@eaDir/1.png")
    fill(tmp_path, "__MACOSX/cat/._0.png", "cat/._0.png", "noext/IMG_1", ".cache/x.png")
    for name in ("cat/a.heic", "cat/b.HEIC", "cat/.DS_Store", "dog/Thumbs.db", "dog/x.eps"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dog/more").symlink_to(tmp_path / "cat")
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "dog/pipe.png")
    images = load_images(tmp_path)
    assert rows(images) == [(0, "cat"), (2, "dog")]
    told = (
        "left out: 1 x .eps file, 2 x .heic file, 1 x file without a suffix, 5 x hidden, "
        "2 x link to nothing, or no file, 1 x linked folder"
    )
    load_images(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: {told}\n"
    assert told in images._repr_html_()


def test_a_folder_around_the_classes_is_told(tmp_path, capsys):
    fill(tmp_path, "set/images/cat/0.png", "set/images/dog/1.png", "deep/cat/a/0.png", "deep/dog/a/1.png")
    assert {label for _, label in rows(load_images(tmp_path / "set"))} == {"images"}
    told = f"{tmp_path / 'set/images'} is the only class; give it as the images if cat, dog in it are what counts"
    assert told in capsys.readouterr().err
    assert {label for _, label in rows(load_images(tmp_path / "set/images"))} == {"cat", "dog"}
    load_images(tmp_path / "deep")
    assert capsys.readouterr().err == ""


def test_links_to_folders(tmp_path, capsys):
    fill(tmp_path / "far", "cat/0.png")
    fill(tmp_path / "set", "dog/a/0.png")
    (tmp_path / "set/cat").symlink_to(tmp_path / "far/cat")
    (tmp_path / "set/dog/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/dog/a/deep").symlink_to(tmp_path / "far/cat")
    assert rows(load_images(tmp_path / "set")) == [(0, "cat"), (0, "dog")]
    assert "left out: 2 x linked folder\n" in capsys.readouterr().err


def test_what_is_expected_beside_images_is_not_worth_a_line(tmp_path, capsys):
    fill(tmp_path, "train/cat/0.png", "train/dog/1.png")
    usual = ("Thumbs.db", "desktop.ini", ".DS_Store")
    for name in ("README.txt", "LICENSE", "train/readme.md", *usual, *(f"train/cat/{name}" for name in usual)):
        (tmp_path / name).write_bytes(b"x")
    assert rows(load_images(tmp_path, "train")) == [(0, "cat"), (1, "dog")] and capsys.readouterr().err == ""
    (tmp_path / "train/dog/LICENSE").write_bytes(b"x")  # in a class it may be an image that lost its suffix
    load_images(tmp_path, "train")
    assert "left out: 1 x file without a suffix\n" in capsys.readouterr().err


def test_labels_that_overrule_class_folders_are_told(tmp_path, capsys):
    fill(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/0.png,eel\ndog/1.png,ox\n")
    load_images(tmp_path)
    assert "labels are those of metadata.csv, column label\n" in capsys.readouterr().err


def test_suffixes(tmp_path):
    suffixes = ["jfif", "jpe", "avif", "tga", "jp2", "j2k", "dib", "apng", "pnm", "ico", "PNG", "webp"]
    known = {suffix[1:] for suffix in Image.registered_extensions()}
    names = [f"cat/{i}.{suffix}" for i, suffix in enumerate(suffixes) if suffix.lower() in known]
    (tmp_path / "cat").mkdir()
    for name in names:
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    assert len(load_images(tmp_path)) == len(names) >= 11


METADATA = {
    "metadata.csv": "file_name,label,caption\n{}0.png,eel,a\n{}1.png,cat,b\n",
    "metadata.jsonl": '{{"file_name": "{}0.png", "label": "eel"}}\n{{"file_name": "{}1.png", "label": "cat"}}\n',
}


@pytest.mark.parametrize("place", ["train", "."])
@pytest.mark.parametrize("file", METADATA)
def test_labels_beside_the_images(file, place, tmp_path, capsys):
    fill(tmp_path, "train/0.png", "train/1.png")
    inner = "" if place == "train" else "train/"
    (tmp_path / place / file).write_text(METADATA[file].format(inner, inner))
    images = load_images(tmp_path, "train")
    assert rows(images) == [(0, "eel"), (1, "cat")] and images.label_names == ("cat", "eel")
    assert capsys.readouterr().err == "" and f"labels are those of {file}, column label" in images._repr_html_()
    if place == "train":
        theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / ".cache"))
        assert sorted(theirs["train"]["label"]) == ["cat", "eel"]


def test_metadata_of_two_splits(tmp_path):
    fill(tmp_path, "train/0.png", "train/1.png", "test/b/2.png")
    (tmp_path / "train/metadata.csv").write_text("file_name,label\n0.png,9\n1.png,10\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,label\nb/2.png,10\n")
    assert load_images(tmp_path, "test").label_names == ("9", "10")
    assert load_images(tmp_path, "test").labels.tolist() == [1]


@pytest.mark.parametrize(
    "labels, names",
    [
        (("01", "1"), ("01", "1")),
        (("007", "7"), ("007", "7")),
        (("10", "9"), ("9", "10")),
        (("2.0", "1.0"), ("1", "2")),
        (("true", "false"), ("false", "true")),
        (("2020-01-02", "2020-01-01"), ("2020-01-01", "2020-01-02")),
    ],
)
def test_labels_that_are_written_in_two_ways_are_two_classes(labels, names, tmp_path):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,{}\n1.png,{}\n".format(*labels))
    images = load_images(tmp_path)
    assert images.label_names == names
    assert images.labels.tolist() == ([0, 1] if labels == names else [1, 0])


def test_a_leading_0_is_of_the_name_in_all_splits(tmp_path):
    fill(tmp_path, "train/0.png", "train/1.png", "test/0.png", "test/1.png")
    for split, labels in {"train": ("01", "02"), "test": ("1", "02")}.items():
        (tmp_path / split / "metadata.csv").write_text("file_name,label\n0.png,{}\n1.png,{}\n".format(*labels))
    assert rows(load_images(tmp_path, "test")) == [(2, "1"), (3, "02")]
    assert load_images(tmp_path, "train").label_names == ("01", "02", "1")


def test_metadata_without_labels_leaves_those_of_the_folders(tmp_path, capsys):
    fill(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\ncat/0.png,a\n")
    assert rows(load_images(tmp_path)) == [(0, "cat"), (1, "dog")]
    assert "metadata.csv has no label column; name it 'label'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("file_name,label\n0.png,a\n", "metadata.csv has no row for 1.png; expected one for each image"),
        ("file_name,label\n0.png,a\n./0.png,b\n1.png,b\n", "names a file twice"),
        ("name,label\n0.png,a\n", "metadata.csv has no column file_name, or two; its columns are name, label"),
        ("file_name,label\n0.png\n", "metadata.csv cannot be read: "),
        ("", "metadata.csv cannot be read: "),
        ("file_name,label,label\n0.png,1,2\n1.png,1,2\n", "has the column 'label' twice"),
        ("file_name,label\n0.png,0.5\n1.png,1\n", "is double; expected integers or words"),
        ("file_name,label\n0.png,a\n1.png,\n", "row 1 has no label among its 1 classes: None"),
    ],
)
def test_metadata_that_is_refused(text, words, tmp_path):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_images(tmp_path)
    assert "\n" not in str(caught.value)


def test_metadata_names_no_file_outside(tmp_path, capsys):
    fill(tmp_path, "secret.png", "set/0.png")
    rows_of = [{"file_name": name, "label": "a"} for name in ("0.png", "../secret.png", str(tmp_path / "secret.png"))]
    (tmp_path / "set/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    images = load_images(tmp_path / "set")
    assert len(images) == 1 and np.array_equal(images.index, [0])
    assert "left out: 2 x row of metadata.jsonl whose image is not there" in capsys.readouterr().err


CELLS = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.floats(), st.lists(st.integers(), max_size=2))
TEXTS = st.one_of(
    st.binary(max_size=60),
    st.lists(st.tuples(CELLS, CELLS), max_size=3).map(
        lambda cells: "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in cells).encode()
    ),
    st.lists(CELLS, min_size=1, max_size=3).map(
        lambda cells: f"file_name,label\n0.png,{','.join(map(str, cells))}\n".encode("utf-8", "replace")
    ),
)


@settings(max_examples=60, deadline=None, database=None)
@given(text=TEXTS, name=st.sampled_from(["metadata.csv", "metadata.jsonl"]))
@example(b"\x80\r", "metadata.csv")
def test_any_metadata_is_read_or_refused_in_one_line(text, name):
    with tempfile.TemporaryDirectory() as folder:
        (fill(Path(folder), "0.png") / name).write_bytes(text)
        try:
            assert len(load_images(folder)) == 1
        except ValueError as error:
            assert folder in str(error) and len(str(error).splitlines()) == 1


def test_lists_in_lists_do_not_end_the_process(tmp_path):
    (fill(tmp_path, "0.png") / "metadata.jsonl").write_text('{"file_name": "0.png", "label": ' + "[" * 100_000)
    code = f"from igpt_lab.images.loading import load_images; load_images({str(tmp_path)!r}, 'test')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and f"{tmp_path / 'metadata.jsonl'} cannot be read: max" in done.stderr


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    try:
        fill(folder, "0.png")
    except OSError:
        pytest.skip("this disk has no such names")
    with pytest.raises(ValueError, match=r"a\\udcff/0.png has a name that is not UTF-8; rename it"):
        load_images(tmp_path, "test")


def test_a_folder_of_nothing_to_read_says_what_is_there(tmp_path):
    fill(tmp_path, "cat/IMG_1", "cat/IMG_2")
    with pytest.raises(ValueError, match="has no images; expected Parquet.*left out: 2 x file without a suffix"):
        load_images(tmp_path)
