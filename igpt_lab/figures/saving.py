"""Figures -> files, and from those files the same figures again.

What is added to a figure after it was plotted is saved, but not plotted again by `redraw`.
"""

import base64
import csv as csv_format
import io
import json
import math
import os
import stat
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.style import context

from igpt_lab.core.arguments import checked, local
from igpt_lab.core.display import control_names
from igpt_lab.core.provenance import RunRecord, digest, write_together
from igpt_lab.core.values import did_you_mean
from igpt_lab.figures.style import FIGURES, STYLES, UNDATED, Figure, is_kept, render

LARGEST = 2**28  # bytes of a file, or of the arrays in it, that are read


@checked
def save_figure(
    figure: Axes | matplotlib.figure.Figure,
    stem: str | os.PathLike,
    *,
    data: pd.DataFrame | Mapping | np.ndarray,
    record: RunRecord,
) -> list[Path]:
    """Write stem.png, .pdf, .svg, .csv (`data`: what is plotted) and .json (`record`, and how it was plotted).

    `data` may also be a dict of columns or a 2-D array, such as tokens (N, T). The same figure, data and record give
    the same bytes. The files belong together: where one cannot be made, or Ctrl-C stops this, all stay as they were.
    Returns the five paths. The json has the csv's SHA-256 and, of a figure by one of FIGURES, what `redraw` needs. A
    stem that ends in the suffix of one of the files, such as curve.png, is taken without it.
    """
    whole = cast(matplotlib.figure.Figure, figure.get_figure(root=True))
    try:
        data = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
        if data.empty:
            raise ValueError(f"data of shape {data.shape}; expected what is plotted, at least one row and one column")
        csv = _csv(data)
        contents = _contents(whole, csv, record.to_dict() | _origin(whole, csv))
    except UnicodeEncodeError as error:  # from data, record or a figure's arguments
        words = error.object[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"{words!r} is not UTF-8 text; rename what it names") from error
    return _write(_stem(stem), contents)


def redraw(file: str | os.PathLike, stem: str | os.PathLike | None = None, *, style: str | None = None) -> list[Path]:
    """Plot a saved figure again from its .json and the .csv beside it, in another `style` if one is given.

    Writes the five files of `stem`, by default over the old ones; in the same style, the same bytes. Raises ValueError
    for a csv that has changed since, for a figure that was not made by one of FIGURES, and for files of any other
    content that cannot be plotted or unfolds to more than LARGEST bytes.
    """
    file = local(file)
    figure, facts = plot_again(file, style)
    try:
        contents = _contents(figure, read_figure(file)[1], facts)
    except Exception as error:  # as in `plot_again`
        raise _unfit(file, error) from error
    own = file.with_suffix("")
    is_own = stem is None or local(stem).name == own.name  # a figure may have been saved as curve.png.png
    return _write(own if stem is None else local(stem) if is_own else _stem(stem), contents)


def plot_again(file: Path, style: str | None = None) -> tuple[Figure, dict]:
    """A saved figure as `redraw` plots it, and what its json says then; ValueError as there."""
    facts, csv = read_figure(file)
    saved = facts.get("drawing")
    if saved is None:
        raise ValueError(f"{file} does not say which function plotted it; plot it again, and save it with save_figure")
    try:
        if saved["function"] not in FIGURES:
            raise ValueError(f"it was plotted by {saved['function']!r}; this version has {', '.join(FIGURES)}")
        if style is None and (style := saved["style"]) not in STYLES:  # a path in a stranger's json is not read
            raise ValueError(f"its style is {style!r}; {did_you_mean(style, STYLES)}")
        settings = saved.get("settings", {})
        if odd := [name for name in settings if not is_kept(name)]:
            raise ValueError(f"its settings have {odd[0]!r}, which no figure keeps")
        if (size := _unfolded(saved["arguments"])) > LARGEST:
            raise ValueError(f"its arrays have {size:,} bytes; expected at most {LARGEST:,}")
        arguments = {name: _decoded(value, csv) for name, value in saved["arguments"].items()}
        with context(["default", settings]):  # those of then, not those of now
            figure = FIGURES[saved["function"]](**arguments, style=style).get_figure(root=True)
    except Exception as error:  # the files may be anybody's, and any library that reads them fails in its own way
        raise _unfit(file, error) from error
    return figure, facts | {"drawing": saved | _looks(figure)}


def _unfit(file: Path, error: Exception) -> ValueError:
    words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
    return ValueError(f"{file} cannot be plotted: {words}")


def read_regular(file: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file of at most `largest`; ValueError for a folder, a pipe, a device, or a larger one."""
    facts = file.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{file} is no regular file")
    if facts.st_size > largest:
        raise ValueError(f"{file} has {facts.st_size:,} bytes; expected at most {largest:,}")
    return file.read_bytes()


def read_figure(file: str | os.PathLike) -> tuple[dict, bytes]:
    """What the .json of a saved figure says, and the bytes of its .csv; ValueError where the csv is not that one."""
    path = local(file)
    facts, csv = read_json(path), read_regular(path.with_suffix(".csv"))
    if not isinstance(facts, dict) or "csv_sha256" not in facts:
        raise ValueError(f"{file} is not the json of a figure: it has no csv_sha256")
    if digest(csv) != facts["csv_sha256"]:
        raise ValueError(
            f"{path.with_suffix('.csv')} has changed since {path.name} was written; restore it, or plot the changed "
            "table with its function in igpt_lab.figures"
        )
    return facts, csv


def read_json(file: Path) -> object:
    """What a json file says; ValueError, with the file's name, for one that is none."""
    try:
        return json.loads(read_regular(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as json: {error}") from error


def read_table(csv: bytes, **types) -> pd.DataFrame:
    """The table in a saved figure's .csv, from pandas 3.1 on to the last bit; no word but '' means no value.

    In the column `control` of an older file '' means the model itself and becomes "model". Raises ValueError for bytes
    that are no table in UTF-8 with commas, and for rows that are so much shorter than the first one that the table
    would take far more memory than the file.
    """
    names, _, rows = csv.partition(b"\n")
    cells = (names.count(b",") + 1) * (rows.count(b"\n") + 1)
    if cells > max(len(csv), 10_000_000):
        raise ValueError(f"a table of {cells:,} cells in {len(csv):,} bytes; expected rows as long as the first one")
    if b"," not in names and any(mark in names and mark in rows.partition(b"\n")[0] for mark in (b";", b"\t")):
        raise ValueError(f"the columns are {names[:40]!r}; expected commas between them")
    table = pd.read_csv(io.BytesIO(csv), **types, keep_default_na=False, na_values=[""])
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"rows have more cells than there are names of columns, {', '.join(map(str, table.columns))}")
    return table.assign(control=control_names(table.control)) if "control" in table else table


def _stem(path: str | os.PathLike) -> Path:
    """A path without the suffix of a file that is written there."""
    path = local(path)
    if path.name in ("", ".."):
        raise ValueError(f"stem={str(path)!r} has no name at its end; expected one for the five files, such as 'curve'")
    return path.with_suffix("") if path.suffix[1:] in (*UNDATED, "csv", "json") else path


def _contents(figure: matplotlib.figure.Figure, csv: bytes, facts: dict) -> dict[str, bytes]:
    """The five files of a figure by their suffixes."""
    files = {kind: render(figure, kind) for kind in UNDATED} | {"csv": csv}
    facts = facts | {"csv_sha256": digest(csv)}
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return files | {"json": text.encode() + b"\n"}


def _write(stem: Path, contents: dict[str, bytes]) -> list[Path]:
    return write_together({Path(f"{stem}.{kind}"): content for kind, content in contents.items()})


def _origin(figure: matplotlib.figure.Figure, csv: bytes) -> dict:
    """What `redraw` needs to know of a figure; nothing of one that no function of this room made as a whole."""
    if not isinstance(figure, Figure) or figure.plotted_by is None:
        return {}
    function, arguments = figure.plotted_by
    encoded = {name: _encoded(value, csv) for name, value in arguments.items()}
    return {"drawing": {"function": function, "arguments": encoded, **_looks(figure)}}


def _looks(figure: Figure) -> dict:
    """A figure's style, and the rcParams that differ from it."""
    settings = {name: value for name, value in sorted(figure.settings.items()) if is_kept(name)}
    return {"style": figure.style, **({"settings": settings} if settings else {})}


def _csv(table: pd.DataFrame, *, index: bool | None = None) -> bytes:
    text = partial(table.to_csv, index=table.index.name is not None if index is None else index, lineterminator="\n")
    plain = text()
    return (text(quoting=csv_format.QUOTE_NONNUMERIC) if "\r" in plain else plain).encode()  # else \r would end a row


def _encoded(value: object, csv: bytes) -> object:
    """An argument as plain JSON: a table as csv (null: the one beside), an array as its compressed bytes."""
    if isinstance(value, pd.DataFrame):
        if not pd.api.types.is_integer_dtype(value.index):  # rows have names, such as those of classes
            return {"named": _csv(value, index=True).decode()}
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
    content = zlib.decompressobj().decompress(base64.b64decode(value["array"]), _unfolded(value) + 1)
    return np.frombuffer(content, value["dtype"]).reshape(value["shape"])


def _unfolded(value: object) -> int:
    """Bytes of all arrays in an encoded argument, by what it says of them."""
    if isinstance(value, list):
        return sum(map(_unfolded, value))
    if not isinstance(value, dict):
        return 0
    if "array" not in value:
        return sum(map(_unfolded, value.values()))
    return np.dtype(value["dtype"]).itemsize * math.prod(map(abs, value["shape"]))
