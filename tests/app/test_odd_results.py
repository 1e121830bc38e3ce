"""One odd file in a folder of results is named and passed over: report and figures do the others."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import igpt_lab as lab
from igpt_lab.app import cli, report
from igpt_lab.core.provenance import digest
from igpt_lab.figures import gallery, layer_curve, redraw, save_figure
from tables import RECORD, layer_table

NOT_TABLES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "utf-16": "a,b\n1,2\n".encode("utf-16"),
    "semicolons": "\ufeffname;value\n1,5;2,5\n".encode(),
    "longer rows": b"a,b\n1,2,3\n",
    "unclosed": b'a,b\n"1,2\n',
}
NOT_JSON = {"empty": b"", "cut": b'{"csv_sha256": ', "binary": bytes(range(256)), "deep": b"[" * 10**5}
ODD_FACTS = [
    {"config": [1]}, {"config": None}, {"commit": 5}, {"versions": "x"}, {"drawing": [1]}, {"drawing": {}},
    {"drawing": {"function": ["gallery"], "arguments": {}, "style": "paper"}}, {"config": {"comparison": [{"low": 1}]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder with two figures and a table."""
    folder = tmp_path_factory.mktemp("shipped")
    config = {"comparison": {"best_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.0, "high": 0.2}}
    record = lab.RunRecord("layer_curve", config, 0, "c", {"numpy": "2"})
    save_figure(layer_curve(layer_table()), folder / "layer_curve", data=layer_table(), record=record)
    images = np.zeros((2, 3, 3), np.uint8)
    save_figure(gallery(images), folder / "samples", data=images.reshape(2, 9), record=RECORD)
    pd.DataFrame({"step": [1]}).to_csv(folder / "log.csv", index=False)
    return folder


@pytest.fixture
def run(shipped, tmp_path):
    return shutil.copytree(shipped, tmp_path / "run")


def both(run, capsys, odd: str) -> str:
    """Run `report` and `figures`; both name `odd`, do the rest, and end with 1. Returns the page."""
    assert cli.main(["report", str(run), "--no-pdf"]) == 1
    assert cli.main(["figures", str(run), "--out", str(run / "again")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("igpt-lab: ") and odd in line for line in lines), lines
    assert (run / "again" / "samples.png").is_file()
    return (run / "report.html").read_text(encoding="utf-8")


def without_layer_curve(page: str) -> bool:
    return '<figure id="samples"' in page and '<figure id="layer_curve"' not in page and "Left out." in page


@pytest.mark.parametrize("content", NOT_TABLES.values(), ids=NOT_TABLES)
def test_a_csv_that_is_no_table(run, capsys, content):
    (run / "other.csv").write_bytes(content)
    assert cli.main(["report", str(run), "--no-pdf"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("igpt-lab: other.csv is passed over: ")
    page = (run / "report.html").read_text()
    assert "other.csv is passed over" in page and "<code>log</code>" in page and "<code>layer_curve</code>" in page
    assert cli.main(["figures", str(run), "--out", str(run / "again")]) == 0  # it is no table of a figure
    (run / "layer_curve.csv").write_bytes(content)
    (run / "other.csv").unlink()
    assert without_layer_curve(both(run, capsys, "layer_curve"))


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_a_json_that_is_none(run, capsys, content):
    (run / "layer_curve.json").write_bytes(content)
    page = both(run, capsys, "layer_curve.json")
    assert without_layer_curve(page) and "<code>layer_curve</code>" in page  # its table is shown as it is


@pytest.mark.parametrize("facts", ODD_FACTS, ids=str)
def test_a_json_of_odd_types(run, facts):
    file = run / "layer_curve.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    assert cli.main(["report", str(run), "--no-pdf"]) in (0, 1)
    assert cli.main(["figures", str(run), "--out", str(run / "again")]) in (0, 1)
    assert "<code>samples</code>" in (run / "report.html").read_text() and (run / "again" / "samples.png").is_file()


def test_a_table_with_wrong_columns(run, capsys):
    csv, file = run / "layer_curve.csv", run / "layer_curve.json"
    csv.write_text("control,layer\nmodel,1\n")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"csv_sha256": digest(csv.read_bytes())}))
    assert without_layer_curve(both(run, capsys, "layer_curve.json"))


@pytest.mark.skipif(os.name != "posix", reason="pipes are files")
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["layer_curve.csv", "layer_curve.json"])
def test_only_regular_files_are_read(run, capsys, make, name):
    (run / name).unlink()
    make(run / name)
    assert without_layer_curve(both(run, capsys, name))


def test_a_link_to_itself_is_passed_over(run, capsys):
    (run / "one.csv").symlink_to("two.csv")
    (run / "two.csv").symlink_to("one.csv")
    assert cli.main(["report", str(run), "--no-pdf"]) == cli.main(["figures", str(run)]) == 1
    assert capsys.readouterr().err.count("is no regular file") == 4
    assert (run / "report.html").is_file() and (run / "paper" / "samples.png").is_file()


def test_nothing_is_written_through_a_link(run, tmp_path, capsys):
    (run / "paper").symlink_to(tmp_path)
    assert cli.main(["figures", str(run)]) == 1 and "is a link to a folder outside" in capsys.readouterr().err
    (tmp_path / "mine").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "mine")
    assert cli.main(["report", str(run), "--no-pdf"]) == 0 and (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_a_stray_file_hides_nothing(run):
    whole = report.write_report(run, run.with_suffix(".html"), pdf=False)[0].read_bytes()
    for name in ("._layer_curve.json", "._layer_curve.csv", "._x.csv", ".DS_Store", ".x.png"):
        (run / name).write_bytes(b"\0\5\x16\7")
    assert cli.main(["report", str(run), "--no-pdf"]) == cli.main(["figures", str(run)]) == 0
    assert (run / "report.html").read_bytes() == whole and len(list((run / "paper").iterdir())) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the name")
def test_a_name_that_is_not_utf_8_is_shown_with_question_marks(run, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", printed)
    for kind in ("json", "csv", "png"):
        shutil.copy(run / f"samples.{kind}", os.fsencode(run / "caf") + b"\xe9." + kind.encode())
    assert cli.main(["report", str(run), "--no-pdf"]) == cli.main(["figures", str(run)]) == 0
    assert os.fsencode(run / "paper" / "caf") + b"\xe9.pdf\n" in printed.buffer.getvalue()
    assert "<code>caf?</code>" in (run / "report.html").read_text(encoding="utf-8")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


FIELDS = "config commit seed versions drawing arguments summary csv".split()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FIELDS), value=JSON, raw=st.binary())
def test_whatever_a_file_says_the_others_are_shown(shipped, tmp_path_factory, name, value, raw):
    run = shutil.copytree(shipped, tmp_path_factory.mktemp("fuzzed") / "run")
    file = run / "layer_curve.json"
    facts = json.loads(file.read_text())
    if name == "csv":
        file.with_suffix(".csv").write_bytes(raw)
    elif name == "summary":
        (run / "summary.json").write_text(json.dumps(value))
    elif name == "arguments":
        facts["drawing"]["arguments"]["table"] = value
    else:
        facts[name] = value
    file.write_text(json.dumps(facts))
    page = report.page(report.read(run))
    assert '<figure id="samples"' in page and "<code>log</code>" in page
    if name in ("drawing", "arguments"):
        with pytest.raises(ValueError):
            redraw(file)


def unfolds(folder, function, arguments):
    """A small figure file that asks for much."""
    folder.mkdir()
    csv = b"x\n1\n"
    (folder / "a.csv").write_bytes(csv)
    drawing = {"function": function, "arguments": arguments, "style": "paper"}
    (folder / "a.json").write_text(json.dumps({"csv_sha256": digest(csv), "drawing": drawing}))
    return folder / "a.json"


def zeros(*shape: int) -> dict:
    packed = base64.b64encode(zlib.compress(bytes(10**6))).decode()
    return {"array": packed, "dtype": "|u1", "shape": list(shape)}


def pairs(count: int) -> dict:
    rows = "".join(f"{i},{i},1,9,1\n" for i in range(count))
    return {"csv": "layer,other_layer,cka,n,batches\n" + rows}


def compared(count: int) -> dict:
    rows = "".join(f"m{i},,1,0.5,0.4,0.6,True\n" for i in range(count))
    return {"csv": "model,control,layer,test_accuracy,low,high,chosen\n" + rows}


@pytest.mark.parametrize(
    "function, arguments, words",
    [
        ("gallery", {"images": zeros(10**5, 10**5)}, "arrays have 10,000,000,000 bytes"),
        ("gallery", {"images": [zeros(10**4, 10**4) for _ in range(9)]}, "arrays have 900,000,000 bytes"),
        ("gallery", {"images": zeros(1, 1000, 1000), "scale": 50}, "pixels; expected at most"),
        ("gallery", {"images": zeros(1, 1000, 999)}, "cannot reshape"),
        ("cka_map", {"table": pairs(40_000)}, "40,000 different values of"),
        ("model_comparison", {"table": compared(3000)}, "3,000 different values of model"),
        ("cka_map", {"table": {"csv": "a" + ",a" * 30_000 + "\n1" * 30_000}}, "a table of 900,030,000 cells"),
    ],
)
def test_a_small_file_that_unfolds_to_much_is_refused_before_it_does(tmp_path, function, arguments, words):
    file = unfolds(tmp_path / "a", function, arguments)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"a.json cannot be plotted: .*{words}"):
        redraw(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_file_that_is_too_large_is_not_read(run, capsys):
    with (run / "layer_curve.csv").open("r+b") as file:
        file.truncate(10**12)  # a hole in a file takes no disk
    assert without_layer_curve(both(run, capsys, "layer_curve.csv has 1,000,000,000,000 bytes"))


@pytest.mark.skipif(os.name != "posix", reason="`head` is a program")
def test_a_pipe_that_closes_ends_quietly(run):
    command = f"{sys.executable} -m igpt_lab figures {run} | head -c 0"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
