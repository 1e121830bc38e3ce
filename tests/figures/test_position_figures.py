"""Accuracy by position, by share of the image and by attention, against tables by hand."""

import numpy as np
import pytest

from igpt_lab.figures import attentive_curve, position_map, prefix_curve
from tables import attentive_table, position_table, prefix_table


def lines(ax):
    return [line.get_xydata().tolist() for line in ax.get_lines()]


def test_position_map_has_positions_downwards_and_layers_to_the_right():
    ax = position_map(position_table().sample(frac=1, random_state=0))
    np.testing.assert_allclose(ax.images[0].get_array(), [[10, 10, 10], [30, 50, 40]])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "7"]
    (rings,) = lines(ax)
    assert sorted(rings) == [[1, 1], [2, 0]]


def test_prefix_curve_has_a_line_for_each_share():
    ax = prefix_curve(prefix_table().sample(frac=1, random_state=0))
    half, ring_of_half, whole, ring = lines(ax)
    np.testing.assert_allclose(half, [[0, 10], [1, 10], [2, 10]])
    np.testing.assert_allclose(whole, [[0, 30], [1, 50], [2, 40]])
    np.testing.assert_allclose(ring_of_half + ring, [[2, 10], [1, 50]])
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["50 % of the image", "100 % of the image"]
    assert "100 test images" in ax.texts[0].get_text()


def test_attentive_curve_has_the_mean_of_seeds_and_each_seed():
    attentive, seeds, mean, _ = lines(attentive_curve(attentive_table()))
    np.testing.assert_allclose(attentive, [[0, 61], [4, 81]])
    np.testing.assert_allclose(sorted(seeds), [[0, 60], [0, 62], [4, 80], [4, 82]])
    np.testing.assert_allclose(mean, [[0, 50], [4, 60]])


@pytest.mark.parametrize(
    ("draw", "table", "words"),
    [
        (position_map, position_table().drop(columns="position"), "the table lacks position"),
        (position_map, position_table().assign(position=0), "more than one row for the same layer and position"),
        (prefix_curve, prefix_table().assign(share=1), "more than one row for the same layer and share"),
        (attentive_curve, attentive_table().assign(probe="max"), "more than one row"),
        (attentive_curve, attentive_table().replace("mean", "max"), "probe 'max'; expected attentive or mean"),
    ],
)
def test_bad_tables(draw, table, words):
    with pytest.raises(ValueError, match=words):
        draw(table)
