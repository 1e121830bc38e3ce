"""Beam search: the likeliest continuations of every row, side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FAR = -1e9  # the sum of a beam that is a copy of the first one, as in transformers


class Beams:
    """Picks the tokens of N rows with B beams each by the sum of the log probabilities of a beam's tokens.

    As in transformers, where all rows end at one length. Every step takes 2 B continuations of a row, and keeps the
    likeliest B of them; the last step keeps the first B.

    Args:
        tokens: int64 (N, B, length), of all columns in the end.
        score: `score(logits (N B, V), column)` gives log probabilities of the same shape.
        draw: `draw(scores (N, M), count)` gives columns of each row, int64 (N, count).
    """

    def __init__(self, tokens: Tensor, score: Callable[[Tensor, int], Tensor], draw: Callable[[Tensor, int], Tensor]):
        rows, beams, length = tokens.shape
        self.last, self.score = length - 1, score
        self.draw = draw
        self.firsts = torch.arange(rows, device=tokens.device)[:, None] * beams
        self.sums = torch.full((rows, beams), FAR, device=tokens.device)
        self.sums[:, 0] = 0
        self.origins = tokens.new_zeros(rows * beams, 0, dtype=torch.int32)

    def __call__(self, logits: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Logits (N B, V) -> tokens (N B, 1), the likeliest beam of a row first, and the beams that they continue."""
        colours, beams = logits.shape[1], self.sums.shape[1]
        sums = (self.score(logits, column).unflatten(0, self.sums.shape) + self.sums[:, :, None]).flatten(1)
        taken = self.draw(sums, min(2 * beams, sums.shape[1]))
        taken = taken[:, :beams] if column == self.last else taken
        self.sums, order = sums.gather(1, taken).topk(beams)
        taken = taken.gather(1, order)
        continued = (taken // colours + self.firsts).flatten()
        self.origins = torch.cat([self.origins[continued], continued[:, None].int()], dim=1)
        return (taken % colours).view(-1, 1), continued

    def best(self, tokens: Tensor, settings: dict) -> dict[str, Tensor]:
        """Of int64 (N B, length) the likeliest of each row as asked, by the names of what `generate` returns."""
        values = {"sequences": tokens, "beam_indices": self.origins}
        if settings["output_scores"]:
            values["sequences_scores"] = (self.sums / self.origins.shape[1] ** settings["length_penalty"]).flatten()
        count = settings["num_return_sequences"]
        return {name: x.unflatten(0, self.sums.shape)[:, :count].flatten(0, 1) for name, x in values.items()}
