"""Reads a TensorFlow checkpoint (tensor bundle V2, float32, one shard) without TensorFlow.

Sources: tensorflow/core/util/tensor_bundle and the LevelDB table format that its `.index` file follows.
"""

import struct
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57
FLOAT32 = 1


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of a base-128 number."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def entries(data: bytes, offset: int, size: int):
    """(key, value) of an uncompressed table block; a key gives only what differs from the one before it."""
    if data[offset + size] != 0:
        raise ValueError(f"block at {offset} is compressed (type {data[offset + size]}); expected 0")
    (restarts,) = struct.unpack_from("<I", data, offset + size - 4)
    at, end, key = offset, offset + size - 4 * (restarts + 1), b""
    while at < end:
        shared, at = varint(data, at)
        fresh, at = varint(data, at)
        length, at = varint(data, at)
        key = key[:shared] + data[at : at + fresh]
        yield key, data[at + fresh : at + fresh + length]
        at += fresh + length


def message(data: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) of a protocol-buffer message."""
    at, found = 0, []
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 == 5:
            (value,), at = struct.unpack_from("<I", data, at), at + 4
        else:
            raise ValueError(f"wire type {tag & 7} in a bundle entry; expected 0, 2 or 5")
        found.append((tag >> 3, value))
    return found


def read_bundle(prefix: Path) -> dict[str, np.ndarray]:
    """Variables by name of `prefix.index` and `prefix.data-00000-of-00001`."""
    index = Path(f"{prefix}.index").read_bytes()
    values = Path(f"{prefix}.data-00000-of-00001").read_bytes()
    if struct.unpack("<Q", index[-8:]) != (MAGIC,):
        raise ValueError(f"{prefix}.index is no table: its magic number is wrong")
    at = len(index) - 48
    _, at = varint(index, at)  # the meta-index block, empty here
    _, at = varint(index, at)
    root, at = varint(index, at)
    root_size, at = varint(index, at)
    found = {}
    for _, handle in entries(index, root, root_size):
        block, behind = varint(handle, 0)
        for name, entry in entries(index, block, varint(handle, behind)[0]):
            if name:  # the empty key holds the bundle's header
                found[name.decode()] = _tensor(message(entry), values)
    return found


def _tensor(entry: list[tuple[int, int | bytes]], values: bytes) -> np.ndarray:
    """The array of a BundleEntryProto: 1 dtype, 2 shape, 4 offset, 5 size (absent means 0)."""
    fields = dict(entry)
    if fields[1] != FLOAT32:
        raise ValueError(f"dtype {fields[1]} in a bundle entry; expected {FLOAT32}, float32")
    shape = [dict(message(dim))[1] for number, dim in message(fields.get(2, b"")) if number == 2]
    array = np.frombuffer(values, "<f4", count=fields[5] // 4, offset=fields.get(4, 0))
    return array.reshape(shape)
