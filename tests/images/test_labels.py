"""One class has one number in all splits of a source, whatever writes the labels down."""

import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_lab.images.columns import Labels, class_names
from igpt_lab.images.loading import load_images, load_tokens

WORDS = {"train": ["eel", "cat", "dog", "cat"], "test": ["eel", "dog"]}  # test has no cat
PNG = b"not decoded here"


def write(root, split, labels, **columns):
    pq.write_table(pa.table({"image": [PNG] * len(labels), "label": labels, **columns}), root / f"{split}.parquet")


def named(images) -> list[str]:
    return [images.label_names[label] for label in images.labels]


def as_strings(root, kind=None):
    for split, words in WORDS.items():
        write(root, split, pa.array(words, kind))


def as_large_strings(root):
    as_strings(root, pa.large_string())


def as_string_views(root):
    as_strings(root, pa.string_view())


def as_categories(root):
    for split, words in WORDS.items():
        frame = pd.DataFrame({"image": [PNG] * len(words), "label": pd.Categorical(words)})
        frame.to_parquet(root / f"{split}.parquet")


def with_class_label(root, split, names):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    cells = [{"bytes": PNG, "path": None}] * len(WORDS[split])
    columns = {"image": cells, "label": WORDS[split]}
    return datasets.Dataset.from_dict(columns, features=features)


def as_class_labels(root):
    for split, words in WORDS.items():
        with_class_label(root, split, sorted(set(words))).to_parquet(root / f"{split}.parquet")


def as_saved(root):
    tables = {split: with_class_label(root, split, sorted(set(WORDS[split]))) for split in WORDS}
    datasets.DatasetDict(tables).save_to_disk(root)


def as_both(root):
    with_class_label(root, "train", ["cat", "dog", "eel"]).to_parquet(root / "train.parquet")
    write(root, "test", WORDS["test"])


KINDS = [as_strings, as_large_strings, as_string_views, as_categories, as_class_labels, as_saved, as_both]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_a_split_lacks_shifts_no_other(kind, tmp_path):
    kind(tmp_path)
    for split, words in WORDS.items():
        images = load_images(tmp_path, split)
        assert images.label_names == ("cat", "dog", "eel") and named(images) == words


@pytest.mark.parametrize("second", ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"])
@pytest.mark.parametrize("others", [{}, {"train": ["dog"]}])
def test_a_name_of_two_classes_is_refused(second, others, tmp_path):
    names = ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "dog", second]
    note = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})
    table = pa.table({"image": [PNG] * 3, "label": [0, 1, 2]}).replace_schema_metadata({"huggingface": note})
    pq.write_table(table, tmp_path / "test.parquet")
    for split, words in others.items():
        write(tmp_path, split, words)
    for split in ("test", *others):
        with pytest.raises(ValueError, match=r" test: column 'label' names its classes 0 and 2 both 'caf.'; give each"):
            load_images(tmp_path, split)


def test_class_labels_in_another_order_are_matched_by_name(tmp_path):
    with_class_label(tmp_path, "train", ["eel", "cat", "dog"]).to_parquet(tmp_path / "train.parquet")
    with_class_label(tmp_path, "test", ["cat", "dog", "eel"]).to_parquet(tmp_path / "test.parquet")
    assert load_images(tmp_path, "train").labels.tolist() == [0, 1, 2, 1]
    assert load_images(tmp_path, "test").labels.tolist() == [0, 2]
    assert load_images(tmp_path / "test.parquet", "test").labels.tolist() == [0, 2]


def test_a_class_that_only_test_has_gets_the_last_number(tmp_path):
    with_class_label(tmp_path, "train", ["eel", "cat", "dog"]).to_parquet(tmp_path / "train.parquet")
    write(tmp_path, "test", ["ant", "dog"])
    assert load_images(tmp_path, "test").label_names == ("eel", "cat", "dog", "ant")
    assert load_images(tmp_path, "test").labels.tolist() == [3, 2]


@pytest.mark.parametrize(
    "train, test, names, numbers",
    [
        ([0, 1, 2], [2, 0], "012", [2, 0]),
        ([7, 9], [9, 7], "79", [1, 0]),
        ([9, 10, 2], [10], ("2", "9", "10"), [2]),
        ([0, 10**8], [10**8], ("0", "100000000"), [1]),
        ([0, 2], [1], "012", [1]),
        ([0.0, 1.0], [1.0, 0.0], "01", [1, 0]),
        ([False, True], [True, True], ("False", "True"), [1, 1]),
        (pa.array([0, 1], pa.uint8()), pa.array([1], pa.int16()), "01", [1]),
        (pa.array([5, 6]).dictionary_encode(), [6], "56", [1]),
        ([0, 1], [-1, -1], "01", None),
        ([0, 1], [None, None], "01", None),
    ],
)
def test_labels_that_are_no_words(train, test, names, numbers, tmp_path):
    write(tmp_path, "train", train)
    write(tmp_path, "test", test)
    images = load_images(tmp_path, "test")
    assert images.label_names == tuple(names)
    assert (images.labels is None) if numbers is None else (images.labels.tolist() == numbers)


@pytest.mark.parametrize("wrong", [[0.5], [1e300], [[1]], [b"cat"], pa.array([2**63], pa.uint64())])
def test_labels_that_are_refused(wrong, tmp_path):
    write(tmp_path, "test", wrong)
    with pytest.raises(ValueError, match="test: column 'label' is .*; expected integers or words as labels"):
        load_images(tmp_path, "test")


def test_words_of_a_damaged_split_are_asked_for_and_class_labels_are_not(tmp_path):
    as_strings(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as Parquet"):
        load_images(tmp_path, "test")
    with_class_label(tmp_path, "test", ["dog", "eel"]).to_parquet(tmp_path / "test.parquet")
    assert named(load_images(tmp_path, "test")) == WORDS["test"]


def test_tables_beside_that_are_no_images_are_passed_over(tmp_path):
    as_strings(tmp_path)
    pq.write_table(pa.table({"text": ["a"], "label": ["zebra"]}), tmp_path / "captions.parquet")
    assert load_images(tmp_path, "test").label_names == ("cat", "dog", "eel")


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    write(tmp_path, "train", ["caf\u00e9", "bar"])
    write(tmp_path, "test", ["cafe\u0301"])
    assert load_images(tmp_path, "test").labels.tolist() == [1]


def test_names_that_differ_in_capitals_between_splits_are_refused(tmp_path):
    write(tmp_path, "train", ["cat", "dog"])
    write(tmp_path, "test", ["Cat", "dog"])
    with pytest.raises(ValueError, match="its splits have the classes 'Cat' and 'cat'; use the same names"):
        load_images(tmp_path, "test")
    write(tmp_path, "train", ["a", "A"])
    write(tmp_path, "test", ["a", "a"])
    assert load_images(tmp_path, "test").label_names == ("A", "a")


def test_which_of_two_label_columns_was_taken_is_said(tmp_path, capsys):
    write(tmp_path, "test", [0, 1], fine_label=[1, 0], coarse_label=[5, 6])
    assert load_images(tmp_path).labels.tolist() == [0, 1] and capsys.readouterr().err == ""
    table = pq.read_table(tmp_path / "test.parquet", use_threads=False).drop_columns("label")
    pq.write_table(table, tmp_path / "test.parquet")
    images = load_images(tmp_path)
    note = "labels are those of the column fine_label; coarse_label may be meant"
    advice = "label='coarse_label' takes it"
    assert images.labels.tolist() == [1, 0] and capsys.readouterr().err == f"{tmp_path}: {note}: {advice}\n"
    assert note in images._repr_html_()


def test_a_file_within_a_folder_named_after_its_split(tmp_path):
    (tmp_path / "test").mkdir()
    write(tmp_path, "test/0000", WORDS["test"])
    assert named(load_images(tmp_path / "test/0000.parquet")) == WORDS["test"]


def test_token_sets_number_over_all_splits(tmp_path):
    for short, classes in (("tr", [7, 9, 12]), ("te", [12, 9])):
        np.save(tmp_path / f"set_{short}X.npy", np.zeros((len(classes), 4), int))
        np.save(tmp_path / f"set_{short}Y.npy", np.array(classes))
    tokens = load_tokens(tmp_path, "test")
    assert tokens.label_names == ("7", "9", "12") and tokens.labels.tolist() == [2, 1]


SPLITS = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, database=None)
@given(SPLITS, st.lists(st.booleans(), min_size=3, max_size=3))
def test_numbers_lead_back_to_the_names(splits, noted):
    read = []
    for words, is_noted in zip(splits, noted, strict=False):
        classes = tuple(dict.fromkeys(words)) if is_noted else tuple(sorted(set(words)))
        read.append(Labels(np.array([classes.index(word) for word in words]), classes, is_noted))
    names = class_names(read, "set")
    assert len(set(names)) == len(names) and set(names) == {word for words in splits for word in words}
    for words, labels in zip(splits, read, strict=True):
        assert [names[number] for number in labels.numbered(names)] == words


@pytest.mark.parametrize("note", ["[" * 10_000, '{"info":' * 10_000])
def test_a_note_of_lists_in_lists_says_nothing(note, tmp_path):
    images = pa.array([{"bytes": b"x", "path": None}])
    table = pa.table({"image": images, "label": [7]}).replace_schema_metadata({"huggingface": note})
    pq.write_table(table, tmp_path / "test.parquet")
    assert load_images(tmp_path, "test").label_names == ("7",)


def test_a_path_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    ends = pa.array([0, 2], pa.int32()).buffers()[1]
    path = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xff\xfe")])
    image = pa.StructArray.from_arrays([pa.array([None], pa.binary()), path], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "test.parquet")
    images = load_images(tmp_path, "test")
    with pytest.raises(ValueError, match="test row 0 has a path that is not UTF-8"):
        images[0]


def with_two_columns(root, split, rows):
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(3)}
    kinds["coarse_label"] = datasets.ClassLabel(names=["fish", "people"])
    columns = {"img": [{"bytes": PNG, "path": None}] * len(rows), "fine_label": rows}
    columns["coarse_label"] = [row % 2 for row in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


@pytest.mark.parametrize("kind", ["parquet", "saved", "metadata"])
def test_a_column_of_labels_that_is_asked_for(kind, tmp_path, capsys):
    splits = {"train": [2, 1, 0], "test": [1, 2]}
    tables = {split: with_two_columns(tmp_path, split, rows) for split, rows in splits.items()}
    if kind == "saved":
        datasets.DatasetDict(tables).save_to_disk(tmp_path)
    for split, table in tables.items():
        if kind == "parquet":
            table.to_parquet(tmp_path / f"{split}.parquet")
        if kind == "metadata":
            (tmp_path / split).mkdir()
            frame = pd.DataFrame({"file_name": [f"{n}.png" for n in range(len(table))]})
            for row in frame.file_name:
                (tmp_path / split / row).write_bytes(PNG)
            frame["coarse_label"] = [("fish", "people")[label] for label in table["coarse_label"]]
            frame.to_csv(tmp_path / split / "metadata.csv", index=False)
    capsys.readouterr()
    for split, rows in splits.items():
        images = load_images(tmp_path, split, label="coarse_label")
        assert named(images) == [("fish", "people")[row % 2] for row in rows]
        assert images.source["label"] == "coarse_label"
    assert capsys.readouterr().err == ""
    assert "labels are those of" in images._repr_html_() and "column coarse_label" in images._repr_html_()
    with pytest.raises(ValueError, match="has no column 'course_label' for the labels; did you mean 'coarse_label'?"):
        load_images(tmp_path, "test", label="course_label")


def test_folders_of_classes_have_no_column(tiny_images):
    with pytest.raises(ValueError, match="has no column 'breed': of images in folders it is one of metadata.csv"):
        load_images(tiny_images, "test", label="breed")
