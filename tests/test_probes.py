"""Probes against scikit-learn's own pipeline, tests of significance against cases solved by hand."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from igpt_lab import probes
from igpt_lab.data import stratified_split
from igpt_lab.probes import Features, LinearProbe, ProbeResult, compare_layers, probe_few_labels, probe_layers
from igpt_lab.significance import compare

QUIET = {"progress": False}


def planted(n, seed, strengths=(0.3, 3.0, 1.0), classes=3) -> Features:
    """Layer l shows the class with strength `strengths[l]` in two of five dimensions of unequal scale."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.eye(classes, 5)
    layers = {
        layer: ((strength * means[labels] + generator.normal(size=(n, 5))) * [1, 50, 0.1, 1, 1]).astype(np.float32)
        for layer, strength in enumerate(strengths)
    }
    return Features(layers, labels, np.arange(1000, 1000 + n))


TRAIN, TEST = planted(300, 0), planted(240, 1)


def test_a_row_equals_the_pipeline_by_hand():
    result = probe_layers(TRAIN, TEST, Cs=(0.01, 1.0, 100.0), seed=3, **QUIET)
    fit, held = stratified_split(TRAIN.labels, 0.1, seed=3)
    for row in result.table.itertuples():
        x, scores = TRAIN.layers[row.layer].astype(float), {}
        for C in (0.01, 1.0, 100.0):
            pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-10, max_iter=10_000))
            scores[C] = pipeline.fit(x[fit], TRAIN.labels[fit]).score(x[held], TRAIN.labels[held])
        best = max(scores, key=scores.get)
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=best, tol=1e-10, max_iter=10_000))
        correct = pipeline.fit(x, TRAIN.labels).predict(TEST.layers[row.layer]) == TEST.labels
        assert row.C == best and row.validation_accuracy == pytest.approx(scores[best])
        np.testing.assert_array_equal(result.correct[row.layer], correct)
        assert row.test_accuracy == correct.mean() and row.converged and row.n_features == 5
    assert result.chosen == 1 and result.table.chosen.tolist() == [False, True, False]


def test_test_labels_choose_nothing(monkeypatch):
    class Poison:
        def __getattribute__(self, name):
            raise AssertionError("test labels were read outside the one function")

    poisoned = planted(240, 1)
    object.__setattr__(poisoned, "labels", Poison())

    def stand_in(predictions, test):
        return {key: np.ones(len(predicted), bool) for key, predicted in predictions.items()}

    monkeypatch.setattr(probes, "_meet_test", stand_in)
    for read in (lambda x: x.any(), lambda x: x[0], len, np.asarray, lambda x: np.zeros(240) == x):
        with pytest.raises((AssertionError, TypeError)):
            read(poisoned.labels)
    blind = probe_layers(TRAIN, poisoned, **QUIET)
    probe_few_labels(TRAIN, poisoned, ks=(4,), draws=2, **QUIET)
    monkeypatch.undo()
    unseen = ["layer", "C", "validation_accuracy", "chosen", "converged", "iterations"]
    assert blind.table[unseen].equals(probe_layers(TRAIN, TEST, **QUIET).table[unseen])
    with pytest.raises(AssertionError, match="outside the one function"):
        probe_layers(TRAIN, poisoned, **QUIET)


def test_shuffled_test_labels_change_no_choice_and_no_prediction(monkeypatch):
    seen, meet = [], probes._meet_test
    monkeypatch.setattr(
        probes, "_meet_test", lambda predictions, test: seen.append(predictions) or meet(predictions, test)
    )
    shuffled = Features(TEST.layers, np.random.default_rng(5).permutation(TEST.labels), TEST.index)
    unseen = ["layer", "layer_rule", "C", "validation_accuracy", "converged"]
    one, two = (probe_few_labels(TRAIN, each, ks=(4, 60), draws=2, **QUIET).table for each in (TEST, shuffled))
    assert one[unseen].equals(two[unseen]) and not one.test_accuracy.equals(two.test_accuracy)
    results = [probe_layers(TRAIN, each, **QUIET) for each in (TEST, shuffled)]
    assert results[0].chosen == results[1].chosen
    for before, after in ((seen[0], seen[1]), (seen[2], seen[3])):
        assert len(before) > 0
        np.testing.assert_equal(before, after)


def test_permuted_labels_fall_to_chance():
    train, test = planted(3000, 0, (3.0,)), planted(3000, 1, (3.0,))
    row = probe_layers(train, test, permute_labels=True, control="permuted labels", **QUIET).table.iloc[0]
    assert row.control == "permuted labels" and abs(row.test_accuracy - 1 / 3) < 0.06


def test_a_probe_that_did_not_converge_is_marked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = probe_layers(TRAIN, TEST, max_iter=1, **QUIET).table
    assert not table.converged.any()


def test_linear_probe_is_standardised_logistic_regression():
    x, y = TRAIN.layers[1], TRAIN.labels
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000)).fit(
        x.astype(float), y
    )
    probe = LinearProbe(0.1).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), pipeline.predict_proba(x.astype(float)), atol=1e-4)
    path = [each.predict_proba(x) for each in LinearProbe().path(x, y, [1e-3, 0.1])]
    np.testing.assert_allclose(path[1], probe.predict_proba(x), atol=0.01)  # a warm start goes to the same optimum
    assert probe.score(x, y) == (probe.predict(x) == y).mean()


def test_converged_means_at_the_optimum_also_for_correlated_features(monkeypatch):
    generator = np.random.default_rng(0)
    y, mix = np.arange(600) % 4, np.arange(1, 31)[:, None] ** -1.5 * np.linalg.qr(generator.normal(size=(30, 30)))[0]
    x = ((np.eye(4, 30)[y] * 0.5 + generator.normal(size=(600, 30))) @ mix).astype(np.float32)
    scaled = StandardScaler().fit_transform(x.astype(float))
    loose = LogisticRegression(C=10, tol=1e-4, max_iter=10_000).fit(scaled, y).predict_proba(scaled)
    exact = LogisticRegression(C=10, tol=1e-11, max_iter=100_000).fit(scaled, y).predict_proba(scaled)
    for parameters in (0, 1500):  # L-BFGS, Newton
        monkeypatch.setattr(probes, "NEWTON", parameters)
        found = LinearProbe(10).fit(x, y)
        assert found.converged_ and np.abs(found.predict_proba(x) - exact).max() < 1e-3
    assert np.abs(loose - exact).max() > 1e-3  # what scikit-learn's default leaves


def test_comparison_by_hand():
    best, last = np.zeros(20, bool), np.zeros(20, bool)
    best[:14], last[:4], last[14:15] = True, True, True  # 10 only best, 1 only last
    found = compare_layers(ProbeResult(None, {0: best, 3: best, 5: last}, 3))
    assert (found.best_layer, found.last_layer, found.only_best, found.only_last) == (3, 5, 10, 1)
    assert found.difference == pytest.approx(9 / 20)
    assert found.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    assert found.low < 9 / 20 < found.high
    alike = compare(best, last, n_boot=500, seed=2)
    again = compare_layers(ProbeResult(None, {0: best, 3: last}, 0), n_boot=500, seed=2)
    assert (again.low, again.high, again.n_test) == (alike.low, alike.high, 20)
    same = compare_layers(ProbeResult(None, {0: best, 1: best}, 0))
    assert same.p_value == 1 and same.low < same.difference == 0 < same.high


def test_few_labels_are_nested_stratified_and_kept():
    result = probe_few_labels(TRAIN, TEST, ks=(1, 4, 60), draws=3, layers=[0, 2], **QUIET)
    table = result.table
    assert len(table) == 3 * 3 * 3 and set(table[table.layer_rule == "fixed"].layer) == {0, 2}
    for draw in range(3):
        small, middle, large = (set(result.subsets[k, draw]) for k in (1, 4, 60))
        assert small < middle < large and len(large) == 180
        labels = TRAIN.labels[np.array(sorted(middle)) - 1000]
        assert np.bincount(labels).tolist() == [4, 4, 4]
    assert set(table[table.k == 1].C_rule) == {"fixed"} and set(table[table.k == 60].C_rule) == {"1 of 4 folds"}
    assert set(table[(table.k == 60) & (table.layer_rule == "chosen")].layer) == {1}
    again = probe_few_labels(TRAIN, TEST, ks=(4,), draws=3, layers=[0, 2], **QUIET)
    assert again.table.equals(table[table.k == 4].reset_index(drop=True))


def test_the_rule_names_the_folds_that_were_possible():
    table = probe_few_labels(TRAIN, TEST, ks=(1, 2, 3, 5, 60), draws=1, layers=[], **QUIET).table
    assert table.C_rule.tolist() == ["fixed", "2 of 2 folds", "3 of 3 folds", "4 of 4 folds", "1 of 4 folds"]


def test_few_label_rows_see_only_their_labels():
    result = probe_few_labels(TRAIN, TEST, ks=(4,), draws=1, **QUIET)
    others = np.setdiff1d(np.arange(300), result.subsets[4, 0] - 1000)
    spoiled = Features({layer: x.copy() for layer, x in TRAIN.layers.items()}, TRAIN.labels.copy(), TRAIN.index)
    for x in spoiled.layers.values():
        x[others] = 1e6
    assert probe_few_labels(spoiled, TEST, ks=(4,), draws=1, **QUIET).table.equals(result.table)
    row = result.table.query("layer_rule == 'fixed' and layer == 2").iloc[0]
    subset = result.subsets[4, 0] - 1000
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=row.C, tol=1e-10, max_iter=10_000))
    expected = pipeline.fit(TRAIN.layers[2][subset].astype(float), TRAIN.labels[subset]).score(
        TEST.layers[2], TEST.labels
    )
    assert row.test_accuracy == pytest.approx(expected)


def test_bad_input():
    with pytest.raises(ValueError, match="needs labels"):
        Features({0: np.zeros((3, 2))}, None, np.arange(3))
    with pytest.raises(ValueError, match=r"layer 0 is \(3, 2\) for 4 labels"):
        Features({0: np.zeros((3, 2))}, np.zeros(4, int), np.arange(4))
    with pytest.raises(ValueError, match="not finite"):
        Features({0: np.full((3, 2), np.nan)}, np.zeros(3, int), np.arange(3))
    with pytest.raises(ValueError, match="has 100 rows; 101 a class"):
        probe_few_labels(TRAIN, TEST, ks=(101,), **QUIET)
    with pytest.raises(ValueError, match="expected the same"):
        probe_layers(TRAIN, planted(30, 1, (1.0,)), **QUIET)
    with pytest.raises(ValueError, match="2 rows without one"):
        Features({0: np.zeros((3, 2))}, np.array([0, -1, -1]), np.arange(3))
    narrow = Features({layer: x[:, :4] for layer, x in TEST.layers.items()}, TEST.labels, TEST.index)
    with pytest.raises(ValueError, match=r"train has \{0: 5.*test \{0: 4"):
        probe_layers(TRAIN, narrow, **QUIET)
    with pytest.raises(ValueError, match=r"layer 9 is not among these features; expected one of \[0, 1, 2\]"):
        probe_few_labels(TRAIN, TEST, layers=[9], **QUIET)
    with pytest.raises(ValueError, match="layer 9 is not among"):
        compare_layers(ProbeResult(None, {0: np.ones(3, bool)}, 0), last=9)
