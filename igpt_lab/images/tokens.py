"""Tokens on disk, made once for an image set and a palette, so that ten checkpoints decode the images once.

    <root>/tokens/<images>-<split>-<key8>/part-00000-of-00007.parquet

A part holds a fixed range of rows of the set: `index` (row in the source) and `tokens`, fixed_size_list<uint16>[T]. Its
pages carry checksums, and a part that is damaged or of other rows is made again.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import brief
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import STORED, atomic_write, digest, made_by, named
from igpt_lab.core.storage import Place, readable
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.loading import load_images
from igpt_lab.images.opening import BadImage


@checked
def tokenize(images, processor, *, batch_size: int = 256, progress: bool = True) -> np.ndarray:
    """Palette indices uint16 (N, T) of all images, by the processor's `encode`; a token set's own, checked.

    `images` are a set, or what `load_images` takes; of a name, or of several splits, it is test. `processor` may be
    None for a token set, as the model has it whose folder lacks a palette.
    """
    images = load_images(images)
    if isinstance(images, TokenSet):
        fits = (processor.side**2, len(processor.clusters)) if processor else (images.tokens.shape[1], 1 << 16)
        return images.encoded(*fits)
    check_palette(images, processor)
    tokens = []
    with tqdm(total=len(images), desc=f"tokens, {brief(images.split)}", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            tokens.append(processor.encode(images[position] for position in batch).astype(np.uint16))
            bar.update(len(batch))
    return np.concatenate(tokens)


def checked_tokens(tokens: Any, config: Any) -> np.ndarray:
    """Tokens as they are, integers (S, t), of whole images or of their first pixels, for a model of this `config`.

    Raises ValueError for what cannot be tokens: images or their pixels, floats, more positions or colours than it has.
    """
    tokens = tokens.numpy(force=True) if hasattr(tokens, "numpy") else np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[1] > config.n_positions:
        raise ValueError(
            f"tokens {tokens.dtype} {tokens.shape}; expected integers (S, {config.n_positions}) or fewer columns: "
            "`tokenize` or the processor's `encode` make them of images"
        )
    colours = config.n_colours if hasattr(config, "n_colours") else config.vocab_size - 1  # transformers' has no such
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < colours:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()}; the model's colours are 0 to {colours - 1}")
    return tokens


def check_palette(images: ImageSet | TokenSet, processor) -> None:
    """ValueError where images would need a palette to become tokens, and there is none as `processor` is None."""
    if processor is None and isinstance(images, ImageSet):
        raise ValueError(
            f"{images.name} {images.split} holds images, and they need a palette to become tokens: the model's folder "
            "has no preprocessor_config.json; put it there, or convert the weights again with a palette"
        )


CHUNK = 128  # images that a worker decodes at a time
AHEAD = 2  # parts that are made before they are asked for


@dataclass(frozen=True, eq=False)
class Part:
    """Part `number`, from 0, of the `count` that a split is cut into: what is made, kept and sent as a whole.

    `images` are those of the whole split, and `span` the positions of this part's in it.
    """

    split: str
    number: int
    count: int
    span: range
    images: ImageSet | TokenSet

    def __len__(self) -> int:
        return len(self.span)

    @property
    def positions(self) -> np.ndarray:
        """int64 (n,), of the part's images in the split."""
        return np.arange(self.span.start, self.span.stop)

    @property
    def selected(self) -> ImageSet | TokenSet:
        """The part's images alone."""
        return self.images.select(self.positions)


def parts_of(images: ImageSet | TokenSet, rows: int) -> list[Part]:
    """A split in parts of `rows` images, the last with what is left."""
    count = -(-len(images) // rows)
    spans = [range(start, min(start + rows, len(images))) for start in range(0, len(images), rows)]
    return [Part(images.split, number, count, span, images) for number, span in enumerate(spans)]


class Tokens(NamedTuple):
    """Palette indices uint16 (n, T) of the images at `positions` of a set, and (row, reason) of those left out."""

    positions: np.ndarray
    tokens: np.ndarray
    skipped: list[tuple[int, str]]


def cached_tokens(
    parts: Iterable[Part | None], processor, *, root: Place, fits: tuple[int, int], skip_bad: bool = False,
    workers: int | None = None,
) -> Generator[tuple[Part, Tokens], None, None]:  # fmt: skip
    """Each of `parts` with its tokens, made ahead of their use.

    None among the parts means that none can be had now. What is not under `root` yet is decoded by `workers` threads
    and kept there. An image that cannot be read raises ValueError with its row and path, or is left out with
    `skip_bad`. Raises ValueError for a token set that does not fit a model that `fits` (positions, colours).
    """
    ahead, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))

    def make(part: Part) -> Tokens:
        images, positions = part.images, part.positions
        if isinstance(images, TokenSet):
            return Tokens(positions, images.select(positions).encoded(*fits), [])
        folder = root / "tokens" / _name(images, processor)
        path = folder / f"part-{part.number:05d}-of-{part.count:05d}.parquet"
        return _read(path, images, positions) or _make(path, images, processor, positions, pool)

    coming: deque[tuple[Part, Future[Tokens]]] = deque()
    wanted: Iterator[Any] = iter(parts)
    ended = False
    try:
        while True:
            while not ended and len(coming) < AHEAD:
                part = next(wanted, _END)
                ended = part is _END
                if ended or part is None:
                    break
                coming.append((part, ahead.submit(make, part)))
            if coming:
                part, making = coming.popleft()
                tokens = making.result()
                if tokens.skipped and not skip_bad:
                    raise ValueError(f"{tokens.skipped[0][1]} (on_bad_image='skip' leaves such images out)")
                yield part, tokens
            elif ended:
                return
    finally:
        ahead.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)


_END: Any = object()


def _name(images: ImageSet, processor) -> str:
    """`<images>-<split>-<key8>`, safe as a folder's name; the key has all that changes a token."""
    palette = digest(processor.clusters.tobytes())
    makers = [made_by("images/tokens").get(name) for name in STORED]
    made = [images.fingerprint, palette, *processor.size.values(), processor.resampling, processor.crop, *makers]
    return named(images.name, images.split, key=made)


def _read(path: Place, images: ImageSet, positions: np.ndarray) -> Tokens | None:
    """A part from the disk, or None where it is not there, is damaged, or of other rows."""
    if isinstance(path, Path) and not path.is_file():  # a pipe would wait
        return None
    try:
        file = pq.ParquetFile(readable(path), pre_buffer=False, page_checksum_verification=True)
        table, skipped = file.read(use_threads=False), json.loads(file.schema_arrow.metadata[b"skipped"])
        rows = table["index"].to_numpy()
        tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None
    left_out = {row for row, _ in skipped}
    kept = positions[[row not in left_out for row in images.index[positions]]]
    if not np.array_equal(images.index[kept], rows):
        return None
    return Tokens(kept, tokens, [(row, why) for row, why in skipped])


def _make(path: Place, images: ImageSet, processor, positions: np.ndarray, pool: ThreadPoolExecutor) -> Tokens:
    """Decode and quantise a part, and keep it."""
    chunks = [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]
    made = list(pool.map(lambda chunk: _encode(images, processor, chunk), chunks))
    kept = np.concatenate([chunk.positions for chunk in made])
    tokens = np.concatenate([chunk.tokens for chunk in made])
    skipped = list(chain.from_iterable(chunk.skipped for chunk in made))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel(), pa.uint16()), tokens.shape[1])
    table = pa.table({"index": pa.array(images.index[kept], pa.int64()), "tokens": flat})
    buffer = pa.BufferOutputStream()
    table = table.replace_schema_metadata({"skipped": json.dumps(skipped)})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    with suppress(OSError):  # no room: they are made again the next time
        atomic_write(path, buffer.getvalue().to_pybytes())
    return Tokens(kept, tokens, skipped)


def _encode(images: ImageSet, processor, positions: np.ndarray) -> Tokens:
    """Tokens of a few images; those whose content is damaged are left out with the reason. One at a time is held."""
    kept, skipped = [], []

    def whole() -> Iterator[Image.Image]:
        for position in positions:
            try:
                yield images[position]
                kept.append(position)
            except BadImage as error:
                skipped.append((int(images.index[position]), str(error)))

    try:
        tokens = processor.encode(whole())
    except ValueError:
        if len(skipped) < len(positions):
            raise
        tokens = np.zeros((0, processor.side**2))
    return Tokens(np.array(kept, np.int64), tokens.astype(np.uint16), skipped)
