"""How a figure looks and becomes bytes: its style, its colours, and the note of how it was plotted.

A style sets sizes only: `paper` is one column of a page, `wide` two, `talk` half a slide. Colours are told apart by
colour-blind readers, and each means one thing in all figures; dashes and markers tell lines apart in grey print. Text
stays text in a pdf (TrueType, embedded) and is outlines in an svg, which look the same where the font is missing.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.figure
from matplotlib import RcParams, rc_params_from_file, rcParams, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.style import available, context, library
from matplotlib.transforms import Bbox

from igpt_lab.core.display import MODEL
from igpt_lab.core.values import closest, did_you_mean
from igpt_lab.figures.names import letters
from igpt_lab.figures.options import colour_of, place_of

Keywords = dict[str, Any]  # of a matplotlib function


@dataclass(frozen=True)
class Style:
    """`width`: inches of a figure; `letter`: points of its letters; `tall`: how much taller than on paper."""

    width: float
    letter: float
    tall: float
    legend: tuple[float, float] = (3.0, 2.0)  # its handles and the gap between its columns, in letters


STYLES = {"paper": Style(3.5, 7, 1.0), "wide": Style(7.2, 7, 1.25), "talk": Style(5.2, 12, 1.55, legend=(2.0, 1.0))}
DPI = 200  # png pixels per inch
PIXELS = 10**8  # of a png, at most
FONT: Keywords = {
    "font.family": ["DejaVu Sans"],
    "axes.titleweight": "bold",
    "text.parse_math": False,
}  # `$` is a dollar
FRAME = {"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False}
FILES = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "igpt-lab"}
UNDATED = {"png": "Software", "pdf": "CreationDate ModDate Producer Creator", "svg": "Date Creator"}  # left out
KEPT = tuple("axes. errorbar. font. grid. hatch. image. legend. lines. patch. scatter. text. xaxis. yaxis.".split())
KEPT += ("xtick.", "ytick.", "figure.facecolor", "figure.edgecolor", "figure.figsize")
NOT_KEPT = {"axes.prop_cycle", "text.usetex", "text.latex.preamble", "text.parse_math"}
POINTS = {  # sizes that grow with the letters, at 7 points
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "xtick.major.size": 3.5,
    "ytick.major.size": 3.5, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.size": 2.0,
    "ytick.minor.size": 2.0, "xtick.minor.width": 0.6, "ytick.minor.width": 0.6, "xtick.major.pad": 3.5,
    "ytick.major.pad": 3.5, "axes.labelpad": 4.0,
}  # fmt: skip
LINE_STYLES: dict[str, Keywords] = {  # what colours, dashes and markers mean in all figures
    MODEL: {"color": "#0072B2", "linestyle": "-", "marker": "o"},  # also its chosen layer
    "last layer": {"color": "#56B4E9", "linestyle": (0, (5, 2)), "marker": "D"},
    "raw pixels": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "raw pixels, neighbours": {"color": "#D55E00", "linestyle": "-.", "marker": "s"},
    "raw pixels, SVM": {"color": "#8C3B00", "linestyle": (0, (1, 1)), "marker": "s"},
    "random network": {"color": "#009E73", "linestyle": (0, (1, 1)), "marker": "^"},
    "permuted labels": {"color": "#767676", "linestyle": "-.", "marker": "v"},
    "nearest neighbours": {"color": "#E69F00", "linestyle": (0, (6, 1)), "marker": "d"},
}
CYCLE: tuple[Keywords, ...] = (  # of names without a meaning of their own, such as those of several networks
    LINE_STYLES[MODEL],
    {"color": "#CC79A7", "linestyle": (0, (4, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#332288", "linestyle": (0, (3, 1)), "marker": "D"},
    {"color": "#999933", "linestyle": (0, (2, 1)), "marker": "P"},
    {"color": "#882255", "linestyle": (0, (8, 2, 1, 2)), "marker": "X"},
)
OTHERS = CYCLE[1:]  # beside a model's own line
FIGURES: dict[str, Callable] = {}  # every function that plots a figure, by its name: see `plotting`


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as the png that `save_figure` writes, whatever backend is active.

    `plotted_by`: the name of the function that made the whole figure, and its arguments; `style`: its style's name;
    `settings`: rcParams that differ from the style's; `fonts`: families for letters that DejaVu Sans lacks.
    """

    plotted_by: tuple[str, dict] | None = None
    style: str = "paper"
    settings: Mapping[str, Any] = {}
    fonts: tuple[str, ...] = ()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return _shown(self, self)


class FigureAxes(Axes):
    """Axes that are all of a `Figure`, which a notebook shows in their place; Axes of others stay as they are."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        figure = self.get_figure(root=True)
        return {"text/plain": repr(self)} if figure is None else _shown(self, figure)


def _shown(value: Any, figure: matplotlib.figure.Figure) -> dict[str, str]:
    return {"text/plain": repr(value), "image/png": base64.b64encode(render(figure, "png")).decode()}


def look(name: str, place: int | None = None, *, others: tuple[Keywords, ...] = CYCLE) -> Keywords:
    """Colour, dashes and marker of what a figure calls `name`: the next of `others` where it has no LINE_STYLES.

    `place` says which of `others`. The colour is that of the option `palette`, where that has one.
    """
    if place is None and name in LINE_STYLES:
        style = LINE_STYLES[name]
    else:
        style = others[(place_of(name) if place is None else place) % len(others)]
    colour = colour_of(name)
    return style if colour is None else style | {"color": colour}


def resolved(style: str | Mapping[str, Any] | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The name of one of STYLES, and what rcParams are to differ from it, by the option `style`."""
    if isinstance(style, Mapping):
        return "paper", _valid(style)
    if isinstance(style, str) and style in STYLES:
        return style, {}
    if isinstance(style, str) and style in available:
        return "paper", _plain(library[style])
    if isinstance(style, str | os.PathLike) and os.path.isfile(style):
        try:
            return "paper", _plain(rc_params_from_file(style, use_default_template=False))
        except UnicodeDecodeError as error:
            raise ValueError(f"style={str(style)!r} is no mplstyle file: {error}") from None
    advice = "a name in matplotlib.style.available, a dict of rcParams or the path of an mplstyle are taken too"
    raise ValueError(f"there is no style {str(style)!r}; {did_you_mean(style, STYLES)} ({advice})")


def own_settings() -> dict[str, Any]:
    """The rcParams of lines, letters and frames that the user has changed from matplotlib's defaults."""
    return {name: value for name, value in rcParams.items() if is_kept(name) and value != rcParamsDefault[name]}


def is_kept(name: str) -> bool:
    """Whether a figure keeps this one of rcParams where it differs from the style: none that runs or reads anything."""
    return name.startswith(KEPT) and name not in NOT_KEPT


def _valid(settings: Mapping[str, Any]) -> dict[str, Any]:
    for name in settings:
        if name not in rcParamsDefault:
            close = closest(name, rcParamsDefault)
            raise ValueError(
                f"style has {name!r}, which is none of rcParams" + f"; did you mean {close!r}?" * bool(close)
            )
    return _plain(RcParams(settings))


def _plain(settings: Any) -> dict[str, Any]:
    if (size := settings.get("font.size", 1)) <= 0:
        raise ValueError(f"font.size={size} in style; expected points above 0")
    return dict(settings)


def in_style(name: str, fonts: tuple[str, ...] = (), settings: Mapping[str, Any] | None = None):
    """A `with` block in which matplotlib plots in this style; the user's own settings come back after it.

    `settings`: rcParams that differ from the style's. Letters that DejaVu Sans lacks are from `fonts`.
    """
    if name not in STYLES:
        raise ValueError(f"there is no style {name!r}; {did_you_mean(name, STYLES)}")
    style, more = STYLES[name], dict(settings or {})
    sizes = sizes_of(float(more.get("font.size", style.letter)))
    width, _ = more.pop("figure.figsize", (style.width, 0))
    own: Keywords = {"figure.figsize": (width, style.tall)}
    own |= dict(zip(("legend.handlelength", "legend.columnspacing"), style.legend, strict=True))
    family = {"font.family": [*more.pop("font.family", []), *FONT["font.family"], *fonts]}
    return context(["default", FRAME | FONT | FILES | sizes | own, more, family])


def sizes_of(letter: float) -> dict[str, float]:
    """rcParams of letters of so many points, and of what grows with them."""
    return {"font.size": letter} | {key: value * letter / 7 for key, value in POINTS.items()}


def points(size: float) -> float:
    """A size in points that grows with the letters of the style: `size` is for letters of 7 points."""
    return size * rcParams["font.size"] / 7


def inches(height: float) -> tuple[float, float]:
    """Width and height of a figure of the style: `height` is that on paper."""
    width, tall = rcParams["figure.figsize"]
    return width, height * tall


def narrow() -> bool:
    """Whether words must be few: fewer letters fit than on paper."""
    return letters() < 60


def axes(height: float) -> Axes:
    """The only Axes of a new figure, `height` inches tall on paper."""
    return Figure(figsize=inches(height), layout="constrained").add_subplot(axes_class=FigureAxes)


def check_pixels(width: float, height: float) -> None:
    """Refuse a figure of this many png pixels where they are too many, before any is made."""
    if width * height > PIXELS:
        raise ValueError(f"a figure of {width:,.0f} x {height:,.0f} pixels; expected at most {PIXELS:,}")


def render(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    """The figure as png, pdf or svg, without a date; its layout is computed once and then kept."""
    check_pixels(*figure.get_size_inches() * DPI)
    with in_style(*(getattr(figure, name, getattr(Figure, name)) for name in ("style", "fonts", "settings"))):
        if figure.get_layout_engine() is not None:  # each pass of an iterative layout moves things a little
            before = figure.dpi
            figure.set_dpi(DPI)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            figure.set_dpi(before)
            _round_places(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=dict.fromkeys(UNDATED[kind].split()))
        return _named_in_order(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _round_places(figure: matplotlib.figure.Figure) -> None:
    """Round where subfigures and Axes are: the last bits of a layout differ from time to time."""
    for part in figure.subfigs:
        box = part.bbox_relative
        box.set_points(box.get_points().round(9))
    for ax in figure.axes:
        ax.set_position(Bbox(ax.get_position(original=True).get_points().round(9)))


def _named_in_order(svg: bytes) -> bytes:
    """An svg whose clip paths are p0, p1, ...: their names are of places, whose last bits differ from time to time."""
    names = dict.fromkeys(re.findall(rb"\bp[0-9a-f]{10}\b", svg))
    order = {name: b"p%d" % i for i, name in enumerate(names)}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda match: order[match[0]], svg)
