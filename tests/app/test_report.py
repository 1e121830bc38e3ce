"""The report says what the files say: numbers, doubts, provenance; it is one file, whole, and reads nothing else."""

import base64
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from igpt_lab.app import cli, report
from igpt_lab.figures import gallery, layer_curve, protocol_curves, save_figure
from tables import RECORD, layer_table, protocol_tables

BEST = {"best_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.004}
STORE = {
    "model": "tiny <1>",
    "images": "shades",
    "weights": "ab" * 32,
    "palette": "cd" * 32,
    "splits": {"test": ["ef" * 32, 9]},
}
STORE |= {"layers": {"ln_1": [0, 1, 2]}, "pool": "mean"}


class Page(HTMLParser):
    """Texts, attributes that name an address, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.addresses, self.texts, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    table = layer_table().assign(in_peak_set=[False, True, True] + [None] * 5)
    record = lab.RunRecord(
        "layer_curve", {"store": STORE, "comparison": BEST | {"p_value": 0.2}}, 0, "c1", {"numpy": "2"}
    )
    save_figure(layer_curve(table, title="a <title>"), folder / "layer_curve", data=table, record=record)
    settings, effects = protocol_tables()
    effects = effects.assign(p_value=np.nan)
    record = lab.RunRecord("protocol", {"effects": effects.to_dict("records")}, 0, "c2+changes", {})
    record = lab.RunRecord(**json.loads(json.dumps(vars(record)).replace("NaN", "null")))
    save_figure(protocol_curves(settings, effects), folder / "protocol", data=settings, record=record)
    images = np.zeros((2, 3, 3), np.uint8)
    save_figure(gallery(images), folder / "samples", data=images.reshape(2, 9), record=RECORD)
    likeness = {"measure": ["palette", "patches"], "value": [0.1, 0.4], "low": [0.05, 0.3], "high": [0.2, 0.5]}
    likeness |= {"floor": [0.1, 0.1], "floor_low": [0.0, 0.0], "floor_high": [0.15, 0.15]}
    pd.DataFrame(likeness).to_csv(folder / "likeness.csv", index=False)
    (folder / "log.json").write_text("[1]")
    (folder / "log.csv").write_text("step\n1\n")
    return folder


def test_the_page_says_what_the_files_say(run):
    (path,) = report.write_report(run, pdf=False)
    page = Page(path.read_text(encoding="utf-8"))
    said = " ".join("".join(f"{text} " for text in page.texts).split())
    assert page.open == [] and said.startswith("tiny <1> on shades tiny <1> on shades ")
    assert "80.0% best layer, 1 of 0..2 [79.0%, 81.0%]" in said and "70.0% last layer, 2" in said
    assert "45.0% random network, its best" in said and "60.0% raw pixels" in said
    assert "layer_curve : 1 of 8 probes: the model: 1 of 3, layers 2" in said.replace("layer_curve:", "layer_curve :")
    assert "best layer 1 against last layer 2: +10.0 points [+2.0, +18.0], p = 0.2" in said
    assert "2 of 3 layers may be the best: 1, 2" in said
    assert "protocol: sos against raw, chosen layer: +0.0 points [-2.0, +1.0]" in said
    assert "protocol: ours against port, drop: -1.0 points [-3.0, +0.0]" in said
    assert (
        "ln_1" not in said[said.index("Not significant") : said.index("Figures Layer curve")]
    )  # single pairs are not listed
    assert "samples and real images are not told apart by palette" in said and "by palette, patches" not in said
    assert "Files differed from the commit" in said and "Figures come from 3 commits" in said
    assert "abababab" in said and "ln_1: 0..2" in said and "log" not in [text.strip() for text in page.texts[:3]]


def test_it_is_one_file_that_reads_nothing_else_and_twice_the_same(run, tmp_path):
    first, second = (report.write_report(run, tmp_path / f"{name}.html", pdf=False)[0].read_bytes() for name in "ab")
    assert first == second
    page = Page(first.decode())
    assert len(page.addresses) == 6 and all(address.startswith("data:") for address in page.addresses)
    assert b"url(" not in first and b"@import" not in first and b"<script" not in first
    drawn = [base64.b64decode(address.partition(",")[2]) for address in page.addresses]
    assert drawn[0] == (run / "layer_curve.svg").read_bytes() and drawn[1] == (run / "layer_curve.csv").read_bytes()
    assert (run / "samples.png").read_bytes() in drawn and (run / "samples.svg").read_bytes() not in drawn


def test_a_table_that_was_changed_is_told(run):
    csv = run / "layer_curve.csv"
    csv.write_text(csv.read_text().replace("0.8", "0.9"))
    assert "layer_curve.csv has changed since" in report.write_report(run, pdf=False)[0].read_text()


def test_significance_is_by_p_or_else_by_the_interval():
    ends = {"difference": 0.1, "low": -0.1, "high": 0.2}
    assert report.significant(ends | {"p_value": 0.04}) and not report.significant(ends | {"p_value": 0.06})
    assert not report.significant(ends) and report.significant(ends | {"low": 0.01, "p_value": float("nan")})


def test_the_command_says_where_the_page_is_and_what_is_missing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cli.main(["report", str(run)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(run / "report.html") and "no Chromium is installed" in told.err
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 1 and "has no figures" in capsys.readouterr().err


@pytest.mark.skipif(report.chromium() is None, reason="no Chromium is installed")
def test_a_browser_makes_a_pdf_with_the_page_s_words(run):
    html, pdf = report.write_report(run)
    assert pdf == run / "report.pdf" and pdf.read_bytes().startswith(b"%PDF-") and pdf.stat().st_size > 10_000
