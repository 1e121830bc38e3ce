"""Where images come from: a name and a split -> one Arrow column of encoded images, and their labels.

A name is a bundled set, a file or folder on the disk or on an object store, or a repository of the Hub. Nothing in a
source is executed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igpt_lab.core import hub
from igpt_lab.core.hub import BUNDLED
from igpt_lab.core.storage import Remote, place, readable

SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # folder names that mean a split, not a class
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.parquet)")
REVISIONS = ("main", "refs/convert/parquet")  # the Hub keeps a Parquet copy of sets in other formats in the second
PATIENCE = 5  # seconds to wait for the Hub's first answer


def bundled() -> list[str]:
    """Names of the image sets that come with the package."""
    return sorted({path.parent.name for path in BUNDLED.glob("*/*.parquet")})


def read(name: str, split: str) -> tuple[pa.ChunkedArray, Path, np.ndarray | None, tuple[str, ...]]:
    """Encoded images (N,), where relative paths among them start, labels int64 (N,) or None, and the classes' names.

    An image is bytes, a path, or a struct of both. Raises ValueError, which names the culprit.
    """
    table, root = _open(_locate(name, split), split, name)
    if not len(table):
        raise ValueError(f"{name} {split} has no images")
    image, label = _columns(table.schema, name)
    labels, label_names = _labels(table, label, f"{name} {split}") if label else (None, ())
    return table[image], root, labels, label_names


def _locate(name: str, split: str) -> Path:
    """The local file or folder of a name; downloads when it is a Hub name."""
    if isinstance(there := place(name), Remote):
        return there
    path = Path(name).expanduser()
    if name in bundled() or path.exists():
        return BUNDLED / name if name in bundled() else path
    if HUB_NAME.fullmatch(name):
        return _download(name, split)
    raise ValueError(
        f"no image set {name!r}: {_hint(path)}bundled are {bundled()}; or give a folder, a Parquet file or owner/name"
    )


def _hint(path: Path) -> str:
    """'did you mean ...? ' for a path or a bundled name that is almost right, else ''."""
    beside = [each.name for each in _visible(path.parent)] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*beside, *bundled()], n=1)
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
    failure, tries = None, [{"revision": revision, "local_files_only": True} for revision in REVISIONS]
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


def _open(path: Path, split: str, name: str) -> tuple[pa.Table, Path]:
    """Image and label columns of one split, with `datasets` features in the schema; and where relative paths start."""
    if isinstance(path, Remote) and not path.is_file():
        files = [PurePath(file.key).relative_to(path.key) for file in path.glob("*.parquet")]
        return _read_parquet([path / file for file in _pick(_split_files(files), split, name)], name), path
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is no Parquet file; expected FILE.parquet or a folder")
        if _split_of(path) in SPLITS:
            _pick({_split_of(path): [path]}, split, name)
        return _read_parquet([path], name), path.parent
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path, split, name), path
    files = [file.relative_to(path) for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}.parquet")]
    if files := _split_files(file for file in files if not str(file).startswith(".")):
        return _read_parquet([path / file for file in _pick(files, split, name)], name), path
    return _read_folders(path, split, name), path


def _split_of(file: PurePath) -> str:
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
        found = ", ".join(file.name for file in files)
        raise ValueError(f"{name} {split} has {len(files)} files where their names say {int(shards[0][3])}: {found}")
    return files


def _read_parquet(files: list[Path], name: str) -> pa.Table:
    tables = []
    for path in files:
        try:
            with pq.ParquetFile(readable(path), pre_buffer=False) as file:
                columns = [column for column in _columns(file.schema_arrow, str(path)) if column]
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
    classes = {folder.name: _images_in(folder.rglob("*")) for folder in _visible(base) if folder.is_dir()}
    loose, labelled = _images_in(base.iterdir()), any(classes.values())
    if loose and labelled:
        raise ValueError(f"{loose[0]} lies beside the class folders; put each image into the folder of its class")
    if not loose and not labelled:
        raise ValueError(f"{base} has no images; expected Parquet files, or folders of images named after their class")
    features: dict = {"image": {"_type": "Image"}}
    columns: dict = {"image": loose}
    if labelled:
        folders = [each for part in (splits.values() or [[root]]) for each in _visible(part[0]) if each.is_dir()]
        names = sorted({folder.name for folder in folders if _images_in(folder.rglob("*"))})
        features["label"] = {"_type": "ClassLabel", "names": names}
        columns["image"] = [file for each in names for file in classes.get(each, ())]
        columns["label"] = [label for label, each in enumerate(names) for _ in classes.get(each, ())]
    columns["image"] = [file.relative_to(root).as_posix() for file in columns["image"]]
    return pa.table(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _visible(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if not each.name.startswith("."))


def _images_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _features(schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` noted about each column; {} where it noted nothing."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        noted = {}
    return {name: noted[name] if isinstance(noted.get(name), dict) else {} for name in schema.names}


def _columns(schema: pa.Schema, name: str) -> tuple[str, str | None]:
    """(image column, label column or None) of a table."""
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}
    images = [column for column in schema.names if kinds[column] == "Image"]
    images = images or [field.name for field in schema if kinds[field.name] is None and _holds_images(field)]
    labels = [column for column in LABEL_COLUMNS if column in schema.names]
    labels = labels or [column for column in schema.names if kinds[column] == "ClassLabel"]
    return _one(images, "image", schema, name), _one(labels, "label", schema, name)


def _one(found: list[str], what: str, schema: pa.Schema, name: str) -> str | None:
    """The only column of its kind, or the one with the usual name; None when there is no label column."""
    usual = [each for each in (*IMAGE_COLUMNS, *LABEL_COLUMNS) if each in found]
    if usual or len(found) == 1:
        return (usual or found)[0]
    if found or what == "image":
        count = "several columns that may hold" if found else "no column with"
        raise ValueError(f"{name} has {count} the {what}; name one {what!r}. Its columns are {', '.join(schema.names)}")
    return None


def _holds_images(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0
    return field.name in IMAGE_COLUMNS and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))


def _labels(table: pa.Table, column: str, what: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 (N,), or None where no row has one, and their names; words are numbered in alphabetical order."""
    values = table[column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    names = _features(table.schema)[column].get("names")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        words = values.to_pylist()
        names = sorted({word for word in words if word is not None})
        number = {word: label for label, word in enumerate(names)}
        labels = np.array([number.get(word, -1) for word in words], np.int64)
    elif pa.types.is_integer(values.type):
        labels = values.fill_null(-1).to_numpy().astype(np.int64)
    else:
        raise ValueError(f"{what}: column {column!r} is {values.type}; expected integers or words as labels")
    if (labels < 0).all():  # the Hub's way to withhold the labels of a test split
        return None, tuple(names or ())
    names = tuple(names or map(str, range(labels.max() + 1)))
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        raise ValueError(f"{what} row {wrong[0]} has no label among its {len(names)} classes: {values[wrong[0]]}")
    return fixed(labels), names


def fixed(array: np.ndarray) -> np.ndarray:
    """An array of its own that nobody can write to."""
    array = np.array(array, np.int64)
    array.flags.writeable = False
    return array


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
