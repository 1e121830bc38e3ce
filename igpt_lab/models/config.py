"""Shape and options of an ImageGPT: its configuration, the published sizes, the activations by name."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_lab.core import hub
from igpt_lab.core.values import check, did_you_mean


@dataclass(frozen=True, init=False)  # its own `__init__` knows the aliases
class ImageGPTConfig:
    """Shape and options of a model; names and defaults are those of transformers' `ImageGPTConfig` (size S).

    `vocab_size` is V + 1: the palette's colours and SOS, whose index is V. `hidden_size`, `max_position_embeddings`,
    `num_attention_heads` and `num_hidden_layers` are other names of `n_embd`, `n_positions`, `n_head` and `n_layer`, as
    arguments and as attributes. `num_labels` and `id2label` give each other, and `label2id` gives both.
    `bidirectional` is ours alone: the original's BERT models, without a causal mask and without SOS.
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
        values = own_names(values)
        defaults = {field.name: field.default for field in fields(self)}
        for name in sorted(set(values) - set(defaults)):
            raise TypeError(f"ImageGPTConfig has no field {name!r}; {did_you_mean(name, [*defaults, *ALIASES])}")
        for name, value in (defaults | values).items():
            object.__setattr__(self, name, value)
        for f in fields(self):
            kind = f"{f.type} | None" if f.default is None else str(f.type)
            check(f.name, getattr(self, f.name), kind, *LIMITS.get(f.name, ()))
        self._check()

    def _check(self) -> None:
        """Raise ValueError for a value that no model has; fill in `num_labels` and `id2label` from each other."""
        labels = _by_number(self.id2label or {})
        if self.num_labels is None:
            object.__setattr__(self, "num_labels", len(labels) or 2)
        if all(name == f"LABEL_{k}" for k, name in labels.items()):  # transformers' names of classes without names
            labels = {k: f"LABEL_{k}" for k in range(self.num_labels)}
        object.__setattr__(self, "id2label", labels)
        if self.num_labels != len(labels):
            raise ValueError(f"num_labels is {self.num_labels}, but id2label names {len(labels)} classes")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; choose one that is")
        if self.activation_function not in ACTIVATIONS:
            name = reprlib.repr(self.activation_function)
            raise ValueError(f"activation_function {name}; expected one of {sorted(ACTIVATIONS)}")
        if self.problem_type not in (None, *PROBLEMS):
            raise ValueError(f"problem_type {reprlib.repr(self.problem_type)}; expected None or one of {PROBLEMS}")

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

    @classmethod
    def from_dict(cls, values: dict) -> ImageGPTConfig:
        """A configuration from a `config.json` dict; unknown names are ignored."""
        if values.get("model_type", "imagegpt") != "imagegpt":
            raise ValueError(f"model_type {reprlib.repr(values['model_type'])} in config.json; expected 'imagegpt'")
        values = own_names(values)
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict:
        """The configuration as a dict, as `config.json` of transformers has it."""
        return {"model_type": "imagegpt", **asdict(self), "label2id": self.label2id}

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **changes) -> ImageGPTConfig:
        """From the `config.json` of a bundled name, a folder or a Hub name; `changes` are fields."""
        where = hub.resolve(source, revision=revision, weights=False) / "config.json"
        return config_of(hub.read_json(where), changes, where)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` as transformers reads it; returns the folder."""
        hub.write_json(Path(folder) / "config.json", self.to_dict())
        return Path(folder)


ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


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


def own_names(values: dict) -> dict:
    """Fields by their names: without aliases, which win as in transformers, and `label2id` as the `id2label` it is."""
    aliased = {ALIASES[name]: value for name, value in values.items() if name in ALIASES}
    values = {name: value for name, value in values.items() if name not in ALIASES} | aliased
    check("label2id", values.get("label2id"), "dict[str, int] | None")
    numbers = values.pop("label2id", None)
    if numbers is not None and not values.get("id2label"):
        values["id2label"] = {k: name for name, k in numbers.items()}
        if len(values["id2label"]) < len(numbers):
            raise ValueError(
                f"label2id gives {len(numbers)} classes {len(values['id2label'])} different numbers; "
                "expected one for each class"
            )
    return values


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
    if torch.is_grad_enabled():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)


_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": F.relu,
    "relu6": F.relu6, "leaky_relu": F.leaky_relu, "silu": F.silu, "swish": F.silu, "mish": F.mish, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip
"""By transformers' names."""

SIZES = {
    "S": ImageGPTConfig(n_layer=24, n_embd=512, n_head=8),
    "M": ImageGPTConfig(n_layer=36, n_embd=1024, n_head=8),
    "L": ImageGPTConfig(n_layer=48, n_embd=1536, n_head=16),
    "XL": ImageGPTConfig(n_layer=60, n_embd=3072, n_head=16),
}
"""The published sizes at 32 x 32 pixels (76M, 455M, 1362M and 6801M parameters without biases).

XL was never released and its number of heads never published: 16 is our guess, and no parameter count depends on it.
"""


def config_of(config: dict, changes: dict, where: Path) -> ImageGPTConfig:
    """A `config.json` dict, read from `where`, with some fields set anew; a misspelt one raises TypeError."""
    changes = own_names(changes)
    if unknown := set(changes) - {f.name for f in fields(ImageGPTConfig)}:
        ImageGPTConfig(**dict.fromkeys(unknown))
    try:
        config = own_names(config)
        if {"num_labels", "id2label"} & set(changes):
            config = {name: value for name, value in config.items() if name not in ("id2label", "num_labels")}
        return ImageGPTConfig.from_dict(config | changes)
    except ValueError as error:
        raise hub.CheckpointError(f"{where}: {error}") from error
