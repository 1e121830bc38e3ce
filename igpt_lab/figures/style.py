"""How a figure looks and becomes bytes: its style, its colours, and the note of how it was plotted.

A style sets sizes only: `paper` is one column of a page, `wide` two, `talk` half a slide. Colours are Okabe and Ito's,
told apart by colour-blind readers; dashes and markers tell the lines apart in grey print. Text stays text in a pdf
(TrueType, embedded) and is outlines in an svg, which look the same where the font is missing.
"""

import base64
import functools
import inspect
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import matplotlib.figure
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.style import context
from matplotlib.text import Text

from igpt_lab.core.display import MODEL
from igpt_lab.core.values import did_you_mean
from igpt_lab.figures.names import fonts_of, letters, words_of

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
POINTS = {  # sizes that grow with the letters, at 7 points
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "xtick.major.size": 3.5,
    "ytick.major.size": 3.5, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.size": 2.0,
    "ytick.minor.size": 2.0, "xtick.minor.width": 0.6, "ytick.minor.width": 0.6, "xtick.major.pad": 3.5,
    "ytick.major.pad": 3.5, "axes.labelpad": 4.0,
}  # fmt: skip
LINE_STYLES: dict[str, Keywords] = {  # by control
    MODEL: {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "raw pixels": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "raw pixels, neighbours": {"color": "#D55E00", "linestyle": "-.", "marker": "s"},
    "raw pixels, SVM": {"color": "#8C3B00", "linestyle": (0, (1, 1)), "marker": "s"},
    "random network": {"color": "#009E73", "linestyle": (0, (1, 1)), "marker": "^"},
    "permuted labels": {"color": "#767676", "linestyle": "-.", "marker": "v"},
}
PURPLE: Keywords = {"color": "#CC79A7", "linestyle": (0, (4, 1, 1, 1, 1, 1)), "marker": "v"}  # also any other control
AMBER: Keywords = {"color": "#E69F00", "linestyle": (0, (6, 1)), "marker": "D"}
LINE_STYLES["nearest neighbours"] = AMBER
FIGURES: dict[str, Callable] = {}  # every function that plots a figure, by its name: see `plotting`
Result = TypeVar("Result", bound=Axes | matplotlib.figure.Figure)


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as the png that `save_figure` writes, whatever backend is active.

    `plotted_by`: the name of the function that made the whole figure, and its arguments; `style`: its style's name;
    `fonts`: families for letters of its names that DejaVu Sans lacks.
    """

    plotted_by: tuple[str, dict] | None = None
    style: str = "paper"
    fonts: tuple[str, ...] = ()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/plain": repr(self), "image/png": base64.b64encode(render(self, "png")).decode()}


def in_style(name: str, fonts: tuple[str, ...] = ()):
    """A `with` block in which matplotlib plots in this style; the user's own settings come back after it.

    Letters that DejaVu Sans lacks are from `fonts`.
    """
    if name not in STYLES:
        raise ValueError(f"there is no style {name!r}; {did_you_mean(name, STYLES)}")
    style = STYLES[name]
    sizes = {key: value * style.letter / 7 for key, value in POINTS.items()}
    own = {"figure.figsize": (style.width, style.tall), "font.size": style.letter}
    own |= dict(zip(("legend.handlelength", "legend.columnspacing"), style.legend, strict=True))
    family = {"font.family": [*FONT["font.family"], *fonts]}
    return context(["default", FRAME | FONT | family | FILES | sizes | own])


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


def plotting(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make a function that plots a figure one of FIGURES: it takes a `style` too, and `redraw` can call it again.

    Its figure knows the function's name and arguments, unless it got an `ax`: then it is a part of a figure that
    somebody else composes, which cannot be plotted again from this alone.
    """
    signature = inspect.signature(function)
    style_too = inspect.Parameter("style", inspect.Parameter.KEYWORD_ONLY, default="paper", annotation=str)

    @functools.wraps(function)
    def plotted(*args, style: str = "paper", **options) -> Result:
        current = plotted.__wrapped__  # %autoreload puts the edited function there
        arguments = inspect.signature(current).bind(*args, **options).arguments
        fonts = fonts_of("".join(words_of(arguments)))
        with in_style(style, fonts):
            result = current(*args, **options)
        figure = cast(Figure, result.get_figure(root=True))
        if arguments.pop("ax", None) is None:
            figure.plotted_by, figure.style, figure.fonts = (current.__name__, arguments), style, fonts
        else:
            figure.plotted_by = None
            for text in cast(list[Text], result.findobj(Text)):  # those of the user's axes were there before
                text.set_parse_math(False)
        return result

    plotted.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), style_too]
    )
    FIGURES[function.__name__] = plotted
    return plotted


def axes(height: float) -> Axes:
    """The only Axes of a new figure, `height` inches tall on paper."""
    return Figure(figsize=inches(height), layout="constrained").add_subplot()


def check_pixels(width: float, height: float) -> None:
    """Refuse a figure of this many png pixels where they are too many, before any is made."""
    if width * height > PIXELS:
        raise ValueError(f"a figure of {width:,.0f} x {height:,.0f} pixels; expected at most {PIXELS:,}")


def render(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    """The figure as png, pdf or svg, without a date; its layout is computed once and then kept."""
    check_pixels(*figure.get_size_inches() * DPI)
    with in_style(getattr(figure, "style", "paper"), getattr(figure, "fonts", ())):
        if figure.get_layout_engine() is not None:  # each pass of an iterative layout moves things a little
            before = figure.dpi
            figure.set_dpi(DPI)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            figure.set_dpi(before)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=dict.fromkeys(UNDATED[kind].split()))
        return _named_in_order(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _named_in_order(svg: bytes) -> bytes:
    """An svg whose clip paths are p0, p1, ...: their names are of places, whose last bits differ from time to time."""
    names = dict.fromkeys(re.findall(rb"\bp[0-9a-f]{10}\b", svg))
    order = {name: b"p%d" % i for i, name in enumerate(names)}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda match: order[match[0]], svg)
