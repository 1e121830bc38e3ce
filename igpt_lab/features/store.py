"""The feature store, read: plain Parquet parts and a manifest that says which of them are whole.

    <root>/<model>-<images>-<key8>/manifest.json
    <root>/<model>-<images>-<key8>/<split>/part-00000-of-00003.parquet

A part holds a fixed range of rows: columns `index` (row in the source), `label`, and `<point>.<layer>` as
fixed_size_list<float32>[D]. The manifest holds the key, and each part's rows, SHA-256 and statistics. A part counts
when the manifest lists it and its digest matches; a file that merely exists proves nothing. docs/feature-store.md has
the format in full.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import card, span
from igpt_lab.core.provenance import digest
from igpt_lab.core.storage import Place, place, readable, size_of
from igpt_lab.core.values import did_you_mean
from igpt_lab.features.manifest import StoreError, StoreFolder, read_manifest
from igpt_lab.features.parts import nulls, wrong_type

if TYPE_CHECKING:
    from igpt_lab.features.writing import StoreWriter

AGAIN = "run the same extraction again, or igpt-lab verify STORE --repair"


class FeatureStore(StoreFolder):
    """Pooled features of one model over one image set; read it by layer, as a table, or with any Parquet reader.

    `open` gives a store that is complete. `extract_share` may return one whose other parts are still to come.
    `beside` is what is new about one that was just made, where another beside it differs in this alone.
    """

    beside = ""

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
            "FeatureStore.create is removed in the next release; use StoreWriter.create",
            DeprecationWarning,
            stacklevel=2,
        )
        return StoreWriter.create(root, key, parts, source=source)

    @checked
    def layer(self, point: str, layer: int | str, split: str) -> np.ndarray:
        """float32 (N, D), rows in the order of `index(split)`; reads no other layer, each part into its place.

        A negative layer counts from the deepest that is stored. Layers of a network that is no ImageGPT have names too.
        """
        name = self._column(point, layer)
        rows = sum(part["rows"] for part in self.listed(split) if part)
        values, start = np.empty((0, 0), np.float32), 0
        for number in range(len(self._finished(split))):
            column = self._read_part(split, number, [name]).column(0)
            width = column.type.list_size
            if not number:
                values = self._room(rows, width)
            if width != values.shape[1]:
                wrong = f"{name} {width} wide, parts before it {values.shape[1]}"
                raise StoreError(f"{self.part(split, number)} has {wrong}; {AGAIN}")
            for chunk in column.chunks:
                stop = start + len(chunk)
                values[start:stop] = chunk.flatten().to_numpy().reshape(len(chunk), width)
                start = stop
        return values

    def _room(self, rows: int, width: int) -> np.ndarray:
        try:
            return np.empty((rows, width), np.float32)
        except (MemoryError, ValueError) as error:
            raise StoreError(
                f"{self.path} lists {rows} rows of {width} numbers, which do not fit into memory; "
                "read fewer layers, or row groups"
            ) from error

    @checked
    def row_groups(self, split: str) -> list[tuple[int, int, int]]:
        """(part, row group in it, its rows) in the order of `index(split)`: what `row_group` reads at once."""
        groups = []
        for part in range(len(self._finished(split))):
            with self._opened(split, part) as file:
                about = file.metadata
                groups += [(part, group, about.row_group(group).num_rows) for group in range(about.num_row_groups)]
        return [(part, group, rows) for part, group, rows in groups if rows]

    @checked
    def row_group(self, split: str, part: int, group: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Of one row group `index` and `label` int64 (n,), -1 for no label, and `<point>.<layer>` float32 (n, D)."""
        table = self._read_part(split, part, list(columns), group).combine_chunks()
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
        return self._whole(split, ["index"]).column(0).to_numpy().copy()  # the user's own, to be written into

    @checked
    def labels(self, split: str) -> np.ndarray | None:
        """int64 (N,), or None when the image set has no labels."""
        column = self._whole(split, ["label"]).column(0)
        if 0 < column.null_count < len(column):
            missing = f"{column.null_count} of {len(column)} rows have no label"
            raise StoreError(f"{self.path} {split}: {missing}; expected one in each row, or in none")
        return None if column.null_count else column.to_numpy().copy()

    def features(self, point: str | None = None) -> dict[str, Any]:
        """`lab.Features` of every split, as `Features.from_store` gives them one by one.

        Example:
            >>> store.features()
            {'train': <Features: 200 rows, 10 classes, layers 0..3>, 'test': <Features: 100 rows, 10 classes, ...>}
        """
        kind = importlib.import_module("igpt_lab").Features  # it is of the room to the right, which reads stores
        return {split: kind.from_store(self, split, point) for split in self.splits}

    @checked
    def table(self, split: str, layers: Sequence[int | str] | None = None) -> pd.DataFrame:
        """For pandas: `index`, `label` and a column of arrays for each point's `layers`, all when None."""
        chosen: list[tuple[str, int | str]] = [
            (point, layer) for point in self.layers for layer in (self.layers[point] if layers is None else layers)
        ]
        names = dict.fromkeys(self._column(point, layer) for point, layer in chosen)
        return self._whole(split, ["index", "label", *names]).to_pandas()

    def skipped(self, split: str) -> pd.DataFrame:
        """`row` in the source and `reason` of the images that could not be read and have no features."""
        rows = [entry for part in self.listed(split) if part for entry in part.get("skipped") or ()]
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
            names = parts[0]["stats"] if parts else ()
            for name in (name for name in names if all(name in part["stats"] for part in parts)):
                largest, zeros, bad = np.array([part["stats"][name] for part in parts], float).T
                point, layer = name.rsplit(".", 1)
                mean = np.average(zeros, weights=weights)
                known = dict(enumerate(self.names))
                rows.append((split, point, known.get(int(layer), int(layer)), largest.max(), mean, int(bad.sum())))
        return pd.DataFrame(rows, columns=["split", "point", "layer", "max_abs", "zeros", "non_finite"])

    def _column(self, point: str, layer: int | str) -> str:
        """Column of a layer; KeyError when it is not stored."""
        stored = self.layers.get(point, [])
        if isinstance(layer, str):
            if layer not in self.names:
                raise KeyError(f"{self.path.name} has no layer {layer!r}; {did_you_mean(layer, self.names or ['0'])}")
            layer = self.names.index(layer)
        if -len(stored) <= layer < 0:
            layer = stored[layer]
        if layer not in stored:
            raise KeyError(f"{self.path.name} has no {point}.{layer}; it has {self.layers}")
        return f"{point}.{layer}"

    def _finished(self, split: str) -> list[Place]:
        """Paths of a split's parts; StoreError where one is still to come."""
        paths = [self.part(split, number) for number in range(len(self.listed(split)))]
        for path, part in zip(paths, self.listed(split), strict=True):
            if part is None:
                raise StoreError(f"{path} is not finished; run the same extraction again, and open the store then")
        return paths

    def _whole(self, split: str, columns: list[str]) -> pa.Table:
        """Columns of all parts."""
        parts = [self._read_part(split, number, columns) for number in range(len(self._finished(split)))]
        if not parts:
            return pa.table({name: pa.array([], pa.int64()) for name in columns})
        try:
            return pa.concat_tables(parts)
        except pa.ArrowException as error:
            raise StoreError(f"parts of {self.path} {split} have layers of different width; {AGAIN}") from error

    def _read_part(self, split: str, number: int, columns: list[str], group: int | None = None) -> pa.Table:
        """Columns of a part, or of one row group, of the types that the format has; StoreError where they are not."""
        with self._opened(split, number) as file:
            # threads and pre-buffering off: small scripts with them now and then abort when the interpreter exits
            read = file.read if group is None else partial(file.read_row_group, group)
            table = read(columns, use_threads=False)
            if sorted(table.column_names) != sorted(columns):
                raise ValueError(f"it has the columns {table.column_names}; expected {columns}")
            for name in columns:
                if wrong := wrong_type(name, table.schema.field(name).type):
                    raise ValueError(wrong)
                if name != "label" and nulls(table[name]):
                    raise ValueError(f"{name} has {nulls(table[name])} missing numbers")
            return table

    @contextmanager
    def _opened(self, split: str, number: int) -> Iterator[pq.ParquetFile]:
        """A part's file, of the rows that are listed; StoreError that names the part where it cannot be read."""
        path, listed = self.part(split, number), self.listed(split)[number]
        try:
            with pq.ParquetFile(readable(path), pre_buffer=False) as file:
                rows = listed["rows"] if listed else "nothing"
                if file.metadata.num_rows != rows:
                    raise ValueError(f"it has {file.metadata.num_rows} rows, the manifest lists {rows}")
                yield file
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{path} is not as listed: {str(error).partition(chr(10))[0]}; {AGAIN}") from error

    def __repr__(self) -> str:
        rows = {split: sum(part["rows"] for part in self.listed(split) if part) for split in self.splits}
        layers = {point: len(layers) for point, layers in self.layers.items()}
        made = f"pool {self.key['pool']}" if self.names else f"{self.key['alignment']}, {self.key['pool']}"
        return f"<FeatureStore {self.path.name}: rows {rows}, layers {layers}, {made}>"

    def _repr_html_(self) -> str:
        key, listed = self.key, [part for parts in self.manifest["splits"].values() for part in parts]
        whole = sum(part is not None for part in listed)
        rows = {split: f"{rows:,}" for split, (_, rows) in key["splits"].items()}
        facts = {
            "model": f"{key['model']}, weights {key['weights'][:8]}",
            "images": f"{key['images']}: " + ", ".join(f"{count} {split}" for split, count in rows.items()),
            "layers": span(self.names) or "; ".join(f"{point} {span(stored)}" for point, stored in self.layers.items()),
            "made": self._made(),
            "complete": "yes"
            if whole == len(listed)
            else f"no: {whole} of {len(listed)} parts; extract again to continue",
            "size": f"{self.size / 1e6:,.1f} MB in {len(listed)} parts",
            "new": self.beside,
            "folder": self.path,
        }
        return card(f"FeatureStore {digest(key)[:8]}", facts)

    def _made(self) -> str:
        """How an image became a vector, in words."""
        key = self.key
        if self.names:
            return f"pool {key['pool']}, {key['dtype']}, preprocess {key.get('preprocess', '')[:8]}"
        return f"{key['pool']} over positions, {key['alignment']}, {key['dtype']}, images {key['size']} a side"


class StoredLayers(Mapping):
    """Layers of one point of a store, layer -> float32 (N, D), each read when it is asked for and not kept.

    `point` is by default "ln_1", or the only one of the store. Layers that have names go by these.
    """

    def __init__(self, store: FeatureStore, split: str, point: str | None = None):
        point = store.point_or_default(point)
        if point not in store.layers:
            raise KeyError(f"{store.path.name} has no point {point!r}; it has {list(store.layers)}")
        self.store, self.split = store, split
        self.point = point
        self.index = store.index(split)

    @property
    def fingerprint(self) -> str:
        """Of the images, as the store's key has it."""
        return self.store.key["splits"][self.split][0]

    def __getitem__(self, layer: int | str) -> np.ndarray:
        return self.store.layer(self.point, layer, self.split)

    def __iter__(self) -> Iterator[int | str]:
        return iter(self.store.names or self.store.layers[self.point])

    def __len__(self) -> int:
        return len(self.store.layers[self.point])
