"""Images a second from images to tokens, against the processors of transformers ("the port"), in one run.

    python benchmarks/pixels.py IMAGES [--palette PALETTE.npy] [--limit 10000] [--rounds 5]

IMAGES is a name that `igpt_lab.load_images` takes, of images of 32 x 32 pixels, such as the Parquet file of CIFAR-10's
test images. Without --palette, 512 colours are fitted to them. Every contestant does the same images in each round, in
turns, so that what else the machine does falls on all alike; figures are medians. The port holds all distances of a
call at once, so it is called with as few or as many images at a time as are fastest for it, measured first. Ours is
called once with all images: "cold" with a new processor, whose table of colours is empty, "warm" with the same again.
Writes results/benchmarks/pixels.csv. Ids must be the port's, or it ends in an error.
"""

import argparse
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image

import igpt_lab as lab

SIDE, BATCHES, TRIAL = 32, (1, 4, 16, 64, 256), 512
FILE = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "pixels.csv"


def seconds(call) -> tuple[float, np.ndarray]:
    begun = time.perf_counter()
    ids = call()
    return time.perf_counter() - begun, ids


def in_batches(processor, images, size: int) -> np.ndarray:
    """Token ids (N, T) by calls with `size` images each."""
    calls = (images[start : start + size] for start in range(0, len(images), size))
    return np.concatenate([processor(images=each, return_tensors="np")["input_ids"] for each in calls])


def fastest(processor, images) -> int:
    """How many images at a time suit the port best."""
    trials = {
        size: min(seconds(partial(in_batches, processor, images[:TRIAL], size))[0] for _ in range(3))
        for size in BATCHES
    }
    return min(trials, key=trials.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--palette")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    pictures = [Image.fromarray(np.asarray(each)) for each in lab.load_images(given.images, limit=given.limit).images()]
    pixels = np.stack([np.asarray(each) for each in pictures])
    palette = np.load(given.palette) if given.palette else lab.fit_palette(pixels, 512)
    forms = {"Pillow images": pictures, "uint8 array": pixels}
    lab.ImageGPTImageProcessorPil(palette, SIDE).encode(pixels[:1])  # what is imported at the first use

    contests = []
    for name in ("ImageGPTImageProcessorPil", "ImageGPTImageProcessor"):
        theirs = getattr(transformers, name)(clusters=palette, size={"height": SIDE, "width": SIDE})
        if type(theirs).__name__ != name:
            print(f"without transformers' {name}: it needs torchvision, which is not installed")
            continue
        contests += [(name, form, theirs, fastest(theirs, images)) for form, images in forms.items()]

    rows = []
    for _ in range(given.rounds):
        for name, form, theirs, size in contests:
            ours = getattr(lab, name)(palette, SIDE)
            taken = {
                f"transformers, {size} at a time": seconds(partial(in_batches, theirs, forms[form], size)),
                "ours, cold": seconds(partial(ours.encode, forms[form])),
                "ours, warm": seconds(partial(ours.encode, forms[form])),
            }
            first, *others = (ids for _, ids in taken.values())
            if not all(np.array_equal(first, ids) for ids in others):
                raise SystemExit(f"{name}, {form}: the ids differ")
            rows += [(name, form, who, len(pixels) / spent) for who, (spent, _) in taken.items()]

    table = []
    for name, form, _, size in contests:
        of = {}
        for each in rows:
            if each[:2] == (name, form):
                of.setdefault(each[2], []).append(each[3])
        peer = statistics.median(of[f"transformers, {size} at a time"])
        table += [
            {"class": name, "images": form, "who": who, "images_per_second": round(statistics.median(speeds)),
             "lowest": round(min(speeds)), "highest": round(max(speeds)),
             "ratio": round(statistics.median(speeds) / peer, 1), "rounds": given.rounds, "count": len(pixels),
             "colours": len(palette), "threads": torch.get_num_threads(), "machine": platform.machine(),
             "numpy": np.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
            for who, speeds in of.items()
        ]  # fmt: skip
    table = pd.DataFrame(table)
    print(table[["class", "images", "who", "images_per_second", "lowest", "highest", "ratio"]].to_string(index=False))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(FILE, index=False)
    print(FILE)


if __name__ == "__main__":
    main()
