"""Nats over depth and one image through depth, against tables by hand."""

import numpy as np
import pandas as pd
import pytest

from igpt_lab.figures import STYLES, lens_curve, lens_strip
from tables import layer_table, lens_table, strip_table


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_nats_and_accuracy_share_their_layers():
    marks = pd.DataFrame({"baseline": ["ln V", "unigram"], "nats": [6.0, 4.5]})
    figure = lens_curve(lens_table(), layer_table(), marks=marks, title="t")
    nats, accuracy = figure.axes
    drawn = lines(nats)
    np.testing.assert_allclose(drawn["logit"].get_xydata(), [[0, 5], [1, 4], [2, 3]])
    np.testing.assert_allclose(drawn["tuned"].get_ydata(), [4, 3, 2])
    assert set(drawn["ln V: 6.00"].get_ydata()) == {6} and set(drawn["unigram: 4.50"].get_ydata()) == {4.5}
    assert set(drawn["layer 2: 3.00"].get_ydata()) == {3}
    band = nats.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2.8, 5.2))
    drawn = lines(accuracy)
    np.testing.assert_allclose(drawn["class, linear probe"].get_xydata(), [[0, 50], [1, 80], [2, 70]])
    assert drawn["chosen layer"].get_xydata().tolist() == [[1, 80]] and nats.get_xlim() == accuracy.get_xlim()
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["logit", "tuned"]
    assert nats.texts[0].get_text().startswith("400 images") and nats.get_title(loc="left") == "t"
    assert len(lens_curve(lens_table()).axes) == 1


@pytest.mark.parametrize("style", STYLES)
def test_the_legend_is_inside_the_figure_and_covers_no_axes(style):
    marks = pd.DataFrame({"baseline": ["ln V", "unigram", "previous pixel"], "nats": [6.0, 4.5, 2]})
    figure = lens_curve(lens_table(), layer_table(), marks=marks, style=style)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.axes[1].get_tightbbox().y0 + 1


def test_a_strip_has_a_row_for_each_layer_shown():
    figure = lens_strip(strip_table(), layers=[7, 2])
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["layer 7", "layer 2"]
    assert images[0].tolist() == [[[210, 50 * x, 0] for x in range(3)]] * 2 and images[2][0, 0].tolist() == [60, 0, 0]
    assert images[1].tolist() == [[1] * 3] * 2 and images[3].tolist() == [[6] * 3] * 2
    assert images[4].tolist() == [[[255, 100 * y, 9]] * 3 for y in range(2)]
    assert images[5].tolist() == [[0, 1, 2], [3, 4, 5]]
    shown = [ax.get_ylabel() for ax in lens_strip(strip_table()).axes if ax.get_ylabel().startswith("layer")]
    assert shown == [f"layer {layer}" for layer in (0, 1, 3, 4, 6, 7)]


def test_what_a_strip_lacks_is_named():
    with pytest.raises(ValueError, match=r"layer 9 is not in the table; it has \[0, 1"):
        lens_strip(strip_table(), layers=[9])
    with pytest.raises(ValueError, match="its model has no palette"):
        lens_strip(strip_table().assign(red=np.nan))
    with pytest.raises(ValueError, match="the table lacks settled"):
        lens_strip(strip_table().drop(columns="settled"))
    with pytest.raises(ValueError, match="the table lacks nats; it has baseline"):
        lens_curve(lens_table(), marks=pd.DataFrame({"baseline": ["a"]}))
