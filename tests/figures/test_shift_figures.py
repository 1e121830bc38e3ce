"""Drop and depth of the peak under rising corruption, in figures, against a table by hand."""

import numpy as np
import pytest

from igpt_lab.figures import shift_curves, shift_points
from tables import shift_table


def heights_of(ax):
    """Heights of the lines of an axes' families, in %."""
    return [container.lines[0].get_ydata().tolist() for container in ax.containers]


def test_one_point_has_a_panel_for_each_measure_and_corruption():
    figure = shift_curves(shift_table(), title="t")
    panels = np.reshape(figure.axes, (4, 2))
    assert [ax.get_ylabel().split(",")[0] for ax in panels[:, 0]] == ["accuracy", "drop", "drop", "depth"]
    assert [ax.get_xlabel() for ax in panels[-1]] == ["contrast left (share), falling", "blur (pixels)"]
    assert [text.get_text() for text in panels[-1, 1].get_xticklabels()] == ["0", "1", "2.5"]
    a, b = heights_of(panels[1, 0])
    np.testing.assert_allclose(a, 100 * (0.5 / 3 + np.arange(3) / 20))
    np.testing.assert_allclose(b, 100 * (0.5 + np.arange(3) / 20))
    np.testing.assert_allclose(heights_of(panels[3, 1])[1], 100 * (0.9 + np.arange(3, 6) / 20))
    with_bars = [container.lines[2][0].get_segments()[0] for container in panels[1, 0].containers]
    np.testing.assert_allclose(with_bars[0][:, 1], 100 * (0.5 / 3 + np.array([-0.02, 0.03])))
    assert not with_bars[1].size  # one seed has no interval over seeds
    band = panels[1, 0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], 100 * (0.5 / 3 + np.array([-0.04, 0.1 + 0.05])))


def test_all_points_are_on_one_scale():
    figure = shift_points(shift_table(), measure="best_depth")
    panels = np.reshape(figure.axes, (2, 2))
    assert [ax.get_ylabel() for ax in panels[:, 0]] == ["ln_1", "mlp_act"]
    assert len({ax.get_ylim() for ax in panels.flat}) == 1
    np.testing.assert_allclose(heights_of(panels[1, 0])[1], 100 * (0.9 + np.arange(3) / 20))


def test_no_figure():
    table = shift_table()
    with pytest.raises(ValueError, match="the table lacks drop_low"):
        shift_curves(table.drop(columns="drop_low"))
    with pytest.raises(ValueError, match="the table has no point 'ln_2'; it has ln_1, mlp_act"):
        shift_curves(table, point="ln_2")
    with pytest.raises(ValueError, match="measure 'loss'; expected one of height, drop, "):
        shift_points(table, measure="loss")
    with pytest.raises(ValueError, match=r"b: levels \[1.0, 0.4\]; expected \[1.0, 0.4, 0.2\]"):
        shift_curves(table[(table.family == "a") | (table.level != 0.2)])
