"""Scores of a layer that need no labels: the entropy of its Gram matrix, and what two views of the same images share.

Rows are taken at unit length, so that a Gram matrix holds cosines and its trace is N. No score is centred: the mean of
all rows is one of the directions. Letters: N images, D features; `first` and `second` are two views of the same images,
such as an image and its mirror image, row by row.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, eigh

from igpt_lab.core.arguments import checked


@checked
def matrix_entropy(x: np.ndarray) -> float:
    """Entropy, in nats, of the eigenvalues of the Gram matrix of rows x (N, D), as shares of their sum.

    The matrix-based entropy of order 1 (Giraldo, Rao and Príncipe, 2015), of which Skean et al. (2025) made a score of
    layers. 0 where all rows have one direction, ln N where they are orthogonal, at most ln min(N, D).
    """
    return float(_entropy(np.linalg.eigvalsh(_smaller_gram(unit_rows(x)))))


@checked
def info_nce(first: np.ndarray, second: np.ndarray, *, temperature: float = 0.1) -> float:
    """InfoNCE of two views (N, D) by cosine (van den Oord et al., 2018): nats, the lower the better.

    The mean of -log softmax of a row's cosine with its own other view, among those with the other views of all images,
    in both directions. ln N where views say nothing of each other.
    """
    first, second = _views(first, second)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a number above 0")
    cosines = first @ second.T / temperature
    losses = [np.logaddexp.reduce(rows, axis=1) - np.diag(rows) for rows in (cosines, cosines.T)]
    return float(np.mean(losses))


@checked
def lidar(first: np.ndarray, second: np.ndarray) -> float:
    """LiDAR of two views (N, D): the number of directions that tell images apart, beyond what views of one differ in.

    The smooth rank, exp of the entropy of the eigenvalues, of linear discriminant analysis with each image as a class
    (Thilak et al., 2024). From 1 to min(N - 1, D). Nothing is added to the covariance within images, so an invertible
    map of the features changes nothing; ValueError where that covariance is singular, as of fewer than D + 1 images.
    """
    first, second = _pair(first, second)
    means, differences = (first + second) / 2, (first - second) / 2
    between = np.cov(means.T, ddof=1).reshape(first.shape[1], -1)
    within = 2 * differences.T @ differences / len(first)
    try:
        return float(np.exp(_entropy(eigh(between, within, eigvals_only=True))))
    except LinAlgError as error:
        raise ValueError(
            f"the two views of {len(first)} images differ in fewer than all {first.shape[1]} features; expected more "
            f"images, at least {first.shape[1] + 1:,}, or views that differ more"
        ) from error


@checked
def dime(first: np.ndarray, second: np.ndarray, *, permutations: int = 5, seed: int = 0) -> float:
    """Difference of matrix-based entropies of two views (N, D): nats, 0 or more in expectation (Skean et al., 2023).

    How much the entropy of the joint Gram matrix, the product of both entry by entry, rises when the images of one view
    are shuffled; a bound of what the views share. The mean over `permutations`.
    """
    grams = [x @ x.T for x in _views(first, second)]
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(grams[0])) for _ in range(permutations)]
    shuffled = [_entropy(np.linalg.eigvalsh(grams[0] * grams[1][np.ix_(order, order)])) for order in orders]
    return float(np.mean(shuffled) - _entropy(np.linalg.eigvalsh(grams[0] * grams[1])))


def unit_rows(x: np.ndarray) -> np.ndarray:
    """float64 (N, D), each row divided by its length; ValueError for a row of zeros and values that are not finite."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"x has shape {x.shape}; expected (N, D), one row or more")
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        wrong = int((~(np.isfinite(lengths) & (lengths > 0))).sum())
        raise ValueError(f"x has {wrong:,} of {len(x):,} rows that are zero or not finite; leave these rows out")
    return x / lengths


def _smaller_gram(x: np.ndarray) -> np.ndarray:
    """x x' or x' x, which have the same eigenvalues but for zeros."""
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


def _entropy(eigenvalues: np.ndarray) -> float:
    """-sum p log p of eigenvalues as shares p of their sum; what rounding made negative counts as 0."""
    positive = eigenvalues[eigenvalues > 0]
    shares = positive / positive.sum()
    return float(-shares @ np.log(shares))


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two views as float64, checked."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(f"views {first.shape} and {second.shape}; expected two of (N, D), of the same N images, N > 1")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("views have values that are not finite; leave out these rows, or the layer")
    return first, second


def _views(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two views with rows of unit length."""
    first, second = _pair(first, second)
    return unit_rows(first), unit_rows(second)
