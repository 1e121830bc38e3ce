"""Words beside a point of a figure, where they cover nothing: they find their place when the figure is drawn."""

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from igpt_lab.figures.parts import figure_of
from igpt_lab.figures.style import Keywords, points

STEP = 0.25  # of the words' height, from one place that is tried to the next
AIR = 1.5  # points between words and what they must not touch


class Beside(Annotation):
    """Words at the place nearest to a point of their Axes at which they lie on no line, mark, words or edge.

    The search is made when the figure is drawn, so that it knows all lines and the size of the figure. Where the place
    is not close to the point a thin line leads there. Where there is no free place the words lie over what is there, on
    white.
    """

    def __init__(self, words: str, point: tuple[float, float], *, clear: float):
        """`point` in data coordinates; `clear`: points from the centre of the mark there to its edge."""
        thin: Keywords = {"arrowstyle": "-", "color": "#767676", "linewidth": points(0.6), "shrinkB": clear}
        place: Keywords = {"xytext": (0, 0), "textcoords": "offset points", "ha": "center", "va": "center"}
        super().__init__(words, point, **place, arrowprops=thin | {"shrinkA": 0}, annotation_clip=False, zorder=6)
        self.clear = clear
        self.set_in_layout(False)
        self.set_clip_on(False)
        self.set_path_effects([patheffects.withStroke(linewidth=points(2), foreground="white")])

    def draw(self, renderer: RendererBase) -> None:
        """Find the place, and draw the words there."""
        if isinstance(self.axes, Axes):
            self._place(renderer, self.axes)
        super().draw(renderer)

    def _place(self, renderer: RendererBase, ax: Axes) -> None:
        pixel = figure_of(ax).dpi / 72  # pixels of a point
        own = Text.get_window_extent(self, renderer)
        size = np.array([own.width, own.height])
        point = ax.transData.transform(self.xy)
        offsets = _offsets(size, ax.bbox.width, ax.bbox.height)
        edges = ax.bbox.padded(-AIR * pixel)
        paths, marks = _lines_of(ax, pixel), _marks_of(ax, pixel)
        words = [text.get_window_extent(renderer) for text in ax.texts if text is not self and text.get_text()]
        if (legend := ax.get_legend()) is not None:
            words.append(legend.get_window_extent(renderer))
        for offset in offsets:
            box = Bbox.from_bounds(*(point + offset - size / 2), *size).padded(AIR * pixel)
            if _contains(edges, box) and not _covers(box, paths, marks, words):
                break
        else:
            offset = np.array([0, -size[1]])
            self.set_bbox({"facecolor": "white", "linewidth": 0, "pad": points(1)})
        self.set_position(tuple(offset / pixel))
        far = np.maximum(np.abs(offset) - size / 2, 0)
        if self.arrow_patch is not None:
            self.arrow_patch.set_visible(bool(np.hypot(*far) > self.clear * pixel + size[1]))


def _offsets(size: np.ndarray, width: float, height: float) -> np.ndarray:
    """Distances (M, 2) in pixels from a point to try, the shortest first, straight below before others."""
    step = STEP * size[1]
    x, y = (step * np.arange(-int(side / step), int(side / step) + 1) for side in (width, height))
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    far = np.hypot(np.maximum(np.abs(grid[:, 0]) - size[0] / 2, 0) + 0.2 * np.abs(grid[:, 0]), grid[:, 1])
    return grid[np.lexsort([grid[:, 0], grid[:, 1], far.round(3)])]


def _lines_of(ax: Axes, pixel: float) -> list[tuple[Path, float]]:
    """What is drawn as lines in an Axes, in pixels, with half the width of each."""
    lines: list[tuple[Path, float]] = []
    for line in ax.lines:
        if line.get_visible() and line.get_linestyle() not in ("None", "", " ") and len(_numbers(line)) > 1:
            path = line.get_transform().transform_path(line.get_path())
            lines.append((path, line.get_linewidth() / 2 * pixel))
    for bars in ax.collections:
        if isinstance(bars, LineCollection):
            lines += [(bars.get_transform().transform_path(path), pixel) for path in bars.get_paths()]
    return lines


def _marks_of(ax: Axes, pixel: float) -> np.ndarray:
    """Centre and reach (M, 3) in pixels of every mark in an Axes."""
    marks = [np.empty((0, 3))]
    for line in ax.lines:
        if line.get_visible() and line.get_marker() not in ("None", "", " ", None):
            places = line.get_transform().transform(_numbers(line))
            reach = np.full((len(places), 1), line.get_markersize() / 2 * pixel)
            marks.append(np.hstack([places, reach]))
    return np.concatenate(marks)


def _numbers(line: Line2D) -> np.ndarray:
    return np.column_stack([line.get_xdata(orig=False), line.get_ydata(orig=False)]).astype(float)


def _contains(outer: Bbox, inner: Bbox) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def _covers(box: Bbox, paths: list[tuple[Path, float]], marks: np.ndarray, words: list[Bbox]) -> bool:
    """Whether a box lies on a line, a mark or words."""
    x, y, reach = marks.T
    on_mark = (x + reach > box.x0) & (x - reach < box.x1) & (y + reach > box.y0) & (y - reach < box.y1)
    if on_mark.any() or any(box.overlaps(other) for other in words):
        return True
    return any(path.intersects_bbox(box.padded(width), filled=False) for path, width in paths)
