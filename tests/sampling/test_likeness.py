"""Features against the store's, distances by hand, and samples that are, or are not, like the images."""

import numpy as np
import pytest
import torch

import igpt_lab as lab
from igpt_lab.sampling.likeness import _distance, compare_samples, features_of, nearest, palette_counts, patch_counts

QUIET = {"progress": False}


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(8, size=(7, 16))


def test_features_are_those_of_the_store(tiny, train, tmp_path):
    store = lab.extract(tiny, train, store=tmp_path, **QUIET)
    expected = lab.Features.from_store(store, "train")
    features = features_of(tiny, lab.tokenize(train, tiny.processor, **QUIET), layer=2, batch_size=7, **QUIET)
    np.testing.assert_allclose(features, expected.layers[2], atol=1e-6)


def test_images_and_their_levels_are_no_tokens(tiny, train, tokens):
    images = train.images()
    pixels = tiny.processor.resize(images)
    for use in (features_of, lab.surprisal):
        for wrong in (images, pixels, torch.from_numpy(pixels), pixels[..., 0], tokens.astype(float), tokens[0]):
            with pytest.raises(ValueError, match=r"expected integers \(S, 16\) or fewer columns: `tokenize`"):
                use(tiny, wrong, **QUIET)
        for wrong in (pixels[..., 0].reshape(-1, 16), tokens - 1):
            with pytest.raises(ValueError, match="the model's colours are 0 to 7"):
                use(tiny, wrong, **QUIET)
    np.testing.assert_array_equal(
        features_of(tiny, torch.from_numpy(tokens), **QUIET), features_of(tiny, tokens, **QUIET)
    )


def test_nearest_by_hand():
    rows, far = nearest(np.array([[[0, 1]], [[5, 5]]], np.uint8), np.array([[[5, 5]], [[3, 5]]], np.uint8))
    assert rows.tolist() == [1, 0] and far.tolist() == [5, 0]
    with pytest.raises(ValueError, match="2 numbers in each query, 3"):
        nearest(np.zeros((1, 2)), np.zeros((1, 3)))


def test_counts_by_hand():
    clusters = np.array([[-1, -1, -1], [1, 1, 1], [0.1, 0.1, 0.1]])
    tokens = np.array([[0, 0, 1, 0, 0, 1, 2, 2, 1], [0] * 9])  # 3 x 3 pixels
    assert palette_counts(tokens, clusters).tolist() == [[4, 3, 2], [9, 0, 0]]
    counts = patch_counts(tokens, clusters)
    black, white, grey = 0, 3, 2  # of four levels
    weights = [1, 4, 16, 64]  # of the corners, row by row
    patches = [[black, black, black, black], [black, white, black, white], [black, black, grey, grey],
               [black, white, grey, white]]  # fmt: skip
    expected = np.bincount([int(np.dot(patch, weights)) for patch in patches], minlength=256)
    np.testing.assert_array_equal(counts[0], expected)
    assert counts[1, 0] == counts[1].sum() == 4


def test_distance_and_its_jackknife():
    left, right = np.array([[3, 1], [1, 3], [4, 0]]), np.array([[0, 4], [2, 2]])
    value, low, high = _distance(left, right)
    assert value == pytest.approx(8 / 12 - 2 / 8)

    def between(one, other):
        return np.abs(one.sum(0) / one.sum() - other.sum(0) / other.sum()).sum() / 2

    without = [between(np.delete(left, i, 0), right) for i in range(3)]
    others = [between(left, np.delete(right, i, 0)) for i in range(2)]
    variance = 2 / 3 * np.sum((without - np.mean(without)) ** 2) + 1 / 2 * np.sum((others - np.mean(others)) ** 2)
    assert (low, high) == pytest.approx((max(0, value - 1.96 * variance**0.5), min(1, value + 1.96 * variance**0.5)))


def test_images_like_the_real_ones_are_not_told_apart_and_others_are(tiny):
    draw = np.random.default_rng(1)
    real, same, other = draw.integers(4, size=(400, 16)), draw.integers(4, size=(100, 16)), np.full((100, 16), 7)
    table = compare_samples(tiny, same, real, **QUIET).set_index("measure")
    assert list(table.index) == ["palette", "patches", "classifier"]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.low["classifier"] < 0.55 and table.value["palette"] < 0.1 and table.samples.eq(100).all()
    assert (table.value - table.floor).abs().max() < 0.12
    table = compare_samples(tiny, other, real, **QUIET).set_index("measure")
    assert table.value["palette"] == 1 and table.value["classifier"] == 1 and table.low["classifier"] > 0.95
    assert table.floor["palette"] < 0.1
    with pytest.raises(ValueError, match="100 samples, 150 images"):
        compare_samples(tiny, same, real[:150], **QUIET)
