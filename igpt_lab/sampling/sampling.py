"""Draw images: from nothing, or completing what is given of them.

A pixel is the argmax of logits + temperature x Gumbel noise: a draw from softmax(logits / temperature) (Gumbel, 1954).
The noise of an image comes from its own seed. Logits differ in their last bits with the batch that an image is in:
where two colours come closer than that, the image alone decides, see `sample`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import card, line
from igpt_lab.core.progress import tqdm
from igpt_lab.features.hooks import evaluating
from igpt_lab.images.loading import images_of
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import align
from igpt_lab.models.scores import cut
from igpt_lab.sampling.decoding import Decoder

TIE = 1e-4  # of a logit; those of one image in two batches differ by about 1e-5 (fashion-xs, float32)
MEMORY = 2 << 30  # bytes of a default batch's keys and values


@dataclass(frozen=True, repr=False)
class Drawn:
    """Images: `tokens` int64 (S, T) or (S, completions, T), and of the same shape up to T what made them.

    `log_p` float32 (..., T): log p of every pixel after those before it, given ones too, in nats, of the model itself:
    at temperature 1, nothing cut. `seeds` int64 (...): the same seed draws the same image again. `rows` int64 (...):
    rows of pixels that are finished; after an interruption the others hold token 0, and NaN.
    """

    tokens: np.ndarray
    log_p: np.ndarray
    seeds: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return line("Drawn", self._facts())

    def _repr_html_(self) -> str:
        return card("Drawn", self._facts())

    def _facts(self) -> dict[str, str]:
        *shape, pixels = self.tokens.shape
        side, nats = math.isqrt(pixels), self.log_p[np.isfinite(self.log_p)]
        unfinished = int((self.rows < side).sum())
        return {
            "images": f"{' x '.join(f'{count:,}' for count in shape)} of {pixels:,} pixels",
            "seeds": f"{self.seeds.flat[0]}{', ...' * (self.seeds.size > 1)}" if self.seeds.size else "",
            "mean surprise": f"{-nats.mean():.3f} nats a pixel" if nats.size else "",
            "not finished": f"{unfinished:,}" if unfinished else "",
        }

    def table(self):
        """A pandas table of the tokens, a row for each image, its seed as the index: `data` of `save_figure`."""
        import pandas as pd

        index = pd.Index(self.seeds.ravel(), name="seed")
        return pd.DataFrame(self.tokens.reshape(len(index), -1), index=index)


@checked
def sample(
    model: ImageGPTForCausalImageModeling,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | np.ndarray = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Drawn:
    """Draw images; `model.processor.decode` makes uint8 images of their tokens.

    As in the paper nothing is cut from the distribution by default. An image depends on its seed, the model and the
    settings, and not on the batch that it is drawn in: wherever the choice hangs on less than 1e-4 of a logit, the
    pixel is drawn again from the logits of this image alone. That holds in float32, on one kind of device and one
    version of torch. Ctrl-C returns what is finished, row by row.

    Args:
        model: One that predicts pixels in their order.
        count: Number of images.
        temperature: Logits are divided by it; 0 takes the most probable colour.
        top_k: Only the k most probable colours are drawn; None for all.
        top_p: Of these only the fewest that reach this fraction together; None for all.
        seed: Makes a seed for each image, or is int (count,), such as `Drawn.seeds`.
        batch_size: Images at a time, by default what memory holds.
        progress: Show a bar.

    Returns:
        `Drawn`: `tokens` (count, T), their `log_p` in nats, and `seeds` (count,).

    Raises:
        ValueError: Another number of seeds than images, a temperature, `top_k` or `top_p` out of range, a bidirectional
            model, or one inside an `edit` block.

    Example:
        >>> drawn = lab.sample(model, 3, seed=1)
        >>> drawn.tokens.shape, model.processor.decode(drawn.tokens).shape
        ((3, 16), (3, 4, 4, 3))
    """
    seeds = _seeds([seed], count) if np.ndim(seed) == 0 else np.asarray(seed, np.int64)
    if seeds.shape != (count,):
        raise ValueError(f"{len(seeds)} seeds for {count} images; expected one for each")
    settings = _Settings(temperature, top_k, top_p)
    return _draw(model, np.empty((count, 0), np.int64), seeds, settings, batch_size, progress)


@checked
def complete(
    model: ImageGPTForCausalImageModeling,
    images,
    *,
    keep: float = 0.5,
    completions: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Drawn:
    """Keep the upper part of each image and draw the rest, several times.

    The paper's figure keeps the upper half and draws four. What `sample` promises holds; image s, completion j is the
    same with fewer of either.

    Args:
        model: One that predicts pixels in their order.
        images: Tokens int (S, T), or what the model's processor and palette make tokens of: uint8 arrays (S, H, W, 3),
            such as another model's decoded samples, Pillow images, an image set, or what `load_images` takes. Tokens
            (S, t) with t < T stay all.
        keep: Fraction of the rows of whole images that stay, from 0 to below 1.
        completions: How many of each image.
        temperature, top_k, top_p: As of `sample`.
        seed: Makes a seed for each completion.
        batch_size: Images at a time, by default what memory holds.
        progress: Show a bar.

    Returns:
        `Drawn`: `tokens` (S, completions, T), `log_p` in nats and `seeds` (S, completions).

    Raises:
        ValueError: `keep`, a temperature, `top_k` or `top_p` out of range, no images, images for a model without a
            palette, a bidirectional model, or one inside an `edit` block.

    Example:
        >>> drawn = lab.complete(model, tokens[:3], completions=2)
        >>> drawn.tokens.shape, bool((drawn.tokens[:, :, :8] == tokens[:3, None, :8]).all())
        ((3, 2, 16), True)
    """
    tokens = _tokens(model, images)
    if tokens.shape[1] == model.config.n_positions:
        if not 0 <= keep < 1:
            raise ValueError(f"keep={keep}; expected a fraction of the rows, from 0 to below 1")
        tokens = tokens[:, : prime_rows(model, keep) * side(model)]
    seeds = np.stack([_seeds([seed, s], completions) for s in range(len(tokens))])
    settings = _Settings(temperature, top_k, top_p)
    drawn = _draw(model, tokens.repeat(completions, axis=0), seeds.ravel(), settings, batch_size, progress)
    pairs = {name: value.reshape(*seeds.shape, *value.shape[1:]) for name, value in vars(drawn).items()}
    return Drawn(**pairs)


def side(model: ImageGPTForCausalImageModeling) -> int:
    """Pixels along a side of the model's square image."""
    return math.isqrt(model.config.n_positions)


@checked
def prime_rows(model: ImageGPTForCausalImageModeling, keep: float) -> int:
    """Rows of pixels that `keep` leaves as they are."""
    return round(keep * side(model))


@dataclass(frozen=True)
class _Settings:
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}; expected a number from 0, the most probable, upwards")
        cut(torch.zeros(1, 2), self.top_k, self.top_p)  # says what is wrong with them before any work


def _tokens(model: ImageGPTForCausalImageModeling, images) -> np.ndarray:
    """Tokens int64 (S, t), t <= T, of whatever `complete` takes."""
    if (image_set := images_of(images)) is not None:
        tokens = tokens_of(model, image_set)
    elif isinstance(images, Tensor):
        return _tokens(model, images.numpy(force=True))
    elif isinstance(images, np.ndarray) and images.ndim == 2:
        tokens = images
    elif model.processor is None:
        raise ValueError("images need a palette to become tokens, and this model has none; give tokens (S, T)")
    else:
        tokens = model.processor.encode(images)
    if not len(tokens):
        raise ValueError(f"tokens {tokens.shape}; expected one image or more")
    return checked_tokens(tokens, model.config).astype(np.int64)


def _seeds(entropy: list[int], count: int) -> np.ndarray:
    """int64 (count,), of which the first do not depend on how many there are."""
    return (np.random.SeedSequence(entropy).generate_state(count, np.uint64) >> 1).astype(np.int64)


def _batch_size(model: ImageGPTForCausalImageModeling) -> int:
    config = model.config
    return max(1, min(64, MEMORY // (8 * config.n_layer * config.n_embd * config.n_positions)))


def _draw(
    model: ImageGPTForCausalImageModeling, prime: np.ndarray, seeds: np.ndarray, settings: _Settings,
    batch_size: int | None, progress: bool,
) -> Drawn:  # fmt: skip
    """Continue primes int64 (S, t) to (S, T), a batch after the other, batches as even as can be."""
    (count, known), length = prime.shape, model.config.n_positions
    tokens = np.zeros((count, length), np.int64)
    log_p, rows = np.full((count, length), np.nan, np.float32), np.zeros(count, np.int64)
    batches = math.ceil(count / (batch_size or _batch_size(model)))
    size, decoder = math.ceil(count / max(1, batches)), None
    try:
        total = count * (length - known)
        with (
            evaluating(model),
            tqdm(total=total, desc="pixels", unit="px", unit_scale=True, disable=not progress) as bar,
        ):
            for start in range(0, count, max(1, size)):
                part = slice(start, start + size)
                if decoder is None or decoder.batch != len(seeds[part]):
                    decoder = Decoder(model, len(seeds[part]))
                canvas = _Canvas(decoder, prime[part], seeds[part], settings)
                try:
                    canvas.draw(bar)
                finally:
                    tokens[part], log_p[part], rows[part] = canvas.finished()
    except KeyboardInterrupt:
        warnings.warn(
            f"stopped with {int((rows * side(model) == length).sum())} of {count} images complete", stacklevel=4
        )
    return Drawn(tokens, log_p, seeds, rows)


class _Canvas:
    """The images of one batch while they are drawn."""

    def __init__(self, decoder: Decoder, prime: np.ndarray, seeds: np.ndarray, settings: _Settings):
        self.decoder, self.prime = decoder, prime
        self.seeds, self.settings = seeds, settings
        self.column, self.side = prime.shape[1], side(decoder.model)
        shape, device = (len(prime), decoder.config.n_positions), decoder.model.device
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.tokens[:, : self.column] = torch.as_tensor(prime, device=device)
        self.log_p = torch.full(shape, torch.nan, device=device)

    @torch.inference_mode()
    def draw(self, bar: tqdm) -> None:
        """Every pixel that was not given, one column after the other."""
        decoder, first = self.decoder, self.column
        logits, self.log_p[:, :first] = decoder.fill(self.prime)
        for column in range(first, self.tokens.shape[1]):
            if column > first:
                now = decoder.positions[column : column + 1]
                seen = column + 1 if now.is_cpu else None
                logits = decoder.step(self.tokens[:, column - 1], now, seen=seen).float()
            if column == first or column % self.side == 0:
                noise = self._noise(column // self.side)
            self._put(column, logits, noise[:, column % self.side])
            self.column = column + 1
            bar.update(len(self.tokens))

    def _put(self, column: int, logits: Tensor, noise: Tensor) -> None:
        """Choose the pixels of a column; an image whose choice is a near tie decides by itself."""
        chosen, sure = choose(logits, noise, self.settings.temperature, self.settings.top_k, self.settings.top_p)
        if not sure.all():
            for i in (~sure).nonzero()[:, 0].tolist():
                chosen[i] = self._alone(self.tokens[i, :column], noise[i : i + 1])
        self.tokens[:, column] = chosen
        self.log_p[:, column] = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]

    def _alone(self, before: Tensor, noise: Tensor) -> Tensor:
        """The pixel after `before` (t,), from a pass over this image and no other."""
        model, settings = self.decoder.model, self.settings
        fed = align(F.pad(before, (0, 1))[None], "sos", model.config)
        logits = model.next_logits(fed, None, plain=self.decoder.plain).float()
        return choose(logits, noise, settings.temperature, settings.top_k, settings.top_p)[0][0]

    def _noise(self, row: int) -> Tensor:
        """Gumbel noise float32 (N, side, V) of a row of pixels, times the temperature: an image's own [seed, row]."""
        shape = self.side, self.decoder.config.n_colours
        uniform = np.stack([np.random.default_rng([seed, row]).random(shape) for seed in self.seeds])
        with np.errstate(divide="ignore"):  # a uniform number of 0 makes a colour that is never drawn
            noise = -self.settings.temperature * np.log(-np.log(uniform)) if self.settings.temperature else 0 * uniform
        return torch.as_tensor(noise, dtype=torch.float32, device=self.tokens.device)

    def finished(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens, log p, and the number of rows of pixels that are whole; behind them 0 and NaN."""
        rows = self.column // self.side
        end = rows * self.side
        tokens, log_p = self.tokens.clone(), self.log_p.clone()
        tokens[:, end:], log_p[:, end:] = 0, torch.nan
        return tokens.cpu().numpy(), log_p.cpu().numpy(), rows


def choose(
    logits: Tensor, noise: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Logits and noise float32 (N, V) -> the colours drawn, int64 (N,), and bool (N,): surely so.

    `noise` is Gumbel's, times the temperature. Not sure is a choice that logits within TIE of these would change.
    """
    if not temperature or (not top_k and (top_p is None or top_p == 1)):
        best, which = (logits + noise).topk(2)
        return which[:, 0], best[:, 0] - best[:, 1] > TIE
    scaled = logits / temperature
    bounds = (None, None) if top_p is None else (min(1.0, top_p + TIE), max(TIE**2, top_p - TIE))
    kept, wide, narrow = (cut(scaled, top_k, p) > -torch.inf for p in (top_p, *bounds))
    chosen = (logits + noise).masked_fill(~kept, -torch.inf).argmax(-1)
    lowest = logits.masked_fill(~wide, torch.inf).amin(-1, keepdim=True)
    highest = logits.masked_fill(narrow, -torch.inf).amax(-1, keepdim=True)
    best, which = (logits + noise).masked_fill(logits < lowest - TIE, -torch.inf).topk(2)
    inside = logits.gather(1, which[:, :1]) > highest + TIE
    return chosen, (best[:, 0] - best[:, 1] > TIE) & inside[:, 0]
