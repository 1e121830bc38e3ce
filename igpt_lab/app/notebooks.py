"""The notebooks: where they are, how they are run; a copy of them, and JupyterLab on it."""

from __future__ import annotations

import ast
import itertools
import json
import os
import secrets
import site
import sys
from pathlib import Path

from igpt_lab.core.progress import MARK as BAR
from igpt_lab.core.provenance import atomic_write
from igpt_lab.core.values import did_you_mean

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
    "09_why_the_middle",
)
LONG = ("05_protocol", "07_training_dynamics", "08_fine_tuning", "09_why_the_middle")  # run on demand only
CURVE = "02_layer_probe"  # the notebook that the summary is of
QUICK = {
    "train_rows": 600,
    "test_rows": 400,
    "ks": [4, 25],
    "draws": 2,
    "samples": 12,
    "primes": 2,
    "steps": 3,
    "seeds": 1,
}
WORKBENCH = """# Your workbench

- `notebooks/` has copies of the tutorials, which are yours: none is overwritten, and a deleted one is copied anew.
- `photos/` is for your images: `photos/train/CLASS/` and `photos/test/CLASS/`, a folder for each class.
- `results/mine/MODEL-IMAGES/` gets the figures, tables and feature stores of each model and image set. What the
  explorer saves is in its folder `explorer/`, or in `notebooks/explorer/` for a store that is elsewhere.

Open `notebooks/02_layer_probe.ipynb`, write `images = "../photos"` into its first cell, then Run > Run All Cells.
Ctrl-C in the terminal stops JupyterLab, and `igpt-lab lab` with this folder opens it again.
"""
MARKER = "papermill-error-cell-tag"  # of the cells that papermill adds to a notebook that failed


def notebooks() -> Path:
    """The folder of the package's own notebooks: of the checkout that it runs from, or of its installation."""
    root = Path(__file__).resolve().parents[2]
    is_checkout = (root / "pyproject.toml").is_file()
    user = Path(site.getuserbase())  # where `pip install --user` puts packages and data
    base = user if root.is_relative_to(user.resolve()) else Path(sys.prefix)
    folder = root / "notebooks" if is_checkout else base / "share/igpt-lab/notebooks"
    if not (folder / f"{NOTEBOOKS[0]}.ipynb").is_file():
        raise FileNotFoundError(
            f"{folder} has no {NOTEBOOKS[0]}.ipynb; install igpt-lab again, or run it from a clone of the repository"
        )
    return folder


def parameters(name: str) -> dict:
    """The parameters of a notebook and their defaults."""
    import nbformat
    import papermill

    notebook = nbformat.read(notebooks() / f"{name}.ipynb", as_version=4)
    inspected = papermill.inspect_notebook(notebook)
    return {key: ast.literal_eval(parameter["default"]) for key, parameter in inspected.items()}


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
            raise ValueError(f"notebook {name} has no parameter {key!r}; {did_you_mean(key, own)}")
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
            and output.get("metadata") != BAR
            and not (output.get("name") == "stderr" and "%|" in output.get("text", ""))
        ]


def begin_workbench(folder: Path) -> None:
    """Make a folder the user's own: a README that says what is where, room for photos, the notebooks.

    What is there is left as it is.
    """
    copy_notebooks(notebooks(), folder / "notebooks")
    (folder / "photos").mkdir(exist_ok=True)
    if not os.path.lexists(folder / "README.md"):
        atomic_write(folder / "README.md", WORKBENCH)


def copy_notebooks(source: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks in `source` to `folder`, those that are not there; returns (copied, there already).

    A notebook that is there is never touched: it may hold the user's edits. Deleted, it is copied anew. One that is cut
    or damaged, so that JupyterLab cannot open it, is kept under another name, which stderr tells.
    """
    copied, there = [], []
    for file in sorted(source.glob("[!.]*.ipynb")):
        target = folder / file.name
        if os.path.lexists(target) and not _is_damaged(target):
            there.append(target)
            continue
        if os.path.lexists(target):
            kept = next(name for i in itertools.count() if not (name := folder / f"{file.name}.damaged{i}").exists())
            target.rename(kept)
            print(
                f"igpt-lab: {target} is no whole notebook; it is now {kept.name}, a whole copy beside it",
                file=sys.stderr,
            )
        copied.append(atomic_write(target, file.read_bytes()))
    return copied, there


def _is_damaged(notebook: Path) -> bool:
    """Whether it is a file but no json, as one whose copying was interrupted."""
    if not notebook.is_file():
        return False
    try:
        json.loads(notebook.read_bytes())
    except (ValueError, RecursionError):
        return True
    return False


def arguments(folder: Path, *, first: str, port: int, browser: bool) -> list[str]:
    """JupyterLab's options: loopback only, a token of its own whatever the user's settings say, and no password."""
    options = [
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.allow_remote_access=False",
        f"--IdentityProvider.token={secrets.token_hex(24)}", "--PasswordIdentityProvider.hashed_password=",
        "--PasswordIdentityProvider.password_required=False", f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{first}", "--ServerApp.log_level=ERROR", "--LabApp.log_level=ERROR",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--ServerApp.allow_root=True")  # a container's user; without it Jupyter refuses to start
    return options if browser else [*options, "--ServerApp.open_browser=False"]


def open_lab(folder: Path, *, first: str, port: int = 8888, browser: bool = True) -> None:
    """Run JupyterLab on `folder` until it is stopped, with the notebook `first` open; prints its address in a line.

    In this process, so that the token is on no command line, where other users could read it.
    """
    from jupyterlab.labapp import LabApp

    server = LabApp.initialize_server(arguments(folder.resolve(), first=first, port=port, browser=browser))
    server.identity_provider.token_generated = True  # as this one was: only then is it in the address
    print(f"{server.local_url} is JupyterLab on {folder}; Ctrl-C stops it", flush=True)
    server.identity_provider.token_generated = False  # Jupyter would print it again, among other lines
    server.start()
