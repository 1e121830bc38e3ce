"""Image sets and token sets: the images or the tokens of one split, with their labels, from any source.

Whatever the source, an image set is one Arrow column of encoded images and one of labels; images are decoded when they
are asked for. Nothing in a source is executed.
"""

from __future__ import annotations

import hashlib
import io
import operator
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from igpt_lab.core.arguments import local
from igpt_lab.core.display import card, picture
from igpt_lab.core.provenance import atomic_write
from igpt_lab.core.storage import Remote
from igpt_lab.images.columns import LABEL_COLUMNS, BadItem, Held, NoPicture, fixed
from igpt_lab.images.opening import BadImage, decode, read_inside
from igpt_lab.images.splits import stratified_draw
from igpt_lab.images.tables import as_parquet

SHORT = 40  # letters that the names of the classes may have in a line about the set


@dataclass(frozen=True, eq=False, repr=False)
class _Rows:
    """What image sets and token sets share: rows of one split, in a fixed order, and their labels."""

    name: str
    split: str
    index: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    seen: array | None = field(default=None, kw_only=True)  # uint64: what was read of each row of the source, 0 as yet

    def __post_init__(self) -> None:
        if self.seen is None:  # selections share it
            object.__setattr__(self, "seen", array("Q", bytes(8 * (int(self.index.max(initial=-1)) + 1))))

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        classes = "no labels" if self.labels is None else f"{len(self.label_names)} classes"
        names = ", ".join(self.label_names)
        classes += f": {names}" if self.labels is not None and len(names) <= SHORT else ""
        return f"<{type(self).__name__} {self.name} {self.split}: {len(self):,} images, {classes}>"

    def __getitem__(self, position: Any) -> Any:
        """The image at a position, mode RGB; of a slice, a list or a mask of positions the set of these alone.

        ValueError names the row of an image that cannot be read, BadImage is damaged.
        """
        if isinstance(position, slice):
            return self.select(np.arange(len(self))[position])
        return self._image(operator.index(position)) if np.ndim(position) == 0 else self.select(position)

    def _image(self, position: int) -> Image.Image:
        raise NotImplementedError

    def select(self, positions: Sequence[int] | np.ndarray) -> Self:
        """The set of these positions only, in this order; `index` still counts the source's rows."""
        chosen = np.asarray(positions) if len(positions) else np.zeros(0, np.int64)
        labels = None if self.labels is None else fixed(self.labels[chosen])
        return replace(self, index=fixed(self.index[chosen]), labels=labels)

    def require_labels(self) -> np.ndarray:
        """The labels, int64 (N,); ValueError when the source has none."""
        if self.labels is None:
            raise ValueError(
                f"{self.name} {self.split} has no labels, and this needs them; name a label column one of "
                f"{', '.join(LABEL_COLUMNS)}, or put the images of each class into a folder of their own"
            )
        return self.labels

    def _limited(self, limit: int | None, seed: int) -> Self:
        """At most `limit` rows, a seeded draw that is stratified over the labels."""
        if limit is None:
            return self
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels
        return self.select(stratified_draw(labels, limit, seed=seed))

    def _hashed(self) -> bytes:
        """The labels and the row numbers as bytes: the end of what a fingerprint is made of."""
        labels = b"no labels" if self.labels is None else self.labels.astype("<i8").tobytes()
        return labels + self.index.astype("<i8").tobytes()

    def _name_of(self, row: int, path: str = "") -> str:
        return f"{self.name} {self.split} row {row}" + (f" ({path})" if path else "")

    def _note(self, row: int, data: bytes | memoryview, path: str = "", advice: str = "load the images again") -> None:
        """ValueError where a row of the source is not what it was when it was first read, for a fingerprint, say."""
        assert self.seen is not None  # see __post_init__
        before, check = self.seen[row], 1 + (len(data) << 32 | zlib.crc32(data))
        if before and before != check:
            raise ValueError(f"{self._name_of(row, path)} has changed since it was first read; {advice}")
        self.seen[row] = check

    def _facts(self) -> dict[str, str]:
        """What a notebook shows of the set, by name."""
        facts = {"images": f"{len(self):,}", "classes": "no labels"}
        if self.labels is not None:
            counts = np.bincount(self.labels, minlength=len(self.label_names))
            low, high = counts.min(), counts.max()
            sizes = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            names = ", ".join(self.label_names[:10]) + (", ..." if len(counts) > 10 else "")
            facts["classes"] = f"{len(counts)}, each of {sizes} images: {names}"
        return facts

    def _title(self) -> str:
        return f"{type(self).__name__} {self.name} {self.split}"


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(_Rows):
    """Images of one split, in a fixed order; the n-th is row `index[n]` of the split as its source has it.

    `labels`: int64 (N,) in [0, K), or None; `label_names`: K names; `index`: int64 (N,).
    """

    column: pa.ChunkedArray | Held  # encoded images of the whole split: bytes, a path, or a struct of both
    root: Path | Remote  # where a relative path in `column` starts
    source: dict | None = None  # the arguments of `load_images` that load these images again
    notes: tuple[str, ...] = ()  # what was chosen and what was left out, in words
    listed: bool = False  # the paths are those of files that lie under `root`, and not what a table says

    def _repr_html_(self) -> str:
        return card(self._title(), self._facts() | {"notes": "; ".join(self.notes)}, below=_thumbnails(self))

    def _image(self, position: int) -> Image.Image:
        data, path = self._encoded(position)
        return decode(data, self._name_of(self.index[position], path))

    def __iter__(self) -> Iterator[Image.Image]:
        """The images in order, none of them held."""
        return (self[position] for position in range(len(self)))

    def _encoded(self, position: int) -> tuple[bytes, str]:
        """The encoded image as the source has it, and its path or ''; ValueError where it is not what it once was."""
        row = int(self.index[position])
        try:
            cell: Any = self.column[row]
            cell = cell.as_py() if isinstance(cell, pa.Scalar) else cell
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._name_of(row)} has a path that is not UTF-8; write the path anew") from error
        except BadItem as error:
            raise BadImage(f"{self._name_of(row)} {error}") from error
        except NoPicture as error:  # of what is in memory
            raise ValueError(f"{self._name_of(row)} {error}") from error
        if not isinstance(cell, dict):
            cell = {"path": cell} if isinstance(cell, str) else {"bytes": cell}
        data, path = cell.get("bytes"), cell.get("path") or ""
        if data is None and path and isinstance(path, str):
            try:
                data = read_inside(self.root, path, linked=self.listed)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"{self._name_of(row, path)} cannot be read: {reason}") from error
        data = b"" if data is None else data
        if not isinstance(data, bytes):
            raise ValueError(f"{self._name_of(row, path)} is a {type(data).__name__}; expected an encoded picture")
        if isinstance(self.column, pa.ChunkedArray):
            self._note(row, data, path)
        else:
            self._note(row, data, path, "load the images again, without transforms that draw at random")
        return data, path

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The file name of each image as its source has it, '' where it has none."""
        if not isinstance(self.column, pa.ChunkedArray):
            return tuple(self.column.files[row] for row in self.index)
        if pa.types.is_struct(self.column.type):
            field = self.column.type.get_field_index("path")
            paths = pa.nulls(len(self.column)) if field < 0 else pc.struct_field(self.column, [field])
        else:
            paths = self.column if pa.types.is_string(self.column.type) else pa.nulls(len(self.column))
        return tuple(path or "" for path in paths.take(pa.array(self.index)).to_pylist())

    def save(self, file: str | Path) -> Path:
        """Write the images with their labels and file names as Parquet, which `load_images` reads; returns its path.

        `SET/train.parquet` and `SET/test.parquet` are the splits of a set. Its images have the encoding of their
        source; of images in memory that is a PPM picture.
        """
        names = self.label_names if self.labels is not None else None
        return atomic_write(local(file), as_parquet(map(self._stored, range(len(self))), self.labels, names))

    def _stored(self, position: int) -> tuple[bytes, str]:
        """The encoded image as `save` writes it, and its path."""
        return self._encoded(position)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the encoded images, the labels and the row numbers, in order: the content, not the files."""
        sha = hashlib.sha256()
        for position in range(len(self)):
            try:
                data, _ = self._encoded(position)
            except BadImage as error:  # the set's own code fails on it
                data = str(error).encode()
            sha.update(len(data).to_bytes(8, "little") + data)
        sha.update(self._hashed())
        return sha.hexdigest()

    def images(self, positions: Iterable[int] | None = None) -> list[Image.Image]:
        """RGB images at `positions`, or all of them."""
        return [self[position] for position in (range(len(self)) if positions is None else positions)]

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """RGB images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.images(range(start, min(start + size, len(self))))


@dataclass(frozen=True, eq=False, repr=False)
class TokenSet(_Rows):
    """Images of one split that come as tokens, without pixels; the n-th is row `index[n]` of `tokens`.

    `tokens`: integers (rows of the split, T), palette indices in raster order, as the source has them. `labels`,
    `label_names` and `index` as in an `ImageSet`.
    """

    tokens: np.ndarray
    source: dict | None = None  # the arguments of `load_tokens` that load these tokens again

    def _repr_html_(self) -> str:
        return card(self._title(), self._facts() | {"tokens": f"{self.tokens.shape[1]:,} an image"})

    @property
    def files(self) -> tuple[str, ...]:
        """'' for each: tokens have no files of their own."""
        return ("",) * len(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens, the labels and the row numbers, in order."""
        sha = hashlib.sha256(f"tokens {self.tokens.shape[1]}".encode())
        for rows in np.array_split(self.index, len(self) // 10_000 + 1):
            sha.update(self._read(rows).astype("<i8").tobytes())
        sha.update(self._hashed())
        return sha.hexdigest()

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Rows of `tokens`, which may lie on the disk; ValueError where one is not what it once was."""
        chosen = np.ascontiguousarray(self.tokens[rows])
        for row, tokens in zip(rows.tolist(), chosen, strict=True):
            self._note(row, tokens.data)
        return chosen

    def encoded(self, positions: int, colours: int) -> np.ndarray:
        """The tokens, uint16 (N, T), for a model of so many positions and colours; ValueError when they do not fit."""
        if self.tokens.shape[1] != positions:
            raise ValueError(
                f"{self.name} {self.split} has {self.tokens.shape[1]} tokens per image; "
                f"the model has {positions} positions"
            )
        chosen = self._read(self.index)
        wrong = np.argwhere((chosen < 0) | (chosen >= colours))
        if wrong.size:
            row, place = wrong[0]
            raise ValueError(
                f"{self.name} {self.split} row {self.index[row]} has the token {chosen[row, place]}; the palette has "
                f"{colours} colours, 0 to {colours - 1}"
            )
        return chosen.astype(np.uint16)

    def images(self, positions: Iterable[int] | None = None) -> NoReturn:
        """ValueError: there are none."""
        raise self._no_pixels()

    def batches(self, size: int) -> NoReturn:
        """ValueError: there are no images."""
        raise self._no_pixels()

    def _image(self, position: int) -> NoReturn:
        raise self._no_pixels()

    def _no_pixels(self) -> ValueError:
        return ValueError(f"{self.name} {self.split} holds tokens, and this needs the images they were made from")


def _thumbnails(images: ImageSet, count: int = 12) -> str:
    """The first images beside each other, each at most 56 pixels a side; '' where one cannot be read."""
    try:
        shown = list(map(_small, islice(images, count)))
    except ValueError:
        return ""
    if not shown:
        return ""
    width, height = np.max([image.size for image in shown], axis=0).tolist()
    strip = Image.new("RGB", (len(shown) * (width + 1) - 1, height), (136, 136, 136))
    for i, image in enumerate(shown):
        strip.paste(image, (i * (width + 1), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "png")
    return picture(buffer.getvalue(), words=f"the first {len(shown)} images")


def _small(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (56, 56)) if max(image.size) > 56 else image
