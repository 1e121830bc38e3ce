"""Held-out bits of every probe against scikit-learn's log loss of the same fit."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_streaming import QUICK, rows_of, store  # noqa: F401  # a fixture

from igpt_lab.features.store import FeatureStore
from igpt_lab.probing.controls import probe_permuted
from igpt_lab.probing.features import Features
from igpt_lab.probing.few_labels import probe_few_labels
from igpt_lab.probing.kernel import probe_svm
from igpt_lab.probing.neighbours import probe_neighbours
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.stopped import CONVERGED, repeat_stopped
from igpt_lab.probing.streaming import probe_streaming

QUIET = {"progress": False}


def planted(n: int, seed: int, classes: int = 3) -> Features:
    """Two layers, of which the second shows the class better; classes are 0, 2, 4."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.eye(classes, 5)[labels]
    layers = {3 * i: (s * means + generator.normal(size=(n, 5))).astype(np.float32) for i, s in enumerate((0.5, 1.5))}
    return Features(layers, 2 * labels, np.arange(n))


TRAIN, TEST = planted(200, 0), planted(150, 1)


def bits_by_scikit_learn(x, y, x_test, y_test, C: float) -> float:
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-9, max_iter=9999)).fit(x.astype(float), y)
    return log_loss(y_test, fit.predict_proba(x_test.astype(float)), labels=np.unique(y)) / np.log(2)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_bits_of_a_layer_are_the_log_loss_of_scikit_learn(classes):
    train, test = planted(200, 0, classes), planted(150, 1, classes)
    result = probe_layers(train, test, Cs=[0.1], folds=3, **QUIET)
    for row in result.table.itertuples():
        layer = row.layer
        expected = bits_by_scikit_learn(train.layers[layer], train.labels, test.layers[layer], test.labels, row.C)
        assert row.log_loss == pytest.approx(expected, abs=2e-5) and 0 < expected < np.log2(classes)
        bits = result.log_loss[layer]
        interval = stats.t.interval(0.95, 149, bits.mean(), bits.std(ddof=1) / np.sqrt(150))
        assert (row.log_loss_low, row.log_loss_high) == pytest.approx(interval)
    table = result.table.set_index("layer")
    assert table.log_loss[3] < table.log_loss[0]


def test_without_a_signal_the_bits_are_those_of_the_shares_of_classes():
    """Features that never vary leave the intercepts alone, which are the shares of the training labels."""
    layers, labels = {0: np.ones((90, 2), np.float32)}, np.repeat([0, 1], [60, 30])
    train, test = Features(layers, labels, np.arange(90)), Features(layers, 1 - labels, np.arange(90))
    row = probe_layers(train, test, folds=2, **QUIET).table.iloc[0]
    assert row.log_loss == pytest.approx(-(np.log2(2 / 3) + 2 * np.log2(1 / 3)) / 3, abs=1e-4)


def test_a_class_that_train_has_not_costs_infinitely_many_bits(capsys):
    labels = TEST.labels.copy()
    labels[:7] = 9
    result = probe_layers(TRAIN, replace(TEST, labels=labels), folds=2, **QUIET)
    assert np.isinf(result.log_loss[3]).sum() == 7 and np.isinf(result.log_loss[3][:7]).all()
    assert result.table.log_loss.eq(np.inf).all() and result.table.log_loss_low.isna().all()
    assert "count as wrong" in capsys.readouterr().err


def test_the_bits_of_permuted_labels():
    result = probe_layers(TRAIN, TEST, Cs=[1.0], folds=2, **QUIET)
    for row in probe_permuted(TRAIN, TEST, result, permutations=2, seed=5, **QUIET).itertuples():
        shuffled = np.random.default_rng([5, 7, row.draw]).permutation(TRAIN.labels)
        x, x_test = TRAIN.layers[row.layer], TEST.layers[row.layer]
        expected = bits_by_scikit_learn(x, shuffled, x_test, TEST.labels, 1.0)
        assert row.log_loss == pytest.approx(expected, abs=2e-5) and row.log_loss_low < row.log_loss


def test_the_bits_of_few_labels():
    result = probe_few_labels(TRAIN, TEST, ks=(4, 10), draws=2, layers=[0, 3], **QUIET)
    for row, bits in zip(result.table.itertuples(), result.log_loss, strict=True):
        rows = result.subsets[row.k, row.draw]
        x, x_test = TRAIN.layers[row.layer][rows], TEST.layers[row.layer]
        expected = bits_by_scikit_learn(x, TRAIN.labels[rows], x_test, TEST.labels, row.C)
        assert row.log_loss == pytest.approx(expected, abs=2e-4) and row.log_loss == pytest.approx(bits.mean())


def test_the_bits_of_a_streamed_probe_are_those_of_its_weights(store, tmp_path):  # noqa: F811
    from safetensors.torch import load_file

    result = probe_streaming(store, **QUICK, state=tmp_path)
    weights = load_file(tmp_path / "refit.safetensors")["weights"].numpy().astype(float)
    train, test = (
        [store.layer("ln_1", layer, split).astype(float) for layer in range(3)] for split in ("train", "test")
    )
    for layer, row in enumerate(result.table.itertuples()):
        z = (test[layer] - train[layer].mean(0)) / train[layer].std(0)
        logits = z @ weights[layer, :-1, 0] + weights[layer, -1, 0]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert row.log_loss == pytest.approx(log_loss(store.labels("test"), shares) / np.log(2), rel=1e-4)


def test_the_bits_of_a_fit_at_its_optimum_do_not_depend_on_the_order():
    table = repeat_stopped(TRAIN, TEST, 3, 1.0, orders=2, threads=(1,), **QUIET)
    expected = bits_by_scikit_learn(TRAIN.layers[3], TRAIN.labels, TEST.layers[3], TEST.labels, 1.0)
    np.testing.assert_allclose(table.log_loss[table.solver == CONVERGED], expected, atol=2e-5)


def test_probes_without_probabilities_have_no_bits():
    for result in (probe_neighbours(TRAIN, TEST, folds=2, **QUIET), probe_svm(TRAIN, TEST, folds=2, **QUIET)):
        assert "log_loss" not in result.table and result.log_loss == {}


def test_a_layer_that_lies_on_the_disk_is_read_again_and_not_kept(store, monkeypatch):  # noqa: F811
    whole = [Features.from_store(store, split) for split in ("train", "test")]
    monkeypatch.setattr("igpt_lab.probing.features.LOADED", 0)
    lazily = [Features.from_store(store, split) for split in ("train", "test")]
    reads, layer = [], FeatureStore.layer
    monkeypatch.setattr(FeatureStore, "layer", lambda *arguments: reads.append(arguments[2:]) or layer(*arguments))
    table = probe_layers(*lazily, folds=2, **QUIET).table
    assert reads.count((0, "test")) == 2
    monkeypatch.undo()
    assert table.equals(probe_layers(*whole, folds=2, **QUIET).table)
