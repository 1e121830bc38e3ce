"""Multinomial logistic regression for many layers and many strengths of the penalty at once.

For standardised features x and labels y in [0, K), a fit minimises over weights W (D, K) and intercepts b (K,)

    mean over rows of -log softmax(x W + b)[y]  +  |W|^2 / (2 C N),

which is scikit-learn's objective divided by C N: intercepts are free, and K = 2 has one weight vector, of the log-odds.
All strengths, and layers of one width, share each pass over the rows. `objective` computes it, in the eigenbasis of the
features' covariance, and `lbfgs` minimises it.

Letters: B layers, S strengths, N rows, D features, K classes, and M vectors of weights, K or 1 where K = 2.
"""

from __future__ import annotations

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

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import exact_dtype
from igpt_lab.probing.solvers.lbfgs import minimise
from igpt_lab.probing.solvers.objective import (
    Problem,
    StandardisedRows,
    objective_and_gradient,
    penalties,
    price_of,
    unknowns_of,
    with_labels,
)

SAVED = 30  # passes that a Hessian near the end saves in each fold
FORGOTTEN = 0.03  # of the derivatives at a fold's start, what may be left of them at its end
WEAK = 1e6  # C N, above which the penalty is lost in the rounding of a Hessian's factors
WEAKER = 1e9  # C N, above which float32 ends before the tolerance
KEPT = 2**28  # numbers of the Hessians that are kept meanwhile: 1 GiB


@dataclass(frozen=True, eq=False)
class Fits:
    """B layers and S strengths, each fit with its certificate.

    `Cs`: float64 (B, S), the strengths. `weights` (B, S, D, M) and `intercepts` (B, S, M) act on features less `mean`
    (B, D). `objective` and `gradient`, its largest derivative by an intercept or by a weight of a standardised feature:
    float64 (B, S). `iterations`: int (B, S). `converged`: bool (B, S), no derivative is above the tolerance.
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
        logits = (x - self.mean[layer]) @ self.weights[layer] + self.intercepts[layer, :, None]
        return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits

    def predict(self, x: Tensor | np.ndarray, layer: int = 0) -> np.ndarray:
        """x (N, D) of one layer -> int64 (S, N), classes in [0, K)."""
        return self.logits(x, layer).argmax(-1).cpu().numpy()


@checked
def fit_logistic(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | Sequence[int],
    Cs: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    *,
    standardise: bool = True,
    tol: float = 1e-6,
    max_iter: int = 1000,
    dtype: torch.dtype = torch.float32,
    start: Fits | None = None,
    device: str | torch.device = "cpu",
) -> Fits:
    """Multinomial logistic regression with an L2 penalty, for many layers and strengths at once.

    A fit ends when no derivative is above `tol`, or at `max_iter` passes. One in float32 that ends early for want of
    precision goes on in float64, where the device has it.

    Args:
        x: (B, N, D), or (N, D) of one layer.
        y: int (N,) in [0, K).
        Cs: Inverse strengths of the penalty (S,), or (B, S) by layer.
        standardise: Bring each feature to mean 0 and variance 1.
        tol: Largest derivative of the mean loss, in nats, at which a fit ends.
        max_iter: Passes over the rows, at most.
        dtype: In which fits begin.
        start: Fits of as many layers, strengths, features and classes, to begin at; by default weights of zero.
        device: Where fits run.

    Returns:
        `Fits`, whose arrays begin with the axes (B, S).

    Raises:
        ValueError: Values that are not finite, a C that is not above 0, shapes that do not belong together, or a class
            from 0 to the largest without rows.

    Example:
        >>> fits = lab.fit_logistic(train.layers[2], train.labels, [0.01, 1.0])
        >>> fits.converged.tolist(), fits.predict(test.layers[2]).shape  # layers, strengths; strengths, images
        ([[True, True]], (2, 100))
    """
    x, y, Cs = _checked(x, y, Cs)
    rows = StandardisedRows(x, y, standardise, device)
    problem = Problem(rows, Cs, dtype)
    begin = problem.start() if start is None else problem.to_eigenbasis(*_moved(start, rows))
    weights, iterations = minimise(problem, begin, np.ones(Cs.shape, bool), tol, max_iter)
    fits = _certified(rows, Cs, problem.from_eigenbasis(weights), iterations, tol)
    del problem, weights  # their rows take as much memory as those that come
    return fits if dtype == rows.exact else _finished(fits, rows, tol, max_iter)


def fit_path(
    x: Tensor, y: np.ndarray, Cs: Sequence[float], *, tol: float, start: Fits | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Fits]:  # fmt: skip
    """`fit_logistic` of one layer x (N, D), one strength after another.

    All share their standardised rows. The first begins at `start`, as there, and each other where the two before it
    point to: that is close where the strengths have equal ratios. From there on the first guess of the Hessian is that
    of each class by itself at the start, where it costs fewer passes than it saves. To make it again on the way takes
    more passes.
    """
    features, labels, strengths = _checked(x, y, Cs)
    rows = StandardisedRows(features, labels, True, device)
    problem = Problem(rows, strengths, torch.float32, apart=True)
    weights = problem.start()
    if start is not None:
        weights[:, :1] = problem.to_eigenbasis(*_moved(start, rows))
    for column in range(len(Cs)):
        if column:
            weights[:, column] = 2 * weights[:, column - 1] - weights[:, max(0, column - 2)]
        one, now = slice(column, column + 1), np.arange(len(Cs))[None] == column
        factors = None
        if (column or start is not None) and problem.price() < SAVED:
            factors = len(Cs) * problem.factors(weights[:, one], torch.tensor([column], device=weights.device))
        weights, taken = minimise(problem, weights, now, tol, 1000, factors)
        fits = _certified(rows, strengths[:, one], problem.from_eigenbasis(weights[:, one]), taken[:, one], tol)
        yield _finished(fits, rows, tol, 1000)


def fit_folds(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    Cs: np.ndarray,
    *,
    tol: float,
    standardise: bool = True,
    max_iter: int = 1000,
    device: str | torch.device = "cpu",
) -> Iterator[Fits]:
    """As `fit_logistic` on the rows x[:, fit], x (B, N, D), of each (fit, held) of `folds`.

    No fold may end at what its held-out rows have told. Folds share most of their rows, so where a Hessian pays, all
    rows are fitted first, and each fold begins there with that Hessian as its first guess: it ends when no derivative
    is above `tol`, nor above FORGOTTEN of those that the absence of its held-out rows leaves at that start. Elsewhere
    each begins at zero, and ends at a tenth of `tol`: fits of few rows or a weak penalty are flat where they end.
    """
    rest, labels, strengths = _checked(x, y, Cs)
    n, width = x.shape[1], x.shape[2] + 1
    classes = int(labels.max()) + 1
    unknowns = unknowns_of(width, classes if classes > 2 else 1)
    pays = price_of(n, width, unknowns) < SAVED * len(folds) and unknowns**2 * strengths.size < KEPT
    if n < width or strengths.max() * n > WEAK or not pays:
        dtype = exact_dtype(torch.device(device)) if strengths.max() * n > WEAKER else torch.float32
        for fit, _ in folds:
            yield fit_logistic(
                x[:, fit], y[fit], Cs, standardise=standardise, tol=tol / 10, max_iter=max_iter, dtype=dtype,
                device=device,
            )  # fmt: skip
        return
    rows, every = StandardisedRows(rest, labels, standardise, device), np.ones(strengths.shape, bool)
    whole = Problem(rows, strengths, torch.float32)
    weights, taken = minimise(whole, whole.start(), every, tol, max_iter)
    start = _certified(rows, strengths, whole.from_eigenbasis(weights), taken, tol)
    columns = torch.arange(strengths.shape[1], device=weights.device)
    factors, basis = whole.factors(weights, columns), whole.basis
    del whole, weights
    for fit, _ in folds:
        few = StandardisedRows(rest[:, fit], labels[fit], standardise, device)
        problem = Problem(few, strengths, torch.float32, basis)
        begin = problem.to_eigenbasis(*_moved(start, few))
        left = problem.largest_derivative(problem.evaluate(begin, columns)[1])
        weights, taken = minimise(problem, begin, every, (FORGOTTEN * left).clamp_max(tol), max_iter, factors)
        yield _finished(_certified(few, strengths, problem.from_eigenbasis(weights), taken, tol), few, tol, max_iter)


@checked
def fit_sklearn(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | Sequence[int],
    Cs: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    *,
    standardise: bool = True,
    tol: float = 1e-6,
    max_iter: int = 100,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> Fits:
    """As `fit_logistic`, by scikit-learn's LogisticRegression as others use it: its own stop, and `max_iter`.

    Each fit begins at zero, on features as they are (not even centred) unless `standardise`, and ends at scikit-learn's
    own tolerance. `tol` decides only what the certificate calls converged. Runs on the CPU, whatever the `device`, each
    fit with so many `threads`.
    """
    x, y, Cs = _checked(x, y, Cs)
    rows = StandardisedRows(x.cpu(), y.cpu(), standardise, "cpu")
    features = torch.cat(list(rows.steps()), 1)[..., :-1].to(x.dtype) if standardise else rows.x

    def fit(layer: int, C: float) -> tuple[np.ndarray, int]:
        model = LogisticRegression(C=C, max_iter=max_iter).fit(features[layer].numpy(), rows.y.numpy())
        return np.column_stack([model.coef_, model.intercept_]), int(model.n_iter_[0])

    # Within a fit more threads wait for each other: two beside other work took 100 times as long as one.
    with threadpool_limits(threads), warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        fits = Parallel(n_jobs=-1, prefer="threads")(delayed(fit)(layer, C) for (layer, _), C in np.ndenumerate(Cs))
    of_fits, iterations = zip(*fits, strict=True)
    weights = torch.as_tensor(np.stack(of_fits).reshape(*Cs.shape, *of_fits[0].shape)).to(rows.exact)
    if not standardise:
        weights[..., -1] += (weights[..., :-1] @ rows.mean[:, None, :, None])[..., 0]  # of features less their mean
    return _certified(rows, Cs, weights, np.array(iterations).reshape(Cs.shape), tol)


def _finished(fits: Fits, rows: StandardisedRows, tol: float, max_iter: int) -> Fits:
    """The fits, on from where float32 ended for want of precision, in float64 where the device has it."""
    todo = ~fits.converged & (fits.iterations < max_iter)
    if not todo.any() or rows.exact == torch.float32:
        return fits
    problem = Problem(rows, fits.Cs, rows.exact)
    start = problem.to_eigenbasis(fits.weights, fits.intercepts)
    weights, more = minimise(problem, start, todo, tol, max_iter)
    return _certified(rows, fits.Cs, problem.from_eigenbasis(weights), fits.iterations + more, tol)


def _moved(start: Fits, rows: StandardisedRows) -> tuple[Tensor, Tensor]:
    """Weights and intercepts of `start` for features less the mean of these rows."""
    weights = start.weights.to(rows.mean)
    shift = ((rows.mean - start.mean.to(rows.mean))[:, None, None] @ weights)[:, :, 0]
    return weights, start.intercepts.to(rows.mean) + shift


def _checked(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | Sequence[int],
    Cs: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
) -> tuple[Tensor, Tensor, np.ndarray]:
    """As they are worked with: x (B, N, D), y (N,), float64 Cs (B, S)."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    x = x[None] if x.ndim == 2 else x
    Cs = np.array(np.broadcast_to(np.asarray(Cs, np.float64), (len(x), np.shape(Cs)[-1])))
    if x.ndim != 3 or y.shape != x.shape[1:2]:
        raise ValueError(f"features {tuple(x.shape)} for labels {tuple(y.shape)}; expected (B, N, D) for (N,)")
    if not (Cs > 0).all():
        raise ValueError(f"C={Cs[~(Cs > 0)][0]}; expected a number above 0")
    class_sizes = y.bincount() if len(y) and y.min() >= 0 else torch.zeros(1)
    if len(class_sizes) < 2 or not class_sizes.all():
        sizes = class_sizes.tolist()
        raise ValueError(f"rows of each class: {sizes}; expected two classes or more, 0 to K - 1, none empty")
    return x, y, Cs


def _certified(rows: StandardisedRows, Cs: np.ndarray, weights: Tensor, iterations: np.ndarray, tol: float) -> Fits:
    """Weights (B, S, M, D + 1) of the standardised features, intercepts last, with what is measured of them."""
    if weights.shape[2] > 1:  # a shift of all intercepts changes nothing: theirs sum to 0, as the weights do
        weights[..., -1] -= weights[..., -1].mean(-1, keepdim=True)
    steps = with_labels(rows.steps(), rows.y)
    value, derivatives = objective_and_gradient(steps, weights, penalties(Cs, len(rows), like=weights), len(rows))
    gradient = derivatives.abs().amax((2, 3)).cpu().numpy()
    return Fits(
        Cs=Cs,
        mean=rows.mean,
        weights=(weights[..., :-1] / rows.scale[:, None, None]).mT,
        intercepts=weights[..., -1],
        objective=value.cpu().numpy(),
        gradient=gradient,
        iterations=iterations,
        converged=gradient <= tol,
    )
