"""The report says what the files say: numbers, doubts, provenance; it is one file, whole, and reads nothing else."""

import base64
import json
import os
import re
import shutil
import tomllib
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from igpt_lab.app import captions, cli, report, saved
from igpt_lab.figures import gallery, layer_curve, protocol_curves, save_figure
from igpt_lab.figures.plotting import FIGURES
from tables import RECORD, drawn_table, layer_table, protocol_tables

BEST = {"chosen_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.004}
STORE = {
    "model": "tiny <1>",
    "images": "shades",
    "weights": "ab" * 32,
    "palette": "cd" * 32,
    "splits": {"test": ["ef" * 32, 9]},
}
STORE |= {"layers": {"ln_1": [0, 1, 2]}, "pool": "mean"}
HOSTILE = """<evil a="1" b='2'>&lt;"""
ROOT = "Running as root without --no-sandbox is not supported."  # what Chromium says
FAKE = """#!/bin/sh
echo "$@" >> "$0.calls"
case "$*" in
  *--no-sandbox*) test {without} = works || exit 1 ;;
  *) test {with_sandbox} = works || {{ echo {first} >&2; echo last words >&2; exit 1; }} ;;
esac
for argument; do case "$argument" in --print-to-pdf=*) printf %%PDF- > "${{argument#*=}}" ;; esac; done
"""


class Page(HTMLParser):
    """Texts, attributes that name an address, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.addresses, self.texts, self.tags, self.names = [], [], [], set(), set()
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"]
        self.names |= {name for name, value in attributes}
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(f"{text} " for text in self.texts).split())


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
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
    answers = {"prediction": ["a", "b", "b"], "verdict": ["held", "not resolved", "not resolved"]}
    pd.DataFrame(answers).to_csv(folder / "answers.csv", index=False)
    (folder / "log.json").write_text("[1]")
    (folder / "log.csv").write_text("step\n1\n")
    return folder


@pytest.mark.parametrize("name, damaged", [
    ("layer_curve.json", b"{"), ("layer_curve.json", b"\xff"), ("layer_curve.json", b"[" * 100_000),
    ("layer_curve.json", b'{"csv_sha256": "", "config": 3}'), ("layer_curve.json", b'{"csv_sha256": 1, "drawing": []}'),
    ("layer_curve.json", b'{"csv_sha256": "", "commit": 3}'), ("layer_curve.csv", b""),
])  # fmt: skip
def test_a_figure_that_cannot_be_read_is_named_and_hides_no_other(run, name, damaged):
    whole = [figure.name for figure in saved.read_run(run).figures]
    (run / name).write_bytes(damaged)
    results = saved.read_run(run)
    assert [figure.name for figure in results.figures] == [other for other in whole if other != "layer_curve"]
    (line,) = (line for word, line in saved.discrepancies(results) if word == "Left out.")
    assert line.startswith(f"{name} is passed over: ") and "\n" not in line


def test_the_page_says_what_the_files_say(run):
    (path,) = report.write_report(run, pdf=False)
    page = Page(path.read_text(encoding="utf-8"))
    words = page.words
    assert page.open == [] and words.startswith("tiny <1> on shades tiny <1> on shades ")
    assert "80.0% chosen layer, 1 of 0..2 [79.0%, 81.0%]" in words and "70.0% last layer, 2" in words
    assert "45.0% random network, its highest on test" in words and "60.0% raw pixels" in words
    assert "Accuracy over depth: a <title>: 1 of 8 probes: the model: 1 of 3, layers 2" in words
    assert "chosen layer 1 against last layer 2: +10.0 points [2.0, 18.0], p = 0.200" in words
    assert "2 of 3 layers may be the best: 1, 2" in words
    assert "What the protocol changes: sos against raw, chosen layer: +0.0 points [-2.0, 1.0]" in words
    assert "What the protocol changes: ours against transformers, drop: -1.0 points [-3.0, 0.0]" in words
    assert (
        "ln_1" not in words[words.index("Not significant") : words.index("Figures Accuracy over depth")]
    )  # single pairs are not listed
    assert words.count("Prediction not resolved: b") == 1 and "Prediction not resolved: a" not in words
    assert "samples and real images are not told apart by palette" in words and "by palette, patches" not in words
    assert "Files differed from the commit" in words and "Figures come from 3 commits" in words
    assert "tiny <1> (weights abababab) on shades; 9 test images; layers ln_1: 0..2; mean" in words
    assert "log" not in [text.strip() for text in page.texts[:3]]


def test_figures_are_drawn_again_in_a_style_of_the_user(run, tmp_path, capsys):
    style = tmp_path / "ours.mplstyle"
    style.write_text("lines.linewidth: 4\nfigure.figsize: 5, 4\n")
    (run / "log.json").unlink()  # of no figure
    assert cli.main(["figures", str(run), "--style", str(style)]) == 0
    assert (run / "ours/layer_curve.svg").is_file()
    drawing = json.loads((run / "ours/layer_curve.json").read_text())["drawing"]
    assert drawing["style"] == "paper" and drawing["settings"]["lines.linewidth"] == 4.0
    capsys.readouterr()
    assert cli.main(["figures", str(run), "--style", "papre"]) == 1
    error = capsys.readouterr().err
    assert "there is no style 'papre'" in error and "did you mean 'paper'?" in error and len(error.splitlines()) == 1


def test_headings_and_columns_are_words_and_each_figure_has_its_own(run):
    for name in ("tour_curve", "again"):
        for ending in ("json", "csv", "svg", "png"):
            shutil.copy(run / f"layer_curve.{ending}", run / f"{name}.{ending}")
    page = Page(report.write_report(run, pdf=False)[0].read_text(encoding="utf-8"))
    heads = [text for text in page.texts if text.startswith("Accuracy over depth: a <title>") and "layer" not in text]
    first = "Accuracy over depth: a <title>"
    assert set(heads) == {first, f"{first} (Again)", f"{first} (Tour curve)"}
    assert "test accuracy" in page.texts and "95% from" in page.texts and "test images" in page.texts
    raw = ("test_accuracy", "n_test", "in_peak_set", "layer_curve", "floor_low")
    assert not set(raw) & {text for text in page.texts if text != "layer_curve"}
    assert page.texts.count("layer_curve") == 2  # the file, below the figure and in its row of the provenance


def of_run(folder: Path, model: str, images: str, **more) -> None:
    """A layer curve of a model on an image set, in a folder."""
    config = {"store": STORE | {"model": model, "images": images}, "comparison": BEST} | more
    record = lab.RunRecord("layer_curve", config, 0, "c1", {})
    save_figure(layer_curve(layer_table()), folder / f"{model}_{images}", data=layer_table(), record=record)


def test_two_runs_in_one_folder_have_a_part_each_and_a_line_on_top(tmp_path, capsys):
    for model, images in (("big", "dogs"), ("small", "dogs")):
        of_run(tmp_path, model, images)
    record = lab.RunRecord("samples", {"model": "small"}, 0, "c1", {})  # says nothing of images
    save_figure(gallery(np.zeros((2, 3, 3), np.uint8)), tmp_path / "samples", data=np.zeros((2, 9)), record=record)
    assert cli.main(["report", str(tmp_path), "--no-pdf"]) == 0
    line = "Results of 2 runs, of several models or image sets: big on dogs; small on dogs. Compare within a run."
    assert capsys.readouterr().err.strip() == f"igpt-lab: {line}"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert f"Several runs. {line} big on dogs , 1 figure small on dogs , 2 figures" in page.words
    first, second = page.words.split("small on dogs ")[-2:]
    assert page.words.count("What to be careful about") == 2 and "File samples" in second and "samples" not in first
    assert {address for address in page.addresses if address.startswith("#")} == {"#run-0", "#run-1"}
    assert cli.main(["figures", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    names = [Path(path).stem for path in printed.out.split()]
    assert names == ["big_dogs", "samples", "small_dogs"] or names == ["big_dogs", "small_dogs", "samples"]
    assert line in printed.err


def test_a_folder_of_runs_and_studies_is_one_page(tmp_path, capsys):
    of_run(tmp_path / "big-dogs", "big", "dogs")
    of_run(tmp_path / "small-cats", "small", "cats")
    of_run(tmp_path / "studies", "seeds", "dogs", models=["big-0", "big-1"])
    (tmp_path / "empty").mkdir()
    pages = [report.write_report(tmp_path, tmp_path / f"{name}.html", pdf=False)[0].read_bytes() for name in "ab"]
    assert pages[0] == pages[1]
    words = Page(pages[0].decode()).words
    assert "big on dogs , 1 figure small on cats , 1 figure Studies , 1 figure" in words
    assert cli.main(["figures", str(tmp_path), "--style", "talk"]) == 0
    assert (tmp_path / "big-dogs/talk/big_dogs.png").is_file() and (tmp_path / "studies/talk/seeds_dogs.png").is_file()
    capsys.readouterr()
    assert cli.main(["figures", str(tmp_path), "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn/small-cats/small_cats.svg").is_file()
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "studies"), "--no-pdf"]) == 0
    assert not capsys.readouterr().err  # a study sets models beside each other


def test_two_runs_of_one_model_and_set_are_told_by_their_folders(tmp_path, capsys):
    for folder in ("full", "quick"):
        of_run(tmp_path / folder, "big", "dogs")
    assert cli.main(["report", str(tmp_path), "--no-pdf"]) == 0
    line = "Results of 2 runs, all of one model and image set: big on dogs (full); big on dogs (quick)."
    assert line in capsys.readouterr().err
    page = Page((tmp_path / "report.html").read_text())
    assert page.texts.count("big on dogs (full)") == page.texts.count("big on dogs (quick)") == 2


def test_the_page_is_written_over_nothing_that_it_reads(run, capsys):
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    for out, words in (
        (run / "layer_curve.csv", "expected a file whose name ends in .html"), (run, "ends in .html"),
        (run / "page.pdf", "ends in .html"), (run / "layer_curve.html", "layer_curve.pdf is of a figure"),
    ):  # fmt: skip
        assert cli.main(["report", str(run), "--out", str(out)]) == 1 and words in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    for command in ("report", "figures"):
        assert cli.main([command, str(run / "none")]) == 1 and "there is no folder" in capsys.readouterr().err
        assert cli.main([command, str(run / "log.csv")]) == 1 and "expected its folder" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--no-pdf", "--paper", "a4"]) == 0


def test_tables_have_percentages_and_one_form_of_p(run):
    (run / "explorer" / "store" / "ln_1-test").mkdir(parents=True)
    generator = np.random.default_rng(0)
    correct = {layer: generator.random(200) < share for layer, share in enumerate((0.3, 0.9, 0.7))}
    table = lab.layer_table(correct, chosen=1)
    table.to_csv(run / "probe_layers.csv", index=False)
    text = report.write_report(run, pdf=False)[0].read_text()
    words = Page(text).words
    assert "less the last layer less the last layer, 95% from less the last layer, 95% to" in words
    row = table.iloc[0]
    ends = [f"{100 * row[f'minus_last{end}']:+.2f}%" for end in ("", "_low", "_high")]
    assert f"{row.test_accuracy:.2%} {row.low:.2%} {row.high:.2%} " in words and " ".join(ends) in words
    assert row.minus_last_p < 0.001 and re.search(r" [1-9]e-[1-9]\d? ", words) and "minus_" not in words
    (grid,) = re.findall(r"<table[^>]*><thead>(?:(?!</table>).)*less the last.*?</thead>", text, re.DOTALL)
    assert "broad" not in grid and grid.count('"number"') + grid.count('""') <= 13  # columns that are printed
    assert "Saved by the explorer explorer/store/ln_1-test" in words


def test_every_figure_of_the_package_has_a_caption():
    own = {name for name, plot in FIGURES.items() if plot.__module__.startswith("igpt_lab.")}  # a page makes another
    assert own <= set(captions.CAPTIONS) and len(own) > 20


def test_controls_of_several_draws_are_told_by_their_mean_and_range(tmp_path):
    save_figure(layer_curve(drawn_table()), tmp_path / "layer_curve", data=drawn_table(), record=RECORD)
    (path,) = report.write_report(tmp_path, pdf=False)
    words = Page(path.read_text(encoding="utf-8")).words
    assert "55.0% random network, its highest on test (mean and range of 2) [50.0%, 60.0%]" in words
    assert "22.0% permuted labels, its highest on test (mean and range of 3) [20.0%, 24.0%]" in words


def test_it_is_one_file_that_reads_nothing_else_and_twice_the_same(run, tmp_path):
    first, second = (report.write_report(run, tmp_path / f"{name}.html", pdf=False)[0].read_bytes() for name in "ab")
    assert first == second
    page = Page(first.decode())
    assert len(page.addresses) == 6 and all(address.startswith("data:") for address in page.addresses)
    assert b"url(" not in first and b"@import" not in first and b"<script" not in first
    policy = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    assert policy.pop("default-src") == "'none'" and policy.pop("img-src") == "data:"
    assert policy == {"style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}
    drawn = [base64.b64decode(address.partition(",")[2]) for address in page.addresses]
    assert drawn[0] == (run / "layer_curve.svg").read_bytes() and drawn[1] == (run / "layer_curve.csv").read_bytes()
    assert (run / "samples.png").read_bytes() in drawn and (run / "samples.svg").read_bytes() not in drawn


def test_a_poor_choice_and_both_intervals_are_told_whatever_the_age_of_the_names(tmp_path):
    table = layer_table().assign(validation_accuracy=layer_table().test_accuracy, n_validation=90)
    older = {"best_layer" if name == "chosen_layer" else name: value for name, value in BEST.items()}
    comparison = older | {"choice_low": -0.05, "choice_high": 0.21}
    record = lab.RunRecord("layer_curve", {"comparison": comparison}, 0, "c1", {})
    save_figure(layer_curve(table), tmp_path / "probe", data=table, record=record)
    (tmp_path / "summary.json").write_text('{"best_layer": 1}')
    words = Page(report.write_report(tmp_path, pdf=False)[0].read_text()).words
    drop = "+10.0 points [2.0, 18.0] over test images, [-5.0, 21.0] with the choice, p = 0.004"
    assert f"Chosen layer 1 against last layer 2: {drop}." in words and "chosen layer 1" in words[-30:]
    assert "A poor choice: one standard error is 4.2 points on 90 held-out images" in words
    assert "best layer" not in words


def test_a_table_that_was_changed_is_told(run):
    csv = run / "layer_curve.csv"
    csv.write_text(csv.read_text().replace("0.8", "0.9"))
    assert "layer_curve.csv has changed since" in report.write_report(run, pdf=False)[0].read_text()


def test_words_of_the_folder_never_become_markup(tmp_path):
    folder = tmp_path / HOSTILE
    config = {"store": STORE | {"model": HOSTILE}, "comparison": BEST | {"chosen_layer": HOSTILE, "p_value": 0.2}}
    record = lab.RunRecord(HOSTILE, config, 0, HOSTILE, {HOSTILE: HOSTILE})
    table = layer_table().replace("raw pixels", HOSTILE).assign(**{HOSTILE: HOSTILE})
    save_figure(layer_curve(table, title=HOSTILE), folder / "layer_curve", data=table, record=record)
    images = np.zeros((2, 5, 3, 3), np.uint8)
    save_figure(gallery(images[..., 0]), folder / f"broad {HOSTILE}", data=images.reshape(2, 45), record=RECORD)
    ends = {"value": [0.1], "low": [0.05], "high": [0.2], "floor_low": [0.0], "floor_high": [0.15]}
    pd.DataFrame({"measure": [HOSTILE]} | ends).to_csv(folder / "likeness.csv", index=False)
    pd.DataFrame({HOSTILE: [HOSTILE]}).to_csv(folder / f"{HOSTILE}.csv", index=False)
    (folder / "summary.json").write_text(json.dumps({"images": HOSTILE, HOSTILE: [HOSTILE]}))
    page = Page(report.write_report(folder, pdf=False)[0].read_text(encoding="utf-8"))
    assert "evil" not in page.tags and page.open == []
    assert page.names == set("lang charset http-equiv name content class id src alt scope download href".split())
    assert f"{HOSTILE} on {HOSTILE}" in page.words and f"Folder {HOSTILE} , 2 figures" in page.words
    assert f"2 rows of 45 numbers in broad {HOSTILE}.csv." in page.words
    assert f"are not told apart by {HOSTILE}" in page.words and f"chosen layer {HOSTILE} against" in page.words
    assert page.texts.count(HOSTILE) >= 12  # cells, names of columns, tables and fields


def test_a_link_out_of_the_folder_is_not_followed(run, tmp_path):
    (run / "summary.json").write_text('{"model": "secret"}')
    outside = ("samples.json", "protocol.csv", "layer_curve.svg", "likeness.csv", "summary.json")
    for name in outside:
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    (run / "again.csv").symlink_to("log.csv")
    page = Page(report.write_report(run, pdf=False)[0].read_text(encoding="utf-8"))
    for name in outside:
        assert f"Left out. {name} is a link to a file outside this folder." in page.words
    assert "secret" not in page.words and "told apart" not in page.words and "again" in page.texts
    assert "1 figure." in page.words and not any("image/" in address for address in page.addresses)
    shutil.move(run / "layer_curve.csv", tmp_path)
    (run / "layer_curve.csv").symlink_to(tmp_path / "layer_curve.csv")
    with pytest.raises(ValueError, match="no figures of its own"):
        report.write_report(run, pdf=False)


def test_a_folder_that_is_itself_behind_a_link_is_read(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    pages = [
        report.write_report(at, tmp_path / "page.html", pdf=False)[0].read_text() for at in (run, tmp_path / "link")
    ]
    assert pages[0] == pages[1]


def test_significance_is_by_p_or_else_by_the_interval():
    ends = {"difference": 0.1, "low": -0.1, "high": 0.2}
    assert saved.significant(ends | {"p_value": 0.04}) and not saved.significant(ends | {"p_value": 0.06})
    assert not saved.significant(ends) and saved.significant(ends | {"low": 0.01, "p_value": float("nan")})


def test_the_command_says_where_the_page_is_and_what_is_missing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cli.main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(run / "report.html") and "no Chromium is installed" in printed.err
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 1 and "has no figures" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(report.chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("paper", "points"), [("A4", (595, 842)), ("letter", (612, 792))])
def test_a_browser_makes_a_pdf_of_the_paper_that_is_asked_for(run, paper, points):
    _, pdf = report.write_report(run, paper=paper)
    content = pdf.read_bytes()
    assert pdf == run / "report.pdf" and content.startswith(b"%PDF-") and len(content) > 10_000
    boxes = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert boxes and all(np.allclose([float(side) for side in box], points, atol=1) for box in boxes)


def test_another_paper_is_refused(run):
    with pytest.raises(ValueError, match="paper='A5'; expected one of A4, letter"):
        report.write_report(run, pdf=False, paper="A5")


@pytest.mark.skipif(os.name != "posix", reason="the browser is a shell script")
@pytest.mark.parametrize(
    "user, with_sandbox, without, first, tries",
    [
        (0, "works", "works", ROOT, [False]),
        (0, "fails", "works", ROOT, [False, True]),
        (0, "fails", "fails", ROOT, [False, True]),
        (0, "fails", "works", "a page that ends the browser", [False]),
        (1000, "works", "works", ROOT, [False]),
        (1000, "fails", "works", ROOT, [False]),
    ],
)
def test_the_sandbox_is_on_but_where_root_cannot_have_it(
    run, tmp_path, monkeypatch, user, with_sandbox, without, first, tries
):
    browser = tmp_path / "chromium"
    browser.write_text(FAKE.format(with_sandbox=with_sandbox, without=without, first=first))
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if with_sandbox == "works" or (tries == [False, True] and without == "works"):
            assert report.write_report(run)[1].read_bytes() == b"%PDF-"
        else:
            words = "it said nothing" if tries == [False, True] else "last words"
            with pytest.raises(OSError, match=f"no pdf of .*report.html .{words}.; print the page from any browser"):
                report.write_report(run)
            assert (run / "report.html").is_file() and not (run / "report.pdf").exists()
    assert ["without" in str(warning.message) for warning in warned] == tries[1:]  # never silently
    calls = (tmp_path / "chromium.calls").read_text().splitlines()
    assert all("--host-resolver-rules=MAP * ~NOTFOUND" in call for call in calls)
    assert ["--no-sandbox" in call.split() for call in calls] == tries
    assert all(call.split()[-1] == (run / "report.html").as_uri() for call in calls)


@pytest.mark.skipif(os.name != "posix", reason="the browser is a shell script")
@pytest.mark.parametrize("without, code", [("works", 0), ("fails", 1)])
def test_the_command_says_in_one_line_that_the_sandbox_is_off(run, tmp_path, monkeypatch, capsys, without, code):
    browser = tmp_path / "chromium"
    browser.write_text(FAKE.format(with_sandbox="fails", without=without, first=ROOT))
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cli.main(["report", str(run)]) == code
    line, *others = capsys.readouterr().err.splitlines()
    assert line.startswith("igpt-lab: chromium does not start with its sandbox") and len(others) == code


def test_an_installed_package_has_the_template_and_nothing_in_it_is_marked_as_safe():
    template = Path(report.__file__).with_name("report.html")
    setup = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = Path(lab.__file__).parent
    assert any(template in package.glob(pattern) for pattern in setup["package-data"]["igpt_lab"])
    text = template.read_text(encoding="utf-8")
    assert not any(word in text for word in ("safe }}", "|safe", "| safe", "autoescape ", "Markup"))
