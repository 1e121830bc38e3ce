"""Where stores lie: local folders with locks that die with their process, and object stores, which need none.

A lock is a file beside what it guards: a store, or one of its parts. `Remote` has the methods of a path that stores and
image sets use, by pyarrow's filesystems.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import fs

from igpt_lab.core.arguments import local


def lock_of(store: Place, part: str = "") -> FileLock | NoLock:
    """A lock that dies with its process; its file is beside the store, whose own files are then always the same."""
    if isinstance(store, Remote):
        return NoLock()
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(store.with_name(f".{store.name}{part}.lock"), thread_local=False)


def locks_of(store: Place) -> list[Path]:
    """Lock files of a store, held or left behind."""
    return [] if isinstance(store, Remote) else sorted(store.parent.glob(f".{store.name}.*lock"))


def held(file: Path) -> bool:
    """Does a living process hold this lock?"""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def drop_lock(file: Path) -> bool:
    """Remove a lock's file; False where a living process holds it."""
    lock = FileLock(file)
    try:
        with lock.acquire(timeout=0):
            unlink(lock)
    except Timeout:
        return False
    return True


def unlink(lock: FileLock | NoLock) -> None:
    """Remove the file of a lock that we hold: who waits for it sees that it is gone, and makes a new one."""
    with suppress(OSError):  # Windows keeps open files
        os.unlink(lock.lock_file)


class NoLock:
    """In the place of a lock where there are none."""

    lock_file = ""

    def acquire(self, timeout: float = -1) -> NoLock:
        return self

    def release(self) -> None:
        pass

    __enter__ = acquire

    def __exit__(self, *_) -> None:
        pass


ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")


def place(path: str | Place) -> Place:
    """A local path, or the place on an object store that an address names."""
    if isinstance(path, Remote):
        return path
    if isinstance(path, str) and ADDRESS.match(path) and not path.startswith("file://"):
        return Remote.of(path)
    return local(path)


def readable(path: Place) -> Path | pa.NativeFile:
    """What pyarrow reads Parquet from."""
    return path.system.open_input_file(path.key) if isinstance(path, Remote) else path


def size_of(path: Place) -> int:
    """Bytes of a file or an object."""
    return path.info().size if isinstance(path, Remote) else path.stat().st_size


class Remote:
    """An object, or the prefix of several, named as a path is."""

    def __init__(self, system: fs.FileSystem, key: str, root: str):
        self.system, self.key, self.root = system, key.rstrip("/"), root

    @classmethod
    def of(cls, address: str) -> Remote:
        """Of `s3://bucket/key`; ValueError for what pyarrow has no filesystem for."""
        try:
            system, key = fs.FileSystem.from_uri(address)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{address}: {error}; expected a path, s3://bucket/... or gs://bucket/...") from error
        scheme, _, _ = address.partition("://")
        return cls(system, key, f"{scheme}://")

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        return Remote(self.system, f"{self.key}/{name}", self.root)

    def __str__(self) -> str:
        return self.root + self.key

    __repr__ = __fspath__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: Remote) -> bool:
        return self.key < other.key

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.system, str(PurePosixPath(self.key).parent), self.root)

    def resolve(self) -> Remote:
        return self

    absolute = resolve

    def info(self) -> fs.FileInfo:
        return self.system.get_file_info(self.key)

    def is_file(self) -> bool:
        return self.info().type == fs.FileType.File

    def exists(self) -> bool:
        return self.info().type != fs.FileType.NotFound

    def read_bytes(self) -> bytes:
        with self.system.open_input_stream(self.key) as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def put(self, data: bytes) -> Remote:
        """Write the whole object; it is as it was where this fails."""
        with self.system.open_output_stream(self.key) as file:
            file.write(data)
        return self

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok or self.is_file():
            self.system.delete_file(self.key)

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Objects under this prefix whose names below it match; `*` does not stop at a slash."""
        objects = self.system.get_file_info(fs.FileSelector(self.key, allow_not_found=True, recursive=True))
        for info in objects:
            if info.is_file and fnmatchcase(info.path[len(self.key) + 1 :], pattern):
                yield Remote(self.system, info.path, self.root)


Place = Path | Remote
