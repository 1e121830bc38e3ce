"""Where images come from: a name and a split -> one Arrow column of encoded images, and their labels.

A name is a bundled set, a file or folder on the disk or on an object store, or a repository of the Hub. Nothing in a
source is executed.

`datasets` opens the folders that it saved, where they lie. The others are read here, because its `load_dataset` first
writes a copy of the images into a cache, also with `keep_in_memory`, and of a Hub repository it prepares every split.
It also reads splits out of file names, and drops all labels where one image lies beside the class folders.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core import hub
from igpt_lab.core.hub import BUNDLED
from igpt_lab.core.storage import Remote, place, readable
from igpt_lab.images.columns import columns_of, labels_of

SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # folder names that mean a split, not a class
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.parquet)")
REVISIONS = ("main", "refs/convert/parquet")  # the Hub keeps a Parquet copy of sets in other formats in the second
PATIENCE = 5  # seconds to wait for the Hub's first answer


def bundled() -> list[str]:
    """Names of the image sets that come with the package."""
    return sorted({path.parent.name for path in BUNDLED.glob("*/*.parquet")})


def read(name: str, split: str) -> tuple[pa.ChunkedArray, Path | Remote, np.ndarray | None, tuple[str, ...]]:
    """Encoded images (N,), where relative paths among them start, labels int64 (N,) or None, and the classes' names.

    An image is bytes, a path, or a struct of both. Raises ValueError, which names the culprit.
    """
    table, root = _open(_locate(name, split), split, name)
    if not len(table):
        raise ValueError(f"{name} {split} has no images")
    image, label = columns_of(table.schema, name)
    labels, label_names = labels_of(table, label, f"{name} {split}") if label else (None, ())
    return table[image], root, labels, label_names


def _locate(name: str, split: str) -> Path | Remote:
    """The file or folder of a name; downloads when it is a Hub name."""
    address = place(name)
    if isinstance(address, Remote):
        return address
    path = address
    if name in bundled() or path.exists():
        return BUNDLED / name if name in bundled() else path
    if HUB_NAME.fullmatch(name):
        return _download(name, split)
    raise ValueError(
        f"no image set {name!r}: {_hint(path)}bundled are {bundled()}; or give a folder, a Parquet file or owner/name"
    )


def _hint(path: Path) -> str:
    """'did you mean ...? ' for a path or a bundled name that is almost right, else ''."""
    siblings = [sibling.name for sibling in _visible(path.parent)] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*siblings, *bundled()], n=1)
    if not close:
        return ""
    return f"did you mean {close[0] if close[0] in bundled() else str(path.with_name(close[0]))!r}? "


def title_of(name: str) -> str:
    """The short name of a source: the last part of its path, or the folder's where a file is named after its split."""
    path = Path(name).expanduser().resolve()
    if name in bundled() or not path.is_file():
        return path.name
    return path.parent.name if _split_of(path) in SPLITS else path.stem


def _download(name: str, split: str) -> Path:
    """A folder with the Parquet files of one split from the Hub, or what its cache holds where the Hub is silent."""
    failure: Exception | None = None
    tries: list[dict[str, Any]] = [{"revision": revision, "local_files_only": True} for revision in REVISIONS]
    try:
        splits, revision = _on_hub(name)
    except LookupError as error:
        failure, tries = error, []
    except Exception as error:  # the Hub client raises a different class for each way to have no network
        failure = error
    else:
        tries = [{"revision": revision, "allow_patterns": [str(file) for file in _pick(splits, split, name)]}]
    for options in tries:
        try:
            return hub.snapshot(name, repo_type="dataset", **options)
        except Exception as error:
            failure = failure or error
    raise ValueError(
        f"no image set {name!r}: {_hint(Path(name))}not bundled ({bundled()}), no such folder, not in the Hub's cache, "
        f"and the Hub did not give it ({type(failure).__name__}: {first_line(failure)}). Without a network, copy its "
        f"Parquet files or images here and give their folder, or use a bundled set"
    ) from failure


def _on_hub(name: str) -> tuple[dict[str, list[PurePath]], str]:
    """Parquet files by split in a Hub repository, and the revision that has them."""
    from huggingface_hub import HfApi

    for revision in REVISIONS:
        found = HfApi().dataset_info(name, revision=revision, timeout=PATIENCE).siblings or []
        if splits := _split_files(PurePath(file.rfilename) for file in found):
            return splits, revision
    raise LookupError("it has no Parquet files")


def _open(path: Path | Remote, split: str, name: str) -> tuple[pa.Table, Path | Remote]:
    """Image and label columns of one split, with `datasets` features in the schema; and where relative paths start."""
    if isinstance(path, Remote) and not path.is_file():
        keys = [PurePath(file.key).relative_to(path.key) for file in path.glob("*.parquet")]
        files = [path / file.as_posix() for file in _pick(_split_files(keys), split, name)]
        return _read_parquet(files, name), path
    if isinstance(path, Remote) or path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is no Parquet file; expected FILE.parquet or a folder")
        if _split_of(path) in SPLITS:
            _pick({_split_of(path): [path]}, split, name)
        return _read_parquet([path], name), path.parent
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path, split, name), path
    below = [file.relative_to(path) for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}.parquet")]
    splits = _split_files(file for file in below if not str(file).startswith("."))
    if splits:
        return _read_parquet([path / file for file in _pick(splits, split, name)], name), path
    return _read_folders(path, split, name), path


def _split_of(file: PurePath | Remote) -> str:
    """The split that a Parquet file's name tells: `test.parquet`, `test-00000-of-00002.parquet`, `test/0.parquet`."""
    file = PurePath(file)
    shard = SHARD.fullmatch(file.stem)
    stem = shard[1] if shard else file.stem
    return file.parent.name if stem.isdigit() or stem == "part" else stem


def _split_files(files: Iterable[PurePath]) -> dict[str, list[PurePath]]:
    splits: dict[str, list[PurePath]] = {}
    for file in files:
        if file.suffix == ".parquet":
            splits.setdefault(_split_of(file), []).append(file)
    return splits


def _pick(splits: dict[str, list], split: str, name: str) -> list:
    """The files or folder of a split; ValueError when there is none, when some are missing, or when two sets mix."""
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}")
    files = sorted(splits[split])
    if len({file.parent for file in files}) > 1:
        folders = ", ".join(sorted({str(file.parent) for file in files}))
        raise ValueError(f"{name} has the split {split!r} in several folders: {folders}; give the path of one")
    shards = [shard for file in files if (shard := SHARD.fullmatch(file.stem))]
    if shards and len(files) != int(shards[0][3]):
        present = ", ".join(file.name for file in files)
        raise ValueError(f"{name} {split} has {len(files)} files where their names say {int(shards[0][3])}: {present}")
    return files


def _read_parquet(files: Sequence[Path | Remote], name: str) -> pa.Table:
    tables = []
    for path in files:
        try:
            with pq.ParquetFile(readable(path), pre_buffer=False) as file:
                columns = [column for column in columns_of(file.schema_arrow, str(path)) if column]
                # One thread: with more, some interpreters abort at exit (pyarrow 26).
                tables.append(file.read(columns=columns, use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet, is it cut short? {first_line(error)}") from error
    if any(table.schema != tables[0].schema for table in tables):
        raise ValueError(f"{name}: its Parquet files differ in their columns: {', '.join(map(str, files))}")
    return pa.concat_tables(tables)


def _read_saved(path: Path, split: str, name: str) -> pa.Table:
    """A split of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    several = (path / "dataset_dict.json").is_file()
    try:
        noted = json.loads((path / ("dataset_dict.json" if several else "state.json")).read_text(encoding="utf-8"))
        splits = noted["splits"] if several else [noted.get("_split") or split]
        if split in splits:
            saved = datasets.load_from_disk(str(path / split if several else path))
            return saved.with_format("arrow")[:].replace_schema_metadata(saved.features.arrow_schema.metadata)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a folder saved by `datasets`: {first_line(error)}") from error
    raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}")


def _read_folders(root: Path, split: str, name: str) -> pa.Table:
    """ROOT[/split]/class/image.png -> paths and labels; classes are numbered over all splits together, by name."""
    splits = {folder.name: [folder] for folder in _visible(root) if folder.is_dir() and folder.name in SPLITS}
    base = _pick(splits, split, name)[0] if splits else root
    classes, loose = _class_folders(base), _images_in(base.iterdir())
    if loose and classes:
        raise ValueError(f"{loose[0]} lies beside the class folders; put each image into the folder of its class")
    if not loose and not classes:
        raise ValueError(f"{base} has no images; expected Parquet files, or folders of images named after their class")
    features: dict = {"image": {"_type": "Image"}}
    columns: dict = {"image": [file.relative_to(root).as_posix() for file in loose]}
    if classes:
        bases = [folders[0] for folders in splits.values()] or [root]
        names = sorted({label for folder in bases for label in _class_folders(folder)})
        files = [file for label in names for file in classes.get(label, ())]
        features["label"] = {"_type": "ClassLabel", "names": names}
        columns["image"] = [file.relative_to(root).as_posix() for file in files]
        columns["label"] = [number for number, label in enumerate(names) for _ in classes.get(label, ())]
    return pa.table(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _class_folders(base: Path) -> dict[str, list[Path]]:
    """The images in each folder of `base` that has any, at any depth, by the folder's name."""
    files = {folder.name: _images_in(folder.rglob("*")) for folder in _visible(base) if folder.is_dir()}
    return {label: images for label, images in files.items() if images}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
