"""A `with` block that changes activations while a model runs, then removes itself: the writing twin of `record`.

    with edit(model, skip(model, "block", 3)):
        model(tokens)  # as if there were no block 3

What to put into it for a block, attention, MLP or head is in `parts`; and `window` hides from attention the keys that
lie far from the predicted pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.features.hooks import PLACES, backbone_of, layers_of, uncompiled
from igpt_lab.models.imagegpt import dtype_of_products

Place = tuple[str, int]  # point, layer
Function = Callable[[Tensor], Tensor]


class Edits(dict[Place, Function]):
    """Functions of (point, layer), for `edit`. Where two that `|` joins share a place, the right one edits last."""

    def __or__(self, other: Any) -> Edits:  # type: ignore[override]
        joined = Edits(self)
        for place, function in other.items():
            joined[place] = _then(self[place], function) if place in self else function
        return joined

    __ior__ = __or__  # type: ignore[assignment]

    def __ror__(self, other: Any) -> Edits:  # type: ignore[override]
        return Edits(other) | self


def _then(first: Function, second: Function) -> Function:
    return lambda value: second(first(value))


@checked
@contextmanager
def edit(model: nn.Module, edits: Mapping[Place, Function], *, position_wise: bool = False) -> Iterator[None]:
    """In every forward pass, put `function(value)` in the place of the value (N, T, D) at each (point, layer).

    Points and layers are those of `record`; a negative layer counts from the end. What `record` reads there is the
    edited value. An edit of `resid_pre` changes the residual stream from that block on, which `resid_post` of the block
    before, and the model's own `hidden_states`, show as it was. Of two `edit` blocks at one place the inner one edits
    first. Gradients flow through. Ours and transformers' ImageGPT; a compiled model runs without its compiler, as in
    `record`. The hooks are gone after the block, also on an error.

    A step of cached decoding sees the last position alone, (N, 1, D), and is refused but for `position_wise=True`:
    functions that treat every position by itself and alike. `sample` and `complete`, which run no modules, are refused.

    Raises ValueError for an unknown point or layer, one place twice, a value of another shape or device and a cached
    step; TypeError for what is no function or no tensor; RuntimeError where a place does not run exactly once.
    """
    backbone = backbone_of(model)
    functions = _functions(edits, len(backbone.h))
    running = _ForwardPass(set(functions), position_wise)
    with _marked(backbone) as stack, uncompiled(model, "edited"):
        stack.enter_context(backbone.register_forward_pre_hook(running.begin, with_kwargs=True))
        for place, function in functions.items():
            stack.enter_context(_attach(backbone, place, function, running))
        stack.enter_context(backbone.register_forward_hook(lambda *_: running.end()))
        yield


@contextmanager
def _marked(backbone: Any) -> Iterator[ExitStack]:
    """A stack of hooks, and the backbone's word that it is being edited, for whoever does not run its modules."""
    backbone.edits = getattr(backbone, "edits", 0) + 1
    try:
        with ExitStack() as stack:
            yield stack
    finally:
        backbone.edits -= 1


def _functions(edits: Mapping[Place, Function], blocks: int) -> Edits:
    """The edits, checked, with layers counted from 0."""
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits are a {type(edits).__name__}; expected {{(point, layer): function}}")
    functions = Edits()
    for place, function in edits.items():
        if not (_is_place(place) and callable(function)):
            raise TypeError(f"{place!r}: {type(function).__name__}; expected (point, layer): function")
        point, layer = place[0], layers_of(place[0], blocks, [place[1]])[0]
        if (point, layer) in functions:
            raise ValueError(f"{point} of layer {layer} is given twice; expected one function for each place")
        functions[point, layer] = function
    return functions


def _is_place(place: Any) -> bool:
    point, layer = place if isinstance(place, tuple) and len(place) == 2 else (None, None)
    return isinstance(point, str) and isinstance(layer, int | np.integer) and not isinstance(layer, bool)


class _ForwardPass:
    """Which places are still to come in the forward pass that is running; None when none is."""

    def __init__(self, places: set[Place], position_wise: bool):
        self.places, self.position_wise = places, position_wise
        self.left: set[Place] | None = None

    def begin(self, _, inputs: tuple, named: dict) -> None:
        cache = inputs[1] if len(inputs) > 1 else named.get("past_key_values")
        if cache is not None and cache.get_seq_length() and not self.position_wise:
            raise ValueError(
                "a cached step shows an edit one position, and not which; pass use_cache=False, or position_wise=True "
                "where the functions treat all positions alike"
            )
        self.left = set(self.places)

    def reach(self, place: Place) -> None:
        if self.left is None:  # gradient checkpointing runs it again in the backward pass
            return
        if place not in self.left:
            raise RuntimeError(f"{place[0]} of layer {place[1]} ran twice in one forward pass; expected once")
        self.left.remove(place)

    def end(self) -> None:
        left, self.left = self.left, None
        for point, layer in left or ():
            raise RuntimeError(
                f"{point} of layer {layer} did not run, so it was not edited; call the model inside the `with` block"
            )


def _attach(backbone: Any, place: Place, function: Function, running: _ForwardPass):
    """Register the hook of one place, ahead of those of `record`; returns its handle."""
    point, layer = place
    name, is_input = ("", True) if point == "resid_pre" else PLACES[point]  # "": what the residual branch takes too
    module = backbone.ln_f if layer == len(backbone.h) else backbone.h[layer].get_submodule(name)

    def change(value: Any) -> Any:
        running.reach(place)
        x, *rest = value if isinstance(value, tuple) else (value,)
        if point == "resid_mid":  # the residual branch has this very tensor, and no module of its own
            x.copy_(_fitting(function(x.clone()), x, place))
            return None
        changed = _fitting(function(x), x, place)
        return (changed, *rest) if isinstance(value, tuple) else changed

    if is_input:
        return module.register_forward_pre_hook(lambda _, inputs: change(inputs), prepend=True)
    return module.register_forward_hook(lambda _, __, output: change(output), prepend=True)


def _fitting(value: Any, x: Tensor, place: Place) -> Tensor:
    """What an edit's function returned, in the dtype of what it got."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the edit of {place} returned a {type(value).__name__}; expected a tensor {tuple(x.shape)}")
    if value.shape != x.shape or value.device != x.device:
        got, wanted = (f"{tuple(tensor.shape)} on {tensor.device}" for tensor in (value, x))
        raise ValueError(f"the edit of {place} returned {got}; expected {wanted}, as in the input")
    return value.to(x.dtype)


@checked
@contextmanager
def window(model: nn.Module, radius: int, *, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Hide from attention, in these blocks (all by default), what is farther than `radius` from the predicted pixel.

    Far is the Chebyshev distance on the image, max(|dy|, |dx|), between the key's pixel and the pixel that the query
    predicts: with `sos` slot j >= 1 holds pixel j - 1 and slot i predicts pixel i, so a query's own slot is its left
    neighbour, and at column 0, where it holds the end of the row above, it is hidden. The start token stays, so radius
    0 leaves it alone. The model must be called with `sos` input. Ours and transformers' ImageGPT; steps of cached
    decoding see the same window. Raises ValueError for a negative radius, a layer that there is not, an image that is
    no square, and a bidirectional model.
    """
    backbone = backbone_of(model)
    blocks = layers_of("attn_out", len(backbone.h), layers)
    hidden = _out_of_sight(model.config, radius).to(next(model.parameters()).device)

    def hide(module: Any, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        name = "attention_mask" if "layer_past" in named else "bias"  # transformers', or ours
        start = _filled(module, named)
        end = start + inputs[0].shape[1]
        far, dtype = hidden[start:end, :end], dtype_of_products(inputs[0])
        bias = named.get(name)
        bias = torch.zeros(far.shape, dtype=dtype, device=far.device) if bias is None else bias
        named = named | {name: bias.masked_fill(far, torch.finfo(bias.dtype).min)}
        return inputs, named | ({"causal": False} if name == "bias" else {})

    with _marked(backbone) as stack, uncompiled(model, "edited"):
        for block in set(blocks):
            stack.enter_context(backbone.h[block].attn.register_forward_pre_hook(hide, with_kwargs=True))
        yield


def _filled(attention: Any, named: dict) -> int:
    """Positions that the cache held before this pass."""
    if named.get("layer_past") is not None:
        return named["layer_past"].get_seq_length(attention.layer_idx)
    return 0 if named.get("cache") is None else named["cache"].get_seq_length()


def _out_of_sight(config: Any, radius: int) -> Tensor:
    """bool (T, T): the key (column) is later than the query (row), or farther than the radius from its pixel."""
    if getattr(config, "bidirectional", False):
        raise ValueError("a bidirectional model sees all pixels at once; a window needs one that predicts the next")
    positions, side = config.n_positions, math.isqrt(config.n_positions)
    if radius < 0 or side * side != positions:
        raise ValueError(f"radius {radius} of {positions} positions; expected 0 or more, and a square image")
    pixels = torch.arange(positions)
    before = pixels - 1  # the pixel in a slot
    far = torch.maximum(
        (pixels[:, None] // side - before // side).abs(), (pixels[:, None] % side - before % side).abs()
    ) > radius  # fmt: skip
    far[:, 0] = False
    return far | (pixels[:, None] < pixels)
