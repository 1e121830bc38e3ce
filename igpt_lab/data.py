"""Named image sets: where they lie, their splits, subsets with few labels, and their tokens.

Whatever the source, an image set is one Arrow column of encoded images and one of labels; images are decoded when they
are asked for. Nothing in a source is executed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from igpt_lab.cards import card, picture
from igpt_lab.pixels import to_rgb
from igpt_lab.storage import Remote, place, readable

BUNDLED = Path(__file__).parent / "bundled"
SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # folder names that mean a split, not a class
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
TOKEN_FILE = re.compile(r"(.+)_(?:tr|va|te)X\.npy")
TOKEN_SPLITS = {"train": "tr", "validation": "va", "valid": "va", "val": "va", "dev": "va", "test": "te"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.parquet)")
REVISIONS = ("main", "refs/convert/parquet")  # the Hub keeps a Parquet copy of sets in other formats in the second
PATIENCE = 5  # seconds to wait for the Hub's first answer


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images of one split, in a fixed order; the n-th is row `index[n]` of the split as its source has it.

    `labels`: int64 (N,) in [0, K), or None; `label_names`: K names; `index`: int64 (N,).
    """

    name: str
    split: str
    index: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    column: pa.ChunkedArray  # encoded images of the whole split: bytes, a path, or a struct of both
    root: Path  # where a relative path in `column` starts
    source: dict | None = None  # what `load_images` was given

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        classes = "no labels" if self.labels is None else f"{len(self.label_names)} classes"
        return f"<ImageSet {self.name} {self.split}: {len(self):,} images, {classes}>"

    def _repr_html_(self) -> str:
        return _card(self, _thumbnails(self))

    def __getitem__(self, position: int) -> Image.Image:
        """The image at `position`, mode RGB; ValueError names its row when it cannot be read."""
        data, path = self._encoded(position)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:  # each of Pillow's formats raises classes of its own for a damaged file
            known = not isinstance(error, UnidentifiedImageError)
            why = _line(error) if known else "its format is unknown"
            raise ValueError(
                f"{self._row(position, path)} is not a readable image, is it cut short? {why} ({len(data):,} bytes)"
            ) from error
        try:
            return to_rgb(image)
        except Exception as error:
            raise ValueError(f"{self._row(position, path)}: {_line(error)}") from error

    def _encoded(self, position: int) -> tuple[bytes, str]:
        """The encoded image as the source has it, and its path or ''."""
        cell = self.column[int(self.index[position])].as_py()
        if not isinstance(cell, dict):
            cell = {"path": cell} if isinstance(cell, str) else {"bytes": cell}
        data, path = cell.get("bytes"), cell.get("path") or ""
        if data is not None:
            return data, path
        try:
            return (self.root / path).read_bytes(), path
        except OSError as error:
            raise ValueError(f"{self._row(position, path)} cannot be read: {error.strerror}") from error

    def _row(self, position: int, path: str) -> str:
        return f"{self.name} {self.split} row {self.index[position]}" + (f" ({path})" if path else "")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the encoded images, the labels and the row numbers, in order: the content, not the files."""
        sha = hashlib.sha256()
        for position in range(len(self)):
            data, _ = self._encoded(position)
            sha.update(len(data).to_bytes(8, "little") + data)
        sha.update(b"no labels" if self.labels is None else self.labels.astype("<i8").tobytes())
        sha.update(self.index.astype("<i8").tobytes())
        return sha.hexdigest()

    def images(self, positions: Iterable[int] | None = None) -> list[Image.Image]:
        """RGB images at `positions`, or all of them."""
        return [self[position] for position in (range(len(self)) if positions is None else positions)]

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """RGB images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.images(range(start, min(start + size, len(self))))

    def select(self, positions: Sequence[int] | np.ndarray) -> ImageSet:
        """The image set of these positions only, in this order; `index` still counts the source's rows."""
        positions = np.asarray(positions) if len(positions) else np.zeros(0, np.int64)
        labels = None if self.labels is None else _fixed(self.labels[positions])
        return replace(self, index=_fixed(self.index[positions]), labels=labels)

    def require_labels(self) -> np.ndarray:
        """The labels, int64 (N,); ValueError when the source has none."""
        if self.labels is None:
            raise ValueError(
                f"{self.name} {self.split} has no labels, and this needs them; name a label column one of "
                f"{', '.join(LABEL_COLUMNS)}, or put the images of each class into a folder of their own"
            )
        return self.labels


@dataclass(frozen=True, eq=False, repr=False)
class TokenSet:
    """Images of one split that come as tokens: an `ImageSet` without pixels.

    `tokens`: integers (rows of the split, T), palette indices in raster order, as the source has them.
    """

    name: str
    split: str
    index: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    tokens: np.ndarray
    source: dict | None = None

    __len__, select, require_labels = ImageSet.__len__, ImageSet.select, ImageSet.require_labels

    def __repr__(self) -> str:
        return ImageSet.__repr__(self).replace("ImageSet", "TokenSet")

    def _repr_html_(self) -> str:
        return _card(self, "")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens, the labels and the row numbers, in order."""
        sha = hashlib.sha256(f"tokens {self.tokens.shape[1]}".encode())
        for rows in np.array_split(self.index, len(self) // 10_000 + 1):
            sha.update(self.tokens[rows].astype("<i8").tobytes())
        sha.update(b"no labels" if self.labels is None else self.labels.astype("<i8").tobytes())
        sha.update(self.index.astype("<i8").tobytes())
        return sha.hexdigest()

    def encoded(self, positions: int, colours: int) -> np.ndarray:
        """The tokens, uint16 (N, T), for a model of so many positions and colours; ValueError when they do not fit."""
        if self.tokens.shape[1] != positions:
            raise ValueError(
                f"{self.name} {self.split} has {self.tokens.shape[1]} tokens an image, the model {positions} positions"
            )
        chosen = self.tokens[self.index]
        wrong = np.argwhere((chosen < 0) | (chosen >= colours))
        if wrong.size:
            row, at = wrong[0]
            raise ValueError(
                f"{self.name} {self.split} row {self.index[row]} has the token {chosen[row, at]}; the palette has "
                f"{colours} colours, 0 to {colours - 1}"
            )
        return chosen.astype(np.uint16)

    def images(self, *_) -> list[Image.Image]:
        """ValueError: there are none."""
        raise ValueError(f"{self.name} {self.split} holds tokens, and this needs the images they were made from")

    __getitem__ = batches = images


def _card(images: ImageSet | TokenSet, below: str) -> str:
    """What a notebook shows of an image set."""
    facts = {"images": f"{len(images):,}", "classes": "no labels"}
    if isinstance(images, TokenSet):
        facts["tokens"] = f"{images.tokens.shape[1]:,} an image"
    if images.labels is not None:
        counts = np.bincount(images.labels, minlength=len(images.label_names))
        each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        names = ", ".join(images.label_names[:10]) + (", ..." if len(counts) > 10 else "")
        facts["classes"] = f"{len(counts)} of {each} images: {names}"
    return card(f"{type(images).__name__} {images.name} {images.split}", facts, below=below)


def _thumbnails(images: ImageSet, count: int = 12) -> str:
    """The first images beside each other, each at most 56 pixels a side; '' where one cannot be read."""
    try:
        shown = images.images(range(min(count, len(images))))
    except ValueError:
        return ""
    if not shown:
        return ""
    shown = [ImageOps.contain(image, (56, 56)) if max(image.size) > 56 else image for image in shown]
    width, height = np.max([image.size for image in shown], axis=0).tolist()
    strip = Image.new("RGB", (len(shown) * (width + 1) - 1, height), (136, 136, 136))
    for i, image in enumerate(shown):
        strip.paste(image, (i * (width + 1), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "png")
    return picture(buffer.getvalue(), words=f"the first {len(shown)} images")


def load_images(
    name: str | Path, split: str = "test", *, limit: int | None = None, seed: int = 0
) -> ImageSet | TokenSet:
    """One split of an image set; `limit` keeps at most so many images, a seeded draw that is stratified over labels.

    `name` is a bundled name; a folder of class folders, with or without `train/` and `test/` above them; a Parquet file
    or a folder of them, as the Hub has; a folder saved by `datasets`; or a Hub name `owner/name`. A source without
    splits is served whole under any split's name. What `load_tokens` takes gives a token set. Raises ValueError, which
    names the culprit.
    """
    if _token_sets(Path(name).expanduser()):
        return load_tokens(name, split, limit=limit, seed=seed)
    name, path = str(name), _locate(str(name), split)
    table, root = _open(path, split, name)
    if not len(table):
        raise ValueError(f"{name} {split} has no images")
    image, label = _columns(table.schema, name)
    labels, label_names = _labels(table, label, f"{name} {split}") if label else (None, ())
    images = ImageSet(_title(name), split, _fixed(np.arange(len(table))), labels, label_names, table[image], root)
    images = replace(images, source=_source(name, limit, seed))
    return images if limit is None else images.select(_draw(images, limit, seed))


def load_tokens(name: str | Path, split: str = "test", *, limit: int | None = None, seed: int = 0) -> TokenSet:
    """One split of a token set as OpenAI publishes them: `cifar10_trX.npy`, `cifar10_trY.npy`, and so with va and te.

    X: integers (N, T); Y, if it is there: classes (N,), or one column a class (N, K) with a 1 in the right one. `name`
    is FOLDER/cifar10, a folder that holds one set, or one of the files. Raises ValueError, which names the culprit.
    """
    sets = _token_sets(Path(name).expanduser())
    if len(sets) != 1:
        found = f"several token sets: {', '.join(map(str, sets))}; give one" if sets else "no NAME_trX.npy, _vaX, _teX"
        raise ValueError(f"{name} has {found}")
    files = {each: sets[0].with_name(f"{sets[0].name}_{part}X.npy") for each, part in TOKEN_SPLITS.items()}
    if split not in files or not files[split].is_file():
        there = ", ".join(each for each in ("train", "validation", "test") if files[each].is_file())
        raise ValueError(f"{name} has no split {split!r}; it has {there}")
    tokens = _array(files[split])
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(f"{files[split]} is {tokens.dtype} {tokens.shape}; expected integers (images, tokens)")
    beside = files[split].with_name(files[split].name[:-5] + "Y.npy")
    labels, names = _classes_of(beside, len(tokens)) if beside.is_file() else (None, ())
    whole = TokenSet(sets[0].name, split, _fixed(np.arange(len(tokens))), labels, names, tokens)
    whole = replace(whole, source=_source(str(name), limit, seed))
    return whole if limit is None else whole.select(_draw(whole, limit, seed))


def _token_sets(path: Path) -> list[Path]:
    """FOLDER/NAME of the token sets that a path means: of a folder all, else the one it begins, or is a file of."""
    if of := TOKEN_FILE.fullmatch(path.name):
        return [path.with_name(of[1])] if path.is_file() else []
    folder = path if path.is_dir() else path.parent
    names = {of[1] for file in folder.glob("*_??X.npy") if (of := TOKEN_FILE.fullmatch(file.name))}
    return [folder / name for name in sorted(names) if path.is_dir() or name == path.name]


def _source(name: str, limit: int | None, seed: int) -> dict:
    """What loads these images again, from any folder."""
    path = Path(name).expanduser()
    here = name not in bundled() and (path.exists() or _token_sets(path))
    return {"name": str(path.resolve()) if here else name, "limit": limit, "seed": seed}


def _array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped from the disk."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file of numbers, is it cut short?") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive; expected a .npy file")
    return array


def _classes_of(path: Path, rows: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (N,) and the classes' names, their numbers, of a Y file."""
    given = _array(path)
    if given.ndim not in (1, 2) or len(given) != rows or given.dtype.kind not in "iufb":
        raise ValueError(f"{path} is {given.dtype} {given.shape}; expected classes of {rows} images")
    labels, count = np.empty(rows, np.int64), given.shape[1] if given.ndim == 2 else int(np.nan_to_num(given.max())) + 1
    if not 0 < count < 1_000_000:
        raise ValueError(f"{path} has the class {count - 1}; expected classes from 0 on")
    for start in range(0, rows, 10_000):
        part = given[start : start + 10_000]
        with np.errstate(invalid="ignore"):  # no number: found below, as it is not what it was made into
            found = (part if part.ndim == 1 else part.argmax(axis=1)).astype(np.int64)
        back = found if part.ndim == 1 else np.eye(count)[found]
        wrong = (part != back).reshape(len(part), -1).any(axis=1) | (found < 0)
        if wrong.any():
            raise ValueError(f"{path} row {start + wrong.argmax()} names no class: {part[wrong.argmax()]}")
        labels[start : start + len(part)] = found
    return _fixed(labels), tuple(map(str, range(count)))


def _draw(images: ImageSet, limit: int, seed: int) -> np.ndarray:
    """Positions of min(limit, N) images, in order: the first of each class before the second of any, by proportion."""
    if limit < 1:
        raise ValueError(f"limit={limit}; expected at least 1 image")
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    order, turn = np.random.default_rng(seed).permutation(len(labels)), np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        turn[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def few_per_class(labels: np.ndarray, k: int, *, seed: int = 0, draw: int = 0) -> np.ndarray:
    """Sorted int64 positions (K * k,) of k rows of each class that occurs in `labels` (N,).

    A pure function of the labels, `seed`, `draw` and k; the rows for a smaller k lie within those for a larger one.
    Raises ValueError when a class has fewer than k rows.
    """
    if k < 1:
        raise ValueError(f"{k} labels a class; expected at least 1")
    chosen = []
    for label, rows in _classes(labels).items():
        if len(rows) < k:
            raise ValueError(f"class {label} has {len(rows)} rows; {k} a class were asked for")
        chosen.append(np.random.default_rng([seed, draw, label]).permutation(rows)[:k])
    return np.sort(np.concatenate(chosen))


def stratified_split(labels: np.ndarray, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): sorted int64 positions, disjoint and together all; `fraction` of each class is held out.

    Of a class with n rows that is `fraction * n` rounded, at least 1 and at most n - 1. Raises ValueError for n = 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}; expected a number between 0 and 1")
    held = np.zeros(len(labels), bool)
    for label, rows in _classes(labels).items():
        if len(rows) < 2:
            raise ValueError(f"class {label} has 1 row; a split needs at least 2 of each class")
        count = min(max(int(fraction * len(rows) + 0.5), 1), len(rows) - 1)
        held[np.random.default_rng([seed, label]).permutation(rows)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _classes(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each class, in order."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(f"expected labels as integers (N,); these are {labels.dtype} {labels.shape}")
    return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}


def tokenize(images: ImageSet | TokenSet, processor, *, batch_size: int = 256, progress: bool = True) -> np.ndarray:
    """Palette indices uint16 (N, T) of all images, by the processor's `encode`; a token set's own, checked.

    `processor` may be None for a token set, as the model has it whose folder lacks a palette.
    """
    if isinstance(images, TokenSet):
        fits = (processor.side**2, len(processor.clusters)) if processor else (images.tokens.shape[1], 1 << 16)
        return images.encoded(*fits)
    if processor is None:
        raise ValueError(
            f"{images.name} {images.split} holds images, and they need a palette to become tokens: the model's folder "
            "has no preprocessor_config.json; put it there, or convert the weights again with a palette"
        )
    tokens = []
    with tqdm(total=len(images), desc=f"tokens of {images.name} {images.split}", disable=not progress) as bar:
        for batch in images.batches(batch_size):
            tokens.append(processor.encode(batch).astype(np.uint16))
            bar.update(len(batch))
    return np.concatenate(tokens)


# Where images come from: a name and a split -> columns.


def bundled() -> list[str]:
    """Names of the image sets that come with the package."""
    return sorted({path.parent.name for path in BUNDLED.glob("*/*.parquet")})


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


def _title(name: str) -> str:
    """The short name of a source: the last part of its path, or the folder's where a file is named after its split."""
    path = Path(name).expanduser().resolve()
    if name in bundled() or not path.is_file():
        return path.name
    return path.parent.name if _split_of(path) in SPLITS else path.stem


def _download(name: str, split: str) -> Path:
    """A folder with the Parquet files of one split from the Hub, or what its cache holds where the Hub is silent."""
    from huggingface_hub import snapshot_download

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
            return Path(snapshot_download(name, repo_type="dataset", **options))
        except Exception as error:
            failure = failure or error
    raise ValueError(
        f"no image set {name!r}: {_hint(Path(name))}not bundled ({bundled()}), no such folder, not in the Hub's cache, "
        f"and the Hub did not give it ({type(failure).__name__}: {_line(failure)}). Without a network, copy its "
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
            raise ValueError(f"{path} cannot be read as Parquet, is it cut short? {_line(error)}") from error
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
        raise ValueError(f"{path} cannot be read as a folder saved by `datasets`: {_line(error)}") from error
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
    return _fixed(labels), names


def _fixed(array: np.ndarray) -> np.ndarray:
    """An array of its own that nobody can write to."""
    array = np.array(array, np.int64)
    array.flags.writeable = False
    return array


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
