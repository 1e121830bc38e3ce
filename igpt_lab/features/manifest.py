"""What a feature store is of, and what it lists: the key, and the manifest that says which parts are whole."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from igpt_lab.core.provenance import digest, named
from igpt_lab.core.storage import place

FORMAT = 1


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

    def __post_init__(self):
        """Layers in any order, or twice, are the same features."""
        layers = {point: np.unique(self.layers[point]).tolist() for point in sorted(self.layers)}
        object.__setattr__(self, "layers", layers)

    def plain(self) -> dict:
        """The fields as a manifest holds them: plain JSON, tuples as lists."""
        return json.loads(json.dumps(asdict(self)))

    def folder(self) -> str:
        """`<model>-<images>-<key8>`, safe as a folder's name."""
        return named(self.model, self.images, key=self.plain())

    def nearest(self, root: str | Path) -> tuple[Path, list[tuple[str, object, object]]] | None:
        """Of the stores under `root` the one that differs in the fewest fields, with (field, ours, its) of each."""
        found = []
        for path in stores_in(root):
            with suppress(StoreError):
                found.append((path, self._differing(read_manifest(path)["key"])))
        return min(found, key=lambda each: len(each[1]), default=None)

    def differences(self, other: dict) -> str:
        """`pool is "mean", there "max"; ...` for the key of another manifest, '' where they are equal."""
        return _told(self._differing(other))

    def _differing(self, other: dict) -> list[tuple[str, object, object]]:
        ours = self.plain()
        return [(name, ours[name], other.get(name)) for name in ours if ours[name] != other.get(name)]


def explain_miss(root: str | Path, key: FeatureKey) -> str:
    """What is new about `key`, by the nearest store under `root`; '' when it has a store or there is none."""
    nearest = None if (place(root) / key.folder()).exists() else key.nearest(root)
    if nearest is None:
        return ""
    return f"no store has this key yet; the nearest is {nearest[0]}: {_told(nearest[1])}"


def _told(differing: list[tuple[str, object, object]]) -> str:
    """(field, ours, theirs) for a message."""
    return "; ".join(f"{name} is {_short(ours)}, there {_short(theirs)}" for name, ours, theirs in differing)


def _short(value: object) -> str:
    """A key's field for a message: digests by their first 8 digits, 0, 1, ..., 12 as 0..12."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_short(each)}" for name, each in value.items())
    if isinstance(value, list) and len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}..{value[-1]}"
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", json.dumps(value))


def stores_in(root: str | Path) -> list[Path]:
    """Folders under `root` that have a manifest, by name; or `root` itself."""
    root = place(root)
    if (root / "manifest.json").is_file():
        return [root]
    return sorted(file.parent for file in root.glob("*/manifest.json"))


def read_manifest(path: Path) -> dict:
    """The manifest of a store, checked for its form; StoreError when it is none, or not of this folder's key."""
    file = path / "manifest.json"
    if not file.is_file():
        raise StoreError(f"{path} is not a feature store, or one that was never begun: it has no manifest.json")
    again = f"delete {path} and extract again"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, key8 = manifest["key"]["format"], digest(manifest["key"])[:8]
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{file} is not a manifest ({error!r}); {again}") from error
    if found != FORMAT:
        raise StoreError(f"{file} has format {found}; this version reads {FORMAT}. Extract again")
    try:
        rows = {split: count + 0 for split, (_, count) in manifest["key"]["splits"].items()}
        for part in (part for parts in manifest["splits"].values() for part in parts if part is not None):
            _ = part["sha256"] + "", covers(part) + 0, part["stats"].items()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{file} is not a manifest ({error!r}); {again}") from error
    ends = re.search(r"-([0-9a-f]{8})$", path.resolve().name)
    if ends and ends[1] != key8:
        raise StoreError(f"{file} is stale: its key is {key8}, its folder's {ends[1]}; {again}")
    if set(manifest["splits"]) != set(rows):
        raise StoreError(f"{file} is stale: it lists {sorted(manifest['splits'])}, its key {sorted(rows)}; {again}")
    return manifest


def covers(part: dict) -> int:
    """Rows of the source that a listed part stands for."""
    return part["rows"] + len(part.get("skipped", ()))
