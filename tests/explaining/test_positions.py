"""Class accuracy by position and by prefix: laws, and the probes one by one."""

from dataclasses import replace

import numpy as np
import pytest

import igpt_lab as lab
from conftest import assert_means
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.probing.features import Features

COLUMNS = ["control", "layer", "test_accuracy", "low", "high", "C", "n_train", "n_test", "chosen"]


def pooled(model, images, pool, folder):
    store = lab.extract(model, images, store=folder, pool=pool, device="cpu", progress=False)
    return [Features.from_store(store, split) for split in ("train", "test")]


def some(features, rows):
    """The features of these rows."""
    values = {layer: values[rows] for layer, values in features.layers.items()}
    return Features(values, features.labels[rows], features.index[rows], features.names)


def test_at_position_0_accuracy_is_the_majority_share_at_every_layer(tiny, train, test, tmp_path):
    of_train, of_test = pooled(tiny, [train, test], "at:0,9", tmp_path)
    of_train, of_test = some(of_train, np.arange(20, 60)), some(of_test, np.arange(8, 40))  # 10 and 30, 12 and 20
    table = lab.probe_slices(of_train, of_test, [0, 9], progress=False).table
    assert (table.test_accuracy[table.position == 0] == 20 / 32).all()
    assert (table.test_accuracy[table.position == 9] != 20 / 32).any()
    assert (table["drop"][table.position == 0] == 0).all()
    for features in (of_train, of_test):
        for values in features.layers.values():
            assert np.ptp(values[:, :8], axis=0).max() == 0


def test_a_slice_is_probed_as_if_it_were_alone(tiny, train, test, tmp_path):
    probed = lab.probe_positions(
        tiny, train, test, positions=[9, 3], layers=[1, 3], store=tmp_path, device="cpu", progress=False
    )
    table = probed.table
    assert table[["layer", "position"]].to_numpy().tolist() == [[1, 9], [3, 9], [1, 3], [3, 3]]
    assert set(COLUMNS) <= set(table)
    for position, rows in table.groupby("position"):
        alone = lab.extract(
            tiny, [train, test], store=tmp_path, pool=f"at:{position}", layers=[1, 3], device="cpu", progress=False
        )
        result = lab.probe_layers(
            *(Features.from_store(alone, split) for split in ("train", "test")), folds=2, device="cpu", progress=False
        )
        np.testing.assert_array_equal(rows.test_accuracy, result.table.test_accuracy)
        for layer in (1, 3):
            np.testing.assert_array_equal(probed.of_images[position, layer], result.correct[layer])
        assert rows["drop"].iloc[0] == lab.compare_layers(result).difference


def test_the_whole_prefix_is_the_mean(tiny, train, test, tmp_path):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    probed = lab.probe_prefixes(tiny, train, test, shares=3, **options)
    table = probed.table
    assert_means(probed, "test_accuracy")
    assert table.share.unique().tolist() == [1 / 3, 2 / 3, 1] and table.layer.nunique() == 4
    result = lab.probe_layers(*pooled(tiny, [train, test], "mean", tmp_path), folds=2, device="cpu", progress=False)
    whole = table[table.share == 1].drop(columns=["share", "drop", "drop_low", "drop_high", "drop_p"])
    assert whole.reset_index(drop=True).equals(result.table)


def test_the_model_stays_in_training_mode(tiny, train, test, tmp_path):
    tiny.train().transformer.h[0].eval()
    lab.probe_positions(tiny, train, test, positions=[3], store=tmp_path, device="cpu", progress=False)
    assert tiny.training and tiny.transformer.h[1].training and not tiny.transformer.h[0].training


def test_bad_input(tiny, train, test, tmp_path):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match="no position 16; expected positions from 0 to 15"):
        lab.probe_positions(tiny, train, test, positions=[0, 16], **options)
    with pytest.raises(ValueError, match="layer 4 at ln_1; this model has layers 0..3 there"):
        lab.probe_positions(tiny, train, test, layers=[4], **options)
    with pytest.raises(ValueError, match="17 prefixes of 16 positions"):
        lab.probe_prefixes(tiny, train, test, shares=17, **options)
    with pytest.raises(ValueError, match=r"positions \[3, -1\]; expected some of 0 to 15"):
        lab.probe_positions(tiny, train, test, positions=[3, -1], **options)
    with pytest.raises(ValueError, match="shares=0; expected 1 to 16"):
        lab.probe_prefixes(tiny, train, test, shares=0, **options)
    model = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True)).eval()
    with pytest.raises(ValueError, match="bidirectional model sees the whole image"):
        lab.probe_prefixes(model, train, test, **options)
    assert not list(tmp_path.iterdir())
    features = Features({0: np.ones((4, 5), np.float32)}, np.array([0, 1, 0, 1]), np.arange(4))
    with pytest.raises(ValueError, match="layer 0 has 5 features; expected a multiple of 2"):
        lab.probe_slices(features, features, [0, 1], progress=False)
    nothing = Features({}, np.array([0, 1]), np.arange(2))
    with pytest.raises(ValueError, match="expected the same layers, at least one"):
        lab.probe_slices(nothing, nothing, [0, 1], progress=False)
    by_hand = ImageGPTForCausalImageModeling(tiny.config).eval()
    with pytest.raises(ValueError, match="made by hand and has no name and no palette; set model.name"):
        lab.probe_positions(by_hand, train, test, **options)
