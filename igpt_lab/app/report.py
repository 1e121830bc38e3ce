"""A results folder as one HTML page: figures, tables, provenance, and what to be careful about."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from igpt_lab.core.display import MODEL, control_names, span
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.figures.saving import read_figure, read_table

ALPHA = 0.05
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FLAGS = (  # of a Chromium that asks for nothing by itself
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
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
GROUPS = "control layer_rule recipe alignment point scaling solver method".split()
PERCENT = {"test_accuracy", "validation_accuracy", "low", "high", "label_overlap"}
SHOWN = 200  # rows of a table
LINKED = 300_000  # bytes of a csv that is put into the page


@dataclass(frozen=True)
class Saved:
    """A figure of the folder: its name, what its json says, its table, and its picture as a data address."""

    name: str
    facts: dict
    table: pd.DataFrame
    csv: bytes
    picture: str
    size: tuple[int, int] = (1, 1)  # of its png
    altered: str = ""

    @property
    def function(self) -> str | None:
        return self.facts.get("drawing", {}).get("function")


def write_report(run: str | os.PathLike, out: str | os.PathLike | None = None, *, pdf: bool = True) -> list[Path]:
    """Write RUN/report.html, and report.pdf where a Chromium is installed; returns what was written.

    The page is one file and reads nothing from elsewhere. The same folder gives the same bytes of HTML. Raises
    ValueError for a folder without figures.
    """
    run = Path(run)
    saved = read_run(run)
    if not saved:
        raise ValueError(f"{run} has no figures (NAME.json beside NAME.csv); expected what `igpt-lab reproduce` writes")
    path = atomic_write(Path(out or run / "report.html"), page(run, saved))
    browser = chromium() if pdf else None
    return [path, _print(browser, path)] if browser else [path]


def chromium() -> str | None:
    """Path of a browser of Chromium's kind, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def read_run(run: Path) -> list[Saved]:
    """The figures of a folder, in the order of CAPTIONS; of one function's, its namesake first."""
    saved = [_read(file) for file in sorted(run.glob("*.json")) if file.with_suffix(".csv").is_file()]
    order, saved = list(CAPTIONS), [each for each in saved if each is not None]
    place = {each.name: order.index(each.function if each.function in CAPTIONS else None) for each in saved}
    return sorted(saved, key=lambda each: (place[each.name], each.name != each.function, each.name))


def page(run: Path, saved: list[Saved]) -> str:
    """The whole page of a folder's figures as HTML."""
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    stores = {digest(key): key for each in saved for key in _stores(each.facts["config"])}
    what = {"model": _names(saved, "model", stores), "images": _names(saved, "images", stores)}
    model, images = (summary.get(name) or names for name, names in what.items())
    title = " on ".join(filter(None, map(_short, (model, images)))) or run.resolve().name
    figures = "".join(map(_figure, saved))
    parts = [
        f"<header><h1>{escape(title)}</h1><p class='soft'>What a network that learned only to predict the next pixel "
        f"knows about its image, layer by layer. Folder <code>{escape(run.resolve().name)}</code>, "
        f"{len(saved)} figures.</p></header>",
        _tiles(saved),
        _section("What to be careful about", _careful(run, saved)),
        _section("Figures", f"<div class='figures'>{figures}</div>"),
        _section("Other tables", "".join(_other(run, saved))),
        _section("Provenance", _provenance(saved, stores, summary)),
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    body, css = "\n".join(parts), (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"<!doctype html>\n<html lang='en'><head>{head}<style>{css}</style></head>\n<body>\n{body}\n</body></html>\n"


def not_converged(saved: Saved) -> Iterator[str]:
    """A line for each group of rows of a figure whose probes did not converge."""
    table = saved.table
    if "converged" not in table:
        return
    names = [name for name in GROUPS if name in table]
    words = table[names].astype(object).fillna("").replace(MODEL, "") if names else pd.DataFrame(index=table.index)
    group = words.apply(lambda row: ", ".join(filter(None, map(str, row))) or "the model", axis=1) if names else "rows"
    for name, rows in table.groupby(group, sort=False) if names else [("rows", table)]:
        failed = rows[~rows.converged.astype(bool)]
        if len(failed):
            at = f", layers {span(sorted(set(failed.layer.astype(int))))}" if "layer" in failed else ""
            yield f"{name}: {len(failed)} of {len(rows)}{at}"


def comparisons(config: object, named: str = "") -> Iterator[tuple[str, Mapping]]:
    """Every difference with its interval in a figure's configuration, and its name in words."""
    if isinstance(config, Mapping):
        if {"difference", "low", "high"} <= set(config):
            yield _versus(config) or named, config
        else:
            for name, value in config.items():
                yield from comparisons(value, named if name in ("comparison", "pairs", "effects") else name)
    elif isinstance(config, list) and config and isinstance(config[0], Mapping):
        for value in config:
            yield from comparisons(value, named)


def significant(found: Mapping) -> bool:
    """By its p value where there is one, or else by its interval."""
    p = found.get("p_value")
    return found["low"] > 0 or found["high"] < 0 if p is None or np.isnan(p) else p < ALPHA


def _read(file: Path) -> Saved | None:
    """The figure of a json; None where the json is of something else."""
    facts, csv, altered = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".csv").read_bytes(), ""
    if not isinstance(facts, dict) or "csv_sha256" not in facts:
        return None
    try:
        read_figure(file)
    except ValueError as error:
        altered = str(error)
    kind = "png" if str(facts.get("drawing", {}).get("function")).endswith("gallery") else "svg"
    found, png = (file.with_suffix(f".{each}") for each in (kind, "png"))
    data = base64.b64encode(found.read_bytes()).decode() if found.is_file() else ""
    picture = f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{data}" if data else ""
    size = struct.unpack(">II", png.read_bytes()[16:24]) if png.is_file() else (1, 1)  # where a png has it
    return Saved(file.stem, {"config": {}} | facts, read_table(csv), csv, picture, size, altered)


def _stores(config: object) -> Iterator[dict]:
    """Every feature store's key in a configuration."""
    if isinstance(config, Mapping):
        if {"weights", "palette", "layers", "splits"} <= set(config):
            yield dict(config)
        else:
            for value in config.values():
                yield from _stores(value)


def _names(saved: list[Saved], name: str, stores: Mapping) -> str:
    found = [each.facts["config"].get(name) for each in saved] + [key[name] for key in stores.values()]
    return next((each for each in found if isinstance(each, str)), "")


def _short(name: str) -> str:
    """A folder's own name; a Hub name keeps its owner."""
    return Path(name).name if name.count("/") != 1 or name.startswith(("/", ".")) else name


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _tiles(saved: list[Saved]) -> str:
    """The numbers that one looks for first, from the layer curve."""
    curve = next((each for each in saved if each.name == "layer_curve"), None)
    if curve is None or curve.function != "layer_curve":
        return ""
    table = curve.table.assign(control=control_names(curve.table.control))
    ours = table[table.control == MODEL].set_index("layer")
    best, last = ours[ours.chosen.astype(bool)].iloc[0], ours.index.max()
    tiles = [(f"best layer, {best.name} of 0..{last}", best), ("first layer, 0", ours.iloc[0])]
    tiles.append((f"last layer, {last}", ours.loc[last]))
    for control, rows in table[table.control != MODEL].groupby("control", sort=False):
        tiles.append((f"{control}{', its best' if len(rows) > 1 else ''}", rows.loc[rows.test_accuracy.idxmax()]))
    cells = [
        f"<div class='tile'><b>{row.test_accuracy:.1%}</b>{escape(name)}<br>"
        f"<small class='soft'>[{row.low:.1%}, {row.high:.1%}]</small></div>"
        for name, row in tiles
    ]
    note = (
        f"Test accuracy, {int(best.n_test):,} test images; 95% intervals over them. Layer chosen on validation images."
    )
    found = "; ".join(_sentence(name, it) for name, it in comparisons(curve.facts["config"].get("comparison")))
    sentence = f"<p>{escape(found[:1].upper() + found[1:])}.</p>" if found else ""
    return f"<div class='tiles'>{''.join(cells)}</div>{sentence}<p class='soft'><small>{note}</small></p>"


def _careful(run: Path, saved: list[Saved]) -> str:
    """What did not converge, what is not significant, and what is not as it was recorded."""
    lines = [f"<span class='warn'>Changed.</span> {escape(each.altered)}" for each in saved if each.altered]
    commits = {each.facts.get("commit", "") for each in saved}
    if any(each.endswith("+changes") for each in commits):
        lines.append("<span class='warn'>Uncommitted.</span> Files differed from the commit when a figure was made.")
    if len(commits) > 1:
        lines.append(f"Figures come from {len(commits)} commits; see Provenance.")
    return (
        (_list(lines) if lines else "")
        + f"<h3>Not converged</h3>{_list(_failures(saved)) or '<p>Every probe converged.</p>'}"
        + f"<h3>Not significant</h3>{_list(_doubts(saved) + _unlike(run)) or '<p>Nothing that was compared.</p>'}"
    )


def _failures(saved: list[Saved]) -> list[str]:
    lines = []
    for each in saved:
        groups = list(not_converged(each))
        if groups:
            count = int((~each.table.converged.astype(bool)).sum())
            head = f"{escape(each.name)}: {count} of {len(each.table)} probes"
            inner = f"<details><summary>which</summary>{_list(map(escape, groups))}</details>"
            lines.append(head + (f": {escape(groups[0])}" if len(groups) == 1 else inner))
    return lines


def _doubts(saved: list[Saved]) -> list[str]:
    lines, seen = [], set()
    for each in saved:
        found = [
            (name, it) for name, it in comparisons(each.facts["config"]) if it.get("others", "") in ("", "average")
        ]
        for name, it in found:
            if not significant(it) and (sentence := _sentence(name, it)) not in seen:
                seen.add(sentence)
                lines.append(f"{escape(each.name)}: {escape(sentence)}")
        if "in_peak_set" in each.table and each.name == "layer_curve":
            ours = each.table[control_names(each.table.control) == MODEL]
            peak = ours.layer[ours.in_peak_set.astype(str) == "True"].astype(int)
            if len(peak) > 1:
                lines.append(f"{len(peak)} of {len(ours)} layers may be the best: {span(peak)} (95% together)")
    return lines


def _unlike(run: Path) -> list[str]:
    """Measures of samples whose interval reaches into that of other real images."""
    if not (run / "likeness.csv").is_file():
        return []
    table = pd.read_csv(run / "likeness.csv")
    near = table[(table.low <= table.floor_high) & (table.floor_low <= table.high)]
    return [f"likeness: samples and real images are not told apart by {', '.join(near.measure)}"] if len(near) else []


def _versus(found: Mapping) -> str:
    """a against b, where a difference says so."""
    if "best_layer" in found:
        return f"best layer {found['best_layer']} against last layer {found['last_layer']}"
    if {"a", "b"} <= set(found):
        return f"{found['a']} against {found['b']}, {found.get('at', '')}".rstrip(", ")
    return ""


def _sentence(name: str, found: Mapping) -> str:
    p = found.get("p_value")
    ends = f"{100 * found['difference']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{name}: {ends}" + ("" if p is None or np.isnan(p) else f", p = {p:.2g}")


def _figure(saved: Saved) -> str:
    look = "pixels" if saved.picture.startswith("data:image/png") else "curve"
    wide = look == "pixels" and saved.size[0] > 1.3 * saved.size[1]
    words = CAPTIONS.get(saved.function, "")
    image = f"<img class='{look}' src='{saved.picture}' alt='{escape(words, quote=True)}'>" if saved.picture else ""
    name, title = f"<code>{escape(saved.name)}</code>", escape(saved.name.replace("_", " ").capitalize())
    return (
        f"<figure id='{escape(saved.name, quote=True)}' class='{'wide' if wide else 'half'}'>"
        f"<h3>{title}</h3>{image}<figcaption>{name}. {words}</figcaption>{_rows(saved)}</figure>"
    )


def _rows(saved: Saved) -> str:
    """The table of a figure, to be unfolded, and its csv to be kept; of images only how many numbers there are."""
    count, link = len(saved.table), ""
    if len(saved.csv) <= LINKED:
        data = base64.b64encode(saved.csv).decode()
        link = f" <a download='{escape(saved.name)}.csv' href='data:text/csv;base64,{data}'>csv</a>"
    if saved.table.shape[1] > 40:
        return f"<small class='soft'>{count} rows of {saved.table.shape[1]} numbers in {saved.name}.csv.{link}</small>"
    more = f"<p><small>the first {SHOWN} of {count} rows</small></p>" if count > SHOWN else ""
    table = _table(saved.table.head(SHOWN))
    return f"<details><summary>table, {count} rows{link}</summary><div class='scroll'>{table}{more}</div></details>"


def _table(table: pd.DataFrame) -> str:
    head = "".join(f"<th scope='col'>{escape(str(name))}</th>" for name in table)
    rows = (
        "".join(f"<td>{escape(_cell(name, value))}</td>" for name, value in zip(table, row, strict=True))
        for row in table.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if name in PERCENT else f"{value:.4g}"
    return str(value)


def _other(run: Path, saved: list[Saved]) -> Iterator[str]:
    """Tables that no figure shows."""
    for file in sorted(run.glob("*.csv")):
        if file.stem not in {each.name for each in saved}:
            table = _table(pd.read_csv(file).head(SHOWN))
            yield f"<h3><code>{escape(file.stem)}</code></h3><div class='scroll'>{table}</div>"


def _provenance(saved: list[Saved], stores: Mapping[str, dict], summary: Mapping) -> str:
    rows = [
        {
            "figure": each.name, "commit": each.facts.get("commit", "")[:12] or "none",
            "seed": each.facts.get("seed"), "csv, SHA-256": digest(each.csv)[:16],
            "drawn by": each.function or "not recorded",
        }
        for each in saved
    ]  # fmt: skip
    found = [f"<div class='scroll'>{_table(pd.DataFrame(rows).astype(object))}</div>"]
    if stores:
        facts = [
            {"store": key8[:8]} | {name: _plain(value) for name, value in key.items()} for key8, key in stores.items()
        ]
        shown = pd.DataFrame(facts).drop(columns=["format", "crop", "resample"], errors="ignore").fillna("")
        found.append(f"<h3>Feature stores</h3><div class='scroll'>{_table(shown)}</div>")
    versions = {json.dumps(each.facts.get("versions", {}), sort_keys=True) for each in saved}
    for each in sorted(versions):
        words = ", ".join(f"{name} {value}" for name, value in json.loads(each).items())
        found.append(f"<h3>Versions</h3><p><small>{escape(words)}</small></p>")
    if summary:
        found.append(f"<h3>Summary</h3>{_facts({name: _plain(value) for name, value in summary.items()})}")
    return "".join(found)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td class='wrap'>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _plain(value: object) -> str:
    """A field of a key in words: layers as 0..12, digests by their first digits."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(each)}" for name, each in value.items())
    if isinstance(value, list):
        whole = value and all(isinstance(each, int) for each in value)
        return span(value) if whole else ", ".join(map(_plain, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text


def _list(lines: Iterable[str]) -> str:
    lines = list(lines)
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _print(browser: str, path: Path) -> Path:
    """The page as a pdf beside it, by a browser without a window; OSError with its last words where it fails."""
    pdf = path.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as profile:
        made = Path(profile, "page.pdf")
        command = [
            browser,
            *FLAGS,
            "--headless",
            "--no-pdf-header-footer",
            f"--user-data-dir={profile}/user",
            f"--print-to-pdf={made}",
            path.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not made.is_file():
            raise OSError(
                f"{browser} made no pdf of {path}: {done.stderr.strip().splitlines()[-1:] or 'it said nothing'}"
            )
        atomic_write(pdf, made.read_bytes())
    return pdf
