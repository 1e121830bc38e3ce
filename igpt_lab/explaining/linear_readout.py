"""Bits that a linear readout of states has about a target, on images that it has not seen.

A readout is multinomial logistic regression on single states, and what it says of a target y is

    bits = H(y) - log loss,   H(y) = mean over test states of -log2 q(y),   log loss = that of -log2 p(y | state),

where q are the shares of y in the training states: a readout that sees nothing has p = q and exactly 0 bits. It is the
information that a linear family can use (Xu et al., 2020, who call it predictive V-information). Below 0 the readout is
worse than none.

Letters: N images, S states of each, D width, K classes of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.probing.solvers.logistic import Fits, fit_path

STRENGTHS = tuple(np.logspace(-4, 1, 9).tolist())  # C, from the strongest penalty to the weakest
TOLERANCE = 1e-4  # of a derivative of the mean loss in nats
LAST = 1 / 3  # of the tolerance, at which the last fit ends: at the whole one it lost up to 0.005 bits
HELD = 0.2  # the share of training images that choose C
LEAST = 2  # training states of a value that is a class of its own
N_BOOT = 2_000


@dataclass(frozen=True, eq=False)
class Readout:
    """What a linear readout says of a target on test images, in bits; `gains` (N,) are the means over their states.

    `bits`, the mean of the gains, is `entropy` less `log_loss`. `C` is the strength that held-out training images
    chose, `n_classes` K.
    """

    gains: np.ndarray
    log_loss: float
    entropy: float
    C: float
    converged: bool
    n_classes: int

    @property
    def bits(self) -> float:
        return float(self.gains.mean())


@checked
def linear_readout(
    train: Tensor | np.ndarray,
    train_values: np.ndarray,
    test: Tensor | np.ndarray,
    test_values: np.ndarray,
    *,
    seed: int = 0,
    tol: float = TOLERANCE,
    device: str | torch.device = "cpu",
) -> Readout:
    """Bits that a linear readout of states has about values, on test images.

    C is the first of STRENGTHS, from the strongest penalty on, behind which the log loss on HELD of the training images
    rises; the readout is then fitted to all training images. Images are held out, so that the states of one are never
    on both sides. Values with fewer than LEAST states in the images that fit are one class, and with them those that
    only other images have (`classes_of`): so every log loss is finite, and none is smoothed.

    Args:
        train: States (N, S, D): S of each image.
        train_values: int (N, S), from 0.
        test: States of other images.
        test_values: int, as many.
        seed: Of the held-out images.
        tol: Largest derivative of the mean loss, in nats, at which the fits end that choose C; the last one ends at a
            third of it.
        device: Where fits run.

    Returns:
        `Readout`: `gains`, bits for each test image, and their parts.

    Raises:
        ValueError: States and values that do not belong together, fewer than two training images, or values that are
            all one class.

    Example:
        >>> states = np.random.default_rng(0).normal(size=(60, 3, 4)).astype(np.float32)
        >>> values = (states[..., 0] > 0).astype(int)  # one bit, which the first feature says
        >>> readout = lab.linear_readout(states[:40], values[:40], states[40:], values[40:])
        >>> readout.gains.shape, readout.n_classes, bool(readout.gains.mean() > 0.5)
        ((20,), 2, True)
    """
    train, test = torch.as_tensor(train), torch.as_tensor(test)
    for x, values in ((train, train_values), (test, test_values)):
        if x.ndim != 3 or x.shape[:2] != values.shape:
            raise ValueError(f"states {tuple(x.shape)} for values {values.shape}; expected (N, S, D) for (N, S)")
    rest, held = held_out(len(train), seed)
    classes = classes_of(train_values[rest], max(train_values.max(), test_values.max()) + 1)
    y, y_test = classes[train_values], classes[test_values]
    if not y.any():
        raise ValueError("no value repeats in the training states, or there is only one; expected two values or more")
    C, start = _strength(train[rest], y[rest], train[held], y[held], tol, device)
    fit = next(fit_path(train.flatten(0, 1), y.ravel(), [C], tol=tol * LAST, start=start, device=device))
    log_p, log_q = _log2_of(fit, test, y_test), np.log2(np.bincount(y.ravel()) / y.size)[y_test]
    return Readout(
        gains=(log_p - log_q).mean(1),
        log_loss=-float(log_p.mean()),
        entropy=-float(log_q.mean()),
        C=C,
        converged=bool(fit.converged.all()),
        n_classes=int(y.max()) + 1,
    )


def held_out(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the images that fit and of those that choose C, of n training images."""
    if n < 2:
        raise ValueError(f"{n} training images; expected 2 or more, as some choose the penalty")
    order = np.random.default_rng(seed).permutation(n)
    count = max(1, round(HELD * n))
    return np.sort(order[count:]), np.sort(order[:count])


def classes_of(values: np.ndarray, count: int) -> np.ndarray:
    """(count,): value -> class from 0, for values of any shape below `count`; rare and unseen values are the last one.

    Where a value is unseen and none is rare, the rarest value that is seen joins it.
    """
    seen = np.bincount(values.ravel(), minlength=count)
    own = seen >= LEAST
    if not own.all() and not seen[~own].any():
        own[np.where(own, seen, seen.max() + 1).argmin()] = False
    return np.where(own, own.cumsum() - 1, own.sum())


def _strength(
    x: Tensor, y: np.ndarray, held: Tensor, y_held: np.ndarray, tol: float, device: str | torch.device
) -> tuple[float, Fits | None]:
    """C of the least log loss on the held-out images, and its fit, from which a fit to all images may begin.

    These fits end late: a fit that ends early acts as one with a stronger penalty, so that a C which is too weak would
    seem good.
    """
    fit: Fits | None = None
    best, loss = STRENGTHS[0], np.inf
    path = fit_path(x.flatten(0, 1), y.ravel(), STRENGTHS, tol=tol, device=device)
    for C, weaker in zip(STRENGTHS, path, strict=True):
        now = -_log2_of(weaker, held, y_held).mean()
        if now >= loss:
            break
        best, loss = C, now
        fit = weaker
    return best, fit


def _log2_of(fit: Fits, x: Tensor, y: np.ndarray) -> np.ndarray:
    """log2 p(y) of states x (N, S, D) with classes y (N, S): float64 (N, S)."""
    logs = fit.logits(x.flatten(0, 1))[0].log_softmax(-1).cpu().numpy()
    return (np.take_along_axis(logs, y.reshape(-1, 1), 1) / np.log(2)).reshape(y.shape)


def interval_over_images(gains: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ends (R,) of the 95% intervals of the means of gains (R, N) over images, by percentiles of a bootstrap."""
    generator, n = np.random.default_rng(seed), gains.shape[1]
    sizes = [len(part) for part in np.array_split(np.arange(N_BOOT), 20)]
    draws = [generator.multinomial(n, np.full(n, 1 / n), size) @ gains.T / n for size in sizes]
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975], axis=0)
    return low, high
