"""What the committed notebooks print and draw is what the shipped run holds, so that the two cannot drift apart."""

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest

from igpt_lab.core.display import MODEL
from igpt_lab.figures import read_table
from igpt_lab.probing.controls import DropComparison
from igpt_lab.probing.results import Comparison

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "results/fashion-xs-fashion-mini"
CELLS = {
    path.stem: [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
SAVED = [
    (notebook, name)
    for notebook, cells in CELLS.items()
    for cell in cells
    for name in re.findall(r'save_figure\([^)]*f"\{out\}/(\w+)"', cell.source)
]


def data(notebook: str, kind: str) -> list:
    """What the cells of a notebook show as `kind`, in order."""
    outputs = [output for cell in CELLS[notebook] for output in cell.outputs]
    if kind == "stdout":
        return [output.text for output in outputs if output.get("name") == "stdout"]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def tables(notebook: str) -> list[pd.DataFrame]:
    """The DataFrames that a notebook shows, as words, without their index."""
    frames = []
    for page in data(notebook, "text/html"):
        if 'class="dataframe"' not in page:
            continue
        tree = ElementTree.fromstring(re.search(r"<table.*</table>", page, re.S)[0])
        rows = [[cell.text for cell in row.findall("td")] for row in tree.findall("tbody/tr")]
        heads = [[cell.text for cell in line if cell.text] for line in tree.findall("thead/tr")]
        names = next(names for names in heads if len(names) >= len(rows[0]))  # the lines above span several columns
        frames.append(pd.DataFrame(rows, columns=names[-len(rows[0]) :], dtype=object))
    return frames


def results(name: str, control: str | None = None) -> pd.DataFrame:
    table = read_table((SHIPPED / f"{name}.csv").read_bytes())
    return table if control is None else table[table.control == control].reset_index(drop=True)


def config(name: str) -> dict:
    return json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))["config"]


def agree(shown: pd.DataFrame, expected: pd.DataFrame, *, at_least: int = 3, kept: int = 17) -> None:
    """Every column of both says the same, to the digits that are shown, of the `kept` ones of the file."""
    both = [name for name in shown if name in expected]
    assert len(both) >= at_least and len(shown) == len(expected), (list(shown), list(expected))
    for name in both:
        for word, value in zip(shown[name], expected[name], strict=True):
            if isinstance(value, (float, np.floating)) and not isinstance(value, bool):
                mantissa, _, power = (word or "nan").partition("e")
                rounded = abs(value) * 10.0 ** (1 - kept)
                step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
                assert (word == "NaN" and np.isnan(value)) or abs(float(word) - value) <= 0.5001 * step + rounded, (
                    name,
                    word,
                    value,
                )
            else:
                assert (word or "") == ("" if value is None else str(value)), (name, word, value)


def test_every_saved_figure_is_known():
    assert len(SAVED) >= 13 and {name for _, name in SAVED} >= {"layer_curve", "geometry", "samples", "fine_tuning"}


@pytest.mark.parametrize(("notebook", "name"), SAVED, ids=lambda word: word)
def test_the_figure_shown_is_the_figure_saved(notebook, name):
    shown = {base64.b64decode(png) for png in data(notebook, "image/png")}
    assert (SHIPPED / f"{name}.png").read_bytes() in shown


def test_tables_of_the_layer_probe():
    shown = tables("02_layer_probe")
    agree(shown[0], results("layer_curve", MODEL), at_least=10)
    agree(shown[1], results("layer_curve", MODEL))
    for place, control in ((2, "random network"), (3, "permuted labels")):
        draws = results("layer_curve", control).groupby("layer").test_accuracy
        agree(shown[place], draws.agg(["mean", "min", "max"]).reset_index(drop=True))
    pixels = results("companions")
    agree(shown[4], pixels[pixels.control.str.startswith("raw pixels")].reset_index(drop=True), at_least=8)
    agree(shown[5], results("controls"), at_least=11, kept=6)
    agree(shown[6], results("claims"), at_least=8, kept=6)
    agree(shown[7], results("selectivity"), at_least=12)
    plain, saved = data("02_layer_probe", "text/plain"), config("layer_curve")
    assert repr(Comparison(**saved["comparison"])) in plain
    assert repr(DropComparison(**saved["drop less that of random networks"])) in plain
    assert repr(DropComparison(**config("selectivity")["drop of selectivity"])) in plain
    ours = results("layer_curve", MODEL)
    assert str(ours.layer[ours.in_peak_set.astype(bool)].tolist()) in plain


def test_table_of_few_labels():
    (shown,) = tables("03_few_labels")
    table = results("few_label_curve")
    named = table.assign(layer=table.layer.where(table.layer_rule == "fixed", "chosen").astype(str))
    parts = [named[named.control == control] for control in (MODEL, "raw pixels")]
    groups = [part.groupby(["control", "k", "layer_rule", "layer"]).test_accuracy for part in parts]
    agree(shown, pd.concat([group.agg(["mean", "std", "count"]) for group in groups]).reset_index(drop=True))


def test_tables_of_likeness_protocol_and_geometry():
    agree(tables("04_gallery")[-1], results("likeness"), at_least=9)
    settings, average, single, stopped, poolings = tables("05_protocol")
    agree(poolings, results("poolings"), at_least=15, kept=6)
    agree(settings, pd.DataFrame(config("protocol")["settings"]), at_least=11)
    agree(stopped, pd.DataFrame(config("protocol")["stopped"]), at_least=9)
    effects = pd.DataFrame(config("protocol")["effects"])
    agree(average, effects[effects.others.isin(["average", ""])].reset_index(drop=True), at_least=9)
    ours = {"alignment": "sos", "point": "ln_1", "scaling": "standardised"}
    lone = pd.concat([
        effects[(effects.factor == factor) & (effects["at"] != "drop")
                & (effects.others == ", ".join(value for name, value in ours.items() if name != factor))]
        for factor in ours
    ])  # fmt: skip
    agree(single.drop(columns="p_holm"), lone.reset_index(drop=True), at_least=8)  # corrected for these rows alone
    agree(tables("06_geometry")[0], results("geometry", MODEL))
    agree(tables("06_geometry")[1], results("geometry", "raw pixels"))


def test_words_of_the_protocol():
    effects, (*_, said) = pd.DataFrame(config("protocol")["effects"]), data("05_protocol", "stdout")
    rows = effects[effects.others.isin(["average", ""])]
    wanted = [f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]" for row in rows.itertuples()]
    assert re.findall(r"[+-][\d.]+ \[[^]]+\]", said) == wanted and len(wanted) == 21


def test_tables_of_fine_tuning():
    table = results("fine_tuning").assign(labels=lambda t: t.labels.astype(str))
    before, means, pairs = tables("08_fine_tuning")[:3]
    curves = pd.DataFrame(config("fine_tuning")["curves"])
    agree(before, curves[curves.control == MODEL].reset_index(drop=True), at_least=5)
    agree(means, pd.DataFrame(config("fine_tuning")["summary"]), at_least=7)
    groups = table.groupby(["labels", "method"], sort=False).test_accuracy
    agree(means[["mean", "sd"]], groups.agg(mean="mean", sd="std").reset_index(drop=True), at_least=2)
    expected = pd.DataFrame(config("fine_tuning")["pairs"]).T
    shown = ["difference", "sd", "low", "high", "p_value", "p_holm"]
    expected = expected[shown].astype(float).sort_values("difference")  # a json has its names in alphabetical order
    agree(pairs.sort_values("difference", key=pd.to_numeric), expected, at_least=6)


def test_tables_of_why_the_middle():
    refit, answers = tables("09_why_the_middle")
    agree(refit, results("refit"), at_least=7)
    agree(answers, results("answers"), at_least=9)


def test_the_tour_says_what_it_saved():
    table, pages = results("tour_layer_curve", MODEL), " ".join(data("00_tour", "text/html"))
    best, last = table[table.chosen.astype(bool)].iloc[0], table.iloc[-1]
    for row in (best, last):
        assert f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]" in pages
    assert f"{best.layer} of 0..{last.layer}, by validation: " in pages


def test_what_to_trust_is_what_the_regret_tables_say():
    last = nbformat.read(ROOT / "notebooks/06_geometry.ipynb", as_version=4).cells[-1].source
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in last.splitlines() if line.startswith("| ")][1:]
    for place, name in ((1, "fashion"), (3, "cifar10")):
        table = pd.read_csv(ROOT / f"results/studies/scores_{name}_regret.csv")
        assert [row[0] for row in rows] == table.score.str.replace("_", " ").tolist()
        for row, lost in zip(rows, table.itertuples(), strict=True):
            value, low, high = (100 * share for share in (lost.regret, lost.regret_low, lost.regret_high))
            assert row[place : place + 2] == [str(lost.picked_layer), f"{value:.1f} [{low:.1f}, {high:.1f}]"]
