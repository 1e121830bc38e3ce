"""Logits -> scores: what `generate` changes and leaves out before it picks a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shaped(logits: Tensor, tokens: Tensor, settings: dict) -> Tensor:
    """Logits (N, V) behind int64 tokens (N, t) -> float32 scores (N, V), as `settings` asks by the names of `generate`.

    In the order of transformers: penalty, forbidden words, numbers that are not finite; and before a draw temperature
    and `cut`. Where there are beams it leaves two tokens or more, so that every one can go on.
    """
    scores = logits.float()
    if settings["repetition_penalty"] != 1:
        scores = penalised(scores, tokens, settings["repetition_penalty"])
    if settings["bad_words_ids"]:
        scores = forbidden(scores, tokens, settings["bad_words_ids"])
    if settings["remove_invalid_values"]:
        scores = scores.nan_to_num()
    if settings["do_sample"]:
        least = 1 + (settings["num_beams"] > 1)
        scores = cut(scores / settings["temperature"], settings["top_k"], settings["top_p"], least=least)
    return scores


def penalised(scores: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Scores (N, V), those of a token that int64 (N, t) has divided by `penalty`, or multiplied below 0.

    Of Keskar et al., 2019; a token that is not among the V, such as SOS, has no score.
    """
    n, v = scores.shape
    held = torch.zeros(n, v + 1, dtype=torch.bool, device=scores.device).scatter_(1, tokens.clamp(max=v), True)
    return torch.where(held[:, :v], torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbidden(scores: Tensor, tokens: Tensor, words: list[list[int]]) -> Tensor:
    """Scores (N, V), minus infinity where the token would be the last one of a word behind int64 (N, t)."""
    scores, t = scores.clone(), tokens.shape[1]
    for *begun, last in words:
        if last >= scores.shape[1]:
            raise ValueError(f"bad_words_ids ends a word with {last}; expected a token below {scores.shape[1]}")
        if len(begun) <= t:
            ends = tokens[:, t - len(begun) :] == torch.tensor(begun, dtype=torch.long, device=tokens.device)
            scores[:, last].masked_fill_(ends.all(dim=1), -math.inf)
    return scores


def cut(logits: Tensor, top_k: int | None, top_p: float | None, *, least: int = 1) -> Tensor:
    """Logits (N, V) with minus infinity outside the `top_k` largest, then outside the nucleus of `top_p`.

    Ties with the k-th stay. The nucleus is the smallest set of the most probable tokens whose sum reaches `top_p`
    (Holtzman et al., 2020). The `least` most probable ones always stay.
    """
    if top_k:  # 0 leaves nothing out, as in transformers
        if top_k < 0:
            raise ValueError(f"top_k={top_k}; expected a whole number above 0, or None to leave nothing out")
        smallest = logits.topk(min(max(top_k, least), logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a fraction above 0 and at most 1, or None to leave nothing out")
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        out = before >= top_p
        if least > 1:  # the first one is never out
            out[:, :least] = False
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
    return logits
