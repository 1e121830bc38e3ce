"""Multinomial logistic regression for many layers and many strengths of the penalty at once.

For standardised features x and labels y in [0, K), a fit minimises over weights W (D, K) and intercepts b (K,)

    mean over rows of -log softmax(x W + b)[y]  +  |W|^2 / (2 C N),

which is scikit-learn's objective divided by C N: intercepts are free, and K = 2 has one weight vector, of the log-odds.

The method is L-BFGS in its compact form (Byrd, Nocedal and Schnabel, 1994) in the eigenbasis of the features'
covariance, with the Hessian at weights of zero as its first guess; once the passes over the rows have cost as much as
a Hessian, one is made, from some of the rows, as the next guess. All strengths, and layers of one width, share a pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from igpt_lab.core.devices import mkl_is_slow, product

MEMORY = 20  # pairs that L-BFGS keeps
LOGITS = 2**19  # of a step through the rows on a CPU: they stay in its caches
CACHED = 2**18  # values of features, in float64, that do
UNKNOWNS = 6000  # of a block of the Hessian: 144 MB in float32
ROWS = 32  # of the Hessian's sample, for each feature
IDLE = 10  # steps with no gain in value nor slope, after which precision is at its end


@dataclass(frozen=True, eq=False)
class Fits:
    """B layers and S strengths, each fit with its certificate.

    `weights` (B, S, D, M) and `intercepts` (B, S, M) act on features less `mean` (B, D); M = K, or 1 where K = 2.
    `objective` and `gradient`, its largest derivative by an intercept or a weight of a standardised feature: float64
    (B, S); `iterations` int (B, S); `converged` bool (B, S): no derivative is above the tolerance.
    """

    Cs: np.ndarray
    mean: Tensor
    weights: Tensor
    intercepts: Tensor
    objective: np.ndarray
    gradient: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray

    def logits(self, x: Tensor | np.ndarray, layer: int = 0) -> Tensor:
        """x (N, D) of one layer -> (S, N, K), log-probabilities up to a constant in each row."""
        x = torch.as_tensor(x).to(self.weights)
        found = (x - self.mean[layer]) @ self.weights[layer] + self.intercepts[layer, :, None]
        return torch.cat([torch.zeros_like(found), found], -1) if found.shape[-1] == 1 else found

    def predict(self, x: Tensor | np.ndarray, layer: int = 0) -> np.ndarray:
        """x (N, D) of one layer -> int64 (S, N)."""
        return self.logits(x, layer).argmax(-1).cpu().numpy()


def fit_logistic(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    Cs: Sequence[float] | np.ndarray,
    *,
    standardise: bool = True,
    tol: float = 1e-6,
    max_iter: int = 1000,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Fits:
    """Fit x (B, N, D), or (N, D) of one layer, to y int (N,) in [0, K) with strengths Cs (S,), or (B, S) by layer.

    `standardise` brings each feature to mean 0 and variance 1. A fit ends when no derivative is above `tol`, or at
    `max_iter` passes. One in float32 that ends early for want of precision goes on in float64, where the device has it.
    Raises ValueError for values that are not finite, for a C that is not above 0 and for a class without rows.
    """
    x, y, Cs = _checked(x, y, Cs)
    rows = _Rows(x, y, standardise, device)
    todo, fits = np.ones(Cs.shape, bool), None
    for each in dict.fromkeys((dtype, rows.exact)):
        fits = _fit(rows, Cs, fits, todo, tol, max_iter, each)
        todo = ~fits.converged & (fits.iterations < max_iter)
        if not todo.any():
            break
    return fits


def fit_sklearn(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    Cs: Sequence[float] | np.ndarray,
    *,
    standardise: bool = True,
    tol: float = 1e-6,
    max_iter: int = 100,
    device: str | torch.device = "cpu",
) -> Fits:
    """As `fit_logistic`, by scikit-learn's LogisticRegression as others use it: its own stop, and `max_iter`.

    Each fit begins at zero, on features as they are (not even centred) unless `standardise`, and ends at scikit-learn's
    own tolerance. `tol` decides only what the certificate calls converged. Runs on the CPU, whatever the `device`.
    """
    x, y, Cs = _checked(x, y, Cs)
    x, y = x.cpu(), y.cpu()
    rows = _Rows(x, y, standardise, "cpu")
    given = torch.cat(list(rows.standard()), 1)[..., :-1].to(x.dtype) if standardise else x

    def fit(layer: int, C: float) -> tuple[np.ndarray, int]:
        found = LogisticRegression(C=C, max_iter=max_iter).fit(given[layer].numpy(), y.numpy())
        return np.column_stack([found.coef_, found.intercept_]), int(found.n_iter_[0])

    # Within a fit more threads wait for each other: two beside other work took 100 times as long as one.
    with threadpool_limits(1), warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        fits = Parallel(n_jobs=-1, prefer="threads")(delayed(fit)(layer, C) for (layer, _), C in np.ndenumerate(Cs))
    weights = torch.as_tensor(np.stack([each for each, _ in fits]).reshape(*Cs.shape, *fits[0][0].shape)).to(rows.exact)
    if not standardise:
        weights[..., -1] += (weights[..., :-1] @ rows.mean[:, None, :, None])[..., 0]  # of features less their mean
    return _certified(rows, Cs, weights, np.array([steps for _, steps in fits]).reshape(Cs.shape), tol)


def _checked(x: Tensor | np.ndarray, y: Tensor | np.ndarray, Cs) -> tuple[Tensor, Tensor, np.ndarray]:
    """As they are worked with: x (B, N, D), y (N,), float64 Cs (B, S)."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    x = x[None] if x.ndim == 2 else x
    Cs = np.array(np.broadcast_to(np.asarray(Cs, np.float64), (len(x), np.shape(Cs)[-1])))
    if x.ndim != 3 or y.shape != x.shape[1:2]:
        raise ValueError(f"features {tuple(x.shape)} for labels {tuple(y.shape)}; expected (B, N, D) for (N,)")
    if not (Cs > 0).all():
        raise ValueError(f"C={Cs[~(Cs > 0)][0]}; expected a number above 0")
    counts = y.bincount() if len(y) and y.min() >= 0 else torch.zeros(1)
    if len(counts) < 2 or not counts.all():
        raise ValueError(f"rows of each class: {counts.tolist()}; expected two classes or more, 0 to K - 1, none empty")
    return x, y, Cs


class _Rows:
    """Features with their mean and scale; standardised rows come in steps."""

    def __init__(self, x: Tensor, y: Tensor, standardise: bool, device: str | torch.device):
        self.device = torch.device(device)
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.x, self.y = x, y.to(self.device)
        self.counts = self.y.bincount()
        self.mean = sum(part.sum(1) for part in self._parts()) / x.shape[1]
        if not self.mean.isfinite().all():
            raise ValueError("features have values that are not finite")
        self.scale = torch.ones_like(self.mean)
        if standardise:
            squares = sum(((part - self.mean[:, None]) ** 2).sum(1) for part in self._parts())
            deviation = (squares / x.shape[1]).sqrt()
            varies = deviation > 10 * torch.finfo(x.dtype).eps * self.mean.abs()  # else only by rounding
            self.scale = torch.where(varies, deviation, self.scale)

    def _parts(self) -> Iterator[Tensor]:
        step = max(1, (CACHED if self.device.type == "cpu" else 2**24) // (len(self.x) * self.x.shape[2]))
        for part in self.x.split(step, dim=1):
            yield part.to(self.device, self.exact)

    def standard(self) -> Iterator[Tensor]:
        """Standardised rows (B, n, D + 1), the last feature a constant 1."""
        for part in self._parts():
            yield torch.nn.functional.pad((part - self.mean[:, None]) / self.scale[:, None], (0, 1), value=1.0)


def _fit(rows: _Rows, Cs: np.ndarray, fits: Fits | None, todo: np.ndarray, tol: float, max_iter: int, dtype) -> Fits:
    """Fit what is `todo`, from `fits` or from nothing, in `dtype`; the certificate of all."""
    problem = _Problem(rows, Cs, dtype)
    begin = problem.start() if fits is None else problem.turned(fits)
    weights, iterations = _minimise(problem, begin, todo, tol, max_iter)
    before = 0 if fits is None else fits.iterations
    return _certified(rows, Cs, problem.turned_back(weights), before + iterations, tol)


def _certified(rows: _Rows, Cs: np.ndarray, weights: Tensor, iterations: np.ndarray, tol: float) -> Fits:
    """Weights (B, S, M, D + 1) of the standardised features, intercepts last, with what is measured of them."""
    if weights.shape[2] > 1:  # a shift of all intercepts changes nothing: theirs sum to 0, as the weights do
        weights[..., -1] -= weights[..., -1].mean(-1, keepdim=True)
    penalty = _penalty(Cs, len(rows.y), weights.shape[-1], weights)
    value, gradient = _evaluate(_with_labels(rows.standard(), rows.y), weights, penalty, len(rows.y))
    gradient = gradient.abs().amax((2, 3)).cpu().numpy()
    return Fits(
        Cs, rows.mean, (weights[..., :-1] / rows.scale[:, None, None]).mT, weights[..., -1], value.cpu().numpy(),
        gradient, iterations, gradient <= tol,
    )  # fmt: skip


def _penalty(Cs: np.ndarray, n: int, width: int, like: Tensor) -> Tensor:
    """1 / (C n) of strengths (B, S) for each weight, (B, S, 1, width), and nothing on the last, the intercept."""
    lam = torch.as_tensor(1 / (Cs * n), dtype=like.dtype, device=like.device)
    penalty = lam[:, :, None, None].repeat(1, 1, 1, width)
    penalty[..., -1] = 0
    return penalty


class _Problem:
    """Rows in the eigenbasis of their covariance, (B, N, R + 1) with R = min(N, D), and the penalty of each fit."""

    def __init__(self, rows: _Rows, Cs: np.ndarray, dtype: torch.dtype):
        n, self.dtype, self.rows = rows.x.shape[1], dtype, rows
        standard = torch.cat([part[..., :-1].to(dtype) for part in rows.standard()], dim=1)
        if n < standard.shape[2]:  # the weights are sums of rows
            _, singular, basis = torch.linalg.svd(standard.cpu(), full_matrices=False)
            spectrum, basis = singular**2 / n, basis.mT
        else:
            spectrum, basis = torch.linalg.eigh((standard.mT @ standard).cpu() / n)
        spectrum, self.basis = spectrum.to(rows.device), basis.to(rows.device)
        self.z = torch.empty(*standard.shape[:2], self.basis.shape[2] + 1, dtype=dtype, device=rows.device)
        torch.matmul(standard, self.basis, out=self.z[..., :-1])
        self.z[..., -1] = 1
        self.spectrum = torch.nn.functional.pad(spectrum.clamp_min(0), (0, 1), value=1.0)
        self.penalty = _penalty(Cs, n, self.z.shape[2], self.z)
        self.prior = (rows.counts / n).to(dtype)

    def start(self) -> Tensor:
        """No weights, and the intercepts that are best without them: (B, S, M, R + 1)."""
        b, s, _, r = self.penalty.shape
        logs = self.prior.log()
        intercepts = logs if len(logs) > 2 else logs[1:] - logs[:1]
        weights = self.prior.new_zeros(b, s, len(intercepts), r)
        weights[..., -1] = intercepts
        return weights

    def curvature(self) -> Tensor:
        """Diagonal of the Hessian at the start, (B, S, M, R + 1)."""
        share = self.prior if len(self.prior) > 2 else self.prior[:1] * self.prior[1:]
        return share[:, None] * self.spectrum[:, None, None] + self.penalty

    def turned(self, fits: Fits) -> Tensor:
        """Weights of features as they were given, in the eigenbasis."""
        scaled = fits.weights.mT * self.rows.scale[:, None, None]
        inner = scaled.to(self.dtype) @ self.basis[:, None]
        return torch.cat([inner, fits.intercepts[..., None].to(self.dtype)], -1)

    def turned_back(self, weights: Tensor) -> Tensor:
        """Weights in the eigenbasis as weights of the standardised features (B, S, M, D + 1), at full precision."""
        inner = weights[..., :-1] @ self.basis.mT[:, None]
        return torch.cat([inner, weights[..., -1:]], -1).to(self.rows.exact)

    def evaluate(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Objective (B, S) and gradient (B, S, M, R + 1) of the fits `kept`."""
        b, s, m, _ = weights.shape
        step = max(1, LOGITS // (b * s * m)) if self.z.device.type == "cpu" else self.z.shape[1]
        parts = _with_labels(self.z.split(step, dim=1), self.rows.y)
        return _evaluate(parts, weights, self.penalty[:, kept], len(self.rows.y))

    def steepest(self, gradient: Tensor) -> Tensor:
        """The largest derivative (B, S) by a weight of the standardised features or an intercept."""
        inner = (gradient[..., :-1] @ self.basis.mT[:, None]).abs().amax((2, 3))
        return torch.maximum(inner, gradient[..., -1].abs().amax(2))

    def price(self) -> float:
        """What a Hessian costs, in passes over the rows."""
        m, r, n = len(self.prior) if len(self.prior) > 2 else 1, self.z.shape[2], self.z.shape[1]
        block = min(m, UNKNOWNS // r) * r
        return (min(ROWS * r, n) * block + block**2 / 3) / (4 * n) if block else math.inf

    def factors(self, weights: Tensor, kept: Tensor) -> list[Tensor]:
        """For each fit of `kept`, Cholesky factors (B, G, U, U) of the Hessian, in G blocks of classes.

        From `ROWS` rows a feature, drawn by how much a row weighs in the Hessian, at equal steps of its running sum.
        """
        b, s, m, r = weights.shape
        size = next(g for g in range(min(m, UNKNOWNS // r), 0, -1) if m % g == 0)
        sample, factors = min(ROWS * r, self.z.shape[1]), []
        p = torch.stack(
            [_probabilities((w.flatten(0, 1) @ z.T).view(s, m, -1)) for w, z in zip(weights, self.z, strict=True)]
        )
        for j in range(s):
            blocks = torch.stack([_hessian(*_drawn(self.z[i], p[i][j], sample), size) for i in range(b)])
            diagonal = blocks.div_(self.z.shape[1]).diagonal(dim1=-2, dim2=-1)
            diagonal += self.penalty[:, kept[j]].repeat(1, 1, size)
            factors.append(_factor(blocks))
        return factors


def _with_labels(parts: Iterator[Tensor], y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    end = 0
    for part in parts:
        begin, end = end, end + part.shape[1]
        yield part, y[begin:end]


def _evaluate(
    parts: Iterator[tuple[Tensor, Tensor]], weights: Tensor, penalty: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Objective (B, S) and its gradient, from rows (B, n, R + 1) with their labels and weights (B, S, M, R + 1)."""
    b, s, m, _ = weights.shape
    flat, value, gradient = weights.flatten(1, 2), weights.new_zeros(b, s), torch.zeros_like(weights).flatten(1, 2)
    for z, y in parts:
        losses, residual = _losses(_products(flat, z.mT).view(b, s, m, -1), y)
        value += losses
        gradient += _products(residual.view(b, s * m, -1), z)
    pull = penalty * weights
    return value / n + (pull * weights).sum((2, 3)) / 2, gradient.view_as(weights) / n + pull


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left (B, m, k) @ right (B, k, n)."""
    if left.is_cpu and mkl_is_slow():
        return torch.stack([product(*each) for each in zip(left, right, strict=True)])
    return left @ right


def _losses(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, S, M, n) -> sum of -log p (B, S), and p less what it should be, in the place of the logits."""
    if logits.shape[2] == 1:
        losses = torch.nn.functional.softplus(logits) - logits * y
        return losses.sum((2, 3)), logits.sigmoid_().sub_(y)
    index = y.expand(*logits.shape[:2], 1, -1)
    logs = logits.log_softmax(2)
    losses = -logs.gather(2, index).sum((2, 3))
    return losses, logs.exp_().scatter_add_(2, index, logs.new_full((), -1.0).expand(index.shape))


def _probabilities(logits: Tensor) -> Tensor:
    """Logits (S, M, n) -> probabilities, of the second class where M = 1."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _drawn(z: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` rows of z (n, R) and of p (M, n), and the weight of each; all rows where there are no more."""
    if count >= len(z):
        return z, p, torch.ones_like(p[0])
    weight = (p * (1 - p)).sum(0)
    share = (weight / weight.sum() + 1 / len(z)).double() / 2
    steps = (torch.arange(count, device=z.device, dtype=share.dtype) + 0.5) / count
    chosen = torch.searchsorted(share.cumsum(0), steps).clamp_max(len(z) - 1)
    return z[chosen], p[:, chosen], (1 / (count * share[chosen])).to(z.dtype)


def _hessian(z: Tensor, p: Tensor, weight: Tensor, size: int) -> Tensor:
    """Blocks (G, size R, size R) of the sum over rows of weight (diag(p) - p p') x z z', for `size` classes each."""
    m, r = len(p), z.shape[1]
    blocks = z.new_empty(m // size, size, r, size, r)
    for g, block in enumerate(blocks):
        for i in range(size):
            for j in range(i + 1):
                a, b = p[g * size + i], p[g * size + j]
                both = (z * (weight * (a * (i == j) - a * b))[:, None]).T @ z
                block[i, :, j], block[j, :, i] = both, both.T
    return blocks.flatten(3, 4).flatten(1, 2)


def _factor(blocks: Tensor) -> Tensor:
    """Cholesky factors of (..., U, U), with as much on the diagonal as rounding asks for.

    At least a millionth of its largest: to shift the weights of all classes at once has no curvature but the penalty's.
    """
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diagonal.amax(-1, keepdim=True)
    while True:
        diagonal += ridge
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            return factors
        ridge = 10 * ridge


def _minimise(
    problem: _Problem, begin: Tensor, todo: np.ndarray, tol: float, max_iter: int
) -> tuple[Tensor, np.ndarray]:
    """L-BFGS for all fits `todo` at once from `begin` (B, S, M, R + 1), and the steps that each took (B, S)."""
    result, taken = begin.clone(), torch.zeros(todo.shape, dtype=torch.long, device=begin.device)
    kept = torch.as_tensor(todo.any(0), device=begin.device).nonzero()[:, 0]
    active = torch.as_tensor(todo, device=begin.device)[:, kept]
    w, guess, spent = begin[:, kept], 1 / problem.curvature()[:, kept], 0
    value, gradient = problem.evaluate(w, kept)
    length, slack = torch.ones_like(value), 4 * torch.finfo(w.dtype).eps
    steps = turns = w.flatten(2)[:, :, None][:, :, :0]
    factors, idle, lowest = None, torch.zeros_like(value), torch.full_like(value, math.inf)
    for count in range(max_iter + 1):
        steepest = problem.steepest(gradient)
        idle, lowest = torch.where(steepest < lowest, 0, idle), torch.minimum(steepest, lowest)
        active = active & (steepest > tol) & (idle < IDLE)
        going = active.any(0).nonzero()[:, 0]
        if len(going) < len(kept):
            result[:, kept] = w
            if not len(going):
                break
            kept, (active, w, guess, value, gradient, length, idle, lowest, steps, turns) = (
                kept[going],
                (each[:, going] for each in (active, w, guess, value, gradient, length, idle, lowest, steps, turns)),
            )
            factors = factors and [factors[i] for i in going.tolist()]
        if count == max_iter:
            break
        if spent >= problem.price():
            factors, spent = problem.factors(w, kept), 0
        taken[:, kept] += active
        direction = _direction(gradient, steps, turns, guess, factors)
        slope = (gradient * direction).sum((2, 3))
        tried = w + length[..., None, None] * direction
        tried_value, tried_gradient = problem.evaluate(tried, kept)
        spent += 1
        rise = tried_value - value - length * slope
        better = active & (tried_value <= value + 1e-4 * length * slope + slack * value)
        moved = better[..., None, None]
        step, turn = (torch.where(moved, a - b, 0).flatten(2) for a, b in ((tried, w), (tried_gradient, gradient)))
        idle = torch.where(tried_value < value - slack * value, 0, idle + 1)
        bent = (step * turn).sum(2, keepdim=True) > 0
        steps, turns = (
            torch.cat([old, torch.where(bent, new, 0)[:, :, None]], 2)[:, :, -MEMORY:]
            for old, new in ((steps, step), (turns, turn))
        )
        w, gradient = torch.where(moved, tried, w), torch.where(moved, tried_gradient, gradient)
        value = torch.where(better, tried_value, value)
        shorter = (-slope * length / (2 * rise)).clamp(0.1, 0.5) * length  # the parabola through both values
        length = torch.where(better, 1.0, shorter.nan_to_num(0))
    result[:, kept] = w
    return result, taken.cpu().numpy()


def _direction(gradient: Tensor, steps: Tensor, turns: Tensor, guess: Tensor, factors: list[Tensor] | None) -> Tensor:
    """Minus the gradient (B, S, M, R + 1) times the inverse Hessian that the last steps (B, S, m, n) tell of.

    `turns` are the changes of the gradient along them; a step of zeros tells nothing. The first guess of the inverse is
    the diagonal `guess`, or what `factors` are the factors of.
    """
    down = -gradient.flatten(2)[..., None]

    def first(x: Tensor) -> Tensor:
        if factors is None:
            return x * guess.flatten(2)[..., None]
        blocks = [torch.cholesky_solve(x[:, i].view(*f.shape[:3], 1), f) for i, f in enumerate(factors)]
        return torch.stack(blocks, 1).view_as(x)

    if not steps.shape[2]:
        return first(down).view_as(gradient)
    products = steps @ turns.mT
    bend = products.diagonal(dim1=-2, dim2=-1)
    upper = products.triu() + torch.diag_embed((bend == 0).to(bend.dtype))
    along = torch.linalg.solve_triangular(upper, steps @ down, upper=True)
    found = first(down - turns.mT @ along)
    back = torch.linalg.solve_triangular(upper.mT, bend[..., None] * along - turns @ found, upper=False)
    return (found + steps.mT @ back).view_as(gradient)
