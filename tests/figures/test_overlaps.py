"""In every figure of results/, in every style: no words over other words, none cut off, no label on a line."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import igpt_lab.figures as figures
from igpt_lab.figures.placing import Beside
from igpt_lab.figures.saving import plot_again
from igpt_lab.figures.style import DPI
from tables import layer_table

ROOT = Path(__file__).resolve().parents[2] / "results"
FILES = [file for file in sorted(ROOT.glob("*/*.json")) if file.name != "summary.json"]
SLACK = 1  # pixels: a box is a little larger than its letters


def drawn_words(figure: Figure, monkeypatch) -> list[tuple[Text, Bbox]]:
    """Every text that is drawn in a figure as a png has it, and its box in pixels."""
    drawn = []
    draw = Text.draw

    def note(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn.append((text, Text.get_window_extent(text, renderer)))

    figure.set_dpi(DPI)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", note)
        figure.draw_without_rendering()
    return drawn


def faults(figure: Figure, monkeypatch) -> Iterator[str]:
    """What is wrong with the words of a figure."""
    drawn = drawn_words(figure, monkeypatch)
    inside = figure.bbox.padded(SLACK)
    for i, (text, box) in enumerate(drawn):
        words = text.get_text()
        if not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1):
            yield f"{words!r} is cut off"
        yield from (f"{words!r} is over {other.get_text()!r}" for other, second in drawn[:i] if touch(box, second))
        if isinstance(text, Beside):
            yield from (f"{words!r} is on {name}" for name in lines_below(text.axes, box))


def touch(one: Bbox, other: Bbox) -> bool:
    width, height = (min(a[1], b[1]) - max(a[0], b[0]) for a, b in
                     ((one.intervalx, other.intervalx), (one.intervaly, other.intervaly)))  # fmt: skip
    return width > SLACK and height > SLACK


def lines_below(ax: Axes, box: Bbox) -> Iterator[str]:
    """The lines and edges of its Axes that run through a label, by points along each."""
    edges = [("an edge", ax.bbox.corners()[[0, 1]]), ("an edge", ax.bbox.corners()[[0, 2]])]
    for name, path in edges + [(line.get_label(), pixels_of(ax, line)) for line in ax.get_lines()]:
        along = np.linspace(0, len(path) - 1, 4000)
        x, y = (np.interp(along, np.arange(len(path)), values) for values in path.T)
        if ((box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)).any():
            yield name


def pixels_of(ax: Axes, line) -> np.ndarray:
    return line.get_transform().transform(line.get_xydata())


@pytest.mark.parametrize("style", figures.STYLES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_words_of_every_shipped_figure_are_apart_and_whole(file, style, monkeypatch):
    figure, _ = plot_again(file, style)
    assert not list(faults(figure, monkeypatch))


def test_words_over_words_and_cut_words_and_a_label_on_a_line_are_seen(monkeypatch):
    ax = figures.layer_curve(layer_table())
    assert not list(faults(ax.figure, monkeypatch))
    for _ in range(2):
        ax.text(0.5, 50, "twice")
    ax.figure.text(0.95, 0.5, "out of the figure's edge")
    (label,) = ax.figure.findobj(Beside)
    label._place = lambda *_: label.set_position((0, 0))
    assert set(faults(ax.figure, monkeypatch)) >= {
        "'twice' is over 'twice'",
        '"out of the figure\'s edge" is cut off',
        "'layer 1: 80.0 %' is on model, 95 % interval",
    }
