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

from igpt_lab.core.provenance import digest
from igpt_lab.core.storage import Place, drop_lock, held, locks_of
from igpt_lab.features import extraction
from igpt_lab.features.manifest import FORMAT, StoreError, read_manifest, stores_in
from igpt_lab.features.settings import ExtractionSettings, extraction_key
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet, load_images
from igpt_lab.models import loading
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

FOLDER = re.compile(r".+-[0-9a-f]{8}")
OURS = re.compile(r"manifest\.json|[^/]+/part-\d{5}-of-\d{5}\.parquet|([^/]+/)?\.[^/]+\.tmp")
HOUR = 3600  # seconds; whoever writes tokens is done long before
LOCK = re.compile(r"\..+-[0-9a-f]{8}(\.[^/]+\.\d+)?\.lock")


def list_stores(root: str | Path) -> pd.DataFrame:
    """A row for each store under `root`: its name, MB, rows, layers, key8 and whether it is complete.

    No digest is computed. Raises ValueError when there is no such folder.
    """
    rows: list[tuple] = []
    for path in stores_in(_folder(root)):
        try:
            store = FeatureStore(path, read_manifest(path))
        except StoreError as error:
            rows.append((path.name, None, "", "", path.name[-8:], str(error)))
            continue
        parts = [(split, n) for split in store.splits for n in range(len(store.manifest["splits"][split]))]
        there = sum(store.has(*part, verify=False) for part in parts)
        counts = ", ".join(f"{split} {rows:,}" for split, (_, rows) in store.key["splits"].items())
        layers = ", ".join(f"{point} {len(layers)}" for point, layers in store.layers.items())
        state = "complete" if there == len(parts) else f"{there} of {len(parts)} parts"
        rows.append((path.name, store.size / 1e6, counts, layers, digest(store.key)[:8], state))
    return pd.DataFrame(rows, columns=["store", "MB", "rows", "layers", "key8", "state"])


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
    sha256 = digest(path)
    if sha256 != listed["sha256"]:
        yield f"{path} has the digest {sha256[:8]}, the manifest lists {listed['sha256'][:8]}"
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
            index = file.read(["index"], use_threads=False).column(0).to_numpy() if "index" in schema.names else []
    except (pa.ArrowException, OSError, ValueError) as error:
        yield f"{path} is not readable as Parquet: {str(error).splitlines()[0]}"
        return
    if rows != listed["rows"]:
        yield f"{path} has {rows} rows, the manifest lists {listed['rows']}"
    if wrong := _wrong_columns(schema, store):
        yield f"{path} {wrong}"
    again = sorted(before & set(index)) or [row for row in index if row < 0]
    if again or len(np.unique(index)) < len(index):
        yield f"{path}: `index` has a row twice, or one that was skipped: {(again or sorted(index))[0]}"
    before.update(index)


def _wrong_columns(schema: pa.Schema, store: FeatureStore) -> str:
    """What differs from the columns of the key, or ''."""
    layers = [f"{point}.{layer}" for point, stored in store.layers.items() for layer in stored]
    if set(schema.names) != {"index", "label", *layers} or len(schema.names) != 2 + len(layers):
        return f"has the columns {schema.names}, the key index, label, {', '.join(layers)}"
    kinds = {name: schema.field(name).type for name in schema.names}
    wrong = [name for name in ("index", "label") if kinds[name] != pa.int64()]
    wrong += [name for name in layers if not pa.types.is_fixed_size_list(kinds[name])]
    wrong += [name for name in layers if name not in wrong and kinds[name].value_type != pa.float32()]
    if wrong:
        return f"has {wrong[0]} as {kinds[wrong[0]]}"
    widths = {kinds[name].list_size for name in layers}
    return f"has layers of different width: {sorted(widths)}" if len(widths) > 1 else ""


def repair(path: str | Path, problems: list[tuple[str, int, str]]) -> FeatureStore:
    """Recompute the parts that `verify` named, from the model and the images that the manifest names.

    A manifest may be a stranger's: of its options only the fields of `ExtractionSettings` are used, so it names no
    cluster and no folder. Raises StoreError, and leaves everything as it is, where model, images or settings are not
    named, or are no longer what they were.
    """
    path = Path(path).resolve()
    store = FeatureStore(path, read_manifest(path))
    model, splits, settings = _sources_of(store)
    try:
        key = extraction_key(model, splits, settings)
    except ValueError as error:
        raise StoreError(f"{path} cannot be repaired: {error}; nothing was changed") from error
    if differs := key.differences(store.key):
        raise StoreError(f"{path} cannot be repaired: of its model and images, {differs}; nothing was changed")
    if path.name != key.folder():
        raise StoreError(f"{path} was renamed; a repair needs its own name, {key.folder()}")
    for split, number, _ in problems:
        store.part(split, number).unlink(missing_ok=True)
    return extraction.extract(model, splits, store=path.parent, **settings.options())


def _sources_of(
    store: FeatureStore,
) -> tuple[ImageGPTForCausalImageModeling, list[ImageSet | TokenSet], ExtractionSettings]:
    """Model, splits and settings that a store's manifest names; StoreError where it does not."""
    source = store.manifest.get("source") or {}
    about, images, options = source.get("model"), source.get("images") or {}, source.get("options")
    if not about or not all(images.get(split) for split in store.splits) or not options:
        raise StoreError(f"{store.path} does not say where its model and images are; run the same extraction again")
    try:
        settings = ExtractionSettings.from_options(options)
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{store.path} cannot be repaired: its options are wrong, {error}") from error
    about = dict(about)
    model = loading.load_model(about.pop("name"), **about)
    splits = [load_images(**images[split], split=split) for split in store.splits]
    return model, splits, settings


@dataclass(frozen=True)
class Leftover:
    """Files of no use: `what` they are, where, and their bytes."""

    what: str
    path: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files if file.exists())


def leftovers(root: str | Path) -> list[Leftover]:
    """What `prune` would delete under `root`: incomplete stores, temporary files, parts that no manifest lists, locks.

    A store that a living process is at is left out, and so is one of another format, and every file that is not ours.
    """
    useless = []
    for path in sorted(path for path in _folder(root).iterdir() if path.is_dir() and not path.is_symlink()):
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        ours = [file for file in files if OURS.fullmatch(file.relative_to(path).as_posix())]
        begun = (path / "manifest.json").is_file() or (FOLDER.fullmatch(path.name) and len(ours) == len(files))
        if begun and not any(map(held, locks_of(path))):
            useless += _leftovers_of(path, ours)
    locks = [file for file in sorted(Path(root).glob(".*.lock")) if LOCK.fullmatch(file.name) and not held(file)]
    useless += [Leftover("lock of a process that is gone", file, (file,)) for file in locks]
    tokens = [file for file in sorted(Path(root).glob("tokens/*/.*.tmp")) if time.time() - file.stat().st_mtime > HOUR]
    return useless + [Leftover("temporary file", file, (file,)) for file in tokens]


def _leftovers_of(path: Path, ours: list[Path]) -> list[Leftover]:
    with suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads((path / "manifest.json").read_text(encoding="utf-8"))["key"]["format"] != FORMAT:
            return []
    try:
        store = FeatureStore.open(path, verify=False)
    except StoreError:
        return [Leftover("incomplete store", path, tuple(ours))]
    listed: set[Place] = {path / "manifest.json"}
    listed |= {store.part(split, n) for split in store.splits for n in range(len(store.manifest["splits"][split]))}
    kinds = {".tmp": "temporary file", ".parquet": "part that the manifest does not list"}
    return [Leftover(kinds[file.suffix], file, (file,)) for file in ours if file not in listed]


def remove(leftover: Leftover) -> None:
    """Delete these files, and the folders that are empty then."""
    if leftover.path.suffix == ".lock":
        drop_lock(leftover.path)
        return
    for file in leftover.files:
        file.unlink(missing_ok=True)
    if leftover.path.is_dir():
        for folder in sorted(leftover.path.rglob("*"), reverse=True) + [leftover.path]:
            with suppress(OSError):  # it holds something of another's
                folder.rmdir()


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise StoreError(f"no folder {path}")
    return Path(path)
