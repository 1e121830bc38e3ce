"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--out FOLDER]`.

A benchmark is a module here with a function `rows(quick)` that yields rows of `harness.row`. Each leaves NAME.csv and
NAME.md in results/mine/benchmarks. `--quick` is for seeing that it runs: tiny shapes, files in build/benchmarks. The
shipped tables lie in results/benchmarks, a folder for each processor; maintainers name it with `--out`.
"""

import argparse
import importlib
import os
import time
from functools import partial

NAMES = "home pixels extract probes sample train cluster explorer explaining reproduce gpu".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all but gpu when not given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", help="folder of the results")
    parser.add_argument("--threads", type=int, default=2, help="of each process (2)")
    options = parser.parse_args()
    if wrong := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {wrong.pop()!r}; there are {', '.join(NAMES)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported; child processes inherit it

    from benchmarks import harness

    for name in options.names or NAMES[:-1]:  # `make gpu` runs the last
        rows, begun = [], time.perf_counter()
        command = f"make bench BENCH={name}" + " ARGS=--quick" * options.quick
        folder = options.out or ("build/benchmarks" if options.quick else "results/mine/benchmarks")
        module = importlib.import_module(f"benchmarks.{name}")
        write = getattr(module, "write", partial(harness.write, name))
        for row in module.rows(options.quick):
            print(harness.line(row), flush=True)
            rows.append(row)
            path = write(rows, folder, command)  # an interruption keeps what was measured
        print(f"{path}, after {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
