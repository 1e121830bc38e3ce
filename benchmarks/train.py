"""Tokens a second of a training step: ours against transformers' ImageGPT and against nanoGPT's step, same shapes.

Ours is the step that `pretrain` takes, compiled, in the dtype that it settles on. The others are run in float32 and in
bfloat16 autocast, as they are and compiled whole, and the best counts; their gradients are not clipped, as ours are not
by default. Of size S four of its 24 blocks are trained: all blocks are alike, so that the rate hardly changes, and a
step takes seconds. Shares count the positions that a causal model looks at.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

import igpt_lab as lab
from benchmarks.harness import Result, matmul, race, rate, row
from benchmarks.nanogpt import GPT
from igpt_lab.core.devices import memory_kept
from igpt_lab.features.planning import flops
from igpt_lab.models.losses import align
from igpt_lab.training.settings import PretrainConfig
from igpt_lab.training.trainer import Trainer

# (blocks, D, heads, T, V), images a step
SHAPES = {
    "20 x 96, T = 144, V = 32": ((20, 96, 2, 144, 32), 64),
    "20 x 128, T = 256, V = 512": ((20, 128, 4, 256, 512), 32),
    "4 of S's 24 x 512, T = 1024, V = 512": ((4, 512, 8, 1024, 512), 2),
}
QUICK = {"2 x 16, T = 16, V = 8": ((2, 16, 2, 16, 8), 2)}
DTYPES = ("float32", "bfloat16")
STEPS = 2  # of a call: the first meets caches that others have filled


def rows(quick: bool) -> Iterator[dict]:
    runs = 1 if quick else 5
    for case, (shape, batch) in (QUICK if quick else SHAPES).items():
        for peer, make in {"transformers": port, "nanoGPT": nanogpt}.items():
            settings = [(dtype, compiled) for dtype in DTYPES for compiled in ((False,) if quick else (False, True))]
            peers = {
                f"{peer}, {dtype}, {'compiled' if compiled else 'eager'}": partial(make, shape, batch, dtype, compiled)
                for dtype, compiled in settings
            }
            makers = {"ours": partial(ours, shape, batch, not quick), **peers}
            makers |= {dtype: partial(matmul, getattr(torch, dtype)) for dtype in DTYPES}
            results = race(makers, runs, warm=1 if quick else 2, optional=peers)
            best = min((name for name in results if name in peers), key=lambda name: results[name].seconds)
            yield from compared(case, shape, batch, results, best, runs)


def compared(case: str, shape: tuple, batch: int, results: dict[str, Result], best: str, runs: int) -> Iterator[dict]:
    """Tokens a second, peak memory, and shares of the matrix-multiply rates measured in the same race."""
    config, ends = config_of(shape), (results["ours"], results[best])
    speeds = [STEPS * batch * config.n_positions / result.seconds for result in ends]
    yield row(case, "training", "tokens/s", *speeds, best, runs=runs)
    for dtype in DTYPES:
        reached = rate(results[dtype])
        shares = [3 * flops(config, head=True) / config.n_positions * speed / 1e9 / reached for speed in speeds]
        unit = f"of {reached:.0f} GFLOP/s"
        yield row(case, f"share of the {dtype} matrix-multiply rate", unit, *shares, best, runs=runs)
    yield row(case, "peak memory", "MB", *(result.peak for result in ends), best, runs=runs, less=True)


def config_of(shape: tuple) -> lab.ImageGPTConfig:
    blocks, width, heads, positions, colours = shape
    return lab.ImageGPTConfig(
        vocab_size=colours + 1, n_positions=positions, n_embd=width, n_layer=blocks, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def tokens_of(config: lab.ImageGPTConfig, batch: int, extra: int = 0) -> np.ndarray:
    """Random pixels (batch, T + extra)."""
    return np.random.default_rng(0).integers(config.n_colours, size=(batch, config.n_positions + extra))


# Makers: each is called in a process of its own.


def ours(shape: tuple, batch: int, compile: bool, device: str = "cpu") -> Callable:
    config = config_of(shape)
    recipe = PretrainConfig(steps=100_000, batch_size=batch, compile=compile).settled(config, torch.device(device))
    model, tokens = lab.ImageGPTForCausalImageModeling(config).to(device), tokens_of(config, batch)
    trainer = Trainer(model, recipe, Path("absent"), lambda pixels: lab.next_pixel_loss(model, pixels))
    kept = ExitStack()  # as long as the call lives
    kept.enter_context(memory_kept())
    kept.enter_context(trainer.compiled)

    def call(kept=kept) -> None:
        for _ in range(STEPS):
            trainer.update(tokens)

    return call


def port(shape: tuple, batch: int, dtype: str, compiled: bool, device: str = "cpu") -> Callable:
    """transformers' model in the loop of its Trainer: fused AdamW, autocast, SOS in front and labels shifted inside."""
    import transformers

    ours = config_of(shape)
    values = {name: value for name, value in ours.to_dict().items() if name not in ("bidirectional", "model_type")}
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**values | {"use_cache": False}))
    optimiser = torch.optim.AdamW(model.to(device).train().parameters(), lr=1e-3, fused=True)
    tokens = align(torch.as_tensor(tokens_of(ours, batch)), "sos", ours).to(device)
    forward = torch.compile(model) if compiled else model
    return partial(train, lambda: forward(input_ids=tokens, labels=tokens).loss, optimiser, dtype, device)


def nanogpt(shape: tuple, batch: int, dtype: str, compiled: bool) -> Callable:
    blocks, width, heads, positions, colours = shape
    model = GPT(colours=colours, positions=positions, width=width, blocks=blocks, heads=heads).train()
    tokens = torch.as_tensor(tokens_of(config_of(shape), batch, extra=1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = torch.compile(model) if compiled else model
    return partial(train, lambda: forward(inputs, targets), model.optimiser(), dtype)


def train(loss_of: Callable, optimiser: torch.optim.Optimizer, dtype: str, device: str = "cpu") -> None:
    """The others' steps."""
    for _ in range(STEPS):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
