"""Commands over folders of results and notebooks: figures, report, reproduce, lab."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app import notebooks
from igpt_lab.app.commands.options import IMAGES, MODEL, argument, command
from igpt_lab.core.provenance import atomic_write


@command(
    argument("folder", help="folder of results"),
    argument("--style", default="paper", choices=["paper", "wide", "talk"], help="one column, two columns, slides"),
    argument("--out", help="where they go; the folder itself redraws in place (default: FOLDER/STYLE)"),
)
def figures(folder: str, style: str, out: str | None) -> int:
    """Draw every figure of a results folder again, from its table, in a style: seconds, and no model is needed."""
    files = [file for file in sorted(Path(folder).glob("*.json")) if file.with_suffix(".csv").exists()]
    if not files:
        raise ValueError(f"{folder} has no figures (NAME.json beside NAME.csv); expected a folder of results")
    target = Path(out or Path(folder) / style)
    undrawn = []
    for file in files:
        try:
            print(lab.figures.redraw(file, target / file.stem, style=style)[1])
        except ValueError as error:
            undrawn.append(f"igpt-lab: {error}")
    print(*undrawn, sep="\n", end="\n" if undrawn else "", file=sys.stderr)
    return int(bool(undrawn))


@command(
    argument("run", help="folder of results"),
    argument("--out", metavar="FILE", help="where the page goes (default: RUN/report.html)"),
    argument("--no-pdf", dest="pdf", action="store_false", help="the page only"),
)
def report(run: str, out: str | None, pdf: bool) -> None:
    """One HTML page of a results folder: figures, tables, provenance, doubts; and a pdf where there is a Chromium."""
    from igpt_lab.app.report import write_report

    written = write_report(run, out, pdf=pdf)
    print(*written, sep="\n")
    if pdf and len(written) == 1:
        print(
            "igpt-lab: no Chromium is installed, so there is no pdf; print the page from any browser", file=sys.stderr
        )


@command(
    argument("--model", default="fashion-xs", help=MODEL.help),
    argument("--images", default="fashion-mini", help=IMAGES.help),
    argument("--out", default="results", help="folder for figures, tables and executed notebooks"),
    argument("--quick", action="store_true", help="few images, in a few minutes: to see that it runs"),
    argument(
        "--only",
        action="append",
        choices=notebooks.NOTEBOOKS,
        metavar="NOTEBOOK",
        help="this one, may be given again (default: all)",
    ),
)
def reproduce(model: str, images: str, out: str, quick: bool, only: list[str] | None) -> int:
    """Execute the notebooks in order, keep them under OUT, and print what they found."""
    names = [name for name in notebooks.NOTEBOOKS if not only or name in only]
    begun, folder = time.perf_counter(), Path(out).resolve()
    model_path, images_path = (str(Path(it).resolve()) if Path(it).exists() else it for it in (model, images))
    values: dict[str, Any] = {"model": model_path, "images": images_path, "out": str(folder)}
    lab.load_model(model), lab.load_images(images, "test", limit=1)  # a wrong name is told before any work
    values |= notebooks.QUICK if quick else {}
    for number, name in enumerate(names, 1):
        failed = notebooks.run_notebook(name, values, folder, f"{number}/{len(names)} {name}")
        if failed:
            print(f"igpt-lab: {failed}", file=sys.stderr)
            return 1
    if notebooks.CURVE not in names:
        print(f"figures and tables: {folder}")
        return 0
    summary = notebooks.summary(folder) | {
        "model": model,
        "images": images,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")
    low, high = summary["best_interval"]
    print(
        f"{model} on {images}, {summary['test_rows']:,} test images, {summary['seconds']:.0f} s\n"
        f"best layer   {summary['best_layer']} of 0..{summary['n_layers']}: {summary['best_accuracy']:.1%} "
        f"[{low:.1%}, {high:.1%}]\n"
        f"first, last  {summary['first_accuracy']:.1%}, {summary['last_accuracy']:.1%}\n"
        f"best against last, same test images: p = {summary['p_value']:.2g} (McNemar's exact test)\n"
        f"figures and tables: {folder}"
    )
    return 0


@command(
    argument("folder", nargs="?", default="workbench", help="notebooks/ and results/ go into it"),
    argument("--port", type=int, default=8888, help="the next free one where it is taken"),
    argument("--no-browser", action="store_false", dest="browser", help="print the address, open nothing"),
    name="lab",
)
def open_lab(folder: str, port: int, browser: bool) -> None:
    """Open JupyterLab on FOLDER, with a copy of the notebooks in it; your edits are never overwritten."""
    copied, there = notebooks.copy_notebooks(notebooks.notebooks(), Path(folder) / "notebooks")
    print(f"{Path(folder) / 'notebooks'}: {len(copied)} notebooks copied, {len(there)} left as they are", flush=True)
    notebooks.open_lab(Path(folder), first=f"notebooks/{notebooks.NOTEBOOKS[0]}.ipynb", port=port, browser=browser)
