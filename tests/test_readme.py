"""README's numbers are those of the shipped runs, and its table of differences is that of the tests."""

import ast
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
FASHION = ROOT / "results/fashion-xs-fashion-mini"
CIFAR10 = ROOT / "results/cifar10-xs-cifar10"
INTEL, AMD = (ROOT / "results/benchmarks" / name for name in ("intel-xeon", "amd-epyc"))
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_speed_of_images_to_tokens():
    table = pd.read_csv(INTEL / "pixels.csv")
    cold, warm = table[table.case.str.startswith("ImageGPTImageProcessorPil, Pillow images")].itertuples()
    said = " ".join(TEXT.split())
    assert f"{cold.ratio:.1f} times as fast as with the port's Pillow class, {warm.ratio:.1f} times once" in said
    assert f"{cold.ours:,.0f} and {warm.ours:,.0f} images/s against {cold.peer:,.0f}" in said
    assert "cold, 10,000 of CIFAR-10" in cold.case and "warm" in warm.case and "10,000 CIFAR-10 images" in said


def test_speed_of_extraction():
    table = pd.read_csv(AMD / "extract.csv")
    said = " ".join(TEXT.split())

    def ours(case, metric="speed"):
        return table[(table.case == case) & (table.metric == metric)].iloc[0]

    record, extract = (ours(f"24 x 512, float32, {name}") for name in ("record", "extract"))
    assert f"{record.ours:.2f} images/s in `record`, {extract.ours:.2f} in `extract`, against {record.peer:.3f}" in said
    assert f"{record.ratio:.2f} and {extract.ratio:.2f} times (the aim was 2.5)" in said and extract.ratio > 2.5
    shares = table[table.metric.str.startswith("share") & (table.case == record.case)].ours
    assert "at {:.0%} of the machine's matrix-multiply rate ({:.0%} with".format(*shares) in said
    assert f"through oneDNN too, {ours('24 x 512, bfloat16, record').ratio:.2f} times" in said
    assert f"take {1 / ours('24 x 512, float32, layers 0..12 only', 'time').ratio:.2f} of the time" in said
    peaks = {
        count: ours(f"fashion-xs, N = {count}", "peak memory").ours / 1000 for count in ("1,000", "4,000", "16,000")
    }
    assert "at {:.2f} GB for 1,000 images, {:.2f} for 4,000 and {:.2f} for 16,000".format(*peaks.values()) in said
    small = [ours(f"fashion-xs at 4 x 4 pixels, N = {n}", "peak memory").ours / 1000 for n in ("16,000", "64,000")]
    assert "at 4 x 4 pixels {:.2f} GB for 16,000 and {:.2f} for 64,000".format(*small) in said


def test_time_of_two_workers():
    table = pd.read_csv(INTEL / "cluster.csv")
    seconds, share = table.ours
    said = " ".join(TEXT.split())
    assert f"one thread each take {share:.2f} of the time of one such worker, {seconds:.1f} s against" in said
    assert f"{table.peer[0]:.1f} s for 48 images" in said and "N = 48" in table.case[0] and share <= 0.6


def test_speed_of_drawing():
    table = pd.read_csv(AMD / "sample.csv")
    steps = table[(table.metric == "step")].set_index("case")
    for case, row in steps.iterrows():
        name = "size S" if "(S)" in case else "`fashion-xs`' shape"
        cells = [name + ", " + case.split()[-4], *(f"{value:.3g}" for value in (row.ours, row.peer, row.ratio))]
        assert [float(x) for x in cells[1:]] in [
            [float(x) for x in line[1:]] for line in drawing_rows() if line[0] == cells[0]
        ], cells
    share = (
        table[table.case.str.contains("8 at") & table.case.str.contains("(S)", regex=False)].set_index("metric").ours
    )
    said, last = " ".join(TEXT.split()), table[table.metric.str.startswith("step at")].ours
    assert f"it reads {share['share of the bandwidth']:.0%} of the 41.0 GB/s" in said
    assert f"and {share['share of the float32 matrix-multiply rate']:.0%} of its matrix-multiply rate" in said
    assert steps.loc["24 x 512 (S), 16 x 16 pixels, 8 at a time"].ratio >= 2.5  # the floor
    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f} ms at positions".format(*last) in said


def drawing_rows():
    return [[cell.strip() for cell in row] for row in re.findall(r"^  \|(.+, \d+) \|(.+)\|(.+)\|(.+)\|$", TEXT, re.M)]


def test_speed_of_a_training_step():
    table = pd.read_csv(AMD / "train.csv")
    table = table[table.metric == "training"]
    for case, rows in table.groupby("case"):
        cells = [f"{row.ours:,.0f} | {row.peer:,.0f} | {row.ratio:.2f}" for row in rows.itertuples()]
        assert rows.peer_name.str.startswith(("transformers", "nanoGPT")).tolist() == [True, True]
        assert f"| {case} | {' | '.join(cells)} |" in TEXT


def test_speed_of_the_explorer():
    table = pd.read_csv(INTEL / "explorer.csv").set_index("metric")
    step, slowest = table.loc["step of the slider"], table.loc["slowest step"]
    assert f"layers takes {step.ours:.1f} ms, {slowest.ours:.0f} ms at most" in " ".join(TEXT.split())
    assert f"takes {step.peer:.1f} ms, without" in " ".join(TEXT.split()) and slowest.ours < 150


def test_likeness_of_samples():
    table = pd.read_csv(FASHION / "likeness.csv").set_index("measure")
    for measure, scale, digits in (("palette", 1, 3), ("patches", 1, 3), ("classifier", 100, 1)):
        row = scale * table.loc[measure]
        for value, low, high in ((row.value, row.low, row.high), (row.floor, row.floor_low, row.floor_high)):
            unit = "%" if scale == 100 else ""
            assert f"| {value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}] |" in TEXT
    assert table.samples.eq(400).all() and table.images.eq(3600).all()


def test_every_difference_is_shown_and_every_one_shown_is_named():
    tree = ast.parse((ROOT / "tests/models/test_differences.py").read_text(encoding="utf-8"))
    there = [it.name for it in tree.body if isinstance(it, ast.FunctionDef) and it.name.startswith("test_")]
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|([^|]+)\| (accident|choice) \| `(test_\w+)` \|$", TEXT, re.MULTILINE)
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
