"""Images <-> tokens: resize, quantise to a palette, and back; with Pillow, or with torch on any device.

As in the paper (appendix of Chen et al., 2020) and in transformers: centres lie in [-1, 1], a pixel x in [0, 255] goes
to the centre nearest to x / 127.5 - 1 in squared Euclidean distance, and a centre c comes back as rint(127.5 (c + 1)).
"""

from igpt_lab.images.processor.pixels import to_rgb
from igpt_lab.images.processor.settings import CONFIG
from igpt_lab.images.processor.with_pillow import ImageGPTImageProcessorPil
from igpt_lab.images.processor.with_torch import ImageGPTImageProcessor

ImageGPTImageProcessorFast = ImageGPTImageProcessor  # its earlier name in transformers

__all__ = [
    "CONFIG", "ImageGPTImageProcessor", "ImageGPTImageProcessorFast", "ImageGPTImageProcessorPil", "to_rgb",
]  # fmt: skip
