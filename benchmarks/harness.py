"""What benchmarks share: contestants measured in turns, rows with a ratio, and the files that hold them."""

import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from igpt_lab.core.devices import best_device, product
from igpt_lab.core.provenance import atomic_write

COLUMNS = ["case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "runs"]


@dataclass(frozen=True)
class Result:
    """Median seconds of a contestant's calls, what its last call returned, and its peak memory in MB."""

    seconds: float
    value: object
    peak: float


def in_turns(calls: dict[str, Callable], runs: int) -> dict[str, Result]:
    """Measure calls A B C, A B C, ... so that what else the machine does falls on all alike."""
    return _medians({name: partial(_timed, call) for name, call in calls.items()}, runs)


def race(makers: dict[str, Callable], runs: int, *, warm: int = 1, optional: Iterable[str] = ()) -> dict[str, Result]:
    """`in_turns` with a fresh process for each contestant, so that memory and settings are its own.

    A maker is picklable (a function of a module, or `partial` of one) and returns the call to measure, which is first
    called `warm` times; all that is done by one contestant after another. Contestants in `optional` may fail; they are
    then absent from what is returned.
    """
    contestants = {}
    try:
        for name, make in makers.items():
            contestants[name] = _Contestant(make)
            try:
                contestants[name].answer()
                for _ in range(max(1, warm) if name in optional else warm):
                    contestants[name]()
            except RuntimeError as error:
                if name not in optional:
                    raise RuntimeError(f"{name}: {error}") from None
                print(f"without {name}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
                contestants.pop(name).end()
        return _medians(contestants, runs)
    finally:
        for contestant in contestants.values():
            contestant.end()


def row(
    case: str, metric: str, unit: str, ours: float, peer: float = math.nan, peer_name: str = "", *,
    runs: int, less: bool = False,
) -> dict:  # fmt: skip
    """A row of the table; `ratio` is above 1 where we are better, `less` says that less is better."""
    ratio = peer / ours if less else ours / peer
    return dict(zip(COLUMNS, (case, metric, unit, ours, peer, peer_name, ratio, runs), strict=True))


def matmul(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> Callable:
    """Maker of a contestant: five products of square matrices, by the faster of torch's two libraries in float32.

    `rate` makes its seconds GFLOP/s.
    """
    left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(5):
            product(left, right)

    return multiply


def rate(result: Result, size: int = 2048) -> float:
    """GFLOP/s of `matmul`."""
    return 5 * 2 * size**3 / result.seconds / 1e9


def line(row: dict) -> str:
    """A row for the terminal."""
    peer = f"  {row['peer_name']} {_short(row['peer'])}  ratio {_short(row['ratio'])}" if row["peer_name"] else ""
    return f"{row['case']}: {row['metric']} {_short(row['ours'])} {row['unit']}{peer}"


def write(name: str, rows: list[dict], folder: str | Path, command: str) -> Path:
    """NAME.csv, and NAME.md with a line about the machine; returns the path of the first."""
    table, folder = pd.DataFrame(rows, columns=COLUMNS), Path(folder)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(map(_short, cells)) + " |" for cells in table.itertuples(index=False)]
    atomic_write(folder / f"{name}.md", "\n".join([*lines, "", f"{machine()}; `{command}`", ""]))
    return atomic_write(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))


def machine() -> str:
    """One line about where this runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((entry.partition(": ")[2] for entry in cpus if entry.startswith("model name")), platform.processor())
    return f"{cores} cores, {cpu or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_memory() -> float:
    """Largest memory of this process so far, in MB: the accelerator's where it used one, else what was resident."""
    if torch.accelerator.is_available() and (used := torch.accelerator.max_memory_allocated()):
        return used / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss begins with what the parent process had
        kilobytes = next(entry.split()[1] for entry in status.read_text().splitlines() if entry.startswith("VmHWM"))
        return int(kilobytes) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def _timed(call: Callable) -> tuple[float, object, float]:
    begun = time.perf_counter()
    value = call()
    if torch.accelerator.is_available():  # it works behind the host
        torch.accelerator.synchronize()
    return time.perf_counter() - begun, value, peak_memory()


def _medians(measured: dict[str, Callable], runs: int) -> dict[str, Result]:
    """Of calls that measure themselves."""
    taken = {name: [] for name in measured}
    for _ in range(runs):
        for name, call in measured.items():
            taken[name].append(call())
    return {name: Result(statistics.median(timing[0] for timing in of), *of[-1][1:]) for name, of in taken.items()}


class _Contestant:
    """A process that makes a call and measures it whenever this is called."""

    def __init__(self, make: Callable):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, other))
        self.process.start()
        other.close()

    def __call__(self) -> tuple[float, object, float]:
        self.pipe.send(True)
        return self.answer()

    def answer(self) -> tuple[float, object, float]:
        """What the call measured, or first of all that it is made."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError("its process died") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        """Let it finish by itself, or end it."""
        self.pipe.close()
        self.process.join(30)
        self.process.terminate()
        self.process.join()


def use_device() -> None:
    """Make the accelerator that IGPT_LAB_DEVICE names the current one: what waits and what measures memory is of it."""
    device = best_device(os.environ.get("IGPT_LAB_DEVICE") or None)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)


def _serve(make: Callable, pipe) -> None:
    try:
        use_device()
        call = make()
        pipe.send((0.0, None, peak_memory()))
        while pipe.recv():
            pipe.send(_timed(call))
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
