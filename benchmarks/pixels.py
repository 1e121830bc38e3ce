"""Images a second from images to tokens, against the processors of transformers ("the port").

Images are 32 x 32 pixels: CIFAR-10's test images where ../shared/cifar10 has them, else smooth random ones; 512 colours
are fitted to them. The port holds all distances of a call at once, so it is called with as few or as many images at a
time as are fastest for it, measured first. Ours is called once with all images: "cold" with a new processor, whose
table of colours is empty, "warm" with the same again. Ids must be the port's, or it ends in an error.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

import igpt_lab as lab
from benchmarks.harness import in_turns, row

CIFAR, SIDE = Path(__file__).resolve().parents[2] / "shared/cifar10", 32
BATCHES, TRIAL = (1, 4, 16, 64, 256), 512
CLASSES = ("ImageGPTImageProcessorPil", "ImageGPTImageProcessor")


def rows(quick: bool) -> Iterator[dict]:
    count, runs, colours = (40, 1, 16) if quick else (10_000, 3, 512)
    source, pictures = images(count, smooth=quick)
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    palette = lab.fit_palette(pixels, colours)
    lab.ImageGPTImageProcessorPil(palette, SIDE).encode(pixels[:1])  # what is imported at the first use
    for name in CLASSES:
        theirs = getattr(transformers, name)(clusters=palette, size={"height": SIDE, "width": SIDE})
        if type(theirs).__name__ != name:
            print(f"without transformers' {name}: it needs torchvision, which is not installed", file=sys.stderr)
            continue
        for form, inputs in {"Pillow images": pictures, "uint8 array": pixels}.items():
            size = fastest(theirs, inputs[:TRIAL])
            ours = _Ours(name, palette)
            calls = {"port": partial(in_batches, theirs, inputs, size), "cold": partial(ours.cold, inputs),
                     "warm": partial(ours.warm, inputs)}  # fmt: skip
            results = in_turns(calls, runs)
            if not all(np.array_equal(results["port"].value, result.value) for result in results.values()):
                raise SystemExit(f"{name}, {form}: the ids differ")
            peer = f"transformers {transformers.__version__}, {size} at a time"
            for who in ("cold", "warm"):
                speed, their_speed = (count / results[key].seconds for key in (who, "port"))
                case = f"{name}, {form}, {who}, {count:,} of {source}"
                yield row(case, "encode", "images/s", speed, their_speed, peer, runs=runs)


class _Ours:
    """Our processor of one class, new for `cold`, the last new one for `warm`."""

    def __init__(self, name: str, palette: np.ndarray):
        self.make = partial(getattr(lab, name), palette, SIDE)

    def cold(self, images) -> np.ndarray:
        self.processor = self.make()
        return self.processor.encode(images)

    def warm(self, images) -> np.ndarray:
        return self.processor.encode(images)


def images(count: int, *, smooth: bool) -> tuple[str, list[Image.Image]]:
    """What they are, and 32 x 32 Pillow images in colour."""
    if CIFAR.is_dir() and not smooth:
        return "CIFAR-10", list(lab.load_images(CIFAR, "test", limit=count).images())
    coarse = np.random.default_rng(0).integers(256, size=(count, 5, 5, 3), dtype=np.uint8)
    return "smooth random images", [Image.fromarray(image).resize((SIDE, SIDE)) for image in coarse]


def in_batches(processor, images, size: int) -> np.ndarray:
    """Token ids (N, T) by calls with `size` images each."""
    calls = (images[start : start + size] for start in range(0, len(images), size))
    return np.concatenate([processor(images=batch, return_tensors="np")["input_ids"] for batch in calls])


def fastest(processor, images) -> int:
    """How many images at a time suit the port best."""

    def seconds(size: int) -> float:
        begun = time.perf_counter()
        in_batches(processor, images, size)
        return time.perf_counter() - begun

    return min(BATCHES, key=lambda size: min(seconds(size) for _ in range(3)))
