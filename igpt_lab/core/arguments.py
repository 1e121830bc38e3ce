"""What all public functions do: hold arguments to their annotations, and compute outside of the user's autocast.

What a notebook passes is rarely what an annotation says to the letter: `np.int64(3)` for 3, `layers=8` for [8], an
array for a list. `checked` makes these plain values, and refuses in one line what cannot be meant. What is measured
must not depend on a `torch.autocast` that is on around the call: it is off inside.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import url2pathname

NUMBERS: dict[type, type] = {int: Integral, float: Real}  # numpy's scalars are registered there
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "Path": "a path",
    "PathLike": "a path",
    "RunRecord": "a record such as lab.RunRecord('curve', store.key, seed=0)",
    "NoneType": "None",
    "Mapping": "a dict",
    "Callable": "a function",
    "Module": "a torch network",
    "ImageSet": "images as lab.load_images('NAME', 'test') gives them",
    "TokenSet": "tokens as lab.load_tokens('NAME', 'test') gives them",
    "Features": "features as lab.Features.from_store(store, 'train') gives them",
    "FeatureStore": "a store as lab.FeatureStore.open('FOLDER') gives it",
    "ImageGPTForCausalImageModeling": "a model as lab.load_model('NAME') gives it",
    "ImageGPTForImageClassification": "a classifier as lab.load_classifier('FOLDER') gives it",
}
LEAST = {"seed": 0, "draw": 0, "count": 0} | dict.fromkeys(
    "batch_size workers completions draws top_k n_boot types neighbours buffer per_class max_iter".split(), 1
)  # by the name of an argument: the least whole number that has a meaning
OF_THIS_DISK = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE)  # RFC 8089
LONGEST_PART = 255  # bytes of one name in a path, on all common systems
OPEN = ("Any", "ndarray", "Tensor")  # which take much that is like them
F = TypeVar("F", bound=Callable)


def checked(function: F) -> F:
    """The same function outside of autocast, its arguments held to its annotations by `plain`, and to LEAST."""
    signature = inspect.signature(function)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind not in several]

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own error names the function
        for name in names:
            if name in bound.arguments:
                value = bound.arguments[name] = plain(bound.arguments[name], annotations()[name], name)
                if isinstance(value, int) and value < LEAST.get(name, value):
                    raise ValueError(f"{name}={value}; expected at least {LEAST[name]}")
        with _outside_autocast():
            return function(*bound.args, **bound.kwargs)

    @functools.cache
    def annotations() -> dict[str, Any]:  # when first called: the names in them may be of modules still to come
        return {name: _annotation(function, name) for name in names}

    return typing.cast(F, call)


def _outside_autocast() -> AbstractContextManager:
    """A block in which the user's `torch.autocast` is off; nothing where torch is not in use, as with figures."""
    if "torch" not in sys.modules:
        return nullcontext()
    from igpt_lab.core.devices import without_autocast

    return without_autocast()


def _annotation(function: Callable, name: str) -> Any:
    """An argument's annotation; Any where there is none, or where only a type checker imports a name in it."""
    alone = types.SimpleNamespace(__annotations__={name: function.__annotations__.get(name, Any)})
    written = inspect.unwrap(function)  # a context manager's wrapper is of another module, which lacks the names
    try:
        return typing.get_type_hints(alone, written.__globals__)[name]
    except NameError:
        return Any


def check_fields(settings: Any) -> None:
    """The same for the fields of a dataclass, from its `__post_init__`."""
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value = plain(getattr(settings, field.name), hints[field.name], field.name)
        object.__setattr__(settings, field.name, value)


def plain(value: Any, annotation: Any, name: str) -> Any:
    """`value` as an annotation has it: a number as Python's own, one item or an array as a list, `~/x` as a path.

    Annotations are numbers, strings, None, classes, a `Sequence` of one or more of these, a `Collection` of any number,
    and unions. For anything else, an array for one, `value` is returned as it is. Raises TypeError for a value of
    another kind, and ValueError for an empty sequence, with `name`, the value and what was expected.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    classes = [kind for kind in kinds if isinstance(kind, type) and kind.__name__ not in OPEN]
    lists = [kind for kind in kinds if typing.get_origin(kind) in (Sequence, Collection)]
    if _is_one_of(value, classes):
        if Path in classes and str(value).lower().startswith(("~", "file:/")):
            return local(value)
        return value.item() if type(value).__module__ == "numpy" else value
    if len(classes) + len(lists) < len(kinds) or len(lists) > 1:
        return value
    for kind in lists:
        item = typing.get_args(kind)[0]
        values = [value] if _is_one_of(value, _classes(item)) else value
        if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
            values = [plain(element, item, f"{name}[{place}]") for place, element in enumerate(values)]
            if not values and typing.get_origin(kind) is Sequence:
                raise ValueError(f"{name} is empty; expected at least one, or leave it out")
            return values
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    of = type(value)
    kind = f"{of.__module__}.{of.__name__}" if of.__name__ in {one.__name__ for one in classes} else of.__name__
    raise TypeError(f"{name}={text} is of type {kind}; expected {_expected(classes, lists)}")


def _classes(annotation: Any) -> list[type]:
    """The classes among the members of a union, or of an annotation alone."""
    return [kind for kind in typing.get_args(annotation) or (annotation,) if isinstance(kind, type)]


def _is_one_of(value: Any, classes: Sequence[type]) -> bool:
    """Whether a value is of a class; True is no number, and numpy's True is one of Python's."""
    if type(value).__name__ in ("bool", "bool_"):
        return bool in classes
    return isinstance(value, tuple(NUMBERS.get(kind, kind) for kind in classes))


def _expected(classes: Sequence[type], lists: Sequence[Any]) -> str:
    words = [WORDS.get(kind.__name__, kind.__name__) for kind in classes]
    for kind in lists:
        items = _classes(typing.get_args(kind)[0])
        words.append("a list of these" if items == list(classes) else f"a list, each {_expected(items, ())}")
    return " or ".join(words)


def local(path: str | os.PathLike) -> Path:
    """A path with `~` and `~user` as their home folders, and file:///folder as /folder.

    ValueError for no such user, and for what no file of any system can be called.
    """
    text = os.fspath(path)
    if "\0" in text or max(len(part.encode(errors="surrogatepass")) for part in text.split("/")) > LONGEST_PART:
        shown = repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
        raise ValueError(f"{shown} is not a path: a name in it has a NUL character, or more than {LONGEST_PART} bytes")
    if here := OF_THIS_DISK.fullmatch(text):
        return Path(url2pathname(here[1]))
    if text.lower().startswith("file://"):
        raise ValueError(f"{text} names another host; expected a path on this machine, such as file:///folder")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no user of this name; write ./{text} for a file with this name")
    return Path(expanded)
