"""Which column of a table holds the images and which the labels, and labels as integers.

The notes that `datasets` leaves in a table's schema decide, then names and types. They are read as JSON here, as the
import of `datasets` takes seconds.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def _features(schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` noted about each column; {} where it noted nothing."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        noted = {}
    return {name: noted[name] if isinstance(noted.get(name), dict) else {} for name in schema.names}


def columns_of(schema: pa.Schema, name: str) -> tuple[str, str | None]:
    """(image column, label column or None) of a table."""
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}
    images = [column for column in schema.names if kinds[column] == "Image"]
    images = images or [field.name for field in schema if kinds[field.name] is None and _holds_images(field)]
    labels = [column for column in LABEL_COLUMNS if column in schema.names]
    labels = labels or [column for column in schema.names if kinds[column] == "ClassLabel"]
    if not images:
        raise ValueError(f"{name} has no column with the image; name one 'image'. {_names(schema)}")
    return _usual(images, "image", schema, name), _usual(labels, "label", schema, name) if labels else None


def _usual(candidates: list[str], kind: str, schema: pa.Schema, name: str) -> str:
    """The only candidate for a kind of column, or the one with a usual name."""
    usual = [column for column in (*IMAGE_COLUMNS, *LABEL_COLUMNS) if column in candidates]
    if not usual and len(candidates) > 1:
        raise ValueError(f"{name} has several columns that may hold the {kind}; name one {kind!r}. {_names(schema)}")
    return (usual or candidates)[0]


def _names(schema: pa.Schema) -> str:
    return f"Its columns are {', '.join(schema.names)}"


def _holds_images(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0
    return field.name in IMAGE_COLUMNS and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))


def labels_of(table: pa.Table, column: str, title: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 (N,), or None where no row has one, and their names; words are numbered in alphabetical order.

    Raises ValueError, which begins with `title`, for other types and where only some rows have a label.
    """
    values = table[column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    names = _features(table.schema)[column].get("names")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        words = values.to_pylist()
        names = sorted({word for word in words if word is not None})
        number = {word: label for label, word in enumerate(names)}
        labels = np.array([number.get(word, -1) for word in words], np.int64)
    elif pa.types.is_integer(values.type):
        labels = values.fill_null(-1).to_numpy().astype(np.int64)
    else:
        raise ValueError(f"{title}: column {column!r} is {values.type}; expected integers or words as labels")
    if (labels < 0).all():  # the Hub's way to withhold the labels of a test split
        return None, tuple(names or ())
    names = tuple(names or map(str, range(labels.max() + 1)))
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        raise ValueError(f"{title} row {wrong[0]} has no label among its {len(names)} classes: {values[wrong[0]]}")
    return fixed(labels), names


def fixed(array: np.ndarray) -> np.ndarray:
    """An int64 copy that nobody can write to."""
    array = np.array(array, np.int64)
    array.flags.writeable = False
    return array
