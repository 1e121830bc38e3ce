"""Tests and intervals against closed forms, enumeration, resampling, scipy, and their coverage by simulation."""

import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import binom, binomtest, dunnett, norm
from scipy.stats import t as student

from igpt_lab.core.draws import spread
from igpt_lab.core.peaks import layer_table, peak_set
from igpt_lab.core.significance import accuracy, compare, exact_interval
from igpt_lab.images.splits import few_per_class

ALPHA = 0.05


def pair(both, only_a, only_b, neither):
    cells = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    a, b = np.array(cells).T
    return a, b


def layers(n, accuracies, generator, shared=0.7):
    """Layer -> bool (n,): each layer right with its own probability, on mostly the same images."""
    ease = generator.normal(size=n) * shared**0.5
    alone = generator.normal(size=(len(accuracies), n)) * (1 - shared) ** 0.5
    return dict(enumerate(ease + alone < norm.ppf(accuracies)[:, None]))


def as_rare_as_promised(misses, trials, alpha=ALPHA):
    """No more misses than a miss with probability alpha leaves room for, in all but 1 of 1,000 seeds."""
    return misses <= binom.ppf(0.999, trials, alpha)


def test_accuracy_has_its_coverage_by_the_binomial():
    measured = accuracy(np.arange(40) < 30)
    assert measured["test_accuracy"] == 0.75
    assert binom.sf(29, 40, measured["low"]) == pytest.approx(0.025)
    assert binom.cdf(30, 40, measured["high"]) == pytest.approx(0.025)
    assert accuracy(np.ones(5, bool))["high"] == 1 and accuracy(np.zeros(5, bool))["low"] == 0
    for hits in range(13):
        interval = binomtest(hits, 12).proportion_ci(0.9, "exact")
        np.testing.assert_allclose(exact_interval(hits, 12, alpha=0.1), [interval.low, interval.high], atol=1e-12)


def test_compare_by_hand():
    comparison = compare(*pair(4, 10, 1, 5))
    assert (comparison.only_a, comparison.only_b, comparison.n_test) == (10, 1, 20)
    assert (comparison.accuracy_a, comparison.accuracy_b, comparison.difference) == (14 / 20, 5 / 20, 9 / 20)
    assert comparison.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    turned = compare(*pair(4, 10, 1, 5)[::-1])
    assert turned.difference == -comparison.difference and turned.p_value == comparison.p_value
    assert (
        list(comparison.to_dict()) == "accuracy_a accuracy_b difference low high only_a only_b n_test p_value".split()
    )


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (3, 3), (2, 9), (40, 61), (500, 390)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    n, fewer = only_a + only_b, min(only_a, only_b)
    p_value = compare(*pair(7, only_a, only_b, 2)).p_value
    assert p_value == pytest.approx(min(1, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n), rel=1e-9)
    assert p_value == pytest.approx(binomtest(only_a, n).pvalue, rel=1e-9)


def test_interval_is_the_bootstrap_over_images():
    a, b = pair(500, 70, 40, 90)
    comparison, more = compare(a, b), pair(0, 1, 1, 0)  # and the two images that are added
    difference = np.concatenate([a, more[0]]).astype(int) - np.concatenate([b, more[1]])
    rows = np.random.default_rng(1).integers(0, 702, (10_000, 702))
    expected = np.quantile(difference[rows].mean(1), [0.025, 0.975])
    np.testing.assert_allclose([comparison.low, comparison.high], expected, atol=2.5 / 702)
    narrow = compare(a, b, alpha=0.5)
    assert comparison.low < narrow.low < comparison.difference < narrow.high < comparison.high
    assert compare(a, b, seed=3) == compare(a, b, seed=3) != compare(a, b, seed=4)


def test_no_disagreement_is_no_proof_of_equality():
    same = compare(*pair(60, 0, 0, 40))
    assert same.p_value == 1 and same.difference == 0
    assert same.low == pytest.approx(-3 / 102, abs=1e-9) and same.high == pytest.approx(3 / 102, abs=1e-9)  # 3 / n


def test_one_test_image():
    same, other = compare(*pair(1, 0, 0, 0)), compare(*pair(0, 1, 0, 0))
    assert same.p_value == other.p_value == 1 and other.difference == 1
    assert (other.low, other.high) == (same.low, same.high) == (-1, 1)
    peak = peak_set({0: np.array([True]), 1: np.array([False])})
    assert peak.layers == [0, 1] and peak.p_values[0] == 1 and peak.p_values[1] == pytest.approx(0.5, abs=0.03)
    table = layer_table({0: np.array([True]), 1: np.array([False])}, chosen=0)
    assert table.minus_chosen_low_all[1] == -1 and table.minus_chosen_high_all[1] == 1 and table.in_peak_set.all()


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(0.12, 0.06, 150), (0.02, 0.02, 400)])
def test_interval_covers_the_difference(only_a, only_b, n):
    generator, trials = np.random.default_rng(5), 800
    counts = generator.multinomial(n, [only_a, only_b, 1 - only_a - only_b], trials)
    comparisons = [compare(*pair(0, *cells), n_boot=600, seed=i) for i, cells in enumerate(counts)]
    misses = sum(not comparison.low <= only_a - only_b <= comparison.high for comparison in comparisons)
    assert as_rare_as_promised(misses, trials) and misses >= binom.ppf(0.001, trials, 0.02)  # nor needlessly wide


def test_interval_covers_where_images_rarely_differ():
    trials = 400  # 0.005 of 200 images: often none differs, and a bootstrap of those images alone has no width
    counts = np.random.default_rng(6).multinomial(200, [0.005, 0, 0.995], trials)
    comparisons = [compare(*pair(0, *cells), n_boot=600) for cells in counts]
    assert as_rare_as_promised(
        sum(not comparison.low <= 0.005 <= comparison.high for comparison in comparisons), trials
    )
    assert not as_rare_as_promised((counts[:, 0] == 0).sum(), trials)


def test_peak_of_two_layers_is_the_one_sided_mcnemar():
    worse, better = pair(30, 8, 20, 10)
    peak = peak_set({4: worse, 9: better}, n_boot=40_000)
    assert peak.p_values[9] == 1 and peak.p_values[4] == pytest.approx(binom.sf(19, 28, 0.5), abs=0.001)
    assert peak.layers == [9] and peak.n_test == 68
    assert peak_set({4: worse, 9: better}, alpha=0.01).layers == [4, 9]


def test_peak_equals_all_sign_flips():
    right = np.random.default_rng(3).random((4, 11)) < np.array([0.3, 0.6, 0.7, 0.8])[:, None]
    signs = np.array(list(itertools.product([-1, 1], repeat=11)))
    p_values = peak_set(dict(enumerate(right)), n_boot=50_000).p_values
    for i in range(4):
        difference = right.astype(int) - right[i]
        scale = np.sqrt(np.maximum((difference != 0).sum(1), 1))
        chance, observed = (signs @ difference.T / scale).max(1), (difference.sum(1) / scale).max()
        assert p_values[i] == pytest.approx((chance >= observed - 1e-12).mean(), abs=0.01)
    assert p_values == peak_set(dict(reversed(list(enumerate(right)))), n_boot=50_000).p_values  # in any order


def test_equal_layers_stay_together():
    a, b = pair(40, 30, 2, 28)
    peak = peak_set({0: b, 1: a, 2: a.copy(), 3: np.zeros(100, bool)})
    assert peak.layers == [1, 2] and peak.p_values[1] == peak.p_values[2] == 1
    assert peak_set({0: a, 1: a}).layers == [0, 1] and peak_set({7: a}).layers == [7]


def test_peak_set_keeps_the_best_of_equals():
    """All five are best: each must be kept as often as promised, and hardly more often (the test is nearly exact)."""
    generator, trials = np.random.default_rng(7), 600
    draws = [layers(250, [0.6] * 5, generator) for _ in range(trials)]
    lost = sum(0 not in peak_set(correct, n_boot=399, seed=i).layers for i, correct in enumerate(draws))
    assert as_rare_as_promised(lost, trials) and lost >= binom.ppf(0.001, trials, 0.03)
    naive = sum(min(one_sided(correct[0], other) for other in correct.values()) <= ALPHA for correct in draws)
    assert not as_rare_as_promised(naive, trials)  # what a test without the correction loses


def one_sided(a, b):
    """p of `a` being no worse than b, uncorrected."""
    only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
    return binom.sf(only_b - 1, only_a + only_b, 0.5)


def test_peak_set_keeps_the_best_and_drops_the_worst():
    generator, trials = np.random.default_rng(8), 300
    peaks = [peak_set(layers(400, [0.4, 0.6, 0.62, 0.61, 0.5], generator), n_boot=399) for _ in range(trials)]
    assert as_rare_as_promised(sum(2 not in peak.layers for peak in peaks), trials)
    assert sum(0 in peak.layers or 4 in peak.layers for peak in peaks) < 0.1 * trials
    assert sum(1 in peak.layers for peak in peaks) > 0.5 * trials  # nor is a near rival thrown out


def test_table_repeats_accuracy_compare_and_peak_set():
    correct = layers(500, [0.5, 0.62, 0.6, 0.55], np.random.default_rng(2))
    table, peak = layer_table(correct, chosen=1), peak_set(correct)
    assert table.layer.tolist() == [0, 1, 2, 3]
    for row in table.itertuples():
        assert accuracy(correct[row.layer]) == {name: getattr(row, name) for name in ("test_accuracy", "low", "high")}
        assert row.peak_p == peak.p_values[row.layer] and row.in_peak_set == (row.layer in peak.layers)
        for name, other in (("minus_chosen", 1), ("minus_last", 3)):
            comparison = compare(correct[row.layer], correct[other])
            ends = [getattr(row, name + end) for end in ("", "_p", "_low", "_high", "_low_all", "_high_all", "_p_all")]
            if row.layer == other:
                assert ends == [0, 1, 0, 0, 0, 0, 1]
                continue
            assert ends[:4] == [comparison.difference, comparison.p_value, comparison.low, comparison.high]
            assert ends[4] < comparison.low and comparison.high < ends[5] and ends[6] >= comparison.p_value


def test_all_at_once_is_dunnett_where_layers_are_independent():
    """scipy's Dunnett: unpaired, of equal variances; of 20,000 images it is the same to the percent."""
    right = np.random.default_rng(4).random((5, 20_000)) < np.array([0.5, 0.504, 0.51, 0.512, 0.494])[:, None]
    table = layer_table(dict(enumerate(right)), chosen=0)
    expected = dunnett(*right[1:].astype(float), control=right[0].astype(float), rng=np.random.default_rng(0))
    assert expected.pvalue.min() < 0.1 < expected.pvalue.max()
    np.testing.assert_allclose(table.minus_chosen_p_all[1:], expected.pvalue, atol=0.03)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(table.minus_chosen_low_all[1:], interval.low, atol=5e-4)
    np.testing.assert_allclose(table.minus_chosen_high_all[1:], interval.high, atol=5e-4)


def test_intervals_of_all_layers_cover_all_at_once():
    generator, trials, truth = np.random.default_rng(9), 250, np.array([0.45, 0.5, 0.6, 0.62, 0.6, 0.58, 0.55])
    alone = together = 0
    for i in range(trials):
        table = layer_table(layers(300, truth, generator), chosen=3, n_boot=500, seed=i)
        low, high = "minus_chosen_low", "minus_chosen_high"
        inside = [table[low + of].le(truth - truth[3]) & table[high + of].ge(truth - truth[3])
                  for of in ("", "_all")]  # fmt: skip
        alone, together = alone + (not inside[0].all()), together + (not inside[1].all())
    assert as_rare_as_promised(together, trials) and not as_rare_as_promised(alone, trials)


def test_spread_by_hand():
    draws = [np.arange(10) < 6, np.arange(10) < 8, np.arange(10) >= 3]
    summary = spread(draws)
    assert summary.mean == pytest.approx(0.7) and summary.standard_deviation == pytest.approx(0.1)
    assert (summary.n_draws, summary.n_test) == (3, 10) and spread(dict(enumerate(draws))) == summary
    one = spread(draws[:1])
    assert np.isnan(one.standard_deviation)
    assert {"test_accuracy": one.mean, "low": one.low, "high": one.high} == pytest.approx(accuracy(draws[0]))


def test_draws_that_err_alike_add_no_test_images():
    same = spread([np.arange(50) < 30] * 4)
    assert same.standard_deviation == 0
    assert [same.low, same.high] == pytest.approx([accuracy(np.arange(50) < 30)[end] for end in ("low", "high")])
    opposite = spread([np.arange(50) < 25, np.arange(50) >= 25])  # each image right once: as good as 100 of them
    np.testing.assert_allclose([opposite.low, opposite.high], exact_interval(50, 100))
    assert spread([np.ones(5, bool)] * 3).low == pytest.approx(accuracy(np.ones(5, bool))["low"])


def test_interval_of_a_mean_over_draws_covers():
    """Three fixed classifiers, eight kinds of image: the mean over all images is known."""
    generator, trials = np.random.default_rng(10), 600
    knows = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 1, 0]], bool)
    summaries = [spread(knows[:, generator.integers(0, 8, 80)]) for _ in range(trials)]
    misses = sum(not summary.low <= knows.mean() <= summary.high for summary in summaries)
    assert as_rare_as_promised(misses, trials) and misses >= binom.ppf(0.001, trials, 0.02)


def by_covariances(right, share):
    """Half the width of the interval over draws and images: components from covariances, not from mean squares."""
    (draws, n), by_draws, by_images = right.shape, np.cov(right.T), np.cov(right)
    of_draws = (by_draws.sum() - np.trace(by_draws)) / (n * (n - 1))
    of_images = (by_images.sum() - np.trace(by_images)) / (draws * (draws - 1))
    of_cells = np.trace(by_images) / draws - of_images
    variance = of_draws * (1 + (draws - 1) * share) / (1 - share) / draws + of_images / n + of_cells / (draws * n)
    grown = (1 + (draws - 1) * share) / (1 - share)
    squares = np.array([grown * (of_cells + n * of_draws), of_cells + draws * of_images, -grown * of_cells])
    freedom = (squares.sum() ** 2) / (squares**2 / [draws - 1, n - 1, (draws - 1) * (n - 1)]).sum()
    return student.isf(0.025, freedom) * variance**0.5


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_an_interval_over_draws_and_images_is_that_of_covariances(share):
    generator = np.random.default_rng(3)
    right = generator.random((4, 200)) < generator.random(200) * 0.4 + np.array([[0.1], [0.2], [0.25], [0.3]])
    summary, reach = spread(right, overlap=share), by_covariances(right, share)
    assert [summary.low_all, summary.high_all] == pytest.approx([max(0, summary.mean - reach), summary.mean + reach])
    for one in (spread(right[:1]), spread(right, overlap=1.0)):  # nothing says how far draws lie apart
        assert np.isnan([one.low_all, one.high_all]).all() and np.isfinite([one.low, one.high]).all()
    same = spread([np.arange(50) < 40] * 3)
    assert same.low_all <= same.low < 0.8 < same.high <= same.high_all < 1


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.1, 0.3])
def test_an_interval_over_draws_and_images_covers(shift):
    """5 draws of 1,000 images from a population where the accuracy is 70%, draws apart by 0 to 10 points."""
    generator, trials, hits = np.random.default_rng(7), 600, 0
    for _ in range(trials):
        ease, alone = generator.normal(size=1000) * 0.6**0.5, generator.normal(size=(5, 1000)) * 0.4**0.5
        summary = spread(ease + alone + shift * generator.normal(size=(5, 1)) < norm.ppf(0.7) * np.hypot(1, shift))
        assert summary.low_all <= summary.low <= summary.mean <= summary.high <= summary.high_all
        hits += summary.low_all <= 0.7 <= summary.high_all
    assert binom.ppf(0.001, trials, 0.93) <= hits <= binom.ppf(0.999, trials, 0.97)


@pytest.mark.parametrize("k", [12, 40])
def test_draws_that_share_rows_keep_the_coverage(k):
    """5 draws of k of 60 rows, each of which shifts what is learnt from it: disjoint, or sharing 60% of their rows."""
    generator, trials, hits = np.random.default_rng(8), 600, 0
    for _ in range(trials):
        seed = int(generator.integers(1e9))
        rows = [few_per_class(np.zeros(60, int), k, seed=seed, draw=draw) for draw in range(5)]
        shift = generator.normal(size=60)[rows].sum(1, keepdims=True) * 0.1 / k**0.5
        ease, alone = generator.normal(size=1000) * 0.6**0.5, generator.normal(size=(5, 1000)) * 0.4**0.5
        summary = spread(ease + alone + shift < norm.ppf(0.7) * np.hypot(1, 0.1), overlap=0 if k == 12 else 0.6)
        hits += summary.low_all <= 0.7 <= summary.high_all
    assert binom.ppf(0.001, trials, 0.93) <= hits <= binom.ppf(0.999, trials, 0.97)


def test_bad_input():
    a, b = pair(3, 2, 1, 1)
    with pytest.raises(ValueError, match="a has 7 test images and b 6"):
        compare(a, b[:6])
    with pytest.raises(ValueError, match=r"b is int64 \(7,\); expected bool"):
        compare(a, b.astype(int))
    with pytest.raises(ValueError, match=r"a is bool \(0,\)"):
        compare(a[:0], b[:0])
    index = np.arange(7)
    assert compare(a, b, index_a=index, index_b=index.copy()) == compare(a, b)
    with pytest.raises(ValueError, match="7 of 7 test images differ"):
        compare(a, b, index_a=index, index_b=index + 1)
    with pytest.raises(ValueError, match="only one of index_a and index_b is given"):
        compare(a, b, index_a=index)
    with pytest.raises(ValueError, match=r"index_b is \(6,\) for 7"):
        compare(a, b, index_a=index, index_b=index[:6])
    with pytest.raises(ValueError, match=r"\{0: 7, 1: 6\}"):
        peak_set({0: a, 1: b[:6]})
    with pytest.raises(ValueError, match="no layer"):
        peak_set({})
    with pytest.raises(ValueError, match="layer 5 is not in"):
        layer_table({0: a, 1: b}, chosen=5)
    with pytest.raises(ValueError, match="no draw"):
        spread([])
    with pytest.raises(ValueError, match="overlap=60; expected the share"):
        spread([a, b], overlap=60)
    with pytest.raises(ValueError, match="alpha 95; expected"):
        peak_set({0: a}, alpha=95)
    with pytest.raises(ValueError, match="alpha 95; expected"):
        compare(a, b, alpha=95)
