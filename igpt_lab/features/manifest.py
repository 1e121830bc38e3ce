"""What a feature store is of, and what it lists: the key, the manifest, and the folder of parts that both belong to."""

from __future__ import annotations

import json
import re
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core.provenance import digest, named
from igpt_lab.core.storage import Place, Remote, as_name, place, readable
from igpt_lab.features import form

FORMAT = 1
PART_FILE = re.compile(r"part-\d{5,}-of-\d{5,}\.parquet|\.part-\d{5,}-of-\d{5,}\.parquet\.[^/]+\.tmp")
MANIFEST_FILE = re.compile(r"manifest\.json|\.manifest\.json\.[^/]+\.tmp")
_READING = threading.Lock()  # of manifests, by the threads of this process


class StoreError(ValueError):
    """A store that is not whole; the message names the part and says what to do."""


@dataclass(frozen=True)
class FeatureKey:
    """Everything that changes a stored number. `splits` maps a split to (fingerprint of its images, rows)."""

    model: str
    weights: str
    palette: str
    size: int
    resample: str
    crop: str
    images: str
    splits: dict[str, tuple[str, int]]
    layers: dict[str, list[int]]
    pool: str
    alignment: str
    dtype: str
    format: int = field(default=FORMAT)
    modules: tuple[str, ...] = ()  # of a network that is no ImageGPT: the names of its layers 0, 1, ...
    preprocess: str = ""  # of such a network: a digest of what its `preprocess` makes of a picture

    def __post_init__(self):
        """Layers in any order, or twice, are the same features; ValueError for a split or point that is no name."""
        for what, names in (("a split", self.splits), ("a point", self.layers)):
            for name in names:
                as_name(name, what)
        layers = {point: np.unique(self.layers[point]).tolist() for point in sorted(self.layers)}
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "modules", tuple(self.modules))

    def plain(self) -> dict:
        """The fields as a manifest holds them: plain JSON, tuples as lists; without those that an ImageGPT has not."""
        held = {name: value for name, value in asdict(self).items() if value or name not in ("modules", "preprocess")}
        return json.loads(json.dumps(held))

    def folder(self) -> str:
        """`<model>-<images>-<key8>`, safe as a folder's name."""
        return named(self.model, self.images, key=self.plain())

    def nearest(self, root: str | Place) -> tuple[Place, list[tuple[str, object, object]]] | None:
        """Of the stores under `root` the one that differs in the fewest fields, with (field, ours, its) of each."""
        stores = []
        for path in stores_in(root):
            with suppress(StoreError):
                stores.append((path, self._differing(read_manifest(path)["key"])))
        return min(stores, key=lambda store: len(store[1]), default=None)

    def differences(self, other: dict) -> str:
        """`pool is "mean", there "max"; ...` for the key of another manifest, '' where they are equal."""
        return _told(self._differing(other))

    def _differing(self, other: dict) -> list[tuple[str, object, object]]:
        ours = self.plain()
        return [(name, ours[name], other.get(name)) for name in ours if ours[name] != other.get(name)]


class StoreFolder:
    """A store's folder: its manifest, and the parts that the manifest lists. Readers and writers share it.

    `path` is where the folder is, and `manifest` what its manifest.json held when it was read last.
    """

    def __init__(self, path: str | Place, manifest: dict):
        self.path, self.manifest = place(path), manifest
        self._seen: tuple | None = None  # of the manifest's file, when it was read last

    @property
    def key(self) -> dict:
        """The fields of `FeatureKey` that made this store."""
        return self.manifest["key"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers; () in a store without labels, or of an older version."""
        return tuple(self.manifest.get("classes") or ())

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest["splits"])

    @property
    def layers(self) -> dict[str, list[int]]:
        """Layers at each point."""
        return self.key["layers"]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers 0, 1, ... of a network that is no ImageGPT, in the order of depth; () of an ImageGPT."""
        return tuple(self.key.get("modules") or ())

    def point_or_default(self, point: str | None) -> str:
        """A point that is named, or the only one of the store, or "ln_1"."""
        return point or (next(iter(self.layers)) if len(self.layers) == 1 else "ln_1")

    def listed(self, split: str) -> list[dict | None]:
        """What the manifest lists of each part of a split, None while it is not finished; KeyError for no split."""
        if split not in self.splits:
            raise KeyError(f"{self.path.name} has no split {split!r}; it has {self.splits}")
        return self.manifest["splits"][split]

    def rows_covered(self, split: str) -> int:
        """Rows of the source that the listed parts of a split stand for."""
        return sum(covers(part) for part in self.listed(split) if part)

    def part(self, split: str, number: int) -> Place:
        """Path of a part, whether it exists or not."""
        return self.path / split / f"part-{number:05d}-of-{len(self.manifest['splits'][split]):05d}.parquet"

    def has(self, split: str, number: int, *, verify: bool = True) -> bool:
        """Is this part listed, by whichever process, there and unaltered? The digest is computed where `verify`."""
        self.refresh()
        listed, path = self.manifest["splits"][split][number], self.part(split, number)
        try:
            if not listed or listed.get("entry", digest_of(listed)) != digest_of(listed) or not path.is_file():
                return False
            if not verify:
                return True
            return digest(path) == listed["sha256"] and pq.read_metadata(readable(path)).num_rows == listed["rows"]
        except (pa.ArrowException, OSError, ValueError):  # of the last kind: a column's name that is not UTF-8
            return False

    def state(self, split: str, number: int) -> tuple[bool, dict | None]:
        """Of a part: whether this store has it, and what is listed of it. It changes when the part is mended."""
        return self.has(split, number), self.listed(split)[number]

    @property
    def counts(self) -> dict[str, int]:
        """Number of parts of each split."""
        return _counts(self.manifest)

    def check_cut(self, rows: dict[tuple[str, int], int]) -> None:
        """StoreError where a listed part is not of the rows that those beside it leave to it."""
        for (split, number), count in rows.items():
            listed = self.listed(split)[number]
            if listed and covers(listed) != count:
                raise StoreError(
                    f"{self.part(split, number)} is of {covers(listed)} rows, not {count}: a store of parts of unequal "
                    "length cannot be finished here; delete it and extract again"
                )

    def is_ours(self, file: Path) -> bool:
        """Is it this store's manifest, one of its parts, of whatever number, or a temporary file of either?"""
        *folder, name = file.relative_to(self.path).parts
        if folder:
            return len(folder) == 1 and folder[0] in self.splits and bool(PART_FILE.fullmatch(name))
        return bool(MANIFEST_FILE.fullmatch(name))

    def problems(self, *, verify: bool = True) -> list[str]:
        """One line for each part that does not count, and for each split whose parts do not give its rows."""
        lines = []
        for split in self.splits:
            numbers = range(len(self.listed(split)))
            bad = [number for number in numbers if not self.has(split, number, verify=verify)]
            for number in bad:
                why = "missing or not as listed" if self.listed(split)[number] else "not finished"
                lines.append(f"{self.part(split, number)} is {why}")
            covered, rows = self.rows_covered(split), self.key["splits"][split][1]
            if not bad and covered != rows:
                differing = f"{covered} rows in its parts, {rows} in its key"
                lines.append(f"{self.path / 'manifest.json'} is stale: {split} has {differing}")
        return lines

    def refresh(self, *, always: bool = False) -> None:
        """Take over what the manifest on disk lists, where it is of this key and these parts."""
        with _READING:  # else a thread could put back what it read before another listed a part
            stamp = _stamp(self.path / "manifest.json")
            if stamp == self._seen and not always:
                return
            with suppress(StoreError):
                on_disk = read_manifest(self.path)
                if on_disk["key"] == self.key and _counts(on_disk) == _counts(self.manifest):
                    self.manifest = self.manifest | on_disk
            self._seen = stamp


def explain_miss(root: str | Place, key: FeatureKey) -> str:
    """What is new about `key`: the only field in which a store under `root` differs; '' where none is so near.

    '' too when it has a store, and for stores that are not on a disk of this machine, which are slow to list.
    """
    folder = place(root)
    if isinstance(folder, Remote) or (folder / key.folder()).exists():
        return ""
    nearest = key.nearest(folder)
    if nearest is None or len(nearest[1]) > 1 or nearest[1][0][0] == "splits":  # a store of other images says nothing
        return ""
    return f"{_told(nearest[1])} in {nearest[0].name}"


def _told(differing: list[tuple[str, object, object]]) -> str:
    """(field, ours, theirs) for a message."""
    return "; ".join(f"{name} is {_short(ours)}, there {_short(theirs)}" for name, ours, theirs in differing)


def _short(value: object) -> str:
    """A key's field for a message: digests by their first 8 digits, 0, 1, ..., 12 as 0..12."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_short(item)}" for name, item in value.items())
    if isinstance(value, list) and len(value) > 2 and all(isinstance(item, int) for item in value):
        if value == list(range(value[0], value[0] + len(value))):
            return f"{value[0]}..{value[-1]}"
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", json.dumps(value))


def stores_in(root: str | Place) -> list[Place]:
    """`root` itself and the folders under it that have a manifest, by name."""
    folder = place(root)
    here = [folder] if (folder / "manifest.json").is_file() else []
    return here + sorted(file.parent for file in folder.glob("*/manifest.json"))


def read_manifest(path: Place) -> dict:
    """The manifest of a store, checked for its form; StoreError when it is none, or not of this folder's key."""
    file = path / "manifest.json"
    again = f"delete {path} and extract again"
    try:
        if not file.is_file():
            raise StoreError(f"{path} is not a feature store, or one that was never begun: it has no manifest.json")
        manifest = json.loads(file.read_text(encoding="utf-8"), parse_constant=form.no_constant)
        form.check(manifest, {"key": {"format": form.count}}, "manifest")
        version = manifest["key"]["format"]
        if version != FORMAT:
            raise StoreError(f"{file} has format {version}; this version reads {FORMAT}. Extract again")
        form.check(manifest, form.MANIFEST, "manifest")
        form.check_modules(manifest["key"])
        key8 = digest(manifest["key"])[:8]
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is not a manifest ({error}); {again}") from error
    ends = re.search(r"-([0-9a-f]{8})$", path.resolve().name)
    if ends and ends[1] != key8:
        raise StoreError(f"{file} is stale: its key is {key8}, its folder's {ends[1]}; {again}")
    listed, splits = sorted(manifest["splits"]), sorted(manifest["key"]["splits"])
    if listed != splits:
        raise StoreError(f"{file} is stale: it lists {listed}, its key {splits}; {again}")
    return manifest


def digest_of(part: dict) -> str:
    """Of what is listed of a part beside its file's digest: `entry` in the manifest."""
    return digest({name: part[name] for name in ("rows", "stats", "skipped") if name in part})


def cut_at(path: Place, key: FeatureKey, usual: int) -> int:
    """Rows at which the parts of a store are cut: as they were where it was begun, else `usual`."""
    try:
        manifest = read_manifest(path)
    except StoreError:
        return usual
    return (manifest["key"] == key.plain() and cut_of(manifest, usual)) or usual


def cut_of(manifest: dict, usual: int) -> int | None:
    """Rows at which the parts were cut, `usual` where that fits; None for parts of unequal length."""
    rows = {split: count for split, (_, count) in manifest["key"]["splits"].items()}
    parts_by_split = manifest["splits"].items()
    listed = [(split, n, covers(part)) for split, parts in parts_by_split for n, part in enumerate(parts) if part]

    def fits(size: int) -> bool:
        counted = all(len(parts) == -(-rows[split] // size) for split, parts in parts_by_split)
        return counted and all(covered == min(size, rows[split] - n * size) for split, n, covered in listed)

    sizes = dict.fromkeys([usual, *(covered for _, _, covered in listed), *rows.values()])
    return next(filter(fits, filter(None, sizes)), None)


def covers(part: dict) -> int:
    """Rows of the source that a listed part stands for."""
    return part["rows"] + len(part.get("skipped") or ())


def _counts(manifest: dict) -> dict[str, int]:
    """The number of parts of each split."""
    return {split: len(parts) for split, parts in manifest["splits"].items()}


def _stamp(file: Place) -> tuple | None:
    """Changes when another manifest is renamed over this one; None when there is none."""
    if isinstance(file, Remote):
        return (object(),)  # its time is in whole seconds
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
