"""What every figure takes by keyword, in one place, and what of it holds while a figure is plotted."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, is_color_like
from matplotlib.legend import Legend

from igpt_lab.core.values import closest, did_you_mean

FEW = 20  # colours of a colormap that is a list of colours to tell apart
SAMPLES = 7  # colours that are taken from a colormap of another kind


@dataclass(frozen=True)
class Options:
    """What every figure takes by keyword besides its own arguments.

    Settings of matplotlib that differ from its defaults, such as those of an `rc_context`, hold in every figure. What
    is plotted into an `ax` has no style but one that is asked for.

    Attributes:
        style: "paper" (one column of a page), "wide" (two) or "talk" (half a slide). Also what is to differ from paper:
            a name in `matplotlib.style.available`, a dict of rcParams, or the path of an mplstyle file.
        figsize: Width and height in inches of a figure of its own; by default the style's.
        labels: For a name in the table, or any words in the figure, those to show: `{"model": "ViT-B"}`.
        palette: A colour for each name as the legend shows it without `labels`, or colours that names take in their
            order and over again, or the name of a colormap.
        legend: False for none; a place for it, such as "upper left", as `loc` of matplotlib's legends.
        xlim, ylim: Ends of the axes, in the unit of the axis; of several panels those of the first, and of those that
            share its axis.
    """

    style: str | Mapping[str, Any] | os.PathLike = "paper"
    figsize: tuple[float, float] | None = None
    labels: Mapping[str, str] | None = None
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None
    legend: bool | str = True
    xlim: tuple[float, float] | None = None
    ylim: tuple[float, float] | None = None

    def __post_init__(self):
        for name in ("figsize", "xlim", "ylim", "palette", "legend"):  # arrays, and numpy's True, as plain values
            value = getattr(self, name)
            object.__setattr__(self, name, value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
        for name in ("xlim", "ylim"):
            _check_pair(name, getattr(self, name), lambda end: end is None or _is_number(end), "two numbers")
        _check_pair(
            "figsize", self.figsize, lambda side: _is_number(side) and side > 0, "two numbers above 0, in inches"
        )
        if self.labels is not None and not isinstance(self.labels, Mapping):
            raise TypeError(f"labels={self.labels!r}; expected a dict from names to the words to show")
        _check_palette(self.palette)
        if isinstance(self.legend, str) and self.legend not in Legend.codes:
            expected = did_you_mean(self.legend, list(Legend.codes))
            raise ValueError(f"legend={self.legend!r}; {expected}; or False for none")
        if not isinstance(self.legend, str | int | None):
            _check_pair("legend", self.legend, _is_number, "True, False, a place by its name, or two numbers")

    def changed(self) -> dict[str, Any]:
        """Those but `style` that are not the default, as plain values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "style"}
        values = {name: value for name, value in values.items() if value is not None and value is not True}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_pair(name: str, pair: Any, is_fit: Callable[[Any], bool], expected: str) -> None:
    """ValueError where an option is no pair of what is fit for it, or None."""
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    if pair is not None and not (is_pair and all(map(is_fit, pair))):
        raise ValueError(f"{name}={pair!r}; expected {expected}")


def _check_palette(palette: Any) -> None:
    """ValueError for what is no palette, and for a colour or a colormap that matplotlib does not know."""
    if isinstance(palette, str):
        if palette not in colormaps:
            advice = "a colour goes in a list or a dict; " if is_color_like(palette) else ""
            expected = advice + did_you_mean(palette, _MAPS)
            raise ValueError(f"palette={palette!r}; no colormap has this name; {expected}")
        return
    if not isinstance(palette, Mapping | list | tuple | None) or palette in ([], ()):
        what = f"palette of type {type(palette).__name__}" if palette else f"palette={palette!r}"
        raise ValueError(f"{what}; expected colours by name, a list of one or more, or the name of a colormap")
    for colour in palette.values() if isinstance(palette, Mapping) else palette or ():
        if not is_color_like(colour):
            raise ValueError(f"palette has {colour!r}, which is no colour of matplotlib")


NAMES = tuple(one.name for one in fields(Options))
_MAPS = sorted(name for name in colormaps if not name.endswith("_r"))


@dataclass
class Plot:
    """A figure while it is plotted: its options, the Axes that were given, and the names that it has had so far."""

    options: Options = field(default_factory=Options)
    ax: Axes | None = None
    coloured: list[str] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)


_PLOT: ContextVar[Plot] = ContextVar("plot")


def plot() -> Plot:
    """The figure that is being plotted."""
    return _PLOT.get(Plot())


@contextmanager
def plotting_with(options: Options, ax: Axes | None) -> Iterator[Plot]:
    """A `with` block in which a figure is plotted, into `ax` where there is one."""
    token = _PLOT.set(Plot(options, ax))
    try:
        yield _PLOT.get()
    finally:
        _PLOT.reset(token)


def in_words(name: str, words: str | None = None) -> str:
    """A name as `labels` has it, or else `words`, by default the name itself."""
    plot().shown.add(name)
    return str((plot().options.labels or {}).get(name, name if words is None else words))


def place_of(name: str) -> int:
    """How many other names had a colour of their own in this figure before this one."""
    coloured = plot().coloured
    if name not in coloured:
        coloured.append(name)
    return coloured.index(name)


def colour_of(name: str) -> Any:
    """The colour that `palette` has for a name; None where it has none."""
    palette = plot().options.palette
    if palette is None or isinstance(palette, Mapping):
        plot().shown.add(name)
        return (palette or {}).get(name)
    colours = _colours_in(palette)
    return colours[place_of(name) % len(colours)]


def colour_map(default: str) -> Colormap:
    """The colormap of a figure in which numbers are colours: that of `palette`, or the default."""
    palette = plot().options.palette
    if palette is None or isinstance(palette, Mapping):
        return colormaps[default]
    return colormaps[palette] if isinstance(palette, str) else LinearSegmentedColormap.from_list("own", list(palette))


def check_names(names: Mapping[str, Any] | None, option: str) -> None:
    """Refuse a name in an option that is not in the figure but much like one that is; others are for other figures."""
    shown = plot().shown
    for name in set(names or ()) - shown:
        if close := closest(name, shown, 0.8):
            raise ValueError(f"{option} has {name!r}, which is not in the figure; did you mean {close!r}?")


def _colours_in(palette: Sequence[Any] | str) -> Sequence[Any]:
    if not isinstance(palette, str):
        return palette
    colormap = colormaps[palette]
    if colormap.N <= FEW:
        return [colormap(place) for place in range(colormap.N)]
    return [colormap(0.1 + 0.8 * place / (SAMPLES - 1)) for place in range(SAMPLES)]
