"""Poolings side by side, against the pieces one by one."""

import numpy as np
import pytest

import igpt_lab as lab


def test_each_row_is_what_one_pooling_gives(tiny_folder, tiny_images, tmp_path):
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = lab.compare_poolings(
        tiny_folder, *images, pools=["mean", "max", "grid:2"], store=tmp_path, layers=[0, 2, 3], progress=False
    ).set_index("pool")
    first = None
    for pool, row in table.iterrows():
        store = lab.extract(tiny_folder, images, store=tmp_path / "alone", pool=pool, layers=[0, 2, 3], progress=False)
        train, test = (lab.Features.from_store(store, split) for split in ("train", "test"))
        result = lab.probe_layers(train, test, folds=5, progress=False)
        first = result if first is None else first
        drop = lab.compare_layers(result)
        assert row.chosen_layer == result.chosen and row.n_features == train.layers[0].shape[1]
        assert row.test_accuracy == drop.chosen_accuracy and row.last_accuracy == drop.last_accuracy
        assert row["drop"] == pytest.approx(drop.difference) and row.drop_p == drop.p_value
        right = result.correct[result.chosen].astype(float) - first.correct[first.chosen]
        assert row.less_first == pytest.approx(right.mean())
    assert table.n_features["grid:2"] == 4 * table.n_features["mean"]
    p, corrected = table.p_value[1:].to_numpy(), table.p_holm[1:].to_numpy()
    np.testing.assert_allclose(np.sort(corrected), np.maximum.accumulate(np.minimum(1, np.sort(p) * [2, 1])))
    assert table.less_first["mean"] == 0 and table.p_holm["mean"] == 1
