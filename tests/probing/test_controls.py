"""Controls against scikit-learn, slow loops, laws of chance and cases solved by hand."""

import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from igpt_lab.core.display import MODEL
from igpt_lab.core.significance import compare, permutation_p
from igpt_lab.probing import controls
from igpt_lab.probing.controls import compare_drops, probe_permuted, selectivity
from igpt_lab.probing.features import Features
from igpt_lab.probing.kernel import probe_svm
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult

QUIET = {"progress": False}


def planted(n, seed, strengths, classes=4) -> Features:
    """Layer l shows the class with strength `strengths[l]` in four of six dimensions; labels 0, 2, 4, ..."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = 3 * np.eye(classes, 6)[labels]
    layers = {i: (s * means + generator.normal(size=(n, 6))).astype(np.float32) for i, s in enumerate(strengths)}
    return Features(layers, 2 * labels, np.arange(n))


def result_by_hand(chosen, *right: str) -> ProbeResult:
    """Layers 0, 1, ... with '1' where a test image is right."""
    correct = {layer: np.array(list(row)) == "1" for layer, row in enumerate(right)}
    return ProbeResult(pd.DataFrame({"layer": list(correct), "control": MODEL}), correct, chosen)


def test_permuted_labels_fall_to_chance_whatever_the_features_know():
    train, test = planted(400, 0, (0, 1)), planted(2000, 1, (0, 1))
    result = probe_layers(train, test, Cs=[0.1], folds=2, **QUIET)
    table = probe_permuted(train, test, result, permutations=20, **QUIET)
    assert table.groupby("layer").draw.apply(list).tolist() == [list(range(20))] * 2
    means = table.groupby("layer").test_accuracy.mean()
    assert means.between(0.22, 0.28).all() and result.correct[1].mean() > 0.9
    of_layer = table[table.layer == 1].test_accuracy
    assert of_layer.nunique() > 10 and permutation_p(result.correct[1].mean(), of_layer) == 1 / 21
    assert permutation_p(result.correct[0].mean(), table[table.layer == 0].test_accuracy) > 1 / 21  # without a signal
    assert set(table.n_classes) == {4} and set(table.C) == {0.1} and table.converged.all()
    assert table[table.chosen].layer.unique().tolist() == [result.chosen] == [1]


@pytest.mark.parametrize("least", [0, 2**18])  # layers side by side, and in one stack
def test_the_bar_of_permutations_is_drawn_by_the_thread_that_asks_and_ends_full(least, monkeypatch):
    monkeypatch.setattr("igpt_lab.core.side_by_side.LEAST", least)
    drawn, real = [], controls.tqdm.update
    monkeypatch.setattr(
        controls.tqdm, "update", lambda bar, n: drawn.append((threading.current_thread(), bar.n + n)) or real(bar, n)
    )
    train, test = planted(40, 0, (0, 1, 1)), planted(20, 1, (0, 1, 1))
    result = probe_layers(train, test, Cs=[0.1], folds=2, **QUIET)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table = probe_permuted(train, test, result, permutations=3)
    finally:
        torch.set_num_threads(before)
    assert {thread for thread, _ in drawn} == {threading.current_thread()} and drawn[-1][1] == len(table) == 9
    assert table.draw.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_permutation_is_the_probe_of_labels_in_another_order_with_each_layers_own_C():
    train, test = planted(120, 0, (0.5, 1)), planted(300, 1, (0.5, 1))
    result = probe_layers(train, test, Cs=[1.0], folds=2, **QUIET)
    result = replace(result, table=result.table.assign(C=[0.01, 10.0]))
    table = probe_permuted(train, test, result, permutations=2, seed=5, **QUIET)
    for row in table.itertuples():
        shuffled = np.random.default_rng([5, 7, row.draw]).permutation(train.labels)
        assert sorted(shuffled) == sorted(train.labels) and (shuffled != train.labels).any()
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=[0.01, 10][row.layer], tol=1e-8, max_iter=9999))
        x, others = (features.layers[row.layer].astype(float) for features in (train, test))
        theirs = pipeline.fit(x, shuffled).score(others, test.labels)
        assert row.test_accuracy == pytest.approx(theirs, abs=1 / 300)
    only = probe_permuted(train, test, result, permutations=2, layers=[1], seed=5, **QUIET)
    pd.testing.assert_frame_equal(only, table[table.layer == 1].reset_index(drop=True))
    with pytest.raises(ValueError, match="layer 7 is not among these features"):
        probe_permuted(train, test, result, layers=[7], **QUIET)


def test_the_p_of_permutations_counts_the_real_labels_among_them():
    assert permutation_p(0.5, [0.1, 0.5, 0.7, 0.2]) == 3 / 5  # two reach it, and itself
    assert permutation_p(0.9, [0.1] * 9) == 1 / 10
    assert permutation_p(0.0, [0.1, 0.2]) == 1


def test_drops_by_hand():
    trained = result_by_hand(1, "0000", "1110", "1000")  # loses 2 of 4
    falls, holds = result_by_hand(0, "1100", "0000", "0100"), result_by_hand(2, "1111", "0000", "0011")
    comparison = compare_drops(trained, [falls, holds])
    assert (comparison.chosen_layer, comparison.last_layer, comparison.drop, comparison.n_test) == (1, 2, 0.5, 4)
    assert (comparison.control_layers, comparison.control_drops) == ([0, 2], [0.25, 0])
    assert (comparison.control_mean, comparison.control_lowest, comparison.control_highest) == (0.125, 0, 0.25)
    assert comparison.difference == 0.375 and comparison.low < 0.375 < comparison.high
    at = compare_drops(trained, [falls, holds], layer=1)
    assert at.control_drops == [-0.25, -0.5] and at.difference == 0.875
    with pytest.raises(ValueError, match="results on 2 and 4 test images; expected the same ones"):
        compare_drops(trained, [result_by_hand(0, "11", "00", "01")])


def test_the_interval_of_a_difference_of_drops_is_the_loop_over_resampled_images():
    generator = np.random.default_rng(0)
    results = []
    for accuracies in ((0.6, 0.8, 0.7), (0.5, 0.45, 0.44), (0.5, 0.52, 0.47)):
        ease = generator.random(500)
        results.append(ProbeResult(pd.DataFrame(), {i: ease < a for i, a in enumerate(accuracies)}, 1))
    comparison = compare_drops(results[0], results[1:])
    images = [
        np.mean([results[0].correct[1][i], -1.0 * results[0].correct[2][i]]) * 2
        - np.mean([1.0 * control.correct[1][i] - control.correct[2][i] for control in results[1:]])
        for i in range(500)
    ] + [1, -1]  # and the two images that are added
    draws = [np.mean([images[i] for i in generator.integers(0, 502, 502)]) for _ in range(2000)]
    assert comparison.difference == pytest.approx(np.mean(images[:-2]))
    np.testing.assert_allclose([comparison.low, comparison.high], np.quantile(draws, [0.025, 0.975]), atol=0.006)


def test_selectivity_is_the_paired_difference_of_each_layer():
    table = selectivity(result_by_hand(1, "1100", "1110"), result_by_hand(0, "0100", "1001"))
    assert table.selectivity.tolist() == [0.25, 0.25] and table.chosen.tolist() == [False, True]
    assert table.test_accuracy.tolist() == [0.5, 0.75] and table.control_accuracy.tolist() == [0.25, 0.5]
    paired = compare(np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 1], bool))
    assert table.loc[1, ["selectivity_low", "selectivity_high"]].tolist() == [paired.low, paired.high]
    assert (table.control_low < table.control_accuracy).all() and (table.low < table.test_accuracy).all()


def test_the_svm_is_scikit_learns_grid_search():
    train, test = planted(150, 0, (0.3, 0.6)), planted(200, 1, (0.3, 0.6))
    result = probe_svm(train, test, Cs=(0.1, 1, 10), gammas=(0.3, 1), seed=2, **QUIET)
    folds = StratifiedKFold(3, shuffle=True, random_state=2)
    for row in result.table.itertuples():
        x = train.layers[row.layer]
        scale = 1 / (6 * x.var())
        grid = {"C": [0.1, 1, 10], "gamma": [0.3 * scale, scale]}
        search = GridSearchCV(SVC(), grid, cv=folds).fit(x, train.labels)
        assert row.validation_accuracy == pytest.approx(search.best_score_)
        machine = SVC(C=row.C, gamma=row.gamma * scale).fit(x, train.labels)
        np.testing.assert_array_equal(result.predicted[row.layer], machine.predict(test.layers[row.layer]))
        same = np.isclose(search.cv_results_["mean_test_score"], search.best_score_)
        assert {"C": row.C, "gamma": pytest.approx(row.gamma * scale)} in np.array(search.cv_results_["params"])[same]
    assert result.chosen == 1 and set(result.table.n_validation) == {150} and result.folds.shape == (3, 2)


def test_the_svm_sees_what_no_linear_probe_can():
    generator = np.random.default_rng(0)
    x = generator.uniform(-1, 1, (600, 2)).astype(np.float32)
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    halves = [Features({0: x[rows]}, labels[rows], np.arange(300)) for rows in (slice(300), slice(300, None))]
    svm, linear = probe_svm(*halves, control="x", **QUIET), probe_layers(*halves, folds=2, **QUIET)
    assert svm.table.test_accuracy[0] > 0.95 and linear.table.test_accuracy[0] < 0.7
    of_logits = {"iterations", "objective", "gradient", "log_loss", "log_loss_low", "log_loss_high"}
    columns = set(linear.table) - of_logits | {"gamma"}
    assert set(svm.table) == columns and svm.table.converged.all() and svm.table.control[0] == "x"
    doubled = probe_svm(*[replace(half, layers={0: 255 * half.layers[0]}) for half in halves], **QUIET)
    np.testing.assert_array_equal(doubled.predicted[0], svm.predicted[0])  # the unit is of no account
