"""The notebooks: where they are, how they are run, what they found; a copy of them, and JupyterLab on it."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from igpt_lab.provenance import atomic_write

NOTEBOOKS = (
    "00_tour",
    "01_features",
    "02_layer_probe",
    "03_few_labels",
    "04_gallery",
    "05_protocol",
    "06_geometry",
    "07_training_dynamics",
    "08_fine_tuning",
)
LONG = ("05_protocol", "07_training_dynamics", "08_fine_tuning")  # run on demand only
CURVE = "02_layer_probe"  # the notebook that the summary is of
QUICK = {"train_rows": 600, "test_rows": 400, "ks": [4, 25], "draws": 2, "samples": 12, "primes": 2, "steps": 3}
MINE = "results/mine"  # of the user, git-ignored; what is shipped lies beside it
MARKER = "papermill-error-cell-tag"  # of the cells that papermill adds to a notebook that failed


def notebooks() -> Path:
    """The folder of the notebooks: of the checkout, in the working directory, or where the wheel put them."""
    checkout = Path(__file__).resolve().parents[1] / "notebooks"
    for folder in (checkout, Path("notebooks").resolve(), Path(sys.prefix) / "share/igpt-lab/notebooks"):
        if (folder / f"{NOTEBOOKS[0]}.ipynb").is_file():
            return folder
    raise FileNotFoundError(f"no folder notebooks/ with {NOTEBOOKS[0]}.ipynb; run this in a clone of the repository")


def run_name(model: str, images: str, *, quick: bool = False) -> str:
    """`<model>-<images>`, the name of the folder of a run; `-quick` behind it for one on few images.

    >>> run_name("openai/imagegpt-small", "../photos of 2024")
    'imagegpt-small-photos-of-2024'
    """
    from igpt_lab.sources import title_of

    name = f"{title_of(model)}-{title_of(images)}" + "-quick" * quick
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def results_folder(
    model: str, images: str, out: str | None = None, *, quick: bool = False, under: str = f"../{MINE}"
) -> str:
    """`out`, or where that is None UNDER/<model>-<images>, which is made: for figures, tables and feature stores.

    The default `under` is that of a notebook, `results/mine` beside its folder. `run.json` in the folder says whose it
    is. Raises ValueError where it is that of another model or image set whose name is the same.
    """
    if out is not None:
        return str(out)
    folder = Path(under) / run_name(model, images, quick=quick)
    run = {"images": _full(images), "model": _full(model)}
    note = folder / "run.json"
    there = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else run
    if there != run:
        raise ValueError(
            f"{folder} is of {there['model']} on {there['images']}, not of {run['model']} on {run['images']}; "
            f"choose another folder as `out`, or rename that one"
        )
    atomic_write(note, json.dumps(run, indent=2) + "\n")
    return folder.as_posix()


def _full(name: str) -> str:
    """A folder or file as a whole path, any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def shipped(model: str, images: str) -> Path:
    """The folder of the reference run of a model and image set, whether there is one or not."""
    return notebooks().parent / "results" / run_name(model, images)


def parameters(name: str) -> dict:
    """The parameters of a notebook and their defaults."""
    import nbformat
    import papermill

    notebook = nbformat.read(notebooks() / f"{name}.ipynb", as_version=4)
    return {key: ast.literal_eval(it["default"]) for key, it in papermill.inspect_notebook(notebook).items()}


def run_notebook(name: str, values: dict, out: Path, label: str) -> str | None:
    """Execute one notebook with `values` into OUT/notebooks; returns what failed, naming the notebook and the cell.

    Values that are the notebook's own defaults are not written into it. Raises ValueError for a name that is no
    parameter of it.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = out / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    literal = str(target).replace("{", "{{").replace("}", "}}")  # papermill formats a path
    notebook = nbformat.read(notebooks() / f"{name}.ipynb", as_version=4)
    reason = ""
    try:
        papermill.execute_notebook(
            notebook, literal, _changed(name, values), kernel_name="python3", cwd=notebooks(),
            progress_bar={"desc": label}, record_timing=False, store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "the kernel died"
    executed = nbformat.read(target, as_version=4)
    begun = sum(bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in executed.cells)
    _tidy(executed)
    atomic_write(target, nbformat.writes(executed) + "\n")
    return f"notebook {name}, cell {begun} failed: {reason}" if reason else None


def _changed(name: str, values: dict) -> dict:
    """Those of `values` that are not a notebook's defaults; papermill itself takes any name."""
    own = parameters(name)
    for key in values:
        if key not in own:
            close = difflib.get_close_matches(key, own, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(own)}"
            raise ValueError(f"notebook {name} has no parameter {key!r}; {hint}")
    return {key: value for key, value in values.items() if value != own[key]}


def _tidy(notebook) -> None:
    """Leave in an executed notebook what is the same in every run, and of a widget its page.

    Progress bars go, and what papermill adds: times, error markers, empty tags, a random id.
    """
    widget = "application/vnd.jupyter.widget-view+json"
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.cells = [cell for cell in notebook.cells if MARKER not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output["data"].pop(widget, None)
        cell.outputs = [
            output
            for output in cell.outputs
            if widget not in output.get("data", {})
            and not (output.get("name") == "stderr" and "%|" in output.get("text", ""))
        ]


def tracked(path: Path) -> bool:
    """Whether git keeps a file at or under `path` in the checkout of the notebooks."""
    command = ["git", "ls-files", "--", str(path)]
    try:
        listed = subprocess.run(command, cwd=notebooks().parent, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and bool(listed.stdout)


def begin_run(model: str, images: str, out: str | None, *, quick: bool, renewal: bool) -> Path:
    """The folder that a run of the notebooks writes to; ValueError where it must not write there."""
    if renewal and (out is not None or quick):
        raise ValueError("a reference is a full run in a folder of its own; leave out --out and --quick")
    if renewal and not tracked(notebooks()):
        raise ValueError(f"git does not keep {notebooks()}; a reference is renewed in a clone of the repository")
    mine = notebooks().parent / MINE if renewal else Path(MINE)
    if renewal:  # what a store that is there already spares is told in the notebooks: begin without
        shutil.rmtree(mine / run_name(model, images), ignore_errors=True)
    folder = Path(results_folder(model, images, out, quick=quick, under=str(mine))).resolve()
    if tracked(folder):
        raise ValueError(f"git keeps files in {folder}, which a run would write over; leave out --out, or give another")
    return folder


def values_of_run(model: str, images: str, folder: Path, *, quick: bool) -> dict:
    """The notebooks' parameters for a run into `folder`; `out` is left as it is where that is their own default."""
    values = {"model": _full(model), "images": _full(images)} | (QUICK if quick else {})
    default = (notebooks().parent / MINE / run_name(model, images)).resolve()
    return values if folder == default else values | {"out": str(folder)}


def conclude(folder: Path, facts: dict) -> str:
    """Write the summary of a run of `facts` (model, images, quick, seconds) and return it as text.

    summary.json has the main numbers and a verdict on each against the shipped run, or why there is none;
    reference.csv has the numbers of both; summary.txt is the text.
    """
    from igpt_lab import reference

    found = summary(folder) | facts
    there = shipped(facts["model"], facts["images"])
    (folder / "reference.csv").unlink(missing_ok=True)
    try:
        if facts["quick"]:
            raise LookupError("a run on few images is not compared")
        table = reference.hold_against(folder, there)
    except LookupError as error:
        found["reference"], judged = str(error), f"against the reference: {error}"
    else:
        found["reference"] = dict(zip(table.number, table.verdict, strict=True))
        judged = f"held against results/{there.name}:\n{reference.describe(table)}"
        atomic_write(folder / "reference.csv", table.to_csv(index=False))
    low, high = found["best_interval"]
    text = (
        f"{found['model']} on {found['images']}, {found['test_rows']:,} test images, {found['seconds']:.0f} s\n"
        f"best layer   {found['best_layer']} of 0..{found['n_layers']}: {found['best_accuracy']:.1%} "
        f"[{low:.1%}, {high:.1%}]\n"
        f"first, last  {found['first_accuracy']:.1%}, {found['last_accuracy']:.1%}\n"
        f"best against last, same test images: p = {found['p_value']:.2g} (McNemar's exact test)\n{judged}"
    )
    atomic_write(folder / "summary.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
    atomic_write(folder / "summary.txt", text + "\n")
    return text


def renew(run: Path, reference: Path) -> list[Path]:
    """Make a run the shipped one: its figures and tables into `reference`, its notebooks into the checkout's.

    Notebooks that ran with other parameters than their own are left out. Returns the files written.
    """
    kinds = {".csv", ".json", ".png", ".pdf", ".svg"}
    left = {"run.json", "reference.csv", "summary.json"}  # of this machine, or against the run that is replaced
    copies = {file: reference / file.name for file in run.iterdir() if file.suffix in kinds and file.name not in left}
    for file in (run / "notebooks").glob("*.ipynb"):
        if "injected-parameters" not in file.read_text(encoding="utf-8"):
            copies[file] = notebooks() / file.name
    reference.mkdir(parents=True, exist_ok=True)
    written = [Path(shutil.copyfile(file, target)) for file, target in sorted(copies.items())]
    if (run / "summary.json").is_file():
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        del found["reference"]
        text = json.dumps(found, indent=2, sort_keys=True) + "\n"
        written.append(atomic_write(reference / "summary.json", text))
    return written


def summary(out: Path) -> dict:
    """The layer curve's main numbers, read from the files that the notebooks left."""
    import pandas as pd

    table = pd.read_csv(out / "layer_curve.csv", keep_default_na=False)
    ours = table[table.control == ""].set_index("layer")
    best = ours[ours.chosen.astype(str) == "True"].iloc[0]
    comparison = json.loads((out / "layer_curve.json").read_text())["config"]["comparison"]
    return {
        "n_layers": int(ours.index.max()),
        "best_layer": int(best.name),
        "best_accuracy": float(best.test_accuracy),
        "best_interval": [float(best.low), float(best.high)],
        "first_accuracy": float(ours.test_accuracy[ours.index.min()]),
        "last_accuracy": float(ours.test_accuracy[ours.index.max()]),
        "p_value": float(comparison["p_value"]),
        "test_rows": int(best.n_test),
    }


def copy_notebooks(source: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks in `source` to `folder`, those that are not there; returns (copied, there already).

    A file that is there is never touched: it may hold the user's edits. Deleted, it is copied anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copied, there = [], []
    for file in sorted(source.glob("*.ipynb")):
        target = folder / file.name
        try:
            with target.open("xb") as written:  # fails where it is there, whoever put it there a moment ago
                written.write(file.read_bytes())
        except FileExistsError:
            there.append(target)
        else:
            copied.append(target)
    return copied, there


def arguments(folder: Path, *, first: str, port: int, browser: bool) -> list[str]:
    """JupyterLab's options: loopback only, a token of its own whatever the user's settings say, and no password."""
    options = [
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.allow_remote_access=False",
        f"--IdentityProvider.token={secrets.token_hex(24)}", "--PasswordIdentityProvider.hashed_password=",
        "--PasswordIdentityProvider.password_required=False", f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{first}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--ServerApp.allow_root=True")  # a container's user; without it Jupyter refuses to start
    return options if browser else [*options, "--ServerApp.open_browser=False"]


def open_lab(folder: Path, *, first: str, port: int = 8888, browser: bool = True) -> None:
    """Run JupyterLab on `folder` until it is stopped, with the notebook `first` open; prints its address.

    In this process, so that the token is on no command line, where other users could read it.
    """
    from jupyterlab.labapp import LabApp

    server = LabApp.initialize_server(arguments(folder.resolve(), first=first, port=port, browser=browser))
    server.identity_provider.token_generated = True  # as this one was: only then does Jupyter print it
    server.start()
