"""Figures -> files, and from those files the same figures again.

What is added to a figure after it was plotted is saved, but not plotted again by `redraw`.
"""

import base64
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.core.display import control_names
from igpt_lab.core.provenance import RunRecord, atomic_write, digest
from igpt_lab.figures.style import FIGURES, UNDATED, Figure, render


def save_figure(
    figure: Axes | matplotlib.figure.Figure, stem: str | os.PathLike, *, data: pd.DataFrame, record: RunRecord
) -> list[Path]:
    """Write stem.png, .pdf, .svg, .csv (`data`: what is plotted) and .json (`record`, and how it was plotted).

    `data` may also be a dict of columns or a 2-D array, such as tokens (N, T). The same figure, data and record give
    the same bytes. Each file is whole or absent; none is written when one cannot be made. Returns the five paths. The
    json has the csv's SHA-256 and, of a figure by one of FIGURES, what `redraw` needs.
    """
    data = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
    if data.empty:
        raise ValueError(f"data of shape {data.shape}; expected what is plotted, at least one row and one column")
    whole, csv = cast(matplotlib.figure.Figure, figure.get_figure(root=True)), _csv(data)
    return _write(whole, Path(stem), csv, record.to_dict() | _origin(whole, csv))


def redraw(file: str | os.PathLike, stem: str | os.PathLike | None = None, *, style: str | None = None) -> list[Path]:
    """Plot a saved figure again from its .json and the .csv beside it, in another `style` if one is given.

    Writes the five files of `stem`, by default over the old ones; in the same style, the same bytes. Raises ValueError
    for a csv that has changed since, and for a figure that was not made by one of FIGURES.
    """
    facts, csv = read_figure(file)
    stem = Path(file).with_suffix("") if stem is None else Path(stem)
    saved = facts.get("drawing")
    if saved is None:
        raise ValueError(f"{file} does not say which function plotted it; plot it anew and save it with save_figure")
    if saved["function"] not in FIGURES:
        raise ValueError(f"{file} was plotted by {saved['function']!r}; this version has {', '.join(FIGURES)}")
    arguments = {name: _decoded(value, csv) for name, value in saved["arguments"].items()}
    style = style or saved["style"]
    figure = FIGURES[saved["function"]](**arguments, style=style).get_figure(root=True)
    return _write(figure, stem, csv, facts | {"drawing": saved | {"style": style}})


def read_figure(file: str | os.PathLike) -> tuple[dict, bytes]:
    """What the .json of a saved figure says, and the bytes of its .csv; ValueError where the csv is not that one."""
    path = Path(file)
    facts, csv = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".csv").read_bytes()
    if not isinstance(facts, dict) or "csv_sha256" not in facts:
        raise ValueError(f"{file} is not the json of a figure: it has no csv_sha256")
    if digest(csv) != facts["csv_sha256"]:
        raise ValueError(
            f"{path.with_suffix('.csv')} has changed since {path.name} was written; restore it, or plot the changed "
            "table with its function in igpt_lab.figures"
        )
    return facts, csv


def read_table(csv: bytes, **types) -> pd.DataFrame:
    """The table in a saved figure's .csv, from pandas 3.1 on to the last bit; no word but '' means no value.

    In the column `control` of an older file '' means the model itself and becomes "model".
    """
    table = pd.read_csv(io.BytesIO(csv), **types, keep_default_na=False, na_values=[""])
    return table.assign(control=control_names(table.control)) if "control" in table else table


def _write(figure: matplotlib.figure.Figure, stem: Path, csv: bytes, facts: dict) -> list[Path]:
    files = {kind: render(figure, kind) for kind in UNDATED} | {"csv": csv}
    facts = facts | {"csv_sha256": digest(csv)}
    files["json"] = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return [atomic_write(f"{stem}.{kind}", content) for kind, content in files.items()]


def _origin(figure: matplotlib.figure.Figure, csv: bytes) -> dict:
    """What `redraw` needs to know of a figure; nothing of one that no function of this room made as a whole."""
    if not isinstance(figure, Figure) or figure.plotted_by is None:
        return {}
    function, arguments = figure.plotted_by
    encoded = {name: _encoded(value, csv) for name, value in arguments.items()}
    return {"drawing": {"function": function, "arguments": encoded, "style": figure.style}}


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=table.index.name is not None, lineterminator="\n").encode()


def _encoded(value: object, csv: bytes) -> object:
    """An argument as plain JSON: a table as csv (null: the one beside), an array as its compressed bytes."""
    if isinstance(value, pd.DataFrame):
        if not pd.api.types.is_integer_dtype(value.index):  # rows have names, such as those of classes
            return {"named": value.to_csv(lineterminator="\n")}
        text = _csv(value)
        return {"csv": None if text == csv else text.decode()}
    if isinstance(value, np.ndarray):
        packed = base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes(), 9)).decode()
        return {"array": packed, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {"items": [[name, _encoded(item, csv)] for name, item in value.items()]}  # in their order
    if isinstance(value, list | tuple):
        return [_encoded(item, csv) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _decoded(value: object, csv: bytes) -> object:
    """The argument that `_encoded` was given."""
    if isinstance(value, list):
        return [_decoded(item, csv) for item in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {name: _decoded(item, csv) for name, item in value["items"]}
    if "named" in value:
        table = read_table(value["named"].encode(), dtype={0: str})
        return table.set_index(table.columns[0])
    if "csv" in value:
        return read_table(csv if value["csv"] is None else value["csv"].encode())
    flat = np.frombuffer(zlib.decompress(base64.b64decode(value["array"])), value["dtype"])
    return flat.reshape(value["shape"])
