"""What a processor returns."""

from __future__ import annotations

from typing import Any

import torch


class Batch(dict):
    """What a processor returns, by name or as attributes: `batch["input_ids"]` is `batch.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}")
        return self[name]

    @property
    def data(self) -> Batch:
        """Itself, by the name that transformers' batch has for its dict."""
        return self

    def to(self, *where, **options) -> Batch:
        """Itself, with its tensors moved as by `Tensor.to`; a dtype is for floating point: ids stay integers."""
        self.update({name: _moved(x, where, options) for name, x in self.items()})
        return self


def _moved(x: Any, where: tuple, options: dict) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    if not x.is_floating_point():
        where = tuple(place for place in where if not isinstance(place, torch.dtype))
        options = {name: value for name, value in options.items() if name != "dtype"}
    return x.to(*where, **options) if where or options else x
