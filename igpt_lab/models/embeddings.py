"""The tables of a model whose rows are tokens: taken, set, made longer or shorter, and counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from igpt_lab.core.values import check

TIED = "lm_head.weight"


class Embeddings:
    """What a model has of `PreTrainedModel` that is about its embeddings and its head over tokens."""

    backbone: Any  # these of the class that inherits
    config: Any
    built: Any
    lm_head: Any
    modules: Any
    parameters: Any
    tie_weights: Any

    def get_input_embeddings(self) -> nn.Module:
        """`wte`, the embedding of tokens; the name is transformers'."""
        return self.backbone.wte

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        """Replace `wte`; the name is transformers'."""
        self.backbone.wte = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The head over colours, of a model that has one."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, embeddings: nn.Module) -> None:
        """Replace `lm_head`; the name is transformers'."""
        self.lm_head = embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Rows of `wte`, and of the head, are taken away at their end or added, as many as make `new_num_tokens`.

        As in transformers: the head gets as many as `wte`, and SOS is the new last row. New rows are drawn around the
        mean of the old ones, or without `mean_resizing` around 0. With `pad_to_multiple_of` there are more rows, up to
        the next multiple of it; ValueError where that is no whole number.
        """
        old: Any = self.get_input_embeddings()
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int):  # in the words of transformers
                raise ValueError(
                    f"Asking to pad the embedding matrix to a multiple of `{pad_to_multiple_of}`, which is not and "
                    "integer. Please make sure to pass an integer"
                )
            check("pad_to_multiple_of", pad_to_multiple_of, "int", 1)
            rows = len(old.weight) if new_num_tokens is None else new_num_tokens
            new_num_tokens = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if new_num_tokens is None:
            return old
        wte = nn.Embedding(0, 1, device="meta")
        wte.weight = resized(old.weight, new_num_tokens, self.config.initializer_range, mean_resizing)
        wte.num_embeddings, wte.embedding_dim = wte.weight.shape
        self.set_input_embeddings(wte)
        head: Any = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings:
            head.weight = resized(head.weight, new_num_tokens, self.config.initializer_range, mean_resizing)
        self.config.vocab_size = self.built.vocab_size = self.backbone.config.vocab_size = new_num_tokens
        self.backbone.built.vocab_size = self.vocab_size = new_num_tokens
        self.tie_weights()
        if head is not None:
            head.out_features = new_num_tokens
        return wte

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """All of them, biases too; or only those that are trained, or that are in no `nn.Embedding`."""
        out = {id(p) for part in self.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        counted = (p for p in self.parameters() if not (exclude_embeddings and id(p) in out))
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)


def resized(weight: nn.Parameter, rows: int, scale: float, around_mean: bool) -> nn.Parameter:
    """The first `rows` of a weight (V, D), and those behind them new: normal, around the mean of the old ones or 0."""
    old = weight.detach()
    new = torch.randn(max(0, rows - len(old)), old.shape[1], device=old.device, dtype=old.dtype) * scale
    new = new * 1e-3 + old.mean(dim=0) if around_mean else new
    return nn.Parameter(torch.cat([old[:rows], new]), requires_grad=weight.requires_grad)
