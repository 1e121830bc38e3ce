"""Pooled features of a split, layer by layer, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import Layer, in_depth, plain_layer
from igpt_lab.core.display import card, say_once, span
from igpt_lab.core.provenance import digest
from igpt_lab.core.side_by_side import gains_in_a_stack, side_by_side
from igpt_lab.core.values import check_finite, did_you_mean
from igpt_lab.features.store import FeatureStore, StoredLayers
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.processor import ImageGPTImageProcessorPil

Result = TypeVar("Result")
STACKED = 2**24  # values of the layers that are fitted together, 64 MB
LOADED = 2**30  # bytes of a store up to which its features are kept in memory


@dataclass(frozen=True, eq=False)
class Features:
    """`layers`: number or name -> float32 (N, D); `labels`: int64 (N,), from 0; `index`: int64 (N,), source rows.

    `names`: the classes in the order of their numbers, by which those of train and test are matched; () for no names.
    Layers that have names come in the order of depth. Layers, labels and index may be given as arrays, torch tensors or
    lists; labels as whole numbers of any type, or as words, which become numbers and `names`. Without an `index` rows
    count from 0.

    Raises:
        ValueError: Labels that are missing, negative or no whole numbers, or layers that are not (N, D) of finite real
            numbers.
        TypeError: Layers that are no dict.
    """

    layers: Mapping[Any, np.ndarray]
    labels: np.ndarray
    index: np.ndarray = None  # type: ignore[assignment]  # filled below
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.layers, Mapping):
            raise TypeError(
                f"layers of type {type(self.layers).__name__}; expected a dict from numbers or names to arrays"
            )
        labels, names = as_labels(self.labels, tuple(map(str, self.names)))
        index = np.arange(0 if labels is None else len(labels)) if self.index is None else as_array(self.index)
        for field, value in (("labels", labels), ("names", names), ("index", index)):
            object.__setattr__(self, field, value)
        if isinstance(self.layers, dict):
            object.__setattr__(self, "layers", _by_layer(self.layers))
        if self.labels is None or np.min(self.labels, initial=0) < 0:
            which = "none" if self.labels is None else f"{np.sum(np.less(self.labels, 0))} rows without one"
            raise ValueError(f"a probe needs labels, and these features have {which}; use an image set that has them")
        if self.names and np.max(self.labels, initial=0) >= len(self.names):
            raise ValueError(f"the label {np.max(self.labels)} is not a class; expected 0 to {len(self.names) - 1}")
        if isinstance(self.layers, dict):
            for layer, values in self.layers.items():
                _check_layer(layer, values, len(self.labels), len(self.index))

    def __repr__(self) -> str:
        classes = f"{len(self.names or np.unique(self.labels))} classes"
        return f"<Features: {len(self.labels):,} rows, {classes}, layers {span(list(self.layers))}>"

    def _repr_html_(self) -> str:
        known = self.names or np.unique(self.labels).tolist()
        widths = {values.shape[1] for values in self.layers.values()} if isinstance(self.layers, dict) else set()
        facts = {
            "rows": f"{len(self.labels):,}",
            "classes": f"{len(known)}: {', '.join(map(str, known[:10]))}{', ...' * (len(known) > 10)}",
            "layers": span(list(self.layers)),
            "features": " to ".join(f"{width:,}" for width in sorted({min(widths), max(widths)})) if widths else "",
            "read": "" if widths else "from the store, layer by layer",
        }
        return card("Features", facts)

    @classmethod
    @checked
    def from_store(cls, store: FeatureStore, split: str, point: str | None = None) -> Features:
        """All layers of one point of a feature store; of a large one, each is read when it is asked for.

        `point` is by default "ln_1", or the only one of the store. Modules of a network go by their names.
        """
        layers, labels = StoredLayers(store, split, point), store.labels(split)
        values = dict(layers) if store.size <= LOADED else layers
        return cls(values, labels, layers.index, store.classes)  # type: ignore[arg-type]  # None is refused with advice

    @classmethod
    @checked
    def from_pixels(cls, images: ImageSet, processor: ImageGPTImageProcessorPil) -> Features:
        """Raw pixels at the model's resolution as the only layer, 0; of grey images one channel."""
        pixels = processor.resize(iter(images))
        if (pixels[..., :1] == pixels).all():
            pixels = pixels[..., :1]
        rows = pixels.reshape(len(images), -1).astype(np.float32)
        return cls({0: rows}, images.require_labels(), images.index, images.label_names)

    @checked
    def joined(self, layers: Sequence[int | str]) -> Features:
        """Several layers side by side as one, under the number of the middle one; the paper joins the best five."""
        check_known(layers, self.layers)
        middle = in_depth(layer for layer in self.layers if layer in layers)[len(layers) // 2]
        return replace(self, layers={middle: np.hstack([self.layers[layer] for layer in layers])})

    def relabelled(self, labels: np.ndarray, *, names: Sequence[str] = ()) -> Features:
        """The same rows with other labels (N,): whole numbers of classes, or words; `names` are those of the classes.

        Raises ValueError for another number of labels than of rows, and for labels that are not among `names`.
        """
        if np.shape(labels) != self.labels.shape:
            raise ValueError(f"{np.shape(labels)} labels for {len(self.labels)} rows; expected one for each row")
        return replace(self, labels=as_array(labels), names=tuple(names))


def as_layers(layers: Features | Mapping[Any, np.ndarray]) -> Mapping[Any, np.ndarray]:
    """Matrices by layer, of features or as they are; TypeError for anything else, ValueError for none."""
    layers = layers.layers if isinstance(layers, Features) else layers
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers of type {type(layers).__name__}; expected Features, or {{number: array (N, D)}}")
    if not layers:
        raise ValueError("got no layers; expected at least one")
    return layers


def as_array(values: Any) -> np.ndarray:
    """Arrays as they are, torch tensors and lists as arrays; floats of half precision as float32."""
    if isinstance(values, torch.Tensor):
        if values.is_meta:
            raise ValueError(f"a tensor {tuple(values.shape)} on the meta device holds no values")
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)


def as_labels(labels: Any, names: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Labels int64 (N,) and the names of their classes, of numbers of any type or of words; None stays None.

    Words are numbered by `names`, or by the alphabet where there are none. ValueError for numbers that count no class.
    """
    if labels is None:
        return None, names
    held = as_array(labels)
    if held.ndim != 1:
        raise ValueError(f"labels of shape {held.shape}; expected (N,), one for each row")
    if held.dtype.kind in "iu":
        return held.astype(np.int64, copy=False), names
    if held.dtype.kind in "fb":
        held = np.where(np.isnan(held), -1, held)
        whole = held.astype(np.int64)
        if (held != whole).any():
            raise ValueError(f"the label {held[held != whole][0]} is no class; expected whole numbers from 0, or words")
        return whole, names
    if missing := int(pd.isna(np.array(labels, object)).sum()):  # in `held` the NaN of a list may be a word
        raise ValueError(f"a probe needs labels, and these features have {missing} rows without one; leave them out")
    words = [str(word) for word in held.tolist()]
    known = names or tuple(sorted(set(words)))
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"the label {unknown[0]!r} is not among names; {did_you_mean(unknown[0], known)}")
    place = {name: number for number, name in enumerate(known)}
    return np.array([place[word] for word in words], np.int64), known


def _by_layer(layers: Mapping) -> dict[Any, np.ndarray]:
    """Layers as arrays, by plain numbers or by names; ValueError for a mixture."""
    held = {plain_layer(layer): as_array(values) for layer, values in layers.items()}
    if len({type(layer) for layer in held}) > 1:
        raise ValueError(f"layers {', '.join(map(repr, held))}; expected numbers for all, or names for all")
    return held


def _check_layer(layer: Layer, values: np.ndarray, labels: int, rows: int) -> None:
    if values.ndim != 2 or len(values) != labels or len(values) != rows:
        raise ValueError(
            f"layer {layer} is {values.shape} for {labels} labels and {rows} rows; expected (N, D) with the same N"
        )
    if values.shape[1] == 0 or values.dtype.kind not in "fiub":
        raise ValueError(f"layer {layer} is {values.shape}, {values.dtype}; expected real numbers, one feature or more")
    check_finite(f"layer {layer}", values)


def check_known(layers: Iterable[Layer], known: Iterable[Layer]) -> None:
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise ValueError(f"layer {unknown[0]} is not among these features; expected one of {list(known)}")


def check_same_layers(train: Features, test: Features) -> None:
    if list(train.layers) != list(test.layers) or not train.layers:
        raise ValueError(
            f"layers of train: {list(train.layers)}, of test: {list(test.layers)}; "
            "expected the same layers, at least one"
        )


def digest_of_rows(train: Features, test: Features, digests: Mapping[Layer, str] | None = None) -> str:
    """SHA-256 of the rows of test in every layer, and of the rows and the labels that train has.

    `digests` are those of the layers of test, by `digest_of_layer`, where they were read before.
    """
    digests = digests or {layer: digest_of_layer(x) for layer, x in test.layers.items()}
    numbers = [np.ascontiguousarray(part, "<i8") for part in (test.index, train.index, train.labels)]
    return digest([*(digest(part.tobytes()) for part in numbers), *(digests[layer] for layer in in_depth(digests))])


def digest_of_layer(x: np.ndarray) -> str:
    """SHA-256 of a layer's values (N, D) in float32."""
    with np.errstate(over="ignore"):  # what float32 does not hold is infinite
        return digest(np.ascontiguousarray(x, "<f4").tobytes())


def over_stacks(
    function: Callable[[list[Any], np.ndarray], Result], features: Features, device: torch.device | None
) -> Iterator[Result]:
    """What the function gives for layers and their features (B, N, D), all layers in their order.

    Layers of middle size for a CPU run `side_by_side`, others one stack after another.
    """
    jobs = stacks(features, device)
    for first in jobs:
        yield from side_by_side(lambda stack: function(*stack), chain([first], jobs), device, first[1][0].size)


def stacks(features: Features, device: torch.device | None = None) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Layers of one width together, as (B, N, D), as many as `STACKED` allows; on a CPU each alone, but small ones."""
    layers: list[Layer] = []
    stack: list[np.ndarray] = []
    for layer, x in features.layers.items():
        _check_layer(layer, x, len(features.labels), len(features.index))
        room = STACKED if gains_in_a_stack(device, x.size) else 0
        if stack and (x.shape != stack[0].shape or (len(stack) + 1) * x.size > room):
            yield layers, np.stack(stack)
            layers, stack = [], []
        layers, stack = [*layers, layer], [*stack, x]
    if stack:
        yield layers, np.stack(stack) if len(stack) > 1 else stack[0][None]


def test_layers(layers: Sequence[Layer], x: np.ndarray, test: Features) -> list[np.ndarray]:
    """The layers of test, read once and of the width of x."""
    values = [test.layers[layer] for layer in layers]
    for layer, tested in zip(layers, values, strict=True):
        _check_layer(layer, tested, len(tested), len(test.index))
        if tested.shape[1] != x.shape[2]:
            raise ValueError(
                f"layer {layer} has {x.shape[2]} features in train, {tested.shape[1]} in test; expected the same"
            )
    return values


def say_same_rows(x: np.ndarray, tested: np.ndarray) -> None:
    """Say where a layer of train and of test is the same (N, D), and not one row over and over, as at position 0."""
    if np.array_equal(x, tested) and np.ptp(x, axis=0).any():
        say_once("train and test are the same images, so this is no test accuracy; give the features of each split")
