"""Names in figures: every name of a class, a model or a file goes through `as_label` before it is drawn."""

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

from igpt_lab.figures.options import in_words

BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # where Python ends a line, and tabs
NO_LETTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")  # an svg, or a pdf, holds none of them
HIDDEN = "_"  # matplotlib leaves a label that begins with it out of legends
NOTHING = "\u200b"  # a letter without width


def letters() -> int:
    """How many letters fit beside each other into a figure of the style."""
    return int(72 * rcParams["figure.figsize"][0] / (0.55 * rcParams["font.size"]))


def as_label(name: object, room: int | None = None) -> str:
    """A name, or what `labels` has for it, as a figure shows it: one line of at most `room` letters.

    Default: about half of the figure's width. The middle of a longer one is left out. What is no letter becomes U+FFFD.
    """
    text = NO_LETTERS.sub("\ufffd", BREAKS.sub(" ", in_words(str(name))))
    width = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    room = max(31, int(0.45 * letters())) if room is None else room
    if width > room:
        fitting = max(room * len(text) // width, 3)
        end = fitting // 3
        text = f"{text[: fitting - end - 1]}…{text[-end:]}"
    return NOTHING + text if text.startswith(HIDDEN) else text


def as_lines(text: str, room: int) -> str:
    """Words of one or several lines, each as `as_label`."""
    return "\n".join(as_label(line, room) for line in str(text).split("\n"))


def words_of(value: object) -> Iterator[str]:
    """Every text in the arguments of a function that plots."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from words_of([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from words_of(item)
    elif isinstance(value, pd.DataFrame):
        yield from words_of(
            [*value.index.unique(), *value.columns] if value.index.dtype == object else [*value.columns]
        )
        for _, column in value.select_dtypes(exclude="number").items():
            yield from words_of(list(column.unique()))


def fonts_of(text: str) -> tuple[str, ...]:
    """Families of installed fonts that have letters of a text which DejaVu Sans lacks, the one with most first."""
    if text.isascii():
        return ()
    return _fonts_with(frozenset(map(ord, text)) - _letters_of(font_manager.findfont("DejaVu Sans")))


@functools.lru_cache
def _fonts_with(missing: frozenset[int]) -> tuple[str, ...]:
    has = {font.name: missing & _letters_of(font.fname) for font in font_manager.fontManager.ttflist
           if missing and font.style == "normal" and not font.name.startswith("Last Resort")}  # fmt: skip
    families: list[str] = []
    while best := max(sorted(has), key=lambda name: len(has[name] & missing), default=None):
        if not has[best] & missing:
            break
        families.append(best)
        missing -= has[best]
    return tuple(families)


@functools.lru_cache(maxsize=1)  # a list of the letters of a font takes some megabytes
def _letters_of(file: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # it is gone, or damaged
        return frozenset()
