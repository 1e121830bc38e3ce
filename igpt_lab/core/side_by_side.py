"""Computations of middle size on a CPU, one a core: they gain more from that than from several threads within each.

Of smaller ones most of the time is Python's, which one thread at a time can run; larger ones keep all cores busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

LEAST, MOST = 2**18, 2**22  # numbers that such a computation reads: 1 MB and 16 MB in float32
Job = TypeVar("Job")
Result = TypeVar("Result")


def is_middling(device: torch.device | None, numbers: int) -> bool:
    """Whether what reads so many numbers is better run by one thread, beside others; None: by what is not torch's."""
    return device is not None and device.type == "cpu" and LEAST <= numbers <= MOST


def at_once(device: torch.device | None, numbers: int) -> int:
    """How many computations that read so many numbers `side_by_side` runs at a time."""
    return torch.get_num_threads() if is_middling(device, numbers) else 1


def side_by_side(
    function: Callable[[Job], Result], jobs: Iterable[Job], device: torch.device | None, numbers: int
) -> Iterator[Result]:
    """What the function gives for each job, in their order.

    Those of middle size run in as many threads as torch uses, each by one thread, so that results do not depend on
    their number; no more jobs are taken at once than that, and one. An error or an interruption ends it once those that
    run are done. What torch keeps for each thread by itself, such as autocast, is in them as at the program's start.
    """
    threads = at_once(device, numbers)
    if threads == 1:
        yield from map(function, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)  # threads that begin later get what was set last
