"""Both number formats side by side, against the pieces one by one."""

import numpy as np
import pytest

import igpt_lab as lab


def test_each_row_is_what_the_two_formats_give(tiny_folder, tiny_images, tmp_path):
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = lab.compare_dtypes(tiny_folder, *images, store=tmp_path, folds=2, progress=False).set_index("layer")
    probed, features = {}, {}
    for dtype in ("float32", "bfloat16"):
        store = lab.extract(tiny_folder, images, store=tmp_path / "alone", dtype=dtype, progress=False)
        train, features[dtype] = (lab.Features.from_store(store, split) for split in ("train", "test"))
        probed[dtype] = lab.probe_layers(train, features[dtype], folds=2, progress=False)
    assert table.index.tolist() == [0, 1, 2, 3]
    for layer, row in table.iterrows():
        wide, low = (features[dtype].layers[layer] for dtype in ("float32", "bfloat16"))
        distance = np.linalg.norm((wide - low).ravel(), np.inf) / np.linalg.norm(wide.ravel(), np.inf)
        assert row.relative_error == pytest.approx(distance) and distance < 0.1
        assert (distance > 1e-5) == (layer > 0)  # before the first block there are no products
        results = [result.table.set_index("layer") for result in probed.values()]
        assert [row.accuracy, row.accuracy_bfloat16] == [result.test_accuracy[layer] for result in results]
        assert [row.C, row.C_bfloat16] == [result.C[layer] for result in results]
        assert [row.chosen, row.chosen_bfloat16] == [layer == result.chosen for result in probed.values()]
        assert row.difference == pytest.approx(row.accuracy_bfloat16 - row.accuracy) and row.low < row.high
        classes = [result.predicted[layer] for result in probed.values()]
        assert row.changed == pytest.approx(np.count_nonzero(classes[0] != classes[1]) / 40)
    assert (table.p_holm >= table.p_value).all()


def test_features_that_are_all_zero_differ_by_nothing(tiny, tiny_images, tmp_path):
    for parameter in tiny.parameters():
        parameter.data.zero_()
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = lab.compare_dtypes(tiny, *images, store=tmp_path, layers=[1], folds=2, progress=False)
    assert table.relative_error.tolist() == [0.0]
