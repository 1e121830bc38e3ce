"""The states of one image as a cloud and as a path: how many directions they fill, and how sharply the path turns.

Letters: N images, T positions of an image of W columns, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import mean_interval
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.features.hooks import check_eval, layers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.losses import on_device

MEASURES = ("image_entropy", "curvature", "curvature_at_row_ends")


@checked
def measure_states(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    point: str = "ln_1",
    alignment: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Measurement:
    """Entropy and curvature of the states of each image, layer by layer; no labels are needed.

    `image_entropy` is the matrix entropy (`matrix_entropy`) of an image's states, in nats: Skean et al. (2025) call it
    prompt entropy. `curvature` is the mean angle between one step from state to state and the next one (Hosseini and
    Fedorenko, 2023), in radians: 0 where states lie on a straight line, pi / 2 for a staircase, about that for steps
    without relation in many dimensions. A step that goes nowhere has no angle and is left out. Where the path leaves
    one row of the image for the next, its turns are counted apart, in `curvature_at_row_ends`.

    Args:
        model: Ours or transformers', in eval mode.
        tokens: Palette indices, integers (N, T), of whole square images.
        layers: All by default.
        point: Place in a block, see `record`.
        alignment: "sos", or "raw" for a bidirectional model. With "sos" the first state, which is the same for every
            image, is left out.
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        `Measurement`, whose table has a row per layer and measure: `layer`, `measure`, `value`, the mean over images,
        with its 95% interval `low`, `high` over images, and `n` images. `of_images` has for (layer, measure) the value
        of each image, NaN where no turn of its kind has an angle.

    Raises:
        ValueError: Another layer or point, or tokens that are not those of whole square images of two rows or more.
        RuntimeError: A model in training mode.

    Example:
        >>> measured = lab.measure_states(model, tokens, layers=[0, 3])
        >>> measured.table[["layer", "measure", "n"]].head(3)
           layer                measure    n
        0      0          image_entropy  100
        1      0              curvature  100
        2      0  curvature_at_row_ends  100
    """
    config: Any = model.config
    alignment = alignment or ("raw" if getattr(config, "bidirectional", False) else "sos")
    tokens, side = checked_tokens(tokens, config), math.isqrt(config.n_positions)
    if tokens.shape[1] != side**2 or side < 2 or not len(tokens):
        raise ValueError(f"tokens {tokens.shape}; expected those of whole square images, (N, {config.n_positions})")
    check_eval(model)
    known = layers_of(point, config.n_layer, layers)
    size = batch_size or default_batch(config, next(model.parameters()).device)
    reduce = partial(_measured, side=side, first=int(alignment == "sos"))
    parts = []
    bar = tqdm(total=len(tokens), desc="states", unit="image", disable=not progress)
    with torch.no_grad(), bar, record(model, [point], layers=known, pool=reduce, alignment=alignment) as pooled:
        for start in range(0, len(tokens), size):
            pooled.run(on_device(model, tokens[start : start + size]), use_cache=False)
            parts.append(pooled[point].cpu().double().numpy())
            bar.update(len(parts[-1]))
    values = np.concatenate(parts)  # (N, layers, measures)
    keys = [(i, j) for i in range(len(known)) for j in range(len(MEASURES))]
    of_images = {(known[i], MEASURES[j]): values[:, i, j] for i, j in keys}
    return Measurement(pd.DataFrame([_row(*key, of) for key, of in of_images.items()]), of_images, ("layer", "measure"))


def _row(layer: int, measure: str, values: np.ndarray) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    mean, low, high = mean_interval(known) if len(known) else (np.nan, np.nan, np.nan)
    ends = {"value": float(mean), "low": float(low), "high": float(high)}
    return {"layer": layer, "measure": measure, **ends, "n": len(known)}


def _measured(states: Tensor, point: str, layer: int, *, side: int, first: int) -> Tensor:
    """States (N, T, D), the first of which hold no pixel -> float64 (N, 3), the MEASURES."""
    x = states[:, first:].cpu().double()  # where some devices have no such numbers
    within, ends = curvature(x, side)
    return torch.stack([entropy_of_images(x), within, ends], dim=1)


def entropy_of_images(states: Tensor) -> Tensor:
    """States float64 (N, T, D) -> nats (N,): the matrix entropy of each image's."""
    rows = nn.functional.normalize(states, dim=-1)
    grams = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
    values = torch.linalg.eigvalsh(grams).clamp(min=0)
    shares = values / values.sum(1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(1)


def curvature(states: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """States (N, T, D) of pixels 0, 1, ... of rows of `side` -> mean angles (N,) inside rows, and where a row ends.

    The turn at a pixel lies inside a row where its neighbours on both sides are of the same row.
    """
    steps = states.diff(dim=1)
    units = steps / steps.norm(dim=-1, keepdim=True)  # NaN for a step that goes nowhere
    angles = (units[:, 1:] * units[:, :-1]).sum(-1).clamp(-1, 1).arccos()
    column = torch.arange(1, states.shape[1] - 1, device=states.device) % side
    inside = (column > 0) & (column < side - 1)
    return angles[:, inside].nanmean(1), angles[:, ~inside].nanmean(1)
