"""`plotting`, which makes a function from a table to Axes a figure of the package: its options, and how it is noted."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import matplotlib.figure
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.style import context
from matplotlib.text import Text

from igpt_lab.core.values import did_you_mean
from igpt_lab.figures.names import fonts_of, words_of
from igpt_lab.figures.options import NAMES, Options, Plot, check_names, plotting_with
from igpt_lab.figures.style import FIGURES, FONT, STYLES, Figure, in_style, own_settings, resolved, sizes_of

Result = TypeVar("Result", bound=Axes | matplotlib.figure.Figure)
NOTE = "\n\n    Takes the options of every figure too, such as `style`, `labels` and `palette`: see `Options`."


def plotting(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make a function that plots a figure one of FIGURES: it takes Options too, and `redraw` can call it again.

    In place of a table it takes an object that has one as `table`, such as what `probe_layers` returns. Its figure
    knows the function's name and arguments, unless it got an `ax`: then it is a part of somebody else's figure, which
    cannot be plotted again from this alone, and of which nothing but these Axes changes.
    """
    signature = inspect.signature(function)
    more = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)

    @functools.wraps(function)
    def plotted(*args, **keywords) -> Result:
        current = plotted.__wrapped__  # %autoreload puts the edited function there
        options, keywords = _split(current, keywords)
        bound = inspect.signature(current).bind(*args, **keywords)
        bound.arguments.update({name: tables_in(value) for name, value in bound.arguments.items()})
        if (ax := bound.arguments.get("ax")) is not None:
            return _into(ax, current, bound, options)
        return _anew(current, bound, options)

    plotted.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), more]
    )
    if "**options" not in (plotted.__doc__ or ""):
        plotted.__doc__ = (plotted.__doc__ or "").rstrip() + NOTE
    FIGURES[function.__name__] = plotted
    return plotted


def tables_in(value: Any) -> Any:
    """An argument with the table of each object that has one in its place."""
    if isinstance(value, Mapping):
        return {name: tables_in(item) for name, item in value.items()}
    table = getattr(value, "table", None)
    return table if isinstance(table, pd.DataFrame) and not isinstance(value, pd.DataFrame) else value


def _split(function: Callable, keywords: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Options, and the arguments of the function itself."""
    own = list(inspect.signature(function).parameters)
    for name in keywords:
        if name not in own and name not in NAMES:
            raise TypeError(f"{function.__name__} has no argument {name!r}; {did_you_mean(name, [*own, *NAMES])}")
    options = Options(**{name: value for name, value in keywords.items() if name not in own})
    return options, {name: value for name, value in keywords.items() if name in own}


def _anew(function: Callable[..., Result], bound: inspect.BoundArguments, options: Options) -> Result:
    """A figure of its own."""
    name, settings = resolved(options.style)
    settings = own_settings() | settings
    if options.figsize is not None:
        settings["figure.figsize"] = tuple(options.figsize)
    arguments = {key: value for key, value in bound.arguments.items() if key != "ax"}
    fonts = fonts_of("".join(words_of([arguments, options.labels or {}])))
    with in_style(name, fonts, settings), plotting_with(options, None) as plot:
        result = function(*bound.args, **bound.kwargs)
        _adapt(result, plot)
    figure = cast(Figure, result.get_figure(root=True))
    if "figure.figsize" in settings and (options.figsize is not None or figure.get_layout_engine() is not None):
        figure.set_size_inches(settings["figure.figsize"])  # a gallery has as many pixels as its images need
    figure.plotted_by = (function.__name__, arguments | options.changed())
    figure.style, figure.settings = name, settings
    figure.fonts = fonts
    return result


def _into(ax: Axes, function: Callable[..., Result], bound: inspect.BoundArguments, options: Options) -> Result:
    """The data and labels of these Axes, whose limits go on to show what was there before."""
    _check_axes(ax)
    figure = cast(matplotlib.figure.Figure, ax.get_figure(root=True))
    name, settings = resolved(options.style)
    if name != "paper":  # which is what nobody asked for
        settings = sizes_of(STYLES[name].letter) | settings
    settings |= {"text.parse_math": False, "figure.figsize": (1.2 * ax.bbox.width / figure.dpi, 1.0)}
    fonts = fonts_of("".join(words_of([bound.arguments, options.labels or {}])))
    if fonts:
        settings["font.family"] = [*matplotlib.rcParams["font.family"], *FONT["font.family"], *fonts]
    before = (ax.get_xlim(), ax.get_ylim()) if ax.has_data() else None
    with context(settings), plotting_with(options, ax) as plot:
        result = function(*bound.args, **bound.kwargs)
        if before:
            ax.set_xlim(_joined(before[0], ax.get_xlim()))
            ax.set_ylim(_joined(before[1], ax.get_ylim()))
        _adapt(result, plot)
    if isinstance(figure, Figure):
        figure.plotted_by = None
    for text in cast(list[Text], result.findobj(Text)):  # those of the user's axes were there before
        text.set_parse_math(False)
    return result


def _check_axes(ax: Any) -> None:
    """Refuse what a figure cannot be plotted into, before anything of it is."""
    if not isinstance(ax, Axes):
        raise TypeError(f"ax of type {type(ax).__name__}; expected one Axes, such as plt.subplots()[1]")
    if ax.name != "rectilinear":
        raise ValueError(f"ax is {ax.name}; expected Axes with x and y alone, without a projection")
    if ax.get_figure() is None:
        raise ValueError("ax was removed from its figure; expected Axes of a figure")


def _joined(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Limits that show both, in the direction of the second."""
    low, high = min(*one, *other), max(*one, *other)
    return (low, high) if other[0] <= other[1] else (high, low)


def _adapt(result: Axes | matplotlib.figure.Figure, plot: Plot) -> None:
    """Limits, words and legends as the options have them."""
    options, axes = plot.options, [result] if isinstance(result, Axes) else result.get_axes()
    if options.xlim is not None:
        axes[0].set_xlim(*options.xlim)
    if options.ylim is not None:
        axes[0].set_ylim(*options.ylim)
    artist = result if plot.ax is not None else cast(Figure, result.get_figure(root=True))
    texts = cast(list[Text], artist.findobj(Text))
    plot.shown.update(text.get_text() for text in texts)
    for text in texts:
        if text.get_text() in (options.labels or {}):
            text.set_text(str((options.labels or {})[text.get_text()]))
    check_names(options.labels, "labels")
    check_names(options.palette if isinstance(options.palette, Mapping) else None, "palette")
    for legend in cast(list[Legend], artist.findobj(Legend)):
        if options.legend is False:
            legend.remove()
        elif options.legend is not True:
            legend.set_bbox_to_anchor(None)
            legend.set_loc(cast(Any, options.legend))
