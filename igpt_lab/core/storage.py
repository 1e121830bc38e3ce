"""Where stores lie: local folders with locks that die with their process, and object stores, which need none.

A lock is a file beside what it guards: a store, or one of its parts. `Remote` has the methods of a path that stores and
image sets use, by pyarrow's filesystems.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import fs

from igpt_lab.core.arguments import OF_THIS_DISK, local

LONGEST = 150  # bytes of a name: one file's may have 255, and ours add to it
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def as_name(name: object, what: str) -> str:
    """A name that is one folder or file below another on any system, as it was; ValueError for every other.

    Names of splits, points and stores may be a stranger's: they go through here before they are part of a path.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or not name == PurePosixPath(name).name == PureWindowsPath(name).name
        or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)
        or len(name.encode()) > LONGEST
    ):
        raise ValueError(f"{what} is {ascii(name)[:80]}; expected a name without slashes, such as 'train'")
    return name


def lock_of(store: Place, part: str = "") -> Lock | NoLock:
    """A lock that dies with its process; its file is beside the store, whose own files are then always the same."""
    if isinstance(store, Remote):
        return NoLock()
    store.parent.mkdir(parents=True, exist_ok=True)
    return Lock(store.with_name(f".{store.name}{part}.lock"))


def locks_of(store: Place) -> list[Path]:
    """Lock files of a store, held or left behind."""
    return [] if isinstance(store, Remote) else sorted(store.parent.glob(f".{escape(store.name)}.*lock"))


def held(file: Path) -> bool:
    """Does a living process hold this lock? True also where that cannot be known."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except OSError:  # a Timeout, a file that is not ours to open, or a disk without locks
        return True


def drop_lock(file: Path) -> bool:
    """Remove a lock's file; False where a living process may hold it."""
    lock = FileLock(file)
    try:
        with lock.acquire(timeout=0):
            unlink(lock)
    except OSError:
        return False
    return True


def unlink(lock: FileLock | Lock | NoLock) -> None:
    """Remove the file of a lock that we hold: who waits for it sees that it is gone, and makes a new one."""
    if lock.is_locked:
        with suppress(OSError):  # Windows keeps open files
            os.unlink(lock.lock_file)


class Lock:
    """A `FileLock`; on a disk without locks, or where its file is not ours to open, it warns and locks nothing."""

    def __init__(self, file: Path):
        self.lock_file, self._lock = str(file), FileLock(file, thread_local=False)

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def acquire(self, timeout: float = -1) -> Lock:
        """Timeout where another process holds it."""
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            raise
        except OSError as error:
            file = Path(self.lock_file)
            if error.errno in WITHOUT_LOCKS:
                with suppress(OSError):
                    file.unlink()  # it guards nothing
                what = f"{file.parent} has no locks"  # told once a folder
            elif isinstance(error, PermissionError) and file.exists():
                what = f"{file} cannot be locked by this user"
            else:
                raise
            advice = "continuing without a lock, so no other process may write into this store"
            warnings.warn(f"{what} ({error.strerror}); {advice}", stacklevel=3)
        return self

    def release(self) -> None:
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_) -> None:
        self.release()


class NoLock:
    """In the place of a lock where there are none."""

    lock_file, is_locked = "", False

    def acquire(self, timeout: float = -1) -> NoLock:
        return self

    def release(self) -> None:
        pass

    __enter__ = acquire

    def __exit__(self, *_) -> None:
        pass


ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def place(path: str | Place) -> Place:
    """A local path, also by file:///path and ~/path, or the place on an object store that an address names.

    Raises ValueError for an address that pyarrow has no filesystem for, and for the home folder of nobody.
    """
    if isinstance(path, Remote):
        return path
    if isinstance(path, str) and ADDRESS.match(path) and not OF_THIS_DISK.fullmatch(path):
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
        self.system, self.key = system, key.rstrip("/")
        self.root = root

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
