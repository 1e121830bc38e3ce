"""What multinomial logistic regression minimises: standardised rows, and the objective with its gradient and Hessian.

Letters: B layers, S strengths of the penalty, N rows, D features, K classes, and M vectors of weights: K of them, or
one where K = 2, of the log-odds. A fit is a pair of a layer and a strength. `logistic` states the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from igpt_lab.core.devices import exact_dtype, mkl_is_slow, product

LOGITS = 2**19  # of a step through the rows on a CPU: they stay in its caches
CACHED = 2**18  # values of features, in float64, that do
UNKNOWNS = 6000  # of a block of the Hessian: 144 MB in float32
ROWS = 32  # of the Hessian's sample, for each feature
SMALLEST = -80.0  # log of the least probability; products of numbers that float32 holds as denormal ones are slow
DENSE = 3  # times as many operations a second a Hessian does as a pass, whose matrices are thin


def scale_of(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard deviations, by which features of `dtype` are divided; 1 for a feature that varies by rounding alone."""
    deviation = variance.sqrt()
    varies = deviation > 10 * torch.finfo(dtype).eps * mean.abs()
    return torch.where(varies, deviation, torch.ones_like(deviation))


class StandardisedRows:
    """Rows x (B, N, D) of labels y (N,), with the `mean` and `scale` (B, D) of each feature over them.

    Moments and standardised rows are in `exact`, float64 where the device has it; rows come in steps, to save memory.
    Without `standardise` rows are centred only. ValueError for values that are not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, standardise: bool, device: str | torch.device):
        self.device = torch.device(device)
        self.exact = exact_dtype(self.device)
        self.x, self.y = x, y.to(self.device)
        self.class_sizes = self.y.bincount()
        self.mean = self._total(part.sum(1) for part in self._parts()) / x.shape[1]
        if not self.mean.isfinite().all():
            raise ValueError("features have values that are not finite")
        self.scale = torch.ones_like(self.mean)
        if standardise:
            squares = self._total(((part - self.mean[:, None]) ** 2).sum(1) for part in self._parts())
            self.scale = scale_of(self.mean, squares / x.shape[1], x.dtype)

    def __len__(self) -> int:
        return len(self.y)

    def steps(self) -> Iterator[Tensor]:
        """Standardised rows (B, n, D + 1), the last feature a constant 1."""
        for part in self._parts():
            yield functional.pad((part - self.mean[:, None]) / self.scale[:, None], (0, 1), value=1.0)

    def _parts(self) -> Iterator[Tensor]:
        step = max(1, (CACHED if self.device.type == "cpu" else 2**24) // (len(self.x) * self.x.shape[2]))
        for part in self.x.split(step, dim=1):
            yield part.to(self.device, self.exact)

    def _total(self, sums: Iterable[Tensor]) -> Tensor:
        return sum(sums, start=torch.zeros((), dtype=self.exact, device=self.device))


class Problem:
    """The fits of all layers and strengths, in the eigenbasis of each layer's covariance.

    There the Hessian at weights of zero is diagonal. `z` are rows (B, N, R + 1) with R = min(N, D), the last feature a
    constant 1; `penalty` (B, S, 1, R + 1) is 1 / (C N) for each weight and 0 for the intercept; `derivatives` is how
    many of them a fit has by weights of standardised features and by intercepts. Another `basis` (B, D, D),
    orthonormal, may be given: that of nearly the same rows. With `apart` each class is a block of the Hessian, which is
    then made only where it is asked for.
    """

    def __init__(
        self,
        rows: StandardisedRows,
        Cs: np.ndarray,
        dtype: torch.dtype,
        basis: Tensor | None = None,
        apart: bool = False,
    ):
        self.rows, self.dtype = rows, dtype
        self.apart = apart
        standard = torch.cat([step[..., :-1].to(dtype) for step in rows.steps()], dim=1)
        if basis is None:
            spectrum, basis = _eigenbasis(standard)
        else:
            spectrum = torch.stack(
                [(part @ of_layer).square().mean(0) for part, of_layer in zip(standard, basis, strict=True)]
            )
        self.basis = basis.to(rows.device)
        self.z = torch.empty(*standard.shape[:2], self.basis.shape[2] + 1, dtype=dtype, device=rows.device)
        torch.matmul(standard, self.basis, out=self.z[..., :-1])
        self.z[..., -1] = 1
        self.spectrum = functional.pad(spectrum.to(rows.device).clamp_min(0), (0, 1), value=1.0)
        self.penalty = penalties(Cs, len(rows), like=self.z)
        self.prior = (rows.class_sizes / len(rows)).to(dtype)
        vectors = len(self.prior) if len(self.prior) > 2 else 1
        width = self.z.shape[2]
        self.derivatives = vectors * (self.basis.shape[1] + 1)
        self.together = unknowns_of(width, 1 if apart else vectors) // width  # classes of a block, at most

    def start(self) -> Tensor:
        """Weights of zero, and the intercepts that are best with them: (B, S, M, R + 1)."""
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

    def to_eigenbasis(self, weights: Tensor, intercepts: Tensor) -> Tensor:
        """Weights (B, S, D, M) of features as they came, and intercepts (B, S, M) -> (B, S, M, R + 1)."""
        scaled = weights.mT * self.rows.scale[:, None, None]
        inner = scaled.to(self.dtype) @ self.basis[:, None]
        return torch.cat([inner, intercepts[..., None].to(self.dtype)], -1)

    def from_eigenbasis(self, weights: Tensor) -> Tensor:
        """(B, S, M, R + 1) -> weights of standardised features, intercepts last, (B, S, M, D + 1) in `rows.exact`."""
        inner = weights[..., :-1] @ self.basis.mT[:, None]
        return torch.cat([inner, weights[..., -1:]], -1).to(self.rows.exact)

    def evaluate(self, weights: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Objective (B, S) and gradient, as `weights` (B, S, M, R + 1) of the strengths `columns` int (S,)."""
        b, s, m, _ = weights.shape
        step = max(1, LOGITS // (b * s * m)) if self.z.device.type == "cpu" else self.z.shape[1]
        steps = with_labels(self.z.split(step, dim=1), self.rows.y)
        return objective_and_gradient(steps, weights, self.penalty[:, columns], len(self.rows))

    def largest_derivative(self, gradient: Tensor) -> Tensor:
        """(B, S, M, R + 1) -> (B, S), of those by a weight of a standardised feature or by an intercept."""
        inner = (gradient[..., :-1] @ self.basis.mT[:, None]).abs().amax((2, 3))
        return torch.maximum(inner, gradient[..., -1].abs().amax(2))

    def unknowns(self) -> int:
        """Of the largest block of a Hessian; 0 where those of one class are too many."""
        return self.together * self.z.shape[2]

    def price(self) -> float:
        """What a Hessian costs, in passes over the rows."""
        rows, width = self.z.shape[1:]
        return price_of(rows, width, self.unknowns())

    def factors(self, weights: Tensor, columns: Tensor) -> list[Tensor]:
        """For each strength of `columns` (S,), Cholesky factors (B, G, U, U) of the Hessian in G blocks of classes.

        It is estimated from `ROWS` rows for each feature (subsampled Newton; Byrd, Chin, Neveitt and Nocedal, 2011).
        Rows are drawn by how much they weigh in the Hessian, at equal steps of the running sum of their weights.
        """
        _, s, m, r = weights.shape
        size = next(g for g in range(self.together, 0, -1) if m % g == 0)
        sample, factors = min(ROWS * r, self.z.shape[1]), []
        layers = list(zip(weights, self.z, strict=True))
        p = torch.stack([_probabilities((w.flatten(0, 1) @ z.T).view(s, m, -1)) for w, z in layers])
        for j in range(s):
            of_layers = (_hessian(*_drawn(z, p_layer[j], sample), size) for z, p_layer in zip(self.z, p, strict=True))
            blocks = torch.stack(list(of_layers))
            diagonal = blocks.div_(self.z.shape[1]).diagonal(dim1=-2, dim2=-1)
            diagonal += self.penalty[:, columns[j]].repeat(1, 1, size)
            factors.append(_factor(blocks))
        return factors


def unknowns_of(width: int, vectors: int) -> int:
    """Of the largest block of a Hessian for so many vectors of weights; 0 where those of one are too many."""
    return min(vectors, UNKNOWNS // width) * width


def price_of(rows: int, width: int, unknowns: int) -> float:
    """What a Hessian with blocks of so many unknowns costs, in passes over the rows (rows, width)."""
    work = min(ROWS * width, rows) * unknowns + unknowns**2 / 3
    return work / (4 * rows * DENSE) if unknowns else math.inf


def _eigenbasis(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows (B, N, D) -> eigenvalues (B, R) of their covariance and eigenvectors (B, D, R), on the CPU."""
    n = standard.shape[1]
    if n < standard.shape[2]:  # the weights are sums of rows
        _, singular, basis = torch.linalg.svd(standard.cpu(), full_matrices=False)
        return singular**2 / n, basis.mT
    spectrum, basis = torch.linalg.eigh((standard.mT @ standard).cpu() / n)
    return spectrum, basis


def penalties(Cs: np.ndarray, n: int, like: Tensor) -> Tensor:
    """1 / (C n) of strengths (B, S) for each weight, and 0 for the intercept: (B, S, 1, width), `like` (..., width)."""
    strengths = torch.as_tensor(1 / (Cs * n), dtype=like.dtype, device=like.device)
    penalty = strengths[:, :, None, None].repeat(1, 1, 1, like.shape[-1])
    penalty[..., -1] = 0
    return penalty


def with_labels(steps: Iterable[Tensor], y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (B, n, width) in steps, each with its labels (n,) out of y (N,)."""
    end = 0
    for rows in steps:
        begin, end = end, end + rows.shape[1]
        yield rows, y[begin:end]


def objective_and_gradient(
    steps: Iterable[tuple[Tensor, Tensor]], weights: Tensor, penalty: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Objective (B, S) and its gradient (B, S, M, width) at weights (B, S, M, width), in one pass over n rows.

    `steps` are rows (B, ·, width) with their labels (·,); `penalty` is (B, S, 1, width), as of `penalties`.
    """
    b, s, m, _ = weights.shape
    flat = weights.flatten(1, 2)
    value, gradient = weights.new_zeros(b, s), torch.zeros_like(weights).flatten(1, 2)
    for z, y in steps:
        losses, residual = _losses(_products(flat, z.mT).view(b, s, m, -1), y)
        value += losses
        gradient += _products(residual.view(b, s * m, -1), z)
    pull = penalty * weights
    return value / n + (pull * weights).sum((2, 3)) / 2, gradient.view_as(weights) / n + pull


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left (B, m, k) @ right (B, k, n)."""
    if left.is_cpu and mkl_is_slow():
        return torch.stack([product(a, b) for a, b in zip(left, right, strict=True)])
    return left @ right


def _losses(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, S, M, n), labels (n,) -> sum of -log p (B, S), and p less its target, which may overwrite the logits.

    The target is 1 for the class of the label and 0 for all others.
    """
    if logits.shape[2] == 1:
        losses = functional.softplus(logits) - logits * y
        return losses.sum((2, 3)), logits.sigmoid_().sub_(y)
    index = y.expand(*logits.shape[:2], 1, -1)
    logs = logits.log_softmax(2)
    losses = -logs.gather(2, index).sum((2, 3))
    p = logs.clamp_min_(SMALLEST).exp_()
    return losses, p.scatter_add_(2, index, p.new_full((), -1.0).expand(index.shape))


def _probabilities(logits: Tensor) -> Tensor:
    """Logits (S, M, n) -> probabilities, of the second class where M = 1."""
    p = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    return p.clamp_(1e-15, 1)  # a product of two is no denormal number


def _drawn(z: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` rows of z (n, R) and of p (M, n), and the weight of each; all rows where there are no more.

    Half of a row's chance is its share of the sum of p (1 - p), the other half is the same for all rows. The weight of
    a row is one over its expected number of draws, so that sums over the sample are those over all rows on average.
    """
    if count >= len(z):
        return z, p, torch.ones_like(p[0])
    variance = (p * (1 - p)).sum(0)
    share = (variance / variance.sum() + 1 / len(z)).to(exact_dtype(z.device)) / 2
    positions = (torch.arange(count, device=z.device, dtype=share.dtype) + 0.5) / count
    chosen = torch.searchsorted(share.cumsum(0), positions).clamp_max(len(z) - 1)
    return z[chosen], p[:, chosen], (1 / (count * share[chosen])).to(z.dtype)


def _hessian(z: Tensor, p: Tensor, weight: Tensor, size: int) -> Tensor:
    """Blocks (G, size R, size R) of the sum over rows of weight (diag(p) - p p') x z z', for `size` classes each."""
    m, r = len(p), z.shape[1]
    across = z.T.contiguous()
    blocks = z.new_empty(m // size, size, r, size, r)
    for g, block in enumerate(blocks):
        for i in range(size):
            for j in range(i + 1):
                a, b = p[g * size + i], p[g * size + j]
                both = product(across * (weight * (a * (i == j) - a * b)), z)
                block[i, :, j], block[j, :, i] = both, both.T
    return blocks.flatten(3, 4).flatten(1, 2)


def _factor(blocks: Tensor) -> Tensor:
    """Cholesky factors of blocks (..., U, U), with as much on the diagonal as rounding asks for.

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
