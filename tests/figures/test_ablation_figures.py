"""What parts left out and windows cost, in figures, against tables by hand."""

import numpy as np
import pandas as pd
import pytest

from igpt_lab.figures import (
    bits_curve,
    head_map,
    leave_out_curve,
    lens_curve,
    lens_strip,
    redraw,
    save_figure,
    window_curve,
)
from tables import RECORD, bits_table, leave_out_table, lens_table, strip_table, window_table


def lines_of(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines if not line.get_label().startswith("_")}


def test_parts_over_depth_in_nats_and_points():
    nats, lost = leave_out_curve(leave_out_table(), title="t").axes
    assert (nats.get_ylabel(), lost.get_ylabel()) == (
        "nats lost a pixel\n(log scale above 0.01)",
        "accuracy lost\n(points)",
    )
    assert nats.get_yscale() == "symlog"
    assert list(lines_of(nats)) == ["block", "attention", "MLP"]
    assert lines_of(nats)["block"] == [[0, 2.5], [1, 0.02], [2, -0.003]]
    assert lines_of(lost)["MLP"] == [[0, 30], [1, 2], [2, 0]]
    assert lines_of(lost)["layer of the probe"] == [[2, 0], [2, 1]]
    (alone,) = leave_out_curve(leave_out_table(accuracy=False).query("part != 'mlp'")).axes
    assert list(lines_of(alone)) == ["block", "attention"]


def test_heads_are_a_map():
    ax = head_map(leave_out_table(), title="t")
    np.testing.assert_allclose(ax.images[0].get_array(), [[2.5, 0.02, -0.003], [1.25, 0.01, -0.0015]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "head")


def test_windows_over_radius():
    nats, lost = window_curve(window_table(), title="t").axes
    assert list(lines_of(nats)) == ["blocks 0 to 1", "block 2"]
    np.testing.assert_allclose(lines_of(nats)["blocks 0 to 1"], [[0, 2], [1, 0.5], [3, 0.125]])
    np.testing.assert_allclose(lines_of(lost)["block 2"], [[0, 20 / 3], [1, 5 / 3], [3, 5 / 12]])


@pytest.mark.parametrize("draw", [leave_out_curve, head_map])
def test_a_table_read_back_from_its_file_is_drawn_the_same(draw, tmp_path):
    made = save_figure(draw(leave_out_table()), tmp_path / "a", data=leave_out_table(), record=RECORD)
    again = redraw(made[-1], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]


def test_no_figure():
    table = leave_out_table()
    with pytest.raises(ValueError, match="the table lacks nats_change"):
        leave_out_curve(table.drop(columns="nats_change"))
    with pytest.raises(ValueError, match="heads are for `head_map`"):
        leave_out_curve(table.query("part == 'head'"))
    with pytest.raises(ValueError, match="the table has no part head; it has block"):
        head_map(table.query("part == 'block'"))
    with pytest.raises(ValueError, match="9 ranges of blocks; expected at most 5"):
        many = [window_table().query("first == 0").assign(first=first, last=9) for first in range(9)]
        window_curve(pd.concat(many))


@pytest.mark.parametrize(
    ("draw", "table", "words"),
    [
        (leave_out_curve, leave_out_table().query("part != 'head'"), "part and layer"),
        (head_map, leave_out_table(), "layer and head"),
        (window_curve, window_table(), "first, last and radius"),
        (bits_curve, bits_table(), "layer and target"),
        (lens_curve, lens_table(), "layer and kind"),
        (lens_strip, strip_table(), "layer, row and column"),
    ],
)
def test_two_rows_for_one_point_are_no_line(draw, table, words):
    """As of two kinds or two models in one table."""
    with pytest.raises(ValueError, match=f"more than one row for the same {words}; expected one"):
        draw(pd.concat([table, table.tail(1)]))
