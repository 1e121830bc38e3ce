"""The explorer saved as a page: it works offline, fits narrow and wide windows, and can be read and pressed.

Screenshots are left in build/browser. Skipped where there is no Chromium.
"""

import re

import numpy as np
import pytest
from ipywidgets import Widget
from PIL import Image

import igpt_lab as lab
from conftest import TINY
from igpt_lab.app.explorer.opening import explore
from igpt_lab.app.printing import FLAGS, chromium
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

CLASSES = 14
WIDTHS = (480, 933, 1920)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium here: install the package chromium"),
]
# Every element with letters of its own: the contrast of WCAG 2 between them and the nearest ground that is painted.
CONTRASTS = """
root => {
  const seen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const colour = (text, under) => {
    seen.fillStyle = under; seen.fillRect(0, 0, 1, 1);
    seen.fillStyle = text; seen.fillRect(0, 0, 1, 1);
    return [...seen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const own = getComputedStyle(element).backgroundColor;
    if (/rgba\\(.*, 0\\)|transparent/.test(own)) return element.parentElement ? ground(element.parentElement) : "#fff";
    return own;
  };
  return [...root.querySelectorAll("*")].filter(it => it.getClientRects().length
    && [...it.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(it => {
      const style = getComputedStyle(it), under = ground(it);
      const letters = it instanceof SVGElement ? style.fill : style.color;
      const [low, high] = [light(colour(under, "#fff")), light(colour(letters, under))].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), `${it.tagName} ${it.getAttribute("class")} ${it.textContent.slice(0, 30)}`];
    });
}
"""
TARGETS = """
root => [...root.querySelectorAll("button, select, input, summary")].filter(it => it.getClientRects().length)
  .map(it => [it.getBoundingClientRect(), it]).map(([box, it]) => [box.width, box.height, it.outerHTML.slice(0, 90)])
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Images of 14 classes, which are hard to tell apart, by a tiny model with eleven blocks."""
    root, generator = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 10)):
        for label in range(CLASSES):
            (root / "shades" / split / f"class {label:02d}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(4 * label, 4 * label + 200, (4, 4), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).save(
                    root / "shades" / split / f"class {label:02d}" / f"{i:03d}.png"
                )
    settings = TINY.to_dict() | {"n_layer": 20}
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**settings))
    greys = np.linspace(-1, 1, 8)
    folder = root / "twenty"
    model.save_pretrained(folder)
    lab.ImageGPTImageProcessorPil(np.stack([greys] * 3, axis=1), 4).save_pretrained(folder)
    sets = [lab.load_images(root / "shades", split) for split in ("train", "test")]
    return lab.extract(lab.load_model(folder), sets, store=root / "run/stores", progress=False)


@pytest.fixture(scope="module")
def file(store):
    explorer = explore(store, progress=False)
    path = explorer.export()
    Widget.close_all()
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def page(browser, file, request):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda it: page.asked.append(it.url))
    page.goto(file.as_uri())
    if request.param == "dark":  # the colours of JupyterLab's dark theme
        theme = "--jp-layout-color0: #111; --jp-layout-color1: #212121; --jp-layout-color2: #424242;"
        theme += "--jp-ui-font-color1: #fff; --jp-ui-font-color2: #ffffffb3; --jp-border-color1: #616161;"
        page.evaluate("theme => { document.body.style = theme; document.body.className = 'dark'; }", theme)
        page.locator(".igx.dark").wait_for()
        page.wait_for_timeout(500)
    page.locator(".igx[data-settled]").wait_for()
    yield page
    page.close()


def test_the_page_lies_with_the_results_of_the_run_and_asks_for_nothing(page, file, store):
    assert file.parent.parent.parent == (store.path.parent.parent / "explorer").resolve()
    slider = page.locator("[data-slider=layer]")
    slider.focus()
    page.keyboard.press("Home")
    page.locator(".igx[data-settled='0']").wait_for()
    before = page.locator(".igx canvas.plot").evaluate_all("all => all.map(it => it.toDataURL())")
    page.keyboard.press("End")
    page.locator(".igx[data-settled='20']").wait_for()
    after = page.locator(".igx canvas.plot").evaluate_all("all => all.map(it => it.toDataURL())")
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert page.errors == [] and page.asked == [file.as_uri()]
    assert not page.locator("[data-choice], .save, .inside").filter(visible=True).count()  # there is no kernel


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_window_and_fills_it(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = page.locator(".igx .card:visible").evaluate_all(
        "all => all.map(it => it.getBoundingClientRect()).map(it => [it.left, it.right])"
    )
    assert max(right for _, right in boxes) > width - 60
    columns = len({round(left) for left, _ in boxes})
    assert columns == {480: 1, 933: 2, 1920: 3}[width]
    page.screenshot(path=f"build/browser/explorer-page-{width}.png", full_page=True)


def test_letters_stand_out_and_targets_can_be_hit(page):
    page.set_viewport_size({"width": 933, "height": 900})
    root = page.locator(".igx")
    low = [(round(ratio, 2), words) for ratio, words in root.evaluate(CONTRASTS) if ratio < 4.5]
    assert not low
    small = [(w, h, html) for w, h, html in root.evaluate(TARGETS) if min(w, h) < 24]
    assert not small


def test_the_slider_stays_in_sight_and_the_focus_where_it_was(page):
    page.set_viewport_size({"width": 933, "height": 700})
    page.locator(".igx .changes").scroll_into_view_if_needed()
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(100)
    box = page.locator("[data-slider=layer]").bounding_box()
    assert 0 <= box["y"] < 120
    page.locator("[data-slider=layer]").press("Home")
    if not page.locator("[data-go]").count():  # the first is the chosen one
        page.locator("[data-slider=layer]").press("End")
    page.locator("[data-go]").focus()
    page.keyboard.press("Enter")  # to the chosen layer, and the button is gone
    assert page.evaluate("document.activeElement.dataset.slider") == "layer"
    page.locator(".igx .legend button").nth(3).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.label") == "3"
    assert page.locator(".igx .features .said").inner_text().startswith("Only class 03: 10 images")
    page.keyboard.press("Enter")


def test_pairs_that_are_confused_most(page, store):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.locator("[data-slider=layer]").press("Home")
    pairs = page.locator(".igx .pairs button")
    numbers = [int(re.search(r": (\d+) of 10$", text)[1]) for text in pairs.all_inner_texts()]
    assert len(numbers) == 12 and numbers == sorted(numbers, reverse=True)
    features = [lab.Features.from_store(store, split) for split in ("train", "test")]
    train, test = (lab.Features({0: it.layers[0]}, it.labels, names=it.names) for it in features)
    predicted = lab.probe_layers(train, test, progress=False).predicted[0]
    wrong = predicted != test.labels
    most = np.unique(np.stack([test.labels, predicted])[:, wrong], axis=1, return_counts=True)[1].max()
    assert numbers[0] == most
    pairs.first.click()
    assert pairs.first.get_attribute("aria-pressed") == "true"
    assert f": {numbers[0]} images" in page.locator(".igx .features .said").inner_text()
    label, guess = (int(pairs.first.get_attribute(f"data-{name}")) for name in ("label", "predicted"))
    rows = [f"row {row}" for row in test.index[(test.labels == label) & (predicted == guess)]]
    met, words = [], page.locator(".igx .picked .words")
    for _ in rows:  # "next" walks through them, and comes back to the first
        met.append(words.locator("div").first.inner_text().split(" · ")[1])
        page.locator(".igx .walk [data-step='1']").click()
    assert sorted(met) == sorted(rows) and met[0] in words.inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".igx .pairs [aria-pressed=true]").count() == 0 and not page.locator(".igx .walk").is_visible()


def test_a_saved_page_follows_the_dark_theme_and_keeps_the_pair(browser, store, tmp_path):
    explorer = explore(store, progress=False)
    explorer.fit()
    explorer.alone = {"label": 3}
    path = explorer.export(tmp_path / "page.html")
    explorer.close()
    page = browser.new_page(color_scheme="dark")
    page.goto(path.as_uri())
    page.locator(".igx.dark[data-settled]").wait_for()
    assert page.locator("body").evaluate("it => getComputedStyle(it).backgroundColor") == "rgb(17, 17, 17)"
    assert page.locator(".igx .features .said").inner_text().startswith("Only class 03: 10 images")
    assert page.locator(".igx .legend [aria-pressed=true]").inner_text() == "class 03"
    assert not page.locator(".igx .status").is_visible()
    page.emulate_media(color_scheme="light")
    page.locator(".igx:not(.dark)").wait_for()
    page.close()
