"""The folders of runs: where one writes, where the shipped ones are, what one ends with, how it becomes shipped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from igpt_lab.app import notebooks
from igpt_lab.core.arguments import checked, local
from igpt_lab.core.display import MODEL, control_names, p_number
from igpt_lab.core.provenance import atomic_write

if TYPE_CHECKING:
    import pandas as pd

MINE = "results/mine"  # of the user, git-ignored; what is shipped lies beside it


def run_name(model: str, images: str, *, quick: bool = False) -> str:
    """`<model>-<images>`, the name of the folder of a run; `-quick` behind it for one on few images.

    >>> run_name("openai/imagegpt-small", "../photos of 2024")
    'imagegpt-small-photos-of-2024'
    """
    from igpt_lab.images.sources import title_of

    name = f"{title_of(model)}-{title_of(images)}" + "-quick" * quick
    return re.sub(r"[^\w.]+", "-", name).strip("-")


@checked
def results_folder(
    model: str, images: str, out: str | None = None, *, quick: bool = False, under: str = f"../{MINE}"
) -> str:
    """The folder for the figures, tables and feature stores of a model on an image set; it is made.

    Args:
        model: Bundled name, folder or Hub name of the model.
        images: Bundled name, folder, file or Hub name of the images.
        out: The folder itself; None for UNDER/<model>-<images>, where `run.json` says whose it is.
        quick: It is for a run on few images, which has a folder of its own.
        under: The folder above; the default is that of a notebook, `results/mine` beside its folder.

    Returns:
        The path with forward slashes.

    Raises:
        ValueError: `out` is a file, or the folder is that of another model or image set whose name is the same.

    Example:
        >>> lab.results_folder("fashion-xs", "fashion-mini", under="mine")
        'mine/fashion-xs-fashion-mini'
    """
    if out is not None:
        made = local(out)
        if made.exists() and not made.is_dir():
            raise ValueError(f"{out} is a file; expected a folder for the results, which may be new")
        made.mkdir(parents=True, exist_ok=True)
        return str(made) if str(out).startswith("~") else str(out)
    folder = Path(under) / run_name(model, images, quick=quick)
    run = {"images": _full(images), "model": _full(model)}
    note = folder / "run.json"
    noted = _noted(note) if note.is_file() else run
    if noted != run:
        raise ValueError(
            f"{folder} is of {noted['model']} on {noted['images']}, not of {run['model']} on {run['images']}; "
            f"choose another folder as `out`, or rename that one"
        )
    atomic_write(note, json.dumps(run, indent=2) + "\n")
    return folder.as_posix()


def _noted(note: Path) -> dict:
    """What run.json says of whose results a folder has."""
    try:
        noted = json.loads(note.read_bytes())
        return {name: noted[name] for name in ("images", "model")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{note} does not say whose results these are (expected `images` and `model` in json); delete it where "
            f"they are yours, or choose another folder as `out`"
        ) from error


def shipped(model: str, images: str) -> Path:
    """The folder of the reference run of a model and image set, whether there is one or not."""
    return notebooks.notebooks().parent / "results" / run_name(model, images)


def begin_run(model: str, images: str, out: str | None, *, quick: bool, renewal: bool) -> Path:
    """The folder that a run of the notebooks writes to; ValueError where it must not write there."""
    if renewal and (out is not None or quick):
        raise ValueError("a reference is a full run in a folder of its own; leave out --out and --quick")
    if renewal and not tracked(notebooks.notebooks()):
        raise ValueError(
            f"git does not keep {notebooks.notebooks()}; a reference is renewed in a clone of the repository"
        )
    mine = notebooks.notebooks().parent / MINE if renewal else Path(MINE)
    if renewal:  # what a store that is there already spares is told in the notebooks: begin without
        shutil.rmtree(mine / run_name(model, images), ignore_errors=True)
    folder = Path(results_folder(model, images, out, quick=quick, under=str(mine))).resolve()
    if tracked(folder):
        raise ValueError(f"git keeps files in {folder}, which a run would write over; leave out --out, or give another")
    return folder


def values_of_run(model: str, images: str, folder: Path, *, quick: bool) -> dict:
    """The notebooks' parameters for a run into `folder`; `out` is left as it is where that is their own default."""
    values = {"model": _full(model), "images": _full(images)} | (notebooks.QUICK if quick else {})
    default = (notebooks.notebooks().parent / MINE / run_name(model, images)).resolve()
    return values if folder == default else values | {"out": str(folder)}


def conclude(folder: Path, facts: dict) -> str:
    """Write the summary of a run of `facts` (model, images, quick, seconds by notebook) and return it as text.

    summary.json has the main numbers and a verdict on each against the shipped run, or why there is none;
    reference.csv has the numbers of both; summary.txt is the text.
    """
    from igpt_lab.app import reference

    numbers = summary(folder) | facts
    target = shipped(facts["model"], facts["images"])
    (folder / "reference.csv").unlink(missing_ok=True)
    try:
        if facts["quick"]:
            raise LookupError("a run on few images is not compared")
        table = reference.hold_against(folder, target)
    except LookupError as error:
        numbers["reference"], judged = str(error), f"against the reference: {error}"
    else:
        numbers["reference"] = dict(zip(table.number, table.verdict, strict=True))
        judged = f"held against results/{target.name}:\n{reference.describe(table)}"
        atomic_write(folder / "reference.csv", table.to_csv(index=False))
    low, high = numbers["chosen_interval"]
    text = (
        f"{numbers['model']} on {numbers['images']}, {numbers['test_rows']:,} test images\n"
        f"chosen layer {numbers['chosen_layer']} of 0..{numbers['n_layers']}: {numbers['chosen_accuracy']:.1%} "
        f"[{low:.1%}, {high:.1%}]\n"
        f"first, last  {numbers['first_accuracy']:.1%}, {numbers['last_accuracy']:.1%}\n"
        f"{about_curve(*_curve(folder))}\n{times_in_words(facts['seconds'])}\n{judged}"
    )
    atomic_write(folder / "summary.json", json.dumps(numbers, indent=2, sort_keys=True) + "\n")
    atomic_write(folder / "summary.txt", text + "\n")
    return text


def times_in_words(seconds: dict[str, float]) -> str:
    """How long the notebooks took, in 80 columns, from the seconds of each."""
    parts = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    return textwrap.fill(f"{sum(seconds.values()):.0f} s: {parts}", 80)


def about_curve(rows: pd.DataFrame, comparison: dict) -> str:
    """A layer curve's drop with its intervals, and how sure the choice of the layer is, a line each."""
    from igpt_lab.core.chosen import about_choice, difference_in_words

    p = f"p {p_number(comparison['p_value'], '= ')} (McNemar's exact test)"
    return "\n".join([f"chosen less last: {difference_in_words(comparison)}, {p}", *about_choice(rows)])


def summary(out: Path) -> dict:
    """The layer curve's main numbers, read from the files that the notebooks left."""
    rows, comparison = _curve(out)
    ours = rows.set_index("layer")
    chosen = ours[ours.chosen.astype(str) == "True"].iloc[0]
    return {
        "n_layers": int(ours.index.max()),
        "chosen_layer": int(chosen.name),
        "chosen_accuracy": float(chosen.test_accuracy),
        "chosen_interval": [float(chosen.low), float(chosen.high)],
        "first_accuracy": float(ours.test_accuracy[ours.index.min()]),
        "last_accuracy": float(ours.test_accuracy[ours.index.max()]),
        "p_value": float(comparison["p_value"]),
        "test_rows": int(chosen.n_test),
    }


def _curve(folder: Path) -> tuple[pd.DataFrame, dict]:
    """The layer curve that notebook 2 left: the model's own rows, and the chosen layer against the last."""
    import pandas as pd

    table = pd.read_csv(folder / "layer_curve.csv", keep_default_na=False)
    comparison = json.loads((folder / "layer_curve.json").read_text())["config"]["comparison"]
    return table[control_names(table.control) == MODEL], comparison


def renew(run: Path, target: Path) -> list[Path]:
    """Make a run the shipped one: its figures and tables into `target`, its notebooks into the checkout's.

    Notebooks that ran with other parameters than their own are left out. Returns the files written.
    """
    kinds = {".csv", ".json", ".png", ".pdf", ".svg"}
    left = {"run.json", "reference.csv", "summary.json"}  # of this machine, or against the run that is replaced
    own = [file for file in run.glob("[!.]*") if file.suffix in kinds and file.name not in left]
    copies = {file: target / file.name for file in own}
    for file in (run / "notebooks").glob("*.ipynb"):
        if "injected-parameters" not in file.read_text(encoding="utf-8"):
            copies[file] = notebooks.notebooks() / file.name
    target.mkdir(parents=True, exist_ok=True)
    written = [atomic_write(copy, file.read_bytes()) for file, copy in sorted(copies.items())]
    if (run / "summary.json").is_file():
        numbers = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        del numbers["reference"]
        text = json.dumps(numbers, indent=2, sort_keys=True) + "\n"
        written.append(atomic_write(target / "summary.json", text))
    return written


def tracked(path: Path) -> bool:
    """Whether git keeps a file at or under `path` in the checkout of the notebooks."""
    command = ["git", "ls-files", "--", str(path)]
    try:
        listed = subprocess.run(command, cwd=notebooks.notebooks().parent, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and bool(listed.stdout)


def _full(name: str) -> str:
    """A folder or file as a whole path, any other name as it is."""
    path = local(name)
    return str(path.resolve()) if path.exists() else str(name)
