"""Tables and images -> figures -> files, and from those files the same figures again. Never imports torch.

Offers every function of `curves` and `galleries`. Each takes a `style`: `paper` (one column of a page, the default),
`wide` (two columns) or `talk`. In a notebook, end the cell with `ax.figure`: it shows the bytes that `save_figure`
writes as png. What is added to a figure after it was drawn is saved, but not drawn again by `redraw`.
"""

import base64
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from igpt_lab.core.display import control_names
from igpt_lab.core.provenance import RunRecord, atomic_write, digest
from igpt_lab.figures.curves import (
    cka_map,
    confusion_matrix,
    feature_map,
    few_label_curve,
    fine_tuning,
    geometry_curves,
    layer_curve,
    model_comparison,
    protocol_curves,
    training_dynamics,
)
from igpt_lab.figures.galleries import completion_gallery, gallery, neighbour_gallery, row_gallery, surprise_gallery
from igpt_lab.figures.style import UNDATED, render

DRAWN_BY = {
    function.__name__: function
    for function in (
        layer_curve, few_label_curve, cka_map, geometry_curves, protocol_curves, confusion_matrix, feature_map,
        fine_tuning, training_dynamics, model_comparison, gallery, completion_gallery, row_gallery, neighbour_gallery,
        surprise_gallery,
    )
}  # fmt: skip


def save_figure(
    figure: Axes | matplotlib.figure.Figure, stem: str | os.PathLike, *, data: pd.DataFrame, record: RunRecord
) -> list[Path]:
    """Write stem.png, .pdf, .svg, .csv (`data`: what is drawn) and .json (`record`, and how it was drawn).

    `data` may also be a dict of columns or a 2-D array, such as tokens (N, T). The same figure, data and record give
    the same bytes. Each file is whole or absent; none is written when one cannot be made. Returns the five paths. The
    json has the csv's SHA-256 and, of a figure by one of DRAWN_BY, what `redraw` needs.
    """
    data = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
    if data.empty:
        raise ValueError(f"data of shape {data.shape}; expected what is drawn, at least one row and one column")
    figure, csv = figure.get_figure(root=True), _csv(data)
    return _write(figure, Path(stem), csv, record.to_dict() | _drawing(figure, csv))


def redraw(file: str | os.PathLike, stem: str | os.PathLike | None = None, *, style: str | None = None) -> list[Path]:
    """Draw a saved figure again from its .json and the .csv beside it, in another `style` if one is given.

    Writes the five files of `stem`, by default over the old ones; in the same style, the same bytes. Raises ValueError
    for a csv that has changed since, and for a figure that was not drawn by one of DRAWN_BY.
    """
    facts, csv = read_figure(file)
    stem = Path(file).with_suffix("") if stem is None else Path(stem)
    drawn = facts.get("drawing")
    if drawn is None:
        raise ValueError(f"{file} does not say which function drew it; draw it anew and save it with save_figure")
    if drawn["function"] not in DRAWN_BY:
        raise ValueError(f"{file} was drawn by {drawn['function']!r}; this version has {', '.join(DRAWN_BY)}")
    arguments = {name: _decoded(value, csv) for name, value in drawn["arguments"].items()}
    style = style or drawn["style"]
    made = DRAWN_BY[drawn["function"]](**arguments, style=style)
    return _write(made.get_figure(root=True), stem, csv, facts | {"drawing": drawn | {"style": style}})


def read_figure(file: str | os.PathLike) -> tuple[dict, bytes]:
    """What the .json of a saved figure says, and the bytes of its .csv; ValueError where the csv is not that one."""
    path = Path(file)
    facts, csv = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".csv").read_bytes()
    if not isinstance(facts, dict) or "csv_sha256" not in facts:
        raise ValueError(f"{file} is not the json of a figure: it has no csv_sha256")
    if digest(csv) != facts["csv_sha256"]:
        raise ValueError(
            f"{path.with_suffix('.csv')} has changed since {path.name} was written; restore it, or draw the changed "
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


def _drawing(figure: matplotlib.figure.Figure, csv: bytes) -> dict:
    """What `redraw` needs to know of a figure; nothing of one that no function of this room made as a whole."""
    if not getattr(figure, "drawing", None):
        return {}
    function, given = figure.drawing
    arguments = {name: _encoded(value, csv) for name, value in given.items()}
    return {"drawing": {"function": function.__name__, "arguments": arguments, "style": figure.style}}


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
        return {"items": [[name, _encoded(each, csv)] for name, each in value.items()]}  # in their order
    if isinstance(value, list | tuple):
        return [_encoded(each, csv) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _decoded(value: object, csv: bytes) -> object:
    """The argument that `_encoded` was given."""
    if isinstance(value, list):
        return [_decoded(each, csv) for each in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {name: _decoded(each, csv) for name, each in value["items"]}
    if "named" in value:
        table = read_table(value["named"].encode(), dtype={0: str})
        return table.set_index(table.columns[0])
    if "csv" in value:
        return read_table(csv if value["csv"] is None else value["csv"].encode())
    flat = np.frombuffer(zlib.decompress(base64.b64decode(value["array"])), value["dtype"])
    return flat.reshape(value["shape"])
