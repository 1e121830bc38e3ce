"""Transformers' own tests of ImageGPT, on our classes: what fails is in the table of differences, with a reason.

Optional: `IGPT_LAB_TRANSFORMERS` names a checkout of transformers' repository, of the version that is installed.
"""

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (
    (TESTS.parent / "docs" / "differences.md").read_text().partition("## Transformers' own tests")[2].split("\n## ")[0]
)
REASONS = dict(re.findall(r"^\| `([\w*]+)` \| (.+) \|$", PAGE, re.MULTILINE))
COUNTS = {
    file: tuple(map(int, numbers.split(" | ")))
    for file, numbers in re.findall(r"^\| ([a-z ]+) \| (\d[\d |]*\d) \|$", PAGE, re.MULTILINE)
}
CLASSES = {"modeling": "ImageGPTModelTest", "image processing": "ImageGPTImageProcessingTest"}


def outcomes(folder: str, whose: str, kept: Path) -> dict[str, str]:
    """What came of each method of transformers' tests, on our classes or on theirs."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "IGPT_LAB_CLASSES": whose, "IGPT_LAB_OUTCOMES": str(kept / whose)}
    command = "-m pytest -q -p in_transformers -p no:cacheprovider -W ignore tests/models/imagegpt"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=folder,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (kept / whose).exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((kept / whose).read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Outcomes on theirs and on ours, of the methods that pass on theirs."""
    folder = os.environ.get("IGPT_LAB_TRANSFORMERS")
    if not folder:
        pytest.skip("IGPT_LAB_TRANSFORMERS names no checkout of transformers' repository")
    kept = tmp_path_factory.mktemp("outcomes")
    theirs, ours = (outcomes(folder, whose, kept) for whose in ("theirs", "ours"))
    return {name: ours[name] for name, outcome in theirs.items() if outcome == "passed"}


def test_the_reasons_are_read():
    assert REASONS
    assert all(reason.strip() for reason in REASONS.values())
    assert set(CLASSES) <= set(COUNTS)


def test_what_fails_of_transformers_own_tests_has_a_reason(both):
    failed = {name.partition(".")[2].partition("[")[0] for name, outcome in both.items() if outcome == "failed"}
    assert not {name for name in failed if not any(fnmatch(name, pattern) for pattern in REASONS)}
    assert not {pattern for pattern in REASONS if not any(fnmatch(name, pattern) for name in failed)}


@pytest.mark.parametrize("file", CLASSES)
def test_as_many_pass_as_the_table_says(both, file):
    of_file = [outcome for name, outcome in both.items() if name.startswith(CLASSES[file])]
    if len(of_file) != COUNTS[file][0]:
        pytest.skip(
            f"this checkout has {len(of_file)} methods that pass on transformers' classes, not {COUNTS[file][0]}"
        )
    assert tuple(map(of_file.count, ("passed", "failed", "skipped"))) == COUNTS[file][1:]
