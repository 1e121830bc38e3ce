"""Two readouts of a layer's un-pooled states, fitted in the same way: one that attends, and one of their mean.

*Attentive*: M learned queries q_m weigh the states x_t of an image, and each reads D / M of D learned values:

    a_m = softmax over t of q_m . x_t / sqrt(D),    logits = b + W concat_m( V_m sum over t of a_mt x_t ).

Keys are the states themselves, as in the efficient probing of Psomas et al. (2025); AIM (El-Nouby et al., 2024) learns
keys too. A query of zeros gives the mean, and the order of the states changes nothing. *Mean*: the mean state through
one hidden layer of GELUs, as wide as makes the parameters equal in number. Both read whitened values, as many features
are nearly collinear and Adam hardly moves along the directions in which they differ. Both are fitted in the same way:
Adam on the cross entropy of all training images but a stratified tenth, on which the epoch of lowest loss is chosen.

Letters: S seeds, M queries, B images of a step; seeds are fitted side by side, each with its own held-out tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_lab.core.progress import tqdm
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing.solvers.objective import scale_of

PROBES = ("attentive", "mean")
FLOOR = 1e-3  # of the largest standard deviation: a direction that varies less is not whitened further
Weights = dict[str, Tensor]  # name -> (S, ...)


@dataclass(frozen=True)
class Training:
    """How both probes are fitted; `patience`: epochs without a lower held-out loss after which a seed stops."""

    epochs: int = 40
    patience: int = 5
    batch_size: int = 128
    learning_rate: float = 3e-3

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value}; expected a number above 0")


@dataclass(frozen=True)
class Scale:
    """Of a layer's states: their mean (D,), what keys are divided by (D,), and what values and mean states are
    multiplied by (D, D).

    Keys are divided by the standard deviation of single states. Mean states are whitened. So are values, by the
    covariance of mean states and that of a mean over T independent states together, as mean states hardly vary in some
    directions in which a mean over some positions may.
    """

    mean: Tensor
    of_keys: Tensor
    of_values: Tensor
    of_means: Tensor


@dataclass(frozen=True)
class Fitted:
    """The S weights of the best epochs, those `epochs` (S,) from 1, and held-out accuracies (S,)."""

    weights: Weights
    epochs: list[int]
    validation_accuracy: list[float]


def attend(weights: Weights, states: Tensor, scale: Scale) -> Tensor:
    """States (B, T, D) -> logits (S, B, K) of the attentive probe."""
    seeds, queries, width = weights["queries"].shape
    asked = (weights["queries"] / scale.of_keys).flatten(0, 1) / math.sqrt(width)  # the keys' mean changes no softmax
    shares = torch.softmax(asked @ states.mT, dim=-1)  # (B, S M, T)
    pooled = ((shares @ states - scale.mean) @ scale.of_values).unflatten(1, (seeds, queries))
    values = torch.einsum("bsmd,smde->sbme", pooled, weights["values"]).flatten(2)
    return values @ weights["classes"] + weights["bias"]


def read_mean(weights: Weights, means: Tensor, scale: Scale) -> Tensor:
    """Mean states (B, D) -> logits (S, B, K) of the probe of the mean."""
    hidden = F.gelu((means - scale.mean) @ scale.of_means @ weights["hidden"])
    return hidden @ weights["classes"] + weights["bias"]


def scale_of_states(states: Tensor) -> Scale:
    """Of states (N, T, D), in steps that take little memory."""
    steps = states.split(max(1, 2**22 // states[0].numel()))
    means = torch.cat([step.mean(1, dtype=torch.float32) for step in steps])
    mean = means.mean(0)
    of_states = torch.zeros(len(mean), len(mean), device=mean.device)
    for step in steps:
        of_states += _products(step.float() - mean) / len(states)
    of_keys = scale_of(mean, of_states.diagonal(), torch.float32)
    of_means = _products((means - mean)[:, None]) / len(states)
    return Scale(mean, of_keys, _whitening(mean, of_means + of_states / states.shape[1]), _whitening(mean, of_means))


def _products(rows: Tensor) -> Tensor:
    """Centred states (B, T, D) -> their products (D, D), the mean over T summed over B."""
    flat = rows.flatten(0, 1)
    return flat.mT @ flat / rows.shape[1]


def _whitening(mean: Tensor, covariance: Tensor) -> Tensor:
    """W (D, D) for rows x of a covariance (D, D): those of x W are uncorrelated and of variance 1, but for FLOOR.

    Of all such W the one that changes standardised rows least (ZCA-cor; Kessy et al., 2018).
    """
    deviation = scale_of(mean, covariance.diagonal(), torch.float32).cpu().double()
    variances, directions = torch.linalg.eigh(covariance.cpu().double() / deviation / deviation[:, None])
    whitened = directions / variances.clamp_min(FLOOR**2 * variances.max()).sqrt() @ directions.T
    return (whitened / deviation[:, None]).to(covariance)


def held_out(labels: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """A stratified tenth of the rows for each seed, bool (S, N)."""
    held = np.zeros((len(seeds), len(labels)), bool)
    for of_seed, seed in zip(held, seeds, strict=True):
        of_seed[stratified_split(labels, 0.1, seed=seed)[1]] = True
    return held


def fit_both(
    states: Tensor, y: np.ndarray, held: np.ndarray, seeds: Sequence[int], queries: int, training: Training,
    bar: tqdm | None = None,
) -> list[tuple[Callable[[Tensor], Tensor], Fitted]]:  # fmt: skip
    """Fit both probes to states (N, T, D) and y (N,) in [0, K); for each, in the order of PROBES, its readout and fit.

    A readout makes logits (S, B, K) of states (B, T, D). ValueError for states that are not finite.
    """
    scale, classes = scale_of_states(states), int(y.max()) + 1
    if not torch.isfinite(scale.of_keys).all():
        raise ValueError("the states have values that are not finite; see lab.check")
    weights = {
        "attentive": _attentive_weights(seeds, states.shape[2], queries, classes),
        "mean": _mean_weights(seeds, states.shape[2], queries, classes),
    }
    means = torch.cat([step.mean(1, dtype=torch.float32) for step in states.split(256)])
    labels = torch.as_tensor(y, device=states.device)
    held_rows = torch.as_tensor(held, device=states.device)

    def attentive(weights: Weights, rows: Tensor) -> Tensor:
        return attend(weights, states[rows].float(), scale)

    def of_mean(weights: Weights, rows: Tensor) -> Tensor:
        return read_mean(weights, means[rows], scale)

    first = fit(attentive, weights["attentive"], labels, held_rows, training, bar)
    second = fit(of_mean, weights["mean"], labels, held_rows, training, bar)
    return [
        (lambda states: attend(first.weights, states, scale), first),
        (lambda states: read_mean(second.weights, states.mean(1), scale), second),
    ]


@torch.enable_grad()
def fit(
    logits: Callable[[Weights, Tensor], Tensor],
    weights: Weights,
    y: Tensor,
    held: Tensor,
    training: Training,
    bar: tqdm | None = None,
) -> Fitted:
    """Fit `weights` so that logits(weights, rows), (S, B, K), give y (N,), each seed without its rows `held` (S, N)."""
    weights = {name: values.to(y.device).requires_grad_() for name, values in weights.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=training.learning_rate)
    order, some = torch.Generator().manual_seed(0), held.any(0).nonzero()[:, 0]
    best = {name: values.detach().clone() for name, values in weights.items()}
    lowest, right = torch.full((2, len(held)), math.inf, device=y.device)
    kept, stale = torch.zeros(2, len(held), dtype=torch.int64, device=y.device)
    epoch = 0
    while epoch < training.epochs and (stale < training.patience).any():  # one look at the device an epoch
        epoch += 1
        for rows in torch.randperm(len(y), generator=order).split(training.batch_size):
            rows = rows.to(y.device)
            loss = _losses(logits(weights, rows), y[rows], ~held[:, rows]).sum()  # seeds share no weight
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            parts = [logits(weights, rows) for rows in some.split(training.batch_size)]
        of_held = torch.cat(parts, dim=1)
        losses = _losses(of_held, y[some], held[:, some])
        better = (losses < lowest) & (stale < training.patience)
        hits = ((of_held.argmax(-1) == y[some]) & held[:, some]).sum(1) / held.sum(1)
        lowest, right = torch.where(better, losses, lowest), torch.where(better, hits, right)
        kept = torch.where(better, epoch, kept)
        stale = torch.where(better, 0, stale + 1)
        for name, values in weights.items():
            best[name] = torch.where(better.view(-1, *[1] * (values.ndim - 1)), values.detach(), best[name])
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.update(training.epochs - epoch)
    return Fitted(best, kept.tolist(), right.tolist())


def _losses(logits: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """Mean cross entropy (S,) of logits (S, B, K) over the rows `counted`, bool (S, B)."""
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(counted.shape)
    return (losses * counted).sum(1) / counted.sum(1).clamp_min(1)


def _attentive_weights(seeds: Sequence[int], width: int, queries: int, classes: int) -> Weights:
    """At the start: queries and classes of zero, so that a probe begins as one of the mean."""
    part = width // queries
    zeros = {"queries": (queries, width), "classes": (width, classes), "bias": (1, classes)}
    weights = {name: torch.zeros(len(seeds), *shape) for name, shape in zeros.items()}
    return weights | {"values": _normal(seeds, queries, width, part) / math.sqrt(width)}


def _mean_weights(seeds: Sequence[int], width: int, queries: int, classes: int) -> Weights:
    """At the start, with as many parameters as the attentive probe, but for less than half a hidden unit's."""
    hidden = round((queries * width + width**2 + width * classes) / (width + classes))
    zeros = {"classes": (hidden, classes), "bias": (1, classes)}
    weights = {name: torch.zeros(len(seeds), *shape) for name, shape in zeros.items()}
    return weights | {"hidden": _normal(seeds, width, hidden) / math.sqrt(width)}


def _normal(seeds: Sequence[int], *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
