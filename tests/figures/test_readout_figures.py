"""Bits by layer as a figure, against a table by hand."""

import numpy as np
import pytest

from igpt_lab.figures import bits_curve
from tables import bits_table


def test_each_target_is_a_line_with_its_entropy():
    ax = bits_curve(bits_table().sample(frac=1, random_state=0))
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["row, H = 3.6"].get_xydata(), [[0, 1.08], [1, 1.44], [2, 1.8]])
    assert len(ax.collections) == 7 and lines["not converged"].get_xydata().tolist() == [[0, pytest.approx(1.5)]]


def test_shares_are_of_the_entropy():
    ax = bits_curve(bits_table(), relative=True)
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["row, H = 3.6"].get_ydata(), [0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="the table lacks entropy"):
        bits_curve(bits_table().drop(columns="entropy"))
