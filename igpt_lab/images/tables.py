"""Image sets in tables: Parquet files, and folders that `datasets` saved; and the labels of their other splits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core.storage import Remote, as_name, readable
from igpt_lab.images.columns import Labels, Opened, class_label, columns_of, label_column, read_labels, unchosen
from igpt_lab.images.opening import first_line, inside

SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # names of files that mean a split
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")


def open_parquet(
    path: Path | Remote, split: str, name: str, label: str | None = None, config: str | None = None
) -> Opened | None:
    """A split of a Parquet file, or of a folder of them; None where the folder has none.

    `label` is the column of the labels, `config` a folder below that alone counts; None is the usual one, and all.
    """
    if path.is_file():
        return _open_file(path, split, name, label)
    if isinstance(path, Remote):
        splits = split_files((PurePath(file.key).relative_to(path.key) for file in path.glob("*.parquet")), config)
    else:
        below = [file.relative_to(path) for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}.parquet")]
        seen = [file for file in below if not any(part.startswith(".") for part in file.parts)]
        splits = split_files(seen, config)
        if seen and not splits:
            raise ValueError(f"{name} has no configuration {config!r}; it has {', '.join(configurations(seen))}")
        if not splits:
            return None
    files = [path / file.as_posix() for file in pick(splits, split, name)]
    others = _others(path, split, splits, name, label)
    return Opened(_read(files, name, label), path, split, others, _notes(files[0], name, label))


def configurations(files: Iterable[PurePath]) -> list[str]:
    """The folders that Parquet files lie in, where they are no splits: a set of the Hub has one for a configuration."""
    folders = {part for file in files for part in file.parts[:-1] if part not in SPLITS and part != split_in(file)}
    return sorted(folders) or ["none"]


def _open_file(path: Path | Remote, split: str, name: str, label: str | None) -> Opened:
    """A file, whole; where it is named after a split, the splits that lie beside it are of the same set."""
    if path.suffix != ".parquet":
        raise ValueError(f"{path} is no Parquet file; expected FILE.parquet or a folder")
    beside: dict[str, list[PurePath]] = {}
    if is_split(path):
        pick({split_in(path): [path]}, split, name)
        files = split_files(PurePath(file.name) for file in path.parent.glob("*.parquet"))
        beside = {other: files[other] for other in files if other in SPLITS}
    others = _others(path.parent, split, beside, name, label)
    return Opened(_read([path], name, label), path.parent, split, others, _notes(path, name, label))


def _others(
    root: Path | Remote, split: str, splits: dict[str, list[PurePath]], name: str, label: str | None
) -> dict[str, Callable[[], Labels | None]]:
    """What reads the labels of each other split."""
    return {other: partial(_labels_of, root, other, splits, name, label) for other in splits if other != split}


def split_in(file: PurePath | Remote) -> str:
    """The split that a Parquet file's name tells: `test.parquet`, `test-00000-of-00002.parquet`, `test/0.parquet`."""
    file = PurePath(file)
    shard = SHARD.fullmatch(file.stem)
    stem = shard[1] if shard else file.stem
    return file.parent.name if stem.isdigit() or stem == "part" else stem


def is_split(file: PurePath | Remote) -> bool:
    """Is this Parquet file named after a split?"""
    return split_in(file) in SPLITS


def split_files(files: Iterable[PurePath], config: str | None = None) -> dict[str, list[PurePath]]:
    """Parquet files by split, those in a folder named `config` alone where it is given."""
    splits: dict[str, list[PurePath]] = {}
    for file in files:
        if file.suffix == ".parquet" and (config is None or config in file.parts[:-1]):
            splits.setdefault(split_in(file), []).append(file)
    return splits


def pick(splits: dict[str, list], split: str, name: str) -> list:
    """The files of a split; ValueError when there is none, when some are missing, or when two sets mix."""
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}")
    files = sorted(splits[split])
    if len({file.parent for file in files}) > 1:
        folders = ", ".join(sorted({str(file.parent) for file in files}))
        raise ValueError(
            f"{name} has the split {split!r} in several folders: {folders}; give one as config=, or its path"
        )
    shards = [shard for file in files if (shard := SHARD.fullmatch(file.stem))]
    if shards and len(files) != int(shards[0][3]):
        present = ", ".join(file.name for file in files)
        raise ValueError(f"{name} {split} has {len(files)} files where their names say {int(shards[0][3])}: {present}")
    return files


def _read(
    files: Sequence[Path | Remote], name: str, label: str | None = None, columns: list[str] | None = None
) -> pa.Table:
    """These columns of the files, or those of the image and the label."""
    tables = []
    for path in files:
        try:
            with pq.ParquetFile(readable(path), pre_buffer=False) as file:
                chosen = columns or [column for column in columns_of(file.schema_arrow, str(path), label) if column]
                # One thread: with more, some interpreters abort at exit (pyarrow 26).
                tables.append(file.read(columns=chosen, use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
    if any(table.schema != tables[0].schema for table in tables):
        raise ValueError(f"{name}: its Parquet files differ in their columns: {', '.join(map(str, files))}")
    return pa.concat_tables(tables)


def _schema_of(path: Path | Remote) -> pa.Schema:
    try:
        with pq.ParquetFile(readable(path), pre_buffer=False) as file:
            return file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | Remote, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as Parquet, is it cut short? {first_line(error)}")


def _notes(path: Path | Remote, name: str, label: str | None) -> tuple[str, ...]:
    schema = _schema_of(path)
    return tuple(unchosen(schema, label_column(schema, name, label), label))


def _labels_of(
    root: Path | Remote, split: str, splits: dict[str, list[PurePath]], name: str, label: str | None
) -> Labels | None:
    """The labels of another split, of which a ClassLabel needs the names alone; None where it has none."""
    schema = _schema_of(root / sorted(splits[split])[0].as_posix())
    try:
        _, label = columns_of(schema, name, label)
    except ValueError:  # it is no split of images
        return None
    if label is None:
        return None
    if names := class_label(schema, label, f"{name} {split}"):
        return Labels(np.zeros(0, np.int64), names, noted=True)
    files = [root / file.as_posix() for file in pick(splits, split, name)]
    return read_labels(_read(files, name, columns=[label]), label, f"{name} {split}")


def open_saved(path: Path, split: str, name: str, label: str | None = None) -> Opened:
    """A split of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    several = (path / "dataset_dict.json").is_file()
    try:
        noted = json.loads((path / ("dataset_dict.json" if several else "state.json")).read_text(encoding="utf-8"))
        splits = [noted.get("_split") or split]
        if several:
            splits = [as_name(folder, "a split") for folder in noted["splits"]]
        if split in splits:
            table = _saved(path / split if several else path)
            others = {other: partial(_labels_of_saved, path / other, name, label) for other in splits if other != split}
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a folder saved by `datasets`: {first_line(error)}") from error
    if split in splits:
        notes = unchosen(table.schema, label_column(table.schema, name, label), label)
        return Opened(table, path, split, others, tuple(notes))
    raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(map(str, splits)))}")


def _saved(path: Path, columns: list[str] | None = None) -> pa.Table:
    """These columns of a saved split, or all."""
    saved = _load_saved(path)
    saved = saved if columns is None else saved.select_columns(columns)
    return saved.with_format("arrow")[:].replace_schema_metadata(saved.features.arrow_schema.metadata)


def _load_saved(path: Path) -> Any:
    """A `datasets.Dataset`; ValueError where its tables lie outside its folder."""
    import datasets

    for file in json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        inside(path, file["filename"], linked=True)  # the Hub's cache has links
    return datasets.load_from_disk(str(path))


def _labels_of_saved(path: Path, name: str, label: str | None) -> Labels | None:
    """The labels of another split; None where it has none."""
    try:
        label = label_column(_load_saved(path).features.arrow_schema, name, label)
        return read_labels(_saved(path, [label]), label, f"{name} {path.name}") if label else None
    except (pa.ArrowException, OSError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a folder saved by `datasets`: {first_line(error)}") from error


def is_saved(path: Path | Remote) -> bool:
    """Did `datasets` save this folder?"""
    return isinstance(path, Path) and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def as_parquet(
    images: Iterable[tuple[bytes, str]], labels: np.ndarray | None, names: Sequence[str] | None
) -> pa.Buffer:
    """Encoded images with their paths, their labels and the names of the classes, as the bytes of a Parquet file."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    types: dict[str, pa.DataType] = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    if labels is not None:
        features["label"], types["label"] = {"_type": "ClassLabel", "names": list(names or ())}, pa.int64()
    schema = pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    buffer, waiting = pa.BufferOutputStream(), iter(images)
    start = 0
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        while some := [{"bytes": data, "path": path} for data, path in islice(waiting, 1000)]:
            rows = slice(start, start + len(some))
            columns = {"image": some} | ({} if labels is None else {"label": labels[rows]})
            writer.write_table(pa.table(columns, schema=schema))
            start = rows.stop
    return buffer.getvalue()
