"""Files of `igpt-lab paper` read back: one that is not as it was written is named in a line, and nothing is made of it.

`stages.json` has the SHA-256 of each stage's csv. It is written after the csv, so a stage whose digest is not there is
not finished.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from igpt_lab.core.hub import read_json
from igpt_lab.core.provenance import atomic_write

STAGES = "stages.json"


def note_once(folder: Path, asked: dict[str, Any]) -> None:
    """Note in the folder's `paper.json` what is asked for; ValueError where it has results of something else."""
    note = folder / "paper.json"
    if note.is_file() and (noted := read_json(note)) != asked:
        differs = ", ".join(f"{name} {noted.get(name)}" for name in asked if noted.get(name) != asked[name])
        raise ValueError(f"{folder} has results of {differs or 'something else'}; choose another folder with --out")
    atomic_write(note, json.dumps(asked, indent=2) + "\n")


def kept_table(folder: Path, name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table of a stage, measured where its csv or its digest is not in the folder."""
    file, stages = folder / f"{name}.csv", folder / STAGES
    digests = read_json(stages) if stages.is_file() else {}
    if name not in digests or not file.is_file():
        print(f"stage {name}", flush=True)
        atomic_write(file, measure().to_csv(index=False))
        digests = read_json(stages) if stages.is_file() else {}  # a stage may have measured another one
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        atomic_write(stages, json.dumps(digests, indent=2, sort_keys=True) + "\n")
    text = file.read_bytes()
    if hashlib.sha256(text).hexdigest() != digests[name]:
        raise ValueError(f"{file} is not as it was written; delete it to measure it again")
    return pd.read_csv(io.BytesIO(text), keep_default_na=False, na_values=[""])


def kept_losses(file: Path, rows: int, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """The losses (rows,) of a part, measured where its npy is not there."""
    if not file.is_file():
        buffer = io.BytesIO()
        np.save(buffer, measure())
        atomic_write(file, buffer.getvalue())
    try:
        losses = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it to measure it again") from error
    if losses.shape != (rows,) or losses.dtype.kind != "f" or not np.isfinite(losses).all():
        raise ValueError(
            f"{file} has {losses.dtype} {losses.shape}, or losses that are not finite; expected floats ({rows},); "
            "delete it to measure it again"
        )
    return losses
