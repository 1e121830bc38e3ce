"""Folders of images: which of them are splits and which classes, labels beside the images, and what is left out.

The words for splits and the files with labels, metadata.csv and metadata.jsonl, are those of `datasets`' imagefolder.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from functools import cache, partial
from itertools import chain
from pathlib import Path

import pyarrow as pa
from PIL import Image

from igpt_lab.images.columns import LABEL_COLUMNS, Fact, Labels, Opened, label_column, read_labels, unchosen
from igpt_lab.images.opening import first_line, formats

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
START = re.compile("train|valid|val|dev|test|eval")  # of names that look like splits, without being one
METADATA = ("metadata.csv", "metadata.jsonl")
JUNK = ("__macosx", "@eadir")  # folders that other systems put beside images, besides what is hidden
NOT_TOLD = re.compile(r"thumbs\.db|desktop\.ini")  # files that other systems put there
TEXTS = re.compile(r"(readme|licen[cs]e|copying|changelog|citation)(\.\w+)?")  # about a set, beside its class folders
Parts = tuple[str, ...]  # of a path below the root


def split_of(name: str) -> str | None:
    """The split that a folder's name means: one of its words does, as in seg_train; None where none, or several do.

    >>> split_of("Training"), split_of("seg_train"), split_of("trains"), split_of("train-test")
    ('train', 'train', None, None)
    """
    splits = {SPLIT_OF_WORD[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 else None


def read_folders(root: Path, split: str | None, name: str, label: str | None = None) -> Opened:
    """ROOT[/split]/class/image.png -> paths and labels; a metadata file's labels stand above those of the folders.

    `split` None is the split that the root is named after, or else "test". `label` is the column of the metadata file
    that was asked for. Raises ValueError.
    """
    images, left_out = _scan(root)
    splits, notes = _split_folders(images, name)
    bases: dict[str, Parts] = {folder: _unwrapped((folder,), images) for folder in splits}
    if splits:
        split = split or "test"
        chosen = _chosen(splits, split, name, _told(left_out))
        base = bases.pop(chosen)
        ignored = [folder for folder, word in splits.items() if folder != chosen and word == splits[chosen]]
        outside = sum(len(parts) == 1 for parts in images)
        left_out |= Counter({f"folder {folder}, also named after {splits[chosen]}": 1 for folder in ignored})
        left_out |= Counter({"image beside the splits": outside} if outside else {})
    else:
        split, base = split or split_of(root.absolute().name) or "test", ()
    inside = [parts for parts in images if parts[: len(base)] == base]
    if not inside:
        raise ValueError(
            f"{root} has no images; expected Parquet files, or folders of images named after their class. "
            f"{_told(left_out)}".strip()
        )
    table, more = _labelled(root, base, inside, name, label)
    others = {folder: partial(_labels_of, root, other, images, name, label) for folder, other in bases.items()}
    told = [_told(left_out)] if left_out else []
    return Opened(table, root, split, others, (*notes, *more, *told), listed=True)


def _scan(root: Path) -> tuple[list[Parts], Counter[str]]:
    """The images below a folder, sorted, and what else there is, counted; only splits and classes may be links."""
    images: list[Parts] = []
    left_out: Counter[str] = Counter()
    waiting: list[tuple[Parts, str]] = [((), str(root))]
    while waiting:
        above, folder = waiting.pop()
        for entry in os.scandir(folder):
            parts = (*above, entry.name)
            if entry.name.startswith(".") or entry.name.lower() in JUNK:
                if entry.is_dir() or _suffix(entry.name) in _suffixes():
                    left_out["hidden"] += 1
            elif entry.is_dir():
                is_class = not above or (len(above) == 1 and split_of(above[0]) is not None)
                if entry.is_symlink() and (not is_class or _leads_up(entry.path)):
                    left_out["linked folder"] += 1
                else:
                    waiting.append((parts, entry.path))
            elif entry.name not in METADATA and (reason := _reason(entry)):
                if not _is_usual(entry, above):
                    left_out[reason] += 1
            elif entry.name not in METADATA:
                if not "/".join(parts).isascii():
                    _refuse_no_text(entry.path)
                images.append(parts)
    return sorted(images), left_out


def _refuse_no_text(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{ascii(path)[1:-1]} has a name that is not UTF-8; rename it") from error


def _leads_up(path: str) -> bool:
    """Is this a link to a folder that it lies in?"""
    return Path(path).parent.resolve().is_relative_to(Path(path).resolve())


def _reason(entry: os.DirEntry) -> str:
    """Why a file is left out, '' for an image."""
    if not entry.is_file():
        return "link to nothing, or no file"
    suffix = _suffix(entry.name)
    if suffix in _suffixes():
        return ""
    return f"{suffix} file" if suffix else "file without a suffix"


def _is_usual(entry: os.DirEntry, above: Parts) -> bool:
    """Is this a file that is no image and is expected there? Nobody needs to be told of it."""
    name, beside_classes = entry.name.lower(), len(above) < 2
    return entry.is_file() and bool(NOT_TOLD.fullmatch(name) or (beside_classes and TEXTS.fullmatch(name)))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@cache
def _suffixes() -> set[str]:
    """Of the formats that are opened."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()}


def _told(left_out: Counter[str]) -> str:
    return "left out: " + ", ".join(f"{count} x {what}" for what, count in sorted(left_out.items())) if left_out else ""


def _split_folders(images: list[Parts], name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Folders that are splits, and the split of each; {} where all are classes. And notes.

    Raises ValueError where they may be either.
    """
    folders = sorted({parts[0] for parts in images if len(parts) > 1})
    splits = {folder: split for folder in folders if (split := split_of(folder))}
    others = [folder for folder in folders if folder not in splits]
    if not splits:
        _refuse_hidden_splits(images, folders, name)
    if not splits or not others:
        return splits, ()
    flat = {parts[0] for parts in images if len(parts) == 2}  # folders with images of their own, as classes have
    if len(set(splits.values())) > 1 and not flat & set(splits):
        return splits, (f"left out: the folders {', '.join(others)} beside the splits {', '.join(splits)}",)
    if len(splits) == 1 and flat == set(folders):
        return {}, (f"the folder {', '.join(splits)} is taken for a class, as it lies among {', '.join(others)}",)
    raise ValueError(
        f"{name} has {', '.join(splits)}, which may be splits, beside {', '.join(others)}, which are none; move or "
        "rename some, so that all are splits, or all are classes"
    )


def _refuse_hidden_splits(images: list[Parts], folders: list[str], name: str) -> None:
    """ValueError where splits would be read as classes: trainA and testA, or train and test below another folder."""
    starts = [start[0] for folder in folders if (start := START.match(folder.lower()))]
    if len(starts) == len(folders) and "train" in starts and len(set(starts)) > 1:
        raise ValueError(f"{name} has {', '.join(folders)}, which may be splits or classes; name splits train and test")
    below: dict[str, dict[str, str]] = {}
    for folder, inner, *_ in (parts for parts in images if len(parts) > 2):
        if split := split_of(inner):
            below.setdefault(folder, {})[split] = inner
    for folder, splits in below.items():
        if len(splits) > 1:
            raise ValueError(
                f"{name} has the splits {', '.join(sorted(splits.values()))} below {folder}; give its path, "
                "or put the classes into the splits, as in train/cat"
            )


def _chosen(splits: dict[str, str], split: str, name: str, told: str) -> str:
    """The folder of a split: the one of its very name, or else the only one that means it."""
    same = [split] if split in splits else [folder for folder, word in splits.items() if word == split_of(split)]
    if len(same) > 1:
        raise ValueError(f"{name} has several folders for the split {split!r}: {', '.join(same)}; give the name of one")
    if not same:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}{told and f' ({told})'}")
    return same[0]


def _unwrapped(base: Parts, images: list[Parts]) -> Parts:
    """A split's folder, or the one of the same name that is all it holds, as archives often unpack."""
    depth = len(base)
    below = {parts[depth] if len(parts) > depth + 1 else "" for parts in images if parts[:depth] == base}
    return _unwrapped((*base, base[-1]), images) if below == {base[-1]} else base


def _labelled(
    root: Path, base: Parts, images: list[Parts], name: str, label: str | None
) -> tuple[pa.Table, tuple[str, ...]]:
    """Table of the images below `base`, by class and path, with their labels if any; and notes."""
    features = b'{"info": {"features": {"image": {"_type": "Image"}}}}'
    metadata, notes = _metadata(root, base, images, name, label)
    if metadata is not None:
        columns = {"image": pa.array("/".join(parts) for parts in images), "label": metadata}
        return pa.table(columns, metadata={b"huggingface": features}), notes
    loose = [parts for parts in images if len(parts) == len(base) + 1]
    if loose and len(loose) < len(images):
        stray = root.joinpath(*loose[0])
        raise ValueError(f"{stray} lies beside the class folders; put each image into the folder of its class")
    columns = {"image": pa.array("/".join(parts) for parts in images)}
    if not loose:
        by_class = sorted((_class_of(parts, base), parts) for parts in images)
        columns["image"] = pa.array("/".join(parts) for _, parts in by_class)
        columns["label"] = pa.array(label for label, _ in by_class)
        notes = (*notes, *_alone(root, base, images))
    return pa.table(columns, metadata={b"huggingface": features}), notes


def _class_of(parts: Parts, base: Parts) -> str:
    """The class of an image: the name of its folder below the split's, in the Unicode form NFC."""
    return unicodedata.normalize("NFC", parts[len(base)])


def _alone(root: Path, base: Parts, images: list[Parts]) -> list[str]:
    """A note on the only class, where all that it holds is folders: an archive may have put it around the classes."""
    inner = sorted({parts[len(base) + 1] if len(parts) > len(base) + 2 else "" for parts in images})
    if len({parts[len(base)] for parts in images}) > 1 or "" in inner:
        return []
    outer = root.joinpath(*images[0][: len(base) + 1])
    more = ", ..." if len(inner) > 3 else ""
    return [f"{outer} is the only class; give it as the images if {', '.join(inner[:3])}{more} in it are what counts"]


def _labels_of(root: Path, base: Parts, images: list[Parts], name: str, label: str | None) -> Labels | None:
    """The labels of another split; None where it has none."""
    inside = [parts for parts in images if parts[: len(base)] == base]
    metadata, _ = _metadata(root, base, inside, name, label)
    if metadata is not None:
        return read_labels(pa.table({"label": metadata}), "label", f"{name} {'/'.join(base)}")
    classes = {_class_of(parts, base) for parts in inside if len(parts) > len(base) + 1}
    return read_labels(pa.table({"label": sorted(classes)}), "label", name) if classes else None


def _metadata(
    root: Path, base: Parts, images: list[Parts], name: str, asked: str | None
) -> tuple[pa.ChunkedArray | None, tuple[str, ...]]:
    """The labels that a metadata file beside the images gives them, in their order; None without one. And notes."""
    files = [root.joinpath(*where, file) for where in dict.fromkeys((base, ())) for file in METADATA]
    files = [file for file in files if file.is_file()]
    if not files and asked:
        raise ValueError(f"{name} has no column {asked!r}: of images in folders it is one of {METADATA[0]} beside them")
    if not files:
        return None, ()
    if len(files) > 1:
        raise ValueError(f"{name} has {files[0]} and {files[1]}; keep one of them")
    file, where = files[0], files[0].parent.relative_to(root).parts
    table = _read_metadata(file)
    label = label_column(table.schema, str(file), asked)
    if label is None:
        return None, (f"{file} has no label column; name it 'label'",)
    rows = {_path_of(where, cell): row for row, cell in enumerate(table["file_name"].to_pylist())}
    if len(rows) < len(table):
        raise ValueError(f"{file} names a file twice in its column file_name; expected a row for each image")
    for parts in images:
        if "/".join(parts) not in rows:
            raise ValueError(f"{file} has no row for {'/'.join(parts[len(where) :])}; expected one for each image")
    labels = table[label].take(pa.array([rows["/".join(parts)] for parts in images]))
    more = sum(path.startswith("".join(f"{part}/" for part in base)) for path in rows) - len(images)
    absent = [f"left out: {more} x row of {file.name} whose image is not there"] if more else []
    source = f"labels are those of {file.name}, column {label}"
    folders = {parts[len(base)] for parts in images if len(parts) > len(base) + 1}  # which could be classes
    first = source if len(folders) > 1 or label not in ("label", asked) else Fact(source)
    return labels, (first, *absent, *(() if asked else unchosen(table.schema, label)))


def _as_numbers(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Labels of a CSV file as numbers where all are; but 01 and 1 are two classes, and stay text."""
    try:
        numbers = labels.cast(pa.int64())
        return numbers if numbers.cast(pa.string()).equals(labels) else labels
    except pa.ArrowException:  # words, fractions, or more than int64 holds
        pass
    try:
        return labels.cast(pa.float64())
    except pa.ArrowException:
        return labels


def _path_of(where: Parts, cell: str) -> str:
    return posixpath.normpath("/".join([*where, str(cell)]))


def _read_metadata(file: Path) -> pa.Table:
    """A CSV or JSON Lines table with a column file_name; ValueError where it is none."""
    from pyarrow import csv

    try:
        if file.suffix == ".jsonl":  # not by pyarrow, which ends the process where lists are in lists too often
            with file.open(encoding="utf-8-sig") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            table = pa.table(
                {name: pa.array([row.get(name) for row in rows]) for name in dict.fromkeys(chain.from_iterable(rows))}
            )
        else:
            text = csv.ConvertOptions(
                column_types=dict.fromkeys(("file_name", *LABEL_COLUMNS), pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            )
            table = csv.read_csv(file, csv.ReadOptions(use_threads=False), convert_options=text)
            for place, name in enumerate(table.column_names):
                if name in LABEL_COLUMNS:
                    table = table.set_column(place, name, _as_numbers(table.column(place)))
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    if names.count("file_name") != 1:
        raise ValueError(f"{file} has no column file_name, or two; its columns are {', '.join(names)}")
    return table
