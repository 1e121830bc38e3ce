"""Information imbalance against a loop, a case by hand, and dadapy's definition."""

import numpy as np
import pandas as pd
import pytest

from igpt_lab.probing import imbalance
from igpt_lab.probing.features import Features
from igpt_lab.probing.imbalance import information_imbalance

QUIET = {"progress": False}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def by_loop(a: np.ndarray, b: np.ndarray) -> float:
    """2 / N times the mean rank in b of the nearest neighbour in a, as Glielmo et al. (2022) write it."""
    n, total = len(a), 0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        near = min(others, key=lambda j: np.linalg.norm(a[i] - a[j]))
        order = sorted(others, key=lambda j: np.linalg.norm(b[i] - b[j]))
        total += 1 + order.index(near)
    return 2 / n * total / n


@pytest.mark.parametrize("block", [1, 100, 2**23])
def test_a_loop_over_all_ranks(block, monkeypatch):
    monkeypatch.setattr(imbalance, "BLOCK", block)
    x = normal(0, 30, 4)
    layers = {0: x, 2: x[:, :1], 5: normal(1, 30, 3)}
    table = information_imbalance(layers, **QUIET)
    assert len(table) == 9 and set(table.n) == {30}
    for row in table.itertuples():
        a, b = layers[row.layer], layers[row.other_layer]
        assert row.imbalance == pytest.approx(by_loop(a, b)) and row.back == pytest.approx(by_loop(b, a))
        assert row.imbalance_low <= row.imbalance <= row.imbalance_high
    other = {0: normal(2, 30, 6)}
    for row in information_imbalance(layers, other, **QUIET).itertuples():
        assert row.imbalance == pytest.approx(by_loop(layers[row.layer], other[0]))
        assert row.back == pytest.approx(by_loop(other[0], layers[row.layer]))


def test_by_hand():
    """On a line at 0, 1, 3, 7, and the same with the last two exchanged.

    In a the neighbours are 1, 0, 1, 2 (of 0, 1, 2, 3). In b = 0, 1, 7, 3 the ranks of these: from 0 to 1 first, from 1
    to 0 first, from 2 (at 7) to 1 (at 1) second, from 3 (at 3) to 2 (at 7) third.
    """
    a, b = (np.array(values, float)[:, None] for values in ([0, 1, 3, 7], [0, 1, 7, 3]))
    row = information_imbalance({0: a}, {1: b}, **QUIET).iloc[0]
    assert row.imbalance == pytest.approx(2 / 4 * (1 + 1 + 2 + 3) / 4)


def test_a_layer_says_all_of_itself_and_nothing_of_another():
    x, y = normal(0, 300, 5), normal(1, 300, 5)
    table = information_imbalance({0: x}, {0: 3 * x + 1, 1: y, 2: x[:, :2]}, **QUIET).set_index("other_layer")
    assert table.imbalance[0] == pytest.approx(2 / 300) == table.back[0]
    assert table.imbalance[1] == pytest.approx(1, abs=0.1) and table.imbalance_low[1] < 1 < table.imbalance_high[1]
    assert table.imbalance[2] < table.back[2] < 1  # all features say more of two than two of all


def test_features_are_taken_and_labels_not_read():
    features = Features({0: normal(0, 20, 3)}, np.zeros(20, int), np.arange(20))
    pd.testing.assert_frame_equal(
        information_imbalance(features, **QUIET), information_imbalance(features.layers, **QUIET)
    )


def test_bad_input():
    x = normal(0, 20, 3)
    with pytest.raises(ValueError, match="layers of 19 and 20 images"):
        information_imbalance({0: x}, {0: x[1:]}, **QUIET)
    with pytest.raises(ValueError, match="layers of 2 images; expected the same three or more"):
        information_imbalance({0: x[:2]}, **QUIET)
    with pytest.raises(ValueError, match="layer 0 has shape"):
        information_imbalance({0: x * np.inf}, **QUIET)
    with pytest.raises(TypeError, match="layers of type ndarray"):
        information_imbalance(x, **QUIET)
    with pytest.raises(ValueError, match="got no layers"):
        information_imbalance({}, **QUIET)
