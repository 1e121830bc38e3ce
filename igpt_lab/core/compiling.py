"""Modules that run compiled for as long as they are wanted so, for the sizes that they meet in that time.

torch keeps what it compiled with the code object of a function, which all its callers share for as long as a process
lives: a second size is compiled for sizes in general, and after the eighth nothing is compiled. Here functions get code
objects of their own, and what was compiled goes with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any, Self, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


class Compiled:
    """Modules that run compiled in their training mode, each kind and each size once, until the end of a `with` block.

    They do so from the first `attempt` on, and are what they were after the block, also after an error. `seconds`: of
    the first attempt, most of which is compiling. `problem`: in a line, why they do not run compiled any more; "" while
    they do. Without modules nothing happens.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()):
        self.modules = list(modules)
        self.seconds = 0.0
        self.problem = ""
        self._functions: dict[type, FunctionType] = {}
        self._environment: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def news(self) -> str:
        """A line for the user: how long compiling took, or why it failed; "" before the first attempt is over."""
        if self.problem:
            return f"compiling failed, so this goes on uncompiled, the same numbers more slowly: {self.problem}"
        return f"compiled: {self.seconds:.0f} s with the first step" if self.seconds else ""

    def attempt(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns. Where compiling fails it is called again, with the modules as they were."""
        if not self.modules:
            return compute()
        begun = time.perf_counter()
        try:
            self._begin()
            result = compute()
            self._check()
        except Exception as error:
            self._end()
            result = compute()  # what has nothing to do with compiling is raised again
            self.problem = _in_a_line(error)
        self.seconds = self.seconds or time.perf_counter() - begun
        return result

    def _begin(self) -> None:
        if self._functions:
            return
        self._environment = set(os.environ)
        kinds: set[Any] = {type(module) for module in self.modules}
        functions = {kind: _own(kind.forward) for kind in kinds}
        forwards = {kind: _in_training(kind.forward, functions[kind]) for kind in kinds}
        self._functions = functions
        for module in self.modules:
            vars(module)["forward"] = MethodType(forwards[type(module)], module)

    def _check(self) -> None:
        """RuntimeError where torch is told not to compile: it then runs functions as they are, and says nothing."""
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
        if not any(entries(function.__code__) for function in self._functions.values()):
            raise RuntimeError("torch compiled nothing, as torch.compiler.set_stance tells it")

    def _end(self) -> None:
        for module in self.modules:
            vars(module).pop("forward", None)
        for function in self._functions.values():
            torch._dynamo.eval_frame.remove_from_cache(function)  # what is compiled holds its code, and is held by it
        for name in set(os.environ) - self._environment if self._functions else ():
            if "TORCHINDUCTOR" in name:  # what torch notes there for itself, and notes again when it compiles
                del os.environ[name]
        self.modules, self._functions = [], {}


def _own(function: Callable) -> FunctionType:
    """The same function with code and globals of its own, where torch puts what it needs.

    Its name is another too: torch notes sizes by the name of a function and its line.
    """
    code = function.__code__
    code = code.replace(co_name=f"compiled_{code.co_name}")
    own = FunctionType(code, dict(function.__globals__), code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _in_training(plain: Callable, own: FunctionType) -> Callable:
    """A forward pass that is compiled, for fixed sizes and whole or not at all, where the module is training."""
    compiled = torch.compile(own, dynamic=False, fullgraph=True)

    def forward(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        return (compiled if module.training else plain)(module, *inputs, **named)

    return forward


def _in_a_line(error: Exception) -> str:
    """An error's kind and what it says, at most 300 characters of it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text.partition(" Set TORCHDYNAMO_VERBOSE")[0]  # torch's advice for those who mend torch
    return text if len(text) <= 300 else f"{text[:297]}..."
