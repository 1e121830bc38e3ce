"""The tuned lens (Belrose et al., 2023): what a layer says of the next pixel once it is moved to where the head reads.

Layer l's lens is softmax(U N_f(h + A_l h + b_l)). A_l and b_l begin at zero, where it is the logit lens, and learn to
give what the last layer gives: they minimise KL(final || lens) over training images. The model itself is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from igpt_lab.core.arguments import checked, local
from igpt_lab.core.devices import widened
from igpt_lab.core.progress import tqdm
from igpt_lab.core.provenance import atomic_write, digest
from igpt_lab.explaining.lenses import head_logits, images_at_once, lens_table, lens_tokens, over_colours
from igpt_lab.features.hooks import record
from igpt_lab.models.losses import on_device

FILES = ("tuned_lens.safetensors", "tuned_lens.json")
# What the outputs of a model depend on beside its weights.
COMPUTES = (
    "n_head", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"
)  # fmt: skip
HELD = 2**24  # numbers in the states of all layers that a step holds: 64 MB in float32
ROWS = 4096  # positions that a step learns from, at most
EVERY = 25  # steps from one look at the held-out images to the next
PATIENCE = 4  # looks without progress of any layer, after which training ends
PROGRESS = 1e-3  # of a layer's held-out divergence: less is none


@dataclass(frozen=True, eq=False)
class TunedLens:
    """`matrices` A (L, D, D) and `biases` b (L, D) of layers 0..L-1; layer L is read as it is.

    `model` is the digest of the weights that it was trained for, and `settings` say how. `log` has a row for each look
    at the held-out training images and layer: `step`, `layer`, `held_out` (KL(final || lens), nats).
    """

    matrices: Tensor
    biases: Tensor
    model: str
    settings: dict = field(default_factory=dict)
    log: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __call__(self, states: Tensor, layer: int) -> Tensor:
        """h + A h + b for states (..., D), in float32 or wider."""
        if layer == len(self.matrices):
            return states
        matrix, bias = (part[layer].to(states.device) for part in (self.matrices, self.biases))
        return moved(states, matrix, bias)

    def check(self, model: Any) -> None:
        """ValueError where it was trained for another model, or does not have a matrix and a bias for each layer."""
        if digest_of_model(model) != self.model:
            name = getattr(model, "name", type(model).__name__)
            raise ValueError(f"this tuned lens is of another model than {name}; fit one for it with fit_tuned_lens")
        blocks, width = len(model.transformer.h), model.config.n_embd
        shapes = tuple(self.matrices.shape), tuple(self.biases.shape)
        if shapes != ((blocks, width, width), (blocks, width)):
            raise ValueError(
                f"this tuned lens has matrices {shapes[0]} and biases {shapes[1]}; expected {(blocks, width, width)} "
                f"and {(blocks, width)}: fit one anew with fit_tuned_lens"
            )
        if not (self.matrices.isfinite().all() and self.biases.isfinite().all()):
            raise ValueError("this tuned lens has values that are not finite; fit one anew with fit_tuned_lens")

    def save(self, folder: str | os.PathLike) -> None:
        """Write tuned_lens.safetensors and tuned_lens.json into `folder`, each whole or not at all."""
        tensors, facts = (local(folder) / name for name in FILES)
        content = save({"matrices": self.matrices.cpu().contiguous(), "biases": self.biases.cpu().contiguous()})
        noted = {"model": self.model, "settings": self.settings, "tensors": digest(content)}
        atomic_write(tensors, content)
        atomic_write(facts, json.dumps(noted | {"log": self.log.to_dict("list")}, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """As `save` wrote it; ValueError for files that are missing, damaged, or of two different lenses."""
        tensors, facts = (local(folder) / name for name in FILES)
        try:
            content, noted = tensors.read_bytes(), json.loads(facts.read_text(encoding="utf-8"))
            whole, parts = digest(content) == noted["tensors"], load(content)
            log = pd.DataFrame(noted["log"])
            lens = cls(parts["matrices"], parts["biases"], noted["model"], noted["settings"], log)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder} holds no tuned lens as `save` writes it: {error}") from error
        if not whole:
            raise ValueError(f"{tensors} does not belong to {facts.name} beside it; fit the lens again")
        return lens


@checked
def fit_tuned_lens(
    model: Any,
    train_tokens: np.ndarray,
    *,
    steps: int = 400,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    held_out: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """A tuned lens for all layers at once.

    Adam with a rate that falls to 0 over `steps`, on random positions of the images of a step. Each layer keeps what
    was best on the held-out images, which at worst is the logit lens, and training ends early once no layer gains
    there. Ctrl-C leaves nothing behind: neither the model nor any file is touched.

    Args:
        model: Ours, or transformers' of the same class.
        train_tokens: Palette indices (N, T) of training images, N > 1.
        steps: Of Adam, at most.
        batch_size: Images of a step, by default as many as keep the states of all layers below 64 MB.
        learning_rate: Of A; of b it is that times the size (root of the mean square) of the layer's states, as the norm
            behind it takes no scale.
        held_out: Images that are not learned from, by default a tenth, at most 64.
        seed: Of the held-out images and of the positions.
        progress: Show a bar.

    Returns:
        `TunedLens`, for `tuned_lens`.

    Raises:
        ValueError: No step, no image to learn from or to hold out, a bidirectional model, or what are no tokens.
        RuntimeError: A model in training mode.

    Example:
        >>> lens = lab.fit_tuned_lens(model, train_tokens, steps=5)
        >>> lens.matrices.shape, lens.biases.shape
        (torch.Size([3, 8, 8]), torch.Size([3, 8]))
    """
    tokens = lens_tokens(model, train_tokens)
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    held = min(64, max(1, len(tokens) // 10)) if held_out is None else held_out
    if not 0 < held < len(tokens):
        raise ValueError(f"{len(tokens)} training images, {held} held out; expected at least one of each")
    tokens = tokens[np.random.default_rng(seed).permutation(len(tokens))]  # the last `held` are held out
    size = batch_size or min(16, images_at_once(model), len(tokens) - held)
    drawn = torch.Generator().manual_seed(seed)
    parts = np.array_split(tokens[-held:], -(-held // size))
    judge = torch.cat([_states(model, part, held, drawn) for part in parts], dim=1)
    training = _Training(model, judge, learning_rate)
    with tqdm(range(steps), desc="tuned lens", unit="step", disable=not progress) as bar:
        for step in bar:
            rows = torch.randint(len(tokens) - held, (size,), generator=drawn).numpy()
            training.step(_states(model, tokens[rows], size, drawn), 1 - step / steps)
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                bar.set_postfix_str(f"KL to the last layer {training.look(step + 1):.3f} nats")
                if training.looks_without_progress == PATIENCE:
                    break
    settings = {"steps": steps, "batch_size": size, "learning_rate": learning_rate, "held_out": held, "seed": seed}
    matrices, biases = (torch.stack(parts) for parts in zip(*training.best, strict=True))
    return TunedLens(matrices, biases, digest_of_model(model), settings, pd.DataFrame(training.log))


@checked
def tuned_lens(
    model: Any,
    tokens: np.ndarray,
    lens: TunedLens,
    *,
    layers: Sequence[int] | None = None,
    final: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How well states predict the pixels after a tuned lens has moved them to what the last layer would say.

    Args:
        model: The one that the lens is of.
        tokens: Palette indices (N, T) of images that the lens was not trained on.
        lens: What `fit_tuned_lens` gave.
        layers: All by default.
        final: Measure `error_to_final` too, for which a batch runs to the last layer.
        batch_size: Images at a time, by default chosen by the sizes.
        progress: Show a bar.

    Returns:
        The table of `logit_lens`, of `kind` "tuned lens".

    Raises:
        ValueError: A lens of another model, and as `logit_lens`.
        RuntimeError: A model in training mode.

    Example:
        >>> lens = lab.fit_tuned_lens(model, train_tokens, steps=5)
        >>> lab.tuned_lens(model, tokens, lens)[["layer", "kind", "nats"]].round(3)
           layer        kind   nats
        0      0  tuned lens  2.079
        1      1  tuned lens  2.079
        2      2  tuned lens  2.079
        3      3  tuned lens  2.079
    """
    lens_tokens(model, tokens)
    lens.check(model)
    lenses = {"tuned lens": lens}
    return lens_table(model, tokens, lenses, layers=layers, final=final, batch_size=batch_size, progress=progress)


def moved(states: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """h + A h + b, in float32 or wider; with A and b zero, h to the last bit."""
    wide = widened(states)
    return wide + (wide @ matrix.to(wide.dtype).T + bias.to(wide.dtype))


def divergence(model: Any, states: Tensor, final: Tensor) -> Tensor:
    """Mean over rows of KL(final || lens), nats: states (m, D) that the head is given, `final` log p (m, V)."""
    log_p = over_colours(head_logits(model, states), final.shape[-1])
    return (final.exp() * (final - log_p)).sum(-1).mean()


def digest_of_model(model: Any) -> str:
    """Digest of all weights by name, as float32, and of COMPUTES: a model and its float64 copy have the same."""
    weights = {name: digest(weight.detach().float().cpu().numpy().tobytes()) for name, weight in
               model.named_parameters()}  # fmt: skip
    return digest({"config": {name: getattr(model.config, name) for name in COMPUTES}, "weights": weights})


class _Training:
    """A and b of all layers as they are learned, the best of each so far, and how good they were."""

    def __init__(self, model: Any, judge: Tensor, rate: float):
        """`judge`: held-out states (L + 1, m, D)."""
        self.model, self.judge = model, judge
        self.rate = rate
        self.final = _final(model, judge)
        width, sizes = judge.shape[-1], judge[:-1].square().mean((1, 2)).sqrt().tolist()
        self.matrices = [torch.zeros(width, width, device=judge.device, requires_grad=True) for _ in sizes]
        self.biases = [torch.zeros(width, device=judge.device, requires_grad=True) for _ in sizes]
        groups = [{"params": self.matrices, "scale": 1.0}]
        groups += [{"params": [bias], "scale": size} for bias, size in zip(self.biases, sizes, strict=True)]
        self.optimiser = torch.optim.Adam(groups, lr=rate)
        self.best = self._copies()
        self.least = torch.full((len(sizes),), torch.inf)
        self.looks_without_progress = 0
        self.log: list[dict] = []
        self.look(0)

    @torch.enable_grad()
    def step(self, states: Tensor, share: float) -> None:
        """One step from states (L + 1, m, D), at this share of the rate."""
        final = _final(self.model, states)
        for layer, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            loss = divergence(self.model, moved(states[layer], matrix, bias), final)
            matrix.grad, bias.grad = torch.autograd.grad(loss, [matrix, bias])  # of these alone, not of the model
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * group["scale"] * share
        self.optimiser.step()

    @torch.no_grad()
    def look(self, step: int) -> float:
        """Judge all layers on the held-out states and keep what is best; the mean over layers."""
        pairs = zip(self.judge[:-1], self.matrices, self.biases, strict=True)
        now = torch.stack([divergence(self.model, moved(h, *pair), self.final) for h, *pair in pairs]).cpu()
        copies = self._copies()
        better = (now < self.least).tolist()
        self.best = [new if is_better else old for new, old, is_better in zip(copies, self.best, better, strict=True)]
        gained = bool((now < self.least * (1 - PROGRESS)).any())
        self.looks_without_progress = 0 if gained else self.looks_without_progress + 1
        self.least = torch.where(now < self.least, now, self.least)
        self.log += [{"step": step, "layer": layer, "held_out": value} for layer, value in enumerate(now.tolist())]
        return float(now.mean())

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.matrices, self.biases, strict=True)
        return [(matrix.detach().clone(), bias.detach().clone()) for matrix, bias in pairs]


@torch.no_grad()
def _final(model: Any, states: Tensor) -> Tensor:
    """The last layer's log p (m, V) over colours, of states (L + 1, m, D)."""
    return over_colours(head_logits(model, states[-1]), model.config.vocab_size - 1)


@torch.no_grad()
def _states(model: Any, tokens: np.ndarray, images: int, drawn: torch.Generator) -> Tensor:
    """Un-normed states (L + 1, n * P, D) at P random positions of each image, so few that those of `images` fit."""
    pixels, config = on_device(model, tokens), model.config
    rows = min(ROWS, HELD // ((config.n_layer + 1) * config.n_embd))
    count = min(pixels.shape[1], max(1, rows // images))
    places = torch.rand(pixels.shape, generator=drawn).argsort(1)[:, :count].to(pixels.device)

    def picked(states: Tensor, point: str, layer: int) -> Tensor:
        return widened(states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])))

    with record(model, ["resid_pre"], pool=picked, alignment="sos") as pooled:
        pooled.run(pixels, use_cache=False)
    return pooled["resid_pre"].transpose(0, 1).flatten(1, 2)
