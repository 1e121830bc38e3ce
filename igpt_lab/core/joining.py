"""Our classes as those of transformers, where a user has imported it: for code that asks what a class is.

peft adapts linear maps by their class, a `Trainer` saves the configuration of models of its own class alone, and Auto
classes take image processors of theirs. transformers is never imported here. What a class of ours has stays; what only
transformers' has comes behind it.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])
_PEERS: dict[type, tuple[str, str]] = {}


class Plain:
    """A base for a class that has no other: nothing can take the place of `object`."""


def peer(module: str, name: str) -> Callable:
    """Of a class: that transformers' class `name` in `module` is its peer."""

    def note(cls: type) -> type:
        _PEERS[cls] = (f"transformers.{module}", name)
        return cls

    return note


def also_called(**names: str) -> Callable[[Method], Method]:
    """Of a method: names of its arguments, and the keywords by which transformers has them, which work too."""

    def wrap(method: Method) -> Method:
        @functools.wraps(method)
        def called(*args, **named):
            for ours, theirs in names.items():
                if theirs in named:
                    named[ours] = named.pop(theirs)
            return method(*args, **named)

        return called  # type: ignore[return-value]

    return wrap


def join() -> None:
    """Put the peers behind our classes, once their modules were imported by somebody else."""
    for cls, (module, name) in _PEERS.items():
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is not None and not issubclass(cls, theirs):
            kept = [base for base in cls.__bases__ if not issubclass(theirs, base) and base is not Plain]
            cls.__bases__ = (*kept, theirs)
