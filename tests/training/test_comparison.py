"""The comparison of ways to fine-tune against its runs, one by one with the public functions."""

import json
from dataclasses import replace

import numpy as np
import pytest

import igpt_lab as lab
from igpt_lab.core.significance import holm

SETTINGS = lab.FinetuneConfig(
    steps=4, batch_size=4, learning_rate=0.02, cooldown=2, log_every=2, pad=0, dtype="float32", compile=False
)


@pytest.fixture(scope="module")
def images(tiny_images):
    return [lab.load_images(tiny_images, split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def comparison(tiny_folder, images, tmp_path_factory):
    store = tmp_path_factory.mktemp("comparison")
    return lab.compare_fine_tuning(
        tiny_folder, *images, SETTINGS, store=store, per_class=8, draws=2, seeds=(0, 3), progress=False
    )


def test_the_probes_are_those_of_the_network_as_it_was(comparison, tiny, images, tmp_path):
    store = lab.extract(tiny, images, store=tmp_path, progress=False)
    features = [lab.Features.from_store(store, split) for split in ("train", "test")]
    alone = lab.probe_layers(*features, progress=False)
    assert comparison.before.table.equals(alone.table)
    few = lab.probe_few_labels(*features, ks=[8], draws=2, layers=[3], progress=False).table
    for method, layer, rule in (("probe, chosen layer", alone.chosen, "chosen"), ("probe, last layer", 3, "fixed")):
        rows = comparison.table[comparison.table.method == method]
        expected = [alone.correct[layer].mean(), *few[few.layer_rule == rule].test_accuracy]
        assert rows.test_accuracy.tolist() == expected and rows.labels.tolist() == ["all", "8", "8"]
        assert rows.draw.tolist() == [0, 0, 1]


def test_each_way_is_what_one_by_one_gives(comparison, tiny_folder, images, tmp_path):
    network = lab.load_model(tiny_folder)
    middle = max(1, comparison.before.chosen)
    on_layer = f"head on the chosen layer, {middle}"
    if middle != comparison.before.chosen:
        on_layer = f"head on layer {middle}"
    ways = {
        "L_gen + L_clf": {},
        "L_clf alone": {"generative": 0.0},
        on_layer: {"layer": middle},
        "from scratch": {},
        "head alone": {"head_only": True},
    }
    runs = {(method, "all", 0, seed): changes | {"seed": seed} for method, changes in ways.items() for seed in (0, 3)}
    runs |= {(method, "8", draw, 0): ways[method] | {"per_class": 8, "draw": draw, "draws": 2}
             for method in ("L_gen + L_clf", "L_clf alone") for draw in (0, 1)}  # fmt: skip
    rows = comparison.table[6:]  # after those of the probes
    assert list(zip(rows.method, rows.labels, rows.draw, rows.seed, strict=True)) == list(runs)
    for i, ((method, labels, _, seed), changes) in enumerate(runs.items()):
        start = lab.load_model(tiny_folder, random=True, seed=seed) if method == "from scratch" else network
        out = lab.finetune(start, images[0], replace(SETTINGS, **changes), tmp_path / str(i), progress=False)
        result = lab.classify(out, images[1], progress=False)
        assert rows.loc[6 + i, ["test_accuracy", "low", "high"]].tolist() == list(result.accuracy().values())
        np.testing.assert_array_equal(comparison.correct[6 + i], result.correct)
        if labels == "all" and seed == 0:
            assert (comparison.classified[method].probabilities == result.probabilities).all()
    wrong = lab.classify(tmp_path / "0", images[1], progress=False)
    assert comparison.mistakes.index.tolist() == wrong.mistakes(len(images[1])).tolist()
    assert (comparison.mistakes.label != comparison.mistakes.predicted).all()


def right(comparison, method):
    """bool (S, N) of all seeds with all labels."""
    table = comparison.table
    return np.stack([comparison.correct[i] for i in table.index[(table.method == method) & (table.labels == "all")]])


def test_claims_are_paired_by_seed_and_corrected_together(comparison):
    middle = next(name for name in comparison.table.method if name.startswith("head on"))
    ways = ["L_gen + L_clf", "L_clf alone", middle, "from scratch", "head alone"]
    claims = [(way, "probe, chosen layer") for way in ways]
    claims += [(middle, "L_gen + L_clf"), ("L_gen + L_clf", "L_clf alone")]
    pairs = comparison.pairs
    assert pairs.index.tolist() == [f"{a} less {b}" for a, b in claims]
    for (a, b), row in zip(claims, pairs.itertuples(), strict=True):
        of_seeds = [
            x.mean() - y.mean()
            for x, y in zip(right(comparison, a), np.resize(right(comparison, b), (2, row.n_test)), strict=True)
        ]
        assert row.difference == pytest.approx(np.mean(of_seeds)) and row.sd == pytest.approx(np.std(of_seeds, ddof=1))
        assert row.low <= row.difference <= row.high and row.seeds == 2
    np.testing.assert_allclose(pairs.p_holm, list(holm(pairs.p_value.to_dict()).values()))
    assert (pairs.p_holm >= pairs.p_value).all()


def test_the_summary_is_over_seeds_and_over_draws(comparison):
    summary = comparison.summary.set_index(["labels", "method"])
    for (labels, method), rows in comparison.table.groupby(["labels", "method"]):
        row = summary.loc[labels, method]
        assert row["mean"] == pytest.approx(rows.test_accuracy.mean()) and row.runs == len(rows)
        assert row.sd == pytest.approx(rows.test_accuracy.std(ddof=1), nan_ok=True)
        assert row.low <= row["mean"] <= row.high
    assert summary.runs.loc["all"].tolist() == [1, 1, 2, 2, 2, 2, 2]


def test_a_chosen_layer_near_the_end_is_said(comparison):
    assert "does not stand for the middle" in replace(comparison, middle=3).words()  # of 3
    said = replace(comparison, middle=2).words()
    assert said.startswith("Layer 2 of 3, which") and "does not stand" not in said
    chosen = comparison.before.chosen
    assert ("chosen by cross-validation" in comparison.words()) == (comparison.middle == chosen)


def test_a_layer_that_cannot_have_a_head(tiny_folder, images, tmp_path):
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"middle={wrong}; expected a layer from 1 to 3"):
            lab.compare_fine_tuning(tiny_folder, *images, SETTINGS, store=tmp_path, middle=wrong)
    assert list(tmp_path.iterdir()) == []


def test_curves_are_of_the_network_before_and_of_two_after(comparison, tiny_folder, images, tmp_path):
    out = lab.finetune(tiny_folder, images[0], replace(SETTINGS, generative=0.0), tmp_path / "run", progress=False)
    store = lab.extract(lab.load_model(out / "causal"), images, store=tmp_path, progress=False)
    after = lab.probe_layers(*[lab.Features.from_store(store, split) for split in ("train", "test")], progress=False)
    curves = comparison.curves
    assert curves.groupby("control", sort=False).layer.apply(list).tolist() == [[0, 1, 2, 3]] * 3
    rows = curves[curves.control == "after L_clf alone"]
    assert rows.test_accuracy.tolist() == after.table.test_accuracy.tolist()
    lab.figures.fine_tuning(comparison.table, curves, title="ways")
    assert json.loads(json.dumps(comparison.to_dict()))["settings"]["steps"] == 4
