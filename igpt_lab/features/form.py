"""The form of a manifest, which may be a stranger's: what is not as docs/feature-store.md says is named by its field.

A form is a function for a single value, a tuple for a list of this length, a list for one of any, a dict for an object
with these fields (`?` behind those that may be absent or null), or `Named` for an object whose names are open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from igpt_lab.core.storage import as_name

LARGEST = 2**53  # what every JSON reader keeps exactly


class Named(NamedTuple):
    """An object of any names that `check` lets pass, each with a value of the form `item`."""

    item: Any
    check: Callable[[str, str], object] = as_name


def check(value: object, form: Any, where: str) -> None:
    """ValueError that names the field, what it is and what was expected, where a JSON value has not this form."""
    if isinstance(form, dict):
        fields = expect(value, dict, "an object", where)
        for name, item in form.items():
            field, optional = name.rstrip("?"), name.endswith("?")
            if fields.get(field) is not None or not optional:
                check(fields.get(field), item, f"{where}.{field}")
    elif isinstance(form, Named):
        for name, item in expect(value, dict, "an object", where).items():
            form.check(name, f"a name in {where}")
            check(item, form.item, f"{where}.{brief(name)[1:-1]}")
    elif isinstance(form, list | tuple):
        items = expect(value, list, "a list", where)
        if isinstance(form, tuple) and len(items) != len(form):
            raise ValueError(f"{where} is {brief(value)}; expected a list of {len(form)}")
        for number, item in enumerate(items):
            check(item, form[number] if isinstance(form, tuple) else form[0], f"{where}[{number}]")
    else:
        form(value, where)


def expect(value: object, kind: type, word: str, where: str) -> Any:
    """The value, where it is of this type and no other; ValueError else."""
    if type(value) is not kind:
        raise ValueError(f"{where} is {brief(value)}; expected {word}")
    return value


def brief(value: object) -> str:
    """A value for a message: one short line."""
    return "missing or null" if value is None else ascii(value)[:60]


def text(value: object, where: str) -> None:
    expect(value, str, "a string", where)


def flag(value: object, where: str) -> None:
    expect(value, bool, "true or false", where)


def count(value: object, where: str) -> None:
    if not (type(value) is int and 0 <= value < LARGEST):
        raise ValueError(f"{where} is {brief(value)}; expected a whole number from 0 on")


def number(value: object, where: str) -> None:
    """Finite, or its name where it is not, as JSON has no other way."""
    whole = type(value) is int and abs(value) < 10**300
    if not (whole or (type(value) is float and math.isfinite(value)) or value in ("inf", "-inf", "nan")):
        raise ValueError(f'{where} is {brief(value)}; expected a number, "inf" or "nan"')


def integers(value: object, where: str) -> None:
    for item in expect(value, list, "a list", where):
        expect(item, int, "a whole number", where)


def layers(value: object, where: str) -> None:
    check(value, [count], where)
    if value != sorted(set(value)):  # type: ignore[call-overload]
        raise ValueError(f"{where} is {brief(value)}; expected layers in their order, none twice")


def column(name: str, where: str) -> None:
    if not re.fullmatch(r"[^\0]+\.\d{1,9}", name):
        raise ValueError(f"{where} is {brief(name)}; expected <point>.<layer>")


def part(value: object, where: str) -> None:
    """What is listed of a part; null while it is not finished."""
    if value is not None:
        check(value, PART, where)


PART = {
    "rows": count, "sha256": text, "stats": Named((number, number, count), column), "skipped?": [(count, text)],
    "entry?": text,
}  # fmt: skip
TEXTS = ("model", "weights", "palette", "resample", "crop", "images", "pool", "alignment", "dtype")
KEY = dict.fromkeys(TEXTS, text) | {
    "size": count, "splits": Named((text, count)), "layers": Named(layers), "format": count, "modules?": [text],
    "preprocess?": text,
}  # fmt: skip
MANIFEST = {"key": KEY, "classes?": [text], "versions?": Named(text, text), "splits": Named([part])}
MODEL = {"name": text, "revision?": text, "random?": flag, "seed?": count}
IMAGES = {"name": text, "limit?": count, "seed?": count, "label?": text, "config?": text, "title?": text}
OPTIONS = {
    "points?": [text], "layers?": integers, "pool?": text, "alignment?": text, "dtype?": text, "batch_size?": count,
    "on_bad_image?": text,
}  # fmt: skip
SOURCE = {"model": MODEL, "images": Named(IMAGES), "options": OPTIONS}


def check_modules(key: dict) -> None:
    """ValueError where the names of a key's layers are not one for each."""
    names, stored = key.get("modules"), list(key["layers"].values())
    if names and (len(set(names)) < len(names) or stored != [list(range(len(names)))]):
        raise ValueError(f"manifest.key.modules is {brief(names)}; expected a name for each layer of one point")


def only(value: dict, form: dict) -> dict:
    """Of an object the fields of a form, without those that are null."""
    names = [name.rstrip("?") for name in form]
    return {name: value[name] for name in names if value.get(name) is not None}


def no_constant(name: str) -> None:
    """For `json.loads`, which reads what JSON has not."""
    raise ValueError(f"it has {name}, which is not a JSON number")
