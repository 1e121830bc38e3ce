"""What an extraction will cost before any machine is asked for: arithmetic on shapes, and constants that are named."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from igpt_lab.features.prepared import ROWS
from igpt_lab.features.settings import default_batch
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.cost import block_weights, flops, inner_width

IMAGES = {"cifar10": 60_000, "imagenet": 1_281_167 + 50_000}  # both splits that are public with labels
SHARE = 0.4  # of a device's matrix-product rate: 0.44 was measured in bfloat16, on a CPU (benchmarks/extract.py)


class Device(NamedTuple):
    """One accelerator by its maker's data sheet: dense bfloat16 FLOP/s, and bytes of memory."""

    rate: float
    memory: float


DEVICES = {
    "V100": Device(125e12, 32e9),
    "A100": Device(312e12, 80e9),
    "H100": Device(989e12, 80e9),
    "H200": Device(989e12, 141e9),
}


def plan(config: ImageGPTConfig, images: int, *, devices: str = "1xH100", share: float = SHARE) -> dict[str, float]:
    """Cost of an extraction of all layers at one point, mean-pooled.

    Start-up, decoding and the disk are not counted.

    Args:
        config: Shape of the model.
        images: Number of images.
        devices: How many of which accelerator, such as "8xH100"; names are in `DEVICES`.
        share: Fraction of the data sheet's rate that is assumed to be reached.

    Returns:
        `flops`, a multiply-add being two, where attention counts the positions that each one sees; `bytes` and `parts`
        of the store; `seconds`, as whole parts on each device; `device_hours`; `device_bytes` used of `device_memory`;
        `host_bytes` for a part; `disk_bytes_per_second`; and the arguments `images` and `devices`.

    Raises:
        ValueError: A device that is not known.

    >>> from igpt_lab.models.config import SIZES
    >>> plan(SIZES["S"], 60_000, devices="8xH100")["parts"]
    30
    """
    count, device = _devices(devices)
    one = flops(config)
    row = 4 * config.n_embd * (config.n_layer + 1)
    seconds = images * one / (count * device.rate * share)
    parts = -(-images // ROWS)
    return {
        "images": images, "devices": count, "flops": images * one, "bytes": images * (16 + row), "parts": parts,
        "seconds": seconds * -(-parts // count) * count / parts, "device_hours": seconds * count / 3600,
        "device_bytes": _device_bytes(config), "device_memory": device.memory,
        "host_bytes": min(images, ROWS) * row * 5,
        "disk_bytes_per_second": images * (16 + row) / seconds,
    }  # fmt: skip


def _device_bytes(config: ImageGPTConfig) -> int:
    """Memory of an accelerator: float32 weights, and the states that a block holds at once for one batch."""
    width, positions = config.n_embd, config.n_positions
    batch = default_batch(config, torch.device("cuda"))
    states = batch * positions * (8 * width + 2 * inner_width(config))
    return 4 * (block_weights(config) + width * (positions + config.vocab_size) + states)


def _devices(text: str) -> tuple[int, Device]:
    """The count and the device of "8xH100"."""
    match = re.fullmatch(r"(\d+)x(\w+)", text)
    if not match or match[2] not in DEVICES or int(match[1]) < 1:
        raise ValueError(f"devices={text!r}; expected a number and a name, such as 8xH100, of {', '.join(DEVICES)}")
    return int(match[1]), DEVICES[match[2]]


def describe(costs: dict[str, float]) -> str:
    """What `plan` returned, in six lines."""
    hours = costs["device_hours"]
    return (
        f"compute   {costs['flops']:.2e} FLOPs for {costs['images']:,} images\n"
        f"time      {costs['seconds'] / 3600:,.3g} h on {costs['devices']} devices, {hours:,.3g} device-hours\n"
        f"store     {costs['bytes'] / 1e9:,.3g} GB in {costs['parts']:,} parts, "
        f"{costs['disk_bytes_per_second'] / 1e6:,.3g} MB/s to the disk\n"
        f"a device  {costs['device_bytes'] / 1e9:,.3g} of {costs['device_memory'] / 1e9:.0f} GB; a worker's host "
        f"{costs['host_bytes'] / 1e9:,.2g} GB for a part\n"
        f"assumed   {SHARE:.0%} of the data sheet's bfloat16 rate; start-up, decoding, a slow disk are not\n"
        "cost      is in the device-hours; fewer layers (--layers) save the blocks above the deepest, and their bytes"
    )
