"""Features as researchers have them, and layers with names: the same numbers as of arrays and of layers 0, 1, 2."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import igpt_lab as lab
from igpt_lab.core.depth import in_depth
from igpt_lab.core.display import span

QUIET = {"progress": False}
NAMES = ("stem", "body", "a last norm")  # no order of the alphabet


def planted(n, seed):
    """Three classes, which layer 1 shows best."""
    generator, labels = np.random.default_rng(seed), np.arange(n) % 3
    shown = {layer: strength * np.eye(3, 5)[labels] for layer, strength in enumerate((0.3, 3.0, 1.0))}
    layers = {layer: (x + generator.normal(size=(n, 5))).astype(np.float32) for layer, x in shown.items()}
    return lab.Features(layers, labels, np.arange(1000, 1000 + n))


TRAIN, TEST = planted(240, 0), planted(180, 1)
NUMBERS = np.random.default_rng(2).normal(size=240) + np.arange(240) % 3


def named(features):
    return lab.Features(dict(zip(NAMES, features.layers.values(), strict=True)), features.labels, features.index)


def as_numbers(table):
    """A table of named layers with their places."""
    columns = [name for name in ("layer", "other_layer") if name in table]
    return table.assign(**{name: table[name].map(NAMES.index) for name in columns})


@pytest.fixture(scope="module")
def results():
    """Of layers 0, 1, 2, and of the same with names."""
    return [lab.probe_layers(*pair, folds=3, **QUIET) for pair in ((TRAIN, TEST), (named(TRAIN), named(TEST)))]


# What features are made of


def test_tensors_lists_floats_and_words_are_the_same_features():
    plain = lab.Features({0: np.eye(4, dtype=np.float32)}, np.array([0, 1, 1, 0]), np.arange(4))
    others = [
        lab.Features({np.int64(0): torch.eye(4)}, torch.tensor([0, 1, 1, 0])),
        lab.Features({0: torch.eye(4, dtype=torch.bfloat16, requires_grad=True)}, torch.tensor([0.0, 1.0, 1.0, 0.0])),
        lab.Features({0: np.eye(4).tolist()}, [False, True, True, False]),
        lab.Features({0: torch.eye(4)}, pd.Series([0.0, 1.0, 1.0, 0.0]), index=torch.arange(4)),
    ]
    for other in others:
        assert list(other.layers) == [0] and other.names == ()
        np.testing.assert_array_equal(other.layers[0], plain.layers[0])
        np.testing.assert_array_equal(other.labels, plain.labels)
        np.testing.assert_array_equal(other.index, plain.index)
        assert other.labels.dtype == np.int64
    words = lab.Features({0: torch.eye(4)}, ["dog", "cat", "cat", "dog"])
    assert words.names == ("cat", "dog") and words.labels.tolist() == [1, 0, 0, 1]
    with_names = lab.Features({0: torch.eye(4)}, ["dog", "cat", "cat", "dog"], names=["eel", "dog", "cat"])
    assert with_names.labels.tolist() == [1, 2, 2, 1]
    assert words.relabelled(np.array(["a", "b", "b", "b"])).names == ("a", "b")
    named = words.relabelled(np.array([1, 0, 0, 0]), names=["low", "high"])
    assert (named.names, named.labels.tolist()) == (("low", "high"), [1, 0, 0, 0])
    with pytest.raises(ValueError, match="the label 2 is not a class"):
        words.relabelled([0, 1, 2, 0], names=["low", "high"])


def test_words_of_train_and_test_are_matched_by_name():
    x = np.repeat(np.eye(3, dtype=np.float32), 8, axis=0)
    train = lab.Features({"only": x}, np.repeat(["cat", "dog", "eel"], 8))
    test = lab.Features({"only": x[8:] + 1e-3}, np.repeat(["dog", "eel"], 8))  # numbered 0, 1 there
    assert lab.probe_layers(train, test, folds=2, **QUIET).table.test_accuracy.tolist() == [1.0]


@pytest.mark.parametrize(
    ("labels", "layers", "words"),
    [
        ([0.0, 0.5], {0: np.eye(2)}, "the label 0.5 is no class; expected whole numbers from 0, or words"),
        ([0.0, np.nan], {0: np.eye(2)}, "1 rows without one"),
        (["a", "b"], {0: np.eye(2), "b": np.eye(2)}, "layers 0, 'b'; expected numbers for all, or names for all"),
        ([0, 1], {1.5: np.eye(2)}, "layer 1.5 is a float; expected a whole number or a name"),
        ([0, 1], {"x": np.eye(3)}, r"layer x is \(3, 3\) for 2 labels"),
        (["a", None], {0: np.eye(2)}, "1 rows without one"),
        (["a", np.nan], {0: np.eye(2)}, "1 rows without one"),
        (np.eye(2), {0: np.eye(2)}, r"labels of shape \(2, 2\); expected \(N,\)"),
        (1, {0: np.eye(2)}, r"labels of shape \(\)"),
        ([0, 1], {0: np.ones((2, 0))}, r"layer 0 is \(2, 0\), float64; expected real numbers, one feature or more"),
        ([0, 1], {0: [["a"], ["b"]]}, "layer 0 is .*; expected real numbers"),
        ([0, 1], {0: np.eye(2) * 1j}, "layer 0 is .* complex128; expected real numbers"),
        ([0, 1], {0: torch.ones(2, 2, device="meta")}, r"a tensor \(2, 2\) on the meta device holds no values"),
        (
            [0, 1],
            {"x": np.full((2, 2), np.inf)},
            "layer x has values that are not finite in 2 of 2 rows; leave out these rows",
        ),
    ],
)
def test_what_is_no_class_or_layer_is_refused(labels, layers, words):
    with pytest.raises(ValueError, match=words):
        lab.Features(layers, labels)
    with pytest.raises(TypeError, match="layers of type ndarray; expected a dict from numbers or names"):
        lab.Features(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="the label 'cow' is not among names; expected one of cat, dog"):
        lab.Features({0: np.eye(2)}, ["cat", "cow"], names=("cat", "dog"))


# Layers with names


def test_the_probe_of_named_layers_is_that_of_numbers(results):
    plain, with_names = results
    pd.testing.assert_frame_equal(as_numbers(with_names.table), plain.table)
    assert with_names.chosen == NAMES[plain.chosen] == with_names.choice.layer
    facts, ours = (lab.compare_layers(result).to_dict() for result in results)
    assert ours.pop("chosen_layer") == NAMES[facts.pop("chosen_layer")]
    assert ours.pop("last_layer") == NAMES[facts.pop("last_layer")]
    assert ours == facts
    of_plain = lab.layer_table(plain.correct, chosen=1)
    pd.testing.assert_frame_equal(as_numbers(lab.layer_table(with_names.correct, chosen="body")), of_plain)
    assert "chosen layer body of stem, body, a last norm" in repr(with_names) and "<svg" in with_names._repr_html_()
    with pytest.raises(ValueError, match="layer bdy is not among these features"):
        lab.compare_layers(with_names, layer="bdy")


def test_every_probe_and_measure_of_named_layers_is_that_of_numbers(results):
    sides = [(TRAIN, TEST), (named(TRAIN), named(TEST))]
    runs = {
        "neighbours": lambda train, test, _: lab.probe_neighbours(train, test, ks=[3], folds=2, **QUIET).table,
        "svm": lambda train, test, _: lab.probe_svm(train, test, Cs=[1.0], gammas=[1.0], folds=2, **QUIET).table,
        "few": lambda train, test, _: lab.probe_few_labels(train, test, ks=[2, 8], draws=2, **QUIET).table,
        "permuted": lambda train, test, result: lab.probe_permuted(train, test, result, permutations=2, **QUIET),
        "selectivity": lambda train, test, result: lab.selectivity(result, result),
        "measures": lambda train, test, _: lab.measure_layers(test, labels=test.labels, **QUIET),
        "cka": lambda train, test, _: lab.cka(test, **QUIET),
        "imbalance": lambda train, test, _: lab.information_imbalance(test, **QUIET),
        "targets": lambda train, test, _: lab.probe_targets(train, test, NUMBERS[:240], NUMBERS[:180], **QUIET).table,
    }
    for name, run in runs.items():
        plain, with_names = (run(*side, result) for side, result in zip(sides, results, strict=True))
        pd.testing.assert_frame_equal(as_numbers(with_names), plain, check_dtype=False, obj=name)
    drops = [lab.compare_drops(result, [result]).to_dict() for result in results]
    assert drops[1]["control_layers"] == [NAMES[layer] for layer in drops[0]["control_layers"]]
    assert drops[1]["drop"] == drops[0]["drop"]
    joined = [TRAIN.joined([2, 0]), sides[1][0].joined(["a last norm", "stem"])]
    assert list(joined[0].layers) == [2] and list(joined[1].layers) == ["a last norm"]
    np.testing.assert_array_equal(joined[0].layers[2], joined[1].layers["a last norm"])


def test_the_order_is_that_of_numbers_or_of_names_as_they_come():
    assert in_depth([10, 9, 2]) == [2, 9, 10]
    assert in_depth({"layer10": 0, "layer9": 0}) == ["layer10", "layer9"]
    assert span(["b", "a"]) == "b, a" and span(list("cdefab")) == "c, d, ..., b"


# Figures


def test_figures_of_names_are_those_of_numbers_with_names_on_the_axis(results, tmp_path):
    """Places of lines and marks are the same; ticks are the names."""
    plain, with_names = (lab.figures.layer_curve(result.table) for result in results)
    for a, b in zip(plain.get_lines(), with_names.get_lines(), strict=True):
        np.testing.assert_allclose(a.get_xydata(), b.get_xydata())
    assert [tick.get_text() for tick in with_names.get_xticklabels()] == list(NAMES)
    assert any(text.get_text().startswith("layer body: ") for text in with_names.texts)
    near = results[1].table.assign(validation_accuracy=[0.1, 0.9, 0.895])
    near = pd.concat([near, near.iloc[[0, 0]].assign(layer=["head", "end"])], ignore_index=True)
    note = lab.figures.layer_curve(near.assign(n_validation=1000)).texts
    assert "within one standard error: body, a last norm" in [text.get_text() for text in note]
    titled = lab.figures.layer_curve(results[1].table.assign(model="ViT"))
    labels = [ax.get_legend_handles_labels()[1][0] for ax in (plain, with_names, titled)]
    assert labels == [f"{name}, 95 % interval" for name in ("model", "model", "ViT")]
    files = lab.figures.save_figure(
        with_names, tmp_path / "a", data=results[1].table, record=lab.RunRecord("c", seed=0)
    )
    before = {file.name: file.read_bytes() for file in files}
    assert {file.name: file.read_bytes() for file in lab.figures.redraw(tmp_path / "a.json")} == before


@pytest.mark.parametrize("style", ["paper", "wide", "talk"])
def test_long_names_have_room_and_the_legend_covers_none(results, style):
    table = results[1].table
    long = {name: f"encoder.layers.{place}.output" for place, name in enumerate(NAMES)}
    ax = lab.figures.layer_curve(table.assign(layer=table.layer.map(long)), style=style)
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert ax.get_legend().get_window_extent().y1 < min(box.y0 for box in boxes)


def test_other_figures_take_names(results):
    test = named(TEST)
    few = lab.probe_few_labels(named(TRAIN), test, ks=[2, 8], draws=2, **QUIET)
    labels = lab.figures.few_label_curve(few.table).get_legend_handles_labels()[1]
    assert labels == ["chosen layer", "layer stem", "layer a last norm"]
    panels = lab.figures.geometry_curves(lab.measure_layers(test, **QUIET)).axes
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == list(NAMES)
    panels = lab.figures.selectivity(lab.selectivity(results[1], results[1])).axes
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == list(NAMES)
    table = lab.probe_targets(named(TRAIN), test, {"number": NUMBERS}, {"number": NUMBERS[:180]}, **QUIET).table
    ax = lab.figures.target_curves(table)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(NAMES)
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), list(enumerate(table.test_r2)))
    ax = lab.figures.cka_map(lab.cka(test, **QUIET))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(NAMES)
    np.testing.assert_array_equal(
        ax.images[0].get_array(), lab.figures.cka_map(lab.cka(TEST, **QUIET)).images[0].get_array()
    )
    plt.close("all")


def test_controls_stand_by_the_names_of_the_model_or_have_no_depth(results):
    table = results[1].table
    pixels = table[:1].assign(control="raw pixels", layer=0, chosen=False)
    untrained = table.assign(control="random network", chosen=False).iloc[::-1]
    ax = lab.figures.layer_curve(pd.concat([table, untrained, pixels], ignore_index=True))
    drawn = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(drawn["random network"].get_xdata(), [0, 1, 2])
    assert len(set(drawn["raw pixels"].get_ydata())) == 1
    with pytest.raises(ValueError, match="random network has the layer 'other', and the model has"):
        lab.figures.layer_curve(pd.concat([table, untrained.replace({"layer": {"stem": "other"}})]))


def test_an_encoder_stands_beside_another_network_by_relative_depth(results):
    first, second = (result.table for result in results)
    other = second[second.layer != "body"].assign(chosen=[False, True])
    table = pd.concat([first.assign(model="ImageGPT"), other.assign(model="an encoder")], ignore_index=True)
    pixels = table.iloc[:1].assign(control="raw pixels", test_accuracy=0.4)
    ax = lab.figures.layer_curve(pd.concat([table, pixels, pixels.assign(model="an encoder")], ignore_index=True))
    drawn = {line.get_label().partition(":")[0]: line for line in ax.get_lines()}
    y = 100 * first.test_accuracy.to_numpy()
    np.testing.assert_allclose(drawn["ImageGPT"].get_xydata(), np.stack([[0, 0.5, 1], y], axis=1))
    np.testing.assert_allclose(drawn["an encoder"].get_xydata(), np.stack([[0, 1], y[[0, 2]]], axis=1))
    assert any("an encoder: layer a last norm" in line.get_label() for line in ax.get_lines())
    np.testing.assert_allclose(drawn["raw pixels"].get_ydata(), 40)
    ax = lab.figures.layer_curve(pd.concat([table, pixels, pixels.assign(model="an encoder", test_accuracy=0.5)]))
    levels = {line.get_label(): line.get_ydata()[0] for line in ax.get_lines() if "raw pixels" in line.get_label()}
    assert levels == {"raw pixels, ImageGPT": 40, "raw pixels, an encoder": 50}
    with pytest.raises(ValueError, match="comparison= is of one network"):
        lab.figures.layer_curve(table, comparison=lab.compare_layers(results[0]).to_dict())
    compared = lab.figures.model_comparison(table)
    assert [tick.get_text() for tick in compared.get_yticklabels()] == ["ImageGPT", "an encoder"]
