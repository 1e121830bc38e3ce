"""Computations of middle size on a CPU, one a core: they gain more from that than from several threads within each.

Of smaller ones most of the time is Python's, which one thread at a time can run; larger ones keep all cores busy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

LEAST, MOST = 2**18, 2**22  # numbers that such a computation reads: 1 MB and 16 MB in float32
AHEAD = 8  # results a thread that may wait for an earlier one which takes longer
Job = TypeVar("Job")
Result = TypeVar("Result")
_of_thread = threading.local()


def is_middling(device: torch.device | None, numbers: int) -> bool:
    """Whether what reads so many numbers is better run by one thread, beside others; None: by what is not torch's."""
    return device is not None and device.type == "cpu" and LEAST <= numbers <= MOST


def gains_in_a_stack(device: torch.device | None, numbers: int) -> bool:
    """Whether what reads so many numbers is better done together with others: on a CPU, where it is small."""
    return device is None or device.type != "cpu" or numbers < LEAST


def at_once(device: torch.device | None, numbers: int, at_most: int | None = None) -> int:
    """How many computations that read so many numbers `side_by_side` runs at a time."""
    threads = torch.get_num_threads() if is_middling(device, numbers) else 1
    return threads if at_most is None else min(threads, at_most)


def side_by_side(
    function: Callable[[Job], Result], jobs: Iterable[Job], device: torch.device | None, numbers: int,
    at_most: int | None = None,
) -> Generator[Result, None, None]:  # fmt: skip
    """What the function gives for each job, in their order.

    Those of middle size run in as many threads as torch uses, or `at_most` of them, each by one thread, so that results
    do not depend on their number; at most that many and one are taken and not done. What torch is told by `with` holds
    in them as in the caller: autocast, gradients, inference. An error or an interruption ends it once those that run
    are done, or say `check_wanted`; one that comes between two results ends it where it is closed.
    """
    threads = at_once(device, numbers, at_most)
    if threads == 1:
        yield from map(function, jobs)
        return
    of_torch = torch.get_num_threads()
    dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(job: Job) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype, enabled):
            return function(job)

    waiting: deque[Future[Result]] = deque()
    ended = threading.Event()
    with ThreadPoolExecutor(threads, initializer=_begin, initargs=(ended, caller())) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(alike, job))
                running = [future for future in waiting if not future.done()]
                if len(running) > threads and len(waiting) <= AHEAD * threads:
                    wait(running, return_when=FIRST_COMPLETED)
                while waiting and (waiting[0].done() or len(waiting) > AHEAD * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            ended.set()
            for future in waiting:
                future.cancel()
            torch.set_num_threads(of_torch)  # threads that begin later get what was set last


def _begin(ended: threading.Event, caller: int) -> None:
    torch.set_num_threads(1)
    _of_thread.ended, _of_thread.caller = ended, caller


def caller() -> int:
    """The thread for which this one works: itself, or the one that called `side_by_side`."""
    return getattr(_of_thread, "caller", threading.get_ident())


def check_wanted() -> None:
    """For a long job between its steps: CancelledError once the `side_by_side` that runs it has ended."""
    ended = getattr(_of_thread, "ended", None)
    if ended is not None and ended.is_set():
        raise CancelledError
