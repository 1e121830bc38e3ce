"""A part's file: its bytes, and what the types of its columns must be."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def bytes_of(index: np.ndarray, labels: np.ndarray | None, features: dict[str, np.ndarray]) -> bytes:
    """The bytes of a part."""
    columns = [pa.array(index, pa.int64())]
    columns.append(pa.nulls(len(index), pa.int64()) if labels is None else pa.array(labels, pa.int64()))
    fields = [pa.field("index", pa.int64()), pa.field("label", pa.int64())]
    for name, values in features.items():
        # Not nullable, and without statistics: 1.3 to 1.6 times as fast to write, 1.6 to 1.9 to read.
        kind = pa.list_(pa.field("element", pa.float32(), nullable=False), values.shape[1])
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel(), pa.float32())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
        fields.append(pa.field(name, kind, nullable=False))
    table, buffer = pa.Table.from_arrays(columns, schema=pa.schema(fields)), pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=["index", "label"])
    return buffer.getvalue().to_pybytes()


def wrong_type(name: str, kind: pa.DataType) -> str:
    """What is wrong with the type of a part's column, or ''."""
    if name in ("index", "label"):
        right = kind == pa.int64()
    else:
        right = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
    return "" if right else f"has {name} as {kind}"


def nulls(column: pa.ChunkedArray) -> int:
    """Rows, or numbers in them, that have no value."""
    if not (pa.types.is_fixed_size_list(column.type) and column.type.value_field.nullable):
        return column.null_count
    return column.null_count + sum(chunk.flatten().null_count for chunk in column.chunks)
