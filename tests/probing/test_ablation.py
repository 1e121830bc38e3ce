"""The ablation's cells against features, probes and comparisons made by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.core.significance import compare, mean_difference
from igpt_lab.images.splits import stratified_split
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.probing.ablation import FACTORS, OURS, TRANSFORMERS
from igpt_lab.probing.probes import CS

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
def found(model, images, stores):
    return lab.ablate_protocol(model, *images, store=stores, progress=False)


@torch.no_grad()
def by_hand(model, tokens, alignment, point):
    """Layer -> mean over positions, float32 (N, D), from the states that the model itself returns."""
    ids = torch.as_tensor(tokens.encoded(16, 8).astype(np.int64))
    if alignment == "sos":
        ids = torch.cat([torch.full((len(ids), 1), 8), ids[:, :-1]], 1)
    blocks, ends = model.transformer.h, []
    hook = blocks[-1].register_forward_hook(lambda block, given, returned: ends.append(returned[0]))
    *states, last = model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    if point == "ln_1":
        states = [*(block.ln_1(state) for block, state in zip(blocks, states, strict=True)), last]
    else:
        states = [*states, last if point == "hidden states" else ends[0]]
    return {layer: state.mean(1).numpy() for layer, state in enumerate(states)}


def test_every_setting_has_every_layer(found):
    assert len(found.results) == 17 and set(found.results) > {OURS, TRANSFORMERS}
    assert len(found.table) == 17 * 4 and not found.table.duplicated(["recipe", *FACTORS, "layer"]).any()
    assert (found.table.groupby(["recipe", *FACTORS]).chosen.sum() == 1).all()
    assert found.keys["sos"]["alignment"] == "sos" and found.keys["raw"]["alignment"] == "raw"
    for setting, rows in found.table.groupby(list(FACTORS)):
        result = found.results[setting]
        np.testing.assert_array_equal(rows.test_accuracy, [result.correct[layer].mean() for layer in rows.layer])


@pytest.mark.parametrize("alignment", FACTORS["alignment"])
@pytest.mark.parametrize("point", FACTORS["point"])
def test_a_cell_is_probe_layers_by_hand(found, model, images, alignment, point):
    train, test = (lab.Features(by_hand(model, each, alignment, point), each.labels, each.index) for each in images)
    for scaling in FACTORS["scaling"]:
        expected = lab.probe_layers(train, test, standardise=scaling == "standardised", progress=False)
        result = found.results[alignment, point, scaling, "converged"]
        assert result.chosen == expected.chosen
        for layer in range(4):
            np.testing.assert_array_equal(result.correct[layer], expected.correct[layer])
        same = ["layer", "C", "validation_accuracy", "converged", "test_accuracy", "low", "high", "in_peak_set"]
        pd.testing.assert_frame_equal(result.table[same], expected.table[same])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("scaling", FACTORS["scaling"])
def test_a_stopped_cell_is_scikit_learn_by_hand(found, model, images, stores, scaling):
    store = lab.extract(model, images, store=stores, points=FACTORS["point"], alignment="raw", progress=False)
    train, test = (lab.StoredLayers(store, split, "resid_pre") for split in ("train", "test"))
    y, truth = (each.labels for each in images)
    fit, held = stratified_split(y, 0.1, seed=0)

    def classifier(C):
        scaler = [StandardScaler()] if scaling == "standardised" else []
        return make_pipeline(*scaler, LogisticRegression(C=C, max_iter=100))

    for row in found.results["raw", "resid_pre", scaling, "100 iterations"].table.itertuples():
        x = train[row.layer]
        scores = {C: classifier(C).fit(x[fit], y[fit]).score(x[held], y[held]) for C in {*CS, row.C}}
        assert row.validation_accuracy == pytest.approx(scores[row.C]) == max(scores.values())
        refit = classifier(row.C).fit(x, y)
        steps = refit[-1].n_iter_[0]
        assert row.iterations == pytest.approx(steps, rel=0.1, abs=2)  # in float32 rounding decides the last ones
        assert row.test_accuracy == pytest.approx(refit.score(test[row.layer], truth), abs=1 / len(truth))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_port_s_recipe_by_hand(found, model, images):
    train, test = (by_hand(model, each, "raw", "hidden states") for each in images)
    y, truth = (each.labels for each in images)
    scores = [LogisticRegression(max_iter=1000).fit(train[i], y).score(test[i], truth) for i in range(4)]
    port = found.table[found.table.recipe == "port"]
    assert port.test_accuracy.tolist() == pytest.approx(scores, abs=1 / len(truth)) and (port.C == 1).all()
    assert port.layer[port.chosen].item() == np.argmax(scores)  # picked on test, as published
    row = found.settings[found.settings.recipe == "port"].iloc[0]
    assert [row.test_accuracy, row.last_accuracy] == pytest.approx([max(scores), scores[-1]], abs=1 / len(truth))


def test_settings_and_effects_are_compare_by_hand(found):
    for row in found.settings[found.settings.recipe == ""].itertuples():
        result = found.results[tuple(getattr(row, name) for name in FACTORS)]
        by_validation = result.table.set_index("layer").validation_accuracy.idxmax()
        expected = compare(result.correct[by_validation], result.correct[3])
        assert row.layer == by_validation
        assert (row.drop, row.drop_low, row.drop_p) == (expected.difference, expected.low, expected.p_value)
    row = found.effects.set_index(["factor", "others", "at"]).loc["point", "raw, unscaled, converged", "chosen layer"]
    a, b = (found.results["raw", point, "unscaled", "converged"] for point in ("ln_1", "resid_pre"))
    expected = compare(a.correct[a.chosen], b.correct[b.chosen])
    assert (row.a, row.b) == FACTORS["point"]
    assert (row.difference, row.low, row.high, row.p_value) == (
        expected.difference, expected.low, expected.high, expected.p_value,
    )  # fmt: skip
    row = found.effects.set_index(["factor", "at"]).loc["recipe", "last layer"]
    assert row.difference == compare(found.results[OURS].correct[3], found.results[TRANSFORMERS].correct[3]).difference


def test_one_change_at_a_time_is_from_our_setting(found):
    single = found.single()
    assert single.factor.tolist() == [name for name in FACTORS for _ in range(2)]
    for row in single[single["at"] == "last layer"].itertuples():
        other = tuple(row.b if name == row.factor else level for name, level in zip(FACTORS, OURS, strict=True))
        a, b = (found.results[each].correct[3] for each in (OURS, other))
        assert row.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)


def test_averages_are_over_the_eight_pairs(found):
    effects = found.effects[found.effects.factor != "recipe"]
    for _, rows in effects.groupby(["factor", "at"]):
        whole, pairs = rows[rows.others == "average"].iloc[0], rows[rows.others != "average"]
        assert len(pairs) == (0 if whole["at"] == "drop" else 8)
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
    found = mean_difference(differences)
    of_images = np.append(differences.mean(0), [1, -1])  # and the two images that are added
    resampled = of_images[generator.integers(0, 402, (10_000, 402))].mean(1)
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(resampled, [0.025, 0.975]), atol=0.004)
    one, alone = mean_difference(differences[:1]), compare(right[0, 0], right[0, 1])
    assert one["difference"] == pytest.approx(alone.difference)
    np.testing.assert_allclose([one["low"], one["high"]], [alone.low, alone.high], atol=0.006)
    assert found["high"] - found["low"] < one["high"] - one["low"]


def test_what_is_said_is_what_was_found(found):
    *factors, port = found.describe().splitlines()
    assert len(factors) == 4 and "port" in port
    row = found.effects.set_index(["factor", "others", "at"]).loc["alignment", "average", "last layer"]
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
    given = [str(tiny_folder), str(tiny_images), "--limit", "30", "--layers", "0", "3"]
    assert cli.main(["ablate", *given, "--store", str(tmp_path / "s"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sos less raw" in printed and str(tmp_path / "protocol.png") in printed
    table = pd.read_csv(tmp_path / "protocol.csv", keep_default_na=False)
    assert len(table) == 17 * 2 and set(table.layer) == {0, 3} and set(table.n_test) == {30}
    config = json.loads((tmp_path / "protocol.json").read_text())["config"]
    assert len(config["effects"]) == 4 * (2 * 8 + 3) + 3 and len(config["settings"]) == 17
    assert config["stores"]["raw"]["layers"] == {"ln_1": [0, 3], "resid_pre": [0, 3]}
