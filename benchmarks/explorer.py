"""Milliseconds of a step of the explorer's layer slider, against a notebook that redraws a matplotlib figure.

Ours is timed in Chromium, without a GPU: from the slider's event until all that a step changes is drawn and the points
have gone to their places (a glide of 60 ms that is part of it). The peer draws three of its parts, the plane, the
confusions and the curve, into artists that it keeps; making a png of them counts, the way to the browser does not.
"""

import base64
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from playwright.sync_api import Playwright, sync_playwright

import igpt_lab as lab
from benchmarks.harness import row
from igpt_lab.app.explorer.widget import Explorer, front_end
from igpt_lab.app.report import FLAGS, chromium

ARRAYS = ("places", "near", "pixel_near", "predicted", "labels", "rows", "pictures")
STATE = ("facts", "layer", "other", "image", "busy", "problem")
SHOW = """
async ({source, state, arrays}) => {
  for (const [name, text] of Object.entries(arrays))
    state[name] = new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  const heard = {};
  const model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; (heard[`change:${name}`] || []).forEach((it) => it()); },
    on: (name, it) => (heard[name] = heard[name] || []).push(it),
    off: () => {}, save_changes: () => {}, send: () => {},
  };
  const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})));
  module.default.render({model, el: document.body});
}
"""
STEP = """
(layer) => new Promise((tell) => {
  const slider = document.querySelector("[data-slider=layer]"), root = document.querySelector(".igx");
  const begun = performance.now();
  slider.value = layer;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  const drawn = () => root.dataset.settled === String(layer);
  const look = () => drawn() ? tell(performance.now() - begun) : requestAnimationFrame(look);
  requestAnimationFrame(look);
})
"""


def rows(quick: bool) -> Iterator[dict]:
    train, test = (lab.load_images("fashion-mini", split, limit=200 if quick else None) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        explorer = lab.explore(lab.extract(lab.load_model("fashion-xs"), [train, test], store=folder), out=folder)
        explorer.fit()
        layers = explorer.facts["layers"]
        walk = [*layers[1:], *layers[-2::-1]] * (1 if quick else 3)
        calls = {"ours": in_browser(driver, explorer), "matplotlib": partial(redraw, explorer, pictures(explorer))}
        taken = {name: [] for name in calls}
        for step, (name, call) in itertools.product(walk, calls.items()):  # in turns
            taken[name].append(call(step))
    case = f"{len(test):,} images, {len(layers)} layers"
    ends = [statistics.median(taken[name]) for name in calls]
    yield row(case, "step of the slider", "ms", *ends, "matplotlib", runs=len(walk), less=True)
    ends = [max(taken[name]) for name in calls]
    yield row(case, "slowest step", "ms", *ends, "matplotlib", runs=len(walk), less=True)


def in_browser(driver: Playwright, explorer: Explorer) -> Callable[[int], float]:
    """The explorer's own script and data on an empty page; a call is a step to a layer, and returns its ms."""
    browser = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
    page = browser.new_page(viewport={"width": 1280, "height": 1500})
    page.set_content(f"<style>{Explorer._css}</style>")
    arrays = {name: base64.b64encode(getattr(explorer, name)).decode() for name in ARRAYS}
    state = {name: getattr(explorer, name) for name in STATE}
    page.evaluate(SHOW, {"source": front_end(), "state": state, "arrays": arrays})
    page.locator(".igx[data-settled]").wait_for()
    return partial(page.evaluate, STEP)


def pictures(explorer: Explorer) -> tuple:
    """A figure and its artists: what a notebook of one's own would keep between steps."""
    figure = Figure(figsize=(12, 4), dpi=100)
    FigureCanvasAgg(figure)
    plane, confusions, curve = figure.subplots(1, 3)
    labels = explorer.shown.labels
    points = plane.scatter(*explorer.spaces[0][0].T, c=labels, s=8, cmap="tab10")
    plane.set(xlim=(-3, 3), ylim=(-3, 3))
    shares = confusions.imshow(np.zeros((len(explorer.classes),) * 2), vmin=0, vmax=1, cmap="Blues")
    curve.plot(explorer.answers.table.layer, explorer.answers.table.test_accuracy)
    return figure, points, shares, curve.axvline(0)


def redraw(explorer: Explorer, drawn: tuple, layer: int) -> float:
    """A step to a layer; returns its ms."""
    begun = time.perf_counter()
    (figure, points, shares, mark), labels = drawn, explorer.shown.labels
    counts = np.zeros(shares.get_array().shape)
    np.add.at(counts, (labels, explorer.answers.predicted[layer]), 1)
    points.set_offsets(explorer.spaces[0][layer])
    shares.set_data(counts / counts.sum(1, keepdims=True))
    mark.set_xdata([layer, layer])
    figure.canvas.print_png(io.BytesIO())
    return 1000 * (time.perf_counter() - begun)
