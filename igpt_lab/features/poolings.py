"""From the states of all positions to one vector an image: poolings by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from igpt_lab.core.values import did_you_mean


@dataclass(frozen=True)
class Pooling:
    """A way from states (N, T, D) to features, float32 (N, width(D)): calling it reduces."""

    name: str
    vectors: int  # of width D, one behind the other
    reduce: Callable[[Tensor], Tensor]
    check: Callable[[int], None] = lambda positions: None  # raises ValueError where it is not for so many positions

    def width(self, states: int) -> int:
        """D', for states of width D."""
        return self.vectors * states

    def __call__(self, x: Tensor) -> Tensor:
        self.check(x.shape[1])
        return self.reduce(x)


def pooling(name: str) -> Pooling:
    """A pooling by its name, one of POOLINGS or several with a `+` between; ValueError for any other."""
    if "+" in name:
        return _joined(name, [pooling(part) for part in name.split("+")])
    for pattern, make in POOLINGS.values():
        if match := re.fullmatch(pattern, name):
            return make(name, *match.groups())
    raise ValueError(f"there is no pooling {name!r}; {did_you_mean(name, list(POOLINGS))}")


def _joined(name: str, parts: list[Pooling]) -> Pooling:
    """What each part gives, one behind the other."""

    def check(positions: int) -> None:
        for part in parts:
            part.check(positions)

    vectors = sum(part.vectors for part in parts)
    return Pooling(name, vectors, lambda x: torch.cat([part.reduce(x) for part in parts], dim=1), check)


def _mean(name: str) -> Pooling:
    return Pooling(name, 1, lambda x: x.mean(dim=1, dtype=torch.float32))


def _last(name: str) -> Pooling:
    return Pooling(name, 1, lambda x: x[:, -1].float())


def _max(name: str) -> Pooling:
    return Pooling(name, 1, lambda x: x.amax(dim=1).float())


def _grid(name: str, regions: str) -> Pooling:
    """Means of g x g regions of the image, in raster order."""
    cells = int(regions)

    def check(positions: int) -> None:
        side = round(positions**0.5)
        if side * side != positions or side % cells:
            raise ValueError(f"{name} needs a square image whose side is a multiple of {cells}; T is {positions}")

    def reduce(x: Tensor) -> Tensor:
        n, positions, width = x.shape
        side = round(positions**0.5)
        x = x.view(n, cells, side // cells, cells, side // cells, width)
        return x.mean(dim=(2, 4), dtype=torch.float32).reshape(n, cells * cells * width)

    return Pooling(name, cells * cells, reduce, check)


def _prefix(name: str, shares: str) -> Pooling:
    """Means of the first ceil(T i / g) positions, i = 1..g."""
    count = int(shares)

    def check(positions: int) -> None:
        if count > positions:
            raise ValueError(f"{name}: {count} prefixes of {positions} positions; expected at most one a position")

    def reduce(x: Tensor) -> Tensor:
        ends = [-(-x.shape[1] * i // count) for i in range(1, count + 1)]
        return torch.cat([x[:, :end].mean(dim=1, dtype=torch.float32) for end in ends], dim=1)

    return Pooling(name, count, reduce, check)


def _at(name: str, positions: str) -> Pooling:
    """The states at these positions, in the order given."""
    places = [int(place) for place in positions.split(",")]

    def check(positions: int) -> None:
        if max(places) >= positions:
            raise ValueError(f"{name}: no position {max(places)}; expected positions from 0 to {positions - 1}")

    return Pooling(name, len(places), lambda x: x[:, places].flatten(1).float(), check)


NUMBER = "0|[1-9][0-9]*"
# A pooling's form -> what its names look like, and what makes it of its name and of what the groups match.
POOLINGS: dict[str, tuple[str, Callable[..., Pooling]]] = {
    "mean": ("mean", _mean),
    "last": ("last", _last),
    "max": ("max", _max),
    "grid:g": ("grid:([1-9][0-9]*)", _grid),
    "prefix:g": ("prefix:([1-9][0-9]*)", _prefix),
    "at:p,...": (f"at:((?:{NUMBER})(?:,(?:{NUMBER}))*)", _at),
}
