"""A results folder as one HTML page: figures, tables, provenance, and what to be careful about.

This module gathers facts and writes no HTML: report.html is the page's template. Jinja2 escapes all that is put into
it, so that no word of a table, a json or a file's name becomes markup.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from igpt_lab.app import saved
from igpt_lab.app.printing import chromium, print_page
from igpt_lab.app.saved import Results, SavedFigure
from igpt_lab.core.arguments import local
from igpt_lab.core.chosen import about_choice
from igpt_lab.core.display import span
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.figures.controls import over_draws

CAPTIONS = {  # by the function that drew a figure, in the order in which they are shown
    "layer_curve": "Test accuracy of a linear probe on each layer, with 95% intervals over test images. Ring: the "
    "layer that validation chose. Bar below: the layers that may be the best. Of controls with several draws the mean "
    "and the range.",
    "bits_curve": "What a linear readout of a state says about each target, in bits: the target's entropy H less the "
    "log loss on test images, with 95% intervals over images.",
    "target_curves": "R² of a ridge regression on each layer for numbers about an image, with 95% intervals over test "
    "images. Large marks: the layer that training images chose.",
    "selectivity": "Accuracy, accuracy on labels without meaning, and their difference, the selectivity.",
    "position_map": "Test accuracy of a linear probe on single states, by position and layer. Rings: the layers that "
    "validation chose.",
    "prefix_curve": "Test accuracy of a linear probe on the mean over the first states: a line for each share of the "
    "image that they cover. Bands: 95% intervals over test images.",
    "attentive_curve": "A probe that attends to a layer's states against one of their mean, of as many parameters. "
    "Dots are seeds, lines their means; bands: 95% intervals over test images.",
    "few_label_curve": "Test accuracy over labels per class: mean over draws, which are the dots, and its interval.",
    "protocol_curves": "The layer curve in every setting of the protocol, hollow where a probe did not converge, and "
    "what each choice changes, with 95% intervals over test images.",
    "geometry_curves": "Measures of each layer that need no probe, with 95% intervals over images.",
    "leave_out_curve": "What leaving out a block, its attention or its MLP costs: nats of the next pixel, and points "
    "of the unchanged probe at its layer, with 95% intervals over test images.",
    "head_map": "Nats of the next pixel that leaving out each head costs.",
    "window_curve": "What hiding the pixels beyond a radius costs, and in which blocks, with 95% intervals over test "
    "images.",
    "cka_map": "Linear CKA between layers: 1 where they differ by a rotation and a scale.",
    "fine_tuning": "Test accuracy of each method, and probes on all layers before and after.",
    "training_dynamics": "How features form: accuracy over the loss, and the layer curve at every checkpoint.",
    "seed_curves": "Several seeds of pretraining: accuracy over relative depth, the mean thick. Below, the chosen "
    "layer and its drop to the last: dots are seeds, coloured bars the 95% t interval over seeds, grey bars the 95% "
    "interval over test images of one seed. Image noise that all seeds share is not in the coloured bars.",
    "shift_curves": "Probes of clean images on corrupted test images: the layer that clean images chose, and the best "
    "on these. Bars: 95% t intervals over seeds of pretraining; bands: 95% over test images of one seed.",
    "shift_points": "The same for every point of the block, on one scale.",
    "model_comparison": "Models side by side: the layer that validation chose, the last layer, and controls, with 95% "
    "intervals over test images.",
    "lens_curve": "What each layer says about the next pixel, read by the model's own head, with 95% intervals over "
    "images, and where it was given the accuracy of a linear probe for the class.",
    "lens_strip": "One image through depth: the mean colour that each layer expects at every pixel, the nats of the "
    "true one, and the layer at which the most probable colour settles.",
    "offset_maps": "Where each head looks, measured from the predicted pixel: mean share of attention over images, one "
    "colour scale for all heads.",
    "attention_depth": "Mean distance and entropy of attention, a dot for each head with its 95% interval over images, "
    "beside uniform attention over what is visible.",
    "attention_from": "Where each head looks in one image from the marked pixel; what comes later is hatched.",
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


def write_report(
    run: str | os.PathLike | Results, out: str | os.PathLike | None = None, *, pdf: bool = True
) -> list[Path]:
    """Write RUN/report.html, and report.pdf where a Chromium is installed; returns what was written.

    `run` is a folder, or what `read` made of one. The page is one file, reads nothing from elsewhere and runs nothing.
    The same folder gives the same bytes of HTML. Warns where the browser cannot print in a sandbox. Raises ValueError
    for a folder without figures, and OSError where the browser makes no pdf.
    """
    results = run if isinstance(run, Results) else read(run)
    if not results.figures:
        raise ValueError(
            f"{results.folder} has no figures of its own (NAME.json beside NAME.csv); expected what "
            "`igpt-lab reproduce` writes"
        )
    target = local(out) if out else results.folder / "report.html"
    path = atomic_write(target, page(results).encode(errors="replace"))  # a name that is not UTF-8 has question marks
    browser = chromium() if pdf else None
    return [path, print_page(browser, path)] if browser else [path]


def read(run: str | os.PathLike) -> Results:
    """The results of a folder, without those of which no page can be made: each figure and table is tried alone."""
    results, figures = saved.read_run(local(run)), []
    for figure in results.figures:
        if _can_be_shown(results, f"{figure.name}.json", figures=[figure]):
            figures.append(figure)
        else:  # its table may do on its own
            results.tables[figure.name] = figure.table
    tables, summary = sorted(results.tables.items()), results.summary
    return replace(
        results,
        figures=figures,
        tables={name: it for name, it in tables if _can_be_shown(results, f"{name}.csv", tables={name: it})},
        summary=summary if _can_be_shown(results, "summary.json", summary=summary) else {},
    )


def _can_be_shown(results: Results, name: str, **alone) -> bool:
    """Whether a page with these results alone can be made; why not goes to `results.odd`."""
    try:
        _values(Results(results.folder, **alone))
    except Exception as error:  # a table may be anybody's, and leads to errors of any kind
        results.odd[name] = saved.passed_over(name, error)
        return False
    return True


def page(results: Results) -> str:
    """The whole page of a folder's results as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(_values(results))


def _values(results: Results) -> dict[str, object]:
    """All that the template shows."""
    figures = sorted(results.figures, key=_place)
    stores = {digest(key): key for figure in figures for key in _stores(figure.facts["config"])}
    folder = results.folder.resolve().name
    return {
        "title": _title(figures, stores, results.summary) or folder,
        "folder": folder,
        "headline": _headline(figures),
        "discrepancies": saved.discrepancies(results),
        "unconverged": saved.unconverged(figures),
        "insignificant": saved.insignificant(figures) + saved.not_told_apart(results.tables),
        "figures": list(map(_entry, figures)),
        "other_tables": {name: _table(table) for name, table in results.tables.items()},
        "origins": _origins(figures),
        "stores": _store_table(stores),
        "versions": _versions(figures),
        "summary": {name: _plain(value) for name, value in results.summary.items()},
    }


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
    curve = saved.main_curve(figures)
    if curve is None:
        return None
    is_model = saved.of_the_model(curve.table)
    layers = curve.table[is_model].set_index("layer")
    chosen, last = layers[layers.chosen.astype(bool)].iloc[0], layers.index.max()
    tiles = [_tile(f"chosen layer, {chosen.name} of 0..{last}", chosen), _tile("first layer, 0", layers.iloc[0])]
    tiles.append(_tile(f"last layer, {last}", layers.loc[last]))
    for control, rows in over_draws(curve.table[~is_model]).groupby("control", sort=False):
        name = f"{control}, its highest" if len(rows) > 1 else control
        name += f" (mean and range of {rows.draws.max()})" if rows.draws.max() > 1 else ""
        tiles.append(_tile(name, rows.loc[rows.test_accuracy.idxmax()]))
    compared = saved.comparisons(curve.facts["config"].get("comparison"))
    sentences = ["; ".join(saved.in_words(name, comparison) for name, comparison in compared)]
    sentences = [words[:1].upper() + words[1:] for words in sentences + about_choice(curve.table[is_model]) if words]
    return {"tiles": tiles, "sentences": sentences, "n_test": f"{int(chosen.n_test):,}"}


def _tile(name: str, row: pd.Series) -> dict[str, str]:
    return {"name": name, "accuracy": f"{row.test_accuracy:.1%}", "interval": f"[{row.low:.1%}, {row.high:.1%}]"}


def _table(frame: pd.DataFrame) -> Table:
    """The first rows of a table; of one with too many columns, how many there are."""
    if frame.shape[1] > BROAD:
        return Table(["rows", "columns"], [list(map(str, frame.shape))])
    names = list(map(str, frame.columns))
    rows = frame.head(SHOWN).itertuples(index=False)
    return Table(names, [[_cell(name, value) for name, value in zip(names, row, strict=True)] for row in rows])


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if name in PERCENT else f"{value:.4g}"
    return str(value)


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
