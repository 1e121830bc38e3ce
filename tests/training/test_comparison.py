"""The comparison of ways to fine-tune against its runs, one by one with the public functions."""

import json
from dataclasses import replace

import pytest

import igpt_lab as lab

SETTINGS = lab.FinetuneConfig(
    steps=4, batch_size=4, learning_rate=0.02, cooldown=2, log_every=2, pad=0, dtype="float32", compile=False
)


@pytest.fixture(scope="module")
def images(tiny_images):
    return [lab.load_images(tiny_images, split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def comparison(tiny_folder, images, tmp_path_factory):
    store = tmp_path_factory.mktemp("comparison")
    return lab.compare_fine_tuning(tiny_folder, *images, SETTINGS, store=store, per_class=8, draws=2, progress=False)


def test_the_probes_are_those_of_the_network_as_it_was(comparison, tiny, images, tmp_path):
    store = lab.extract(tiny, images, store=tmp_path, progress=False)
    features = [lab.Features.from_store(store, split) for split in ("train", "test")]
    alone = lab.probe_layers(*features, progress=False)
    assert comparison.before.table.equals(alone.table)
    few = lab.probe_few_labels(*features, ks=[8], draws=2, layers=[3], progress=False).table
    for method, layer, rule in (("probe, best layer", alone.chosen, "chosen"), ("probe, last layer", 3, "fixed")):
        rows = comparison.table[comparison.table.method == method]
        expected = [alone.correct[layer].mean(), *few[few.layer_rule == rule].test_accuracy]
        assert rows.test_accuracy.tolist() == expected and rows.labels.tolist() == ["all", "8", "8"]
        assert rows.draw.tolist() == [0, 0, 1]


def test_each_way_is_what_one_by_one_gives(comparison, tiny_folder, images, tmp_path):
    network, scratch = lab.load_model(tiny_folder), lab.load_model(tiny_folder, random=True)
    middle = max(1, comparison.before.chosen)
    ways = {
        ("L_gen + L_clf", "all", 0): (network, {}),
        ("L_clf alone", "all", 0): (network, {"generative": 0.0}),
        (f"L_gen + L_clf, head on layer {middle}", "all", 0): (network, {"layer": middle}),
        ("from scratch", "all", 0): (scratch, {}),
        ("head alone", "all", 0): (network, {"head_only": True}),
        ("L_gen + L_clf", "8", 0): (network, {"per_class": 8}),
        ("L_gen + L_clf", "8", 1): (network, {"per_class": 8, "draw": 1, "draws": 2}),
        ("L_clf alone", "8", 0): (network, {"per_class": 8, "generative": 0.0}),
        ("L_clf alone", "8", 1): (network, {"per_class": 8, "draw": 1, "draws": 2, "generative": 0.0}),
    }
    rows = comparison.table[6:].reset_index(drop=True)  # after those of the probes
    assert list(zip(rows.method, rows.labels, rows.draw, strict=True)) == list(ways)
    best = comparison.before.correct[comparison.before.chosen]
    for i, ((method, labels, _), (start, changes)) in enumerate(ways.items()):
        out = lab.finetune(start, images[0], replace(SETTINGS, **changes), tmp_path / str(i), progress=False)
        result = lab.classify(out, images[1], progress=False)
        assert rows.loc[i, ["test_accuracy", "low", "high"]].tolist() == list(result.accuracy().values())
        if labels == "all":
            assert (comparison.classified[method].probabilities == result.probabilities).all()
            assert comparison.pairs.loc[method].to_dict() == lab.compare(result.correct, best).to_dict()
    wrong = lab.classify(tmp_path / "0", images[1], progress=False)
    assert comparison.mistakes.index.tolist() == wrong.mistakes(len(images[1])).tolist()
    assert (comparison.mistakes.label != comparison.mistakes.predicted).all()


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
