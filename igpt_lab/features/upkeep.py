"""What keeps feature stores in order: list them, verify and repair one, prune what is of no use."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from igpt_lab.core.provenance import digest
from igpt_lab.core.storage import Place, drop_lock, held, locks_of, place, unlink
from igpt_lab.features import form, prepared
from igpt_lab.features.manifest import FORMAT, PART_FILE, StoreError, digest_of, read_manifest, stores_in
from igpt_lab.features.origins import sources_of
from igpt_lab.features.parts import wrong_type
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.loading import load_again
from igpt_lab.models import loading

FOLDER = re.compile(r".+-[0-9a-f]{8}")
PIECE = 1 << 16  # rows of a part's index that are read at once
HOUR = 3600  # seconds; whoever writes tokens is done long before
LOCK = re.compile(r"\..+-[0-9a-f]{8}(\.[^/]+\.\d+|\.writer-[0-9a-f]{8})?\.lock")


def list_stores(root: str | Path) -> pd.DataFrame:
    """A row for each store under `root`: its name, MB, rows, layers, alignment, pool, key8 and whether it is complete.

    No digest is computed. A store that cannot be read says so in `state`. Raises ValueError when there is no such
    folder.
    """
    rows: list[tuple] = []
    for path in stores_in(_folder(root)):
        try:
            rows.append(_about(FeatureStore(path, read_manifest(path))))
        except (StoreError, OSError) as error:
            rows.append((path.name, None, "", "", "", "", path.name[-8:], str(error)))
    return pd.DataFrame(rows, columns=["store", "MB", "rows", "layers", "alignment", "pool", "key8", "state"])


def _about(store: FeatureStore) -> tuple:
    parts = [(split, n) for split in store.splits for n in range(len(store.listed(split)))]
    there = sum(store.has(*part, verify=False) for part in parts)
    counts = ", ".join(f"{split} {rows:,}" for split, (_, rows) in store.key["splits"].items())
    layers = ", ".join(f"{point} {len(layers)}" for point, layers in store.layers.items())
    state = "complete" if there == len(parts) else f"{there} of {len(parts)} parts"
    settings = store.key["alignment"], store.key["pool"]
    return store.path.name, store.size / 1e6, counts, layers, *settings, digest(store.key)[:8], state


def verify(path: str | Path) -> list[tuple[str, int, str]]:
    """(split, number of the part, problem) of everything in a store that is not as its manifest and its key say.

    Recomputes every digest, counts rows, and looks at each part's columns and at `index`, where no row may come twice.
    Raises StoreError when there is no manifest to go by.
    """
    store, problems = FeatureStore(path, read_manifest(_folder(path))), []
    for split in store.splits:
        before: set[int] = set(store.skipped(split)["row"])
        parts = store.manifest["splits"][split]
        for number in range(len(parts)):
            problems += [(split, number, problem) for problem in _problems_of(store, split, number, before)]
        if all(parts) and store.rows_covered(split) != store.key["splits"][split][1]:
            covered, rows = store.rows_covered(split), store.key["splits"][split][1]
            problem = f"{split} has {covered} rows in its parts, {rows} in its key"
            problems += [(split, number, problem) for number in range(len(parts))]
    return problems


def _problems_of(store: FeatureStore, split: str, number: int, before: set[int]) -> Iterator[str]:
    """All that is wrong with a part; `before` holds the rows of those before it, and gets this one's."""
    listed, path = store.manifest["splits"][split][number], store.part(split, number)
    if listed is None:
        yield f"{path} is not finished"
        return
    if not path.is_file():
        yield f"{path} is missing"
        return
    try:
        sha256 = digest(path)
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror or error}"
        return
    if sha256 != listed["sha256"]:
        yield f"{path} has the digest {sha256[:8]}, the manifest lists {listed['sha256'][:8]}"
    elif listed.get("entry", digest_of(listed)) != digest_of(listed):
        yield f"{path}: rows, stats or skipped rows in the manifest are not as they were listed"
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            rows, wrong = file.metadata.num_rows, _wrong_columns(file.schema_arrow, store)
            fits = rows == listed["rows"] and not wrong  # what does not may be of any size
            again = _bad_row(file, before) if fits else None
    except (pa.ArrowException, OSError, ValueError) as error:
        yield f"{path} is not readable as Parquet: {str(error).partition(chr(10))[0]}"
        return
    if rows != listed["rows"]:
        yield f"{path} has {rows} rows, the manifest lists {listed['rows']}"
    if wrong:
        yield f"{path} {wrong}"
    if again is not None:
        yield f"{path}: `index` has a row twice, or one that was skipped: {again}"


def _bad_row(file: pq.ParquetFile, before: set[int]) -> int | None:
    """The first of `index` that is in `before`, comes twice, or is no row; None, and all are in `before`, without."""
    for piece in file.iter_batches(PIECE, columns=["index"], use_threads=False):
        index, counts = np.unique(piece.column(0).to_numpy(zero_copy_only=False), return_counts=True)
        rows = set(index.tolist())
        if bad := sorted(before & rows) or index[(counts > 1) | ~(index >= 0)].tolist():
            return bad[0]
        before.update(rows)
    return None


def _wrong_columns(schema: pa.Schema, store: FeatureStore) -> str:
    """What differs from the columns of the key, or ''."""
    layers = [f"{point}.{layer}" for point, stored in store.layers.items() for layer in stored]
    if sorted(schema.names) != sorted(["index", "label", *layers]):
        return f"has the columns {schema.names}, the key index, label, {', '.join(layers)}"
    kinds = {name: schema.field(name).type for name in schema.names}
    wrong = [text for name in ("index", "label", *layers) if (text := wrong_type(name, kinds[name]))]
    if wrong:
        return wrong[0]
    for point, stored in store.layers.items() if not store.names else ():  # modules may be of any width
        widths = sorted({kinds[f"{point}.{layer}"].list_size for layer in stored})
        if len(widths) > 1:
            return f"has layers of different width: {widths}"
    return ""


def repair(path: str | Path, problems: list[tuple[str, int, str]], *, remote: bool = False) -> FeatureStore:
    """Recompute the parts that `verify` named, from the model and the images that the manifest names.

    A manifest may be a stranger's: of its options only the fields of `ExtractionSettings` are used, so it names no
    cluster and no folder; what is not on this disk (`sources_of(path).remote`) is asked for where `remote` allows it.
    Each part is replaced when it is computed anew, and left where another process has mended it by then. Raises
    StoreError, and leaves everything as it is, where model, images or settings are not named, not allowed, or are no
    longer what they were.
    """
    path = _folder(path).resolve()
    store = FeatureStore(path, read_manifest(path))
    if store.names:
        raise StoreError(
            f"{path} is of a network that no name loads; run the same extraction again, which makes its bad parts anew"
        )
    sources = sources_of(path)
    if sources.remote and not remote:
        raise StoreError(
            f"{path} cannot be repaired: its manifest names {', '.join(sources.remote)}, which is not on this disk; "
            "allow it with remote=True (--yes) if you trust it. Nothing was changed"
        )
    doubted = {(split, number): store.state(split, number) for split, number, _ in problems}
    about = dict(sources.model)
    model = loading.load_model(about.pop("name"), **about)
    splits = [load_again(images, split) for split, images in sources.images.items()]
    try:
        mending = prepared.prepare(model, splits, sources.settings, store=path.parent)
    except ValueError as error:
        raise StoreError(f"{path} cannot be repaired: {error}; nothing was changed") from error
    if differs := mending.key.differences(store.key):
        raise StoreError(f"{path} cannot be repaired: of its model and images, {differs}; nothing was changed")
    if path.name != mending.key.folder():
        raise StoreError(f"{path} was renamed; name it again as it was written, to repair it: {mending.key.folder()}")
    return mending.run(lambda writer, todo: mending.here(writer, todo, None, True), doubted)


@dataclass(frozen=True)
class Leftover:
    """Files of no use: `what` they are, where, of which store's folder, None where of none, and their bytes."""

    what: str
    path: Path
    files: tuple[Path, ...]
    store: Path | None = None

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files if file.exists())


def leftovers(root: str | Path) -> list[Leftover]:
    """What `prune` would delete under `root`: incomplete stores, temporary files, parts that no manifest lists, locks.

    Only what carries our mark: a manifest with every field of a key of this format, or, where a first part was just
    written, a folder named by a key with parts of our columns and nothing else. A store that a living process is at is
    left out.
    """
    useless = [leftover for path in _folders(root) if not _busy(path) for leftover in _leftovers_of(path)]
    locks = [file for file in sorted(_folder(root).glob(".*.lock")) if LOCK.fullmatch(file.name)]
    for file in locks:
        if not file.is_symlink() and not file.stat().st_size and not held(file):
            useless.append(Leftover("lock of a process that is gone", file, (file,)))
    tokens = [file for file in sorted(_folder(root).glob("tokens/*/.part-*.tmp")) if FOLDER.fullmatch(file.parent.name)]
    linked = [any(map(Path.is_symlink, (file, file.parent, file.parent.parent))) for file in tokens]
    tokens = [file for file, is_linked in zip(tokens, linked, strict=True) if not is_linked and file.is_file()]
    old = [file for file in tokens if time.time() - file.stat().st_mtime > HOUR]
    return useless + [Leftover("temporary file", file, (file,)) for file in old]


def not_ours(root: str | Path) -> list[tuple[Path, str]]:
    """(path, why) of what lies among the stores and `prune` passes over: other folders, and stray files in stores."""
    passed = []
    for path in _folders(root):
        try:
            if _busy(path):
                passed.append((path, "a process uses it, or its lock cannot be opened"))
            if _marked(path):
                store = FeatureStore(path, read_manifest(path))
                files = (file for file in sorted(path.rglob("*")) if not file.is_dir() and not store.is_ours(file))
                passed += [(file, "is not a file of this store") for file in files]
            elif ((path / "manifest.json").exists() or FOLDER.fullmatch(path.name)) and not _begun(path):
                passed.append((path, "was not written by igpt-lab"))
        except (StoreError, OSError) as error:
            passed.append((path, f"cannot be read: {error}"))
    return passed


def _folders(root: str | Path) -> list[Path]:
    return sorted(path for path in _folder(root).iterdir() if path.is_dir() and not path.is_symlink())


def _busy(path: Path) -> bool:
    """Is a living process at this store?"""
    return any(map(held, locks_of(path)))


def _marked(path: Path) -> bool:
    """Has it a manifest with every field of a key, of this format?"""
    file = path / "manifest.json"
    try:
        key = json.loads(file.read_text(encoding="utf-8"))["key"] if file.is_file() else {}  # a pipe would wait
        fields = {name for name in form.KEY if not name.endswith("?")}
        return fields <= set(key) and key["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _begun(path: Path) -> tuple[Path, ...]:
    """The files of a store that was killed before its first manifest; none where one of them may be another's."""
    files = [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]
    parts = [file for file in files if PART_FILE.fullmatch(file.name) and file.parent.parent == path]
    whole = [file for file in parts if file.suffix == ".parquet"]
    if FOLDER.fullmatch(path.name) and whole and parts == files and all(map(_has_our_columns, whole)):
        return tuple(files)
    return ()


def _has_our_columns(file: Path) -> bool:
    layer = re.compile(r".+\.\d+")
    try:
        schema = pq.read_schema(file)
        names, wrong = schema.names, any(wrong_type(column.name, column.type) for column in schema)
    except (pa.ArrowException, OSError, ValueError):
        return False
    return names[:2] == ["index", "label"] and len(names) > 2 and all(map(layer.fullmatch, names[2:])) and not wrong


def _leftovers_of(path: Path) -> list[Leftover]:
    """Of one store, as it is now."""
    if not _marked(path):
        begun = () if (path / "manifest.json").exists() else _begun(path)
        return [Leftover("incomplete store", path, begun, path)] if begun else []
    try:
        store = FeatureStore(path, read_manifest(path))
    except StoreError:
        return []  # its parts may be whole: `not_ours` names it
    files = [
        file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink() and store.is_ours(file)
    ]
    if store.problems(verify=False):
        last = [path / "manifest.json"]  # whoever ends this before its end leaves our mark
        return [Leftover("incomplete store", path, (*(file for file in files if file not in last), *last), path)]
    listed: set[Place] = {path / "manifest.json"}
    listed |= {store.part(split, n) for split in store.splits for n in range(len(store.listed(split)))}
    kinds = {".tmp": "temporary file", ".parquet": "part that the manifest does not list"}
    return [Leftover(kinds[file.suffix], file, (file,), path) for file in files if file not in listed]


def remove(leftover: Leftover) -> bool:
    """Delete what of it is still of no use, and the folders that are empty then; False where a process may be at it.

    Nobody begins to write into the store meanwhile: its lock is held from this look at it to the end.
    """
    if leftover.store is None:
        if LOCK.fullmatch(leftover.path.name):
            return drop_lock(leftover.path)
        leftover.path.unlink(missing_ok=True)
        return True
    lock = FileLock(leftover.store.with_name(f".{leftover.store.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except OSError:  # a Timeout, a lock that is not ours to open, or a disk without locks
        return False
    try:
        if any(held(file) for file in locks_of(leftover.store) if file != Path(lock.lock_file)):
            return False
        useless = {file for now in _leftovers_of(leftover.store) for file in now.files}
        _delete([file for file in leftover.files if file in useless], leftover.store)
    finally:
        unlink(lock)
        lock.release()
    return True


def _delete(files: list[Path], store: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    if files and not (store / "manifest.json").exists():
        for folder in [*(path for path in store.iterdir() if path.is_dir()), store]:
            with suppress(OSError):  # it holds something of another's
                folder.rmdir()


def _folder(path: str | Path) -> Path:
    folder = place(path)
    if not (isinstance(folder, Path) and folder.is_dir()):
        raise StoreError(f"there is no folder {path}")
    return folder
