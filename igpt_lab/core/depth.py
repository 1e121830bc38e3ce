"""Layers in the order of depth: numbers ascending, or names of modules in the order in which they come."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pandas as pd

Layer = int | str
L = TypeVar("L", int, str, Layer)


def in_depth(layers: Iterable[L]) -> list[L]:
    """Numbers ascending; names, of which the order is that of depth, as they come."""
    layers = list(layers)
    return layers if any(isinstance(layer, str) for layer in layers) else sorted(layers)


def plain_layer(layer: object) -> Layer:
    """A layer's number or name as Python's own; ValueError for anything else."""
    if isinstance(layer, str):
        return str(layer)
    if isinstance(layer, Integral) and not isinstance(layer, bool):
        return int(layer)
    raise ValueError(f"layer {layer!r} is a {type(layer).__name__}; expected a whole number or a name")


def layers_of(column: pd.Series) -> list[Layer]:
    """The layers in a table's column, in its order: numbers, or names."""
    numbers = column.dtype.kind in "iuf"
    return [int(layer) if numbers else plain_layer(layer) for layer in column]
