"""TensorFlow's checkpoints (tensor bundles, version 2) without TensorFlow. Never executes what a file contains.

`PREFIX.index` is a LevelDB table whose values are protocol buffers: a BundleHeaderProto under the empty key, and under
each variable's name a BundleEntryProto, which says where in which `PREFIX.data-00007-of-00032` its values lie. Sources:
tensor_bundle.h, tensor_bundle.proto and types.proto of TensorFlow; table_format.md of LevelDB.

Our own, as what else reads these files is TensorFlow itself: half a gigabyte of packages for one conversion.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from igpt_lab.core.hub import CheckpointError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two block handles, padding, the magic number
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 6: "i1", 9: "<i8", 10: "?", 14: "<u2", 19: "<f2"}
FLOATS = {1, 2, 14, 19}
BFLOAT16 = 14  # NumPy has no such type: its two bytes are the upper half of a float32


@dataclass(frozen=True)
class Entry:
    """Where a variable's values lie: `size` bytes from `offset` on in data file `shard`; `crc` is masked."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int | None
    sliced: bool


class Bundle:
    """The variables of the checkpoint with this prefix (`FOLDER/model.ckpt-1000000`), read when they are asked for.

    `entries`: what the index says, by name. Raises CheckpointError when the index is damaged, or when a data file is
    missing or shorter than the index says; values are compared with their checksums when they are read.
    """

    def __init__(self, prefix: str | Path):
        self.prefix, self.index = Path(prefix), Path(f"{prefix}.index")
        try:
            self.entries, shards = _parse(self.index.read_bytes())
        except CheckpointError as error:
            raise CheckpointError(f"{self.index}: {error}") from error
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise CheckpointError(f"{self.index} is no index of a TensorFlow checkpoint, or is damaged") from error
        self.shards = [Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}") for shard in range(shards)]
        self._check_shards()

    def _check_shards(self) -> None:
        missing = [path.name for path in self.shards if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.prefix.parent} lacks {missing[0]}{more}; the checkpoint has {len(self.shards)} data files"
            )
        needed = [0] * len(self.shards)
        for entry in self.entries.values():
            needed[entry.shard] = max(needed[entry.shard], entry.offset + entry.size)
        for path, size in zip(self.shards, needed, strict=True):
            if path.stat().st_size < size:
                raise CheckpointError(f"{path} is cut short: {path.stat().st_size:,} bytes of at least {size:,}")

    def read(self, name: str) -> np.ndarray:
        """A variable's values in its shape: float32 for every floating-point type, else the type it was saved in."""
        entry = self.entries[name]
        if entry.sliced or entry.dtype not in DTYPES:
            what = "partitioned into slices" if entry.sliced else f"of TensorFlow's data type {entry.dtype}"
            raise CheckpointError(f"{self.prefix}: the variable {name} is {what}, which this reader does not support")
        dtype = np.dtype(DTYPES[entry.dtype])
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise CheckpointError(f"{self.index}: {name} has shape {entry.shape} and {entry.size} bytes of {dtype}")
        if not entry.size:
            return np.zeros(entry.shape, np.float32 if dtype.kind == "f" else dtype)
        with self.shards[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            values = file.read(entry.size)
        if len(values) != entry.size:
            raise CheckpointError(f"{self.shards[entry.shard]} is cut short: it ends within {name}")
        if entry.crc is not None and _masked(google_crc32c.value(values)) != entry.crc:
            raise CheckpointError(f"{self.shards[entry.shard]} is damaged: the checksum of {name} differs")
        array = np.frombuffer(values, dtype).reshape(entry.shape)
        if entry.dtype == BFLOAT16:
            return (array.astype("<u4") << 16).view("<f4")
        return array.astype(np.float32, copy=False) if dtype.kind == "f" else array


def _parse(data: bytes) -> tuple[dict[str, Entry], int]:
    """(entries by name, number of data files) of an index file's bytes."""
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:]) != (MAGIC,):
        raise CheckpointError("the end of this file is not that of a TensorFlow index; is it cut short?")
    *_, at = _handle(data, len(data) - FOOTER)  # the meta-index block, which holds nothing here
    entries, shards = {}, 0
    for _, handle in _block(data, *_handle(data, at)[:2]):
        for key, value in _block(data, *_handle(handle, 0)[:2]):
            if not key:
                header = dict(_message(value))
                shards = header.get(1, 0)
                if header.get(2, 0) or not 0 < shards < 100_000:
                    raise CheckpointError(
                        f"{shards} data files, big-endian: {bool(header.get(2, 0))}; this reader does not support them"
                    )
            elif key[0]:  # a key that begins with 0 belongs to one slice of a variable
                entries[key.decode()] = _entry(value, shards)
    if not shards:
        raise CheckpointError("it has no header")
    return entries, shards


def _entry(value: bytes, shards: int) -> Entry:
    fields = dict(_message(value))
    dims = [int(dict(_message(dim)).get(1, 0)) for number, dim in _message(fields.get(2, b"")) if number == 2]
    if math.prod(max(1, dim) for dim in dims) >= 1 << 48:
        raise ValueError(f"shape {dims}")
    shard, offset, size = (int(fields.get(i, 0)) for i in (3, 4, 5))
    entry = Entry(int(fields[1]), tuple(dims), shard, offset, size, fields.get(6), 7 in fields)
    if entry.shard >= shards:
        raise ValueError(f"data file {entry.shard} of {shards}")
    return entry


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """(offset, size, position behind it) of a block handle."""
    offset, at = _varint(data, at)
    return offset, *_varint(data, at)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of a base-128 number of at most 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number that does not end")


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a table block; a key gives only what differs from the one before it."""
    kind, (crc,) = data[offset + size], struct.unpack_from("<I", data, offset + size + 1)
    if _masked(google_crc32c.value(data[offset : offset + size + 1])) != crc:
        raise ValueError("a block's checksum differs")
    if kind:
        raise CheckpointError(f"a block is compressed (kind {kind}); TensorFlow writes them uncompressed")
    (restarts,) = struct.unpack_from("<I", data, offset + size - 4)
    at, end = offset, offset + size - 4 * (restarts + 1)
    key = b""
    while at < end:
        shared, at = _varint(data, at)
        fresh, at = _varint(data, at)
        length, at = _varint(data, at)
        key, at = key[:shared] + data[at : at + fresh], at + fresh + length
        if at > end:
            raise ValueError("an entry reaches beyond its block")
        yield key, data[at - length : at]


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol-buffer message: a number or bytes."""
    value: int | bytes
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 == 5:
            (value,), at = struct.unpack_from("<I", data, at), at + 4
        else:
            raise ValueError(f"wire type {tag & 7}")
        if at > len(data):
            raise ValueError("a field reaches beyond its message")
        yield tag >> 3, value


def _masked(crc: int) -> int:
    """TensorFlow's disguise of a CRC-32C: rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
