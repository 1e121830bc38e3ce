"""A results folder as one HTML page: figures, tables, provenance, and what to be careful about.

This module gathers facts and writes no HTML: report.html is the page's template. Jinja2 escapes all that is put into
it, so that no word of a table, a json or a file's name becomes markup.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from igpt_lab.app import captions, saved
from igpt_lab.app.by_run import STUDY, Run, folders_of, grouped, stores_in, warning_of
from igpt_lab.app.printing import chromium, print_page
from igpt_lab.app.report_tables import BROAD, Table, cell, plain, table_of
from igpt_lab.app.saved import Results, SavedFigure
from igpt_lab.core.arguments import local
from igpt_lab.core.chosen import about_choice
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.core.values import did_you_mean
from igpt_lab.figures.controls import over_draws

LINKED = 1_000_000  # bytes of a csv that is put into the page
PAPERS = ("A4", "letter")  # sizes of a page of the pdf


def write_report(
    run: str | os.PathLike | Results | list[Results],
    out: str | os.PathLike | None = None,
    *,
    pdf: bool = True,
    paper: str = "A4",
) -> list[Path]:
    """Write RUN/report.html, and report.pdf where a Chromium is installed; returns what was written.

    `run` is a folder of results, or one whose folders are; or what `read` made of it. `paper` is the pdf's, "A4" or
    "letter". The page is one file, reads nothing from elsewhere and runs nothing. The same folder gives the same bytes
    of HTML. Warns where the browser cannot print in a sandbox. Raises ValueError for a folder without figures, and
    OSError where the browser makes no pdf.
    """
    folder = None
    if isinstance(run, str | os.PathLike):
        folder, run = local(run), [read(path) for path in folders_of(local(run))]
    runs = [run] if isinstance(run, Results) else run
    folder = folder or (runs[0].folder if len(runs) == 1 else runs[0].folder.parent)
    if not any(results.figures for results in runs):
        raise ValueError(
            f"{folder} has no figures of its own (NAME.json beside NAME.csv); expected what `igpt-lab reproduce` writes"
        )
    target = local(out) if out else folder / "report.html"
    _check_target(target, pdf)
    path = atomic_write(
        target, page(runs, paper).encode(errors="replace")
    )  # a name that is not UTF-8 has question marks
    browser = chromium() if pdf else None
    return [path, print_page(browser, path)] if browser else [path]


def _check_target(target: Path, pdf: bool) -> None:
    """ValueError where a page must not be written: over a folder, another kind of file, or the pdf of a figure."""
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        raise ValueError(f"the page would be {target}; expected a file whose name ends in .html")
    if pdf and target.with_suffix(".csv").exists():
        raise ValueError(
            f"{target.with_suffix('.pdf')} is of a figure; give the page another name, or leave out the pdf"
        )


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
        tables={name: table for name, table in tables if _can_be_shown(results, f"{name}.csv", tables={name: table})},
        summary=summary if _can_be_shown(results, "summary.json", summary=summary) else {},
    )


def _can_be_shown(results: Results, name: str, **alone) -> bool:
    """Whether a page with these results alone can be made; why not goes to `results.odd`."""
    try:
        _sections(Results(results.folder, **alone))
    except Exception as error:  # a table may be anybody's, and leads to errors of any kind
        results.odd[name] = saved.passed_over(name, error)
        return False
    return True


def warning_about(runs: list[Results]) -> str:
    """What to be careful about where results of several runs are together; '' of one."""
    return _warning(_all_sections(runs))


def _warning(sections: list[dict[str, Any]]) -> str:
    runs_of = {section["run"] for section in sections}
    return warning_of([section["title"] for section in sections], alike=len(runs_of) == 1)


def _all_sections(runs: list[Results]) -> list[dict[str, Any]]:
    """The sections of all folders; those whose titles would be the same are told by their folders."""
    sections = [section | {"folder": one.folder.resolve().name} for one in runs for section in _sections(one)]
    times = Counter(section["title"] for section in sections)
    for number, section in enumerate(sections):
        section |= {"id": f"run-{number}", "run": section["title"]}
        if times[section["run"]] > 1:
            section["title"] = f"{section['run']} ({section['folder']})"
    return sections


def page(results: Results | list[Results], paper: str = "A4") -> str:
    """The whole page of one folder's results, or of several, as HTML; ValueError for another `paper`."""
    if paper not in PAPERS:
        raise ValueError(f"paper={paper!r}; {did_you_mean(paper, PAPERS)}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    runs = [results] if isinstance(results, Results) else results
    sections = _all_sections(runs)
    folder = (runs[0].folder if len(runs) == 1 else runs[0].folder.parent).resolve().name
    return environment.get_template("report.html").render(
        title=sections[0]["title"] if len(sections) == 1 else f"{folder}: {len(sections)} runs",
        warning=_warning(sections),
        folder=folder,
        sections=sections,
        paper=paper,
    )


def _sections(results: Results) -> list[dict[str, Any]]:
    """What the page shows of a folder: all of it where it is of one run, else of each run, tables with the first."""
    groups = grouped({figure.name: figure.facts["config"] for figure in results.figures})
    if len(groups) < 2:
        return [_section(results, next(iter(groups), Run("", "")))]
    figures = {figure.name: figure for figure in results.figures}
    sections = []
    for number, (run, names) in enumerate(groups.items()):
        rest = replace(results) if not number else Results(results.folder)
        own = replace(rest, figures=[figures[name] for name in names], summary={})
        sections.append(_section(own, run) | {"title": str(run)})
    sections[0]["summary"] = _in_words(results.summary)
    return sections


def _section(results: Results, run: Run) -> dict[str, Any]:
    """All that the template shows of a run."""
    figures = sorted(results.figures, key=captions.place)
    heads = captions.headings(figures, str(run))
    figures = [replace(figure, heading=head) for figure, head in zip(figures, heads, strict=True)]
    stores = {digest(key): key for figure in figures for key in stores_in(figure.facts["config"])}
    return {
        "title": _title(results, run, figures, stores),
        "headline": _headline(figures),
        "discrepancies": saved.discrepancies(results),
        "unconverged": saved.unconverged(figures),
        "insignificant": [
            *saved.insignificant(figures),
            *saved.not_told_apart(results.tables),
            *saved.not_resolved(results.tables),
        ],
        "figures": list(map(_entry, figures)),
        "n_figures": len(figures),
        "other_tables": {name: (captions.table_name(name), table_of(table)) for name, table in results.tables.items()},
        "origins": _origins(figures),
        "stores": [_store(key8[:8], key) for key8, key in stores.items()],
        "versions": _versions(figures),
        "summary": _in_words(results.summary),
        "views": [path.relative_to(results.folder).as_posix() for path in sorted(results.folder.glob("explorer/*/*"))],
    }


def _in_words(summary: Mapping) -> dict[str, str]:
    return {captions.column_name(str(name)): plain(value) for name, value in summary.items()}


def _entry(figure: SavedFigure) -> dict[str, object]:
    """What the page shows of a figure."""
    width, height = figure.size
    n_rows, n_columns = figure.table.shape
    return {
        "name": figure.name,
        "heading": figure.heading,
        "caption": captions.caption(figure),
        "picture": _address("image/png" if figure.is_gallery else "image/svg+xml", figure.picture),
        "is_gallery": figure.is_gallery,
        "is_wide": figure.is_gallery and bool(figure.picture) and width > 1.3 * height,
        "csv": _address("text/csv", figure.csv if len(figure.csv) <= LINKED else b""),
        "n_rows": n_rows,
        "n_columns": n_columns,
        "table": table_of(figure.table) if n_columns <= BROAD else None,
    }


def _address(kind: str, content: bytes) -> str:
    """Content as an address that a page can hold; "" of nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else ""


def _title(results: Results, run: Run, figures: list[SavedFigure], stores: Mapping[str, dict]) -> str:
    """MODEL on IMAGES, by the summary or else by the first figure or store that names them; or the folder's name."""
    folder = results.folder.resolve().name
    if run == STUDY:
        return captions.plain(folder)
    configs = [figure.facts["config"] for figure in figures] + list(stores.values())
    names = []
    for field in ("model", "images"):
        named = (config[field] for config in configs if isinstance(config.get(field), str))
        names.append(_short(results.summary.get(field) or next(named, "")))
    return " on ".join(filter(None, names)) or folder


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
        name = f"{control}, its highest on test" if len(rows) > 1 else str(control)
        name += f" (mean and range of {rows.draws.max()})" if rows.draws.max() > 1 else ""
        tiles.append(_tile(name, rows.loc[rows.test_accuracy.idxmax()]))
    compared = saved.comparisons(curve.facts["config"].get("comparison"))
    sentences = ["; ".join(saved.in_words(name, comparison) for name, comparison in compared)]
    sentences = [words[:1].upper() + words[1:] for words in sentences + about_choice(curve.table[is_model]) if words]
    return {"tiles": tiles, "sentences": sentences, "n_test": f"{int(chosen.n_test):,}"}


def _tile(name: str, row: pd.Series) -> dict[str, str]:
    return {"name": name, "accuracy": f"{row.test_accuracy:.1%}", "interval": f"[{row.low:.1%}, {row.high:.1%}]"}


def _origins(figures: list[SavedFigure]) -> Table:
    """Where each figure comes from."""
    rows = []
    for figure in figures:
        commit, seed = figure.facts.get("commit", ""), cell("seed", figure.facts.get("seed"))
        changed = " and changes" * commit.endswith("+changes")
        rows.append([figure.heading, figure.name, commit[:8] + changed or "none", seed, digest(figure.csv)[:16]])
    return Table(["figure", "file", "commit", "seed", "SHA-256 of the csv begins"], rows, [""] * 5)


def _store(key8: str, key: Mapping) -> str:
    """A feature store in a sentence, by its key."""
    rows = [f"{parts[1]:,} {split}" for split, parts in key["splits"].items()]
    layers = key["modules"] if key.get("modules") else key["layers"]
    settings = [key.get("pool"), key.get("alignment"), key.get("dtype")]
    facts = [
        f"{plain(key.get('model', ''))} (weights {plain(key['weights'])}) on {plain(key.get('images', ''))}",
        f"{', '.join(rows)} images" + (f", {key['size']} pixels a side" if key.get("size") else ""),
        f"layers {plain(layers)}",
        ", ".join(plain(fact) for fact in settings if fact),
    ]
    return f"{key8}: {'; '.join(fact for fact in facts if fact)}"


def _versions(figures: list[SavedFigure]) -> list[str]:
    """The sets of versions that figures were made with, each once, in words."""
    versions = {json.dumps(figure.facts.get("versions", {}), sort_keys=True) for figure in figures}
    return [", ".join(f"{name} {value}" for name, value in json.loads(text).items()) for text in sorted(versions)]
