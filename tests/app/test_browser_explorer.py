"""The explorer in JupyterLab, on photos of one's own: what stays of it in a notebook, and without its kernel.

Screenshots are left in build/browser. Skipped where there is no Chromium.
"""

import json
import re
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from test_browser import SECOND, open_notebook, run_all, shot

from igpt_lab.app.printing import chromium

NOTEBOOK = """import igpt_lab as lab
model = lab.load_model("fashion-xs")
images = [lab.load_images("../photos", split) for split in ("train", "test")]
store = lab.extract(model, images, store="../results/mine/fashion-xs-photos/stores")
lab.explore(store)"""
pytest_plugins = ["browsing"]  # address and page
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium here: install the package chromium"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """photos/train and photos/test, 30 photos of each of three classes, and a notebook that explores them."""
    root, generator = tmp_path_factory.mktemp("workbench"), np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("beach", "forest", "street")):
            (root / "photos" / split / name).mkdir(parents=True)
            for i in range(30):
                y, x = np.mgrid[:90, :120] // generator.integers(8, 30)
                pattern = ((x + y) % 2, x % 2, y % 2)[number][..., None]
                pixels = 90 + 70 * pattern * generator.random(3) + generator.integers(-60, 61, (90, 120, 3))
                photo = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                photo.save(root / "photos" / split / name / f"{i:02d}.jpg")
    cells = [nbformat.v4.new_code_cell(NOTEBOOK)]
    (root / "notebooks").mkdir()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    kernel["language_info"] = {"name": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / "notebooks/walk.ipynb")
    return root


@pytest.fixture(scope="module")
def opened(page):
    """The page with the notebook run, and the explorer below its cell."""
    open_notebook(page, "walk")
    run_all(page, 200)
    page.locator(".igx[data-settled]").wait_for()
    return page


def server(page, path, method="GET"):
    """What JupyterLab's server answers."""
    base, token = page.address.split("/lab")[0], page.address.split("token=")[1]
    request = urllib.request.Request(f"{base}{path}", headers={"Authorization": f"token {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def end_kernels(page):
    for kernel in json.loads(server(page, "/api/kernels")):
        server(page, f"/api/kernels/{kernel['id']}", "DELETE")


def test_the_page_that_stays_is_covered_by_the_widget(opened):
    assert "90 test images" in opened.locator(".igx .of").inner_text()
    opened.locator(".igx .of", has_text="probes fitted on 90").wait_for()
    opened.locator(".igx .accuracy svg").wait_for()  # the probes are fitted
    assert opened.locator(".igx-still").count() == 1 and not opened.locator(".igx-still").is_visible()
    assert opened.errors == [] and opened.elsewhere == []


def test_the_original_is_beside_what_the_network_reads(opened):
    captions = opened.locator(".igx .originals figcaption")
    captions.first.wait_for()
    assert captions.first.inner_text() == "the original, 120 by 90 pixels"
    assert captions.last.inner_text() == "as the network reads it, 12 by 12 colours of its palette"
    original, read = opened.locator(".igx .originals canvas").evaluate_all(
        "all => all.map(it => [it.width, it.height])"
    )
    assert original == [120, 90] and read == [12, 12]


def test_the_slider_stays_in_sight_while_the_notebook_scrolls(opened):
    opened.set_viewport_size({"width": 1280, "height": 800})
    opened.locator(".igx .note").scroll_into_view_if_needed()
    opened.wait_for_timeout(SECOND / 2)
    top = opened.locator(".jp-WindowedPanel-outer").bounding_box()["y"]
    assert top - 1 <= opened.locator(".igx [data-slider=layer]").bounding_box()["y"] < top + 100
    shot(opened, "explorer-scrolled")


def test_the_focus_stays_where_a_choice_was_made(opened):
    choice = opened.locator(".igx [data-choice=count]")
    choice.focus()
    choice.select_option("4")
    opened.locator(".igx .of", has_text="probes fitted on 12").wait_for()
    assert opened.evaluate("document.activeElement.dataset.choice") == "count"
    choice.select_option("0")
    opened.locator(".igx .of", has_text="probes fitted on 90").wait_for()


def test_a_view_is_saved_to_the_results_of_the_run(opened, folder):
    for button, file in ((".save", "accuracy.pdf"), (".keep", "explorer.html")):
        opened.locator(f".igx {button}").click()
        opened.locator(".igx .status", has_text="Saved").wait_for()
        place = re.split(" files? in ", opened.locator(".igx .status").inner_text())[1]
        assert place.startswith(str((folder / "results/mine/fashion-xs-photos/explorer").resolve()))
        assert file in {path.name for path in Path(place).iterdir()}
    opened.locator(".lm-MenuBar-item", has_text="File").first.click()
    opened.locator(".lm-Menu [data-command='docmanager:save']").click()
    for _ in range(100):
        opened.wait_for_timeout(SECOND / 10)
        if "igx-still" in (folder / "notebooks/walk.ipynb").read_text():
            break


def test_a_kernel_that_is_gone_is_told_after_seconds(opened):
    end_kernels(opened)
    opened.locator(".igx .save").click(force=True)  # it may be known to be gone already
    opened.locator(".igx .status", has_text=re.compile("kernel is gone|kernel has not answered")).wait_for()
    if "kernel is gone" in opened.locator(".igx .status").inner_text():
        assert opened.locator(".igx .save").get_attribute("aria-disabled") == "true"
        assert opened.locator(".igx [data-choice]:enabled").count() == 0
    slider = opened.locator(".igx [data-slider=layer]")
    slider.press("Home")
    opened.locator(".igx[data-settled='0']").wait_for()  # what is in view works without it
    assert opened.errors == [] and opened.elsewhere == []
    shot(opened, "explorer-dead")


def test_a_notebook_that_is_opened_again_shows_the_page(opened):
    opened.goto("about:blank")
    open_notebook(opened, "walk")
    still = opened.locator(".igx-still")
    still.wait_for()
    assert still.locator("img").evaluate("it => it.naturalWidth") > 300
    assert "chosen" in still.inner_text() and "90 test images" in still.inner_text()  # the probes are fitted
    opened.get_by_text("model not found").wait_for(state="attached")  # JupyterLab has given the widget up
    assert not opened.get_by_text("model not found").is_visible() and opened.locator(".igx").count() == 0
    assert opened.get_by_text(re.compile(r"features, .*100%")).is_visible()  # the bar stays as text
    shot(opened, "explorer-reopened")
