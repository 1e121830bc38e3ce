"""Controls in figures: draws as a range, a line at chance, a cut axis, and selectivity, against tables by hand."""

import numpy as np
import pandas as pd
import pytest

from igpt_lab.core.display import MODEL
from igpt_lab.figures import STYLES, layer_curve, redraw, save_figure, selectivity
from tables import RECORD, drawn_table, layer_table, selectivity_table


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def heights(ax, values):
    """Where values in % are on the axis, from 0 at its lower end to 1 at its upper."""
    places = ax.transData.transform([(0, value) for value in values])
    return ax.transAxes.inverted().transform(places)[:, 1]


def test_several_draws_are_a_mean_with_their_range():
    ax = layer_curve(drawn_table())
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["random network, 2 draws"].get_xydata(), [[0, 55], [1, 55], [2, 55]])
    np.testing.assert_allclose(drawn["permuted labels, 3 draws"].get_ydata(), [22, 22, 22])
    bands = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert {(round(band.min(), 9), round(band.max(), 9)) for band in bands} >= {(50, 60), (20, 24)}
    np.testing.assert_allclose(drawn["model, 95 % interval"].get_ydata(), [50, 80, 70])


def test_chance_is_a_line_and_needs_no_words():
    ax = layer_curve(drawn_table())
    assert set(lines(ax)["chance"].get_ydata()) == {25} and ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] < 20 and not any("permuted" in text.get_text() for text in ax.texts)
    without = layer_curve(drawn_table().drop(columns="n_classes"))
    nothing = layer_curve(drawn_table().assign(n_classes=np.nan))
    assert "chance" not in lines(without) | lines(nothing) and "chance" not in lines(layer_curve(layer_table()))


def test_an_axis_that_chance_lies_far_below_is_cut():
    table = drawn_table()
    table.loc[table.control != "permuted labels", ["test_accuracy", "low", "high"]] *= 0.1
    table.loc[table.control != "permuted labels", ["test_accuracy", "low", "high"]] += 0.85
    ax = layer_curve(table)
    assert ax.get_yscale() == "function" and not any("permuted" in text.get_text() for text in ax.texts)
    np.testing.assert_allclose(lines(ax)["permuted labels, 3 draws"].get_ydata(), [22, 22, 22])
    low, at_chance, high, *ours = heights(ax, [20, 25, 24, 90, 93])
    assert 0 < low < high < at_chance < 0.2 and 0.26 < ours[0] < ours[1] < 1
    ax.figure.draw_without_rendering()
    ticks = [tick.get_text() for tick in ax.get_yticklabels()]
    assert "25" in ticks and "90" in ticks and "50" not in ticks
    bottom = heights(ax, [90, 91, 92, 93])
    np.testing.assert_allclose(np.diff(bottom), np.diff(bottom)[0])  # above the cut one point is as high as another


@pytest.mark.parametrize("style", STYLES)
def test_the_legend_of_several_draws_is_inside_the_figure(style):
    table = drawn_table().assign(in_peak_set=lambda table: table.control == MODEL)
    ax = layer_curve(table, style=style)
    ax.figure.draw_without_rendering()
    legend = ax.get_legend()
    boxes = [part.get_window_extent() for part in (*legend.get_texts(), *legend.get_lines())]
    assert all(ax.figure.bbox.x0 <= box.x0 and box.x1 <= ax.figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("base", [0, 0.19])
def test_draws_and_chance_are_drawn_again_to_the_byte(tmp_path, base):
    files = save_figure(layer_curve(drawn_table(base)), tmp_path / "a", data=drawn_table(base), record=RECORD)
    again = redraw(files[-1], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


def test_selectivity_has_three_panels_of_one_scale():
    panels = selectivity(selectivity_table(), title="t").axes
    assert [ax.get_ylabel() for ax in panels] == ["accuracy (%)", "control task (%)", "selectivity (points)"]
    drawn = [ax.get_lines()[0].get_ydata() for ax in panels]
    np.testing.assert_allclose(drawn, [[50, 80, 70], [30, 30, 30], [20, 50, 40]])
    rings = [ax.get_lines()[1].get_xydata()[0] for ax in panels]
    np.testing.assert_allclose(rings, [[1, 80], [1, 30], [1, 50]])
    bands = [ax.collections[0].get_paths()[0].vertices[:, 1] for ax in panels]
    np.testing.assert_allclose([(band.min(), band.max()) for band in bands], [[49, 81], [28, 33], [18, 53]])
    assert np.ptp([np.diff(ax.get_ylim()) for ax in panels]) == pytest.approx(0)
    assert panels[0].get_title(loc="left") == "t" and panels[0].texts[0].get_text().startswith("100 test images")
    with pytest.raises(ValueError, match="the table lacks selectivity_low"):
        selectivity(selectivity_table().drop(columns="selectivity_low"))


def published_table():
    """Three layers of one source, and a level with its deviation of another; both far from the model's 50 to 80 %."""
    rows = [("a notebook", layer, value, np.nan) for layer, value in enumerate((0.3, 0.4, 0.35))]
    return pd.DataFrame([*rows, ("a paper", np.nan, 0.9, 0.02)], columns=["source", "layer", "value", "std"])


def test_published_values_are_drawn_beside_the_curve_and_in_view():
    ax = layer_curve(layer_table(), published=published_table())
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["published: a notebook"].get_xydata(), [[0, 30], [1, 40], [2, 35]])
    assert set(drawn["published: a paper"].get_ydata()) == {90}
    bands = [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in ax.patches]
    assert any(np.allclose(band, (88, 92)) for band in bands)
    assert ax.get_ylim()[0] < 30 and ax.get_ylim()[1] > 92
    colours = {drawn[name].get_color() for name in ("published: a notebook", "published: a paper")}
    assert len(colours) == 2 and drawn["model, 95 % interval"].get_color() not in colours
    two = pd.concat([published_table()] * 2).query("layer.isna()")
    assert [text.get_text() for text in layer_curve(layer_table(), published=two).get_legend().get_texts()].count(
        "published: a paper"
    ) == 1


def test_published_values_are_drawn_again_to_the_byte(tmp_path):
    figure = layer_curve(layer_table(), published=published_table())
    files = save_figure(figure, tmp_path / "a", data=layer_table(), record=RECORD)
    again = redraw(files[-1], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": 3}, "published value 0.3 at layer 3; expected fractions from 0 to 1, at layers 0 to 2"),
        ({"value": 96.3}, "published value 96.3 at layer 0"),
    ],
)
def test_published_values_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        layer_curve(layer_table(), published=published_table()[:1].assign(**change))
    with pytest.raises(ValueError, match="lacks value; it has source, layer"):
        layer_curve(layer_table(), published=published_table()[["source", "layer"]])
