"""Draws of rows: laws that they keep, cases by hand, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest

from igpt_lab.images.splits import few_per_class, stratified_draw, stratified_split


def test_a_draw_is_stratified_nested_and_seeded():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [60, 30, 10]))
    draws = {limit: stratified_draw(labels, limit, seed=4) for limit in (10, 50, 100, 999)}
    assert np.bincount(labels[draws[10]]).tolist() == [6, 3, 1]
    assert np.bincount(labels[draws[50]]).tolist() == [30, 15, 5]
    assert draws[100].tolist() == draws[999].tolist() == list(range(100))
    assert set(draws[10]) < set(draws[50]) and (np.diff(draws[50]) > 0).all()
    assert draws[10].tolist() == stratified_draw(labels, 10, seed=4).tolist()
    assert draws[10].tolist() != stratified_draw(labels, 10, seed=5).tolist()
    with pytest.raises(ValueError, match="limit=0; expected at least 1"):
        stratified_draw(labels, 0, seed=4)


def test_a_draw_of_one_class_is_the_start_of_a_permutation():
    first = np.random.default_rng(9).permutation(20)[:6]
    assert stratified_draw(np.zeros(20, int), 6, seed=9).tolist() == sorted(first)


@pytest.mark.parametrize("draw", [0, 3])
def test_few_per_class_nests(draw):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 5], [40, 30, 50]))
    subsets = [few_per_class(labels, k, seed=1, draw=draw) for k in (1, 4, 25, 30)]
    for k, chosen in zip((1, 4, 25, 30), subsets, strict=True):
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
        assert np.bincount(labels[chosen]).tolist() == [k, k, 0, 0, 0, k]
    assert all(set(small) < set(large) for small, large in pairwise(subsets))
    np.testing.assert_array_equal(subsets[1], few_per_class(labels, 4, seed=1, draw=draw))
    for other in ({"seed": 1, "draw": 4}, {"seed": 2, "draw": draw}):
        assert set(few_per_class(labels, 25, **other)) != set(subsets[2])


@pytest.mark.parametrize("draws", [1, 2, 3, 5, 7])
def test_draws_are_disjoint_where_the_rows_are_there(draws):
    """And otherwise no row is used two times more than another of its class: no draws share fewer rows on average."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 5], [40, 31, 50]))
    for k in range(1, 32):
        used = np.zeros(len(labels), int)
        for draw in range(draws):
            used[few_per_class(labels, k, seed=1, draw=draw, draws=draws)] += 1
        for label in (0, 1, 5):
            times = used[labels == label]
            assert times.sum() == draws * k and np.ptp(times) <= 1


def test_draws_are_a_pure_function_of_seed_k_draw_and_draws():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], 100))
    subset = few_per_class(labels, 9, seed=1, draw=2, draws=3)
    assert subset.tolist() == few_per_class(labels, 9, seed=1, draw=2, draws=3).tolist()
    others = ({"seed": 2, "draw": 2, "draws": 3}, {"seed": 1, "draw": 1, "draws": 3}, {"seed": 1, "draw": 2})
    assert all(subset.tolist() != few_per_class(labels, 9, **other).tolist() for other in others)
    first = [few_per_class(labels, 9, seed=1, draws=draws).tolist() for draws in (1, 2, 50)]
    assert first[0] == first[1] == first[2]


def test_few_per_class_does_not_touch_the_global_generator():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    few_per_class(np.zeros(9, int), 2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_few_per_class_says_what_is_short():
    with pytest.raises(ValueError, match="class 1 has 2 rows; 3 per class"):
        few_per_class(np.array([0, 0, 0, 1, 1]), 3)
    with pytest.raises(ValueError, match="expected at least 1"):
        few_per_class(np.array([0]), 0)
    with pytest.raises(ValueError, match="draw=5 of draws=5; expected 0 to 4"):
        few_per_class(np.array([0]), 1, draw=5)
    with pytest.raises(ValueError, match=r"labels as integers \(N,\); these are float64 \(2,\)"):
        few_per_class(np.array([0.0, 1.0]), 1)


def test_stratified_split():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [100, 25, 14, 2]))
    rest, held = stratified_split(labels, 0.1, seed=3)
    assert np.bincount(labels[held]).tolist() == [10, 3, 1, 1]
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert (np.diff(rest) > 0).all() and (np.diff(held) > 0).all() and rest.dtype == held.dtype == np.int64
    np.testing.assert_array_equal(held, stratified_split(labels, 0.1, seed=3)[1])
    assert set(held) != set(stratified_split(labels, 0.1, seed=4)[1])
    with pytest.raises(ValueError, match="class 7 has 1 row"):
        stratified_split(np.array([7, 8, 8]), 0.5, seed=0)
    with pytest.raises(ValueError, match="class 'dog' has 1 row"):
        stratified_split(np.array([1, 0, 0]), 0.5, seed=0, names=("cat", "dog"))
    with pytest.raises(ValueError, match="fraction=1"):
        stratified_split(labels, 1, seed=0)
