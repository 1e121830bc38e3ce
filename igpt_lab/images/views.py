"""A second view of the same images: mirrored or not, and shifted by a pixel or two, before they become tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from PIL import Image

from igpt_lab.core.arguments import checked
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.in_memory import ppm


@dataclass(frozen=True, eq=False, repr=False)
class ViewedImages(ImageSet):
    """An image set whose images are mirrored and shifted when they are asked for, each by its row and `seed` alone."""

    shift: int = 2
    seed: int = 0

    def _image(self, position: int) -> Image.Image:
        image = np.asarray(super()._image(position))
        generator = np.random.default_rng([self.seed, 18, int(self.index[position])])
        if generator.random() < 0.5:
            image = image[:, ::-1]
        if self.shift:
            sizes, signs = generator.integers(1, self.shift + 1, 2), generator.choice([-1, 1], 2)
            image = _shifted(image, *(sizes * signs).tolist())
        return Image.fromarray(image)

    def _stored(self, position: int) -> tuple[bytes, str]:
        return ppm(self._image(position)), self._encoded(position)[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the images as they were, and what makes the view."""
        return hashlib.sha256(f"{super().fingerprint} view {self.shift} {self.seed}".encode()).hexdigest()


@checked
def second_view(images: ImageSet | TokenSet, *, shift: int = 2, seed: int = 0) -> ViewedImages:
    """Another view of the same images: each is mirrored or not, and shifted by 1 to `shift` pixels along both sides.

    Pixels are those of the image as its source has it (CIFAR-10: of 32), before it is made smaller and given a palette;
    edges are continued by their own pixels. Labels stay. What is done to an image depends on its row and `seed` alone.

    Raises:
        ValueError: A shift below 0, a set of tokens, which has no images to change, or one that is changed already.
    """
    if isinstance(images, TokenSet):
        raise ValueError(
            f"{images.name} {images.split} holds tokens, and a view changes images before they become tokens; load the "
            "images"
        )
    if type(images) is not ImageSet:
        raise ValueError(f"{images.name} {images.split} is changed already; expected images as load_images gives them")
    if shift < 0:
        raise ValueError(f"shift={shift}; expected a number of pixels, 0 or more")
    values = {field.name: getattr(images, field.name) for field in fields(ImageSet)}
    values |= {"name": f"{images.name} view {seed}", "source": None}  # nothing loads these again
    return ViewedImages(**values, shift=shift, seed=seed)


def _shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """(H, W, 3) moved by so many pixels, its edges continued."""
    height, width = image.shape[:2]
    rows, columns = (np.arange(height) - down).clip(0, height - 1), (np.arange(width) - right).clip(0, width - 1)
    return image[rows][:, columns]
