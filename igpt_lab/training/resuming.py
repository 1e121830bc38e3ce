"""What a run is made of, noted where it begins, so that a later call goes on with the same run or says what differs.

A state file says of which run it is, and has a checksum of all that it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_lab.core.hub import CheckpointError, read_json, write_json
from igpt_lab.core.provenance import digest, versions
from igpt_lab.core.storage import lock_of, unlink
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.training import parallel
from igpt_lab.training.settings import TrainConfig

STATE = "state.safetensors"
RECORDS = ("training.json", "finetuning.json")
RESULTS = ("model.safetensors", "config.json", "checkpoints", "causal")
SCHEDULE = ("steps", "cooldown")  # may change while the steps that were taken keep their learning rates
LATER = ("palette", "classes", "pictures")  # not in the records of older versions
OLD_NOTES = {"step", "log", "lowest"}
BEGIN_AGAIN = "move it away to begin the run again, or choose another folder"

Settings = TypeVar("Settings", bound=TrainConfig)
_ours: ContextVar[tuple[Path, ...]] = ContextVar("folders that this call holds", default=())


class State(NamedTuple):
    """What a state file holds: its tensors, and what `Trainer` notes beside them."""

    tensors: dict[str, Tensor]
    run: str
    schedule: dict[str, int]
    step: int
    log: list[dict[str, float]]
    lowest: float


@contextmanager
def in_use(out: Path) -> Iterator[None]:
    """Hold the folder of a run; ValueError where another run does. Who holds it may do so again."""
    out = out.resolve()
    if parallel.rank() or out in _ours.get():
        yield
        return
    lock = lock_of(out / STATE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out} is in use by another run; wait for its end, or choose another folder") from error
    mark = _ours.set((*_ours.get(), out))
    try:
        yield
    finally:
        _ours.reset(mark)
        unlink(lock)
        lock.release()


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C (and SIGTERM) sets the event instead of raising in the middle of a step."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in reversed(before.items()):  # Ctrl-C last: it may end this block
            signal.signal(number, handler)


def import_compiler() -> None:
    """Import what torch's optimisers and its compiler need, to the end: half of it would fail as long as the process
    lives. A Ctrl-C in it comes after it."""
    with interruptible() as interrupted:
        import_module("torch._dynamo")
    if interrupted.is_set():
        raise KeyboardInterrupt


def as_begun(path: Path, part: str, settings: Settings) -> Settings:
    """With `compile`, where it is left open, as in the record of the run: only a long run compiles by itself, and steps
    may be added."""
    begun = read_json(path).get(part) if settings.compile is None and path.is_file() else None
    compiles = begun.get("compile", False) if isinstance(begun, dict) else None
    return replace(settings, compile=compiles) if isinstance(compiles, bool) else settings


def note_run(
    path: Path, run: dict, part: str, settings: TrainConfig, upgrade: Callable[[dict], None] = lambda begun: None
) -> str:
    """Note in a file what a run is made of, or compare it with what began the run: ValueError names what differs.

    Returns the digest of the run, which its state file carries. `run[part]` are `settings`, whose `steps` and
    `cooldown` may change while the steps that were taken keep their learning rates, and are not in the digest.
    `upgrade` fills in what the file of an older run has not.
    """
    run = json.loads(json.dumps(run))
    lasting = {name: value for name, value in run[part].items() if name not in SCHEDULE}
    identity, state = digest(run | {part: lasting}), path.parent / STATE
    saved = read_state(state) if state.exists() else None
    if path.exists():
        begun = read_json(path)
    else:
        _check_free(path, identity, saved)
        begun = run | {"versions": versions()}
    schedule = saved.schedule if saved and saved.run == identity else {}
    earlier = _settings_of(path, begun, part, type(settings), upgrade, schedule)
    begun = {name: run[name] for name in LATER if name in run} | begun
    begun[part] = json.loads(json.dumps(asdict(earlier)))
    taken = saved.step if saved else 0
    if taken <= settings.steps and all(earlier.rate(step) == settings.rate(step) for step in range(taken)):
        begun[part] |= {name: run[part][name] for name in SCHEDULE}
    for name in run:
        if begun.get(name) != run[name]:
            there, here = _differing(begun.get(name), run[name])
            raise ValueError(
                f"{path.parent} holds a run whose {name} differs: {there} there, {here} here; "
                "choose another folder, or give the same arguments to continue"
            )
    write_json(path, begun)
    return identity


def _differing(there: object, here: object) -> tuple[object, object]:
    """Of two dicts the items that differ; any other values as they are."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return there, here
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return {name: there.get(name) for name in names}, {name: here.get(name) for name in names}


def palette_digest(processor: ImageGPTImageProcessorPil | None) -> str | None:
    """Of the palette and of how images are resized, None for a model without."""
    if processor is None:
        return None
    values = processor.arguments()
    return digest({name: np.asarray(value).tolist() for name, value in values.items() if value is not None})


def _check_free(path: Path, identity: str, saved: State | None) -> None:
    """ValueError where a folder without this record holds what is not of the run."""
    folder = path.parent
    held = [name for name in RECORDS if name != path.name and (folder / name).exists()]
    if saved is None:
        held += [name for name in RESULTS if (folder / name).exists()]
    elif saved.run != identity:
        held.append(STATE)
    if held:
        raise ValueError(f"{folder} holds {held[0]} that is not of this run; choose another folder")


def _settings_of(
    path: Path, begun: dict, part: str, kind: type[TrainConfig], upgrade: Callable[[dict], None], schedule: dict
) -> TrainConfig:
    """The settings in a record; CheckpointError where it is damaged."""
    try:
        upgrade(begun)
        return kind(**begun[part] | schedule)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is damaged, or of another version ({what}); restore it, or choose another folder"
        ) from error


def write_note(tensors: Mapping[str, Tensor], note: dict[str, str]) -> dict[str, str]:
    """What a state file notes beside its tensors, with the checksum of both."""
    return note | {"sha256": _checksum(tensors, note)}


def read_state(path: Path) -> State:
    """The content of a state file; CheckpointError where it is damaged, or is none."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            note = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {BEGIN_AGAIN}") from error
    checksum = note.pop("sha256", None)
    if checksum is None and note.keys() <= OLD_NOTES:
        warnings.warn(f"{path} is of an older version: nothing says whether it is as it was written", stacklevel=2)
    elif checksum != _checksum(tensors, note):
        raise CheckpointError(f"{path} cannot be read (it is not as it was written); {BEGIN_AGAIN}")
    try:
        return _state(tensors, note)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read (no state of a run: {error!r}); {BEGIN_AGAIN}") from error


def _checksum(tensors: Mapping[str, Tensor], note: dict[str, str]) -> str:
    """SHA-256 over names, types, shapes and numbers of tensors on the CPU, and a note."""
    names = sorted(tensors)
    kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    sha = hashlib.sha256(json.dumps([kinds, note], sort_keys=True).encode())
    for name in names:
        sha.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _state(tensors: dict[str, Tensor], note: dict[str, str]) -> State:
    """A state from the strings beside its tensors."""
    schedule = json.loads(note.get("schedule", "{}"))
    step, lowest = int(note["step"]), float(note.get("lowest", "inf"))
    log = json.loads(note["log"])
    if not 0 <= step <= schedule.get("steps", step) or schedule.keys() - set(SCHEDULE) or math.isnan(lowest):
        raise ValueError(f"step {step} of {schedule}, lowest loss {lowest}")
    numbers = (isinstance(value, int | float) for row in log for value in row.values())
    if (
        not isinstance(log, list)
        or not all({"step", "validation_loss"} <= row.keys() for row in log)
        or not all(numbers)
    ):
        raise ValueError("its log has no rows of numbers, step and validation_loss among them")
    return State(tensors, note.get("run", ""), schedule, step, log, lowest)
