"""What `igpt-lab paper` will take, before any of it: hours and gigabytes of each stage, by arithmetic.

The rate is that of matrix products on the device at hand, of which an extraction reaches the share `planning.SHARE`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pandas as pd
import torch

import igpt_lab as lab
from igpt_lab.app.paper import FOLDS, Paper
from igpt_lab.core.arguments import local
from igpt_lab.core.devices import best_device, gains_by_bfloat16, product
from igpt_lab.core.published import SETS, plain
from igpt_lab.explaining.sizes import FITS, image_passes, readout_flops
from igpt_lab.features.planning import SHARE
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.cost import block_weights, flops
from igpt_lab.probing.probes import CS

CLASSES = 10
TOKEN = 8  # bytes, at most
PASSES = 200  # over the training rows, of a probe's fit: about what 10,000 images of the bundled model take
RECIPE = 1_000  # of the fit by transformers' recipe, which is stopped there
SECONDS = 0.3  # for which products are timed
WIDTH, WIDE = 1_024, 8_192  # of those products, on a CPU and on an accelerator, which smaller ones do not fill
FEWER = "fewer     --limit N takes at most N images of a split, whose accuracies are not compared"


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second that are expected: of extraction, and of what runs in float32."""

    extraction: float
    float32: float


def rates(device: torch.device) -> Rates:
    """The share SHARE of what products reach on this device."""
    full = _rate(device, torch.float32)
    return Rates(SHARE * (_rate(device, torch.bfloat16) if gains_by_bfloat16(device.type) else full), SHARE * full)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of products of square matrices, by the fastest of them."""
    width = WIDTH if device.type == "cpu" else WIDE
    x = torch.randn(width, width, device=device).to(dtype)
    product(x, x)[0, 0].item()  # the library that multiplies sets itself up
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        before = time.perf_counter()
        product(x, x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - before)
    return 2 * width**3 / best


def estimate(paper: Paper, rate: Rates) -> pd.DataFrame:
    """A row per stage, and their sum: `stage`, `hours` of computing, `gigabytes` on the disk.

    The time of a download is not counted. Of images that are not known by their name the number is read off the set.
    """
    config = lab.SIZES[paper.size.upper()]
    whole = _counts(paper)
    train, test = (count if paper.limit is None else min(count, paper.limit) for count in whole)
    has_recipe = paper.has_recipe and whole == SETS.get(plain(paper.title))
    rows = [("download", 0.0, _downloaded(paper, config)), ("convert", 0.0, _weights(config))]
    if paper.has_loss:
        images = min(paper.limit or SETS["imagenet"][1], SETS["imagenet"][1])
        rows.append(("loss", images * flops(config, head=True) / rate.float32, 8e-9 * images))
    alignments, points = (2, 3) if has_recipe else (1, 1)
    layers = config.n_layer + 1
    stores = points * (train + test) * layers * 4 * config.n_embd / 1e9
    rows.append(("features", alignments * (train + test) * flops(config) / rate.extraction, stores))
    of_pass = 4.0 * train * config.n_embd * CLASSES  # of one fit over all training rows
    passes = PASSES * sum(folds * len(CS) + 1 for folds in FOLDS.values()) + RECIPE * has_recipe
    rows.append(("probes", layers * of_pass * passes / rate.float32, 0.0))
    if paper.has_loss:
        work = FITS * image_passes(config, train, test) * flops(config) + readout_flops(config, train)
        rows.append(("explain", work / rate.float32, 0.0))
    table = pd.DataFrame(rows, columns=["stage", "hours", "gigabytes"])
    table["hours"] /= 3600
    return pd.concat([table, pd.DataFrame([{"stage": "all", **table[["hours", "gigabytes"]].sum()}])])


def describe(table: pd.DataFrame, device: torch.device) -> str:
    """What `estimate` returned, in a line for each stage, and what was assumed."""
    lines = [f"{row.stage:<9} {row.hours:>9,.2f} h  {row.gigabytes:>8,.2f} GB" for row in table.itertuples()]
    assumed = f"{SHARE:.0%} of the rate that products reach on {device}; tokens of {TOKEN} bytes"
    words = "about, before anything is begun; the time that downloads take is not counted:"
    heads = f"{'stage':<9} {'hours':>9}    {'on the disk':>11}"
    return "\n".join([words, heads, *lines, f"assumed   {assumed}, no more than weights in the checkpoint", FEWER])


def _counts(paper: Paper) -> tuple[int, int]:
    """Images of train and test, before the limit: of a known name that is not on this disk as many as it says."""
    absent = paper.images is not None and not local(paper.images).exists()
    return SETS.get(plain(paper.title) if absent else "") or paper.counts


def _weights(config: ImageGPTConfig) -> float:
    """Gigabytes of the weights in float32."""
    tables = (2 * config.vocab_size + config.n_positions) * config.n_embd
    return 4 * (block_weights(config) + tables) / 1e9


def _downloaded(paper: Paper, config: ImageGPTConfig) -> float:
    """Gigabytes of weights and token sets."""
    images = SETS["imagenet"][1] * paper.has_loss + sum(SETS["cifar10"]) * (paper.images is None)
    return _weights(config) + images * TOKEN * config.n_positions / 1e9


def device_of(paper: Paper) -> torch.device:
    """Where it will run."""
    return best_device(paper.device)
