"""A `with` block that reduces chosen activations while a model runs, then removes itself.

    with record(model, points=["ln_1"], pool="mean", alignment="sos") as pooled:
        model(pixels)
    pooled["ln_1"]  # float32 (N, L + 1, D)

A point is a place in a block; layer l is block l. Two points have a layer L as well: at `ln_1` it is `ln_f`, at
`resid_pre` the last block's un-normed output. Works on our ImageGPT and on transformers'.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.side_by_side import caller
from igpt_lab.core.values import did_you_mean
from igpt_lab.features.poolings import pooling
from igpt_lab.models.fast import is_plain
from igpt_lab.models.losses import align, check_alignment, is_aligned

POINTS = (
    "resid_pre", "ln_1", "qkv", "head_out", "attn_out", "resid_mid", "ln_2", "mlp_act", "mlp_out", "resid_post",
)  # fmt: skip
# point -> (module of the block, is it that module's input?); "" is the block itself
PLACES = {
    "resid_pre": ("ln_1", True),
    "ln_1": ("ln_1", False),
    "qkv": ("attn.c_attn", False),
    "head_out": ("attn.c_proj", True),
    "attn_out": ("attn", False),
    "resid_mid": ("ln_2", True),
    "ln_2": ("ln_2", False),
    "mlp_act": ("mlp.c_proj", True),
    "mlp_out": ("mlp", False),
    "resid_post": ("", False),
}


class Pooled(threading.local):
    """What the latest forward pass left: `pooled[point]` is float32 (N, layers, D'), layers in the order asked for.

    Of several threads that work `side_by_side` each has what its own passes left. Passes in threads of others are
    neither recorded nor changed.
    """

    def __init__(self, backbone: nn.Module, layers: dict[str, list[int]], caller: int):
        self._caller = caller
        self.layers, self._backbone = layers, backbone
        self._running = False
        self._values: dict[tuple[str, int], Tensor] = {}
        self._stats: dict[tuple[str, int], Tensor] = {}
        self._stops = False

    def run(self, *inputs, **named) -> None:
        """The backbone's forward pass, only as far as what is recorded: the blocks above, and the head, do not run."""
        self._stops = True
        try:
            self._backbone(*inputs, **named)
        except Enough:
            self._end()
        finally:
            self._stops = False

    def __getitem__(self, point: str) -> Tensor:
        return torch.stack(self._of(point, self._values), dim=1)

    def layer(self, point: str, layer: int) -> Tensor:
        """(N, D') of one layer, as the pooling left it: no copy, as putting layers together makes one."""
        return self._of(point, self._values)[self.layers[point].index(layer)]

    def stats(self, point: str) -> Tensor:
        """(layers, 3): max |x|, number of exact zeros, number of non-finite values, before pooling."""
        return torch.stack(self._of(point, self._stats))

    def _of(self, point: str, values: dict) -> list[Tensor]:
        if point not in self.layers:
            raise KeyError(f"point {point!r} was not recorded; recorded are {list(self.layers)}")
        missing = [layer for layer in self.layers[point] if (point, layer) not in values]
        if missing:
            raise RuntimeError(
                f"{point} of layer {missing[0]} did not run; call the model inside the `with` block, and "
                "if it is compiled, give the compiled one to `record`"
            )
        return [values[point, layer] for layer in self.layers[point]]

    def _is_ours(self) -> bool:
        return torch.compiler.is_compiling() or self._caller == caller()  # a compiler knows no thread

    def _begin(self, *_) -> None:
        if self._is_ours():
            self._values.clear()
            self._stats.clear()
            self._running = True

    def _end(self) -> None:
        if self._is_ours():
            self._running = False  # what runs from here on is gradient checkpointing, again in the backward pass
            for point in self.layers:
                self._of(point, self._values)


class Enough(Exception):
    """Everything that was asked for is recorded."""


@checked
@contextmanager
def record(
    model: nn.Module,
    points: Sequence[str] = ("ln_1",),
    *,
    layers: Sequence[int] | None = None,
    pool: str | Callable[[Tensor, str, int], Tensor] = "mean",
    alignment: str | None = None,
) -> Iterator[Pooled]:
    """Record `points` at `layers` of every forward pass in a `with` block, pooled over positions in float32.

    `head_out` is what the heads give before they are mixed by `c_proj`, side by side (N, T, D), and `mlp_act` the MLP's
    hidden units after their activation, (N, T, 4 D). `qkv` holds queries, keys and values side by side, (N, T, 3 D),
    each with its heads side by side. The hooks are gone after the block, also on an error. A compiled model, whose code
    knows nothing of hooks, runs without its compiler in the block, and a warning says so.

    Args:
        model: Ours or transformers', in eval mode.
        points: Of `resid_pre`, `ln_1`, `qkv`, `head_out`, `attn_out`, `resid_mid`, `ln_2`, `mlp_act`, `mlp_out`,
            `resid_post`.
        layers: All by default; negative ones count from the end.
        pool: `mean` over all T positions, `last`, `max`, `grid:g` (means of g x g image regions, concatenated),
            `prefix:g` (means of the first ceil(T i / g) positions, i = 1..g, concatenated; the last is `mean`),
            `at:p,...` (the states at positions p of 0..T - 1, concatenated in that order), or several of these with a
            `+` between, side by side. Or a function of the states (N, T, D), the point and the layer: what it returns,
            of any shape, is kept in their place.
        alignment: `sos` or `raw` turns the pixels that the model is called with into its input; without it they are
            taken as they come, and so is what `lab.align` made.

    Yields:
        `Pooled`: by point the states of the last pass, float32 (N, layers, D); `run` calls the backbone alone.

    Raises:
        ValueError: An unknown point, layer, pooling or alignment.
        RuntimeError: A layer that does not run exactly once in a forward pass.

    Example:
        >>> with torch.no_grad(), lab.record(model, ["ln_1", "mlp_act"], layers=[1, 2], alignment="sos") as pooled:
        ...     _ = model(ids)
        >>> pooled["ln_1"].shape, pooled["mlp_act"].shape
        (torch.Size([2, 2, 8]), torch.Size([2, 2, 32]))
    """
    backbone = backbone_of(model)
    config: Any = model.config
    wanted = {point: layers_of(point, len(backbone.h), layers) for point in points}
    pooled = Pooled(backbone, wanted, caller())
    places = {(point, layer) for point, chosen in wanted.items() for layer in chosen}
    reduce = pool if callable(pool) else _by_name(pool)
    last = max(places, key=lambda place: (place[1], POINTS.index(place[0])), default=None)
    handles = [backbone.register_forward_pre_hook(pooled._begin)]
    try:
        if alignment is not None:
            check_alignment(alignment, config)
            handles.append(backbone.register_forward_pre_hook(_aligned(alignment, config, pooled), with_kwargs=True))
        for place in places:
            handles.append(_attach(backbone, *place, reduce, pooled, place == last))
        handles.append(backbone.register_forward_hook(lambda *_: pooled._end()))
        with uncompiled(model, "recorded"):
            yield pooled
    finally:
        for handle in handles:
            handle.remove()


def _by_name(pool: str) -> Callable[[Tensor, str, int], Tensor]:
    reduce = pooling(pool)
    return lambda states, point, layer: reduce(states)


def _aligned(alignment: str, config, pooled: Pooled):
    """A hook that aligns a backbone's `input_ids`, its first argument, where `align` has not made them."""

    def hook(_, inputs: tuple, named: dict | None = None) -> tuple[tuple, dict] | None:
        if named is None or not pooled._is_ours():  # torch forgets `named` where another thread removes the hook
            return None
        ids = inputs[0] if inputs else named["input_ids"]
        if is_aligned(ids):
            return None
        ids = align(ids, alignment, config)
        return ((ids, *inputs[1:]), named) if inputs else (inputs, named | {"input_ids": ids})

    return hook


def backbone_of(model: nn.Module) -> Any:
    """The model without its head, also of one that is compiled."""
    backbone = getattr(model, "transformer", model)
    return getattr(backbone, "_orig_mod", backbone)


def numbers_of(model: nn.Module, images: int) -> int:
    """How many numbers the states of a batch hold, which says whether batches run `side_by_side`.

    0 where hooks or modules of others would run in several threads. Hooks of `record` count too: ask before it.
    """
    config: Any = model.config
    return images * config.n_positions * config.n_embd if is_plain(model) else 0


def check_eval(model: nn.Module) -> None:
    """RuntimeError for a model in training mode, whose dropout would be in what is measured."""
    if any(module.training for module in model.modules() if not isinstance(module, nn.ModuleList)):  # has no forward
        raise RuntimeError("the model is in training mode; call model.eval()")


def check_untouched(model: nn.Module) -> None:
    """RuntimeError in a block of `edit`, `window` or `record`, for what runs blocks of the model by themselves."""
    backbone = backbone_of(model)
    hooks = backbone._forward_pre_hooks.values()
    recorded = any(isinstance(getattr(hook, "__self__", None), Pooled) for hook in hooks)
    if recorded or getattr(backbone, "edits", 0) > 0:
        raise RuntimeError("the model is being edited or recorded; leave the `edit`, `window` or `record` block first")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in eval mode; behind it each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model is compiled."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


def uncompiled(model: nn.Module, done: str):
    """A block in which nothing runs compiled, if any part of the model is: its code was made without our hooks."""
    if not is_compiled(model):
        return nullcontext()
    warnings.warn(f"a compiled model is {done} without its compiler: the same numbers, more slowly", stacklevel=4)
    return torch.compiler.set_stance("force_eager")


def layers_of(point: str, blocks: int, layers: Sequence[int] | None = None) -> list[int]:
    """All layers of a point in a model of `blocks` blocks, or `layers` checked; negative ones count from the end."""
    if point not in POINTS:
        raise ValueError(f"there is no point {point!r}; {did_you_mean(point, POINTS)}")
    count = blocks + (point in ("ln_1", "resid_pre"))
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layer {layer} at {point}; this model has layers 0..{count - 1} there")
    return [layer % count for layer in layers]


def _attach(backbone: Any, point: str, layer: int, reduce, pooled: Pooled, last: bool):
    """Register the hook of one point of one layer; returns its handle."""
    name, is_input = PLACES[point]
    block = backbone.h[layer] if layer < len(backbone.h) else None
    module = backbone.ln_f if block is None else block.get_submodule(name)

    def keep(x) -> None:
        if not pooled._running:
            return
        x = x[0] if isinstance(x, tuple) else x
        if (point, layer) in pooled._values:
            raise RuntimeError(f"{point} of layer {layer} ran twice in one forward pass; expected once")
        x = x.detach()
        pooled._values[point, layer] = reduce(x, point, layer)
        pooled._stats[point, layer] = measured(x)
        if last and pooled._stops:
            raise Enough

    if is_input:
        return module.register_forward_pre_hook(lambda _, inputs: keep(inputs))
    return module.register_forward_hook(lambda _, __, output: keep(output))


def measured(x: Tensor) -> Tensor:
    """(3,): max |x|, number of exact zeros, number of non-finite values."""
    low, high = torch.aminmax(x)
    largest, zeros = torch.maximum(-low, high).float(), x.numel() - x.count_nonzero()
    asks = x.is_cpu and not torch.compiler.is_compiling()  # costs an accelerator more than counting
    if asks and largest.isfinite():
        bad = torch.zeros(())
    else:
        bad = (x * 0).count_nonzero()  # 0 times what is not finite is NaN
    return torch.stack([largest, zeros.float(), bad.float()])
