"""`igpt-lab reproduce --all` on the bundled model and images: the seconds of each notebook, with kernel and figures.

Downloads and installation are not counted. There is no peer.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import row
from igpt_lab.app import cli, notebooks


def rows(quick: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        if cli.main(["reproduce", "--all", "--out", f"{folder}/run"] + ["--quick"] * quick):
            raise RuntimeError("igpt-lab reproduce failed")
        seconds = json.loads(Path(folder, "run/summary.json").read_text(encoding="utf-8"))["seconds"]
    sums = {
        "make reproduce": sum(taken for name, taken in seconds.items() if name not in notebooks.LONG),
        "make reproduce ARGS=--all": sum(seconds.values()),
    }
    for case, taken in (seconds | sums).items():
        yield row(case, "time", "s", taken, runs=1)
