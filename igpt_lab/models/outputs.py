"""What a forward pass gives, and keys and values of earlier ones; pytree knows both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import MappingKey, register_pytree_node

if TYPE_CHECKING:
    from igpt_lab.models.config import ImageGPTConfig

FIELDS = (
    "loss", "last_hidden_state", "logits", "past_key_values", "hidden_states", "attentions", "cross_attentions",
)  # fmt: skip


class Output(dict):
    """What a forward pass gives: fields by attribute, key or index, as the outputs of transformers.

    A field that was not asked for is None as an attribute, and absent as a key and in `to_tuple()`; setting one to
    None takes it away.
    """

    fields: tuple[str, ...] = FIELDS

    def __getattr__(self, name: str):
        if name in self.fields:
            return self.get(name)
        raise AttributeError(f"an output has no {name!r}; it has {', '.join(self)}")

    def __setattr__(self, name: str, value) -> None:
        if name not in self.fields:
            raise AttributeError(f"an output has no {name!r}; its fields are {', '.join(self.fields)}")
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: str | int | slice):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The fields that are there, in order."""
        return tuple(self.values())


register_pytree_node(  # so that what looks for tensors in outputs finds them: DistributedDataParallel, torch.export
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(zip(names, values, strict=True)),
    serialized_type_name="igpt_lab.Output",
    flatten_with_keys_fn=lambda output: ([(MappingKey(name), value) for name, value in output.items()], list(output)),
)


class Generated(Output):
    """What `generate` gives with `return_dict_in_generate`."""

    fields = ("sequences", "scores", "logits", "attentions", "hidden_states")


class GeneratedBeams(Output):
    """The same of a search with beams."""

    fields = (
        "sequences", "sequences_scores", "scores", "logits", "beam_indices", "attentions", "hidden_states",
    )  # fmt: skip


def output_of(values: dict, return_dict: bool) -> Output | tuple:
    """`values` without those that are None, as `Output` or as a tuple."""
    output = Output({name: value for name, value in values.items() if value is not None})
    return output if return_dict else output.to_tuple()


class KeyValueCache:
    """Keys and values of every block's self-attention, each (N, heads, t, D / heads), for decoding.

    `KeyValueCache()` grows with every forward pass and keeps gradients. `KeyValueCache.of(config, ...)` has room for
    `length` positions from the start and is written in place: faster, without gradients.
    """

    def __init__(self):
        self.filled = 0
        self.room: Tensor | None = None
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, config: ImageGPTConfig, batch: int, length: int, *, device, dtype) -> KeyValueCache:
        """A cache for `batch` images of up to `length` positions."""
        cache = cls()
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        cache.room = torch.zeros(shape, device=device, dtype=dtype)
        return cache

    def __len__(self) -> int:
        """Layers that it holds, as transformers' caches."""
        return len(self.states) if self.room is None else len(self.room)

    def get_seq_length(self) -> int:
        """Positions that it holds; the name is transformers'."""
        return self.filled

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless `tokens` more positions of `batch` images fit behind what is filled."""
        held = self.room.shape[2] if self.room is not None else self.states[0][0].shape[0] if self.states else batch
        if batch != held:
            raise ValueError(f"a batch of {batch} for a cache of {held}; make the cache with batch={batch}")
        if self.room is not None and self.filled + tokens > self.room.shape[4]:
            length = self.room.shape[4]
            raise ValueError(f"{tokens} more tokens for a cache that holds {self.filled} of {length}; make it longer")

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (N, heads, t, D / heads) behind what is filled; returns all keys and values so far."""
        if self.room is None:
            if layer in self.states:
                old = self.states[layer]
                key, value = torch.cat([old[0], key], dim=2), torch.cat([old[1], value], dim=2)
            self.states[layer] = key, value
            return key, value
        end = self.filled + key.shape[2]
        self.room[layer, 0, :, :, self.filled : end] = key
        self.room[layer, 1, :, :, self.filled : end] = value
        return self.room[layer, 0, :, :, :end], self.room[layer, 1, :, :, :end]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take those of other images, int64 (N,), in place of those of each one; the name is transformers'."""
        self.states = {layer: (key[beam_idx], value[beam_idx]) for layer, (key, value) in self.states.items()}
        if self.room is not None:
            held = self.room[..., : self.filled, :]
            held.copy_(held[:, :, beam_idx])


def _named(cache: KeyValueCache) -> dict[str, Any]:
    """Its tensors by name, of which there are none for room that it has not."""
    room = {} if cache.room is None else {"room": cache.room}
    return room | {str(layer): states for layer, states in cache.states.items()}


def _cache_of(values: Iterable, rest: Any) -> KeyValueCache:
    cache, named = KeyValueCache(), dict(zip(rest[1], values, strict=True))
    cache.room, cache.filled = named.pop("room", None), rest[0]
    cache.states = {int(layer): states for layer, states in named.items()}
    return cache


register_pytree_node(
    KeyValueCache,
    lambda cache: (list(_named(cache).values()), (cache.filled, list(_named(cache)))),
    _cache_of,
    serialized_type_name="igpt_lab.KeyValueCache",
    flatten_with_keys_fn=lambda cache: (
        [(MappingKey(name), value) for name, value in _named(cache).items()],
        (cache.filled, list(_named(cache))),
    ),
)
