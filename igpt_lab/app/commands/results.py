"""Commands over folders of results and notebooks: figures, report, reproduce, lab."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import igpt_lab as lab
from igpt_lab.app import notebooks, runs
from igpt_lab.app.by_run import folders_of, grouped, warning_of
from igpt_lab.app.commands.options import IMAGES, LIST, MODEL, argument, command
from igpt_lab.core.arguments import local


@command(
    argument("folder", help="folder of results, or one whose folders are"),
    argument(
        "--style",
        default="paper",
        help="paper (one column), wide (two) or talk (slides); or a style of matplotlib, or the path of an mplstyle",
    ),
    argument("--out", help="folder for the figures; FOLDER itself replaces them (default: FOLDER/STYLE)"),
    examples=("results/mine/fashion-xs-fashion-mini", "results/mine/photos --style talk --out slides"),
)
def figures(folder: str, style: str, out: str | None) -> int:
    """Draw every figure of a results folder again, from its table, in a style: seconds, and no model is needed."""
    from igpt_lab.app import saved
    from igpt_lab.figures.style import resolved

    source, name = local(folder), Path(style).stem
    resolved(style)  # a wrong one is told once, before any figure
    folders = folders_of(source)
    odd: dict[str, str] = {}
    titles = []
    for run in folders:
        target = (local(out) if out else run / name) if len(folders) == 1 or not out else local(out) / run.name
        if not out and not saved.is_inside(target, run):
            raise ValueError(f"{target} is a link to a folder outside {run}; give --out")
        own, wrong = saved.own_files(run)
        files = {file.stem: file for file in own if file.suffix == ".json" and file.with_suffix(".csv") in own}
        odd |= {f"{run}/{file}": words for file, words in wrong.items()}
        for title, names in _by_run(files).items():
            titles.append(title)
            odd |= _drawn_again([files[stem] for stem in names], target, style)
    warning = warning_of(list(dict.fromkeys(titles)))
    _tell([*odd.values(), *filter(None, [warning])])
    if not titles:
        raise ValueError(
            f"{folder} has no figures (NAME.json beside NAME.csv); expected a folder of figures that igpt-lab wrote"
        )
    return int(bool(odd))


def _by_run(files: dict[str, Path]) -> dict[str, list[str]]:
    """Names of figures by the title of their run."""
    from igpt_lab.figures.saving import read_json

    configs: dict[str, object] = {}
    for name, file in files.items():
        try:
            facts = read_json(file)
        except (ValueError, OSError):  # `redraw` says what is wrong with it
            facts = {}
        configs[name] = facts.get("config") if isinstance(facts, dict) else {}
    return {str(run): names for run, names in grouped(configs).items()}


def _drawn_again(files: list[Path], target: Path, style: str) -> dict[str, str]:
    """Draw figures into a folder and print where; why one cannot be drawn, by its file."""
    odd = {}
    for file in files:
        try:
            picture = lab.figures.redraw(file, target / file.stem, style=style)[1]
        except (ValueError, OSError) as error:
            odd[str(file)] = str(error)
        else:
            print(picture)
    return odd


def _paper(name: str) -> str:
    """A size of paper, in whatever case it was written."""
    return "A4" if name.lower() == "a4" else name.lower()


@command(
    argument("run", help="folder of results, or one whose folders are"),
    argument("--out", metavar="FILE", help="file of the page (default: RUN/report.html)"),
    argument("--no-pdf", dest="pdf", action="store_false", help="write the page only"),
    argument("--paper", default="A4", type=_paper, choices=["A4", "letter"], help="size of a page of the pdf"),
    examples=("results/mine/fashion-xs-fashion-mini", "results/mine/photos --no-pdf --out page.html"),
)
def report(run: str, out: str | None, pdf: bool, paper: str) -> int:
    """One HTML page of a results folder: figures, tables, provenance, doubts; and a pdf where there is a Chromium.

    Of a folder that has several runs the page has a part for each, and a line on top says so. Exit code 1 where a file
    is passed over; the page says so, too.
    """
    from igpt_lab.app.report import read, warning_about, write_report

    results = [read(path) for path in folders_of(local(run))]
    odd = [words for one in results for words in one.odd.values()]
    _tell([*odd, *filter(None, [warning_about(results)])])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: _tell([str(message)])
        written = write_report(results, out, pdf=pdf, paper=paper)
    print(*written, sep="\n")
    if pdf and len(written) == 1:
        _tell(["no Chromium is installed, so there is no pdf; print the page from any browser"])
    return int(bool(odd))


@command(
    argument("--model", default="fashion-xs", help=MODEL.help),
    argument("--images", default="fashion-mini", help=IMAGES.help),
    argument("--out", help=f"folder for figures, tables and executed notebooks (default: {runs.MINE}/MODEL-IMAGES)"),
    argument("--quick", action="store_true", help="a smoke test on few images"),
    argument("--all", dest="every", action="store_true", help=f"the long notebooks too: {', '.join(notebooks.LONG)}"),
    argument(
        "--only",
        **LIST,
        choices=notebooks.NOTEBOOKS,
        metavar="NOTEBOOK",
        help="only these notebooks, such as 02_layer_probe (default: all but the long ones)",
    ),
    argument("--renew-reference", dest="renewal", action="store_true", help="for maintainers: replace the shipped run"),
    examples=("--quick", "--model runs/mine --images photos --only 02_layer_probe"),
)
def reproduce(
    model: str, images: str, out: str | None, quick: bool, only: list[str] | None, every: bool, renewal: bool
) -> int:
    """Execute the notebooks in order and hold their numbers against those of the shipped run; OUT keeps all of it.

    Exit code 0 where numbers differ, too: another processor may move them. 1 where a notebook fails.
    """
    names = [name for name in notebooks.NOTEBOOKS if (name in only if only else every or name not in notebooks.LONG)]
    lab.load_model(model), lab.load_images(images, "test", limit=1)  # a wrong name is told before any work
    folder = runs.begin_run(model, images, out, quick=quick, renewal=renewal)
    values, seconds = runs.values_of_run(model, images, folder, quick=quick), {}
    for number, name in enumerate(names, 1):
        begun = time.perf_counter()
        own = {key: value for key, value in values.items() if key in notebooks.parameters(name)}
        failed = notebooks.run_notebook(name, own, folder, f"{number}/{len(names)} {name}")
        if failed:
            print(f"igpt-lab: {failed}", file=sys.stderr)
            return 1
        seconds[name] = round(time.perf_counter() - begun, 1)
    if notebooks.CURVE in names:
        facts = {"model": model, "images": images, "quick": quick, "seconds": seconds}
        print(runs.conclude(folder, facts))
    print(f"figures and tables: {folder}")
    if renewal:
        print("renewed:", *runs.renew(folder, runs.shipped(model, images)), sep="\n")
    return 0


@command(
    argument("folder", nargs="?", default="workbench", help="folder for notebooks/, photos/ and results/"),
    argument("--port", type=int, default=8888, help="port of the server; the next free one where it is taken"),
    argument("--no-browser", action="store_false", dest="browser", help="print the address, and open no browser"),
    name="lab",
    examples=("", "workbench --no-browser --port 9000"),
)
def open_lab(folder: str, port: int, browser: bool) -> None:
    """Open JupyterLab on FOLDER, with a copy of the notebooks and room for photos; your edits are never overwritten."""
    home = local(folder)
    notebooks.begin_workbench(home)
    notebooks.open_lab(home, first=f"notebooks/{notebooks.NOTEBOOKS[0]}.ipynb", port=port, browser=browser)


def _tell(lines: Iterable[str]) -> None:
    """Each on a line of stderr."""
    for line in lines:
        print(f"igpt-lab: {line}", file=sys.stderr)
