"""Drawing images: ours against transformers' `generate`, from the start token to the last pixel, at temperature 1.

Size S has images of 16 x 16, so that 256 new tokens are one; the xs shape is that of `fashion-xs`. Weights are random.
transformers draws from all colours, with its growing cache and with its static one, and the better counts. Bytes are
the weights once a step, and the keys and values that are filled; what a machine reads a second is measured on a sum.
A step of ours late in a 32 x 32 image shows how it grows with the position.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

import igpt_lab as lab
from benchmarks.harness import Result, matmul, race, rate, row
from igpt_lab.features.planning import flops
from igpt_lab.sampling.decoding import Decoder

S = dataclasses.replace(lab.SIZES["S"], n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
XS = dataclasses.replace(S, vocab_size=33, n_positions=144, n_embd=96, n_layer=20, n_head=2)
QUICK = dataclasses.replace(S, vocab_size=9, n_positions=16, n_embd=16, n_layer=2, n_head=2)
CASES = {"24 x 512 (S), 16 x 16 pixels": (S, (1, 8, 32)), "20 x 96 (xs), 12 x 12 pixels": (XS, (8, 64))}
CACHES = ("dynamic", "static")
SUMMED = 75_000_000  # float32 numbers: 300 MB


def rows(quick: bool) -> Iterator[dict]:
    runs = 1 if quick else 3
    for case, (config, batches) in ({"2 x 16, 4 x 4 pixels": (QUICK, (2,))} if quick else CASES).items():
        for batch in batches:
            yield from drawn(f"{case}, {batch} at a time", config, batch, runs)
    long = dataclasses.replace(QUICK if quick else S, n_positions=64 if quick else 1024)
    yield from growth(long, runs)


def drawn(case: str, config: lab.ImageGPTConfig, batch: int, runs: int) -> Iterator[dict]:
    """Milliseconds a step, and shares of the bandwidth and of the matrix-multiply rate."""
    makers = {"ours": partial(ours, config, batch)} | {f"{c} cache": partial(port, config, batch, c) for c in CACHES}
    makers |= {"sum": summing, "matmul": partial(matmul, torch.float32)}
    results = race(makers, runs, warm=0, optional=[name for name in makers if "cache" in name])
    best = min((name for name in results if "cache" in name), key=lambda name: results[name].seconds)
    ends, peer = (results["ours"], results[best]), f"{peer_name()}, {best}"
    times = [1000 * result.seconds / config.n_positions for result in ends]
    yield row(case, "step", "ms", *times, peer, runs=runs, less=True)
    bandwidth, multiplied = 4 * SUMMED / results["sum"].seconds / 1e9, rate(results["matmul"])
    read, done = bytes_read(config, batch) / 1e9, batch * flops(config, head=True) / 1e9
    unit = f"of {bandwidth:.1f} GB/s"
    yield row(case, "share of the bandwidth", unit, *shares(read / bandwidth, ends), peer, runs=runs)
    unit = f"of {multiplied:.0f} GFLOP/s"
    yield row(
        case, "share of the float32 matrix-multiply rate", unit, *shares(done / multiplied, ends), peer, runs=runs
    )


def shares(least: float, ends: tuple[Result, ...]) -> list[float]:
    """Of what would take `least` seconds at the machine's rate."""
    return [least / result.seconds for result in ends]


def bytes_read(config: lab.ImageGPTConfig, batch: int) -> float:
    """For an image in float32: all weights at each step, and the keys and values that are filled."""
    blocks, width, length = config.n_layer, config.n_embd, config.n_positions
    weights = 12 * blocks * width**2 + width * config.n_colours
    return 4 * length * (weights + batch * 2 * blocks * width * (length + 1) / 2)


def growth(config: lab.ImageGPTConfig, runs: int) -> Iterator[dict]:
    """Milliseconds of our step at several positions, against the first of them."""
    length, batch = config.n_positions, 8
    places = [length // 16, length // 4, length // 2, length - 1]
    results = race({str(place): partial(steps, config, batch, place) for place in places}, runs)
    first = results[str(places[0])].seconds
    for place in places:
        times = (1000 * seconds / STEPS for seconds in (results[str(place)].seconds, first))
        case = f"{config.n_layer} x {config.n_embd}, {batch} at a time, T = {length}"
        yield row(case, f"step at position {place}", "ms", *times, f"at {places[0]}", runs=runs, less=True)


STEPS, WARM = 10, 4  # of a call of `steps`; pixels drawn before anything is measured


def peer_name() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def model_of(config: lab.ImageGPTConfig, device: str = "cpu") -> lab.ImageGPTForCausalImageModeling:
    """Random weights at the port's scales: at the original's the head is zero, and every colour equally probable."""
    generator = torch.Generator().manual_seed(0)
    return lab.ImageGPTForCausalImageModeling(config, init="transformers", generator=generator).eval().to(device)


# Makers: each is called in a process of its own.


def ours(config: lab.ImageGPTConfig, batch: int, device: str = "cpu") -> Callable:
    model = model_of(config, device)
    last = np.zeros((batch, config.n_positions - WARM), np.int64)
    lab.complete(model, last, completions=1, progress=False)
    return lambda: lab.sample(model, batch, batch_size=batch, progress=False)


def port(config: lab.ImageGPTConfig, batch: int, cache: str, device: str = "cpu") -> Callable:
    import transformers

    values = {name: value for name, value in config.to_dict().items() if name not in ("bidirectional", "model_type")}
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**values)).eval().to(device)
    start = torch.full((batch, 1), config.sos_token_id, device=device)
    options = {"do_sample": True, "top_k": 0} | ({} if cache == "dynamic" else {"cache_implementation": cache})

    def call(count: int = config.n_positions) -> None:
        with torch.inference_mode():
            tokens = model.generate(start, max_new_tokens=count, **options)
        if tokens.shape != (batch, count + 1):
            raise RuntimeError(f"{tuple(tokens.shape)} came")

    call(WARM)
    return call


def steps(config: lab.ImageGPTConfig, batch: int, place: int) -> Callable:
    decoder = Decoder(model_of(config), batch)
    decoder.fill(np.zeros((batch, 0), np.int64))
    tokens, now = torch.zeros(batch, dtype=torch.long), decoder.positions[place : place + 1]

    def call() -> None:
        for _ in range(STEPS):
            decoder.step(tokens, now, seen=place + 1)

    return call


def summing() -> Callable:
    numbers = torch.ones(SUMMED)
    return numbers.sum
