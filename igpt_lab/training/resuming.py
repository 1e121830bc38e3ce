"""What a run is made of, noted where it begins, so that a later call goes on with the same run or says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from igpt_lab.core.hub import CheckpointError, read_json, write_json
from igpt_lab.core.provenance import versions
from igpt_lab.training.settings import TrainConfig


def note_run(
    path: Path, run: dict, part: str, settings: TrainConfig, upgrade: Callable[[dict], None] = lambda begun: None
) -> None:
    """Note in a file what a run is made of, or compare it with what began the run: ValueError names what differs.

    `run[part]` are `settings`, whose `steps` and `cooldown` may change while the steps that were taken keep their
    learning rates. `upgrade` fills in what the file of an older run has not.
    """
    run = json.loads(json.dumps(run))
    if not path.exists():
        write_json(path, run | {"versions": versions()})
        return
    begun: dict[str, Any] = read_json(path)
    upgrade(begun)
    earlier = type(settings)(**begun[part])
    begun[part] = json.loads(json.dumps(asdict(earlier)))
    if _same_rates(path.parent, earlier, settings):
        begun[part] |= {name: run[part][name] for name in ("steps", "cooldown")}
    for name in run:
        if begun.get(name) != run[name]:
            raise ValueError(
                f"{path.parent} holds a run whose {name} differs: {begun.get(name)} there, {run[name]} here; "
                "choose another folder, or the same arguments to go on"
            )
    write_json(path, begun)


def _same_rates(out: Path, earlier: TrainConfig, settings: TrainConfig) -> bool:
    """Would the steps that were taken have had the same learning rates?"""
    state = out / "state.safetensors"
    taken = 0
    if state.exists():
        with opened(state) as file:
            taken = int(file.metadata()["step"])
    return taken <= settings.steps and all(earlier.rate(step) == settings.rate(step) for step in range(taken))


@contextmanager
def opened(state: Path) -> Iterator[safe_open]:
    """A state file; CheckpointError where it cannot be read."""
    try:
        with safe_open(state, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{state} cannot be read ({error}); delete it to begin again") from error
