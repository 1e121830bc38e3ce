"""A results folder as one HTML page: figures, tables, provenance, and what to be careful about.

This module gathers facts and writes no HTML: report.html is the page's template. Jinja2 escapes all that is put into
it, so that no word of a table, a json or a file's name becomes markup.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from igpt_lab.app import saved
from igpt_lab.app.saved import SavedFigure
from igpt_lab.core.display import span
from igpt_lab.core.provenance import atomic_write, digest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FLAGS = (  # of a Chromium that asks for nothing by itself
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 120  # that a browser may take
CAPTIONS = {  # by the function that drew a figure, in the order in which they are shown
    "layer_curve": "Test accuracy of a linear probe on each layer, with 95% intervals over test images. Ring: the "
    "layer that validation chose. Bar below: the layers that may be the best.",
    "few_label_curve": "Test accuracy over labels per class: mean and standard deviation over draws; dots are draws.",
    "protocol_curves": "The layer curve in every setting of the protocol, hollow where a probe did not converge, and "
    "what each choice changes, with 95% intervals over test images.",
    "geometry_curves": "Measures of each layer that need no probe, with 95% intervals over images.",
    "cka_map": "Linear CKA between layers: 1 where they differ by a rotation and a scale.",
    "fine_tuning": "Test accuracy of each method, and probes on all layers before and after.",
    "training_dynamics": "How features form: accuracy over the loss, and the layer curve at every checkpoint.",
    "model_comparison": "Models side by side: the layer that validation chose, the last layer, and controls, with 95% "
    "intervals over test images.",
    "confusion_matrix": "Test images by their true class (rows) and the predicted one (columns).",
    "feature_map": "Images on the plane that keeps most of their features' variance.",
    "completion_gallery": "What the model was given, what it drew, and what the image was.",
    "gallery": "Images.",
    "row_gallery": "Images, a row for each setting.",
    "neighbour_gallery": "Images beside the nearest ones of the training set: does the model repeat what it saw?",
    "surprise_gallery": "Surprise of every pixel after the pixels before it, in bits.",
    None: "",
}
PERCENT = {"test_accuracy", "validation_accuracy", "low", "high", "label_overlap"}
SHOWN = 200  # rows of a table
BROAD = 40  # columns of a table: more are pixels, and are not shown
LINKED = 300_000  # bytes of a csv that is put into the page


@dataclass(frozen=True)
class Table:
    """A table as the page shows it: names of the columns, and rows of cells in words."""

    names: list[str]
    rows: list[list[str]]


def write_report(run: str | os.PathLike, out: str | os.PathLike | None = None, *, pdf: bool = True) -> list[Path]:
    """Write RUN/report.html, and report.pdf where a Chromium is installed; returns what was written.

    The page is one file and reads nothing from elsewhere. The same folder gives the same bytes of HTML. A link that
    leads out of the folder is not followed. Raises ValueError for a folder without figures, and OSError where the
    browser makes no pdf.
    """
    run = Path(run)
    figures = sorted(saved.read_run(run), key=_place)
    if not figures:
        raise ValueError(
            f"{run} has no figures of its own (NAME.json beside NAME.csv); expected what `igpt-lab reproduce` writes"
        )
    path = atomic_write(Path(out or run / "report.html"), page(run, figures))
    browser = chromium() if pdf else None
    return [path, _print(browser, path)] if browser else [path]


def chromium() -> str | None:
    """Path of a browser of Chromium's kind, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def page(run: Path, figures: list[SavedFigure]) -> str:
    """The whole page of a folder's figures as HTML."""
    summary_file = run / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if saved.is_own(summary_file) else {}
    stores = {digest(key): key for figure in figures for key in _stores(figure.facts["config"])}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(
        title=_title(figures, stores, summary) or run.resolve().name,
        folder=run.resolve().name,
        headline=_headline(figures),
        discrepancies=saved.discrepancies(run, figures),
        unconverged=saved.unconverged(figures),
        insignificant=saved.insignificant(figures) + saved.not_told_apart(run),
        figures=list(map(_entry, figures)),
        other_tables=_other_tables(run, figures),
        origins=_origins(figures),
        stores=_store_table(stores),
        versions=_versions(figures),
        summary={name: _plain(value) for name, value in summary.items()},
    )


def _place(figure: SavedFigure) -> tuple[int, bool, str]:
    """Where a figure stands on the page: in the order of CAPTIONS; of one function's, its namesake first."""
    function = figure.function if figure.function in CAPTIONS else None
    return list(CAPTIONS).index(function), figure.name != figure.function, figure.name


def _entry(figure: SavedFigure) -> dict[str, object]:
    """What the page shows of a figure."""
    width, height = figure.size
    n_rows, n_columns = figure.table.shape
    return {
        "name": figure.name,
        "caption": CAPTIONS.get(figure.function, ""),
        "picture": _address("image/png" if figure.is_gallery else "image/svg+xml", figure.picture),
        "is_gallery": figure.is_gallery,
        "is_wide": figure.is_gallery and bool(figure.picture) and width > 1.3 * height,
        "csv": _address("text/csv", figure.csv if len(figure.csv) <= LINKED else b""),
        "n_rows": n_rows,
        "n_columns": n_columns,
        "table": _table(figure.table) if n_columns <= BROAD else None,
    }


def _address(kind: str, content: bytes) -> str:
    """Content as an address that a page can hold; "" of nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else ""


def _stores(config: object) -> Iterator[dict]:
    """Every feature store's key in a configuration."""
    if isinstance(config, Mapping):
        if {"weights", "palette", "layers", "splits"} <= set(config):
            yield dict(config)
        else:
            for value in config.values():
                yield from _stores(value)


def _title(figures: list[SavedFigure], stores: Mapping[str, dict], summary: Mapping) -> str:
    """MODEL on IMAGES, by the summary or else by the first figure or store that names them."""
    configs = [figure.facts["config"] for figure in figures] + list(stores.values())
    names = []
    for field in ("model", "images"):
        named = (config[field] for config in configs if isinstance(config.get(field), str))
        names.append(_short(summary.get(field) or next(named, "")))
    return " on ".join(filter(None, names))


def _short(name: str) -> str:
    """A folder's own name; a Hub name keeps its owner."""
    return Path(name).name if name.count("/") != 1 or name.startswith(("/", ".")) else name


def _headline(figures: list[SavedFigure]) -> dict | None:
    """The numbers that one looks for first, from the layer curve."""
    curve = next((figure for figure in figures if figure.name == figure.function == "layer_curve"), None)
    if curve is None:
        return None
    is_model = saved.of_the_model(curve.table)
    layers = curve.table[is_model].set_index("layer")
    best, last = layers[layers.chosen.astype(bool)].iloc[0], layers.index.max()
    tiles = [_tile(f"best layer, {best.name} of 0..{last}", best), _tile("first layer, 0", layers.iloc[0])]
    tiles.append(_tile(f"last layer, {last}", layers.loc[last]))
    for control, rows in curve.table[~is_model].groupby("control", sort=False):
        name = f"{control}, its best" if len(rows) > 1 else control
        tiles.append(_tile(name, rows.loc[rows.test_accuracy.idxmax()]))
    compared = saved.comparisons(curve.facts["config"].get("comparison"))
    sentence = "; ".join(saved.in_words(name, comparison) for name, comparison in compared)
    return {"tiles": tiles, "sentence": sentence[:1].upper() + sentence[1:], "n_test": f"{int(best.n_test):,}"}


def _tile(name: str, row: pd.Series) -> dict[str, str]:
    return {"name": name, "accuracy": f"{row.test_accuracy:.1%}", "interval": f"[{row.low:.1%}, {row.high:.1%}]"}


def _table(frame: pd.DataFrame) -> Table:
    names = list(map(str, frame.columns))
    rows = frame.head(SHOWN).itertuples(index=False)
    return Table(names, [[_cell(name, value) for name, value in zip(names, row, strict=True)] for row in rows])


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if name in PERCENT else f"{value:.4g}"
    return str(value)


def _other_tables(run: Path, figures: list[SavedFigure]) -> dict[str, Table]:
    """Tables that no figure shows, by name."""
    drawn = {figure.name for figure in figures}
    return {file.stem: _table(pd.read_csv(file)) for file in saved.own_files(run, "*.csv") if file.stem not in drawn}


def _origins(figures: list[SavedFigure]) -> Table:
    """Where each figure comes from."""
    rows = []
    for figure in figures:
        commit, seed = figure.facts.get("commit", "")[:12] or "none", _cell("seed", figure.facts.get("seed"))
        rows.append([figure.name, commit, seed, digest(figure.csv)[:16], figure.function or "not recorded"])
    return Table(["figure", "commit", "seed", "csv, SHA-256", "drawn by"], rows)


def _store_table(stores: Mapping[str, dict]) -> Table | None:
    """The feature stores that the figures were made from, a row for each."""
    if not stores:
        return None
    rows = [{"store": key[:8]} | {name: _plain(store[name]) for name in store} for key, store in stores.items()]
    return _table(pd.DataFrame(rows).drop(columns=["format", "crop", "resample"], errors="ignore").fillna(""))


def _versions(figures: list[SavedFigure]) -> list[str]:
    """The sets of versions that figures were made with, each once, in words."""
    versions = {json.dumps(figure.facts.get("versions", {}), sort_keys=True) for figure in figures}
    return [", ".join(f"{name} {value}" for name, value in json.loads(text).items()) for text in sorted(versions)]


def _plain(value: object) -> str:
    """A field of a key in words: layers as 0..12, digests by their first digits."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        is_whole = value and all(isinstance(part, int) for part in value)
        return span(value) if is_whole else ", ".join(map(_plain, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text


def _print(browser: str, path: Path) -> Path:
    """The page as a pdf beside it; OSError with the browser's last words where it makes none.

    The page has pictures from the folder, which may be a stranger's, so that the browser's sandbox is on. As root, the
    user of most containers, Chromium does not start with a sandbox; only there a second try does without.
    """
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    for flags in ([], ["--no-sandbox"]) if is_root else ([],):
        pdf, words = _headless(browser, flags, path)
        if pdf:
            return atomic_write(path.with_suffix(".pdf"), pdf)
    raise OSError(f"{browser} made no pdf of {path} ({words}); print the page from any browser")


def _headless(browser: str, flags: list[str], path: Path) -> tuple[bytes, str]:
    """The pdf that a browser without a window makes, b"" where it makes none, and the browser's last line."""
    with tempfile.TemporaryDirectory() as folder:
        pdf = Path(folder, "page.pdf")
        own = ["--headless", "--no-pdf-header-footer", f"--user-data-dir={folder}/user", f"--print-to-pdf={pdf}"]
        command = [browser, *FLAGS, *flags, *own, path.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        return pdf.read_bytes() if pdf.is_file() else b"", words[-1]
