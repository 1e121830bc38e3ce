"""Which column of a table holds the images and which the labels, and labels as integers.

The notes that `datasets` leaves in a table's schema decide, then names and types. They are read as JSON here, as the
import of `datasets` takes seconds.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igpt_lab.core.storage import Remote
from igpt_lab.core.values import closest

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
WORDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


class NoPicture(ValueError):
    """What is held in memory for an image is none; the message goes on after the name of its row."""


class BadItem(NoPicture):
    """The user's own code fails on an item."""


class Held(Protocol):
    """Images of a split in memory: `[row]` gives an encoded picture as bytes, or as {"bytes", "path"}."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...

    @property
    def files(self) -> Sequence[str]:
        """The file name of each, '' where there is none."""


class Fact(str):
    """A note for the card alone: nothing was left out or overruled."""


def _features(schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` noted about each column; {} where it noted nothing."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        noted = {}
    return {name: noted[name] if isinstance(noted.get(name), dict) else {} for name in schema.names}


def columns_of(schema: pa.Schema, name: str, label: str | None = None) -> tuple[str, str | None]:
    """(image column, label column or None) of a table; `label` is the one that was asked for."""
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}
    images = [column for column in schema.names if kinds[column] == "Image"]
    images = images or [field.name for field in schema if kinds[field.name] is None and _holds_images(field)]
    if not images:
        raise ValueError(f"{name} has no column with the image; name one 'image'. {_names(schema)}")
    return _usual(images, "image", schema, name), label_column(schema, name, label)


def label_column(schema: pa.Schema, name: str, label: str | None = None) -> str | None:
    """The column of the labels, or None; `label`, where it was asked for. ValueError where there is no such column."""
    if label is not None:
        if label not in schema.names:
            close = closest(label, schema.names)
            hint = f"did you mean {close!r}? " if close else ""
            raise ValueError(f"{name} has no column {label!r} for the labels; {hint}{_names(schema)}")
        return _usual([label], "label", schema, name)
    labels = [column for column in LABEL_COLUMNS if column in schema.names]
    labels = labels or [column for column, feature in _features(schema).items() if feature.get("_type") == "ClassLabel"]
    return _usual(labels, "label", schema, name) if labels else None


def unchosen(schema: pa.Schema, chosen: str | None, label: str | None = None) -> list[str]:
    """A note on other columns that may hold the labels; for the card alone where the choice is the usual, or asked."""
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}
    others = [
        column
        for column in schema.names
        if column != chosen and (kinds[column] == "ClassLabel" or re.search(r"(^|_)labels?$", column.lower()))
    ]
    if not others:
        return [Fact(f"labels are those of the column {label}")] if label else []
    taken = f"labels are those of the column {chosen}" if chosen else "no labels are read"
    if label or chosen == "label":
        return [Fact(f"{taken}; others may be {', '.join(others)}: label={others[0]!r} takes it")]
    return [f"{taken}; {', '.join(others)} may be meant: label={others[0]!r} takes it"]


def _usual(candidates: list[str], kind: str, schema: pa.Schema, name: str) -> str:
    """The only candidate for a kind of column, or the one with a usual name."""
    usual = [column for column in (*IMAGE_COLUMNS, *LABEL_COLUMNS) if column in candidates]
    if not usual and len(candidates) > 1:
        raise ValueError(f"{name} has several columns that may hold the {kind}; name one {kind!r}. {_names(schema)}")
    chosen = (usual or candidates)[0]
    if schema.names.count(chosen) > 1:
        raise ValueError(f"{name} has the column {chosen!r} twice. {_names(schema)}")
    return chosen


def _names(schema: pa.Schema) -> str:
    return f"Its columns are {', '.join(schema.names)}"


def _holds_images(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0
    return field.name in IMAGE_COLUMNS and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))


@dataclass(frozen=True)
class Labels:
    """The labels of one split: `codes` int64 (N,) into `classes`, -1 where a row has none.

    `noted`: the order of `classes` is that of a ClassLabel, and some of them may have no row here.
    """

    codes: np.ndarray
    classes: tuple[int | str, ...]
    noted: bool = False

    def numbered(self, names: Sequence[str]) -> np.ndarray:
        """int64 (N,): each row's class as its place in `names`, -1 where it has none."""
        number = {name: place for place, name in enumerate(names)}
        places = np.array([*(number[str(label)] for label in self.classes), -1], np.int64)
        return places[self.codes]


@dataclass(frozen=True)
class Opened:
    """One split as its source has it: a table of images and labels, whose relative paths start at `root`.

    `others`: what reads the labels of the source's other splits; `notes`: what was chosen and left out, in words;
    `listed`: the paths were found in a folder, and not read from a table.
    """

    table: pa.Table
    root: Path | Remote
    split: str
    others: Mapping[str, Callable[[], Labels | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    listed: bool = False


def read_labels(table: pa.Table, column: str, title: str) -> Labels:
    """The labels in a column: integers, words, booleans, or whole numbers as floats; negative is no label.

    Raises ValueError, which begins with `title`, for other types.
    """
    names = class_label(table.schema, column, title)
    values = _plain(table[column], f"{title}: column {column!r}")
    if names and pa.types.is_integer(values.type):
        codes = values.fill_null(-1).to_numpy()
        return Labels(np.where((codes >= 0) & (codes < len(names)), codes, -1), names, noted=True)
    distinct = [value for value in values.unique().to_pylist() if value is not None]
    classes = sorted(value for value in distinct if isinstance(value, str) or value >= 0)
    codes = pc.index_in(values, pa.array(classes, values.type)).fill_null(-1).to_numpy()
    return Labels(codes.astype(np.int64), tuple(classes))


def _plain(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """int64, or strings in the Unicode form NFC, of any type that says the same; ValueError begins with `where`."""
    kind = values.type
    try:
        if pa.types.is_dictionary(kind):
            values = values.cast(kind.value_type)
        if pa.types.is_boolean(values.type):
            return pc.if_else(values, "True", "False")
        if pa.types.is_integer(values.type):
            return values.cast(pa.int64())
        if pa.types.is_floating(values.type):
            values = values.cast(pa.float64())
            return pc.if_else(pc.is_nan(values), None, values).cast(pa.int64())
        if pa.types.is_null(values.type):
            return values.cast(pa.int64())
        if any(is_kind(values.type) for is_kind in WORDS):
            words = values.cast(
                pa.string()
            ).to_pylist()  # pyarrow's own NFC, up to version 23 at least, joins no accents
            return pa.chunked_array([[word and unicodedata.normalize("NFC", word) for word in words]], pa.string())
    except (pa.ArrowException, UnicodeDecodeError):  # a fraction, more than int64 holds, or no UTF-8
        pass
    raise ValueError(f"{where} is {kind}; expected integers or words as labels")


def class_label(schema: pa.Schema, column: str, title: str) -> tuple[str, ...]:
    """The names of a ClassLabel, () where `datasets` noted none.

    Raises ValueError, which begins with `title`, where two classes have one name.
    """
    noted = _features(schema)[column].get("names")
    numbers: dict[str, int] = {}
    for number, name in enumerate(noted if isinstance(noted, list) else ()):
        name = unicodedata.normalize("NFC", str(name))
        if (first := numbers.setdefault(name, number)) < number:
            raise ValueError(
                f"{title}: column {column!r} names its classes {first} and {number} both {name!r}; "
                "give each a name of its own"
            )
    return tuple(numbers)


def class_names(splits: Sequence[Labels], title: str) -> tuple[str, ...]:
    """The names of the classes of all splits together, whose places are the classes' numbers.

    Those of a ClassLabel keep its order, the first split's where they differ; others follow, by number or alphabet.
    Raises ValueError where two splits write a class in two ways, in capitals and not.
    """
    noted = [label for labels in splits if labels.noted for label in labels.classes]
    others = {label for labels in splits if not labels.noted for label in labels.classes}
    in_order = sorted(others, key=lambda label: (isinstance(label, str), label))
    names = tuple(dict.fromkeys(map(str, [*noted, *in_order])))
    by_split = [set(map(str, labels.classes)) for labels in splits]
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    for pair in (pair for same in alike.values() for pair in combinations(same, 2)):
        if not any(set(pair) <= present for present in by_split):
            raise ValueError(
                f"{title}: its splits have the classes {pair[0]!r} and {pair[1]!r}; use the same names in each split"
            )
    return names


def fixed(array: np.ndarray) -> np.ndarray:
    """An int64 copy that nobody can write to."""
    array = np.array(array, np.int64)
    array.flags.writeable = False
    return array
