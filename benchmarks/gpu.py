"""An accelerator: ours against transformers, at sizes S, M and L with random weights. `make gpu` runs it.

The device is the accelerator of this machine, or what IGPT_LAB_DEVICE names. Both extract in bfloat16 autocast, each at
the batch size that is fastest for it; transformers' attention is torch's fused one, its default. Sampling and training
are at size S. Each contestant has a process, and peak memory is that of the accelerator. Tables go into the folder
`gpu`, named as the device.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import igpt_lab as lab
from benchmarks import extract, harness, sample, train
from benchmarks.harness import matmul, race, rate, row
from igpt_lab.core.devices import best_device
from igpt_lab.features.planning import flops
from igpt_lab.features.runner import is_out_of_memory

DEVICE = str(best_device(os.environ.get("IGPT_LAB_DEVICE") or None))
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
MULTIPLIED = 8192  # rows and columns of the products that tell the machine's rate
LAYERS, WIDTH, IMAGES = 5, 512, 50_000  # of the features that are probed
SAMPLED, TRAINED = 64, 64  # images at a time


def rows(quick: bool) -> Iterator[dict]:
    sizes = {"toy": extract.QUICK} if quick else {name: lab.SIZES[name] for name in ("S", "M", "L")}
    for name, config in sizes.items():
        yield from extraction(name, config, quick)
    yield from sampling(extract.QUICK if quick else extract.S, quick)
    yield from probes((3, 8, 300) if quick else (LAYERS, WIDTH, IMAGES))
    yield from training(quick)


def write(rows: list[dict], folder: str | Path, command: str) -> Path:
    """DEVICE.csv, .md and .json in the folder `gpu`."""
    kind = torch.device(DEVICE).type
    device = torch.cuda.get_device_name(DEVICE) if kind == "cuda" else kind
    name, folder = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-"), Path(folder) / "gpu"
    path = harness.write(name, rows, folder, f"{command} on {device}")
    pd.read_csv(path).to_json(folder / f"{name}.json", orient="records", indent=1)
    return path


def extraction(name: str, config: lab.ImageGPTConfig, quick: bool) -> Iterator[dict]:
    """Images a second, share of the rate of products, and memory, each at its best batch size; all of `extract`."""
    runs, size = (1, 64) if quick else (3, MULTIPLIED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "random"
        extract.write_model(config, folder)
        makers = {
            "ours": partial(at_best_batch, extract.ours, folder, quick),
            "port": partial(at_best_batch, extract.port, folder, quick),
            "rate": partial(matmul, torch.bfloat16, size, DEVICE),
        }
        results = race(makers, runs)
        ends = (results["ours"], results["port"])
        batches, speeds = ([end.value for end in ends], [2 * end.value / end.seconds for end in ends])
        case, peer = f"size {name}, bfloat16, batch {batches[0]}", f"{extract.peer_name()}, batch {batches[1]}"
        yield row(f"{case}, record", "speed", "images/s", *speeds, peer, runs=runs)
        reached = rate(results["rate"], size)
        shares = [flops(config) * speed / 1e9 / reached for speed in speeds]
        unit = f"of {reached / 1000:.3g} TFLOP/s"
        yield row(f"{case}, record", "share of the matrix-multiply rate", unit, *shares, peer, runs=runs)
        yield row(f"{case}, record", "peak memory", "MB", *(end.peak for end in ends), peer, runs=runs, less=True)
        count = 2 * batches[0]
        whole = race({"extract": partial(extract.extracted, folder, "bfloat16", count, device=DEVICE)}, runs)["extract"]
        speeds[0] = count / whole.seconds
        yield row(f"size {name}, bfloat16, extract", "speed", "images/s", *speeds, peer, runs=runs)


def at_best_batch(make: Callable, folder: Path, quick: bool) -> Callable:
    """Maker of a call that takes two batches of the size that is fastest, and returns that size.

    Larger ones are not tried where memory runs out, or one is 10% slower than the best.
    """
    seconds: dict[int, float] = {}
    for batch in (2, 4) if quick else BATCHES:
        taken = _seconds(partial(make, folder, "bfloat16", 2 * batch, batch=batch, device=DEVICE))
        if taken is None:
            break
        seconds[batch] = taken / batch
        if seconds[batch] > 1.1 * min(seconds.values()):
            break
    if not seconds:
        raise RuntimeError(f"no batch of {BATCHES[0]} images fits the memory of {DEVICE}")
    best = min(seconds, key=lambda batch: seconds[batch])
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    call = make(folder, "bfloat16", 2 * best, batch=best, device=DEVICE)

    def measured() -> int:
        call()
        return best

    return measured


def _seconds(make: Callable) -> float | None:
    """Of a call that is made and then dropped, so that the next one has all memory; None where memory runs out."""
    try:
        trial = make()
        trial()
        return harness.in_turns({"trial": trial}, 1)["trial"].seconds
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def sampling(config: lab.ImageGPTConfig, quick: bool) -> Iterator[dict]:
    """Milliseconds a pixel of many images at a time, against transformers' better cache."""
    batch, runs = (2, 1) if quick else (SAMPLED, 3)
    makers = {"ours": partial(sample.ours, config, batch, DEVICE)}
    makers |= {f"{cache} cache": partial(sample.port, config, batch, cache, DEVICE) for cache in sample.CACHES}
    results = race(makers, runs, warm=0, optional=[name for name in makers if name != "ours"])
    best = min((name for name in results if name != "ours"), key=lambda name: results[name].seconds)
    case, peer = f"{config.n_layer} x {config.n_embd}, {batch} at a time", f"{sample.peer_name()}, {best}"
    ends = (results["ours"], results[best])
    steps = [1000 * end.seconds / config.n_positions for end in ends]
    yield row(case, "sampling", "ms/pixel", *steps, peer, runs=runs, less=True)
    yield row(case, "peak memory", "MB", *(end.peak for end in ends), peer, runs=runs, less=True)


def probes(shape: tuple[int, int, int]) -> Iterator[dict]:
    """All of `probe_layers` on the device and on the CPU."""
    results = race({device: partial(probed, shape, device) for device in (DEVICE, "cpu")}, 1, warm=0)
    ends = (results[DEVICE], results["cpu"])
    case = "{} layers x {}, {:,} images, random features".format(*shape)
    yield row(case, "probe_layers", "s", *(end.seconds for end in ends), "ours, on the CPU", runs=1, less=True)
    if abs(ends[0].value - ends[1].value) > 0.002:
        raise SystemExit(f"accuracies {ends[0].value} on {DEVICE} and {ends[1].value} on the CPU")


def probed(shape: tuple[int, int, int], device: str) -> Callable:
    """Maker of a call that returns the mean accuracy over layers."""
    layers, width, count = shape
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 10
    means = 0.2 * generator.standard_normal((layers, 10, width), dtype=np.float32)
    states = [mean[labels] + generator.standard_normal((count, width), dtype=np.float32) for mean in means]
    half = count * 5 // 6
    parts = (slice(half), slice(half, count))
    features = [lab.Features({n: x[part] for n, x in enumerate(states)}, labels[part]) for part in parts]
    return lambda: float(lab.probe_layers(*features, device=device, progress=False).table.test_accuracy.mean())


def training(quick: bool) -> Iterator[dict]:
    """Tokens a second of a step, its share of the rate of products, and memory."""
    shape, batch = next(iter(train.QUICK.values())) if quick else ((24, 512, 8, 1024, 512), TRAINED)
    runs, size, compiled = (1, 64, False) if quick else (3, MULTIPLIED, True)
    makers = {
        "ours": partial(train.ours, shape, batch, compiled, DEVICE),
        "port": partial(train.port, shape, batch, "bfloat16", compiled, DEVICE),
        "rate": partial(matmul, torch.bfloat16, size, DEVICE),
    }
    results = race(makers, runs, warm=2)
    config, ends = train.config_of(shape), (results["ours"], results["port"])
    speeds = [train.STEPS * batch * config.n_positions / end.seconds for end in ends]
    case, peer = "{} x {}, batch {}".format(*shape[:2], batch), f"{extract.peer_name()}, bfloat16, compiled"
    yield row(case, "training", "tokens/s", *speeds, peer, runs=runs)
    reached = rate(results["rate"], size)
    shares = [3 * flops(config, head=True) / config.n_positions * speed / 1e9 / reached for speed in speeds]
    unit = f"of {reached / 1000:.3g} TFLOP/s"
    yield row(case, "share of the matrix-multiply rate", unit, *shares, peer, runs=runs)
    yield row(case, "peak memory", "MB", *(end.peak for end in ends), peer, runs=runs, less=True)
