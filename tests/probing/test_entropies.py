"""Scores without labels: laws, cases solved by hand, and definitions written out."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from igpt_lab.probing.entropies import dime, info_nce, lidar, matrix_entropy


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal(n: int, width: int) -> np.ndarray:
    return np.linalg.qr(normal(9, width, n))[0].T


def test_orthonormal_rows_have_the_entropy_ln_n():
    for n, width in ((5, 5), (5, 40)):
        assert matrix_entropy(3 * orthonormal(n, width)) == pytest.approx(np.log(n))
    assert matrix_entropy(np.outer(np.arange(1.0, 9), [1, 2, 3])) == pytest.approx(0, abs=1e-9)


def test_the_entropy_by_hand():
    """Two rows at an angle of 60 degrees: the Gram matrix has the eigenvalues 1 + 1/2 and 1 - 1/2."""
    x = np.array([[2, 0], [0.5, np.sqrt(3) / 2]])
    assert matrix_entropy(x) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_the_entropy_is_that_of_both_gram_matrices(shape):
    x = normal(0, *shape)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for gram in (unit @ unit.T, unit.T @ unit):
        shares = np.linalg.svd(gram, compute_uv=False) / len(x)
        shares = shares[shares > 1e-14]
        assert matrix_entropy(x) == pytest.approx(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equal_orthonormal_views_have_info_nce_by_hand(temperature):
    """A row's own cosine is 1 and all others are 0: -log(e^(1/t) / (e^(1/t) + N - 1))."""
    x = orthonormal(6, 9)
    assert info_nce(x, 2 * x, temperature=temperature) == pytest.approx(np.log(1 + 5 * np.exp(-1 / temperature)))


def test_info_nce_is_the_cross_entropy_of_torch():
    first, second = normal(0, 12, 5), normal(1, 12, 5)
    unit = [torch.nn.functional.normalize(torch.as_tensor(x)) for x in (first, second)]
    logits, own = unit[0] @ unit[1].T / 0.1, torch.arange(12)
    expected = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    assert info_nce(first, second) == pytest.approx(expected.item())
    assert info_nce(first, first + 0.01 * second) < info_nce(first, first + second) < info_nce(first, second)


def test_views_that_are_all_alike_have_info_nce_ln_n():
    assert info_nce(np.ones((8, 3)), np.ones((8, 3))) == pytest.approx(np.log(8))


def test_no_invertible_map_changes_lidar():
    first = normal(0, 60, 6) * [9, 3, 1, 1, 1, 0.1]
    second = first + normal(1, 60, 6)
    plain = lidar(first, second)
    for seed in range(3):
        mapped, shift = normal(seed, 6, 6) + 2 * np.eye(6), normal(seed, 6)
        assert lidar(first @ mapped + shift, second @ mapped + shift) == pytest.approx(plain)
    assert 1 < plain < 6


def test_lidar_is_the_rank_of_linear_discriminants_of_scikit_learn():
    first = normal(0, 40, 4) * [3, 2, 1, 1]
    second = first + 0.5 * normal(1, 40, 4)
    peer = LinearDiscriminantAnalysis(solver="eigen").fit(np.concatenate([first, second]), np.tile(np.arange(40), 2))
    shares = np.concatenate([peer.explained_variance_ratio_, np.zeros(4)])[:4]
    shares = shares[shares > 0] / shares.sum()
    assert lidar(first, second) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_lidar_by_hand():
    """Within images both features differ by as much; between images the first varies three times as far."""
    means = np.array([[3.0, 1], [3, -1], [-3, 1], [-3, -1]])
    differences = np.array([[1.0, 1], [1, -1], [1, 1], [1, -1]])  # covariance within: a multiple of the unit matrix
    shares = np.array([0.9, 0.1])
    assert lidar(means + differences, means - differences) == pytest.approx(np.prod(shares**-shares))


def test_dime_by_hand():
    """Two pairs of equal images. Of the 24 orders of a view 8 keep the pairs, entropy ln 2; the others give ln 4."""
    x = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    gram = x @ x.T
    entropies = []
    for order in permutations(range(4)):
        values = np.linalg.eigvalsh(gram * gram[np.ix_(order, order)]) / 4
        values = values[values > 1e-12]
        entropies.append(-(values * np.log(values)).sum())
    assert np.mean(entropies) - np.log(2) == pytest.approx(2 / 3 * np.log(2))
    assert dime(x, x, permutations=4000) == pytest.approx(2 / 3 * np.log(2), abs=0.03)
    assert dime(x, x[[0, 2, 1, 3]], permutations=4000) < 0  # views that pair other images say less than chance


def test_dime_is_what_views_share():
    x = normal(0, 60, 5)
    noisy = [x + noise * normal(1, 60, 5) for noise in (0.1, 1, 100)]
    near, far, none = (dime(x, view, permutations=20) for view in noisy)
    assert near > far > none and abs(none) < 0.1 * near
    assert dime(x, noisy[1], seed=3) == dime(x, noisy[1], seed=3) != dime(x, noisy[1], seed=4)


def test_bad_input():
    x = normal(0, 10, 3)
    for score in (info_nce, lidar, dime):
        with pytest.raises(ValueError, match=r"views \(10, 3\) and \(9, 3\); expected two of"):
            score(x, x[1:])
        with pytest.raises(ValueError, match="values that are not finite"):
            score(x, x * np.nan)
    with pytest.raises(ValueError, match="rows that are zero or not finite"):
        matrix_entropy(x * (np.arange(10) > 0)[:, None])
    with pytest.raises(ValueError, match=r"x has shape \(10,\)"):
        matrix_entropy(x[:, 0])
    with pytest.raises(ValueError, match="temperature=0"):
        info_nce(x, x, temperature=0)
    with pytest.raises(ValueError, match="views of 10 images differ in fewer than all 3 features"):
        lidar(x, x + [1, 0, 0])
