"""Probes against scikit-learn's own pipeline, tests of significance against cases solved by hand."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from igpt_lab.core.display import MODEL, say_once
from igpt_lab.core.draws import spread
from igpt_lab.core.peaks import peak_set
from igpt_lab.core.significance import compare
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing import choosing, few_labels, neighbours, probes
from igpt_lab.probing.features import Features, stacks
from igpt_lab.probing.few_labels import probe_few_labels
from igpt_lab.probing.neighbours import probe_neighbours
from igpt_lab.probing.probes import control_task, probe_layers
from igpt_lab.probing.results import ProbeResult, compare_layers
from igpt_lab.probing.solvers import logistic
from igpt_lab.probing.solvers.linear_probe import LinearProbe
from igpt_lab.probing.solvers.logistic import fit_folds, fit_logistic

QUIET = {"progress": False}
# what differs by rounding where layers are fitted one by one
ROUNDED = ["iterations", "objective", "gradient", "log_loss", "log_loss_low", "log_loss_high"]


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
    """With ten folds, and with the paper's tenth: scikit-learn's grid search over the same rows."""
    tenth = [stratified_split(TRAIN.labels, 0.1, seed=3)]
    for folds, rows in (10, StratifiedKFold(10, shuffle=True, random_state=3)), (1, tenth):
        result = probe_layers(TRAIN, TEST, Cs=(0.01, 1.0, 100.0), seed=3, folds=folds, **QUIET)
        for place, row in enumerate(result.table.itertuples()):
            x = TRAIN.layers[row.layer].astype(float)
            pipeline = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=10_000))
            peer = GridSearchCV(pipeline, {"logisticregression__C": [0.01, 1.0, 100.0]}, cv=rows).fit(x, TRAIN.labels)
            means, Cs = peer.cv_results_["mean_test_score"], np.array([0.01, 1.0, 100.0])
            tied = np.flatnonzero(means >= means.max() - 1e-12)
            assert row.C == Cs[tied[len(tied) // 2]] and row.validation_accuracy == pytest.approx(means.max())
            of_folds = [peer.cv_results_[f"split{fold}_test_score"][list(Cs).index(row.C)] for fold in range(folds)]
            np.testing.assert_allclose(result.folds[:, place], of_folds)
            correct = pipeline.set_params(logisticregression__C=row.C).fit(x, TRAIN.labels)
            np.testing.assert_array_equal(
                result.correct[row.layer], correct.predict(TEST.layers[row.layer]) == TEST.labels
            )
            assert row.test_accuracy == result.correct[row.layer].mean() and row.converged and row.n_features == 5
        assert result.chosen == 1 and result.table.chosen.tolist() == [False, True, False]
        assert set(result.table.n_validation) == {300 if folds == 10 else 30} and set(result.table.folds) == {folds}


def test_folds_are_as_many_as_the_smallest_class_has_rows():
    labels = np.repeat([0, 1, 2], [40, 3, 20])
    folds = choosing.folds_of(labels, 10, seed=0)
    assert len(folds) == 3 and sorted(np.concatenate([held for _, held in folds])) == list(range(63))
    for fit, held in folds:
        assert set(labels[fit]) == set(labels[held]) == {0, 1, 2} and not set(fit) & set(held)
    with pytest.raises(ValueError, match="class 1 has 1 row"):
        choosing.folds_of(np.repeat([0, 1], [5, 1]), 10, seed=0)
    with pytest.raises(ValueError, match="class 'dog' has 1 row"):
        choosing.folds_of(np.repeat([0, 1], [5, 1]), 10, seed=0, names=("cat", "dog"))
    with pytest.raises(ValueError, match="folds=0; expected 1"):
        choosing.folds_of(labels, 0, seed=0)


@pytest.mark.parametrize("shared", [True, False])
def test_folds_fitted_together_are_the_folds_fitted_alone(monkeypatch, shared):
    """The same minimum, whatever the start: a convex problem has one."""
    monkeypatch.setattr(logistic, "SAVED", 1e9 if shared else 0)
    x, Cs = np.stack([TRAIN.layers[layer] for layer in (0, 1)]), np.array([[0.01, 1.0], [0.1, 10.0]])
    folds = choosing.folds_of(TRAIN.labels, 5, seed=0)
    for fits, (fit, held) in zip(fit_folds(x, TRAIN.labels, folds, Cs, tol=1e-6), folds, strict=True):
        alone = fit_logistic(x[:, fit], TRAIN.labels[fit], Cs, tol=1e-6)
        assert fits.converged.all()
        np.testing.assert_allclose(fits.objective, alone.objective, rtol=1e-6)
        np.testing.assert_allclose(fits.logits(x[0][held]), alone.logits(x[0][held]), atol=2e-3)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows", [120, 400])
def test_folds_know_nothing_of_what_they_hold_out(monkeypatch, shared, rows):
    """Labels drawn at random are predicted at chance, however weak the penalty and separable the rows."""
    monkeypatch.setattr(logistic, "SAVED", 1e9 if shared else 0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1, rows, 100)).astype(np.float32), rng.integers(3, size=rows)
    for strengths in ([0.1, 100.0], [1e4], [1e6]):
        folds = choosing.folds_of(y, 10, seed=0)
        fits = fit_folds(x, y, folds, np.array([strengths]), tol=choosing.CHOOSING)
        right = [fit.predict(x[0][held]) == y[held] for (_, held), fit in zip(folds, fits, strict=True)]
        assert np.abs(np.concatenate(right, 1).mean(1) - 1 / 3).max() < 4 * math.sqrt(2 / 9 / rows)


def test_test_labels_choose_nothing(monkeypatch):
    class Poison:
        def __getattribute__(self, name):
            raise AssertionError("test labels were read outside the one function")

    poisoned = planted(240, 1)
    object.__setattr__(poisoned, "labels", Poison())

    def stand_in(predictions, test, losses):
        right = {key: np.ones(len(predicted), bool) for key, predicted in predictions.items()}
        return right, {key: np.zeros(len(predicted)) for key, predicted in predictions.items()}

    for module in (probes, few_labels):
        monkeypatch.setattr(module, "meet_test", stand_in)
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
    seen, meet = [], probes.meet_test

    def noted(predictions, test, losses):
        seen.append(predictions)
        return meet(predictions, test, losses)

    for module in (probes, few_labels):
        monkeypatch.setattr(module, "meet_test", noted)
    shuffled = Features(TEST.layers, np.random.default_rng(5).permutation(TEST.labels), TEST.index)
    unseen = ["layer", "layer_rule", "C", "validation_accuracy", "converged"]
    one, two = (probe_few_labels(TRAIN, features, ks=(4, 60), draws=2, **QUIET).table for features in (TEST, shuffled))
    assert one[unseen].equals(two[unseen]) and not one.test_accuracy.equals(two.test_accuracy)
    results = [probe_layers(TRAIN, features, **QUIET) for features in (TEST, shuffled)]
    assert results[0].chosen == results[1].chosen
    for before, after in ((seen[0], seen[1]), (seen[2], seen[3])):
        assert len(before) > 0
        np.testing.assert_equal(before, after)


@pytest.mark.parametrize("probe", [probe_layers, probe_neighbours, partial(probe_few_labels, ks=(4,), draws=2)])
def test_classes_are_matched_by_name(probe, capsys):
    """Test's classes in another order, one of which train has not: the answers are those of the same numbers."""
    say_once.cache_clear()
    train, test = (replace(features, names=("ant", "bee", "cat")) for features in (TRAIN, TEST))
    back = np.array([2, 0, 1])  # from the numbers of `names` to those of `others`
    others = ("bee", "cat", "ant")
    shifted = replace(test, labels=back[test.labels], names=others)
    right, same = probe(train, test, **QUIET), probe(train, shifted, **QUIET)
    np.testing.assert_equal(same.correct, right.correct)
    assert capsys.readouterr().err == ""
    dog = replace(shifted, names=("bee", "dog", "ant"))
    wrong = probe(train, dog, **QUIET)
    cats = test.labels == 2
    for layer in range(len(right.correct)):
        np.testing.assert_array_equal(wrong.correct[layer], right.correct[layer] & ~cats)
    told = f"classes without rows in train: dog; the {cats.sum()} of {len(cats)} test images of these count as wrong\n"
    assert capsys.readouterr().err == told


def test_a_class_without_training_rows_is_said(capsys):
    few = TEST.labels.copy()
    few[:7] = 9
    result = probe_layers(TRAIN, replace(TEST, labels=few), **QUIET)
    assert not any(correct[:7].any() for correct in result.correct.values())
    assert "classes without rows in train: 9; the 7 of 240 test images" in capsys.readouterr().err


def test_train_given_as_test_is_said(capsys):
    say_once.cache_clear()
    constant = replace(TRAIN, layers={layer: np.ones_like(x) for layer, x in TRAIN.layers.items()})
    probe_layers(constant, constant, **QUIET)  # as position 0 is in any two sets of images
    probe_layers(TRAIN, TEST, **QUIET)
    assert "same images" not in capsys.readouterr().err
    probe_layers(TRAIN, replace(TRAIN, layers={layer: x.copy() for layer, x in TRAIN.layers.items()}), **QUIET)
    assert "train and test are the same images" in capsys.readouterr().err


def test_features_are_shown_in_a_line():
    assert repr(TRAIN) == f"<Features: {len(TRAIN.labels)} rows, 3 classes, layers 0..2>"


def test_permuted_labels_fall_to_chance():
    train, test = planted(3000, 0, (3.0,)), planted(3000, 1, (3.0,))
    row = probe_layers(train, test, permute_labels=True, control="permuted labels", **QUIET).table.iloc[0]
    assert row.control == "permuted labels" and abs(row.test_accuracy - 1 / 3) < 0.06


def test_a_probe_that_did_not_converge_is_marked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = probe_layers(TRAIN, TEST, max_iter=1, **QUIET).table
    assert not table.converged.any()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("standardise", [True, False])
def test_linear_probe_has_the_probabilities_of_scikit_learn(classes, standardise):
    generator = np.random.default_rng(0)
    y = np.arange(600) % classes
    mix = np.arange(1, 31)[:, None] ** -1.5 * np.linalg.qr(generator.normal(size=(30, 30)))[0]
    x = ((np.eye(classes, 30)[y] * 0.5 + generator.normal(size=(600, 30))) @ mix).astype(np.float32)
    scaled = StandardScaler().fit_transform(x.astype(float)) if standardise else x.astype(float)
    names = np.array(["d", "b", "a", "c"])[y]
    exact = LogisticRegression(C=10, tol=1e-11, max_iter=100_000).fit(scaled, names)
    probe = LinearProbe(C=10, standardise=standardise).fit(x, names)
    assert probe.converged_ and probe.classes_.tolist() == exact.classes_.tolist()
    np.testing.assert_allclose(probe.predict_proba(x), exact.predict_proba(scaled), atol=1e-4)
    np.testing.assert_allclose(probe.decision_function(x), exact.decision_function(scaled), atol=1e-2)
    assert probe.score(x, names) == exact.score(scaled, names)
    if standardise:  # what scikit-learn's default tolerance leaves
        loose = LogisticRegression(C=10, max_iter=10_000).fit(scaled, names).predict_proba(scaled)
        assert np.abs(loose - exact.predict_proba(scaled)).max() > 1e-3


@parametrize_with_checks([LinearProbe(max_iter=3000)])
def test_linear_probe_follows_the_conventions_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def test_a_probe_that_stops_early_warns_and_says_how_far_it_is():
    with pytest.warns(ConvergenceWarning, match="largest derivative .* after 2 iterations"):
        probe = LinearProbe(max_iter=2).fit(TRAIN.layers[0], TRAIN.labels)
    assert not probe.converged_ and probe.gradient_ > 1e-6 and probe.n_iter_ == 2


def test_the_grid_extends_itself_where_its_best_lies_at_an_edge(monkeypatch):
    asked = []

    def scores(x, y, folds, Cs, fitting, solver):
        asked.append(Cs.tolist())
        aims = np.array([1e-4, 1e3, 0.1])[np.asarray(x[:, 0, 0], int)][:, None]
        return (1 - np.abs(np.log10(Cs / aims)) / 10)[None], np.ones(Cs.shape, bool)

    monkeypatch.setattr(choosing, "_validate", scores)
    x = np.arange(3.0)[:, None, None]
    choices = choosing.choose_C(x, None, [None], (1e-2, 1e-1, 1.0), {})
    assert [C for C, *_ in choices] == pytest.approx([1e-4, 1e3, 0.1])
    assert len(asked[0][0]) == 3 and [len(Cs) for Cs in asked[1:]] == [2, 2, 2, 1]
    assert choosing.choose_C(x, None, [None], (1.0,), {})[0][0] == 1.0  # one C is no grid
    flat = {C: choosing.ChosenC(C, np.array([0.4, 0.6]), True) for C in (1e-2, 1e-1, 1.0)}
    assert choosing._beyond(flat, 10) is None  # an edge that is no better than the rest
    assert choosing._best(flat).C == 1e-1  # of equal ones the middle
    assert choosing.chosen_layer(dict.fromkeys((3, 5, 6, 8, 9), flat[1.0])) == 6


def test_layers_in_stacks_equal_layers_one_by_one_and_side_by_side(monkeypatch):
    together = probe_layers(TRAIN, TEST, **QUIET).table
    monkeypatch.setattr("igpt_lab.core.side_by_side.LEAST", 0)
    side_by_side = probe_layers(TRAIN, TEST, **QUIET).table
    monkeypatch.setattr("igpt_lab.core.side_by_side.MOST", 0)  # layers larger than those of middle size are alone too
    assert [len(layers) for layers, _ in stacks(TRAIN, torch.device("cpu"))] == [1] * len(TRAIN.layers)
    monkeypatch.undo()
    few = probe_few_labels(TRAIN, TEST, ks=(4,), draws=2, **QUIET).table
    monkeypatch.setattr("igpt_lab.probing.features.STACKED", 1)
    alone = probe_layers(TRAIN, TEST, **QUIET).table
    for table in (side_by_side, alone):
        assert table.drop(columns=ROUNDED).equals(together.drop(columns=ROUNDED))
        assert table.objective.to_numpy() == pytest.approx(together.objective.to_numpy(), rel=1e-6)
        assert table.log_loss.to_numpy() == pytest.approx(together.log_loss.to_numpy(), rel=1e-4)
    assert probe_few_labels(TRAIN, TEST, ks=(4,), draws=2, **QUIET).table.equals(few)


def test_the_number_of_threads_changes_no_bit_where_layers_run_side_by_side(monkeypatch):
    monkeypatch.setattr("igpt_lab.core.side_by_side.LEAST", 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(probe_layers(TRAIN, TEST, **QUIET))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert result.table.equals(results[0].table)
        for layer, right in results[0].correct.items():
            assert (result.correct[layer] == right).all()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_neighbours_vote_as_those_of_scikit_learn(k):
    result = probe_neighbours(TRAIN, TEST, ks=(k,), **QUIET)
    for layer, x in TRAIN.layers.items():
        peer = make_pipeline(StandardScaler(), KNeighborsClassifier(k)).fit(x, TRAIN.labels)
        shares = peer.predict_proba(TEST.layers[layer])
        top = np.sort(shares, 1)
        clear = top[:, -1] > top[:, -2]  # of equal votes scikit-learn takes the first class
        assert clear.mean() > 0.5
        right = peer.predict(TEST.layers[layer]) == TEST.labels
        np.testing.assert_array_equal(result.correct[layer][clear], right[clear])
    assert result.table.k.eq(k).all() and result.chosen == 1


def test_equal_votes_go_to_nearer_rows_and_k_is_chosen_on_held_out_rows():
    x, y = np.array([[0.0], [1.0], [2.5], [3.0]]), np.array([1, 0, 0, 1])
    assert (
        neighbours._vote(x, y, np.array([[0.4], [0.6], [2.9]]), [1, 2], torch.device("cpu")).tolist() == [[1, 0, 1]] * 2
    )
    noisy = planted(300, 0, (0.3, 0.6)), planted(240, 1, (0.3, 0.6))
    assert probe_neighbours(*noisy, **QUIET).table.k.min() > 1


def test_a_control_task_is_a_function_of_the_pixels_alone():
    pixels = [Features({0: features.layers[1]}, features.labels, features.index) for features in (TRAIN, TEST)]
    train, test = control_task(*pixels, types=6, seed=0)
    assert np.bincount(train, minlength=3).all() and len(train) == 300 and len(test) == 240
    again = control_task(*pixels, types=6, seed=0)
    np.testing.assert_array_equal(train, again[0])
    shuffled = pixels[0].relabelled(np.random.default_rng(1).permutation(TRAIN.labels))
    np.testing.assert_array_equal(control_task(shuffled, pixels[1], types=6)[0], train)
    result = probe_layers(pixels[0].relabelled(train), pixels[1].relabelled(test), **QUIET)
    assert result.table.test_accuracy[0] > 0.5  # far above chance, a third: pixels tell it
    with pytest.raises(ValueError, match="one for each row"):
        pixels[0].relabelled(train[:-1])


def test_layers_side_by_side():
    joined = TRAIN.joined([0, 1, 2])
    assert list(joined.layers) == [1]
    np.testing.assert_array_equal(joined.layers[1], np.hstack([TRAIN.layers[i] for i in range(3)]))
    assert probe_layers(joined, TEST.joined([0, 1, 2]), **QUIET).table.n_features[0] == 15
    with pytest.raises(ValueError, match="layer 7"):
        TRAIN.joined([0, 7])


def test_a_large_store_is_read_a_layer_at_a_time_with_the_same_result(monkeypatch, tmp_path):
    key = FeatureKey(
        model="m", weights="", palette="", size=0, resample="", crop="", images="i",
        splits={"train": ("", 300), "test": ("", 240)}, layers={"ln_1": [0, 1, 2]}, pool="mean", alignment="sos",
        dtype="float32",
    )  # fmt: skip
    store = StoreWriter.create(tmp_path, key, {"train": 1, "test": 1})
    for split, source in (("train", TRAIN), ("test", TEST)):
        features = {f"ln_1.{layer}": x for layer, x in source.layers.items()}
        store.write_part(split, 0, source.index, source.labels, features, dict.fromkeys(features, [0.0, 0.0, 0]))
    store, read = FeatureStore.open(store.path), []
    monkeypatch.setattr("igpt_lab.probing.features.LOADED", 0)
    monkeypatch.setattr("igpt_lab.probing.features.STACKED", 1)
    real = FeatureStore.layer
    monkeypatch.setattr(FeatureStore, "layer", lambda *arguments: read.append(arguments[2]) or real(*arguments))
    train, test = (Features.from_store(store, split) for split in ("train", "test"))
    before = len(read)
    table = probe_layers(train, test, **QUIET).table
    assert before == 0 and len(read) == 3 * 3  # each layer of train once, of test again when its labels are known
    monkeypatch.undo()
    whole = probe_layers(TRAIN, TEST, **QUIET).table
    assert table.drop(columns=ROUNDED).equals(whole.drop(columns=ROUNDED))


def test_the_rows_say_which_layers_may_be_the_best():
    result = probe_layers(TRAIN, TEST, **QUIET)
    assert result.table[result.table.in_peak_set].layer.tolist() == peak_set(result.correct).layers
    assert result.table[result.table.chosen].in_peak_set.all()


def test_comparison_by_hand():
    best, last = np.zeros(20, bool), np.zeros(20, bool)
    best[:14], last[:4], last[14:15] = True, True, True  # 10 only best, 1 only last
    chosen = compare_layers(ProbeResult(None, {0: best, 3: best, 5: last}, 3))
    assert (chosen.chosen_layer, chosen.last_layer, chosen.only_chosen, chosen.only_last) == (3, 5, 10, 1)
    assert chosen.difference == pytest.approx(9 / 20)
    assert chosen.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    assert chosen.low < 9 / 20 < chosen.high and np.isnan([chosen.choice_low, chosen.choice_high]).all()
    alike = compare(best, last, n_boot=500, seed=2)
    again = compare_layers(ProbeResult(None, {0: best, 3: last}, 0), n_boot=500, seed=2)
    assert (again.low, again.high, again.n_test) == (alike.low, alike.high, 20)
    same = compare_layers(ProbeResult(None, {0: best, 1: best}, 0))
    assert same.p_value == 1 and same.low < same.difference == 0 < same.high
    alone = compare_layers(ProbeResult(None, {0: last, 1: best}, 1))  # the last layer is the chosen one
    assert (alone.low, alone.difference, alone.high) == (0, 0, 0) and "[" not in repr(alone)
    assert "difference none, as the chosen layer is the last" in repr(alone)


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
    for (_, row), right in zip(table.iterrows(), result.correct, strict=True):
        assert row.test_accuracy == right.mean()
    rows = table.query("k == 60 and layer_rule == 'fixed' and layer == 2")
    share = 80 / 60 / 3  # 3 * 60 labels of 100 rows: 80 of them twice, each shared by one of three pairs
    summary = result.summary().loc[MODEL, 60, "fixed", "2"]
    of_draws = spread([result.correct[i] for i in rows.index], overlap=share)
    expected = [rows.test_accuracy.mean(), rows.test_accuracy.std(), 3, of_draws.low, of_draws.high]
    both = [of_draws.low_all, of_draws.high_all, share]
    assert summary.tolist() == pytest.approx(expected + both)
    assert set(table.overlap[table.k < 60]) == {0} and (rows[["low_all", "high_all", "overlap"]] == both).all(axis=None)
    again = probe_few_labels(TRAIN, TEST, ks=(4,), draws=3, layers=[0, 2], **QUIET)
    assert again.table.equals(table[table.k == 4].reset_index(drop=True))


def test_draws_share_no_rows_where_there_are_enough_and_a_layer_is_fixed_once():
    result = probe_few_labels(TRAIN.joined(1), TEST.joined(1), ks=(4, 50, 60), draws=2, **QUIET)
    shares = [len(np.intersect1d(result.subsets[k, 0], result.subsets[k, 1])) / (3 * k) for k in (4, 50, 60)]
    assert shares == [0, 0, pytest.approx(1 / 3)]
    assert result.table.groupby("k").overlap.first().tolist() == pytest.approx(shares)
    assert set(result.summary()["count"]) == {2}


def test_the_setting_of_the_paper():
    train, test = planted(1500, 0, (1.0,)), planted(60, 1, (1.0,))
    table = probe_few_labels(train, test, protocol="paper", ks=(7,), **QUIET).table
    assert table.groupby("k").draw.nunique().to_dict() == {4: 5, 25: 5, 400: 5}
    with pytest.raises(ValueError, match="protocol='papre'"):
        probe_few_labels(train, test, protocol="papre", **QUIET)


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
    with pytest.raises(ValueError, match="has 100 rows; 101 per class"):
        probe_few_labels(TRAIN, TEST, ks=(101,), **QUIET)
    named = replace(TRAIN, names=("a", "b", "c"))
    with pytest.raises(ValueError, match="of train are of class 'c' alone; a probe needs two classes or more"):
        probe_layers(replace(named, labels=np.full_like(TRAIN.labels, 2)), TEST, **QUIET)
    with pytest.raises(ValueError, match="of train are of class 0 alone; a probe"):
        probe_layers(replace(TRAIN, labels=np.zeros_like(TRAIN.labels)), TEST, **QUIET)
    with pytest.raises(ValueError, match="class a has 100 rows; .* give ks of at most 100"):
        probe_few_labels(named, replace(TEST, names=named.names), **QUIET)
    assert list(TRAIN.joined(1).layers) == [1]
    with pytest.raises(ValueError, match="expected the same"):
        probe_layers(TRAIN, planted(30, 1, (1.0,)), **QUIET)
    with pytest.raises(ValueError, match="2 rows without one"):
        Features({0: np.zeros((3, 2))}, np.array([0, -1, -1]), np.arange(3))
    narrow = Features({layer: x[:, :4] for layer, x in TEST.layers.items()}, TEST.labels, TEST.index)
    with pytest.raises(ValueError, match="layer 0 has 5 features in train, 4 in test"):
        probe_layers(TRAIN, narrow, **QUIET)
    with pytest.raises(ValueError, match=r"layer 9 is not among these features; expected one of \[0, 1, 2\]"):
        probe_few_labels(TRAIN, TEST, layers=[9], **QUIET)
    with pytest.raises(ValueError, match="layer 9 is not among"):
        compare_layers(ProbeResult(None, {0: np.ones(3, bool)}, 0), last=9)
