"""Geometry against definitions written out, sets of a known dimension, and what happens when an image is deleted."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist

from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.store import FeatureStore, StoredLayers
from igpt_lab.features.writing import StoreWriter
from igpt_lab.probing import geometry, neighbours
from igpt_lab.probing.cka import _centred_grams, cka
from igpt_lab.probing.features import Features
from igpt_lab.probing.geometry import (
    effective_rank,
    intrinsic_dimension,
    label_overlap,
    measure_layers,
    participation_ratio,
)

QUIET = {"progress": False}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotation(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


def torus(seed, n, dimension, width=12):
    """n points, uniform on a flat torus of this dimension, which has no edge, turned into `width` dimensions."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, (n, dimension))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ rotation(1, width)[: 2 * dimension]


def matrix(table, column="cka"):
    return table.pivot(index="layer", columns="other_layer", values=column).to_numpy()


def hsic(x, y):
    """Its U-statistic as Song et al. define it: the mean over all tuples of four different images."""
    k, m = x.astype(float) @ x.T, y.astype(float) @ y.T
    tuples = list(permutations(range(len(x)), 4))
    return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in tuples) / len(tuples)


def biased_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.square(x.T @ y).sum() / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())


@pytest.mark.parametrize("batch", [7, 14, 100])
def test_cka_by_its_definition(batch):
    x = normal(0, 14, 3)
    layers = {0: x, 1: x**2 + 3, 5: normal(1, 14, 4)}
    parts = np.array_split(np.random.default_rng(2).permutation(14), 2 if batch == 7 else 1)
    expected = np.array([[sum(hsic(a[rows], b[rows]) for rows in parts) for b in layers.values()]
                         for a in layers.values()])  # fmt: skip
    expected /= np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    table = cka(layers, batch=batch, seed=2, **QUIET)
    np.testing.assert_allclose(matrix(table), expected, atol=2e-6)
    assert table.layer.tolist() == [0, 0, 0, 1, 1, 1, 5, 5, 5] and set(table.batches) == {len(parts)}
    np.testing.assert_array_equal(matrix(cka(layers, layers, batch=batch, seed=2, **QUIET)), matrix(table))


def test_cka_sees_through_rotation_scale_and_shift_and_through_nothing_else():
    x = normal(0, 300, 8) * np.linspace(1, 3, 8, dtype=np.float32)
    turned = 1e-3 * x @ rotation(1, 8)[:, :8] + 7
    stretched = x * np.linspace(9, 1, 8, dtype=np.float32)
    value = matrix(cka({0: x, 1: turned, 2: stretched}, **QUIET))
    np.testing.assert_allclose(value[:2, :2], 1, atol=1e-5)
    assert value[0, 2] == pytest.approx(value[1, 2], abs=1e-5) and value[0, 2] < 0.9
    np.testing.assert_allclose(value, value.T, atol=1e-6)


def test_independent_features_have_no_cka_where_the_biased_one_has():
    tables = [cka({0: normal(i, 256, 40)}, {0: normal(900 + i, 256, 40)}, batch=32, **QUIET) for i in range(60)]
    estimates = np.array([table.cka[0] for table in tables])
    assert abs(estimates.mean()) < 4 * estimates.std() / np.sqrt(60) < 0.01
    assert biased_cka(normal(0, 32, 40), normal(900, 32, 40)) > 0.5
    errors = np.array([table.standard_error[0] for table in tables])
    assert errors.mean() == pytest.approx(estimates.std(), rel=0.3)


def test_cka_of_two_models():
    ours, theirs = {0: normal(0, 40, 3), 1: normal(1, 40, 3)}, {0: normal(2, 40, 5), 1: normal(3, 40, 4), 2: None}
    theirs[2] = 5 * ours[1] @ rotation(0, 3)
    there, back = cka(ours, theirs, **QUIET), cka(theirs, ours, **QUIET)
    assert matrix(there).shape == (2, 3) and there.standard_error.isna().all()
    np.testing.assert_allclose(matrix(there), matrix(back).T, atol=1e-6)
    assert matrix(there)[1, 2] == pytest.approx(1, abs=1e-5)
    one, two = (Features(ours, np.zeros(40, int), np.arange(40) + i) for i in range(2))
    assert matrix(cka(one, ours, **QUIET)).shape == (2, 2)
    with pytest.raises(ValueError, match="40 of 40 rows are of different images"):
        cka(one, two, **QUIET)
    with pytest.raises(ValueError, match="features of 40 and of 39 images"):
        cka(ours, {0: theirs[0][1:]}, **QUIET)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_of_a_torus(dimension):
    x = torus(0, 2000, dimension)
    estimate = intrinsic_dimension(1e-6 * x + 3, **QUIET)
    assert (
        estimate["intrinsic_dimension_low"] < dimension * 1.03
        and estimate["intrinsic_dimension_high"] > dimension * 0.97
    )
    assert (
        estimate["intrinsic_dimension_high"] / estimate["intrinsic_dimension_low"] < 1.2
        and estimate["n_distinct"] == 2000
    )
    assert estimate["intrinsic_dimension"] == pytest.approx(line_through_the_origin(x), rel=0.04)


def line_through_the_origin(x, discard=0.1):
    """Facco et al.'s own fit: -log(1 - F) against log(r2 / r1), the largest ratios left out."""
    distances = np.sort(cdist(x, x), axis=1)
    ratios = np.sort(np.log(distances[:, 2] / distances[:, 1]))[: int(len(x) * (1 - discard))]
    rest = -np.log(1 - np.arange(1, len(ratios) + 1) / len(x))
    return ratios @ rest / (ratios @ ratios)


def test_the_error_of_the_dimension_is_its_spread():
    estimates = [intrinsic_dimension(torus(i, 250, 2), **QUIET) for i in range(100)]
    values = np.array([estimate["intrinsic_dimension"] for estimate in estimates])
    half = np.array([estimate["intrinsic_dimension_high"] for estimate in estimates]) - values
    assert half.mean() / 1.96 == pytest.approx(values.std(), rel=0.2)
    assert values.std() > 1.08 * values.mean() / np.sqrt(225)  # what independent ratios would give
    assert 0.88 <= (np.abs(values - 2) < half).mean() <= 1


def test_the_rate_by_hand():
    rate, error = geometry._rate(np.array([1.0, 10, 3, 2]), np.array([2, 0, 0, 0]), 0.25)
    assert rate == pytest.approx(2 / (1 + 2 + 3 + 3))  # 3 of 4 seen, the fourth is at least 3
    score = np.array([4.5 - 1, -3, 4.5 - 3, 4.5 - 2])
    score -= score.mean()
    linked = 2 * (score[0] * score[1] + score[0] * score[2] + score[0] * score[3])  # 0 and 2 are each other's nearest
    assert error == pytest.approx(rate**2 / 3 * np.sqrt(score @ score + max(linked, 0)))


def test_equal_rows_count_once():
    x = torus(0, 200, 2).astype(np.float32)
    once, twice = intrinsic_dimension(x, **QUIET), intrinsic_dimension(np.concatenate([x, x, x[:9]]), **QUIET)
    assert twice["n_distinct"] == 200
    assert [twice[name] for name in once] == pytest.approx(list(once.values()))


def test_ranks_by_hand():
    x = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]]) + 5
    share = np.array([0.75, 0.25])  # singular values 3 sqrt(2) and sqrt(2)
    assert effective_rank(x) == pytest.approx(np.prod(share**-share))
    assert participation_ratio(x) == pytest.approx((9 + 1) ** 2 / (81 + 1))
    wide = x @ rotation(0, 50)[:2]  # fewer rows than columns
    assert effective_rank(wide) == pytest.approx(effective_rank(x), rel=1e-5)
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert effective_rank(1e6 * signs) == pytest.approx(3) == participation_ratio(signs)
    assert effective_rank(signs[:, :1] * [1.0, 2, -3]) == pytest.approx(1) == participation_ratio(signs[:, :1])


def overlap(x, labels, k):
    distances = cdist(x, x) + np.diag(np.full(len(x), np.inf))
    near = np.argsort(distances, axis=1)[:, :k]
    return np.mean([labels[near[i, j]] == labels[i] for i in range(len(x)) for j in range(k)])


def test_label_overlap_by_definition_and_its_interval_by_deleting_images():
    labels = np.arange(40) % 3
    x = normal(0, 40, 4) + np.eye(3, 4, dtype=np.float32)[labels]
    estimate = label_overlap(x, labels, neighbours=4, **QUIET)
    assert estimate["label_overlap"] == pytest.approx(overlap(x, labels, 4))
    without = np.array([overlap(np.delete(x, i, 0), np.delete(labels, i), 4) for i in range(40)])
    error = np.sqrt(39 / 40 * np.square(without - without.mean()).sum())
    assert estimate["label_overlap_high"] - estimate["label_overlap"] == pytest.approx(1.959964 * error)
    assert estimate["label_overlap"] - estimate["label_overlap_low"] == pytest.approx(1.959964 * error)
    assert estimate["label_overlap_chance"] == pytest.approx((14 * 13 + 13 * 12 + 13 * 12) / (40 * 39))
    letters = np.array(["a", "b", "c"])[labels]
    assert label_overlap(x, letters, neighbours=4, **QUIET) == estimate


def test_the_interval_of_the_overlap_covers():
    def draw(seed):
        labels = np.random.default_rng(seed).integers(0, 3, 200)
        return normal(seed, 200, 3) + 1.5 * np.eye(3, dtype=np.float32)[labels], labels

    estimates = [label_overlap(*draw(i), neighbours=8, **QUIET) for i in range(100)]
    values = np.array([estimate["label_overlap"] for estimate in estimates])
    half = np.array([estimate["label_overlap_high"] for estimate in estimates]) - values
    assert values.std() * 0.9 < half.mean() / 1.96 < values.std() * 1.5  # never too small, at most a half too large
    assert (np.abs(values - values.mean()) < half).mean() >= 0.9


@pytest.mark.parametrize("block", [1, 3000, 2**24])
def test_neighbours_are_exact_also_far_from_the_mean_and_over_blocks(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    x = normal(0, 150, 6)
    x[:50] = 100 + 2**-10 * np.round(16 * x[:50])  # a float32 product cannot tell these apart
    scaled = neighbours.scaled(x)
    assert neighbours._search(torch.from_numpy(scaled), 3, False)[2].tolist() == [False] * 50 + [True] * 100
    distances = cdist(scaled.astype(float), scaled.astype(float)) + np.diag(np.full(150, np.inf))
    near, measured = neighbours.nearest_others(x, 3, device="cpu", progress=False)
    np.testing.assert_array_equal(near[50:], np.argsort(distances, axis=1)[50:, :3])
    np.testing.assert_allclose(measured, np.sort(distances, axis=1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(measured, distances[np.arange(150)[:, None], near], rtol=1e-5)


def test_equal_rows_are_found_wherever_they_are():
    x = np.concatenate([1e4 + normal(0, 40, 5), np.repeat(normal(1, 30, 5), 20, axis=0), [[1e4 + 50] * 5]])
    near, distances = neighbours.nearest_others(x, 12, device="cpu", progress=False)
    assert not distances[40:640].any() and distances[:40].all()
    assert ((near[40:640] - 40) // 20 == np.arange(600)[:, None] // 20).all()  # each in its own twenty


def test_a_row_for_each_layer_and_labels_only_where_they_are_given():
    class Poison(np.ndarray):
        __hash__ = None

        def __array_finalize__(self, _):
            pass

        def __getitem__(self, _):
            raise AssertionError("labels were read")

        __eq__ = __getitem__

    labels = np.arange(60) % 3
    layers = {0: normal(0, 60, 5), 2: torus(0, 60, 2), 3: normal(1, 60, 70)}
    features = Features(layers, labels, np.arange(60))
    table = measure_layers(features, labels=labels, neighbours=5, control="c", **QUIET)
    for row, x in zip(table.to_dict("records"), layers.values(), strict=True):
        parts = intrinsic_dimension(x, **QUIET) | label_overlap(x, labels, neighbours=5, **QUIET)
        parts |= {"effective_rank": effective_rank(x), "participation_ratio": participation_ratio(x), "control": "c"}
        assert {name: row[name] for name in parts} == pytest.approx(parts)
    assert table.layer.tolist() == [0, 2, 3] and table.n_features.tolist() == [5, 12, 70] and set(table.n) == {60}
    object.__setattr__(features, "labels", labels.view(Poison))
    blind = measure_layers(features, neighbours=5, control="c", **QUIET)
    cka(features, **QUIET)
    assert blind[list(geometry.OVERLAP)].isna().all(axis=None)
    shared = [name for name in table if name not in geometry.OVERLAP]
    assert blind[shared].equals(table[shared])


def stored(root, name, layers, index, fingerprint="f" * 64):
    """A store of two parts with these layers."""
    splits = {"train": (fingerprint, len(index))}
    points = {"ln_1": list(layers), "ln_2": [0]}
    key = FeatureKey(name, "w", "p", 4, "r", "c", "i", splits, points, "mean", "sos", "float32")
    store = StoreWriter.create(root, key, {"train": 2})
    columns = {f"ln_1.{layer}": x for layer, x in layers.items()} | {"ln_2.0": layers[0]}
    stats = dict.fromkeys(columns, [1.0, 0.0, 0])
    for number, rows in enumerate(np.array_split(np.arange(len(index)), 2)):
        part = {name: x[rows] for name, x in columns.items()}
        store.write_part("train", number, index[rows], None, part, stats)
    return StoredLayers(FeatureStore.open(store.path), "train")


def test_a_store_is_measured_a_layer_at_a_time(tmp_path, monkeypatch):
    layers = {0: normal(0, 60, 4), 1: torus(0, 60, 2).astype(np.float32), 7: normal(1, 60, 3)}
    ours = stored(tmp_path, "ours", layers, np.arange(60))
    assert list(ours) == [0, 1, 7] and len(ours) == 3
    pd.testing.assert_frame_equal(measure_layers(ours, **QUIET), measure_layers(layers, **QUIET))
    whole = cka(ours, batch=10, **QUIET)
    pd.testing.assert_frame_equal(whole, cka(layers, batch=10, **QUIET))
    reads = []
    monkeypatch.setattr(FeatureStore, "layer", lambda self, point, layer, split: reads.append(layer) or layers[layer])
    monkeypatch.setattr("igpt_lab.probing.cka.GROUP", 3 * 10 * 4 * 4)  # four of the six minibatches of ten images
    pd.testing.assert_frame_equal(cka(ours, batch=10, **QUIET), whole)
    assert reads == [0] + 2 * [0, 1, 7]  # the first, to know its width


def test_stores_of_other_images_are_refused(tmp_path):
    layers = {0: normal(0, 8, 3)}
    ours, theirs = stored(tmp_path, "a", layers, np.arange(8)), stored(tmp_path, "b", layers, np.arange(8))
    assert cka(ours, theirs, **QUIET).cka[0] == pytest.approx(1)
    moved, recoded = (
        stored(tmp_path, "c", layers, np.arange(1, 9)),
        stored(tmp_path, "d", layers, np.arange(8), "e" * 64),
    )
    with pytest.raises(ValueError, match="8 of 8 rows are of different images"):
        cka(ours, moved, **QUIET)
    with pytest.raises(ValueError, match=r"fingerprints ffffffff and eeeeeeee.*dict\(layers\)"):
        cka(ours, recoded, **QUIET)
    assert cka(ours, dict(recoded), **QUIET).cka[0] == pytest.approx(1)
    with pytest.raises(KeyError, match="no point 'mlp_out'; it has"):
        StoredLayers(ours.store, "train", point="mlp_out")


def test_meta_device():
    with torch.device("meta"):
        x = torch.empty(30, 4)
    near, distances, sure = neighbours._search(x, 5, False)
    assert near.is_meta and distances.is_meta and near.shape == distances.shape == (30, 5) and sure.shape == (30,)
    near, distances = neighbours._search_directly(x, torch.arange(4, device="meta"), 5, False)
    assert near.is_meta and distances.is_meta and near.shape == distances.shape == (4, 5)
    grams = _centred_grams(torch.empty(3, 6, 4, device="meta"))
    assert grams.is_meta and grams.shape == (3, 36)


def test_bad_input():
    x = normal(0, 20, 3)
    with pytest.raises(ValueError, match=r"minibatches of 2; 4 are needed"):
        cka({0: x}, batch=2, **QUIET)
    with pytest.raises(ValueError, match="layer 1 is the same for all 20 images"):
        cka({0: x, 1: np.ones((20, 4))}, **QUIET)
    with pytest.raises(ValueError, match="layer 0 has values that are not finite"):
        measure_layers({0: np.full((9, 2), np.inf)}, **QUIET)
    for measure in (measure_layers, cka):
        with pytest.raises(ValueError, match=r"layer 1 has shape \(9, 3\); expected \(20, D\)"):
            measure({0: x, 1: x[:9]}, **QUIET)
        with pytest.raises(TypeError, match="layers of type ndarray; expected Features, or {number: array"):
            measure(x, **QUIET)
    with pytest.raises(TypeError, match="layers of type ndarray"):
        cka({0: x}, x, **QUIET)
    with pytest.raises(ValueError, match="got no layers"):
        measure_layers({}, **QUIET)
    with pytest.raises(ValueError, match=r"x has shape \(20,\)"):
        effective_rank(x[:, 0])
    with pytest.raises(ValueError, match="20 different images; expected at least 22 to look for 20"):
        label_overlap(x, np.zeros(20), neighbours=19, **QUIET)
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for 20 images"):
        label_overlap(x, np.zeros(3), **QUIET)
    with pytest.raises(ValueError, match="discard=1"):
        intrinsic_dimension(x, discard=1, **QUIET)
    with pytest.raises(ValueError, match="too discrete"):
        intrinsic_dimension(np.array([[i // 8, i // 4 % 2, i // 2 % 2, i % 2] for i in range(16)]), **QUIET)
    with pytest.raises(ValueError, match="2 different images"):
        intrinsic_dimension(np.repeat(x[:2], 9, axis=0), **QUIET)
