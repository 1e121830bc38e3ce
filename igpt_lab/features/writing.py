"""The feature store, written: by several processes at once, any of which may be killed at any moment.

A part is written to a temporary file, flushed and renamed; then the manifest that lists it. A lock of the store is held
for that, a lock of a part while it is computed. docs/feature-store.md has the rules in full.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from filelock import Timeout

from igpt_lab.core.provenance import atomic_write, digest, made_by, unlike
from igpt_lab.core.storage import Lock, NoLock, Place, as_name, drop_lock, lock_of, locks_of, place, readable, unlink
from igpt_lab.features.manifest import FeatureKey, StoreError, StoreFolder, digest_of, read_manifest
from igpt_lab.features.parts import bytes_of
from igpt_lab.features.store import FeatureStore


class StoreWriter(StoreFolder):
    """Adds parts to the store of a key. It claims a part, computes it elsewhere, and writes it whole."""

    def __init__(self, path: str | Place, manifest: dict):
        super().__init__(path, manifest)
        self._claims: dict[tuple[str, int], Lock | NoLock] = {}
        self.doubted: dict[tuple[str, int], object] = {}  # parts to write anew, by their `state`
        self._leave: weakref.finalize | None = None

    @classmethod
    def create(
        cls, root: str | Place, key: FeatureKey, parts: dict[str, int], *, source: dict | None = None,
        classes: Sequence[str] = (),
    ) -> StoreWriter:  # fmt: skip
        """A writer for the store of `key` under `root`, with what is already in it.

        A manifest that is unreadable, or not of this key, is begun anew. What a killed writer left behind is removed.
        Nothing but a lock is written before the first part: it shows until `close` that a process is at this store. A
        complete store whose parts are cut at other rows is taken as it is.

        Args:
            root: Folder of the stores, or the address of one on an object store.
            key: What the store is of.
            parts: Number of parts of each split.
            source: Where model and images came from, for a repair.
            classes: Names of the classes in the order of their numbers.

        Returns:
            The writer; `close` it in the end.

        Raises:
            StoreError: A store with parts of other rows is not complete; nothing is changed.
            ValueError: A split whose name cannot be that of a folder.

        Example:
            >>> from contextlib import closing
            >>> from igpt_lab.features.manifest import FeatureKey
            >>> parts = {"train": 1, "test": 1}
            >>> with closing(lab.StoreWriter.create("stores", FeatureKey(**store.key), parts)) as writer:
            ...     print(writer.whole("test", 0), writer.path.name == store.path.name)  # `extract` wrote it
            True True
        """
        splits = {as_name(split, "a split"): [None] * count for split, count in parts.items()}
        named = {"classes": list(classes)} if classes else {}
        manifest = {"key": key.plain(), **named, "versions": made_by(), "source": source, "splits": splits}
        writer = cls(place(root) / key.folder(), manifest)
        writer._enter()
        writer.refresh()
        writer._take_other_cut()
        writer._forget_wrong_rows()
        writer._clean()
        return writer

    def reader(self) -> FeatureStore:
        """The store with the parts that are listed by now; others may be to come."""
        return FeatureStore(self.path, self.manifest)

    def claims(self, todo: Iterable[tuple[str, int]]) -> Generator[tuple[str, int] | None, None, None]:
        """Those parts of `todo` that are this process's to compute: it holds each until `write_part` or `close`.

        The loop's end gives none back, as who prepares parts ahead is still at the last ones; a loop that is closed
        before its end gives all back. A part that is `whole` when it is claimed is left out: another process
        finished it. Those that others are at come
        last, when they are finished, or their process is gone; None says that there is nothing but those. Two processes
        that compute one part in spite of this write the same.
        """
        waiting = list(todo)
        try:
            while waiting:
                elsewhere = []
                for part in waiting:
                    if not self._claim(part):
                        elsewhere.append(part)
                    elif self.whole(*part):
                        self._give_back(part)
                    else:
                        yield part
                if elsewhere and len(elsewhere) == len(waiting):
                    time.sleep(0.05)
                    if self._claims:  # whoever prepares parts ahead ends its own before it waits for those of others
                        yield None
                waiting = elsewhere
        except BaseException:
            self.close()
            raise

    def whole(self, split: str, number: int) -> bool:
        """`has` it, and no longer in the state in which it was doubted."""
        return self.has(split, number) and self.doubted.get((split, number)) != (True, self.listed(split)[number])

    def _claim(self, part: tuple[str, int]) -> bool:
        """Take a part's lock; False where another process holds it. StoreError where it would be written elsewhere."""
        split, number = part
        folder = self.path / split
        if isinstance(folder, Path) and folder.is_symlink():
            raise StoreError(f"{folder} is a link, so parts would go into another folder; put a folder in its place")
        lock = lock_of(self.path, f".{split}.{number}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._claims[part] = lock
        return True

    def _give_back(self, part: tuple[str, int]) -> None:
        lock = self._claims.pop(part, None)
        if lock is not None:
            unlink(lock)
            lock.release()

    def close(self) -> None:
        """Give back what this process has claimed and not written, and show that it is gone from this store."""
        for part in list(self._claims):
            self._give_back(part)
        if self._leave is not None and self._leave():  # the first time: it runs once
            self._drop_locks()

    def write_part(
        self,
        split: str,
        number: int,
        index: np.ndarray,
        labels: np.ndarray | None,
        features: dict[str, np.ndarray],
        stats: dict[str, list[float]],
        skipped: Sequence[tuple[int, str]] = (),
        *,
        listed: bool = True,
    ) -> dict:
        """Write one part whole, then the manifest with it and all that other processes have listed by then.

        Args:
            split: Name of the split.
            number: Number of the part, from 0.
            index: int64 (rows,), row of each image in its source.
            labels: int64 (rows,), or None.
            features: `<point>.<layer>` -> float32 (rows, D), the layers of the key.
            stats: `<point>.<layer>` -> [max |x|, share of exact zeros, count of non-finite values] before pooling.
            skipped: (row in the source, reason) of the part's images that could not be read.
            listed: Write the manifest too; else what is returned is for `list_part` to put there.

        Returns:
            What the manifest lists of this part: `rows`, `sha256`, `stats`, `skipped` where there are any, and `entry`,
            their digest.

        Raises:
            ValueError: Features of other layers than the key's.
            StoreError: Other versions of code or packages began this store.
            OSError: There is no room; what was finished stays.

        Example:
            >>> from contextlib import closing
            >>> from igpt_lab.features.manifest import FeatureKey
            >>> features = {f"ln_1.{layer}": store.layer("ln_1", layer, "test") for layer in range(4)}
            >>> stats = {name: [float(np.abs(x).max()), 0.0, 0] for name, x in features.items()}
            >>> parts = {"train": 1, "test": 1}
            >>> with closing(lab.StoreWriter.create("copies", FeatureKey(**store.key), parts)) as writer:
            ...     entry = writer.write_part("test", 0, store.index("test"), store.labels("test"), features, stats)
            >>> entry["rows"], sorted(entry)
            (100, ['entry', 'rows', 'sha256', 'stats'])
        """
        data, entry = self._made(index, labels, features, stats, skipped)
        with self._room_for(split, number):
            if listed:
                self._list(split, number, entry, data)
            else:
                atomic_write(self.part(split, number), data)
        self._give_back((split, number))
        return entry

    def list_part(self, split: str, number: int, entry: dict) -> None:
        """Count a part that another machine has written; OSError where its file is not the same here."""
        path = self.part(split, number)
        if not path.is_file() or pq.read_metadata(readable(path)).num_rows != entry["rows"]:
            raise OSError(
                f"{path} was written by a worker, and is not visible here; "
                "put the store on a disk that all workers share"
            )
        with self._room_for(split, number):
            self._list(split, number, entry)
        self._give_back((split, number))

    def _made(self, index, labels, features, stats, skipped) -> tuple[bytes, dict]:
        """A part's file, and what the manifest lists of it."""
        names = [f"{point}.{layer}" for point, layers in self.layers.items() for layer in layers]
        if set(names) != set(features):
            raise ValueError(f"features of {sorted(features)}; the key of {self.path.name} has {names}")
        data = bytes_of(index, labels, {name: features[name] for name in names})
        entry = {"rows": len(index), "sha256": digest(data), "stats": {name: _json(stats[name]) for name in stats}}
        if skipped:
            entry["skipped"] = [[int(row), str(reason)] for row, reason in skipped]
        return data, entry | {"entry": digest_of(entry)}

    @contextmanager
    def _room_for(self, split: str, number: int) -> Iterator[None]:
        """`alone`, and an OSError that says what is kept."""
        try:
            with self.alone():
                yield
        except OSError as error:
            why = f"{error.strerror or error}: {self.part(split, number)} was not written"
            raise OSError(
                error.errno, f"{why}; finished parts are kept; give the same command again to continue"
            ) from error

    def _list(self, split: str, number: int, entry: dict, data: bytes | None = None) -> None:
        """A part's file, from `data` if any, and the manifest that lists it; neither if there is no room for both."""
        self.refresh(always=True)
        self.refuse_other_versions()
        before, path = self.manifest["splits"][split], self.part(split, number)
        parts = [*before[:number], entry, *before[number + 1 :]]
        manifest = self.manifest | {"splits": self.manifest["splits"] | {split: parts}}
        if not self._begun():
            manifest["versions"] = made_by()
        if data is not None:
            atomic_write(path, data)
        try:
            self._write(manifest)
        except BaseException:
            if before[number] is None and data is not None:
                path.unlink(missing_ok=True)
            raise
        self.manifest = manifest

    def _write(self, manifest: dict) -> None:
        atomic_write(self.path / "manifest.json", json.dumps(manifest, indent=1, allow_nan=False) + "\n")

    def refuse_other_versions(self) -> None:
        """StoreError where parts are there that other code or packages wrote: their last bits may be others."""
        differing = unlike(made_by(), self.manifest.get("versions") or {})
        if differing and self._begun():
            raise StoreError(
                f"{self.path} was begun by other versions: {differing}; finish it with those, or delete it and extract "
                "again"
            )

    def _begun(self) -> bool:
        return any(part for parts in self.manifest["splits"].values() for part in parts)

    def _take_other_cut(self) -> None:
        """The manifest of a whole store in parts of other rows; StoreError where some are whole, and lost if not."""
        if self._begun():
            return
        try:
            other = StoreFolder(self.path, read_manifest(self.path))
        except StoreError:
            return
        if other.key != self.key:
            return
        if not other.problems():
            self.manifest = other.manifest
        elif any(other.has(split, number) for split in other.splits for number in range(len(other.listed(split)))):
            raise StoreError(
                f"{self.path} is not complete, and its parts have other rows than this extraction would write; "
                "finish it as it was begun, or delete it and extract again"
            )

    def _forget_wrong_rows(self) -> None:
        """Of a split whose parts are whole and yet do not give its rows, no part can be trusted."""
        for split, (_, rows) in self.key["splits"].items():
            numbers = range(len(self.listed(split)))
            complete = all(self.listed(split)) and self.rows_covered(split) != rows
            if complete and all(self.has(split, number) for number in numbers):
                self.manifest["splits"][split] = [None for _ in numbers]
                with self.alone():
                    self._write(self.manifest)

    def _enter(self) -> None:
        """Show by a lock that a process is at this store, before it looks what is there; `prune` waits for its end."""
        with suppress(OSError):  # a folder that cannot be written to
            presence = lock_of(self.path, f".writer-{secrets.token_hex(4)}")
            with self.alone():
                presence.acquire()
            self._leave = weakref.finalize(self, _leave, presence)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process writes into this store inside this `with` block."""
        lock = lock_of(self.path)
        with lock:
            try:
                yield
            finally:
                unlink(lock)

    def _temporary(self) -> Iterator[Path]:
        """Files that a writer has not yet renamed, or left behind."""
        if isinstance(self.path, Path):
            yield from filter(self.is_ours, self.path.glob("**/.*.tmp"))

    def _clean(self) -> None:
        """Remove temporary files and locks of killed writers; the living write, and claim, under a lock."""
        with suppress(OSError):  # a folder that cannot be written to
            if any(self._temporary()):
                with self.alone():
                    for file in self._temporary():
                        file.unlink(missing_ok=True)
            self._drop_locks()

    def _drop_locks(self) -> None:
        """Remove those of killed processes; the living hold theirs."""
        for lock in locks_of(self.path):
            drop_lock(lock)


def _leave(presence: Lock | NoLock) -> bool:
    unlink(presence)
    presence.release()
    return True


def _json(numbers: Sequence[float]) -> list:
    """Numbers as JSON has them; what is not finite by its name, "inf" or "nan"."""
    return [number if math.isfinite(number) else str(float(number)) for number in numbers]
