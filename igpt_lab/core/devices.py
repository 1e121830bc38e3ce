"""What a processor or an accelerator needs: the device to use, the memory that is kept, the fastest product."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_drawing = threading.RLock()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (in, out) + bias, without gradients; in float32 by oneDNN where MKL is slow."""
    fits = x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.ndim > 1 and x.numel()
    if fits and mkl_is_slow() and not torch.is_autocast_enabled("cpu"):
        return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
    return F.linear(x, weight.t(), bias)


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether it is oneDNN that multiplies matrices of float32, or of bfloat16, on this processor."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and mkl_is_slow()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies with MKL on a processor with AVX-512 that is not Intel's: oneDNN takes half the time."""
    known = _of_processor()
    with_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return with_both and known.get("avx512_f", False) and "Intel" not in known["cpu_name"]


def gains_by_bfloat16(kind: str, *, training: bool = False) -> bool:
    """Whether features, or training, take less time with products in bfloat16: on CUDA, and on a CPU with AMX.

    Training gains on a CPU whose AVX-512 multiplies bfloat16 too; features of width 96 do not (docs/benchmarks.md,
    `home`).
    """
    needed = "avx512_bf16" if training else "amx_bf16"
    return kind == "cuda" or (kind == "cpu" and _of_processor().get(needed, False))


def _of_processor() -> dict:
    """What torch knows of this processor; nothing in versions that do not say it."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def widened(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, and float32 on MPS, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def best_device(asked: str | torch.device | None = None, *, here: bool = True) -> torch.device:
    """The device that is asked for by name, or else the accelerator of this machine (CUDA, MPS, ...), or the CPU.

    Raises ValueError, which lists what there is, for another. Where it is not `here`, as with the workers of a cluster,
    any kind will do that torch knows.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    numbers = range(torch.accelerator.device_count()) if accelerator else ()
    there = ["cpu", *(f"{accelerator.type}:{number}" for number in numbers if accelerator)]
    if asked is None:
        return accelerator or torch.device("cpu")
    with suppress(RuntimeError, TypeError, ValueError):
        device = torch.device(asked)
        if device.type == "cpu" or not here or f"{device.type}:{device.index or 0}" in there:
            return device
    raise ValueError(f"there is no device {str(asked)[:40]!r}; expected one of this machine: {', '.join(there)}")


def precision(device: torch.device, *, bfloat16: bool = False) -> AbstractContextManager:
    """A block in which matrix products are in bfloat16, or as wide as what they are of, whatever is on around it."""
    if not bfloat16 and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


@contextmanager
def without_autocast() -> Iterator[None]:
    """A block, or a function, in which the user's `torch.autocast` is off on every device."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(precision(torch.device(kind)))
        yield


@contextmanager
def drawing(device: torch.device, *seed: int) -> Iterator[None]:
    """What torch draws in this block follows from a seed; behind it the process goes on as if nothing was drawn.

    One thread at a time is in such a block: torch draws for all of them from one generator.
    """
    number = int(np.random.default_rng(seed).integers(2**63))
    with _drawing, torch.random.fork_rng([]), _forked(device):
        torch.default_generator.manual_seed(number)
        if device.type != "cpu":
            _seed(device, number)
        yield


@contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    """A block behind which an accelerator's generator is as it was; MPS has one device, which nobody names."""
    if device.type == "cpu":
        yield
        return
    module, which = torch.get_device_module(device), [] if device.type == "mps" else [device]
    state = module.get_rng_state(*which)
    try:
        yield
    finally:
        module.set_rng_state(state, *which)


def _seed(device: torch.device, number: int) -> None:
    """Seed the generator of this device, which need not be the current one."""
    module = torch.get_device_module(device)
    with nullcontext() if device.type == "mps" else module.device(device):
        module.manual_seed(number)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let this process keep the memory that it frees, as accelerators do; without effect where glibc is absent.

    By default glibc gives every large block back to the system, which hands it out again page by page and zeroed: in
    training on a CPU that takes as long as the arithmetic.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):
        yield
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        mallopt(option, value)
    try:
        yield
    finally:
        # glibc's defaults, as they are once it has met large blocks
        for option, value in (
            (M_MMAP_MAX, 65536),
            (M_MMAP_THRESHOLD, 2**25),
            (M_TRIM_THRESHOLD, 2**26),
            (M_TOP_PAD, 2**17),
        ):
            mallopt(option, value)
        trim(0)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of malloc.h
