"""Named image sets: their images and tokens, their splits, and subsets with few labels.

Whatever the source, an image set is one Arrow column of encoded images and one of labels; images are decoded when they
are asked for. Nothing in a source is executed.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from igpt_lab.core.display import card, picture
from igpt_lab.images.processor import to_rgb
from igpt_lab.images.sources import LABEL_COLUMNS, bundled, first_line, fixed, read, title_of
from igpt_lab.images.splits import stratified_draw

TOKEN_FILE = re.compile(r"(.+)_(?:tr|va|te)X\.npy")
TOKEN_SPLITS = {"train": "tr", "validation": "va", "valid": "va", "val": "va", "dev": "va", "test": "te"}


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
            why = first_line(error) if known else "its format is unknown"
            raise ValueError(
                f"{self._row(position, path)} is not a readable image, is it cut short? {why} ({len(data):,} bytes)"
            ) from error
        try:
            return to_rgb(image)
        except Exception as error:
            raise ValueError(f"{self._row(position, path)}: {first_line(error)}") from error

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
        labels = None if self.labels is None else fixed(self.labels[positions])
        return replace(self, index=fixed(self.index[positions]), labels=labels)

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
    name = str(name)
    column, root, labels, label_names = read(name, split)
    images = ImageSet(title_of(name), split, fixed(np.arange(len(column))), labels, label_names, column, root)
    images = replace(images, source=_source(name, limit, seed))
    return images if limit is None else images.select(stratified_draw(images, limit, seed))


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
    whole = TokenSet(sets[0].name, split, fixed(np.arange(len(tokens))), labels, names, tokens)
    whole = replace(whole, source=_source(str(name), limit, seed))
    return whole if limit is None else whole.select(stratified_draw(whole, limit, seed))


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
    return fixed(labels), tuple(map(str, range(count)))
