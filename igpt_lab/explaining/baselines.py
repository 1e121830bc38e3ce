"""What counting pixels says of the next one: levels to compare a lens with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import mean_interval
from igpt_lab.images.tokens import checked_tokens


@checked
def pixel_baselines(train_tokens: np.ndarray, tokens: np.ndarray, colours: int) -> pd.DataFrame:
    """How well counting pixels predicts the same pixels, in nats: levels to compare a lens with.

    A row each for `ln V`, `unigram` and `previous pixel`, with `baseline`, `nats`, its 95% interval over images `low`
    and `high`, and `n` images of `tokens` (N, T). Counts are of `train_tokens` (M, T), M > 1, below `colours`. The
    unigram has one added to each count (Laplace). p(x | previous) is (count + c p(x)) / (all counts + c), p being the
    unigram (MacKay and Peto, 1995), with the c of 1, 4, 16, ... 1024 that fits every tenth training image best, counted
    on the others. Before the first pixel comes the start token; before the first of a row, the last of the row above.
    """
    size = SimpleNamespace(n_colours=colours, n_positions=np.shape(train_tokens)[-1])
    train_tokens, tokens = (checked_tokens(images, size).astype(np.int64) for images in (train_tokens, tokens))
    if len(train_tokens) < 2 or not len(tokens):
        raise ValueError(f"{len(train_tokens)} training images and {len(tokens)} others; expected at least 2 and 1")
    held, others = train_tokens[::10], np.delete(train_tokens, np.s_[::10], axis=0)
    strengths = [4.0**power for power in range(6)]
    best = strengths[int(np.argmin([_nats_by(_counted(others, colours, c), held).mean() for c in strengths]))]
    of_images = {
        "ln V": np.full(len(tokens), np.log(colours)),
        "unigram": -np.log(_unigram(train_tokens, colours))[tokens].mean(1),
        "previous pixel": _nats_by(_counted(train_tokens, colours, best), tokens),
    }
    means, low, high = mean_interval(np.stack(list(of_images.values()), axis=1))
    return pd.DataFrame({"baseline": list(of_images), "nats": means, "low": low, "high": high, "n": len(tokens)})


def _unigram(tokens: np.ndarray, colours: int) -> np.ndarray:
    counts = np.bincount(tokens.ravel(), minlength=colours) + 1
    return counts / counts.sum()


def _previous(tokens: np.ndarray, colours: int) -> np.ndarray:
    """The token before each, the start token before the first of an image."""
    return np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=colours)


def _counted(tokens: np.ndarray, colours: int, strength: float) -> np.ndarray:
    """p(pixel | previous pixel) (V + 1, V), the last row behind the start token."""
    pairs = _previous(tokens, colours) * colours + tokens
    counts = np.bincount(pairs.ravel(), minlength=(colours + 1) * colours).reshape(colours + 1, colours)
    smoothed = counts + strength * _unigram(tokens, colours)
    return smoothed / smoothed.sum(1, keepdims=True)


def _nats_by(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean of -log p over an image's pixels, (N,)."""
    return -np.log(table[_previous(tokens, table.shape[1]), tokens]).mean(1)
