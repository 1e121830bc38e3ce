"""README is short, what it and the pages list is there, and each promise and difference has its test."""

import ast
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DIFFERENCES = (ROOT / "docs/differences.md").read_text(encoding="utf-8")


def test_readme_is_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize(
    ("name", "case", "metric", "column", "low", "high"),
    [
        ("amd-epyc/extract", "24 x 512, float32, extract", "speed", "ratio", 2.5, 1e9),
        ("amd-epyc/sample", "24 x 512 (S), 16 x 16 pixels, 8 at a time", "step", "ratio", 2.5, 1e9),
        (
            "intel-xeon/cluster",
            "4 x 512, float32, N = 48, one thread a worker",
            "time of two workers",
            "ratio",
            1 / 0.6,
            1e9,
        ),
        ("intel-xeon/explorer", "4,000 images, 17 layers", "slowest step", "ours", 0, 150),
    ],
)
def test_a_goal_that_the_benchmarks_call_reached_is(name, case, metric, column, low, high):
    table = pd.read_csv(ROOT / f"results/benchmarks/{name}.csv")
    row = table[(table.case == case) & (table.metric == metric)].iloc[0]
    assert low <= row[column] <= high


def test_every_difference_is_shown_and_every_one_shown_is_named():
    tree = ast.parse((ROOT / "tests/models/test_differences.py").read_text(encoding="utf-8"))
    there = [it.name for it in tree.body if isinstance(it, ast.FunctionDef) and it.name.startswith("test_")]
    rows = re.findall(
        r"^\|([^|]+)\|([^|]+)\|([^|]+)\| (accident|choice) \| `(test_\w+)` \|$", DIFFERENCES, re.MULTILINE
    )
    assert sorted(row[-1] for row in rows) == sorted(there)


def test_every_folder_and_file_of_the_package_is_listed():
    package = ROOT / "igpt_lab"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT.partition("## The package")[2], re.MULTILINE)) == rooms
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = {
        f"{section.partition(':')[0]}/{name}"
        for section in page.split("\n### ")[1:]
        for name in re.findall(r"^\| `([\w/]+)` \|", section, re.MULTILINE)
    }
    files = {
        path.relative_to(package).with_suffix("").as_posix()
        for room in rooms
        for path in (package / room).rglob("*.py")
    }
    assert listed == {file for file in files if not file.endswith("__init__")}


def test_every_test_behind_a_promise_is_there():
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (?!promise|-)[^|]+\|([^|]+)\|$", page, re.MULTILINE)
    assert len(promises) > 30
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", promise)
        files = re.findall(r"\(\.\./(tests/[\w/]+\.py)\)", promise)
        assert named or files, promise
        for file, test in [*named, *((file, "test_") for file in files)]:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {test}" in source, f"{file} has no {test}"
