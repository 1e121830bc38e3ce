"""Figures of attention: every cell where and in the colour it should be, what comes later hatched, all in vectors."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from igpt_lab.figures import attention_depth, attention_from, offset_maps, save_figure
from igpt_lab.figures.attention import COLOURS, PREDICTED, STEPS
from tables import RECORD, attention_tables


def cells(ax, colour) -> set[tuple[int, int]]:
    """Upper left corners, rounded, of the rectangles filled with a colour."""
    paths = [patch.get_path() for patch in ax.patches if patch.get_facecolor() == to_rgba(colour)]
    return {tuple(np.floor(corner + 0.5).astype(int)) for path in paths for corner in path.vertices[::5]}


def one_map(table):
    return table[(table.layer == 0) & (table["head"] == 0)]


def test_offsets_stand_around_the_predicted_pixel_in_the_colour_of_their_share():
    table = one_map(attention_tables()["offset_maps"])
    ax = offset_maps(table)
    ((x, y),) = cells(ax, PREDICTED)
    for step in range(COLOURS.N):
        rows = table[table.share.between(STEPS[step], STEPS[step + 1], inclusive="left")]
        assert cells(ax, COLOURS(step)) == {(x + dx, y + dy) for dx, dy in zip(rows.dx, rows.dy, strict=True)}
    faint = offset_maps(table.assign(share=0.0009))
    assert not any(cells(faint, COLOURS(step)) for step in range(COLOURS.N))
    assert cells(offset_maps(table.assign(share=1.0)), COLOURS(COLOURS.N - 1))  # the end of the scale is on it


def test_all_maps_are_there_once_and_labelled():
    tables = attention_tables(layers=10, heads=2)
    for plot in (offset_maps, attention_from):
        ax = plot(tables[plot.__name__])
        assert [text.get_text() for text in ax.texts[:10]] == [f"layer {layer}" for layer in range(10)]
        assert len(cells(ax, PREDICTED)) == 20
        with pytest.raises(ValueError, match="more than one row for the same layer, head"):
            plot(tables[plot.__name__].iloc[[0, 0]])


def test_from_one_pixel_what_comes_later_is_hatched_and_the_start_token_stands_above():
    table = one_map(attention_tables()["attention_from"])
    ax = attention_from(table)
    ((x, y),) = cells(ax, PREDICTED)  # row 1, column 2
    seen = {(x + column - 2, y + row - 1) for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]}
    assert cells(ax, COLOURS(4)) == seen  # 0.15 each
    assert cells(ax, COLOURS(3)) == {(x - 2, y - 3)}  # the start token's 0.05, with a cell between
    hatched = [patch.get_path().get_extents().bounds for patch in ax.patches if patch.get_hatch()]
    sizes = [(round(width), round(height)) for _, _, width, height in hatched]
    assert sizes == [(1, 1), (4, 2)]  # the rest of row 1, and rows 2 and 3
    with pytest.raises(ValueError, match="no weight is NaN"):
        attention_from(table.dropna())


def test_heads_stand_beside_uniform_attention():
    table = attention_tables()["attention_depth"]
    panels = attention_depth(table).axes
    assert [ax.get_ylabel() for ax in panels] == ["distance (pixels)", "entropy (nats)"]
    for ax, name in zip(panels, ("distance", "entropy"), strict=True):
        dots, means, uniform = ax.lines
        np.testing.assert_allclose(dots.get_ydata(), table[name])
        np.testing.assert_allclose(means.get_ydata(), table.groupby("layer")[name].mean())
        assert set(uniform.get_ydata()) == {3.0}
        assert (np.abs(dots.get_xdata() - table.layer) < 0.5).all()
    with pytest.raises(ValueError, match="the table lacks entropy_uniform"):
        attention_depth(table.drop(columns="entropy_uniform"))


@pytest.mark.parametrize("plot", [offset_maps, attention_from, attention_depth])
def test_all_is_vectors(plot, tmp_path):
    table = attention_tables()[plot.__name__]
    _, pdf, svg, *_ = save_figure(plot(table), tmp_path / "a", data=table, record=RECORD)
    assert "<image" not in svg.read_text() and b"/Subtype /Image" not in pdf.read_bytes()
