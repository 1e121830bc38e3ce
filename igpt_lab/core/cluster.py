"""Tasks on the workers of a Dask cluster, in spite of workers that die, hang or have no room.

A task is given to one worker, and to another where that one is gone, too slow, or fails for want of a file, room or
memory. Slurm, Kubernetes and clouds all start such workers; without a scheduler's address they are processes of this
machine. Whoever calls sees to it that a task that was begun twice does no harm.

A scheduler runs whatever those who reach it ask for. One that is started here therefore talks TLS, with a key that only
this process and its workers have; the security of another is that of Dask's own configuration (`tls://` addresses).
"""

from __future__ import annotations

import pickle
import re
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import digest, made_by, unlike

DEATHS = 5  # of workers at one task, after which it is thought to kill them
STRIKES = 2  # failures of one worker, one after another, for its own reasons
PACE = 0.2  # seconds between looks at the workers
PATIENCE = 600  # seconds: without any worker, and the least deadline that is not given


MODULE = "<module>"  # Python's name of a file's own level in a stack


class ClusterError(ValueError):
    """Tasks that failed, each with its reason, after all others were finished."""


def run(
    work, tasks: Iterable[tuple[str, tuple] | None], *, scheduler: str | None = None, workers: int = 1,
    slots: int = 1, deadline: float | None = None,
) -> Generator[tuple[str, Any], None, None]:  # fmt: skip
    """(name, result) of `tasks` (name, arguments) in the order in which they are finished; each is called once or more.

    `work` is picklable, and `work.open()` returns the function that is called with a task's arguments; a worker process
    opens it once and keeps it. None among the tasks says that there is none now. `scheduler` is the address of a
    cluster; without it `workers` processes are started here. A worker has at most `slots` tasks at a time, and
    `deadline` seconds for each; when None, 20 times the median of those finished, and 10 minutes at least.

    OSError and MemoryError are a worker's own: the task goes to another. Any other error is the task's, and is raised
    as ClusterError when the rest is finished. Raises ClusterError at once for a worker of another version or a script
    that its own workers would run again, OSError where no worker is left.
    """
    if scheduler is None:
        _check_guard()
    return _run(work, tasks, scheduler, workers, slots, deadline)


def _run(work, tasks, scheduler, workers, slots, deadline) -> Generator[tuple[str, Any], None, None]:
    with connected(scheduler, workers, slots) as client:
        yield from _Run(client, work, slots, deadline).over(iter(tasks))


def _check_guard() -> None:
    """ClusterError where the main script calls from outside an `if __name__ == "__main__":`.

    A worker process imports the main script, as all that multiprocessing spawns do, and would run that call again.
    """
    main = vars(sys.modules["__main__"])
    lines = [n for frame, n in traceback.walk_stack(None) if frame.f_globals is main and frame.f_code.co_name == MODULE]
    script, spec = Path(str(main.get("__file__"))), main.get("__spec__")
    if not lines or not script.is_file() or (spec and spec.name.endswith("__main__")):
        return  # a notebook, `python -c`, `python -m package`: multiprocessing imports none of them
    before = "\n".join(script.read_text(errors="replace").splitlines()[: max(lines)])
    if not re.search(r"^\s*if\b.*__name__", before, re.MULTILINE):
        raise ClusterError(
            f"{script} line {max(lines)} starts worker processes, which import this script: put what it does under "
            f'`if __name__ == "__main__":`, or give the address of a scheduler'
        )


def distributed():
    """The package; ImportError, which says what to install, where it is not there."""
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "a cluster needs dask.distributed: pip install 'distributed>=2025.1' 'cryptography>=42'"
        ) from error
    return distributed


@contextmanager
def connected(scheduler: str | None, workers: int, slots: int):
    """A client of a scheduler, or of a cluster of `workers` processes that ends with this block."""
    dask = distributed()
    if workers < 1:
        raise ValueError(f"workers={workers}; expected at least 1")
    if scheduler:
        with dask.Client(scheduler, timeout=30, set_as_default=False) as client:
            yield client
        return
    with (
        dask.LocalCluster(
            n_workers=workers, threads_per_worker=slots, host="127.0.0.1", dashboard_address=None, memory_limit=0,
            silence_logs="CRITICAL", security=True,
        ) as cluster,
        dask.Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def worker_number() -> int | None:
    """Of the worker process that this is called in, where its name is a number, as `connected` names them."""
    with suppress(ImportError, ValueError):
        name = str(distributed().get_worker().name)
        return int(name) if name.isdigit() else None
    return None


def device_of_worker(kind: str) -> torch.device:
    """Of several CUDA devices the one with the number of this worker; its process may see no more than one."""
    count, number = torch.cuda.device_count() if kind == "cuda" else 0, worker_number()
    return torch.device(kind if count < 2 or number is None else f"cuda:{number % count}")


# In a worker.

_KEPT: dict[str, Callable] = {}
_OPENING = threading.Lock()


def call(token: str, work: bytes, driver: dict[str, str], arguments: tuple) -> object:
    """Run a task on work that this process opens once."""
    if differing := unlike(driver, made_by()):
        raise VersionsDiffer(differing)
    with _OPENING:
        if token not in _KEPT:
            _KEPT.clear()
            _KEPT[token] = pickle.loads(work).open()
    return _KEPT[token](*arguments)


class VersionsDiffer(ClusterError):
    """A worker whose packages could compute another number."""


# In the driver.


@dataclass(eq=False)
class _Task:
    name: str
    arguments: tuple
    deaths: int = 0
    refused: dict[str, Exception] = field(default_factory=dict)  # by the worker that could not

    def why(self) -> str:
        error = [*self.refused.values()][-1]
        return f"{type(error).__name__}: {error}"


@dataclass(eq=False)
class _Begun:
    task: _Task
    worker: str
    future: Any  # of distributed
    since: float


class _Run:
    """One call of `run`: what waits, what is at which worker, and what failed."""

    def __init__(self, client, work, slots: int, deadline: float | None):
        self.client, self.slots = client, slots
        self.deadline = deadline
        self.work, self.versions = pickle.dumps(work), made_by()
        self.token = digest(self.work)
        self.again: deque[_Task] = deque()
        self.begun: list[_Begun] = []
        self.failed: list[tuple[str, str]] = []
        self.strikes: dict[str, int] = {}
        self.banned: dict[str, str] = {}
        self.seconds: list[float] = []
        self.seen = time.monotonic()  # when there was a worker last

    def over(self, tasks: Iterator) -> Iterator[tuple[str, object]]:
        more = True
        while more or self.again or self.begun:
            alive = self.alive()
            self.take_back(alive)
            more = self.hand_out(alive, tasks) and more
            if not self.begun:
                time.sleep(PACE)
                continue
            until = time.monotonic() + PACE
            while time.monotonic() < until and not any(begun.future.done() for begun in self.begun):
                time.sleep(0.01)
            for begun in [begun for begun in self.begun if begun.future.done()]:
                self.begun.remove(begun)
                yield from self.settle(begun)
        if self.failed:
            lines = "".join(f"\n  {name}: {why}" for name, why in self.failed)
            raise ClusterError(f"{len(self.failed)} failed, all others are finished:{lines}")

    def alive(self) -> list[str]:
        """Addresses of the workers that may be given a task; OSError where there is none and none will be."""
        every = list(self.client.nthreads())
        if any(worker not in self.banned for worker in every):
            self.seen = time.monotonic()
        elif (every and not self.begun) or time.monotonic() - self.seen > PATIENCE:
            why = next(iter(self.banned.values()), f"none came in {PATIENCE} s")
            raise OSError(f"no worker is left ({why}); finished work is kept; give the same command again to continue")
        return every

    def take_back(self, alive: list[str]) -> None:
        """Tasks of workers that are gone, or over their deadline."""
        limit = self.limit()
        for begun in list(self.begun):
            task, worker = begun.task, begun.worker
            late = time.monotonic() - begun.since > limit
            if (worker in alive and not late) or begun.future.done():
                continue
            self.begun.remove(begun)
            begun.future.release()
            if worker in alive:
                self.end(worker, f"{task.name} took over {limit:.0f} s on {worker}")
            task.deaths += 1
            if task.deaths < DEATHS:
                self.again.append(task)
            else:
                self.failed.append((task.name, f"its worker died or hung {DEATHS} times; is there memory for it?"))

    def limit(self) -> float:
        if self.deadline is not None:
            return self.deadline
        return max(PATIENCE, 20 * statistics.median(self.seconds)) if len(self.seconds) > 2 else float("inf")

    def end(self, worker: str, why: str) -> None:
        """End a worker that hangs, and take no other answer from it; its nanny, if it has one, starts a new one."""
        tqdm.write(f"{why}: it goes to another worker", file=sys.stderr)
        self.banned[worker] = why
        with suppress(Exception):  # whatever a worker answers that hangs: it is given nothing more
            self.client.restart_workers([worker], timeout=10, raise_for_error=False)

    def hand_out(self, alive: list[str], tasks: Iterator) -> bool:
        """Give each worker with room a task that it has not refused; False when there are no more to take."""
        more, usable = True, [worker for worker in alive if worker not in self.banned]
        for worker in usable:
            while self.slots > sum(begun.worker == worker for begun in self.begun):
                task, more = self.next_for(worker, tasks)
                if task is None:
                    break
                arguments = self.token, self.work, self.versions, task.arguments
                future = self.client.submit(call, *arguments, pure=False, workers=[worker], allow_other_workers=False)
                self.begun.append(_Begun(task, worker, future, time.monotonic()))
        if usable and not self.begun and not more:
            self.failed += [(task.name, task.why()) for task in self.again]  # refused by all that are left
            self.again.clear()
        return more

    def next_for(self, worker: str, tasks: Iterator) -> tuple[_Task | None, bool]:
        """A task that this worker has not refused, and whether there may be more."""
        for task in self.again:
            if worker not in task.refused:
                self.again.remove(task)
                return task, True
        following: Any = next(tasks, _END)
        if following is None or following is _END:
            return None, following is None
        return _Task(*following), True

    def settle(self, begun: _Begun) -> Iterator[tuple[str, object]]:
        """The result of a task that has come to an end, or what follows from its failure."""
        task, worker = begun.task, begun.worker
        error: Exception | None = None
        try:
            result = begun.future.result(timeout=60)
        except Exception as failure:
            error = failure
        if error is None:
            self.strikes[worker] = 0
            self.seconds.append(time.monotonic() - begun.since)
            yield task.name, result
        elif isinstance(error, VersionsDiffer):
            raise ClusterError(f"the worker {worker} has other versions: {error}; install the same everywhere")
        elif isinstance(error, OSError | MemoryError) and not _lost(error):
            self.refuse(begun, error)
        elif _lost(error):
            task.deaths += 1
            self.again.append(task)
        else:
            self.failed.append((task.name, f"{type(error).__name__}: {error}"))

    def refuse(self, begun: _Begun, error: Exception) -> None:
        """A worker could not: another may, once."""
        task, worker = begun.task, begun.worker
        task.refused[worker] = error
        self.strikes[worker] = self.strikes.get(worker, 0) + 1
        why = f"{worker} could not do {task.name}, {type(error).__name__}: {error}"
        tqdm.write(why, file=sys.stderr)
        if self.strikes[worker] >= STRIKES:
            self.banned[worker] = f"at last {why}"
        others = [other for other in self.client.nthreads() if other not in {*task.refused, *self.banned}]
        if others and len(task.refused) < STRIKES:
            self.again.append(task)
        else:
            self.failed.append((task.name, task.why()))


def _lost(error: Exception) -> bool:
    """Was it the connection to a worker that failed, and not the task?"""
    dask = distributed()
    lost = (dask.KilledWorker, dask.CancelledError, dask.comm.CommClosedError, TimeoutError)
    return isinstance(error, lost)


_END = object()
