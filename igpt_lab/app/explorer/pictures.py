"""The images that the explorer shows: small as the network gets them, and one as it is in its file.

N images shown, k neighbours.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from igpt_lab.app.explorer.held import GIVEN
from igpt_lab.app.explorer.layers import nearest
from igpt_lab.features.origins import sources_of
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.loading import load_again
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.loading import processor_of

SIDE = 32  # pixels of a picture's longer side, at most
LARGEST = 256  # the same of an original


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images as the network gets them.

    `pixels` is uint8 (N, H, W, 1 or 3), or None for the reason `why`. `near` holds neighbours in pixels, int64 (N, k).
    `files` are the file names, () where no image has one.
    """

    pixels: np.ndarray | None
    near: np.ndarray
    why: str = ""
    files: tuple[str, ...] = ()

    @property
    def gallery(self) -> np.ndarray:
        """uint8 (N, H, W, 3), or (N, H, W) of grey images, as the galleries take them."""
        return self.pixels[..., 0] if self.pixels.shape[-1] == 1 else self.pixels


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a store's split, and the processor of the store's model."""

    images: ImageSet | TokenSet
    processor: ImageGPTImageProcessorPil

    def pixels(self, index: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 1 or 3), as the network gets them, of the images that have this `index` in the source."""
        positions = np.searchsorted(self.images.index, index)  # a store's rows are in the order of its images
        if isinstance(self.images, TokenSet):
            pixels = self.processor.decode(self.images.tokens[self.images.index[positions]])
        else:
            pixels = self.processor.resize(self.images[position] for position in positions)
        is_grey = (pixels[..., :1] == pixels).all()
        return pixels[..., :1] if is_grey else pixels

    def original(self, row: int) -> tuple[list[np.ndarray], list[int]]:
        """An image, made smaller to LARGEST pixels, and as the network reads it: uint8 (H, W, 3) each; its size.

        There is no original of a set of tokens, and where no palette is known nothing as the network reads it. The
        size is width and height of the original in pixels.
        """
        position = int(np.searchsorted(self.images.index, row))
        if isinstance(self.images, TokenSet):
            return [], []
        image = self.images[position]
        size = list(image.size)
        read = [self.processor.decode(self.processor.encode([image]))[0]] if len(self.processor.clusters) > 2 else []
        image.thumbnail((LARGEST, LARGEST))
        return [np.asarray(image.convert("RGB")), *read], size

    def files(self, index: np.ndarray) -> tuple[str, ...]:
        """The file names of the images that have this `index` in the source, () where none has one."""
        names = self.images.files
        chosen = tuple(names[position] for position in np.searchsorted(self.images.index, index))
        return chosen if any(chosen) else ()


def show_original(image: object, split: str, source: Source | str, rows: np.ndarray) -> tuple[dict, list[bytes]]:
    """The message for the browser that asked for an image, a position among `rows`, as it is in its file.

    It has the split and image that were asked, the original's `size` in pixels, and `shapes` of what follows as bytes:
    the original and, where that is known, what the network reads; nothing where there is no picture.
    """
    pictures: list[np.ndarray] = []
    size: list[int] = []
    if not isinstance(source, str) and isinstance(image, int) and 0 <= image < len(rows):
        with suppress(ValueError, OSError):
            pictures, size = source.original(int(rows[image]))
    facts = {"image": image, "split": split, "size": size, "shapes": [list(pixels.shape) for pixels in pictures]}
    return {"original": facts}, [pixels.tobytes() for pixels in pictures]


def open_source(
    store: FeatureStore, split: str, remote: bool = False, processor: ImageGPTImageProcessorPil | None = None,
    images: ImageSet | TokenSet | None = None,
) -> Source | str:  # fmt: skip
    """The images of a split, given or from where the store says they are; or the reason why there are none, in words.

    Without a `processor` it is that of the model that the store names. A store may be a
    stranger's: of a server that it names nothing is asked but where `remote` allows it.
    """
    if images is None and _was_in_memory(store, split):
        return "the images were in memory; explore(store, images=...) takes them"
    try:
        sources = sources_of(store, [] if images is not None else [split])
        if sources.addresses and not remote:
            places = ", ".join(sources.addresses)
            return f"the store names {places}; explore(store, remote=True) asks there, if you trust it"
        image_set = load_again(sources.images[split], split) if images is None else images
        if not sources.model:
            processor = plain_processor()
        processor = processor or processor_of(sources.model["name"], sources.model.get("revision"))
    except (ValueError, OSError) as error:
        return f"the images are not where the store says: {error}"
    if processor is None:
        return "the model has no palette"
    fingerprint = store.key["splits"][split][0]
    if fingerprint.startswith(GIVEN):
        if not np.isin(store.index(split), image_set.index).all():
            return "the features have rows that the images have not"
    elif image_set.fingerprint != fingerprint:
        return "the images are no longer those of the store"
    return Source(image_set, processor)


def plain_processor() -> ImageGPTImageProcessorPil:
    """What shows the pictures of a network whose `preprocess` is not known: it resizes them to SIDE pixels."""
    return ImageGPTImageProcessorPil(np.linspace([-1.0] * 3, [1.0] * 3, 2), SIDE)


def _was_in_memory(store: FeatureStore, split: str) -> bool:
    """Does the manifest say that no name loads the images of a split?"""
    source = store.manifest.get("source")
    images = source.get("images") if isinstance(source, dict) else None
    return isinstance(images, dict) and split in images and images[split] is None


def load_pictures(source: Source | str, index: np.ndarray) -> Pictures:
    """The images with this `index` in the source, made smaller to SIDE pixels, and their neighbours before that."""
    if isinstance(source, str):
        return Pictures(None, np.zeros((len(index), 0), np.int64), source)
    pixels = source.pixels(index)
    near = nearest(pixels.reshape(len(pixels), -1).astype(np.float32))
    step = -(-pixels.shape[1] // SIDE)
    return Pictures(pixels[:, ::step, ::step], near, files=source.files(index))
