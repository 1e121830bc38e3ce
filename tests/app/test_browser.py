"""README's path to a figure of one's own, walked in a real browser; screenshots are left in build/browser.

Chromium is driven by Playwright, JupyterLab is the one that `igpt-lab lab` starts: on loopback, with its token. Nothing
outside this machine may be asked for. Skipped where there is no Chromium.
"""

import re
import time
from pathlib import Path

import numpy as np
import papermill
import pytest
from PIL import Image

from igpt_lab.app import cli
from igpt_lab.app import notebooks as workbench
from igpt_lab.app.printing import chromium

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results/mine/fashion-xs-photos"
SHOTS = ROOT / "build/browser"
CHROMIUM = chromium()
SECOND = 1000  # Playwright counts milliseconds
pytest_plugins = ["browsing"]  # address and page
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install the package chromium"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Step 2 of README's path: photos/train and photos/test, a folder for each class."""
    root, generator = tmp_path_factory.mktemp("workbench"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 20)):
        for number, name in enumerate(("checks", "plain", "stripes")):
            place = root / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                y, x = np.mgrid[:40, :40] // generator.integers(3, 9)
                pattern = ((x + y) % 2, 0 * x, y % 2)[number]
                pixels = 90 + 70 * pattern + generator.integers(-70, 71, (40, 40))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(place / f"{i:02d}.png")
    return root


def open_notebook(page, name: str) -> None:
    # JupyterLab remembers the notebooks of a workspace, and shows them hidden behind this one: each has its own.
    page.goto(re.sub(r"/lab\S*\?", f"/lab/workspaces/{name}/tree/notebooks/{name}.ipynb?", page.address))
    page.locator(".jp-Notebook .jp-CodeCell .cm-content", has_text="model = ").first.wait_for()
    assert page.locator(".jp-NotebookPanel").count() == 1
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()


def run_all(page, seconds: int) -> None:
    """Run > Run All Cells, until the last cell has its number; a failed cell fails the test with its text."""
    for _ in range(20):  # a kernel that has only just started is deaf to the first call
        page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        page.locator("[data-command='runmenu:run-all']").click()
        page.wait_for_timeout(SECOND)
        if "*" in "".join(page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()):
            break
    finish(page, seconds)


def finish(page, seconds: int) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        page.wait_for_timeout(SECOND / 4)
        failed = page.locator(
            ", ".join(f"[data-mime-type='application/vnd.jupyter.{it}']" for it in ("error", "stderr"))
        )
        wrong = [text for text in failed.all_inner_texts() if "Error" in text]
        assert not wrong, wrong[0]
        if page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").count() and "*" not in prompts(page):
            return
    raise AssertionError(f"not finished after {seconds} s; cells: {prompts(page)}")


def add_cell(page, text: str) -> None:
    """Write a new last cell and run it."""
    cells = page.locator(".jp-Notebook .jp-Cell")
    before = cells.count()
    page.locator(".jp-Notebook-footer").click()
    while cells.count() == before:
        page.wait_for_timeout(SECOND / 10)
    cells.last.locator(".cm-content").click()
    page.keyboard.insert_text(text)
    page.keyboard.press("Shift+Enter")


def prompts(page) -> str:
    return " ".join(page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts())


def shot(where, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    where.screenshot(path=SHOTS / f"{name}.png")


def at_layer(page, layer: int) -> None:
    page.locator(f".igx[data-settled='{layer}']").wait_for()


def view(page) -> list[str]:
    """All that a step of the slider should change: both plots, and the words."""
    plots = page.locator(".igx canvas.plot").evaluate_all("all => all.map(it => it.toDataURL())")
    return [*plots, *page.locator(".igx .image, .igx .accuracy").all_inner_texts()]


def test_from_a_folder_of_images_to_a_figure(page, folder):
    open_notebook(page, "02_layer_probe")  # step 3
    cell = page.locator(".jp-CodeCell .cm-content").first
    page.locator(".jp-CodeCell .cm-content", has_text="fashion-mini").first.wait_for()
    text = cell.inner_text()
    assert 'images = "fashion-mini"' in text
    cell.click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text.replace('"fashion-mini"', '"../photos"'))
    run_all(page, 300)
    drawn = page.locator(".jp-OutputArea img")  # step 4
    drawn.first.scroll_into_view_if_needed()
    assert drawn.count() >= 2 and drawn.first.evaluate("it => it.naturalWidth") > 500
    shot(page, "figure")
    for kind in ("png", "pdf", "svg", "csv", "json"):
        assert (folder / RESULTS / f"layer_curve.{kind}").stat().st_size > 0

    add_cell(page, "lab.explore(store)")  # step 5
    finish(page, 120)
    page.locator(".igx[data-settled]").wait_for()
    page.locator(".igx .accuracy svg").wait_for()  # the probes are fitted
    assert "60 test images" in page.locator(".igx .of").inner_text()
    assert page.errors == [] and page.elsewhere == []


def test_the_slider_by_keyboard(page):
    slider = page.locator(".igx [data-slider=layer]")
    slider.focus()
    page.keyboard.press("Home")
    at_layer(page, 0)
    before = view(page)
    page.keyboard.press("ArrowRight")
    at_layer(page, 1)
    assert all(old != new for old, new in zip(before, view(page), strict=True))
    assert "layer 1 of 0..20" in slider.get_attribute("aria-valuetext")
    page.keyboard.press("ArrowUp")  # JupyterLab would go to another cell
    at_layer(page, 2)
    assert slider.evaluate("it => it === document.activeElement && getComputedStyle(it).outlineStyle") == "solid"
    page.keyboard.press("Home")
    at_layer(page, 0)
    assert view(page)[:2] == before[:2]


def test_the_slider_by_mouse_and_the_curve(page):
    slider = page.locator(".igx [data-slider=layer]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    at_layer(page, 10)
    page.locator(".igx svg").click(position={"x": 4, "y": 60})
    at_layer(page, 0)
    shot(page.locator(".igx"), "explorer-light")


def test_images_by_keyboard_and_by_mouse(page):
    words, plane = page.locator(".igx .words"), page.locator(".igx .map")
    before = words.inner_text()
    plane.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        if words.inner_text() != before:
            break
    assert words.inner_text() != before and page.locator(".igx .features .tip").is_visible()
    thumb = page.locator(".igx .in-pixels .thumb").nth(2)
    file = re.search(r"[\w/]+\.png", thumb.get_attribute("aria-label"))[0]
    thumb.click()
    assert f"\n{file}\n" in words.inner_text()
    page.locator(".igx .legend button").nth(1).click()
    assert page.locator(".igx .features .said").inner_text().startswith("Only plain: 20 images")
    page.locator(".igx .legend button").nth(1).click()
    page.locator(".igx .cells").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "Only checks taken for checks" in page.locator(".igx .features .said").inner_text()
    page.keyboard.press("Escape")
    assert "principal components" in page.locator(".igx .features .said").inner_text()


def test_inside_the_network(page):
    panel = page.locator(".igx .inside")
    panel.locator("summary").click()
    looks = panel.locator("[data-picture=weights]")
    looks.wait_for()
    titles, words = panel.locator("figcaption"), panel.locator(".said")
    assert "row 6, column 6" in words.inner_text() and "where head 0 of block 0 looks" in titles.last.inner_text()
    panel.locator("[data-picture=true]").click(position={"x": 2, "y": 200})
    panel.locator(".said", has_text="row 11, column 0").wait_for()
    looks.focus()
    page.keyboard.press("ArrowRight")  # not to another cell
    panel.locator(".said", has_text="row 11, column 1").wait_for()
    before = looks.evaluate("it => it.toDataURL()")
    panel.locator("[data-head]").select_option("1")
    assert "where head 1" in titles.last.inner_text() and looks.evaluate("it => it.toDataURL()") != before
    page.locator(".igx [data-slider=layer]").focus()
    page.keyboard.press("End")
    panel.locator("figcaption", has_text="no block after layer 20").wait_for()
    shot(panel, "explorer-inside")
    panel.locator("summary").click()


def test_other_labels_and_images_come_from_the_kernel(page):
    of = page.locator(".igx .of")
    page.locator(".igx [data-choice=count]").select_option("4")
    page.locator(".igx .of", has_text="probes fitted on 12").wait_for()
    page.locator(".igx [data-choice=split]").select_option("held out")
    page.locator(".igx .of", has_text="of the 72 training images, held out").wait_for()
    page.locator(".igx [data-choice=split]").select_option("test")
    page.locator(".igx [data-choice=count]").select_option("0")
    page.locator(".igx .of", has_text="probes fitted on 72").wait_for()
    assert "60 test images" in of.inner_text()
    page.locator(".igx .save:not([aria-disabled])").wait_for()  # the answers of the probes are there too


def test_save_says_where(page):
    page.locator(".igx .save").click()
    status = page.locator(".igx .status", has_text="Saved").inner_text()
    count, place = re.fullmatch(r"Saved (\d+) files in (.+)", status).groups()
    files = list(Path(place).iterdir())
    assert len(files) == int(count) >= 20
    assert {"accuracy.pdf", "confusion.svg", "features.png", "neighbours.json"} <= {file.name for file in files}


def test_the_dark_theme(page):
    page.locator(".lm-MenuBar-item", has_text="Settings").click()
    page.locator(".lm-Menu-item", has_text="Theme").first.hover()
    page.locator(".lm-Menu-item", has_text="JupyterLab Dark").first.click()
    page.locator(".igx.dark").wait_for()
    page.wait_for_timeout(SECOND)
    ground, ink = page.locator(".igx .card").first.evaluate(
        "it => [getComputedStyle(it).backgroundColor, getComputedStyle(it).color].map(c => +c.match(/\\d+/)[0])"
    )
    assert ground < 60 and ink > 180
    bright = (
        "it => it.getContext('2d').getImageData(0, 0, it.width, it.height).data.filter((v, i) => i % 4 == 0 && v > 180)"
    )
    assert page.locator(".igx .cells").evaluate(f"it => ({bright})(it).length") > 100  # light letters
    shot(page.locator(".igx"), "explorer-dark")
    assert page.errors == [] and page.elsewhere == []


def test_the_report_is_read_without_a_network(page, folder):
    assert cli.main(["report", str(folder / RESULTS), "--no-pdf"]) == 0
    page.goto((folder / RESULTS / "report.html").as_uri())
    pictures = page.locator("figure img")
    assert pictures.count() >= 2 and page.locator(".tile b").count() >= 4
    assert pictures.evaluate_all("all => all.every(it => it.complete && it.naturalWidth > 100)")
    page.locator("summary", has_text="table,").first.click()
    assert page.locator("figure details[open] td").first.is_visible()
    assert page.locator("body").evaluate("it => it.scrollWidth <= window.innerWidth")
    shot(page, "report")
    assert page.errors == [] and page.elsewhere == []


def test_the_tour(page, folder):
    path = folder / "notebooks/00_tour.ipynb"
    own = workbench.parameters("00_tour")
    quick = {name: value for name, value in workbench.QUICK.items() if name in own}
    papermill.execute_notebook(str(path), str(path), quick, prepare_only=True, progress_bar=False)
    open_notebook(page, "00_tour")
    run_all(page, 540)
    assert page.locator(".jp-OutputArea img").count() >= 1
    shot(page, "tour")
    if page.locator(".igx").count():
        page.locator(".igx[data-settled]").last.wait_for()
        shot(page.locator(".igx").last, "tour-explorer")
    assert page.errors == [] and page.elsewhere == []


NETWORKS = """\
import numpy as np, igpt_lab as lab
draws, labels = np.random.default_rng(0), np.arange(80) % 2
split = lambda depth: lab.Features({i: draws.normal(size=(80, 4)) + i * labels[:, None] for i in range(depth)}, labels)
nets = [lab.probe_layers(split(n), split(n), Cs=[0.1], folds=2, progress=False) for n in (3, 5)]
axes = lab.figures.layer_curves({"fashion-xs": nets[0], "my ViT": nets[1]}, relative=True)
print([text.get_text().split(":")[0] for text in axes.get_legend().get_texts()])
axes.figure"""


def test_two_networks_in_one_figure_from_a_cell(page):
    open_notebook(page, "01_features")
    add_cell(page, NETWORKS)
    output = page.locator(".jp-Notebook .jp-CodeCell", has_text="my ViT").locator(".jp-OutputArea")
    for _ in range(20):  # a kernel that has only just started is deaf to the first call
        if output.locator("img").count():
            break
        page.locator(".jp-Notebook .jp-CodeCell .cm-content", has_text="my ViT").click()
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(SECOND)
        finish(page, 120)
    assert "['fashion-xs', 'my ViT', 'chosen on validation']" in output.inner_text()
    assert output.locator("img").evaluate("it => it.complete && it.naturalWidth") > 500
    shot(output, "two-networks")
    assert page.errors == [] and page.elsewhere == []
