"""What every figure takes by keyword, and figures as parts of somebody else's."""

import inspect
import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.legend import Legend
from test_style import IMAGES, drawings, few_table

import igpt_lab.figures as figures
from igpt_lab.core.display import MODEL
from igpt_lab.probing.few_labels import FewLabelResult
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.targets import TargetResult
from igpt_lab.training.classifier import Classified
from tables import RECORD, bits_table, cka_table, layer_table, seed_table

WITH_AX = [name for name, function in figures.FIGURES.items() if "ax" in inspect.signature(function).parameters]


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def named(ax):
    """Lines by the names of their networks."""
    return {line.get_label().partition(":")[0]: line for line in ax.get_lines()}


def test_every_figure_of_one_axes_takes_one():
    annotations = {name: inspect.signature(function).return_annotation for name, function in figures.FIGURES.items()}
    assert {name for name, kind in annotations.items() if kind is matplotlib.axes.Axes} == set(WITH_AX)
    assert len(WITH_AX) > 15


@pytest.mark.parametrize("name", WITH_AX)
def test_in_two_panels_nothing_but_their_data_and_labels_changes(name):
    arguments, options, _ = drawings()[name]
    with plt.rc_context({"font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
        places = [ax.get_position(original=True).bounds for ax in (left, right)]
        before = dict(matplotlib.rcParams)
        assert figures.FIGURES[name](*arguments, **options, ax=left) is left
        assert dict(matplotlib.rcParams) == before
    assert figure.axes == [left, right] and not figure.legends and tuple(figure.get_size_inches()) == (7, 3)
    assert [ax.get_position(original=True).bounds for ax in (left, right)] == places
    if "gallery" not in name and name not in ("offset_maps", "attention_from"):  # pictures have no axes
        assert all(spine.get_visible() for spine in left.spines.values())
    assert not right.has_data() and right.get_xlim() == (0, 1) and left.has_data()
    plt.close(figure)


def test_two_calls_share_limits_and_the_user_s_letters():
    figure, ax = plt.subplots()
    low = layer_table().query("control == @MODEL")
    figures.layer_curve(low, ax=ax)
    first = ax.get_ylim()
    high = low.assign(layer=2 * low.layer, test_accuracy=low.test_accuracy + 0.15, low=0.9, high=0.96)
    figures.layer_curve(high, ax=ax)
    assert ax.get_ylim()[0] == first[0] and ax.get_ylim()[1] > 96 and ax.get_xlim() == (-0.5, 4.5)
    assert ax.xaxis.label.get_fontsize() == matplotlib.rcParams["font.size"] == 10
    assert figures.layer_curve(low, ax=ax, style="talk").get_legend().get_texts()[0].get_fontsize() == 12
    plt.close(figure)


def test_settings_of_the_user_hold_and_are_drawn_again_elsewhere(tmp_path):
    with plt.rc_context({"axes.grid": True, "font.size": 11, "axes.facecolor": "#eeeeee"}):
        ax = figures.layer_curve(layer_table())
    assert ax.xaxis.label.get_fontsize() == 11 and to_rgb(ax.get_facecolor()) == to_rgb("#eeeeee")
    assert ax.xaxis.get_gridlines()[0].get_visible()
    files = figures.save_figure(ax, tmp_path / "a", data=layer_table(), record=RECORD)
    settings = json.loads(files[-1].read_text())["drawing"]["settings"]
    assert settings == {"axes.facecolor": "#eeeeee", "axes.grid": True, "font.size": 11.0}
    again = figures.redraw(files[-1], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]
    with plt.rc_context({"font.size": 20}):  # a figure that is drawn again is as it was
        again = figures.redraw(files[-1], tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


def test_a_file_of_a_stranger_runs_and_reads_nothing_by_its_style(tmp_path):
    (*_, file) = figures.save_figure(
        figures.layer_curve(layer_table()), tmp_path / "a", data=layer_table(), record=RECORD
    )
    facts = json.loads(file.read_text())
    for change, words in (
        ({"style": "/etc/passwd"}, "its style is '/etc/passwd'; expected one of paper"),
        ({"settings": {"axes.prop_cycle": "cycler(x=[1])"}}, "its settings have 'axes.prop_cycle'"),
        ({"settings": {"backend": "tkagg"}}, "its settings have 'backend'"),
    ):
        file.write_text(json.dumps(facts | {"drawing": facts["drawing"] | change}))
        with pytest.raises(ValueError, match=words):
            figures.redraw(file)


def test_a_style_is_a_name_a_dict_or_a_file(tmp_path):
    (tmp_path / "own.mplstyle").write_text("font.size: 9\naxes.labelcolor: 112233\n")
    for style in ({"font.size": 9, "axes.labelcolor": "#112233"}, tmp_path / "own.mplstyle"):
        ax = figures.layer_curve(layer_table(), style=style)
        assert ax.xaxis.label.get_fontsize() == 9 and to_rgb(ax.xaxis.label.get_color()) == to_rgb("#112233")
        assert ax.figure.get_size_inches()[0] == figures.STYLES["paper"].width
    grey = figures.layer_curve(layer_table(), style="ggplot")
    assert to_rgb(grey.get_facecolor()) == to_rgb("#E5E5E5")
    with pytest.raises(ValueError, match="style has 'font.sise', which is none of rcParams; did you mean 'font.size'?"):
        figures.layer_curve(layer_table(), style={"font.sise": 9})


def test_labels_are_the_words_of_names_and_of_anything_else_in_the_figure():
    labels = {MODEL: "ViT", "raw pixels": "Rohpixel", "layer": "Schicht", "a name in another figure": "x"}
    ax = figures.layer_curve(layer_table(), labels=labels)
    assert {"ViT, 95 % interval", "Rohpixel", "random network"} <= set(lines(ax)) and ax.get_xlabel() == "Schicht"
    with pytest.raises(ValueError, match="labels has 'raw pixel', which is not in the figure; did you mean 'raw pixel"):
        figures.layer_curve(layer_table(), labels={"raw pixel": "x"})
    assert "model, 95% CI" in lines(figures.layer_curve(layer_table(), labels={"interval": "95% CI"}))


def test_a_palette_is_colours_by_name_in_a_row_or_a_colormap():
    def colours(**options):
        drawn = lines(figures.layer_curve(layer_table(), **options))
        return [to_rgb(drawn[name].get_color()) for name in ("model, 95 % interval", "raw pixels", "random network")]

    meant = [to_rgb(figures.LINE_STYLES[name]["color"]) for name in (MODEL, "raw pixels", "random network")]
    assert colours() == meant
    assert colours(palette={"raw pixels": "red", MODEL: "k"}) == [(0, 0, 0), (1, 0, 0), meant[2]]
    assert len(set(colours(palette=["red", "lime", "blue", "k"]))) == 3
    assert colours(palette=["red"]) == [(1, 0, 0)] * 3
    tab = [to_rgb(colour) for colour in matplotlib.colormaps["tab10"].colors]
    assert colours(palette="tab10")[0] == tab[0] and set(colours(palette="tab10")) <= set(tab)
    assert figures.cka_map(cka_table(), palette="cividis").images[0].get_cmap().name == "cividis"
    with pytest.raises(ValueError, match="palette has 'rad', which is no colour"):
        colours(palette=["rad"])
    with pytest.raises(ValueError, match="palette='tab11'; no colormap has this name"):
        colours(palette="tab11")


def test_size_limits_and_legend():
    ax = figures.bits_curve(bits_table(), figsize=(5, 2.5), xlim=(0, 1), ylim=(-1, 9), legend="upper left")
    assert tuple(ax.figure.get_size_inches()) == (5, 2.5) and (ax.get_xlim(), ax.get_ylim()) == ((0, 1), (-1, 9))
    ax.figure.draw_without_rendering()
    legend, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert axes.x0 <= legend.x0 and legend.y1 <= axes.y1 and legend.y0 > axes.y0 - 5
    assert not figures.seed_curves(seed_table(), legend=False).findobj(Legend)
    assert tuple(figures.gallery(IMAGES, figsize=(2, 1)).figure.get_size_inches()) == (2, 1)
    with pytest.raises(ValueError, match="xlim=3; expected two numbers"):
        figures.bits_curve(bits_table(), xlim=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"figsize": (0, 3)}, r"figsize=\(0, 3\); expected two numbers above 0, in inches"),
        ({"figsize": (np.nan, 2)}, r"figsize=\(nan, 2\); expected"),
        ({"figsize": ("a", 2)}, "figsize=.*; expected two numbers above 0"),
        ({"xlim": ("a", "b")}, r"xlim=\('a', 'b'\); expected two numbers"),
        ({"ylim": (0, np.inf)}, r"ylim=\(0, inf\); expected two numbers"),
        ({"legend": "uper left"}, "legend='uper left'; .*did you mean 'upper left'"),
        ({"legend": ""}, "legend=''; expected one of best, upper right"),
        ({"legend": (0.5, "a")}, "legend=.*; expected True, False, a place by its name, or two numbers"),
        ({"palette": []}, r"palette=\[\]; expected colours by name, a list of one or more, or the name of a colormap"),
        ({"palette": 3}, "palette of type int; expected colours by name"),
        ({"palette": matplotlib.colormaps["viridis"]}, "palette of type ListedColormap; expected"),
        ({"palette": "red"}, "no colormap has this name; a colour goes in a list or a dict"),
        ({"style": None}, "there is no style 'None'; expected one of paper, wide, talk"),
        ({"style": 1}, "there is no style '1'; expected one of paper, wide, talk"),
        ({"style": {"font.size": 0}}, "font.size=0.0 in style; expected points above 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_a_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        figures.layer_curve(layer_table(), **options)
    assert "\n" not in str(error.value)


def test_options_are_arrays_too_and_a_figure_may_be_tiny(tmp_path):
    ax = figures.layer_curve(layer_table(), figsize=np.array([0.3, 0.3]), xlim=np.array([0, 1]), legend=np.bool_(False))
    assert tuple(ax.figure.get_size_inches()) == (0.3, 0.3) and ax.get_xlim() == (0, 1) and ax.get_legend() is None
    ax = figures.layer_curve(layer_table(), palette=np.eye(3), title=3)
    assert ax.get_title(loc="left") == "3" and lines(ax)["model, 95 % interval"].get_color() == [1, 0, 0]
    (tmp_path / "odd.mplstyle").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no mplstyle file"):
        figures.layer_curve(layer_table(), style=tmp_path / "odd.mplstyle")


def test_what_is_no_plain_axes_is_refused_untouched():
    figure, panels = plt.subplots(1, 2)
    for ax, words in ((panels, "ax of type ndarray; expected one Axes"), (figure, "ax of type Figure"), ("a", "str")):
        with pytest.raises(TypeError, match=words):
            figures.layer_curve(layer_table(), ax=ax)
    for projection in ("3d", "polar"):
        ax = plt.figure().add_subplot(projection=projection)
        with pytest.raises(ValueError, match=f"ax is {projection}; expected Axes with x and y alone"):
            figures.layer_curve(layer_table(), ax=ax)
        assert not ax.has_data()
    panels[0].remove()
    with pytest.raises(ValueError, match="ax was removed from its figure"):
        figures.layer_curve(layer_table(), ax=panels[0])
    plt.close("all")


def test_a_misspelt_argument_gets_the_closest():
    with pytest.raises(TypeError, match="layer_curve has no argument 'pallete'.*did you mean 'palette'?"):
        figures.layer_curve(layer_table(), pallete="tab10")


def test_what_has_a_table_stands_for_it_and_can_be_saved(tmp_path):
    class Result:
        table = layer_table()

    ax = figures.layer_curve(Result())
    np.testing.assert_allclose(lines(ax)["model, 95 % interval"].get_ydata(), [50, 80, 70])
    files = figures.save_figure(ax, tmp_path / "a", data=Result.table, record=RECORD)
    assert figures.redraw(files[-1], tmp_path / "b")[0].read_bytes() == files[0].read_bytes()


def test_results_plot_themselves():
    figure, ax = plt.subplots()
    assert ProbeResult(layer_table(), {}, 1).plot(ax=ax, title="t") is ax and ax.get_title(loc="left") == "t"
    assert "chosen layer" in lines(FewLabelResult(few_table(), {}, []).plot(style="wide"))
    classified = Classified(np.eye(2, dtype=np.float32), ("a", "b"), np.array([0, 1]), np.arange(2))
    np.testing.assert_array_equal(classified.plot().images[0].get_array(), np.eye(2))
    measured = pd.DataFrame(
        {"target": "ink", "control": "model", "layer": [0, 1], "test_r2": [0.2, 0.6], "low": 0.1, "high": 0.7}
    ).assign(chosen=[False, True], n_test=30)
    assert list(TargetResult(measured, {}, {"ink": 1}).plot().get_lines()[0].get_ydata()) == [0.2, 0.6]
    plt.close(figure)


def test_several_networks_have_their_own_names_and_colours(tmp_path):
    deep = pd.concat([layer_table().query("control == @MODEL"), layer_table().tail(1)])
    deep.loc[:, "layer"] *= 2
    names = [f"network {i}" for i in range(7)]
    networks = {name: deep if i else layer_table() for i, name in enumerate(names)}
    ax = figures.layer_curves(networks, relative=True)
    drawn = named(ax)
    np.testing.assert_allclose(drawn["network 0"].get_xydata(), [[0, 50], [0.5, 80], [1, 70]])
    np.testing.assert_allclose(drawn["network 3"].get_xydata(), drawn["network 0"].get_xydata())
    looks = {(drawn[name].get_color(), drawn[name].get_linestyle(), drawn[name].get_marker()) for name in names[:5]}
    assert len(looks) == 5 and drawn[names[5]].get_color() == drawn[names[0]].get_color()  # the palette goes round
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"network 0: layer 1, 80.0 %", "network 6: layer 2, 80.0 %", "chosen on validation"} <= set(legend)
    np.testing.assert_allclose(named(figures.layer_curves(networks))["network 1"].get_xdata(), [0, 2, 4])
    table = pd.concat([rows.assign(model=name) for name, rows in networks.items()])
    one = figures.layer_curves(table)
    np.testing.assert_allclose(named(one)["network 6"].get_xdata(), [0, 2, 4])
    files = figures.save_figure(one, tmp_path / "a", data=table, record=RECORD)
    assert figures.redraw(files[-1], tmp_path / "b")[0].read_bytes() == files[0].read_bytes()
    with pytest.raises(ValueError, match="there is no network"):
        figures.layer_curves({})


def test_networks_whose_layers_have_names_are_drawn_in_the_order_of_their_rows():
    words = layer_table().query("control == @MODEL").assign(layer=["stem", "body", "head"])
    ax = figures.layer_curves({"a": layer_table(), "b": words}, controls=layer_table())
    np.testing.assert_allclose(named(ax)["b"].get_xydata(), [[0, 50], [1, 80], [2, 70]])
    assert {"raw pixels", "random network", "permuted labels"} <= set(lines(ax)) and "model" not in lines(ax)
