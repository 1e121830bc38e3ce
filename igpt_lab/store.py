"""The feature store on disk: plain Parquet parts and a manifest that says which of them are whole.

    <root>/<model>-<images>-<key8>/manifest.json
    <root>/<model>-<images>-<key8>/<split>/part-00000-of-00003.parquet

A part holds a fixed range of rows: columns `index` (row in the source), `label`, and `<point>.<layer>` as
fixed_size_list<float32>[D]. The manifest holds the key, and each part's rows, SHA-256 and statistics. A part counts
when the manifest lists it and its digest matches; a file that merely exists proves nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.provenance import atomic_write, digest, versions

FORMAT = 1


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

    def folder(self) -> str:
        """`<model>-<images>-<key8>`, safe as a folder's name."""
        names = (re.sub(r"[^\w.]+", "-", Path(name).name).strip("-") for name in (self.model, self.images))
        return "-".join([*names, digest(asdict(self))[:8]])


class StoreError(ValueError):
    """A store that is not whole; the message names the part and says what to do."""


class FeatureStore:
    """Pooled features of one model over one image set; read it by layer, as a table, or with any Parquet reader."""

    def __init__(self, path: str | Path, manifest: dict):
        self.path, self.manifest = Path(path), manifest

    @classmethod
    def create(cls, root: str | Path, key: FeatureKey, parts: dict[str, int]) -> FeatureStore:
        """The store of `key` under `root`, with what is already in it; `parts` is the number of parts of each split."""
        path = Path(root) / key.folder()
        if (path / "manifest.json").exists():
            return cls(path, _manifest(path))
        manifest = {"key": json.loads(json.dumps(asdict(key))), "versions": versions()}
        return cls(path, manifest | {"splits": {split: [None] * count for split, count in parts.items()}})

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """A complete store; raises StoreError naming the part that is missing or altered."""
        store = cls(path, _manifest(Path(path)))
        problems = store.problems()
        if problems:
            raise StoreError(f"{problems[0]} ({len(problems)} such); run the same extraction again to redo only these")
        return store

    @property
    def key(self) -> dict:
        """The fields of `FeatureKey` that made this store."""
        return self.manifest["key"]

    @property
    def splits(self) -> list[str]:
        return list(self.manifest["splits"])

    @property
    def layers(self) -> dict[str, list[int]]:
        """Layers at each point."""
        return self.key["layers"]

    def part(self, split: str, number: int) -> Path:
        """Path of a part, whether it exists or not."""
        return self.path / split / f"part-{number:05d}-of-{len(self.manifest['splits'][split]):05d}.parquet"

    def has(self, split: str, number: int) -> bool:
        """Is this part listed, there and unaltered?"""
        listed, path = self.manifest["splits"][split][number], self.part(split, number)
        return listed is not None and path.is_file() and digest(path) == listed["sha256"]

    def problems(self) -> list[str]:
        """One line for each part that does not count."""
        return [
            f"{self.part(split, number)} is " + ("not finished" if listed is None else "missing or not as listed")
            for split, parts in self.manifest["splits"].items()
            for number, listed in enumerate(parts)
            if not self.has(split, number)
        ]

    def write_part(
        self,
        split: str,
        number: int,
        index: np.ndarray,
        labels: np.ndarray | None,
        features: dict[str, np.ndarray],
        stats: dict[str, list[float]],
    ) -> None:
        """Write one part whole, then the manifest. `features` maps `<point>.<layer>` to float32 (rows, D); `stats` to
        [max |x|, share of exact zeros, count of non-finite values] of the states before pooling."""
        columns = {"index": pa.array(index, pa.int64())}
        columns["label"] = pa.nulls(len(index), pa.int64()) if labels is None else pa.array(labels, pa.int64())
        for name, values in features.items():
            flat = pa.array(np.ascontiguousarray(values, np.float32).ravel(), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), buffer, compression="none", use_dictionary=False)
        data = buffer.getvalue().to_pybytes()
        atomic_write(self.part(split, number), data)
        self.manifest["splits"][split][number] = {"rows": len(index), "sha256": digest(data), "stats": stats}
        atomic_write(self.path / "manifest.json", json.dumps(self.manifest, indent=1) + "\n")

    def layer(self, point: str, layer: int, split: str) -> np.ndarray:
        """float32 (N, D), rows in the order of `index(split)`; reads no other layer."""
        name = f"{point}.{layer}"
        if layer not in self.layers.get(point, []):
            raise KeyError(f"{self.path.name} has no {name}; it has {self.layers}")
        chunks = [table.column(0).combine_chunks() for table in self._read(split, [name])]
        return np.concatenate([c.flatten().to_numpy().reshape(len(c), -1) for c in chunks])

    def index(self, split: str) -> np.ndarray:
        """int64 (N,): row of each image in its source."""
        return np.concatenate([table.column(0).to_numpy() for table in self._read(split, ["index"])])

    def labels(self, split: str) -> np.ndarray | None:
        """int64 (N,), or None when the image set has no labels."""
        columns = [table.column(0) for table in self._read(split, ["label"])]
        return None if any(c.null_count for c in columns) else np.concatenate([c.to_numpy() for c in columns])

    def table(self, split: str) -> pd.DataFrame:
        """All of a split for pandas: `index`, `label` and one column of arrays for each layer."""
        return pa.concat_tables(self._read(split, None)).to_pandas()

    def stats(self) -> pd.DataFrame:
        """A row for each split, point and layer: max |x|, share of exact zeros and count of non-finite values."""
        rows = []
        for split, parts in self.manifest["splits"].items():
            weights = [part["rows"] for part in parts]
            for name in parts[0]["stats"]:
                largest, zeros, bad = np.array([part["stats"][name] for part in parts]).T
                point, layer = name.rsplit(".", 1)
                zeros = np.average(zeros, weights=weights)
                rows.append((split, point, int(layer), largest.max(), zeros, int(bad.sum())))
        return pd.DataFrame(rows, columns=["split", "point", "layer", "max_abs", "zeros", "non_finite"])

    def _read(self, split: str, columns: list[str] | None) -> list[pa.Table]:
        if split not in self.splits:
            raise KeyError(f"{self.path.name} has no split {split!r}; it has {self.splits}")
        paths = [self.part(split, number) for number in range(len(self.manifest["splits"][split]))]
        # threads and pre-buffering off: small scripts with them now and then abort when the interpreter exits
        return [pq.ParquetFile(path, pre_buffer=False).read(columns, use_threads=False) for path in paths]

    def __repr__(self) -> str:
        rows = {name: sum(p["rows"] for p in parts if p) for name, parts in self.manifest["splits"].items()}
        layers = {point: len(layers) for point, layers in self.layers.items()}
        return (
            f"FeatureStore {self.path.name}: rows {rows}, layers {layers}, {self.key['alignment']}, {self.key['pool']}"
        )


def _manifest(path: Path) -> dict:
    """The manifest of a store, checked for its parts."""
    file = path / "manifest.json"
    if not file.is_file():
        raise StoreError(f"{path} is not a feature store, or one that was never begun: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, splits = manifest["key"]["format"], manifest["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is not a manifest ({error!r}); delete {path} and extract again") from error
    if found != FORMAT or not isinstance(splits, dict):
        raise StoreError(f"{file} has format {found}; this version reads {FORMAT}. Extract again")
    return manifest
