"""What a results folder holds: its saved figures, and what a reader of them should be careful about."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from igpt_lab.core.chosen import difference_in_words, with_new_names
from igpt_lab.core.display import MODEL, p_number, span
from igpt_lab.figures import read_figure, read_table
from igpt_lab.figures.saving import read_json, read_regular

ALPHA = 0.05
GROUPS = "control layer_rule recipe alignment point scaling solver method".split()
KINDS = {"config": dict, "drawing": dict, "commit": str, "versions": dict}  # of what is read in a figure's json
READ = (".json", ".csv", ".svg", ".png")
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # what every png begins with; width and height follow


@dataclass(frozen=True)
class SavedFigure:
    """A figure of the folder: its name, what its json says, its table, and its picture.

    `picture` is a png of a gallery and an svg of every other figure, b"" where there is none; `size` is the width and
    height of the png in pixels. `altered` says how the table differs from what was recorded, `heading` in words what
    the figure is of.
    """

    name: str
    facts: dict
    table: pd.DataFrame
    csv: bytes
    picture: bytes = b""
    size: tuple[int, int] = (1, 1)
    altered: str = ""
    heading: str = ""

    @property
    def title(self) -> str:
        """Its heading, or else its name."""
        return self.heading or self.name

    @property
    def function(self) -> str | None:
        return self.facts.get("drawing", {}).get("function")

    @property
    def is_gallery(self) -> bool:
        return str(self.function).endswith("gallery")


@dataclass
class Results:
    """A folder of results: its figures, the tables that no figure shows, and what summary.json says.

    `odd` has a sentence for each file that was passed over, by the file's name.
    """

    folder: Path
    figures: list[SavedFigure] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)


def read_run(run: Path) -> Results:
    """The figures (each NAME.json of a figure with its NAME.csv), tables and summary of a folder.

    A file that cannot be read, is no regular one, or lies behind a link that leads out of the folder is passed over.
    """
    results = Results(run)
    files, results.odd = own_files(run)
    csvs: dict[str, bytes] = {}
    for add, kind in ((_add_table, ".csv"), (_add_json, ".json")):
        for file in files:
            try:
                if file.suffix == kind:
                    add(results, csvs, file, files)
            except Exception as error:  # a file may be anybody's, and any library that reads it fails in its own way
                results.odd[file.name] = passed_over(file.name, error)
    return results


def own_files(run: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder of results in the order of their names, and why others of their kinds are none of it.

    What begins with a dot is of a system or an editor.
    """
    own, odd = [], {}
    for file in sorted(run.glob("*")):
        if file.suffix not in READ or file.name.startswith("."):
            continue
        if not is_inside(file, run):
            odd[file.name] = f"{file.name} is a link to a file outside this folder."
        elif not file.is_file():
            odd[file.name] = f"{file.name} is no regular file."
        else:
            own.append(file)
    return own, odd


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with all its links followed, lies in a folder; of links in a circle the last one counts."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def passed_over(name: str, error: Exception) -> str:
    """The sentence for a file that an error makes us pass over."""
    words = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__} {error}"
    return f"{name} is passed over: {' '.join(words.split())}"


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
        if {"difference", "low", "high"} <= set(config):
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
    if p is None or np.isnan(p):
        return comparison["low"] > 0 or comparison["high"] < 0
    return p < ALPHA


def in_words(name: str, comparison: Mapping) -> str:
    """A difference of accuracies in percentage points, with its interval or intervals and its p value."""
    p = _p_value(comparison)
    end = "" if p is None or np.isnan(p) else f", p {p_number(p, '= ')}"
    return f"{name}: {difference_in_words(comparison)}{end}"


def main_curve(figures: list[SavedFigure]) -> SavedFigure | None:
    """The layer curve of notebook 2, or else that of `igpt-lab probe`."""
    curves = {figure.name: figure for figure in figures if figure.function == "layer_curve"}
    return curves.get("layer_curve", curves.get("probe"))


def _p_value(comparison: Mapping) -> float:
    """NaN where it has none."""
    p = comparison.get("p_value")
    return p if isinstance(p, int | float) else np.nan


def discrepancies(results: Results) -> list[tuple[str, str]]:
    """What is not as it was recorded: a word that sums it up ("" for less grave ones), and a sentence."""
    figures = results.figures
    lines = [("Changed.", figure.altered) for figure in figures if figure.altered]
    lines += [("Left out.", sentence) for _, sentence in sorted(results.odd.items())]
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
            lines.append((f"{figure.title}: {count} of {len(figure.table)} probes", groups))
    return lines


def insignificant(figures: list[SavedFigure]) -> list[str]:
    """Differences that are not significant, each once, and the layers among which the best one is not certain."""
    lines: dict[str, str] = {}
    for figure in figures:
        for name, comparison in comparisons(figure.facts["config"]):
            if comparison.get("others", "") in ("", "average") and not significant(comparison):
                sentence = in_words(name, comparison)
                lines.setdefault(sentence, f"{figure.title}: {sentence}")
        if figure is main_curve(figures) and "in_peak_set" in figure.table:
            layers = figure.table[of_the_model(figure.table)]
            peak = layers.layer[layers.in_peak_set.astype(str) == "True"].astype(int)
            if len(peak) > 1:
                words = f"{len(peak)} of {len(layers)} layers may be the best: {span(peak)} (95% together)"
                lines.setdefault(words, words)
    return list(lines.values())


def not_told_apart(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Measures of samples whose interval reaches into that of other real images."""
    if "likeness" not in tables:
        return []
    table = tables["likeness"]
    near = table[(table.low <= table.floor_high) & (table.floor_low <= table.high)]
    return (
        [f"Samples beside real images: samples and real images are not told apart by {', '.join(near.measure)}"]
        if len(near)
        else []
    )


def not_resolved(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The predictions of `explain` that its measurements do not decide."""
    table = tables.get("answers", pd.DataFrame())
    if not {"prediction", "verdict"} <= set(table):
        return []
    answers = table.drop_duplicates("prediction")
    return [f"Prediction not resolved: {words}" for words in answers.prediction[answers.verdict == "not resolved"]]


def _add_table(results: Results, csvs: dict[str, bytes], file: Path, files: list[Path]) -> None:
    content = read_regular(file)
    results.tables[file.stem], csvs[file.stem] = read_table(content), content


def _add_json(results: Results, csvs: dict[str, bytes], file: Path, files: list[Path]) -> None:
    """Add the figure of a json, of its table and picture, or the summary; a json of something else adds nothing."""
    facts, csv = read_json(file), file.with_suffix(".csv").name
    if file.name == "summary.json":
        if not isinstance(facts, dict):
            raise ValueError(f"it is a {type(facts).__name__}; expected a JSON object")
        results.summary = with_new_names(facts)
    if not isinstance(facts, dict) or "csv_sha256" not in facts or csv in results.odd:
        return
    if file.stem not in csvs:
        raise ValueError(f"its table {csv} is missing")
    for name, kind in KINDS.items():
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{name} is {facts[name]!r}; expected a {kind.__name__}")
    figure = _read(file, facts, results.tables[file.stem], csvs[file.stem], files)
    results.figures.append(figure)
    del results.tables[file.stem]


def _read(file: Path, facts: dict, table: pd.DataFrame, csv: bytes, files: list[Path]) -> SavedFigure:
    """The figure of a json and its csv, with the picture among `files`."""
    altered = ""
    try:
        read_figure(file)
    except ValueError as error:
        altered = str(error)
    figure = SavedFigure(file.stem, {"config": {}} | facts, table, csv, altered=altered)
    pictures = [file.with_suffix(kind) for kind in (".png", ".svg")]
    png, svg = (read_regular(picture) if picture in files else b"" for picture in pictures)
    size = struct.unpack(">II", png[16:24]) if png.startswith(PNG) and len(png) > 24 else figure.size
    return replace(figure, picture=png if figure.is_gallery else svg, size=size)


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
    comparison = with_new_names(comparison)
    if "chosen_layer" in comparison:
        return f"chosen layer {comparison['chosen_layer']} against last layer {comparison['last_layer']}"
    if comparison.get("factor") == "interaction":
        return f"interaction of {comparison['a']} and {comparison['b']}, {comparison.get('at', '')}".rstrip(", ")
    if {"a", "b"} <= set(comparison):
        return f"{comparison['a']} against {comparison['b']}, {comparison.get('at', '')}".rstrip(", ")
    return ""
