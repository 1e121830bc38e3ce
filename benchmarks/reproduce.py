"""The notebooks on the bundled model and images, as `make reproduce ARGS=--all` runs them: seconds of each.

Kernels and figures are counted, downloads and installation are not. There is no peer.
"""

import tempfile
import time
from collections.abc import Iterator

from benchmarks.harness import row
from igpt_lab.app import cli, notebooks


def rows(quick: bool) -> Iterator[dict]:
    main = [name for name in notebooks.NOTEBOOKS if name not in notebooks.LONG]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for names, command in ((main, "make reproduce"), (notebooks.LONG, "make reproduce ARGS=--all")):
            for name in names:
                begun = time.perf_counter()
                if cli.main(["reproduce", "--only", name, "--out", folder] + ["--quick"] * quick):
                    raise RuntimeError(f"notebook {name} failed")
                seconds[name] = time.perf_counter() - begun
                yield row(name, "time", "s", seconds[name], runs=1)
            yield row(command, "time", "s", sum(seconds.values()), runs=1)
