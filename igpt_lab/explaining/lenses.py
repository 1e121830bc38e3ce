"""Lenses: what layer l says about the next pixel, read by the model's own last norm and head.

The logit lens (nostalgebraist, 2020) of layer l is softmax(U N_f(h^l)), h^l being the un-normed input of block l. With
the start token in front, state i predicts pixel i: the labels are the tokens themselves, not shifted. Every layer is
normed by its own scale, and at layer L the lens is the model.

A tied head has an outcome more than there are colours, the start token. `nats` counts it as the model's own loss does
(`losses_of`), and `start_token` says how many of these nats go to it; all that is said of colours (entropy, distances,
most probable colour) is of the distribution over colours alone, its column cut before the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import widened
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import at_once, side_by_side
from igpt_lab.core.significance import mean_interval
from igpt_lab.features.hooks import check_eval, layers_of, numbers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.cost import inner_width
from igpt_lab.models.losses import check_causal, on_device

Translate = Callable[[Tensor, int], Tensor]  # states (..., D) of a layer -> those that the last norm is given
MEASURES = ("nats", "error_to_final", "entropy", "rgb_error", "start_token")
NUMBERS = 2**24  # in the widest activations of a batch: 64 MB in float32
HELD = 2**26  # in the states of all batches that run at once: 256 MB in float32
LOGITS = 2**22  # made at a time


@checked
def logit_lens(
    model: Any,
    tokens: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    final: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How well the states of each layer 0..L, read by the model's own norm and head, predict the pixels.

    Held are the states of a batch at these layers, (layers, batch, T, D), and what the last one gives, (batch, T, V);
    by default of so few images that these states take 256 MB at most, or of one.

    Args:
        model: Ours, or transformers' of the same class.
        tokens: Palette indices (N, T) as `tokenize` gives them.
        layers: All by default.
        final: Measure `error_to_final` too. Without, a batch runs no further than the deepest of `layers`.
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        A row per layer, means over N images and T pixels:

        - `layer`, `kind` ("logit lens"), `n` images;
        - `nats`: -log p of the true pixel, with `low` and `high`, its 95% interval over images;
        - `error_to_final`: KL(final || lens) in nats, of the distributions over colours (NaN without `final`);
        - `entropy` of the lens, in nats;
        - `rgb_error`: expected squared distance of a colour drawn from the lens to the true one, channels from 0 to 1
          (NaN where the model has no palette);
        - `start_token`: the nats of `nats` that a tied head spends on the start token, 0 of an untied one.

    Raises:
        ValueError: A bidirectional model, one without a head over colours, a layer that there is not, or what are no
            tokens.
        RuntimeError: A model in training mode.

    Example:
        >>> lab.logit_lens(model, tokens)[["layer", "kind", "nats", "n"]].round(3)  # ln 8: a new head is zero
           layer        kind   nats    n
        0      0  logit lens  2.079  100
        1      1  logit lens  2.079  100
        2      2  logit lens  2.079  100
        3      3  logit lens  2.079  100
    """
    lenses = {"logit lens": as_they_are}
    return lens_table(model, tokens, lenses, layers=layers, final=final, batch_size=batch_size, progress=progress)


@checked
def lens_strip(
    model: Any, tokens: np.ndarray, *, lens: Any = None, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """One image through depth: a row for each layer and pixel, of what that layer expects there.

    `tokens`: of one image, (T,) or (1, T). `lens`: a `TunedLens`, or None for the logit lens. Columns: `layer`, `kind`;
    `position`, and the pixel's `row` and `column`; `token`, the most probable colour, and its `probability`; `nats`,
    -log p of the true pixel, as in `logit_lens`; `settled`, the first layer from which on the most probable colour is
    that of the last layer, whichever layers are asked for; `red`, `green`, `blue`, 0 to 255: the mean of all colours
    by their probability, and `true_red`, `true_green`, `true_blue` of the pixel (NaN without a palette).
    """
    tokens = np.asarray(tokens)
    tokens = lens_tokens(model, tokens[None] if tokens.ndim == 1 else tokens)
    if len(tokens) != 1:
        raise ValueError(f"tokens {tokens.shape}; expected those of one image, (T,) or (1, T)")
    if lens is not None:
        if not hasattr(lens, "matrices"):
            raise TypeError(f"lens is a {type(lens).__name__}; expected a TunedLens as fit_tuned_lens gives it")
        lens.check(model)
    colours, palette = model.config.vocab_size - 1, _palette(model)
    chosen = layers_of("resid_pre", len(model.transformer.h), layers)

    def reduce(states: Tensor, point: str, layer: int) -> Tensor:
        moved = states if lens is None else lens(states, layer)
        return _expected(head_logits(model, moved)[0], pixels[0], colours, palette)[None]

    pixels = on_device(model, tokens)
    with torch.no_grad(), record(model, ["resid_pre"], pool=reduce, alignment="sos") as pooled:
        pooled.run(pixels, use_cache=False)
    values = pooled["resid_pre"][0].cpu().double().numpy()  # (layers, T, 6)
    true = np.full((tokens.shape[1], 3), np.nan) if palette is None else palette.cpu().numpy()[tokens[0]]
    kind, width = "logit lens" if lens is None else "tuned lens", round(model.config.n_positions**0.5)
    return _strip_of(chosen, kind, width, values, (255 * true).round())


def lens_table(
    model: Any, tokens: np.ndarray, lenses: Mapping[str, Translate], *, layers: Sequence[int] | None = None,
    final: bool = True, batch_size: int | None = None, progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """The table of `logit_lens` for each kind of lens, of states that its function has moved first.

    All of them are measured in the same passes.
    """
    tokens, blocks = lens_tokens(model, tokens), len(model.transformer.h)
    chosen, device = layers_of("resid_pre", blocks, layers), next(model.parameters()).device
    recorded = [*chosen, blocks] if final else chosen
    size, at_most = _sizes(model, len(recorded), batch_size)
    numbers = numbers_of(model, size)

    @torch.no_grad()
    def measured(part: np.ndarray) -> Tensor:
        pixels = on_device(model, part)
        pooled.run(pixels, use_cache=False)
        states = {layer: pooled.layer("resid_pre", layer).flatten(0, 1) for layer in recorded}
        return _of_images(model, states, pixels, chosen, list(lenses.values()), final)

    batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    with record(model, ["resid_pre"], layers=recorded, pool=lambda x, *_: x, alignment="sos") as pooled:
        with closing(side_by_side(measured, batches, device, numbers, at_most)) as measures:
            values = list(tqdm(measures, total=len(batches), desc="lenses", unit="batch", disable=not progress))
    of_images = torch.cat(values).cpu().double().numpy()  # (N, layers, lenses, measures)
    tables = []
    for number, kind in enumerate(lenses):
        table = pd.DataFrame(of_images[:, :, number].mean(0), columns=list(MEASURES))
        _, low, high = mean_interval(of_images[:, :, number, 0])
        table.insert(1, "low", low)
        table.insert(2, "high", high)
        table.insert(0, "layer", chosen)
        table.insert(1, "kind", kind)
        tables.append(table.assign(n=len(tokens)))
    return pd.concat(tables, ignore_index=True)


def lens_tokens(model: Any, tokens: Any) -> np.ndarray:
    """Tokens (N, T), checked, for a model that predicts the next pixel; ValueError for any other model.

    RuntimeError for one in training mode.
    """
    if not hasattr(model, "lm_head"):
        raise ValueError(f"a {type(model).__name__} has no head over colours; expected a model as lab.load_model gives")
    check_causal(model.config)
    check_eval(model)
    tokens = checked_tokens(tokens, model.config)
    if not tokens.size:
        raise ValueError(f"tokens {tokens.shape}; expected at least one image")
    return tokens


def batches_of(
    model: Any, tokens: np.ndarray, batch_size: int | None, name: str, progress: bool
) -> Iterator[np.ndarray]:
    """Parts of `tokens`, `batch_size` images or as many as the sizes allow, behind a progress bar."""
    size = batch_size or images_at_once(model)
    starts = range(0, len(tokens), size)
    for start in tqdm(starts, desc=name, unit="batch", disable=not progress):
        yield tokens[start : start + size]


def images_at_once(model: Any) -> int:
    """How many images keep the widest activations, and the logits, below NUMBERS."""
    widest = max(inner_width(model.config), model.config.vocab_size)
    return int(min(64, max(1, NUMBERS // (model.config.n_positions * widest))))


def _sizes(model: Any, layers: int, batch_size: int | None) -> tuple[int, int]:
    """Images of a batch, and how many batches may run at once: HELD has room for their states at so many layers."""
    config: Any = model.config
    room = HELD // (layers * config.n_positions * config.n_embd)  # images
    size = min(images_at_once(model), default_batch(config, model.device))
    threads = at_once(model.device, numbers_of(model, size))
    size = batch_size or max(1, min(size, room // threads))
    return size, max(1, room // size)


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Un-normed states (..., D) -> logits (..., V), or V + 1 of a tied head, as after the last block."""
    normed = model.transformer.ln_f.forward(states)  # `forward`: the hooks of `record` on it are for the model's own
    return model.lm_head(normed.to(model.lm_head.weight.dtype))


def over_colours(logits: Tensor, colours: int) -> Tensor:
    """log p (..., V) over colours, the start token's column cut, in float32 or wider."""
    return widened(logits[..., :colours]).log_softmax(-1)


def as_they_are(states: Tensor, layer: int) -> Tensor:
    return states


def _palette(model: Any) -> Tensor | None:
    """Colours (V, 3) with channels from 0 to 1, float32 on the model's device."""
    clusters = getattr(getattr(model, "processor", None), "clusters", None)
    return None if clusters is None else torch.as_tensor((clusters + 1) / 2, dtype=torch.float32).to(model.device)


def _of_images(
    model: Any, states: dict[int, Tensor], pixels: Tensor, layers: list[int], lenses: list[Translate], final: bool
) -> Tensor:
    """By layer states (n T, D), with `final` also those of layer L, and pixels (n, T) -> the MEASURES.

    These are (n, layers, lenses, 5), means over T.
    """
    labels, colours = pixels.flatten(), model.config.vocab_size - 1
    palette = _palette(model)
    last = over_colours(head_logits(model, states[len(model.transformer.h)]), colours) if final else None
    rows = max(1, LOGITS // colours)

    def read(x: Tensor, layer: int, translate: Translate) -> Tensor:
        measured = []
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = head_logits(model, translate(x[part], layer))
            measured.append(_measured(logits, labels[part], None if last is None else last[part], palette, colours))
        return torch.cat(measured).view(*pixels.shape, -1).mean(1)

    of_lenses = [torch.stack([read(states[layer], layer, lens) for lens in lenses], 1) for layer in layers]
    return torch.stack(of_lenses, dim=1)


def _measured(logits: Tensor, labels: Tensor, last: Tensor | None, palette: Tensor | None, colours: int) -> Tensor:
    """Logits (m, V or V + 1), true pixels (m,), the last layer's log p (m, V) -> the MEASURES (m, 5)."""
    of_outcomes = widened(logits).log_softmax(-1)
    nats = -of_outcomes.gather(-1, labels[:, None])[:, 0]
    tied = of_outcomes.shape[-1] > colours
    start = -of_outcomes[:, :colours].logsumexp(-1) if tied else torch.zeros_like(nats)
    log_p = over_colours(logits, colours) if tied else of_outcomes
    p = log_p.exp()
    error = torch.full_like(nats, torch.nan) if last is None else (last.exp() * (last - log_p)).sum(-1)
    return torch.stack([nats, error, -(p * log_p).sum(-1), _squared(p, labels, palette), start], dim=-1)


def _squared(p: Tensor, labels: Tensor, palette: Tensor | None) -> Tensor:
    """Sum over colours of p |colour - true colour|^2, for p (m, V): (m,)."""
    if palette is None:
        return torch.full_like(p[:, 0], torch.nan)
    palette = palette.to(p.dtype)
    true = palette[labels]
    return p @ palette.square().sum(-1) - 2 * ((p @ palette) * true).sum(-1) + true.square().sum(-1)


def _expected(logits: Tensor, labels: Tensor, colours: int, palette: Tensor | None) -> Tensor:
    """(T, 6): most probable colour, its probability, nats of the true pixel, and the mean colour, channels 0 to 1."""
    nats = -widened(logits).log_softmax(-1).gather(-1, labels[:, None])
    p = over_colours(logits, colours).exp()
    probability, token = p.max(-1, keepdim=True)
    mean = p.new_full((len(p), 3), torch.nan) if palette is None else p @ palette.to(p.dtype)
    return torch.cat([token.to(p.dtype), probability, nats, mean], dim=-1)


def _strip_of(layers: list[int], kind: str, width: int, values: np.ndarray, true: np.ndarray) -> pd.DataFrame:
    """The table of `lens_strip`, of the values (L + 1, T, 6) of `_expected` at all layers, made in one piece."""
    best = values[..., 0].astype(int)
    differs = best[::-1] != best[-1]  # from the last layer backwards
    settled = len(best) - np.where(differs.any(0), differs.argmax(0), len(best))
    positions = np.tile(np.arange(values.shape[1]), len(layers))
    of_layers = values[layers].reshape(-1, 6)
    table = {"layer": np.repeat(layers, values.shape[1]), "kind": kind, "position": positions}
    table |= {"row": positions // width, "column": positions % width, "token": of_layers[:, 0].astype(int)}
    table |= {"probability": of_layers[:, 1], "nats": of_layers[:, 2], "settled": settled[positions]}
    table |= dict(zip(("red", "green", "blue"), (255 * of_layers[:, 3:].T).round(), strict=True))
    return pd.DataFrame(table | dict(zip(("true_red", "true_green", "true_blue"), true[positions].T, strict=True)))
