"""What a results folder holds: its saved figures, and what a reader of them should be careful about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from igpt_lab.core.display import MODEL, span
from igpt_lab.figures import read_figure, read_table
from igpt_lab.images.sources import first_line

ALPHA = 0.05
GROUPS = "control layer_rule recipe alignment point scaling solver method".split()
KINDS = {"config": dict, "drawing": dict, "commit": str, "versions": dict}  # of what is read in a figure's json
READ = (".json", ".csv", ".svg", ".png")


@dataclass(frozen=True)
class SavedFigure:
    """A figure of the folder: its name, what its json says, its table, and its picture.

    `picture` is a png of a gallery and an svg of every other figure, b"" where there is none; `size` is the width and
    height of the png in pixels. `altered` says how the table differs from what was recorded.
    """

    name: str
    facts: dict
    table: pd.DataFrame
    csv: bytes
    picture: bytes = b""
    size: tuple[int, int] = (1, 1)
    altered: str = ""

    @property
    def function(self) -> str | None:
        return self.facts.get("drawing", {}).get("function")

    @property
    def is_gallery(self) -> bool:
        return str(self.function).endswith("gallery")


def read_run(run: Path) -> list[SavedFigure]:
    """The figures of a folder in the order of their names: each NAME.json of a figure with a NAME.csv beside it.

    One that cannot be read is left out; `discrepancies` names it.
    """
    return [figure for file in _records(run) if isinstance(figure := _tried(file), SavedFigure)]


def own_files(run: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, in the order of their names."""
    return [file for file in sorted(run.glob(pattern)) if is_own(file)]


def is_own(file: Path) -> bool:
    """Whether it is a file of its folder: what a link elsewhere leads to is not ours to put into a page."""
    return file.is_file() and file.resolve().is_relative_to(file.parent.resolve())


def of_the_model(table: pd.DataFrame) -> pd.Series:
    """Which rows are the model's own and no control's."""
    return table.control == MODEL


def not_converged(table: pd.DataFrame) -> list[str]:
    """A line for each group of a table's rows whose probes did not converge."""
    lines = []
    for name, rows in table.groupby(_groups(table), sort=False) if "converged" in table else ():
        failed = rows[~rows.converged.astype(bool)]
        if len(failed):
            at = f", layers {span(sorted(set(failed.layer.astype(int))))}" if "layer" in failed else ""
            lines.append(f"{name}: {len(failed)} of {len(rows)}{at}")
    return lines


def comparisons(config: object, name: str = "") -> Iterator[tuple[str, Mapping]]:
    """Every difference with its interval in a figure's configuration, and its name in words."""
    if isinstance(config, Mapping):
        if all(isinstance(config.get(key), int | float) for key in ("difference", "low", "high")):
            yield _versus(config) or name, config
        else:
            for key, value in config.items():
                yield from comparisons(value, name if key in ("comparison", "pairs", "effects") else key)
    elif isinstance(config, list) and config and isinstance(config[0], Mapping):
        for value in config:
            yield from comparisons(value, name)


def significant(comparison: Mapping) -> bool:
    """By its p value where there is one, or else by its interval."""
    p = _p_value(comparison)
    if np.isnan(p):
        return comparison["low"] > 0 or comparison["high"] < 0
    return p < ALPHA


def in_words(name: str, comparison: Mapping) -> str:
    """A difference of accuracies in percentage points, with its interval and its p value."""
    difference, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    p = _p_value(comparison)
    end = "" if np.isnan(p) else f", p = {p:.2g}"
    return f"{name}: {difference:+.1f} points [{low:+.1f}, {high:+.1f}]{end}"


def _p_value(comparison: Mapping) -> float:
    """NaN where it has none."""
    p = comparison.get("p_value")
    return p if isinstance(p, int | float) else np.nan


def discrepancies(run: Path, figures: list[SavedFigure]) -> list[tuple[str, str]]:
    """What is not as it was recorded: a word that sums it up ("" for less grave ones), and a sentence."""
    lines = [("Changed.", figure.altered) for figure in figures if figure.altered]
    for file in sorted(run.iterdir()):
        if file.suffix in READ and file.is_file() and not is_own(file):
            lines.append(("Left out.", f"{file.name} is a link to a file outside this folder."))
    names = {figure.name for figure in figures}
    for file in _records(run):
        if file.stem not in names and isinstance(reason := _tried(file), str):
            lines.append(("Left out.", f"{file.name} cannot be read: {reason}"))
    commits = {figure.facts.get("commit", "") for figure in figures}
    if any(commit.endswith("+changes") for commit in commits):
        lines.append(("Uncommitted.", "Files differed from the commit when a figure was made."))
    if len(commits) > 1:
        lines.append(("", f"Figures come from {len(commits)} commits; see Provenance."))
    return lines


def unconverged(figures: list[SavedFigure]) -> list[tuple[str, list[str]]]:
    """For each figure with probes that did not converge: how many, and a line for each group of them."""
    lines = []
    for figure in figures:
        groups = not_converged(figure.table)
        if groups:
            count = int((~figure.table.converged.astype(bool)).sum())
            lines.append((f"{figure.name}: {count} of {len(figure.table)} probes", groups))
    return lines


def insignificant(figures: list[SavedFigure]) -> list[str]:
    """Differences that are not significant, each once, and the layers among which the best one is not certain."""
    lines: dict[str, str] = {}
    for figure in figures:
        for name, comparison in comparisons(figure.facts["config"]):
            if comparison.get("others", "") in ("", "average") and not significant(comparison):
                sentence = in_words(name, comparison)
                lines.setdefault(sentence, f"{figure.name}: {sentence}")
        if figure.name == "layer_curve" and "in_peak_set" in figure.table:
            layers = figure.table[of_the_model(figure.table)]
            peak = layers.layer[layers.in_peak_set.astype(str) == "True"].astype(int)
            if len(peak) > 1:
                words = f"{len(peak)} of {len(layers)} layers may be the best: {span(peak)} (95% together)"
                lines.setdefault(words, words)
    return list(lines.values())


def not_told_apart(run: Path) -> list[str]:
    """Measures of samples whose interval reaches into that of other real images."""
    if not is_own(run / "likeness.csv"):
        return []
    table = pd.read_csv(run / "likeness.csv")
    near = table[(table.low <= table.floor_high) & (table.floor_low <= table.high)]
    return [f"likeness: samples and real images are not told apart by {', '.join(near.measure)}"] if len(near) else []


def _records(run: Path) -> list[Path]:
    """Each NAME.json of a folder with a NAME.csv beside it."""
    return [file for file in own_files(run, "*.json") if is_own(file.with_suffix(".csv"))]


def _tried(file: Path) -> SavedFigure | str | None:
    """The figure of a json, or why it cannot be read; None where the json is of something else."""
    try:
        return _read(file)
    except Exception as error:  # a damaged file makes json, pandas and Pillow raise classes of many kinds
        return first_line(error)


def _read(file: Path) -> SavedFigure | None:
    """The figure of a json; None where the json is of something else."""
    facts, csv = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".csv").read_bytes()
    if not isinstance(facts, dict) or "csv_sha256" not in facts:
        return None
    for name, kind in KINDS.items():
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{name} is {facts[name]!r}, no {kind.__name__}")
    altered = ""
    try:
        read_figure(file)
    except ValueError as error:
        altered = str(error)
    figure = SavedFigure(file.stem, {"config": {}} | facts, read_table(csv), csv, altered=altered)
    png, svg = file.with_suffix(".png"), file.with_suffix(".svg")
    image = png if figure.is_gallery else svg
    picture = image.read_bytes() if is_own(image) else b""
    if not is_own(png):
        return replace(figure, picture=picture)
    with Image.open(png, formats=["PNG"]) as opened:
        return replace(figure, picture=picture, size=opened.size)


def _groups(table: pd.DataFrame) -> pd.Series:
    """The name in words of the group that each row is of."""
    names = [name for name in GROUPS if name in table]
    if not names:
        return pd.Series("rows", index=table.index)
    words = table[names].astype(object).fillna("")
    if "control" in words:
        words = words.assign(control=words.control.mask(of_the_model(table), ""))
    groups = [", ".join(filter(None, map(str, row))) or "the model" for row in words.itertuples(index=False)]
    return pd.Series(groups, index=table.index, dtype=object)


def _versus(comparison: Mapping) -> str:
    """a against b, where a difference says so."""
    if "best_layer" in comparison:
        return f"best layer {comparison['best_layer']} against last layer {comparison['last_layer']}"
    if {"a", "b"} <= set(comparison):
        return f"{comparison['a']} against {comparison['b']}, {comparison.get('at', '')}".rstrip(", ")
    return ""
