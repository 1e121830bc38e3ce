"""What a run of training steps needs to know, each setting with its help in one place.

The docstrings of the classes and the command line's `--help` are both made from it: see `described`.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
import sys
import textwrap
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from types import UnionType
from typing import Any, NamedTuple, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

from igpt_lab.core.devices import gains_by_bfloat16
from igpt_lab.features.settings import check_names
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.cost import block_weights

WORTH_COMPILING = 5e13  # multiply-adds, times 2, of a run: minutes on two CPU cores, where compiling takes half of one
ABOVE_0 = (
    "steps", "batch_size", "log_every", "save_every", "accumulate", "clip", "spike", "learning_rate", "classifying",
    "patience", "layer", "per_class",
)  # fmt: skip
Settings = TypeVar("Settings", bound=type)


class Setting(NamedTuple):
    """A field of settings. `type` as it is annotated, such as "float | None"; `default` is MISSING where required."""

    name: str
    type: str
    default: Any
    help: str


def setting(text: str, default: Any = MISSING) -> Any:
    """A field of settings with its help."""
    return field(default=default, metadata={"help": text})


def redefined(settings: type, name: str, default: Any) -> Any:
    """A field of the base `settings` with another default, and the same help."""
    (text,) = (entry.help for entry in described(settings) if entry.name == name)
    return setting(text, default)


def described(settings: type) -> list[Setting]:
    """The fields of a dataclass of settings, in order."""
    return [Setting(entry.name, str(entry.type), entry.default, entry.metadata["help"]) for entry in fields(settings)]


def documented(settings: Settings) -> Settings:
    """Put a line for each field under the docstring of a dataclass of settings."""
    lines = [inspect.cleandoc(settings.__doc__ or ""), "", "Args:"]
    for name, kind, default, text in described(settings):
        facts = kind if default is MISSING else f"{kind}, default {default!r}"
        lines.append(textwrap.fill(f"{name} ({facts}): {text}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8))
    settings.__doc__ = "\n".join(lines)
    return settings


def fitted(value: Any, kind: Any) -> Any:
    """A value as its annotation has it, NumPy's as Python's and lists as tuples; TypeError for what does not fit.

    Numbers are finite and not below 0.
    """
    kinds = get_args(kind)
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(kind, UnionType):
        return fitted(value, next((option for option in kinds if _is_of(value, option)), kinds[0]))
    if not _is_of(value, kind):
        raise TypeError(value)
    if get_origin(kind) is tuple:
        return tuple(fitted(item, kinds[0]) for item in value)
    return float(value) if kind is float else value


def _is_of(value: Any, kind: Any) -> bool:
    """Whether it fits, but for what is in a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and (Ellipsis in get_args(kind) or len(value) == len(get_args(kind)))
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < (math.inf if kind is int else sys.float_info.max)
    return type(value) is kind


@documented
@dataclass(frozen=True)
class TrainConfig(ABC):
    """What every run of optimiser steps needs, whatever its loss is."""

    steps: int = setting("optimiser steps of the whole run")
    batch_size: int = setting("images of a step", 128)
    _: KW_ONLY
    cooldown: int = setting("last steps in which the learning rate falls to 0 in a straight line", 0)
    betas: tuple[float, float] = setting("Adam's decay rates of its two moments", (0.9, 0.95))
    optimizer: str = setting(
        "'adam', or 'muon' for the blocks' matrices (Jordan et al., 2024, at Adam's learning rate), Adam for the rest",
        "adam",
    )
    clip: float | None = setting("largest norm of the gradient; None does not bound it", None)
    flip: bool = setting("mirror each image with probability 0.5", False)
    accumulate: int = setting("equal parts of a batch, one after another", 1)
    log_every: int = setting("steps from one row of the log to the next", 100)
    save_every: int = setting("steps from one save of the full state to the next", 50)
    spike: float = setting(
        "the run stops when the loss of the steps since the last save is this many nats above the lowest before", 1.0
    )
    seed: int = setting("seed of the split, of the batches, and of what is random in them", 0)
    dtype: str | None = setting(
        "number format of matrix products, 'float32' or 'bfloat16'; None: bfloat16 where the processor has it", None
    )
    compile: bool | None = setting("compile the blocks; None: where that pays", None)
    recompute: bool = setting("compute activations again in the backward pass, for models that are too large", False)

    def __new__(cls, *_: Any, **named: Any) -> Self:
        check_names(named, [entry.name for entry in fields(cls)], cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name, kind, _, _ in described(type(self)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, fitted(value, kinds[name]))
            except TypeError as error:
                raise ValueError(f"{name}={value!r}; expected {kind}, numbers finite and not below 0") from error
            if name in ABOVE_0 and value is not None and value <= 0:
                raise ValueError(f"expected {name} above 0; got {value!r}")
        if max(self.betas) >= 1:
            raise ValueError(f"betas={self.betas}; expected two numbers from 0 to below 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of accumulate={self.accumulate}")
        if self.optimizer not in ("adam", "muon") or self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(
                f"optimizer={self.optimizer!r}, dtype={self.dtype!r}; expected 'adam' or 'muon', and 'float32' or "
                "'bfloat16' (float16 overflows in ImageGPT)"
            )

    @abstractmethod
    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""

    def settled(self, config: ImageGPTConfig, device: torch.device) -> Self:
        """With what is None chosen for a device: bfloat16 where it multiplies it, compiled where that pays."""
        dtype, compiled = self.dtype, self.compile
        if dtype is None:
            dtype = "bfloat16" if gains_by_bfloat16(device.type, training=True) else "float32"
        if compiled is None:
            weights = block_weights(config)
            pays = 6 * weights * self.steps * self.batch_size * config.n_positions > WORTH_COMPILING
            on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
            has_compiler = on_cuda or (on_cpu and shutil.which(os.environ.get("CXX", "g++")) is not None)
            one_code = not config.scale_attn_by_inverse_layer_idx  # every block would be compiled for itself
            compiled = pays and has_compiler and one_code
        return replace(self, dtype=dtype, compile=compiled)


@documented
@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """The paper's pretraining: Adam 0.9 / 0.95, linear warm-up, cosine to 0, no weight decay, no dropout, no biases.

    With `cooldown` above 0 the learning rate stays after the warm-up, in place of the cosine, and then falls.
    """

    learning_rate: float = setting("the highest one, at the end of the warm-up", 3e-3)
    warmup: int = setting("first steps, in which the learning rate rises from 0 in a straight line", 200)
    _: KW_ONLY
    holdout: int = setting("images that are drawn from the data and never trained on", 3000)
    validate: int = setting("number of held-out images that are scored for each row of the log", 500)
    snapshots: int = setting("number of steps, evenly spaced, whose weights are kept in float16", 6)
    masked: float = setting(
        "probability with which a pixel is hidden from a bidirectional model, whose loss is that of hidden pixels", 0.15
    )
    shard: bool = setting(
        "each of several processes holds its share of weights, gradients and moments, for models that are larger still",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup <= self.steps - self.cooldown <= self.steps:
            raise ValueError(f"expected warmup and cooldown within steps; got {self}")
        if not 0 < self.validate <= self.holdout:
            raise ValueError(f"validate={self.validate} of holdout={self.holdout} images; expected 1..holdout")
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked}; expected a share of the pixels, above 0 and below 1")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear up to `warmup`, half a cosine or `cooldown` down to 0 at `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.cooldown:
            return self.learning_rate * min(1, (self.steps - step) / self.cooldown)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@documented
@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The paper's fine-tuning: L_gen + L_clf, Adam 0.9 / 0.95, a constant learning rate, stopped early on validation.

    The images held out are scored for each row of the log. The lowest L_clf, finer than an accuracy, decides which
    weights are kept. Without any held out the run ends after `steps`, with the last weights. The paper has no cooldown.
    """

    steps: int = redefined(TrainConfig, "steps", 2000)
    learning_rate: float | None = setting(
        "rate of the backbone; None: a tenth of that in the model's training.json, or of pretraining's default",
        None,
    )
    _: KW_ONLY
    flip: bool = redefined(TrainConfig, "flip", True)
    log_every: int = redefined(TrainConfig, "log_every", 50)
    head_rate: float = setting("learning rate of the class head, as a multiple of `learning_rate`", 1.0)
    generative: float = setting("weight of L_gen, in nats per token", 1.0)
    classifying: float = setting("weight of L_clf, in nats per image", 1.0)
    layer: int | None = setting("the head sits on the mean over positions of layer 1..L; None: the last, ln_f", None)
    freeze_below: int = setting("nothing learns below this layer", 0)
    head_only: bool = setting("nothing learns but the head", False)
    per_class: int | None = setting("number of labels of each class that are used; None: all", None)
    draw: int = setting("which subset of `per_class` labels, as in few_per_class", 0)
    draws: int = setting("how many such subsets there are, as in few_per_class", 5)
    class_weights: str | tuple[float, ...] | None = setting(
        "one for each class, or 'balanced', inverse to its images; scaled to a mean of 1 over the training images", None
    )
    pad: int = setting("pixels reflected around an image before it is cropped to its size at random; 0: no crop", 4)
    augment: str | None = setting(
        "'tokens' flips and crops tokens, 'images' does so before they are resized; None: tokens where the images have "
        "the model's size, and both give the same",
        None,
    )
    holdout: float = setting("fraction of each class that is held out for validation", 0.1)
    patience: int = setting("rows of the log without a lower validation loss that end the run", 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cooldown > self.steps:
            raise ValueError(f"cooldown={self.cooldown}; expected from 0 to steps={self.steps}")
        if self.holdout >= 1:
            raise ValueError(f"expected holdout in [0, 1); got {self.holdout}")
        if self.augment not in (None, "tokens", "images"):
            raise ValueError(
                f"augment={self.augment!r}, pad={self.pad}; expected 'tokens', 'images' or None, and pad >= 0 (flip "
                "False and pad 0 change no image)"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: the same until `cooldown` begins."""
        if self.learning_rate is None:
            raise ValueError("learning_rate is None, which `finetune` fills in for a model; expected a number")
        return self.learning_rate * min(1, (self.steps - step) / self.cooldown) if self.cooldown else self.learning_rate

    @property
    def draws_pixels(self) -> bool:
        """Is there an L_gen that anything learns from?"""
        return self.generative > 0 and not self.head_only
