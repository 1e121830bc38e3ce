"""What is drawn is what the table says, and the same input gives the same bytes in any process."""

import hashlib
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from igpt_lab.core.display import MODEL
from igpt_lab.figures import (
    DYNAMICS_COLUMNS,
    LETTER,
    STRIP,
    cka_map,
    completion_gallery,
    confusion_matrix,
    few_label_curve,
    fine_tuning,
    gallery,
    geometry_curves,
    layer_curve,
    model_comparison,
    neighbour_gallery,
    protocol_curves,
    row_gallery,
    save_figure,
    seed_curves,
    surprise_gallery,
    training_dynamics,
)
from tables import RECORD, cka_table, geometry_table, layer_table, protocol_tables, seed_table, stopped_table


def words(ax):
    return [text.get_text() for text in ax.texts]


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_layer_curve_draws_the_table_in_percent():
    comparison = {"chosen_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.004}
    with pytest.raises(
        TypeError, match=r"comparison is a list; expected a dict, such as compare_layers\(...\).to_dict"
    ):
        layer_curve(layer_table(), comparison=list(comparison))
    ax = layer_curve(layer_table(), title="t", comparison=comparison | {"n_test": 100})
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["model, 95 % interval"].get_xydata(), [[0, 50], [1, 80], [2, 70]])
    np.testing.assert_allclose(drawn["random network"].get_xydata(), [[0, 45], [1, 45], [2, 45]])
    np.testing.assert_allclose(drawn["raw pixels"].get_ydata(), 60)
    np.testing.assert_allclose(drawn["chosen on validation"].get_xydata(), [[1, 80]])
    np.testing.assert_allclose(drawn["not converged"].get_xydata(), [[2, 70]])
    assert ax.get_title(loc="left") == "t"
    sentence = "chosen layer 1 against last layer 2: +10.0 points [2.0, 18.0],\np = 0.004 (McNemar, 100 test images)"
    assert sentence in words(ax)


def test_the_subtitle_has_both_intervals_and_says_that_a_choice_is_poor():
    comparison = {"chosen_layer": 1, "last_layer": 2, "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.004}
    older = {"best_layer" if name == "chosen_layer" else name: value for name, value in comparison.items()}
    assert words(layer_curve(layer_table(), comparison=older)) == words(
        layer_curve(layer_table(), comparison=comparison)
    )
    wide = comparison | {"choice_low": -0.03, "choice_high": 0.22}
    drop = (
        "chosen layer 1 against last layer 2: +10.0 points\n[2.0, 18.0] over test images, [-3.0, 22.0] with the choice"
    )
    test = "p = 0.004 (McNemar, 100 test images)"
    assert f"{drop},\n{test}" in words(layer_curve(layer_table(), comparison=wide))
    rows = [(MODEL, layer, 0.6, False, True, 0.59, 0.61, 100) for layer in (3, 4)]
    table = pd.concat([layer_table(), pd.DataFrame(rows, columns=layer_table().columns)], ignore_index=True)
    table = table.assign(validation_accuracy=table.test_accuracy, n_validation=10_000)
    table.loc[2, "validation_accuracy"] = 0.797  # the standard error of 0.8 on 10,000 images is 0.004
    assert f"{drop},\n{test};\nwithin one standard error: 1, 2" in words(layer_curve(table, comparison=wide))
    poor = [text for text in words(layer_curve(table.assign(n_validation=90))) if "a poor choice" in text]
    assert len(poor) == 1 and "4.2 points on 90" in " ".join(poor[0].split())  # sqrt(0.8 * 0.2 / 90)


def test_layers_that_may_be_the_best_have_a_bar_below():
    table = layer_table()
    rows = [(MODEL, layer, 0.8, False, True, 0.79, 0.81, 100) for layer in (3, 4)]
    table = pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)
    table["in_peak_set"] = [
        layer in (1, 3, 4) if control == MODEL else None for control, layer in table.iloc[:, :2].values
    ]
    bars = [line for line in layer_curve(table).get_lines() if line.get_linewidth() == 3]
    assert [bar.get_label() for bar in bars] == ["may be the best layer", "_"]
    np.testing.assert_allclose([bar.get_xydata() for bar in bars], [[[0.6, 0], [1.4, 0]], [[2.6, 0], [4.4, 0]]])
    none = lines(layer_curve(table.assign(in_peak_set=False)))
    assert "may be the best layer" not in none and none.keys() == lines(layer_curve(layer_table())).keys()


def test_a_control_far_below_is_drawn_and_not_replaced_by_words():
    table = layer_table()
    table.loc[table.control == MODEL, ["test_accuracy", "low", "high"]] *= [0.1, 0.1, 0.1]
    table.loc[table.control == MODEL, ["test_accuracy", "low", "high"]] += [0.8, 0.8, 0.8]
    ax = layer_curve(table)
    assert set(lines(ax)["permuted labels"].get_ydata()) == {5} and ax.get_ylim()[0] < 5
    assert not any("permuted" in text for text in words(ax))


def test_few_label_curve_has_means_and_deviations():
    rows = [(MODEL, k, d, rule, layer, 0.1 * k + 0.02 * d) for k in (1, 4) for d in range(3)
            for rule, layer in (("chosen", 5), ("fixed", 0))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["control", "k", "draw", "layer_rule", "layer", "test_accuracy"])
    table["converged"] = True
    ax = few_label_curve(table)
    drawn = lines(ax)
    assert {"chosen layer", "layer 0"} <= set(drawn)
    np.testing.assert_allclose(drawn["chosen layer"].get_ydata().astype(float), [12, 42])
    _, _, (bars,) = ax.containers[0]
    lower, upper = bars.get_segments()[0][:, 1]
    assert (upper - lower) / 2 == pytest.approx(2)  # standard deviation of 10, 12, 14
    assert words(ax) == ["mean of 3 draws, which are the dots;\nbars: standard deviation over draws"]
    ax = few_label_curve(table.assign(low_all=0.1 * table.k, high_all=0.1 * table.k + 0.05))
    _, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[10, 15], [40, 45]])
    assert words(ax) == [
        "mean of 3 draws, which are the dots;\nbars: 95 % interval over draws and test images together"
    ]


def test_cka_map_has_the_first_layer_below_and_the_other_to_the_right():
    ax = cka_map(cka_table().sample(frac=1, random_state=0), title="t", names=("ours", "theirs"))
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), [[1, 0.4], [0.69, 0.7], [0.39, 1]])
    assert image.origin == "lower" and image.get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "3", "6"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "6"]
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title(loc="left")) == ("ours", "theirs", "t")
    assert words(ax) == ["unbiased, 1,000 images in 4 minibatches"]


def test_geometry_curves_draw_what_is_measured():
    dimension, rank, overlap = geometry_curves(geometry_table(), title="t").axes
    np.testing.assert_allclose(lines(dimension)["model"].get_xydata(), [[0, 5], [1, 6], [2, 7]])
    np.testing.assert_allclose(lines(rank)["random network"].get_xydata(), [[0, 30], [1, 30], [2, 30]])
    np.testing.assert_allclose(lines(overlap)["model"].get_ydata(), [50, 60, 70])
    np.testing.assert_allclose(lines(overlap)["raw pixels"].get_ydata(), 75)
    assert [len(ax.collections) for ax in (dimension, rank, overlap)] == [2, 0, 2]  # bands, where there are intervals
    ends = overlap.collections[0].get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((40, 80))
    assert dimension.get_title(loc="left") == "t" and words(dimension) == ["1,000 images; bands: 95 % over images"]
    assert overlap.get_xlabel() == "layer" and overlap.get_legend() and not rank.get_legend()
    assert len(geometry_curves(geometry_table().assign(label_overlap=np.nan)).axes) == 2


def test_protocol_curves_draw_every_setting_in_its_panel():
    table, effects = protocol_tables()
    first, *panels, below = protocol_curves(table, effects, title="t").axes
    np.testing.assert_allclose(first.get_lines()[0].get_xydata(), [[0, 50], [1, 60], [2, 70]])
    titles = [ax.get_title(loc="left") for ax in (first, *panels)]
    assert titles[0] == "default: sos, ln_1, standardised, converged"
    assert titles[1:] == ["sos, ln_1", "sos, resid_pre", "raw, ln_1", "raw, resid_pre"]
    changes = lines(panels[1])["standardised, 100 iterations"].get_xydata()  # 55, 65, 75 minus the default's 50, 60, 70
    np.testing.assert_allclose(changes, [[0, 5], [1, 5], [2, 5]])
    np.testing.assert_allclose(lines(panels[3])["recipe of transformers"].get_ydata(), [16, 16, 16])
    assert all("recipe of transformers" not in lines(ax) for ax in panels[:3])
    assert "standardised, converged" not in lines(panels[0]) and "standardised, converged" in lines(panels[1])
    drawn = [line for line in panels[0].get_lines() if len(line.get_xdata()) == 3]
    assert [line.get_markerfacecolor() == "white" for line in drawn] == [1, 0, 1]
    rings = [line.get_xydata()[0].tolist() for line in panels[0].get_lines() if line.get_markersize() == 6]
    np.testing.assert_allclose(rings, [[1, 1], [1, 2], [1, 3]])
    assert [label.get_text() for label in below.get_yticklabels()] == [
        "sos minus raw", "ours minus transformers", "point \u00d7 scaling"
    ]  # fmt: skip
    bars = {bar.get_label(): bar.lines[0].get_xdata().tolist() for bar in below.containers[:3]}
    assert bars == {"chosen layer": [0], "last layer": [1], "drop": [2]}
    assert [0, 2] in [list(line.get_xdata()) for line in below.get_lines() if len(line.get_xdata()) == 2]
    ends = below.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(ends[:, 0], [-1, 2])


def test_a_stopped_solver_is_drawn_as_its_spread_beside_the_optimum():
    below = protocol_curves(*protocol_tables(), stopped_table()).axes[-1]
    assert [label.get_text() for label in below.get_yticklabels()] == [
        "ln_1, standardised, layer 1",
        "resid_pre, unscaled, layer 2",
    ]
    ranges = [segment[:, 0].tolist() for segment in below.collections[0].get_segments()]
    np.testing.assert_allclose(ranges, [[79, 80], [60, 70]])
    np.testing.assert_allclose(lines(below)["converged"].get_xdata(), [80, 75])


def test_a_table_of_an_older_version_is_drawn_with_its_stopped_solver():
    table, effects = protocol_tables()
    old = table.assign(recipe=table.recipe.replace({"transformers": "port"}))
    axes = protocol_curves(old, effects).axes
    assert "standardised, 100 iterations" in lines(axes[1]) and "recipe of transformers" in lines(axes[4])


def test_gallery_by_hand():
    images = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    canvas = gallery(images, columns=2, scale=1).images[0].get_array()
    assert canvas.shape == (5, 5, 3)
    w = 255
    assert canvas[..., 0].tolist() == [
        [0, 0, w, 1, 1], [0, 0, w, 1, 1], [w, w, w, w, w], [2, 2, w, w, w], [2, 2, w, w, w],
    ]  # fmt: skip


def test_completions_stand_between_the_masked_prime_and_the_original():
    primes = np.full((2, 4, 4, 3), 10, np.uint8)
    completions = np.full((2, 3, 4, 4, 3), 20, np.uint8)
    canvas = completion_gallery(primes, completions, primes + 20, prime_rows=2).images[0].get_array()
    scale, strip = 28, STRIP  # 112 screen pixels an image
    assert canvas.shape == (strip + 9 * scale, (5 * 5 - 1) * scale, 3)
    pixels = canvas[strip::scale, ::scale, 0]
    assert pixels[0:2, :4].tolist() == [[10] * 4] * 2 and set(pixels[2:4, :4].ravel().tolist()) == {160, 215}
    assert pixels[0, ::5].tolist() == [10, 20, 20, 20, 30] and primes.max() == 10


def inside(ax):
    """Whether every text lies inside the figure, and none over another."""
    figure = ax.get_figure()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    apart = all(not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    return apart and all(figure.bbox.containsx(b.x0) and figure.bbox.containsx(b.x1) for b in boxes)


def test_a_contact_sheet_of_thousands_is_one_array():
    images = np.arange(5000 * 4, dtype=np.uint32).astype(np.uint8).reshape(5000, 2, 2)
    ax = gallery(images, columns=100, scale=1)
    assert len(ax.get_figure().axes) == 1 and len(ax.images) == 1
    canvas = ax.images[0].get_array()[..., 0]
    assert canvas.shape == (50 * 3 - 1, 100 * 3 - 1)
    np.testing.assert_array_equal(canvas[3 * 49 : 3 * 49 + 2, 3 * 99 :], images[4999])


def test_rows_stand_beside_their_labels():
    images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1).repeat(2, 2).repeat(2, 3)
    ax = row_gallery(images, labels=["temperature 0.8", "1"], scale=20)
    canvas, margin = ax.images[0].get_array(), LETTER * 16
    assert canvas[:, :margin].min() == 255 and canvas[0, margin :: 3 * 20, 0].tolist() == [0, 1, 2]
    assert canvas[-1, margin :: 3 * 20, 0].tolist() == [3, 4, 5]
    assert words(ax) == ["temperature 0.8", "1"] and inside(ax)
    with pytest.raises(ValueError, match="expected a list of 2 strings"):
        row_gallery(images, labels=["one"])


def test_neighbours_stand_beside_their_samples():
    samples = np.arange(5, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    ax = neighbour_gallery(samples, {"pixels": samples + 10, "features": samples + 20}, columns=2)
    scale = 28  # 112 pixels an image
    pixels = ax.images[0].get_array()[STRIP::scale, ::scale, 0]
    assert pixels[0, ::5].tolist()[:3] == [0, 10, 20] and pixels[0, 16::5].tolist() == [1, 11, 21]
    assert pixels[5, ::5].tolist()[:3] == [2, 12, 22] and pixels[0, 4] == pixels[0, 15] == pixels[4, 0] == 255
    assert words(ax) == ["sample", "pixels", "features"] * 2 and inside(ax)
    with pytest.raises(ValueError, match="expected the shape of the samples"):
        neighbour_gallery(samples, {"pixels": samples[1:]})


def test_surprise_lies_under_its_image():
    images = np.arange(3, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    bits = np.zeros((3, 2, 2))
    bits[0, 0, 1], bits[2] = 8, 4
    ax = surprise_gallery(images, bits, columns=2, scale=20, largest=4)
    pixels = ax.images[0].get_array()[::20, ::20]
    assert pixels[0, 0, 0] == 0 and pixels[0, 3, 0] == 1 and pixels[6, 0, 0] == 2  # images in rows 0 and 6
    dark, light = (255 * np.array(matplotlib.colormaps["inferno"](end))[:3] for end in (0.0, 1.0))
    np.testing.assert_allclose(pixels[3:5, :2], [[dark, light], [dark, dark]], atol=1)
    np.testing.assert_allclose(pixels[9, 0], light, atol=1)
    assert (pixels[6:, 3:5] == 255).all()  # no fourth image
    assert words(ax) == ["4 bits", "0"] and inside(ax)
    assert words(surprise_gallery(images, bits, scale=20))[0] == "8 bits"
    with pytest.raises(ValueError, match=r"bits \(2, 2, 2\); expected \(3, 2, 2\)"):
        surprise_gallery(images, bits[1:])


SAVE = """
import sys; sys.path.insert(0, {tests!r})
from tables import RECORD, layer_table
from igpt_lab.figures import layer_curve, save_figure
save_figure(layer_curve(layer_table(), title="t"), {stem!r}, data=layer_table(), record=RECORD)
assert "torch" not in sys.modules
"""


def test_same_bytes_in_any_process(tmp_path, request):
    digests = []
    for seed in ("1", "2"):
        stem = tmp_path / seed / "curve"
        code = SAVE.format(tests=str(request.path.parents[1]), stem=str(stem))
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "TZ": "Asia/Tokyo" if seed == "1" else "UTC"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=request.config.rootpath)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in stem.parent.iterdir()})
    assert digests[0] == digests[1] and set(digests[0]) == {f"curve.{s}" for s in ("png", "pdf", "svg", "csv", "json")}


def test_saving_twice_and_showing_gives_the_same(tmp_path):
    ax = layer_curve(layer_table())
    shown = ax.figure._repr_mimebundle_()
    first = [path.read_bytes() for path in save_figure(ax, tmp_path / "a.b", data=layer_table(), record=RECORD)]
    second = [path.read_bytes() for path in save_figure(ax, tmp_path / "c", data=layer_table(), record=RECORD)]
    assert first == second and ax.figure._repr_mimebundle_() == shown
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["a.b.csv", "a.b.json"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "c.csv", keep_default_na=False), layer_table())
    made = json.loads((tmp_path / "c.json").read_text())
    assert made["csv_sha256"] == hashlib.sha256((tmp_path / "c.csv").read_bytes()).hexdigest()
    assert made["config"] == {"a": 1}


@pytest.mark.parametrize(
    "draw, table",
    [
        (cka_map, cka_table), (geometry_curves, geometry_table),
        (lambda table: protocol_curves(table, protocol_tables()[1]), lambda: protocol_tables()[0]),
    ],
)  # fmt: skip
def test_drawing_twice_gives_the_same_bytes(tmp_path, draw, table):
    first, second = ([path.read_bytes() for path in save_figure(draw(table()), tmp_path / name, data=table(),
                                                                record=RECORD)] for name in "ab")  # fmt: skip
    assert first == second


def test_no_setting_is_left_changed(tmp_path):
    before = dict(matplotlib.rcParams)
    save_figure(layer_curve(layer_table()), tmp_path / "a", data=layer_table(), record=RECORD)
    cka_map(cka_table()), geometry_curves(geometry_table()), protocol_curves(*protocol_tables())
    assert dict(matplotlib.rcParams) == before


def test_bad_input():
    with pytest.raises(ValueError, match="the table lacks high"):
        layer_curve(layer_table().drop(columns="high"))
    with pytest.raises(ValueError, match="the table is empty"):
        few_label_curve(pd.DataFrame(columns="control k draw layer_rule layer test_accuracy converged".split()))
    with pytest.raises(ValueError, match="no row has control 'model'"):
        layer_curve(layer_table().query("control != @MODEL"))
    with pytest.raises(ValueError, match=r"float64 \(2, 3, 3, 3\); expected uint8"):
        gallery(np.zeros((2, 3, 3, 3)))
    with pytest.raises(ValueError, match="the table lacks cka"):
        cka_map(cka_table().drop(columns="cka"))
    with pytest.raises(ValueError, match="more than one row for the same pair"):
        cka_map(pd.concat([cka_table(), cka_table()]))
    with pytest.raises(ValueError, match="the table has none of intrinsic_dimension, effective_rank"):
        geometry_curves(geometry_table()[["control", "layer", "n"]])
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="expected the same S, H and W"):
        completion_gallery(images, images[None], images, prime_rows=2)


def test_confusion_matrix_counts_and_shades_by_row():
    names = pd.Index(["a", "b"], name="true")
    ax = confusion_matrix(pd.DataFrame([[3, 1], [0, 4]], names, ["a", "b"]))
    assert sorted(words(ax))[:3] == ["1", "3", "4"] and "87.5 % of 8 test images on the diagonal" in words(ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    with pytest.raises(ValueError, match="expected the same classes"):
        confusion_matrix(pd.DataFrame([[3, 1], [0, 4]], names, ["a", "c"]))


def test_fine_tuning_draws_means_of_draws_and_curves_before_and_after():
    rows = [("probe", "all", 0, 0.8), ("tuned", "all", 0, 0.9), ("tuned", "25", 0, 0.5), ("tuned", "25", 1, 0.7)]
    table = pd.DataFrame(rows, columns=["method", "labels", "draw", "test_accuracy"])
    table = table.assign(low=table.test_accuracy - 0.1, high=table.test_accuracy + 0.05)
    before = layer_table().query("control == @MODEL")
    curves = pd.concat([before, before.assign(control="x")])
    upper, lower = fine_tuning(table, curves, title="t").get_axes()
    all_labels, few = upper.containers
    np.testing.assert_allclose(all_labels.lines[0].get_xdata().astype(float), [80, 90])
    np.testing.assert_allclose(few.lines[0].get_xdata().astype(float), [60])  # the mean, over single draws
    ends = [segment[:, 0] for segment in all_labels.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[70, 85], [80, 95]])
    deviation = 10 * 2**0.5  # two draws, 50 and 70: their standard deviation, no interval over images
    np.testing.assert_allclose(few.lines[2][0].get_segments()[0][:, 0], [60 - deviation, 60 + deviation])
    drawn = lines(lower)
    np.testing.assert_allclose(drawn["before"].get_xydata(), [[0, 50], [1, 80], [2, 70]])
    np.testing.assert_allclose(drawn["x"].get_xydata(), drawn["before"].get_xydata())


def test_training_dynamics_shows_each_checkpoint_and_falls_to_the_right():
    rows = [("m", s, loss, 0.0, layer, a, a, a, layer == 1) for s, loss, base in ((0, 9, 1), (5, 2, 2), (10, 1, 4))
            for layer, a in ((0, base / 10), (1, base / 5))]  # fmt: skip
    table = pd.DataFrame(rows, columns=DYNAMICS_COLUMNS)
    over_loss, over_depth = training_dynamics(table).axes
    chosen, last = (container.lines[0].get_xydata().tolist() for container in over_loss.containers)
    assert chosen == last == [[2.0, 40.0], [1.0, 80.0]] and over_loss.xaxis_inverted()  # without step 0
    curves = {label: line.get_ydata().tolist() for label, line in lines(over_depth).items() if label.startswith("step")}
    assert curves == {"step 0": [10, 20], "step 5": [20, 40], "step 10": [40, 80]}


def test_training_dynamics_of_several_models_compares_them():
    columns = ["model", "step", "loss", "layer", "test_accuracy", "chosen"]
    rows = [("a", 1, 2.0, 0, 0.3, True), ("a", 1, 2.0, 1, 0.2, False), ("a", 2, 1.0, 0, 0.4, False)]
    rows += [("a", 2, 1.0, 1, 0.5, True), ("b", 9, np.nan, 0, 0.6, True)]  # b: of masked pixels, without this loss
    table = pd.DataFrame(rows, columns=columns)
    table = table.assign(low=table.test_accuracy, high=table.test_accuracy, loss_error=0.0)
    over_loss, over_depth = training_dynamics(table).axes
    a, b = (container.lines[0].get_xydata().tolist() for container in over_loss.containers)
    assert a == [[2.0, 30.0], [1.0, 50.0]] and b == []
    assert {name: lines(over_depth)[name].get_ydata().tolist() for name in "ab"} == {"a": [40, 50], "b": [60]}


def test_model_comparison_puts_chosen_layer_last_layer_and_controls_of_each_model_in_a_row():
    rows = [("a", MODEL, i, value, i == 1) for i, value in enumerate((0.3, 0.5, 0.4))] + [("a", "pixels", 0, 0.6, True)]
    rows += [("b", np.nan, 0, 0.7, True), ("b", np.nan, 1, 0.2, False)]  # as an older csv gives it back
    table = pd.DataFrame(rows, columns=["model", "control", "layer", "test_accuracy", "chosen"])
    ax = model_comparison(table.assign(low=table.test_accuracy - 0.1, high=table.test_accuracy + 0.05), title="t")
    chosen, last, pixels = (container.lines[0].get_xydata() for container in ax.containers)
    np.testing.assert_allclose([chosen[:, 0], last[:, 0]], [[50, 70], [40, 20]])
    assert pixels[:, 0].tolist() == [60] and np.array_equal(chosen[:, 1].round(), [0, 1])
    ends = [segment[:, 0] for segment in ax.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[40, 55], [60, 75]])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"] and ax.yaxis_inverted()


def test_seed_curves_have_a_thin_line_for_each_seed_and_both_intervals_beside_each_other():
    curves, depth, height, drop = seed_curves(seed_table(), title="t").get_axes()
    thin = [line.get_ydata() for line in curves.get_lines() if line.get_linewidth() < 1 and line.get_linestyle() == "-"]
    np.testing.assert_allclose(thin, [[30, 50, 44], [32, 56, 46], [28, 40, 47], [20, 60, 50]])
    np.testing.assert_allclose(lines(curves)["a"].get_xydata(), [[0, 30], [0.5, 146 / 3], [1, 137 / 3]])
    rings = [line.get_xydata() for line in curves.get_lines() if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(rings[0], [[0.5, 50], [0.5, 56], [1, 47]])
    dots = [ax.get_lines()[0].get_xdata() for ax in (depth, height, drop)]
    np.testing.assert_allclose(dots, [[50, 50, 100], [50, 56, 47], [6, 10, 0]], atol=1e-9)
    for ax, values in ((height, [50, 56, 47]), (drop, [6, 10, 0])):
        (bar,) = ax.containers  # of "a" alone: one seed, that of "b", has no interval over seeds
        ends = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        np.testing.assert_allclose(bar.lines[2][0].get_segments()[0][:, 0], ends)
    grey = [line.get_xdata() for line in height.get_lines() if line.get_color() == "#767676"]
    np.testing.assert_allclose(grey, [[48, 55], [57, 64]])
    assert [text.get_text() for text in depth.get_yticklabels()] == ["a", "b"] and depth.yaxis_inverted()


def test_seed_curves_of_different_layers_or_too_many_families_say_so():
    table = seed_table()
    with pytest.raises(ValueError, match="a: its seeds have different layers"):
        seed_curves(table[(table.seed_of_pretraining != 1) | (table.layer != 0)])
    many = pd.concat([table[table.family == "b"].assign(family=name) for name in "abcdef"])
    with pytest.raises(ValueError, match="6 families; expected at most 5"):
        seed_curves(many)
