"""The ablation's cells against features, probes and comparisons made by hand."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.core.significance import compare, holm
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.probing.ablation import FACTORS, OURS, TRANSFORMERS, UNSCALED
from igpt_lab.probing.effects import AT, average_difference, effects_of, sign_flip_p
from igpt_lab.probing.stopped import repeat_stopped, spread_of

SIZES = {"tr": 150, "te": 120}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Token sets of three classes, each a little fond of a colour of its own in a place of its own."""
    root, generator = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for split, n in SIZES.items():
        y = np.arange(n) % 3
        fond = (generator.random((n, 16)) < 0.5) & (np.arange(16) // 6 == y[:, None])
        np.save(root / f"shades_{split}X.npy", np.where(fond, 2 * y[:, None], generator.integers(8, size=(n, 16))))
        np.save(root / f"shades_{split}Y.npy", y)
    return [lab.load_images(root / "shades", split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return lab.load_model(tiny_folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def ablation(model, images, stores):
    return lab.ablate_protocol(model, *images, store=stores, progress=False)


@torch.no_grad()
def by_hand(model, tokens, alignment, point):
    """Layer -> mean over positions, float32 (N, D), from the states that the model itself returns."""
    ids = torch.as_tensor(tokens.encoded(16, 8).astype(np.int64))
    if alignment == "sos":
        ids = torch.cat([torch.full((len(ids), 1), 8), ids[:, :-1]], 1)
    blocks, ends = model.transformer.h, []
    hook = blocks[-1].register_forward_hook(lambda block, inputs, returned: ends.append(returned[0]))
    *states, last = model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    if point == "ln_1":
        states = [*(block.ln_1(state) for block, state in zip(blocks, states, strict=True)), last]
    else:
        states = [*states, last if point == "hidden states" else ends[0]]
    return {layer: state.mean(1).numpy() for layer, state in enumerate(states)}


def test_every_setting_has_every_layer(ablation):
    assert len(ablation.results) == 9 and set(ablation.results) > {OURS, TRANSFORMERS}
    # A stopped solver is in no setting.
    assert (ablation.table[ablation.table.recipe == ""].solver == "converged").all()
    assert len(ablation.table) == 9 * 4 and not ablation.table.duplicated(["recipe", *FACTORS, "layer"]).any()
    assert (ablation.table.groupby(["recipe", *FACTORS]).chosen.sum() == 1).all()
    assert ablation.keys["sos"]["alignment"] == "sos" and ablation.keys["raw"]["alignment"] == "raw"
    for setting, rows in ablation.table.groupby(list(FACTORS)):
        result = ablation.results[setting]
        np.testing.assert_array_equal(rows.test_accuracy, [result.correct[layer].mean() for layer in rows.layer])


@pytest.mark.parametrize("alignment", FACTORS["alignment"])
@pytest.mark.parametrize("point", FACTORS["point"])
def test_a_cell_is_probe_layers_by_hand(ablation, model, images, alignment, point):
    train, test = (
        lab.Features(by_hand(model, tokens, alignment, point), tokens.labels, tokens.index) for tokens in images
    )
    for scaling in FACTORS["scaling"]:
        expected = lab.probe_layers(train, test, folds=5, standardise=scaling == "standardised", progress=False)
        result = ablation.results[alignment, point, scaling]
        assert result.chosen == expected.chosen
        for layer in range(4):
            np.testing.assert_array_equal(result.correct[layer], expected.correct[layer])
        same = ["layer", "C", "validation_accuracy", "converged", "test_accuracy", "low", "high", "in_peak_set"]
        pd.testing.assert_frame_equal(result.table[same], expected.table[same])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_repeat_is_scikit_learn_by_hand_on_rows_in_another_order(ablation, model, images, stores):
    store = lab.extract(model, images, store=stores, points=FACTORS["point"], progress=False)
    (x, y), (tested, truth) = (
        (lab.StoredLayers(store, split, "ln_1")[3], tokens.labels)
        for split, tokens in zip(("train", "test"), images, strict=True)
    )
    rows = ablation.repeats[(ablation.repeats.point == "ln_1") & (ablation.repeats["at"] == "last layer")]
    assert set(rows.layer) == {3} and rows.C.iloc[0] == ablation.results[OURS].table.C.iloc[3]
    order = np.random.default_rng(2).permutation(len(y))
    scaler = StandardScaler().fit(x[order].astype(float))
    model = LogisticRegression(C=rows.C.iloc[0], max_iter=100).fit(scaler.transform(x[order].astype(float)), y[order])
    row = rows.set_index(["solver", "order", "dtype", "threads"]).loc["100 iterations", 2, "float64", 1]
    assert row.iterations == pytest.approx(model.n_iter_[0], rel=0.1, abs=2)
    assert row.test_accuracy == pytest.approx(model.score(scaler.transform(tested), truth), abs=1 / len(truth))
    at_optimum = rows[rows.solver == "converged"].test_accuracy
    assert np.ptp(at_optimum) <= 1 / len(truth)
    np.testing.assert_allclose(at_optimum, ablation.results[OURS].correct[3].mean(), atol=1 / len(truth))


def test_a_stopped_fit_depends_on_what_should_not_matter_and_the_optimum_does_not():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 30)).astype(np.float32) * np.geomspace(1e-2, 1e3, 30, dtype=np.float32)
    y = (x[:, 0] * 100 + generator.normal(size=400) > 0).astype(int)  # what tells the classes apart is the smallest
    train, test = (lab.Features({5: x[rows]}, y[rows], np.arange(200)) for rows in (slice(200), slice(200, 400)))
    repeats = repeat_stopped(train, test, 5, 1e3, standardise=False, progress=False)
    stopped, at_optimum = (repeats[repeats.solver == name] for name in ("100 iterations", "converged"))
    assert len(stopped) == 8 and len(at_optimum) == 6 and (stopped.iterations == 100).all()
    assert at_optimum.converged.all() and np.ptp(at_optimum.test_accuracy) == 0 < np.ptp(stopped.test_accuracy)


def test_the_spread_by_hand(ablation):
    names = [*FACTORS, "at", "layer", "C"]
    assert ablation.stopped[[*FACTORS, "at"]].apply(tuple, axis=1).tolist() == [
        (*setting, at) for setting in (OURS, UNSCALED) for at in AT[:2]
    ]
    table = pd.DataFrame({"a": "x", "b": 1, "solver": ["100 iterations"] * 3 + ["converged"] * 2})
    (row,) = spread_of(table.assign(test_accuracy=[0.1, 0.2, 0.6, 0.5, 0.5]), ["a", "b"]).itertuples()
    assert (row.min, row.max, row.repeats, row.converged) == (0.1, 0.6, 3, 0.5)
    assert row.sd == pytest.approx((0.14 / 2) ** 0.5)  # deviations -0.2, -0.1, 0.3
    assert ablation.stopped[names].equals(spread_of(ablation.repeats, names)[names])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_recipe_of_transformers_by_hand(ablation, model, images):
    train, test = (by_hand(model, tokens, "raw", "hidden states") for tokens in images)
    y, truth = (tokens.labels for tokens in images)
    scores = [LogisticRegression(max_iter=1000).fit(train[i], y).score(test[i], truth) for i in range(4)]
    port = ablation.table[ablation.table.recipe == "transformers"]
    assert port.test_accuracy.tolist() == pytest.approx(scores, abs=1 / len(truth)) and (port.C == 1).all()
    assert port.layer[port.chosen].item() == np.argmax(scores)  # picked on test, as published
    row = ablation.settings[ablation.settings.recipe == "transformers"].iloc[0]
    assert [row.test_accuracy, row.last_accuracy] == pytest.approx([max(scores), scores[-1]], abs=1 / len(truth))


def test_settings_and_effects_are_compare_by_hand(ablation):
    for row in ablation.settings[ablation.settings.recipe == ""].itertuples():
        result = ablation.results[tuple(getattr(row, name) for name in FACTORS)]
        by_validation = result.chosen
        assert result.table.validation_accuracy.max() == result.table.validation_accuracy[by_validation]
        expected = compare(result.correct[by_validation], result.correct[3])
        assert row.layer == by_validation
        assert (row.drop, row.drop_low, row.drop_p) == (expected.difference, expected.low, expected.p_value)
    row = ablation.effects.set_index(["factor", "others", "at"]).loc[("point", "raw, unscaled", "chosen layer"), :]
    a, b = (ablation.results["raw", point, "unscaled"] for point in ("ln_1", "resid_pre"))
    expected = compare(a.correct[a.chosen], b.correct[b.chosen])
    assert (row.a, row.b) == FACTORS["point"]
    assert (row.difference, row.low, row.high, row.p_value) == (
        expected.difference, expected.low, expected.high, expected.p_value,
    )  # fmt: skip
    row = ablation.effects.set_index(["factor", "at"]).loc["recipe", "last layer"]
    assert (
        row.difference
        == compare(ablation.results[OURS].correct[3], ablation.results[TRANSFORMERS].correct[3]).difference
    )


def test_one_change_at_a_time_is_from_our_setting(ablation):
    single = ablation.single()
    assert single.factor.tolist() == [name for name in FACTORS for _ in range(2)]
    for row in single[single["at"] == "last layer"].itertuples():
        other = tuple(row.b if name == row.factor else level for name, level in zip(FACTORS, OURS, strict=True))
        a, b = (ablation.results[setting].correct[3] for setting in (OURS, other))
        assert row.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)


def test_averages_are_over_the_four_pairs(ablation):
    effects = ablation.effects[ablation.effects.factor.isin(list(FACTORS))]
    for _, rows in effects.groupby(["factor", "at"]):
        whole, pairs = rows[rows.others == "average"].iloc[0], rows[rows.others != "average"]
        assert len(pairs) == (0 if whole["at"] == "drop" else 4)
        if len(pairs):
            assert whole.difference == pytest.approx(pairs.difference.mean(), abs=1e-12)
        assert whole.low <= whole.difference <= whole.high
    for _, rows in effects[effects.others == "average"].groupby("factor"):
        by_place = rows.set_index("at").difference
        assert by_place["drop"] == pytest.approx(by_place["chosen layer"] - by_place["last layer"], abs=1e-12)


def test_the_interval_of_an_average_is_the_bootstrap_over_images():
    generator = np.random.default_rng(3)
    right = generator.random((8, 2, 400)) < np.array([0.7, 0.6])[:, None]
    right[1:] = np.where(generator.random(400) < 0.8, right[0], right[1:])  # pairs mostly agree
    differences = right[:, 0].astype(float) - right[:, 1]
    average = average_difference(differences)
    of_images = np.append(differences.mean(0), [1, -1])  # and the two images that are added
    resampled = of_images[generator.integers(0, 402, (10_000, 402))].mean(1)
    np.testing.assert_allclose([average["low"], average["high"]], np.quantile(resampled, [0.025, 0.975]), atol=0.004)
    one, alone = average_difference(differences[:1]), compare(right[0, 0], right[0, 1])
    assert one["difference"] == pytest.approx(alone.difference)
    np.testing.assert_allclose([one["low"], one["high"]], [alone.low, alone.high], atol=0.006)
    assert average["high"] - average["low"] < one["high"] - one["low"]


def test_p_of_an_average_counts_all_signs():
    sums = np.array([3, -1, 2, 2, 0, 1])
    signs = np.array(list(itertools.product([1, -1], repeat=len(sums))))
    assert sign_flip_p(sums) == pytest.approx((np.abs(signs @ sums) >= 7).mean())
    assert sign_flip_p(np.zeros(5)) == 1
    generator = np.random.default_rng(5)
    a, b = generator.random((2, 300)) < np.array([[0.7], [0.6]])
    one = average_difference((a.astype(int) - b)[None])
    assert one["p_value"] == pytest.approx(compare(a, b).p_value)  # McNemar's
    assert average_difference(np.stack([a.astype(int) - b] * 4))["p_value"] == pytest.approx(one["p_value"])


FACTORS_BY_HAND = {"f": ("f1", "f2"), "g": ("g1", "g2"), "h": ("h1", "h2")}
SETTINGS_BY_HAND = list(itertools.product(*FACTORS_BY_HAND.values()))


def test_an_interaction_by_hand():
    """10 images. Both first levels of f and g get 6 to 9 right as h says, all others none."""
    right = {setting: np.zeros(10, bool) for setting in SETTINGS_BY_HAND}
    right["f1", "g1", "h1"][:6], right["f1", "g1", "h2"][:9] = True, True
    correct = {setting: {AT[0]: row, AT[1]: np.zeros(10, bool)} for setting, row in right.items()}
    effects = effects_of(correct, FACTORS_BY_HAND, SETTINGS_BY_HAND[-1])
    interactions = effects[effects.factor == "interaction"].set_index(["a", "b", "at"])
    by_place = interactions.xs("chosen layer", level="at").difference
    assert by_place.to_dict() == {  # f's gain beside g1: 0.6 and 0.9, beside g2: 0
        ("f", "g"): pytest.approx(0.75), ("f", "h"): pytest.approx(-0.15), ("g", "h"): pytest.approx(-0.15),
    }  # fmt: skip
    assert (interactions.xs("last layer", level="at").difference == 0).all()
    # 3 images add -1, in one of two contexts each: all signs equal, 2 of 8.
    row = interactions.loc["f", "h", "chosen layer"]
    assert row.p_value == pytest.approx(0.25) and row.low < -0.15 < row.high
    assert interactions.loc["f", "g", "drop"].difference == pytest.approx(0.75)


def test_where_choices_add_up_no_interaction_is_left():
    """Each choice decides images of its own, so that what it gains does not depend on the others."""
    correct = {}
    for setting in SETTINGS_BY_HAND:
        first = np.array([level.endswith("1") for level in setting])
        correct[setting] = {at: np.repeat(first, [20, 30, 50]) for at in AT[:2]}
    effects = effects_of(correct, FACTORS_BY_HAND, SETTINGS_BY_HAND[-1])
    interactions = effects[effects.factor == "interaction"]
    assert len(interactions) == 9 and (interactions.difference == 0).all() and (interactions.p_value == 1).all()
    assert (interactions.low < 0).all() and (interactions.high > 0).all()
    averages = effects[(effects.others == "average") & (effects["at"] == "last layer")]
    np.testing.assert_allclose(averages.difference, [0.2, 0.3, 0.5])


def test_p_is_corrected_within_its_family(ablation):
    effects = ablation.effects
    interactions, averages = effects[effects.factor == "interaction"], effects[effects.others == "average"]
    pairs = effects[effects.factor.isin(list(FACTORS)) & (effects.others != "average")]
    for family, size in ((interactions, 9), (averages, 9), (effects[effects.factor == "recipe"], 3), (pairs, 24)):
        assert len(family) == size
        np.testing.assert_allclose(family.p_holm, list(holm(dict(enumerate(family.p_value))).values()))
    single = ablation.single()
    np.testing.assert_allclose(single.p_holm, list(holm(dict(enumerate(single.p_value))).values()))
    corrected = holm(dict(enumerate(ablation.settings.drop_p)))
    np.testing.assert_allclose(ablation.settings.drop_holm, list(corrected.values()))


def test_what_is_said_is_what_was_found(ablation):
    *factors, recipe, one, two, three = ablation.describe().splitlines()
    assert len(factors) == 3 and recipe.startswith("ours less transformers")
    assert [line[:25].strip() for line in (one, two, three)] == [
        "alignment x point", "alignment x scaling", "point x scaling"
    ]  # fmt: skip
    row = ablation.effects.set_index(["factor", "others", "at"]).loc[("alignment", "average", "last layer"), :]
    ends = f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
    assert factors[0].startswith("sos less raw") and f"last layer {ends}" in factors[0]


def test_bad_input(model, images, tmp_path):
    train, test = images
    bert = ImageGPTForCausalImageModeling(replace(model.config, bidirectional=True))
    bert.name, bert.processor = "bert", None
    with pytest.raises(ValueError, match="has no SOS"):
        lab.ablate_protocol(bert, train, test, store=tmp_path, progress=False)
    with pytest.raises(ValueError, match="layer"):
        lab.ablate_protocol(model, train, test, store=tmp_path, layers=[0, 9], progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="needs labels"):
        lab.ablate_protocol(model, replace(train, labels=None), test, store=tmp_path, layers=[0], progress=False)


def test_the_command(tiny_folder, tiny_images, tmp_path, capsys):
    arguments = [str(tiny_folder), str(tiny_images), "--limit", "30", "--layers", "0", "3"]
    assert cli.main(["ablate", *arguments, "--store", str(tmp_path / "s"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sos less raw" in printed and str(tmp_path / "protocol.png") in printed
    table = pd.read_csv(tmp_path / "protocol.csv", keep_default_na=False)
    assert len(table) == 9 * 2 and set(table.layer) == {0, 3} and set(table.n_test) == {30}
    config = json.loads((tmp_path / "protocol.json").read_text())["config"]
    assert len(config["effects"]) == 3 * (2 * 4 + 3) + 3 + 9 and len(config["settings"]) == 9
    assert len(config["repeats"]) == 4 * 14 and len(config["stopped"]) == 4
    assert config["stores"]["raw"]["layers"] == {"ln_1": [0, 3], "resid_pre": [0, 3]}
