"""The notebooks: where they are, how they are run, what they found; a copy of them, and JupyterLab on it."""

from __future__ import annotations

import ast
import json
import os
import secrets
import sys
from pathlib import Path

from igpt_lab.core.provenance import atomic_write

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
CURVE = "02_layer_probe"  # the notebook that the summary is of
QUICK = {"train_rows": 600, "test_rows": 400, "ks": [4, 25], "draws": 2, "samples": 12, "primes": 2, "steps": 3}


def notebooks() -> Path:
    """The folder of the notebooks: of the checkout, in the working directory, or where the wheel put them."""
    checkout = Path(__file__).resolve().parents[2] / "notebooks"
    for folder in (checkout, Path("notebooks").resolve(), Path(sys.prefix) / "share/igpt-lab/notebooks"):
        if (folder / f"{NOTEBOOKS[0]}.ipynb").is_file():
            return folder
    raise FileNotFoundError(f"no folder notebooks/ with {NOTEBOOKS[0]}.ipynb; run this in a clone of the repository")


def run_notebook(name: str, values: dict, out: Path, label: str) -> str | None:
    """Execute one notebook with `values` into OUT/notebooks; returns what failed, naming the notebook and the cell."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from tqdm.auto import tqdm

    folder = notebooks()
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    with_parameters(notebook, values, folder)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    failure, where = None, [0]
    with tqdm(total=cells, desc=label, unit="cell") as bar:
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", extra_arguments=["--log-level=ERROR"], record_timing=False,
            store_widget_state=False,
            resources={"metadata": {"path": str(folder)}}, on_cell_executed=lambda **_: bar.update(),
            on_cell_start=lambda cell, cell_index: where.__setitem__(0, cell_index),
        )  # fmt: skip
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError) as error:
            reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else "the kernel died"
            failure = f"notebook {name}, cell {where[0] + 1} failed: {reason}"
    _tidy(notebook)
    atomic_write(out / "notebooks" / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    return failure


def with_parameters(notebook, values: dict, folder: Path) -> None:
    """Set those of `values` that the cell tagged `parameters` names, in a cell behind it, where they differ."""
    import nbformat

    cells = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"a notebook has one cell tagged `parameters`; this one has {len(cells)}")
    assigned = ast.parse(notebook.cells[cells[0]].source).body
    defaults = {a.targets[0].id: ast.literal_eval(a.value) for a in assigned if isinstance(a, ast.Assign)}
    given = {name: value for name, value in values.items() if name in defaults and value != defaults[name]}
    if "out" in given and (folder / defaults["out"]).resolve() == Path(given["out"]):
        del given["out"]
    if given:
        lines = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        cell = nbformat.v4.new_code_cell(lines, id="injected-parameters", metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(cells[0] + 1, cell)


def _tidy(notebook) -> None:
    """Leave no progress bars in an executed notebook, they differ from run to run; of a widget keep its page."""
    notebook.metadata.pop("widgets", None)
    widget = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output["data"].pop(widget, None)
            cell.outputs = [
                output
                for output in cell.outputs
                if widget not in output.get("data", {})
                and not (output.get("name") == "stderr" and "%|" in output.get("text", ""))
            ]


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
