"""The feature store, read: plain Parquet parts and a manifest that says which of them are whole.

    <root>/<model>-<images>-<key8>/manifest.json
    <root>/<model>-<images>-<key8>/<split>/part-00000-of-00003.parquet

A part holds a fixed range of rows: columns `index` (row in the source), `label`, and `<point>.<layer>` as
fixed_size_list<float32>[D]. The manifest holds the key, and each part's rows, SHA-256 and statistics. A part counts
when the manifest lists it and its digest matches; a file that merely exists proves nothing. docs/feature-store.md has
the format in full.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import card, span
from igpt_lab.core.provenance import digest
from igpt_lab.core.storage import Place, place, readable, size_of
from igpt_lab.features.manifest import StoreError, StoreFolder, read_manifest

if TYPE_CHECKING:
    from igpt_lab.features.writing import StoreWriter


class FeatureStore(StoreFolder):
    """Pooled features of one model over one image set; read it by layer, as a table, or with any Parquet reader.

    `open` gives a store that is complete. `extract_share` may return one whose other parts are still to come.
    """

    @classmethod
    def open(cls, path: str | Place, *, verify: bool = True) -> FeatureStore:
        """A complete store; raises StoreError naming the part that is missing or altered.

        Every part is read once for its digest; `verify=False` trusts those that the manifest lists and that are there.
        """
        store = cls(path, read_manifest(place(path)))
        problems = store.problems(verify=verify)
        if problems:
            raise StoreError(
                f"{problems[0]} ({len(problems)} such); run the same extraction again, or "
                f"igpt-lab verify {path} --repair, to redo only these"
            )
        return store

    @staticmethod
    def create(root: str | Place, key, parts: dict[str, int], *, source: dict | None = None) -> StoreWriter:
        """Another name of `StoreWriter.create`, which warns; it goes with the next release."""
        from igpt_lab.features.writing import StoreWriter

        warnings.warn(
            "FeatureStore.create goes with the next release; use StoreWriter.create", DeprecationWarning, stacklevel=2
        )
        return StoreWriter.create(root, key, parts, source=source)

    @checked
    def layer(self, point: str, layer: int, split: str) -> np.ndarray:
        """float32 (N, D), rows in the order of `index(split)`; reads no other layer, each part into its place.

        A negative layer counts from the deepest that is stored.
        """
        name = self._column(point, layer)
        rows = sum(part["rows"] for part in self.listed(split) if part)
        values, start = np.empty((rows, 0), np.float32), 0
        for path, table in self._tables(split, [name]):
            width = table.schema.field(0).type.list_size
            if path == self.part(split, 0):
                values = np.empty((rows, width), np.float32)
            if width != values.shape[1]:
                raise StoreError(f"{path} has {width} numbers in a row of {name}, the first part {values.shape[1]}")
            for chunk in table.column(0).chunks:
                stop = start + len(chunk)
                values[start:stop] = chunk.flatten().to_numpy().reshape(len(chunk), width)
                start = stop
        return values

    @checked
    def row_groups(self, split: str) -> list[tuple[int, int, int]]:
        """(part, row group in it, its rows) in the order of `index(split)`: what `row_group` reads at once."""
        groups = []
        for part, (path, listed) in enumerate(self._finished(split)):
            with _reading(path) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            _check_rows(path, sum(rows), listed)
            groups += [(part, group, count) for group, count in enumerate(rows) if count]
        return groups

    @checked
    def row_group(self, split: str, part: int, group: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Of one row group `index` and `label` int64 (n,), -1 for no label, and `<point>.<layer>` float32 (n, D)."""
        path = self.part(split, part)
        with _reading(path) as file:
            table = file.read_row_group(group, list(columns), use_threads=False).combine_chunks()
        _check_columns(path, table, columns)
        arrays = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_fixed_size_list(column.type):
                arrays[name] = column.chunk(0).flatten().to_numpy().reshape(len(column), column.type.list_size)
            else:
                arrays[name] = column.fill_null(-1).to_numpy()
        return arrays

    @checked
    def index(self, split: str) -> np.ndarray:
        """int64 (N,): row of each image in its source."""
        return np.concatenate([table.column(0).to_numpy() for _, table in self._tables(split, ["index"])])

    @checked
    def labels(self, split: str) -> np.ndarray | None:
        """int64 (N,), or None when the image set has no labels."""
        columns = [table.column(0) for _, table in self._tables(split, ["label"])]
        missing, rows = sum(column.null_count for column in columns), sum(map(len, columns))
        if missing == rows > 0:
            return None
        if missing:
            raise StoreError(
                f"{self.path} {split} has no label in {missing} of {rows} rows; expected one in each, or none"
            )
        return np.concatenate([column.to_numpy() for column in columns])

    @checked
    def table(self, split: str, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """For pandas: `index`, `label` and a column of arrays for each point's `layers`, all when None."""
        names = None
        if layers is not None:
            chosen = dict.fromkeys(self._column(point, layer) for point in self.layers for layer in layers)
            names = ["index", "label", *chosen]
        return pa.concat_tables([table for _, table in self._tables(split, names)]).to_pandas()

    def skipped(self, split: str) -> pd.DataFrame:
        """`row` in the source and `reason` of the images that could not be read and have no features."""
        rows = [entry for part in self.listed(split) if part for entry in part.get("skipped", [])]
        return pd.DataFrame(rows, columns=["row", "reason"])

    @property
    def size(self) -> int:
        """Bytes of the parts that are there."""
        paths = [self.part(split, number) for split in self.splits for number in range(len(self.listed(split)))]
        return sum(size_of(path) for path in paths if path.is_file())

    def stats(self) -> pd.DataFrame:
        """A row for each split, point and layer: max |x|, share of exact zeros and count of non-finite values."""
        rows = []
        for split in self.splits:
            parts = [part for part in self.listed(split) if part and part["rows"]]
            weights = [part["rows"] for part in parts]
            for name in parts[0]["stats"] if parts else ():
                largest, zeros, bad = np.array([part["stats"][name] for part in parts], float).T
                point, layer = name.rsplit(".", 1)
                mean = np.average(zeros, weights=weights)
                rows.append((split, point, int(layer), largest.max(), mean, int(bad.sum())))
        return pd.DataFrame(rows, columns=["split", "point", "layer", "max_abs", "zeros", "non_finite"])

    def _column(self, point: str, layer: int) -> str:
        """Column of a layer; KeyError when it is not stored."""
        stored = self.layers.get(point, [])
        if -len(stored) <= layer < 0:
            layer = stored[layer]
        if layer not in stored:
            raise KeyError(f"{self.path.name} has no {point}.{layer}; it has {self.layers}")
        return f"{point}.{layer}"

    def _finished(self, split: str) -> list[tuple[Place, dict]]:
        """Paths of a split's parts and what is listed of each; StoreError where one is still to come."""
        parts = []
        for number, listed in enumerate(self.listed(split)):
            path = self.part(split, number)
            if listed is None:
                raise StoreError(f"{path} is not finished; run the same extraction again, and open the store then")
            parts.append((path, listed))
        return parts

    def _tables(self, split: str, columns: list[str] | None) -> Iterator[tuple[Place, pa.Table]]:
        """Each part's columns, all when None; StoreError for a part that is not as the manifest lists it."""
        for path, listed in self._finished(split):
            with _reading(path) as file:
                table = file.read(columns, use_threads=False)
            _check_rows(path, len(table), listed)
            _check_columns(path, table, columns or table.column_names)
            yield path, table

    def __repr__(self) -> str:
        rows = {split: sum(part["rows"] for part in self.listed(split) if part) for split in self.splits}
        layers = {point: len(layers) for point, layers in self.layers.items()}
        return (
            f"FeatureStore {self.path.name}: rows {rows}, layers {layers}, {self.key['alignment']}, {self.key['pool']}"
        )

    def _repr_html_(self) -> str:
        key, listed = self.key, [part for parts in self.manifest["splits"].values() for part in parts]
        whole = sum(part is not None for part in listed)
        rows = {split: f"{rows:,}" for split, (_, rows) in key["splits"].items()}
        facts = {
            "model": f"{key['model']}, weights {key['weights'][:8]}",
            "images": f"{key['images']}: " + ", ".join(f"{count} {split}" for split, count in rows.items()),
            "layers": "; ".join(f"{point} {span(layers)}" for point, layers in self.layers.items()),
            "made": f"{key['pool']} over positions, {key['alignment']}, {key['dtype']}, images {key['size']} a side",
            "complete": "yes" if whole == len(listed) else f"no: {whole} of {len(listed)} parts; extract goes on",
            "size": f"{self.size / 1e6:,.1f} MB in {len(listed)} parts",
            "folder": self.path,
        }
        return card(f"FeatureStore {digest(key)[:8]}", facts)


class StoredLayers(Mapping):
    """Layers of one point of a store, layer -> float32 (N, D), each read when it is asked for and not kept."""

    def __init__(self, store: FeatureStore, split: str, point: str = "ln_1"):
        if point not in store.layers:
            raise KeyError(f"{store.path.name} has no point {point!r}; it has {list(store.layers)}")
        self.store, self.split, self.point = store, split, point
        self.index = store.index(split)

    @property
    def fingerprint(self) -> str:
        """Of the images, as the store's key has it."""
        return self.store.key["splits"][self.split][0]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.store.layer(self.point, layer, self.split)

    def __iter__(self) -> Iterator[int]:
        return iter(self.store.layers[self.point])

    def __len__(self) -> int:
        return len(self.store.layers[self.point])


@contextmanager
def _reading(path: Place) -> Iterator[pq.ParquetFile]:
    """A part, open; StoreError where it is not there or cannot be read."""
    try:
        # Threads and pre-buffering off: small scripts with them now and then abort when the interpreter exits.
        with pq.ParquetFile(readable(path), pre_buffer=False) as file:
            yield file
    except (OSError, pa.ArrowException, ValueError) as error:
        why = " ".join(str(error).split())
        raise StoreError(f"{path} cannot be read ({why}); run the same extraction again") from error


def _check_rows(path: Place, rows: int, listed: dict) -> None:
    if rows != listed["rows"]:
        raise StoreError(f"{path} has {rows} rows, the manifest lists {listed['rows']}; run the same extraction again")


def _check_columns(path: Place, table: pa.Table, names: Sequence[str]) -> None:
    """StoreError for a column that is absent, of another type, or has no value in some row."""
    for name in names:
        if name not in table.column_names:
            raise StoreError(f"{path} has no column {name}; run the same extraction again")
        column = table.column(name)
        plain = name in ("index", "label")
        right = column.type == pa.int64() if plain else pa.types.is_fixed_size_list(column.type)
        if not right or not plain and column.type.value_type != pa.float32():
            expected = "int64" if plain else "fixed_size_list<float>"
            raise StoreError(f"{path} has {name} as {column.type}; expected {expected}")
        if name != "label" and (column.null_count or not plain and any(c.flatten().null_count for c in column.chunks)):
            raise StoreError(f"{path} has rows without {name}; run the same extraction again")
