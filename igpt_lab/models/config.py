"""Shape and options of an ImageGPT: its configuration, the published sizes, the activations by name."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_lab.core.values import check
from igpt_lab.models.config_files import ConfigFiles, own_names


@dataclass(init=False, unsafe_hash=True)  # its own `__init__` knows the aliases
class ImageGPTConfig(ConfigFiles):
    """Shape and options of a model; names and defaults are those of transformers' `ImageGPTConfig` (size S).

    `vocab_size` is V + 1: the palette's colours and SOS, whose index is V. `hidden_size`, `max_position_embeddings`,
    `num_attention_heads` and `num_hidden_layers` are other names of `n_embd`, `n_positions`, `n_head` and `n_layer`, as
    arguments and as attributes. `num_labels` and `id2label` give each other, and `label2id` gives both.
    `bidirectional` is ours alone: the original's BERT models, without a causal mask and without SOS.

    Fields may be set anew, and are checked then too; a model keeps the shape that it was built with. Other arguments
    and attributes are kept, in files too, but for a misspelt field: that is a TypeError, which names the field.
    """

    vocab_size: int = 513
    n_positions: int = 1024
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None
    activation_function: str = "quick_gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = field(default=None, hash=False)
    num_labels: int = None  # type: ignore[assignment]  # as `id2label` has, or else 2
    id2label: dict[int, str] = field(default=None, hash=False)  # type: ignore[arg-type]  # LABEL_0, LABEL_1, ...
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    bidirectional: bool = False

    hidden_size = property(attrgetter("n_embd"), doc="Another name of `n_embd`.")
    max_position_embeddings = property(attrgetter("n_positions"), doc="Another name of `n_positions`.")
    num_attention_heads = property(attrgetter("n_head"), doc="Another name of `n_head`.")
    num_hidden_layers = property(attrgetter("n_layer"), doc="Another name of `n_layer`.")

    def __init__(self, **values):
        values = {name: value for name, value in own_names(values).items() if name != "model_type"}
        vars(self).update({f.name: values.pop(f.name, f.default) for f in fields(ImageGPTConfig)})
        for name in sorted(values):
            self._keep(name, values[name])
        for f in fields(ImageGPTConfig):
            check_field(f.name, getattr(self, f.name))
        self._settle_labels()

    def __setattr__(self, name: str, value: Any) -> None:
        """A field, by any of its names, set anew and checked; anything else becomes an attribute."""
        ((name, value),) = own_names({name: value}).items()
        if name not in FIELDS:
            self._keep(name, value)
            return
        check_field(name, value)
        now = vars(self)
        if name == "id2label" or (name == "num_labels" and value != self.num_labels):
            now = now | {"num_labels": None, "id2label": None}
        before = dict(vars(self))
        vars(self).update(now | {name: value})
        try:
            self._settle_labels()
        except ValueError:
            vars(self).update(before)
            raise

    def _settle_labels(self) -> None:
        """Fill in `num_labels` and `id2label` from each other; ValueError where they differ."""
        labels = _by_number(self.id2label or {})
        count = len(labels) or 2 if self.num_labels is None else self.num_labels
        if all(name == f"LABEL_{k}" for k, name in labels.items()):  # transformers' names of classes without names
            labels = {k: f"LABEL_{k}" for k in range(count)}
        if count != len(labels):
            raise ValueError(f"num_labels is {count}, but id2label names {len(labels)} classes")
        vars(self).update(num_labels=count, id2label=labels)

    def check(self) -> None:
        """Raise ValueError for fields that make no model together."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; choose one that is")

    @property
    def n_colours(self) -> int:
        """V, the palette's size: every token is below it."""
        return self.vocab_size - 1

    @property
    def sos_token_id(self) -> int:
        """Index of SOS in `wte`: V."""
        return self.vocab_size - 1

    @property
    def label2id(self) -> dict[str, int]:
        """Class index by name."""
        return {name: k for k, name in self.id2label.items()}


def _size(most: int) -> tuple[float, float, str]:
    return 1, most, f"a whole number above 0, at most {most:,}"


FRACTION = 0, 1, "a fraction from 0 to 1"
LIMITS: dict[str, tuple[float, float, str]] = {  # far above any model, and of what a machine can still hold
    "vocab_size": _size(2**24), "n_positions": _size(2**24), "n_embd": _size(2**20), "n_layer": _size(10_000),
    "n_head": _size(2**20), "n_inner": _size(2**24), "num_labels": _size(10**6), "resid_pdrop": FRACTION,
    "embd_pdrop": FRACTION, "attn_pdrop": FRACTION, "layer_norm_epsilon": (1e-300, 1e300, "a number above 0"),
    "initializer_range": (0, 1e6, "a number from 0 on"),
}  # fmt: skip
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


FIELDS = {f.name: f for f in fields(ImageGPTConfig)}


def check_field(name: str, value: Any) -> None:
    """ValueError for a value that this field has in no model."""
    kind = f"{FIELDS[name].type} | None" if FIELDS[name].default is None else str(FIELDS[name].type)
    check(name, value, kind, *LIMITS.get(name, ()))
    if name == "activation_function" and value not in ACTIVATIONS:
        raise ValueError(f"activation_function {reprlib.repr(value)}; expected one of {sorted(ACTIVATIONS)}")
    if name == "problem_type" and value not in (None, *PROBLEMS):
        raise ValueError(f"problem_type {reprlib.repr(value)}; expected None or one of {PROBLEMS}")


def _by_number(names: dict) -> dict[int, str]:
    """`id2label` in the order of its numbers; ValueError where these are not 0 to K - 1, each once."""
    try:
        numbers = [int(str(k)) for k in names]
    except ValueError as error:
        raise ValueError(f"id2label has the keys {', '.join(map(repr, names))[:80]}; expected 0, 1, 2, ...") from error
    in_order = sorted(zip(numbers, names.values(), strict=True))
    wrong = next((k for place, (k, _) in enumerate(in_order) if k != place), None)
    if wrong is not None:
        raise ValueError(
            f"id2label has {len(names)} classes, and the number {wrong} does not fit; "
            f"expected 0 to {len(names) - 1}, each once"
        )
    return {k: str(name) for k, name in in_order}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the original's activation."""
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)


_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": F.relu,
    "relu6": F.relu6, "leaky_relu": F.leaky_relu, "silu": F.silu, "swish": F.silu, "mish": F.mish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip
"""By transformers' names."""


class _Sizes(dict):
    """Configurations by name, a copy each time: who changes one changes nobody else's."""

    def __getitem__(self, name: str) -> ImageGPTConfig:
        return replace(super().__getitem__(name))


SIZES = _Sizes(
    S=ImageGPTConfig(n_layer=24, n_embd=512, n_head=8),
    M=ImageGPTConfig(n_layer=36, n_embd=1024, n_head=8),
    L=ImageGPTConfig(n_layer=48, n_embd=1536, n_head=16),
    XL=ImageGPTConfig(n_layer=60, n_embd=3072, n_head=16),
)
"""The published sizes at 32 x 32 pixels (76M, 455M, 1362M and 6801M parameters without biases).

XL was never released and its number of heads never published: 16 is our guess, and no parameter count depends on it.
"""
