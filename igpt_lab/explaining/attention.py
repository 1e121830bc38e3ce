"""Where heads look: offsets on the image, distance, entropy and share of the start token, beside uniform attention.

State i predicts pixel i of the image; slot 0 of the input is the start token (SOS), and slot j >= 1 holds pixel j - 1.
So state i sees SOS and the pixels before pixel i. An offset (dy, dx) leads from the predicted pixel to the one that is
looked at: (0, -1) is the left neighbour, the state's own slot, and (-1, 0) the pixel above.

A pixel in column 0 has no left neighbour, and the one before it ends the row above, W - 1 columns away. What is looked
at there is the `wrap`, and no offset: a head that looks at the previous pixel would seem to look far.

Letters: N images, T positions, W side, L blocks, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import widened
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import mean_interval
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.features.hooks import check_eval, layers_of, record
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.losses import check_causal, on_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTINGS = ("weights", "values")
OF_STATES = ("entropy", "entropy_ratio", "sos")  # measured state by state
OF_OFFSETS = ("wrap", "left", "above", "same_row", "same_column", "distance")  # that follow from the offsets
MEASURES = (*OF_STATES, *OF_OFFSETS)
SHOWN = ("distance", "entropy", "entropy_ratio", "sos", "wrap", "left", "above", "same_row", "same_column")
PAIRS = 2**26  # of a state and a slot in a batch, over all heads: 268 MB, where a model itself makes all its weights


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSummary(Measurement):
    """Where each head looks: `table` has a row for each layer and head, `offsets` one for each of its offsets.

    `of_images` has for (layer, head) each image's distance over that of uniform attention.
    """

    offsets: pd.DataFrame

    def plot(self, **options) -> Figure:
        """Distance and entropy over depth: `options` are arguments of `lab.figures.attention_depth`."""
        from igpt_lab import figures

        return figures.attention_depth(self.table, **options)


@checked
def attention_maps(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    weighting: str = "weights",
    batch_size: int | None = None,
    progress: bool = True,
) -> AttentionSummary:
    """Where each head of the blocks looks, mean over images and over the states 1..T - 1.

    State 0, which sees the start token alone, is left out. Weights are made in float32 or wider, for one row of the
    image at a time, and reduced there.

    Args:
        model: Ours, or transformers' of the same class.
        tokens: Palette indices (N, T) of whole images, as `tokenize` gives them.
        layers: Blocks, all by default.
        weighting: "weights" are the attention weights a; "values" are |a v W_O|, how long the vector is that a slot
            adds (Kobayashi et al., 2020), as shares of their sum (NaN of a head that adds nothing).
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        `AttentionSummary`, whose `table` has `layer`, `head`, and each measure with its 95% interval over images
        (`_low`, `_high`) and its value under uniform attention over what is visible, in closed form (`_uniform`); then
        `n` images and `weighting`:

        - `entropy` of a state's shares over all it sees, in nats, and `entropy_ratio`, that over ln(number it sees);
        - `sos`, the share on the start token, and `wrap`, that on the previous pixel where it ends the row above;
        - `left` and `above`, shares on these neighbours, and `same_row` and `same_column`, which contain them;
        - `distance` in pixels, of the shares on offsets: sum of share times distance over sum of shares (NaN without
          any).

        `offsets` has `layer`, `head`, `dy`, `dx`, `share`, `share_uniform`, `n` and `weighting`. A head's shares over
        all offsets, with `sos` and `wrap`, add up to 1. The shares are means over all states, also those that have no
        such neighbour: that of `left` is at most 1 - 1 / W or so.

    Raises:
        ValueError: A bidirectional model, which has no SOS and sees what comes later; another weighting, a block that
            there is not, and what are no tokens of whole square images.
        RuntimeError: A model in training mode.

    Example:
        >>> attention = lab.attention_maps(model, tokens, layers=[0])
        >>> attention.table[["layer", "head", "distance_uniform", "n"]].round(2)
           layer  head  distance_uniform    n
        0      0     0              1.96  100
        1      0     1              1.96  100
    """
    tokens, chosen = _checked(model, tokens, layers, weighting)
    size, side = batch_size or _batch(model.config), round(tokens.shape[1] ** 0.5)
    measures: list[Tensor] = []
    sums = torch.zeros(())

    def reduce(qkv: Tensor, point: str, layer: int) -> Tensor:
        return _measured(_shares_of(model, qkv, layer, weighting), side)

    with torch.no_grad(), record(model, ["qkv"], layers=chosen, pool=reduce, alignment="sos") as pooled:
        for start in tqdm(range(0, len(tokens), size), desc="attention", unit="batch", disable=not progress):
            pooled.run(on_device(model, tokens[start : start + size]), use_cache=False)
            of_images, offsets = pooled["qkv"].split([len(MEASURES), side * (2 * side - 1)], dim=-1)
            measures.append(of_images)
            sums = sums.to(offsets) + offsets.sum(0)
    shares = (sums.cpu().double() / len(tokens)).unflatten(-1, (side, 2 * side - 1)).numpy()
    values, offsets_uniform = uniform_attention(side)
    of_all = torch.cat(measures).cpu().double().numpy()  # (N, layers, heads, 9)
    long = _long(shares, chosen, offsets_uniform)
    ends = {"n": len(tokens), "weighting": weighting}
    ratios = of_all[..., MEASURES.index("distance")] / values["distance"]
    of_images = {
        (layer, head): ratios[:, place, head] for place, layer in enumerate(chosen) for head in range(ratios.shape[2])
    }
    table = _table(of_all, chosen, values).assign(**ends)
    return AttentionSummary(table, of_images, ("layer", "head"), offsets=long.assign(**ends))


@checked
def attention_from(
    model: nn.Module,
    tokens: np.ndarray,
    position: int,
    *,
    layers: Sequence[int] | None = None,
    weighting: str = "weights",
) -> pd.DataFrame:
    """Where each head looks in one image, from the state that predicts one pixel.

    Args:
        model: Ours, or transformers' of the same class.
        tokens: Palette indices of one image, (T,) or (1, T).
        position: The predicted pixel, 0..T - 1 in raster order.
        layers: Blocks, all by default.
        weighting: "weights" or "values", see `attention_maps`.

    Returns:
        A row per block, head and pixel of the image: `layer`, `head`, `row`, `column`; `weight`, a share, NaN from the
        predicted pixel on, which the state does not see; `sos`, the weight of the start token, the same in all rows of
        a head; `weighting`. A head's weights and its `sos` add up to 1.

    Raises:
        ValueError: A position that there is not, several images, and as `attention_maps`.
        RuntimeError: A model in training mode.

    Example:
        >>> looks = lab.attention_from(model, tokens[0], 5, layers=[2])
        >>> looks[looks["head"] == 0].pivot(index="row", columns="column", values="weight").notna()
        column      0      1      2      3
        row
        0        True   True   True   True
        1        True  False  False  False
        2       False  False  False  False
        3       False  False  False  False
    """
    tokens = np.asarray(tokens)
    tokens, chosen = _checked(model, tokens[None] if tokens.ndim == 1 else tokens, layers, weighting)
    if len(tokens) != 1:
        raise ValueError(f"tokens of {len(tokens)} images; expected those of one, (T,) or (1, T)")
    count = tokens.shape[1]
    if not 0 <= position < count:
        raise ValueError(f"position {position}; expected that of a pixel, 0..{count - 1}")

    def reduce(qkv: Tensor, point: str, layer: int) -> Tensor:
        shares = _shares_of(model, qkv, layer, weighting)(position, position + 1)[:, :, 0]
        return F.pad(shares, (0, count - position), value=torch.nan)

    with torch.no_grad(), record(model, ["qkv"], layers=chosen, pool=reduce, alignment="sos") as pooled:
        pooled.run(on_device(model, tokens), use_cache=False)
    shares = pooled["qkv"][0].cpu().double().numpy()  # (layers, heads, 1 + T)
    side, (_, heads, _) = round(count**0.5), shares.shape
    places = pd.MultiIndex.from_product([chosen, range(heads), range(side), range(side)])
    table = places.to_frame(index=False, name=["layer", "head", "row", "column"])
    sos = shares[..., 0].repeat(count)
    return table.assign(weight=shares[..., 1:].ravel(), sos=sos, weighting=weighting)


def _checked(model: Any, tokens: Any, layers: Sequence[int] | None, weighting: str) -> tuple[np.ndarray, list[int]]:
    """Tokens (N, T) of whole images and the blocks, both fit for this model; ValueError where anything is not."""
    config = model.config
    check_causal(config)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    check_eval(model)
    chosen = layers_of("qkv", config.n_layer, layers)
    count = config.n_positions
    tokens = checked_tokens(tokens, config)
    if not len(tokens) or tokens.shape[1] != count or round(count**0.5) ** 2 != count or count < 4:
        raise ValueError(f"tokens {tokens.shape}; expected whole square images, (N, {count}), of 2 x 2 pixels or more")
    return tokens, list(dict.fromkeys(chosen))


def _batch(config: Any) -> int:
    return min(64, max(1, PAIRS // (config.n_head * config.n_positions**2)))


def _shares_of(model: Any, qkv: Tensor, layer: int, weighting: str) -> Callable[[int, int], Tensor]:
    """A function of states i..end: their shares (N, heads, end - i, end) of what they see, from `qkv` (N, T, 3 D)."""
    config = model.config
    query, key, value = (
        widened(part).unflatten(-1, (config.n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
    )
    scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    mixing = getattr(model, "transformer", model).h[layer].attn.c_proj.weight  # (in, out), a head's rows together
    lengths = _lengths(value, widened(mixing)) if weighting == "values" else None

    def shares(start: int, end: int) -> Tensor:
        scores = query[:, :, start:end] @ key[:, :, :end].mT * scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(start + 1)
        weights = scores.masked_fill_(later, -torch.inf).softmax(-1)
        if lengths is None:
            return weights
        added = weights * lengths[:, :, None, :end]
        return added / added.sum(-1, keepdim=True)

    return shares


def _lengths(value: Tensor, mixing: Tensor) -> Tensor:
    """|v W_O| of each head and slot: values (N, heads, T, D / heads), W_O (D, D) -> (N, heads, T)."""
    rows = mixing.unflatten(0, (value.shape[1], -1))
    return torch.stack([(value[:, head] @ rows[head]).norm(dim=-1) for head in range(len(rows))], dim=1)


def _measured(shares: Callable[[int, int], Tensor], side: int) -> Tensor:
    """MEASURES, then all offsets (dy from 0 upwards, dx), of each image and head: (N, heads, 9 + W (2 W - 1)).

    One row of the image at a time: its weights are the most that is held.
    """
    count = side * side
    first = shares(0, side)
    logs = torch.arange(1, count + 1, device=first.device, dtype=first.dtype).log()  # of how much each state sees
    logs[0] = 1  # state 0 is left out, and this is no division by 0
    pairs = first.new_zeros(*first.shape[:2], side, side, side)  # (.., column of the predicted, rows up, column seen)
    states = first.new_zeros(len(OF_STATES), *first.shape[:2])
    for row in range(side):
        begin, end = row * side, (row + 1) * side
        seen = shares(begin, end) if row else first
        if not row:
            seen[:, :, 0] = 0
        entropy = torch.special.entr(seen).sum(-1)
        states += torch.stack([entropy.sum(-1), (entropy / logs[begin:end]).sum(-1), seen[..., 0].sum(-1)])
        pixels = F.pad(seen[..., 1:], (0, 1)).unflatten(-1, (row + 1, side))  # nobody sees the last one of the row
        pairs[:, :, :, : row + 1] += pixels.flip(-2)
    offsets, wrap = _offsets_of(pairs / (count - 1))
    return torch.cat([states.movedim(0, -1) / (count - 1), _of_offsets(offsets, wrap), offsets.flatten(-2)], dim=-1)


def _offsets_of(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Shares (.., column predicted, rows up, column seen) by their offset, (.., W, 2 W - 1), and the wrap's apart.

    Offset (dy, dx) is at [-dy, dx + W - 1].
    """
    side = pairs.shape[-1]
    offsets = pairs.new_zeros(*pairs.shape[:-3], side, 2 * side - 1)
    for column in range(side):
        offsets[..., side - 1 - column : 2 * side - 1 - column] += pairs[..., column, :, :]
    wrap = offsets[..., 1, -1].clone()  # W - 1 columns to the right, a row above: no other pair is so
    offsets[..., 1, -1] = 0
    return offsets, wrap


def _of_offsets(offsets: Tensor, wrap: Tensor) -> Tensor:
    """The measures OF_OFFSETS that follow from offsets (.., W, 2 W - 1): (.., 6)."""
    side = offsets.shape[-2]
    up = torch.arange(side, device=offsets.device, dtype=offsets.dtype)
    across = torch.arange(1 - side, side, device=offsets.device, dtype=offsets.dtype)
    distance = (offsets * torch.hypot(up[:, None], across)).sum((-2, -1)) / offsets.sum((-2, -1))
    row, column = offsets[..., 0, :], offsets[..., side - 1]
    return torch.stack([wrap, row[..., side - 2], column[..., 1], row.sum(-1), column.sum(-1), distance], dim=-1)


def uniform_attention(side: int) -> tuple[dict[str, float], np.ndarray]:
    """The measures and the offsets (W, 2 W - 1) under uniform attention over what is visible, in closed form.

    State i sees i + 1 slots, each with the share 1 / (i + 1). Means over i = 1..T - 1.
    """
    states = np.arange(1, side * side)
    share = np.append(0, 1 / (states + 1)).reshape(side, side) / len(states)  # of one slot, by predicted pixel
    offsets = np.zeros((side, 2 * side - 1))
    for up, right in np.ndindex(side, 2 * side - 1):
        dx = right - side + 1
        if up or dx < 0:
            offsets[up, right] = share[up:, max(0, -dx) : side - max(0, dx)].sum()
    wrap, offsets[1, -1] = offsets[1, -1], 0
    values = _of_offsets(torch.from_numpy(offsets), torch.tensor(wrap)).tolist()
    of_states = [np.log(states + 1).mean(), 1.0, share.sum()]
    return dict(zip(MEASURES, [*map(float, of_states), *values], strict=True)), offsets


def _table(of_images: np.ndarray, layers: list[int], uniform: dict[str, float]) -> pd.DataFrame:
    """A row for each layer and head, of MEASURES of images (N, layers, heads, 9)."""
    mean, low, high = (ends.reshape(-1, len(MEASURES)) for ends in mean_interval(of_images))
    columns: dict[str, Any] = {}
    for name in SHOWN:
        place = MEASURES.index(name)
        columns |= {name: mean[:, place], f"{name}_low": low[:, place], f"{name}_high": high[:, place]}
        columns[f"{name}_uniform"] = uniform[name]
    index = pd.MultiIndex.from_product([layers, range(of_images.shape[2])], names=["layer", "head"])
    return pd.DataFrame(columns, index).reset_index()


def _long(offsets: np.ndarray, layers: list[int], uniform: np.ndarray) -> pd.DataFrame:
    """A row for each layer, head and offset that there can be, of shares (layers, heads, W, 2 W - 1)."""
    side = uniform.shape[0]
    up, right = np.nonzero(uniform)
    index = pd.MultiIndex.from_product([layers, range(offsets.shape[1]), range(len(up))], names=["layer", "head", "o"])
    table = index.to_frame(index=False)
    which = table.pop("o")
    shares = {"share": offsets[..., up, right].ravel(), "share_uniform": uniform[up, right][which]}
    return table.assign(dy=-up[which], dx=right[which] - side + 1, **shares)
