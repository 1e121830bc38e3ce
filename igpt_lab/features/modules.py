"""The modules of any torch network as layers: which they are, and what each gives in a forward pass, pooled.

states = ModuleStates(network, ["blocks.0", "blocks.1"], module_pooling("mean"))
with states.hooked():
    states.run({"": images})
states.values["blocks.0"]  # float32 (N, D)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igpt_lab.core.values import did_you_mean
from igpt_lab.features.hooks import Enough, measured, uncompiled

BLOCKS = "blocks"
Inputs = dict[str, Tensor]  # of a forward pass by the names of its arguments; "" is its first


class ModuleError(ValueError):
    """A module that cannot be a layer; the message names it and says what to do."""


def blocks_of(network: nn.Module) -> list[str]:
    """Names of a network's blocks, in the order in which it holds them.

    They are the members of its longest ModuleList or Sequential whose members are of one class; of equally long ones
    the first counts. Members of its other lists of that class come too, such as those of the stages of a ResNet.
    ValueError where no list has two members of one class.
    """
    lists = {
        name: {child: type(plain_module(member)) for child, member in part._modules.items() if member is not None}
        for name, part in network.named_modules(remove_duplicate=False)
        if isinstance(part, nn.ModuleList | nn.Sequential)
    }
    alike = {name: kinds for name, kinds in lists.items() if len(set(kinds.values())) == 1}
    longest = max(alike.values(), key=len, default={})
    if len(longest) < 2:
        raise ValueError(
            f"{type(network).__name__} has no ModuleList or Sequential of modules of one class; name its modules, of "
            f"{_some(network)}"
        )
    wanted = next(iter(longest.values()))
    chosen = [(name, child) for name, kinds in alike.items() if wanted in kinds.values() for child in kinds]
    return [".".join(filter(None, names)) for names in chosen]


def modules_named(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of these names; ValueError, with the closest name, for one that the network has not."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(f"{type(network).__name__} runs without hooks; give the network that it was made of")
    known = {name: part for name, part in network.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in known:
            expected = f"expected one of its modules, such as {_some(network)}"
            raise ValueError(
                f"{type(network).__name__} has no module {name!r}; {did_you_mean(name, list(known), expected)}"
            )
    return {name: plain_module(known[name]) for name in dict.fromkeys(names)}


def _some(network: nn.Module) -> str:
    """The first names of modules."""
    return ", ".join([name for name, _ in network.named_modules() if name][:8]) or "which it has none"


def plain_module(module: nn.Module) -> nn.Module:
    """A module without its compiler, whose code would know nothing of hooks."""
    return getattr(module, "_orig_mod", module)


@dataclass(frozen=True)
class ModulePooling:
    """A way from what a module gives to features, float32 (N, D); `name` tells it from others."""

    name: str
    reduce: Callable[[Tensor], Any]
    is_own: bool = False  # a function of the user's, which may take states whose first axis is not the images

    def __call__(self, x: Tensor, module: str, images: int) -> Tensor:
        """ModuleError for states that it cannot pool to a vector for each of so many images."""
        if not self.is_own and (x.ndim < 2 or len(x) != images):
            raise ModuleError(
                f"{module} gives {tuple(x.shape)} for {images} images; expected the images first, as in (N, T, D). "
                "Name a module around it, or give pool= a function from this to (N, D)"
            )
        try:
            pooled = self.reduce(x)
        except ModuleError as error:
            raise ModuleError(f"{module} gives {tuple(x.shape)}, and {error}") from None
        except Exception as error:  # it is the user's function
            raise ModuleError(f"pool fails on {tuple(x.shape)} of {module}: {in_a_line(error)}") from error
        if not _is_matrix(pooled, images):
            got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ModuleError(f"pool gives {got} for {tuple(x.shape)} of {module}; expected ({images}, D), real")
        return pooled.float()


def _is_matrix(pooled: Any, rows: int) -> bool:
    """Is it real numbers (rows, D), of a feature or more?"""
    is_real = isinstance(pooled, Tensor) and not pooled.is_complex()
    return is_real and pooled.ndim == 2 and len(pooled) == rows and pooled.shape[1] > 0


def _mean(x: Tensor) -> Tensor:
    """Over tokens (N, T, D), or over space (N, C, H, W)."""
    if x.ndim == 4 and x.shape[1] == x.shape[2] != x.shape[3]:
        raise ModuleError("that looks like (N, H, W, C): give pool=lambda x: x.mean((1, 2))")
    return x if x.ndim == 2 else x.mean(1 if x.ndim == 3 else tuple(range(2, x.ndim)), dtype=torch.float32)


def _at(place: int) -> Callable[[Tensor], Tensor]:
    """The token at a place, 0 or -1."""

    def reduce(x: Tensor) -> Tensor:
        if x.ndim > 3:
            raise ModuleError("that has no tokens: pool='mean' is over space")
        return x if x.ndim == 2 else x[:, place]

    return reduce


MODULE_POOLS: dict[str, ModulePooling] = {
    "mean": ModulePooling("mean", _mean),
    "first": ModulePooling("first", _at(0)),
    "cls": ModulePooling("first", _at(0)),
    "last": ModulePooling("last", _at(-1)),
}


def module_pooling(pool: str | Callable, name: str = "") -> ModulePooling:
    """A pooling by its name, one of MODULE_POOLS, or a function of the user's, which gets `name`."""
    if not isinstance(pool, str):
        return ModulePooling(name, pool, is_own=True)
    if pool not in MODULE_POOLS:
        raise ValueError(f"there is no pooling {pool!r} of modules; {did_you_mean(pool, MODULE_POOLS)}, or a function")
    return MODULE_POOLS[pool]


def first_tensor(output: Any, module: str = "the module") -> Tensor:
    """What a module gives, or the first tensor in its tuple, dict or output object, of bool as 0 and 1.

    ModuleError where there is none, or one that is complex, sparse, nested or empty.
    """
    for value in _flat(output):
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and not value.is_nested and not value.is_complex()
            if not is_plain or not value.numel():
                what = described({"": value}) if is_plain else f"{value.dtype}, {value.layout}"
                raise ModuleError(f"{module} gives {what}; expected real numbers, a dense tensor that is not empty")
            return value.float() if value.dtype == torch.bool else value
    raise ModuleError(f"{module} gives a {type(output).__name__} without a tensor; name a module inside it")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, Tensor | list | tuple) and hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


class ModuleStates:
    """What the modules of these names gave in the latest forward pass: pooled `values`, and `stats` before pooling.

    `values`: name -> float32 (N, D), in the order in which they ran. `stats`: name -> (max |x|, exact zeros, values
    that are not finite) and their count. A module that has several names counts by its calls: the first is the first
    name's.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], pool: ModulePooling):
        self.network, self.pool = network, pool
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in modules_named(network, names).items():
            self.names.setdefault(module, []).append(name)
        self.values: dict[str, Tensor] = {}
        self.stats: dict[str, tuple[Tensor, int]] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._images, self._whole = 0, False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """A block in which the modules are listened to; nothing in it runs compiled."""
        handles = [module.register_forward_hook(self._keep) for module in self.names]
        try:
            with uncompiled(self.network, "read"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, inputs: Inputs) -> None:
        """One forward pass, which ends with the last module that is asked for."""
        self._begin(inputs, whole=False)
        with suppress(Enough):
            self._call(inputs)
        self._check_all_ran()

    def try_out(self, inputs: Inputs, *, is_plain: bool = False) -> list[str]:
        """One whole forward pass; returns the names in the order in which they ran, which is that of depth.

        `is_plain`: the inputs are pictures as they are, of no `preprocess`.

        ModuleError for a module that did not run once for each of its names, and for a network that fails on what it
        gets before all have run.
        """
        self._begin(inputs, whole=True)
        try:
            self._call(inputs)
        except ModuleError:
            raise
        except Exception as error:  # the network is a stranger's, and what it raises may be anything
            if len(self.values) < sum(map(len, self.names.values())):
                of_what = "images as they are" if is_plain else "what preprocess gives"
                advice = "; give preprocess=, from a picture to what the network takes" * is_plain
                raise ModuleError(
                    f"{type(self.network).__name__} fails on {of_what}, {described(inputs)}: {in_a_line(error)}{advice}"
                ) from error
        self._check_all_ran()
        for module, names in self.names.items():
            if self._calls[module] > len(names):
                raise ModuleError(
                    f"{names[0]} runs {self._calls[module]} times in a forward pass and has {len(names)} of the names "
                    "asked for, so which of its states is meant is not known; name a module around it"
                )
        return list(self.values)

    def _begin(self, inputs: Inputs, whole: bool) -> None:
        self.values, self.stats = {}, {}
        self._calls = Counter()
        self._images, self._whole = len(next(iter(inputs.values()))), whole

    def _call(self, inputs: Inputs) -> None:
        named = {name: value for name, value in inputs.items() if name}
        self.network(*(value for name, value in inputs.items() if not name), **named)

    def _keep(self, module: nn.Module, _: tuple, output: Any) -> None:
        names, call = self.names[module], self._calls[module]
        self._calls[module] += 1
        if call >= len(names):
            return
        x = first_tensor(output, names[call]).detach()
        pooled = self.pool(x, names[call], self._images)
        self.stats[names[call]] = measured(x), x.numel()
        self.values[names[call]] = pooled  # last: what is among the values is whole
        if not self._whole and len(self.values) == sum(map(len, self.names.values())):
            raise Enough

    def _check_all_ran(self) -> None:
        for module, names in self.names.items():
            if lacking := [name for name in names if name not in self.values]:
                advice = "name one that is called in the network's forward"
                if isinstance(module, nn.ModuleList | nn.ModuleDict):
                    advice = f"a {type(module).__name__} is never called: name its members"
                raise ModuleError(f"{lacking[0]} did not run in a forward pass; {advice}")


def in_a_line(error: Exception) -> str:
    """The class of an error, and the first line of what it says."""
    return f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}"


def described(inputs: Inputs) -> str:
    """`pixel_values float32 (2, 3, 32, 32)`, for messages."""
    shapes = [f"{name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}".strip() for name, x in inputs.items()]
    return ", ".join(shapes)
