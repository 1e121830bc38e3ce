"""Images changed before they become tokens: less contrast, or more blur.

    corrupt(images, "contrast", 0.4)  # an image set with a name and a fingerprint of its own

Two of the corruptions of Hendrycks and Dietterich (2019), with levels of our own for small images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageFilter

from igpt_lab.core.arguments import checked
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.in_memory import ppm


class Corruption(NamedTuple):
    """A way to change images: at level `clean` it changes nothing, from there to `worst` more and more."""

    apply: Callable[[Image.Image, float], Image.Image]
    clean: float
    worst: float


CORRUPTIONS = {
    "contrast": Corruption(lambda image, share: ImageEnhance.Contrast(image).enhance(share), 1.0, 0.0),
    "blur": Corruption(lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)), 0.0, math.inf),
}


@dataclass(frozen=True, eq=False, repr=False)
class CorruptedImages(ImageSet):
    """An image set whose images are changed when they are asked for, by one of `corruptions` after another."""

    corruptions: tuple[tuple[str, float], ...] = ()

    def _image(self, position: int) -> Image.Image:
        image = super()._image(position)
        for corruption, level in self.corruptions:
            image = CORRUPTIONS[corruption].apply(image, level)
        return image

    def _stored(self, position: int) -> tuple[bytes, str]:
        return ppm(self._image(position)), self._encoded(position)[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the images as they were, and the corruptions."""
        return hashlib.sha256(f"{super().fingerprint} {self.corruptions}".encode()).hexdigest()


@checked
def corrupt(images: ImageSet | TokenSet, corruption: str, level: float) -> CorruptedImages:
    """The same images, each changed when it is read, at its own size and before any palette; labels stay.

    `contrast`: x -> m + level (x - m), truncated, where m is the image's mean grey (ITU-R 601, rounded); 1 changes
    nothing, 0 leaves that grey. `blur`: a Gaussian of standard deviation `level` in pixels of the image as its source
    has it (CIFAR-10: of 32), by Pillow's three box blurs; edges are continued by their own pixels, and 0 changes
    nothing. The set's name tells corruption and level; one that is corrupted already is corrupted once more.

    Raises:
        ValueError: An unknown corruption, a level that it has not, or a set of tokens, which has no images to change.
    """
    if isinstance(images, TokenSet):
        raise ValueError(
            f"{images.name} {images.split} holds tokens, and a corruption changes images before they become tokens; "
            "load the images"
        )
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption {corruption!r}; expected one of {', '.join(CORRUPTIONS)}")
    ends = sorted(CORRUPTIONS[corruption][1:])
    if not (ends[0] <= level <= ends[1] and math.isfinite(level)):
        raise ValueError(f"{corruption} at level {level}; expected a finite number from {ends[0]:g} to {ends[1]:g}")
    values = {field.name: getattr(images, field.name) for field in fields(images)}
    before = images.corruptions if isinstance(images, CorruptedImages) else ()
    values |= {"name": f"{images.name} {corruption} {level:g}", "source": None}  # nothing loads these again
    return CorruptedImages(**values | {"corruptions": (*before, (corruption, float(level)))})
