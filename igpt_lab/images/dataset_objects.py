"""Objects of the package `datasets` in memory: a split of a Dataset, a DatasetDict or an IterableDataset.

Their pictures stay encoded: `datasets` decodes none, and each is read when it is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igpt_lab.images.columns import (
    Fact,
    Held,
    Labels,
    NoPicture,
    Opened,
    class_label,
    columns_of,
    read_labels,
    unchosen,
)
from igpt_lab.images.opening import read_named


def is_dataset(source: Any) -> bool:
    """Is it a split of `datasets`? That package is not imported here: it takes seconds."""
    known = sys.modules.get("datasets")
    return known is not None and isinstance(source, known.Dataset | known.IterableDataset)


class Cells:
    """The column of images of a Dataset, whose rows are read one by one."""

    def __init__(self, dataset: Any, column: str):
        self.rows = dataset.select_columns([column]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        cell = self.rows[row].column(0)[0].as_py()
        cell = cell if isinstance(cell, dict) else {"path": cell} if isinstance(cell, str) else {"bytes": cell}
        data, path = cell.get("bytes"), cell.get("path") or ""
        if data is None and path:  # a file that the user's own code listed
            try:
                data = read_named(path)
            except (OSError, ValueError) as error:
                raise NoPicture(f"({path}) cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return {"bytes": data, "path": path}

    @cached_property
    def files(self) -> Sequence[str]:
        """The paths in the column."""
        column = self.rows[:].column(0)
        if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            column = pc.struct_field(column, "path")
        return [path or "" for path in column.to_pylist()] if pa.types.is_string(column.type) else [""] * len(column)


def open_dataset(
    source: Any, split: str, name: str, *, label: str | None, limit: int | None, others: Mapping[str, Any]
) -> tuple[Held, Opened, str | None]:
    """The images of a split, its labels as a table, and the column of that table; None without labels.

    Of an IterableDataset it is the first `limit` rows, held in memory. `others` are the other splits of the set.
    Raises ValueError.
    """
    notes: list[str] = []
    if not hasattr(source, "__len__"):
        source = _first_rows(source, limit, name)
        notes.append(Fact(f"the first {len(source):,} rows of a stream"))
    schema = source.features.arrow_schema
    image, column = columns_of(schema, name, label)
    table = _column(source, column) if column else pa.table({"rows": pa.nulls(len(source))})
    known = {other: data for other, data in others.items() if getattr(data, "features", None)}
    readers = {other: partial(_labels_of, data, name, label) for other, data in known.items()}
    notes += unchosen(schema, column, label)
    return Cells(source, image), Opened(table, Path(), split, readers, tuple(notes)), column


def _first_rows(stream: Any, limit: int | None, name: str) -> Any:
    """The first rows of an IterableDataset as a Dataset; ValueError without a limit."""
    import datasets

    if limit is None:
        raise ValueError(f"{name} is an IterableDataset, whose end is not known; give limit=, the first rows to take")
    pictures = [column for column, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
    for column in pictures:
        stream = stream.cast_column(column, datasets.Image(decode=False))
    rows = list(islice(stream, limit))
    if not rows:
        raise ValueError(f"{name} has no images")
    if not stream.features:
        return datasets.Dataset.from_list(rows)
    return datasets.Dataset.from_list(rows, features=stream.features)


def _column(dataset: Any, column: str) -> pa.Table:
    """One column as a table, with what is noted of it."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table.replace_schema_metadata(dataset.features.arrow_schema.metadata)


def _labels_of(dataset: Any, name: str, label: str | None) -> Labels | None:
    """The labels of another split, of which a stream tells no more than its classes; None where it has none."""
    schema = dataset.features.arrow_schema
    _, column = columns_of(schema, name, label)
    if not hasattr(dataset, "__len__"):
        names = class_label(schema, column, name) if column else ()
        return Labels(np.zeros(0, np.int64), names, noted=True) if names else None
    return read_labels(_column(dataset, column), column, name) if column else None


def name_of(source: Any) -> str:
    """The name of the set that it was loaded from; "dataset" for one that was made in memory."""
    return getattr(source.info, "dataset_name", None) or "dataset"


def split_of(source: Any) -> str | None:
    """The split that it was loaded as, None where it is a part of one, or of several."""
    split = str(source.split or "")
    return split if re.fullmatch(r"[\w-]+", split) else None
