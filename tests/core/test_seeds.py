"""Statistics over seeds of pretraining against scipy's t test, a case by hand, and their coverage by simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from igpt_lab.core.seeds import compare_families, group_by_seed, over_seeds, summarise_runs, summarise_seeds
from tables import seed_table


@pytest.mark.parametrize("values", [[0.3, 0.5], [0.44, 0.46, 0.41], list(np.linspace(0, 1, 9) ** 2)])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_interval_over_seeds_is_that_of_scipy_s_t_test(values, alpha):
    seeds = over_seeds(values, alpha=alpha)
    interval = stats.ttest_1samp(values, 0).confidence_interval(1 - alpha)
    assert [seeds.low, seeds.high] == pytest.approx(list(interval), abs=1e-12)
    assert (seeds.mean, seeds.standard_deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert seeds.n_seeds == len(values)


def test_three_seeds_by_hand_and_one_seed_has_no_interval():
    seeds = over_seeds([1.0, 2.0, 3.0])  # t of 2 degrees of freedom, 97.5 %: 4.302653 in every table
    assert (seeds.mean, seeds.standard_deviation) == (2, 1)
    assert seeds.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6) and seeds.low == 4 - seeds.high
    alone = over_seeds([0.4])
    assert alone.mean == 0.4 and np.isnan([alone.standard_deviation, alone.low, alone.high]).all()
    with pytest.raises(ValueError, match="one finite number for each seed"):
        over_seeds([0.4, math.nan])


def test_noise_that_all_seeds_share_is_not_in_the_interval_over_seeds():
    generator, trials = np.random.default_rng(0), 400
    own, shared = generator.normal(size=(trials, 3)), generator.normal(0, 5, size=(trials, 1))
    covered = [sum(s.low <= 0 <= s.high for s in map(over_seeds, values)) / trials for values in (own, own + shared)]
    assert 0.92 < covered[0] < 0.98 and covered[1] < 0.7


def test_runs_are_grouped_by_their_names():
    names = ["w-16-seed-0", "w-16-seed-12", "bert", "bert-seed-3", "a-seed-1-seed-2", "seed-4", "x-seed-"]
    table = group_by_seed(pd.DataFrame({"model": names * 2}))
    keys = [("w-16", 0), ("w-16", 12), ("bert", 0), ("bert", 3), ("a-seed-1", 2), ("seed-4", 0), ("x-seed-", 0)]
    assert list(zip(table.family, table.seed_of_pretraining, strict=True)) == keys * 2
    assert group_by_seed(table).equals(table)
    with pytest.raises(ValueError, match="bert, bert-seed-0 are of the same family and seed"):
        group_by_seed(pd.DataFrame({"model": ["bert", "bert-seed-0"]}))


def test_a_run_says_where_its_curve_begins_peaks_and_ends():
    runs = summarise_runs(seed_table())
    assert runs.family.tolist() == ["a", "a", "a", "b"] and runs.seed_of_pretraining.tolist() == [0, 1, 2, 0]
    assert runs.chosen_layer.tolist() == [1, 1, 2, 1] and runs.depth.tolist() == [0.5, 0.5, 1, 0.5]
    np.testing.assert_allclose(runs[["first", "height", "last"]].iloc[0], [0.30, 0.50, 0.44])
    np.testing.assert_allclose(runs["drop"], [0.06, 0.1, 0, 0.1])
    np.testing.assert_allclose(runs[["low", "high", "drop_low", "drop_high"]].iloc[1], [0.53, 0.60, 0.08, 0.11])
    np.testing.assert_allclose(runs[["peak_low", "peak_high"]], [[0.5, 0.5], [0.5, 1], [1, 1], [0.5, 1]])
    assert runs.peak_set.tolist() == ["1", "1, 2", "2", "1, 2"]
    np.testing.assert_allclose(runs.drop_p_holm, 0.04)
    both = pd.concat([seed_table().assign(step=step) for step in (1, 2)])
    with pytest.raises(ValueError, match="a, seed 0: 2 layers are marked as chosen; expected one, of one checkpoint"):
        summarise_runs(both)


def test_a_family_has_both_uncertainties_beside_each_other():
    table = summarise_seeds(summarise_runs(seed_table())).set_index("family")
    assert table.n_seeds.tolist() == [3, 1]
    row, heights, drops = table.loc["a"], [0.50, 0.56, 0.47], [0.06, 0.1, 0.0]
    for name, values in {"depth": [0.5, 0.5, 1], "height": heights, "drop": drops}.items():
        ends = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        expected = [np.mean(values), np.std(values, ddof=1), *ends]
        np.testing.assert_allclose([row[f"{name}_{part}"] for part in ("mean", "sd", "low", "high")], expected)
    np.testing.assert_allclose(row[["depth_images_low", "depth_images_high"]].tolist(), [2 / 3, 2.5 / 3])
    np.testing.assert_allclose(row[["height_images_low", "height_images_high"]].tolist(), [0.48, 0.55])
    np.testing.assert_allclose(
        row[["drop_images_low", "drop_images_high"]].tolist(), [0.16 / 3 - 0.02, 0.16 / 3 + 0.01]
    )
    assert np.isnan(table.loc["b", ["height_sd", "drop_low"]].astype(float)).all()
    assert table.loc["b", "height_images_low"] == pytest.approx(0.57)


def test_families_differ_as_welch_s_test_says():
    runs = summarise_runs(seed_table())
    assert compare_families(runs).empty  # "b" has one seed
    other = runs[runs.family == "a"].assign(family="c", height=[0.6, 0.61, 0.64], drop=0.07, depth=0.75)
    table = compare_families(pd.concat([runs, other], ignore_index=True)).set_index("measure")
    assert set(table.a) == {"a"} and set(table.b) == {"c"} and table.index.tolist() == ["depth", "height", "drop"]
    a, b = np.array([0.50, 0.56, 0.47]), np.array([0.6, 0.61, 0.64])
    of_a, of_b = a.var(ddof=1) / 3, b.var(ddof=1) / 3
    free = (of_a + of_b) ** 2 / (of_a**2 / 2 + of_b**2 / 2)  # Welch and Satterthwaite
    row, difference, error = table.loc["height"], a.mean() - b.mean(), math.sqrt(of_a + of_b)
    assert row.difference == pytest.approx(difference)
    assert [row.low, row.high] == pytest.approx(list(stats.t.interval(0.95, free, difference, error)))
    assert row.p_value == pytest.approx(2 * stats.t.sf(abs(difference) / error, free))
    assert row.p_holm == pytest.approx(3 * row.p_value)
    alike = pd.concat([other, other.assign(family="d", depth=0.5)])
    assert compare_families(alike).set_index("measure").loc["depth", ["low", "p_value", "p_holm"]].isna().all()
