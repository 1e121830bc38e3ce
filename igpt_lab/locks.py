"""Locks that die with their process, in files beside what they guard: of a store, or of one of its parts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from igpt_lab.storage import Remote


def lock_of(store: Path, part: str = "") -> FileLock:
    """A lock that dies with its process, in a file beside the store: the store's own files are the same ever."""
    if isinstance(store, Remote):
        return NoLock()
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(store.with_name(f".{store.name}{part}.lock"), thread_local=False)


def locks_of(store: Path) -> list[Path]:
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


def unlink(lock: FileLock) -> None:
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
