"""What an extraction will cost before any machine is asked for: arithmetic on shapes, and constants that are named."""

from __future__ import annotations

import re

from igpt_lab.features.extraction import ROWS, default_batch
from igpt_lab.models.config import ImageGPTConfig

IMAGES = {"cifar10": 60_000, "imagenet": 1_281_167 + 50_000}  # both splits that are public with labels
# Dense bfloat16 matrix products in FLOP/s and bytes of memory, by the makers' data sheets.
DEVICES = {"V100": (125e12, 32e9), "A100": (312e12, 80e9), "H100": (989e12, 80e9), "H200": (989e12, 141e9)}
SHARE = 0.4  # of a device's matrix-product rate: 0.41 was measured, on a CPU (benchmarks/extract.py)


def plan(config: ImageGPTConfig, images: int, *, devices: str = "1xH100", share: float = SHARE) -> dict[str, float]:
    """Of an extraction of all layers of `images`, mean-pooled: FLOPs, bytes, parts, seconds, device-hours, memory.

    `devices` is "8xH100"; `share` of the data sheet's rate is assumed to be reached. A multiply-add is two FLOPs, and
    attention counts the positions that each one sees. Start-up, decoding and the disk are not counted. Raises
    ValueError for a device that is not known.
    """
    count, rate, memory = _devices(devices)
    layers, width, positions, inner = config.n_layer, config.n_embd, config.n_positions, _inner(config)
    one = flops(config)
    row, batch = 4 * width * (layers + 1), default_batch(config, _Accelerator)
    states = batch * positions * (8 * width + 2 * inner)
    held = 4 * (_weights(config) + width * (positions + config.vocab_size) + states)
    seconds = images * one / (count * rate * share)
    parts = -(-images // ROWS)
    return {
        "images": images, "devices": count, "flops": images * one, "bytes": images * (16 + row), "parts": parts,
        "seconds": seconds * -(-parts // count) * count / parts, "device_hours": seconds * count / 3600,
        "device_bytes": held, "device_memory": memory, "host_bytes": min(images, ROWS) * row * 5,
        "disk_bytes_per_second": images * (16 + row) / seconds,
    }  # fmt: skip


def flops(config: ImageGPTConfig, *, head: bool = False, square: bool = False) -> float:
    """Of a forward pass over an image, a multiply-add being two. Training takes three times as many.

    Attention counts the positions that each one sees, or all of T x T where `square`, as is common elsewhere.
    """
    positions, width = config.n_positions, config.n_embd
    seen = positions if square else (positions + 1) / 2
    weights = _weights(config) + head * width * config.n_colours
    return positions * (2 * weights + 4 * config.n_layer * width * seen)


def _weights(config: ImageGPTConfig) -> int:
    """Of the blocks' matrices."""
    return config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * _inner(config))


def _inner(config: ImageGPTConfig) -> int:
    return config.n_inner or 4 * config.n_embd


class _Accelerator:
    """What `default_batch` asks of a device that is not here."""

    type = "cuda"


def _devices(text: str) -> tuple[int, float, float]:
    """(count, FLOP/s, bytes) of "8xH100"."""
    found = re.fullmatch(r"(\d+)x(\w+)", text)
    if not found or found[2] not in DEVICES or int(found[1]) < 1:
        raise ValueError(f"devices={text!r}; expected a number and a name, such as 8xH100, of {', '.join(DEVICES)}")
    return int(found[1]), *DEVICES[found[2]]


def describe(found: dict[str, float]) -> str:
    """A plan in six lines."""
    hours = found["device_hours"]
    return (
        f"compute   {found['flops']:.2e} FLOPs for {found['images']:,} images\n"
        f"time      {found['seconds'] / 3600:,.3g} h on {found['devices']} devices, {hours:,.3g} device-hours\n"
        f"store     {found['bytes'] / 1e9:,.3g} GB in {found['parts']:,} parts, "
        f"{found['disk_bytes_per_second'] / 1e6:,.3g} MB/s to the disk\n"
        f"a device  {found['device_bytes'] / 1e9:,.3g} of {found['device_memory'] / 1e9:.0f} GB; a worker's host "
        f"{found['host_bytes'] / 1e9:,.2g} GB for a part\n"
        f"assumed   {SHARE:.0%} of the data sheet's bfloat16 rate; start-up, decoding, a slow disk are not\n"
        "cost      is in the device-hours; fewer layers (--layers) save the blocks above the deepest, and their bytes"
    )
