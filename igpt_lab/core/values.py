"""Values that come from a file or a caller, held to a kind and a range before anything is made of them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LARGEST = {"int": 2**63 - 1, "float": 1e308}
WORDS = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "str": "a string"}

MANY = 12  # names, more than an error lists beside the closest


def check(
    name: str, value: Any, kind: str, least: float | None = None, most: float | None = None, words: str = ""
) -> None:
    """ValueError, in one short line, where `value` is not of a kind, or a number in it not from `least` to `most`.

    `kind` is written as an annotation: `int`, `float`, `bool`, `str`, `None`, `list[float]`, `dict[str, int]` (whose
    keys are not looked at), and several of these with ` | ` between them. True is no number, a whole number is a
    `float`, and one with a point no `int`. `words` say what was expected, in place of the kind's own.
    """
    if not any(_is(value, one, least, most) for one in kind.split(" | ")):
        limits = f" from {least:,} to {most:,}" if least is not None and most is not None else ""
        expected = words or " or ".join(WORDS.get(one, one) for one in kind.split(" | ")) + limits
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {expected}")


def check_finite(name: str, x: np.ndarray) -> None:
    """ValueError, which counts the rows, where `x` (N, D) has values that are infinite or NaN."""
    import numpy as np  # which the commands that only say what is wrong do without

    finite = np.isfinite(x)
    if not finite.all():
        rows = int((~finite.all(axis=1)).sum())
        raise ValueError(
            f"{name} has values that are not finite in {rows:,} of {len(x):,} rows; leave out these rows, or the layer"
        )


def closest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `known` that is most like a name that is not among them; '' where none is like it.

    `cutoff`: how like, as the ratio of difflib's SequenceMatcher, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(str(name), known, 1, cutoff)), "")


def did_you_mean(name: object, known: Collection[str], expected: str = "") -> str:
    """The end of an error about a name: `expected one of ln_1, ln_2; did you mean 'ln_1'?`.

    Where many names are known, it is the closest one alone. `expected` are words in place of a list of them.
    """
    close = closest(name, known)
    listed = expected or f"expected one of {', '.join(known)}"
    if not close:
        return listed
    return f"did you mean {close!r}?" if len(known) > MANY else f"{listed}; did you mean {close!r}?"


def _is(value: Any, kind: str, least: float | None, most: float | None) -> bool:
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer in LARGEST:
        low, high = (-LARGEST[outer] if least is None else least), (LARGEST[outer] if most is None else most)
        number = isinstance(value, int if outer == "int" else int | float) and not isinstance(value, bool)
        return number and low <= value <= high  # so NaN and infinity are none
    if outer == "list":
        return isinstance(value, list | tuple) and all(_is(item, inner, least, most) for item in value)
    if outer == "dict":
        of_values = inner.rpartition(", ")[2]
        return isinstance(value, dict) and all(_is(item, of_values, least, most) for item in value.values())
    return isinstance(value, {"bool": bool, "str": str, "None": type(None)}[outer])
