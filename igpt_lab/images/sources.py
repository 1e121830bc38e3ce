"""Where images come from: a name and a split -> one Arrow column of encoded images, and their labels.

A name is a bundled set, a file or folder on the disk or on an object store, or a repository of the Hub. Nothing in a
source is executed.

`datasets` opens the folders that it saved, where they lie. The others are read here, because its `load_dataset` first
writes a copy of the images into a cache, also with `keep_in_memory`, and of a Hub repository it prepares every split.
It also reads splits out of file names, and drops all labels where one image lies beside the class folders.

The classes are numbered over all splits of a source together, by name: see `columns.class_names`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from igpt_lab.core import hub
from igpt_lab.core.arguments import local
from igpt_lab.core.hub import BUNDLED
from igpt_lab.core.storage import Remote, place
from igpt_lab.core.values import closest
from igpt_lab.images.columns import (
    Held,
    Labels,
    Opened,
    class_label,
    class_names,
    columns_of,
    fixed,
    read_labels,
)
from igpt_lab.images.folders import read_folders, split_of
from igpt_lab.images.opening import first_line
from igpt_lab.images.tables import configurations, is_saved, is_split, open_parquet, open_saved, pick, split_files

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.parquet)")
REVISIONS = ("main", "refs/convert/parquet")  # the Hub keeps a Parquet copy of sets in other formats in the second
PATIENCE = 5  # seconds to wait for the Hub's first answer


def bundled() -> list[str]:
    """Names of the image sets that come with the package."""
    return sorted({path.parent.name for path in BUNDLED.glob("*/*.parquet")})


@dataclass(frozen=True)
class Source:
    """One split: encoded images (N,), where relative paths among them start, and their labels int64 (N,) or None.

    An image is bytes, a path, or a struct of both. `label_names`: the classes of all splits, in the order of their
    numbers. `notes`: what was chosen, and what was left out, in words. `listed`: the paths were found in a folder, and
    not read from a table, which may name any file.
    """

    split: str
    column: pa.ChunkedArray | Held
    root: Path | Remote
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    notes: tuple[str, ...]
    listed: bool


def read(name: str, split: str | None, *, label: str | None = None, config: str | None = None) -> Source:
    """One split of what a name names; None is the split that a folder is named after, or else "test".

    `label` is the column of the labels, `config` the configuration of a set of the Hub that has several. Raises
    ValueError, which names the culprit.
    """
    opened = _open(_locate(name, split or "test", config), split, name, label, config)
    image, column = columns_of(opened.table.schema, name, None if opened.listed else label)
    if column and _is_on_hub(name) and not class_label(opened.table.schema, column, name):
        # The Hub gave this split alone, and words are numbered over all.
        opened = _open(_download(name, None, config), opened.split, name, label, config)
    labels, names = number_labels(opened, column, name)
    return Source(opened.split, opened.table[image], opened.root, labels, names, opened.notes, opened.listed)


def number_labels(opened: Opened, column: str | None, name: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 (N,) of an opened split, None where no row has one, and the names of the classes of all splits.

    Raises ValueError for a split without rows, and where some rows have no label.
    """
    table, title = opened.table, f"{name} {opened.split}"
    if not len(table):
        raise ValueError(f"{title} has no images")
    if column is None:
        return None, ()
    labels = read_labels(table, column, title)
    names = _names_over(labels, opened, name)
    numbers = labels.numbered(names)
    wrong = np.flatnonzero(numbers < 0)
    if len(wrong) == len(table):  # the Hub's way to withhold the labels of a test split
        return None, names
    if wrong.size:
        cell = table[column][int(wrong[0])]
        raise ValueError(f"{title} row {wrong[0]} has no label among its {len(names)} classes: {cell}")
    return fixed(numbers), names


def _names_over(labels: Labels, opened: Opened, name: str) -> tuple[str, ...]:
    """Names of the classes over all splits, train first; a split that cannot be read matters to words alone."""
    splits = {opened.split: labels}
    for other, read_other in opened.others.items():
        try:
            labels_of_other = read_other()
        except ValueError:
            if not labels.noted:
                raise
            continue
        if labels_of_other is not None:
            splits[other] = labels_of_other
    in_order = sorted(splits, key=lambda word: (split_of(word) != "train", word))
    return class_names([splits[word] for word in in_order], name)


def _open(path: Path | Remote, split: str | None, name: str, label: str | None, config: str | None) -> Opened:
    is_folder = isinstance(path, Path) and path.is_dir()
    if isinstance(path, Path) and is_saved(path):
        opened = None if config else open_saved(path, split or "test", name, label)
    else:
        opened = open_parquet(path, split or "test", name, label, config)
    if config and (not opened or not is_folder):
        raise ValueError(f"config={config!r}, and {name} has none: sets of the Hub and folders of Parquet files have")
    return opened or read_folders(Path(str(path)), split, name, label)


def _locate(name: str, split: str, config: str | None) -> Path | Remote:
    """The file or folder of a name; downloads when it is a Hub name."""
    if not name.strip():
        raise ValueError(f"the name of the images is empty; {_expected()}")
    address = place(name)
    if isinstance(address, Remote):
        return address
    path = local(name)
    if name in bundled() or path.exists():
        return BUNDLED / name if name in bundled() else path
    if _is_on_hub(name):
        return _download(name, split, config)
    raise ValueError(f"there is no image set {name!r}; {_expected()}{_hint(path)}")


def _is_on_hub(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and name not in bundled() and not local(name).exists()


def _hint(path: Path) -> str:
    """`; did you mean ...?` for a path or a bundled name that is almost right, else ''."""
    siblings = [sibling.name for sibling in _visible(path.parent)] if path.parent.is_dir() else []
    close = closest(path.name, [*siblings, *bundled()])
    whole = close if close in bundled() else str(path.with_name(close)) if close else ""
    return whole and f"; did you mean {whole!r}?"


def _expected() -> str:
    return f"expected a bundled name ({', '.join(bundled())}), a folder, a Parquet file, or a Hub name owner/name"


def title_of(name: str) -> str:
    """The short name of a source: the last part of its path, or the folder's above what is named after its split."""
    path = local(name).resolve()
    if name in bundled() or not path.is_file():
        return _above_splits(path).name or path.name
    return path.parent.name if is_split(path) else path.stem


def _above_splits(path: Path) -> Path:
    """The folder that a folder of one split lies in, as photos of photos/train; any other path as it is."""
    split = split_of(path.name)
    while path.is_dir() and split and split_of(path.name) == split:
        path = path.parent
    return path


def _download(name: str, split: str | None, config: str | None) -> Path:
    """A folder with the Parquet files of one split, or of all, from the Hub; its cache's where the Hub is silent."""
    failure: Exception | None = None
    tries: list[dict[str, Any]] = [{"revision": revision, "local_files_only": True} for revision in REVISIONS]
    try:
        splits, revision = _on_hub(name, config)
    except LookupError as error:
        failure, tries = error, []
    except Exception as error:  # the Hub client raises a different class for each way to have no network
        failure = error
    else:
        files = pick(splits, split, name) if split else [file for files in splits.values() for file in files]
        tries = [{"revision": revision, "allow_patterns": [str(file) for file in files]}]
    for options in tries:
        try:
            return hub.snapshot(name, repo_type="dataset", **options)
        except Exception as error:
            failure = failure or error
    raise ValueError(
        f"there is no image set {name!r}: it is neither bundled ({', '.join(bundled())}) nor a folder nor in the Hub's "
        f"cache, and the Hub did not give it ({type(failure).__name__}: {first_line(failure)}); "
        f"without a network, copy its Parquet files or images into a folder, and give its path{_hint(Path(name))}"
    ) from failure


def _on_hub(name: str, config: str | None) -> tuple[dict[str, list[PurePath]], str]:
    """Parquet files by split in a Hub repository, of a configuration alone, and the revision that has them."""
    from huggingface_hub import HfApi

    seen: list[PurePath] = []
    for revision in REVISIONS:
        siblings = HfApi().dataset_info(name, revision=revision, timeout=PATIENCE).siblings or []
        files = [PurePath(file.rfilename) for file in siblings]
        if splits := split_files(files, config):
            return splits, revision
        seen += [file for file in files if file.suffix == ".parquet"]
    if seen:
        raise LookupError(f"it has no configuration {config!r}; it has {', '.join(configurations(seen))}")
    raise LookupError("it has no Parquet files")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
