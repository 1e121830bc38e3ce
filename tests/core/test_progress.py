"""A bar in a kernel is text that stays; elsewhere it is that of `tqdm.auto`."""

import re

import nbformat
import pytest
import tqdm.auto
from nbclient import NotebookClient

from igpt_lab.core import progress

CELLS = [
    "from igpt_lab.core.progress import MARK, tqdm",
    "for i in tqdm(range(3), desc='all of it', unit='image'): pass",
    "for i in tqdm(range(3), desc='goes', leave=False): pass",
    "for i in tqdm(range(3), desc='quick', delay=60): pass",
    "for i in tqdm(range(3), disable=True): pass",
    "with tqdm(total=4, desc='fails') as bar:\n    bar.update(2)\n    1 / 0",
    "with tqdm(total=1, desc='a') as bar:\n    bar.write('beside'); bar.set_postfix_str('last'); bar.update()",
]


@pytest.fixture(scope="module")
def outputs():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    extra = ["--log-level=ERROR", "--HistoryManager.enabled=False"]
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, extra_arguments=extra).execute()
    return [cell.outputs for cell in notebook.cells]


def bars(cell: list) -> list[str]:
    assert all(set(output.data) == {"text/plain"} for output in cell if "data" in output), "a widget is left"
    return [output.data["text/plain"] for output in cell if output.get("metadata") == progress.MARK]


def test_the_last_state_of_a_bar_stays_as_text(outputs):
    (bar,) = bars(outputs[1])
    assert re.match(r"all of it: 100%\|█+\| 3/3 \[\d\d:\d\d<\d\d:\d\d, .*image/s\]$", bar)
    assert len(bar) <= 80


def test_a_bar_that_shall_not_stay_leaves_nothing(outputs):
    assert bars(outputs[2]) == [""]
    assert outputs[3] == outputs[4] == []  # one that ended before its delay, one that is off


def test_a_failed_cell_shows_how_far_it_came(outputs):
    (bar,) = bars(outputs[5])
    assert bar.startswith("fails:  50%|") and "| 2/4 [" in bar
    assert outputs[5][-1].ename == "ZeroDivisionError"


def test_text_beside_a_bar_and_after_it(outputs):
    (bar,) = bars(outputs[6])
    assert "last" in bar and "1/1" in bar
    assert [output.text for output in outputs[6] if output.output_type == "stream"] == ["beside\n"]


def test_outside_a_kernel_it_is_that_of_tqdm():
    assert progress.tqdm is tqdm.auto.tqdm
