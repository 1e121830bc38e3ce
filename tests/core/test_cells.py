"""A failing cell says in one line what to do, before the traceback, in the kernel that JupyterLab runs."""

import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

import igpt_lab
import igpt_lab as lab
from igpt_lab.core.display import advice
from igpt_lab.figures import gallery, save_figure

CELLS = [
    "%load_ext igpt_lab\nimport igpt_lab as lab; import igpt_lab.figures",
    "lab.figures.layer_curve(3)",
    "lab.load_modl('fashion-xs')",
    "1 / 0",
    "raise ValueError('mine')",
    "%nothing",
    "%unload_ext igpt_lab",
    "lab.load_modl('fashion-xs')",
    "from tables import layer_table; lab.figures.layer_curve(layer_table())",
    "import numpy as np; lab.figures.gallery(np.zeros((2, 4, 4), np.uint8))",
    "from matplotlib.figure import Figure; lab.figures.layer_curve(layer_table(), ax=Figure().add_subplot())",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    extra = ["--log-level=ERROR", "--HistoryManager.enabled=False"]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, extra_arguments=extra).execute(env=places)
    return [cell.outputs for cell in notebook.cells]


def test_the_line_comes_first_and_the_traceback_after_it(outputs):
    assert outputs[0] == []
    for index, kind, line in (
        (1, "TypeError", "igpt-lab: the table is a int; expected a pandas DataFrame with columns control, layer"),
        (2, "AttributeError", "igpt-lab: igpt_lab has no 'load_modl'; did you mean 'load_model'?"),
    ):
        (error,) = outputs[index]
        assert error.output_type == "error" and error.ename == kind
        first, *rest = error.traceback
        assert line in first and first.count("\n") == 1 and any(kind in entry for entry in rest)


def test_a_cell_that_ends_in_a_figure_shows_it_once(outputs):
    for index in (8, 9):
        (shown,) = outputs[index]
        assert shown.output_type == "execute_result" and shown.data["image/png"].startswith("iVBORw0KGgo")
    (shown,) = outputs[10]  # Axes of somebody else's figure, which shows itself
    assert list(shown.data) == ["text/plain"]


def test_unloaded_it_says_nothing_more(outputs):
    (error,) = outputs[7]
    assert error.ename == "AttributeError" and "igpt-lab:" not in "".join(error.traceback)


def test_importing_changes_no_shell_and_a_handler_of_others_stays(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(InteractiveShell, "_instance", shell)
    code = "import IPython, igpt_lab; igpt_lab.load_model"
    shell.run_cell(code)
    assert shell.custom_exceptions == ()
    shell.set_custom_exc((KeyError,), lambda *_: None)
    for change in (igpt_lab.load_ipython_extension, igpt_lab.unload_ipython_extension):
        change(shell)
        assert shell.custom_exceptions == (KeyError,)


def test_errors_from_elsewhere_are_shown_as_ever(outputs):
    for index, kind in ((3, "ZeroDivisionError"), (4, "ValueError")):
        (error,) = outputs[index]
        assert error.ename == kind and not any("igpt-lab" in entry for entry in error.traceback)
    assert "igpt-lab" not in str(outputs[5]) and "nothing" in str(outputs[5])


def raised(function, *arguments, **options) -> BaseException:
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return caught.value


def test_what_the_line_says(tmp_path, monkeypatch):
    assert advice(raised(gallery, np.zeros(3))).startswith("igpt-lab: images: float64 (3,); expected uint8")
    assert advice(raised(lab.load_images, "no-such-set")).startswith("igpt-lab: ")
    figure = gallery(np.zeros((1, 2, 2), np.uint8))
    deep = advice(raised(save_figure, figure, tmp_path / "a", data={"x": [1], "y": [1, 2]}, record=lab.RunRecord("r")))
    assert deep.startswith("igpt-lab: ValueError in igpt_lab.figures.saving.save_figure: ")  # pandas raised it

    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("igpt_lab.figures.saving._write", full)
    lack = advice(raised(save_figure, figure, tmp_path / "a", data={"x": [1]}, record=lab.RunRecord("r")))
    assert lack == "igpt-lab: out of memory; give a smaller batch_size, or fewer images with limit"
    assert advice(raised(int, "x")) is None


def test_another_s_handler_stays(tmp_path):
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S; s = S.instance(); "
        "s.set_custom_exc((ValueError,), lambda *a, **k: None); before = s.CustomTB; import igpt_lab; "
        "print(s.custom_exceptions, s.CustomTB == before)"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "(<class 'ValueError'>,) True"
