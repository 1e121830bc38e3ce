"""The choice of a layer, its interval, and corrections for many tests: by hand, and by simulation."""

import numpy as np
import pytest
from scipy.stats import norm

from igpt_lab.core.choice import choice_of, compare_choice, middle_of_best
from igpt_lab.core.significance import PairedDifference, claims, compare, holm


def test_a_choice_by_hand():
    choice = choice_of([0, 2, 4, 6, 8], [0.5, 0.8, 0.9, 0.9, 0.893], 900)
    assert choice.layer == 6 and choice.tied == [4, 6] and choice.accuracy == 0.9
    assert choice.error == pytest.approx(0.01) and choice.within_error == [4, 6, 8] and choice.n_layers == 5
    assert choice.poor  # three of five
    # to leave three of five out, half an error must be 0.007 less: 0.893 is the third, so (0.01 / 0.007)^2 as many
    assert choice.enough == 2000 and 900 * (0.01 / 0.007) ** 2 == pytest.approx(1836.7, abs=0.1)
    assert choice.words() == (
        "a poor choice: 3 of 5 layers are within one standard error (1.0 points on 900 held-out images); about 2,000 "
        "would do"
    )
    good = choice_of([0, 2, 4, 6, 8], [0.5, 0.8, 0.9, 0.899, 0.87], 900)
    assert not good.poor and good.words() == "" and good.layer == 4


def test_few_images_are_a_poor_choice_whatever_the_layers():
    choice = choice_of([0, 1, 2], [0.2, 0.6, 0.2], 90)
    assert choice.within_error == [1] and choice.poor
    assert choice.enough == 400 and 0.6 * 0.4 / 0.025**2 == pytest.approx(384)
    assert choice.words() == "a poor choice: one standard error is 5.2 points on 90 held-out images; about 400 would do"
    level = choice_of([0, 1, 2], [0.6, 0.6, 0.6], 90)
    assert level.layer == 1 and level.enough is None and "differ too little for any number" in level.words()
    assert not choice_of([0], [0.5], 10).poor  # one layer is no choice


def test_bad_input():
    with pytest.raises(ValueError, match="2 accuracies of 3 layers"):
        choice_of([0, 1, 2], [0.5, 0.5], 10)
    with pytest.raises(ValueError, match="one finite accuracy for each layer"):
        choice_of([0, 1], [0.5, float("nan")], 10)
    with pytest.raises(ValueError, match=r"folds \(2, 2\) of layers \[0\], the last 0"):
        compare_choice({0: np.ones(3, bool)}, np.ones((2, 2)), 0)


def test_of_equal_ones_the_middle():
    assert middle_of_best(np.array([[1, 3, 2], [3, 3, 3], [3, 3, 1], [3, 1, 3]])).tolist() == [1, 1, 1, 2]


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_a_claim_holds_by_its_corrected_p():
    def paired(difference, p_value):
        return PairedDifference(0.5, 0.5, difference, difference - 0.1, difference + 0.1, 3, 2, 100, p_value)

    table = claims({"a": paired(0.2, 0.01), "b": paired(0.1, 0.04), "c": paired(-0.2, 0.001)}).set_index("claim")
    assert table.verdict.to_dict() == {"a": "holds", "b": "holds", "c": "the opposite holds"}
    assert table.p_holm.to_dict() == pytest.approx({"a": 0.02, "b": 0.04, "c": 0.003})
    more = claims({"a": paired(0.2, 0.01), "b": paired(0.1, 0.03), "c": paired(0.1, 0.04)}).set_index("claim")
    assert more.verdict.to_dict() == {"a": "holds", "b": "not resolved", "c": "not resolved"}
    assert more.difference.b == 0.1 and more.low.b == pytest.approx(0) and more.n_test.b == 100


def test_a_sure_choice_has_the_interval_of_compare():
    generator = np.random.default_rng(0)
    correct = {layer: generator.random(2000) < share for layer, share in enumerate((0.5, 0.7, 0.6))}
    folds = np.tile([0.5, 0.7, 0.6], (10, 1))
    low, high = compare_choice(correct, folds, 2)
    alone = compare(correct[1], correct[2])
    assert (low, high) == pytest.approx((alone.low, alone.high), abs=2e-3)
    unsure = compare_choice(correct, np.tile([0.7, 0.7, 0.6], (10, 1)) + generator.normal(0, 0.01, (10, 3)), 2)
    assert unsure[1] - unsure[0] > 1.5 * (high - low)  # layers 0 and 1 are chosen by turns


DEPTH = np.linspace(0, 1, 13)
CURVES = {  # accuracies over depth, like those of the two bundled models
    "fashion": 0.75 + 0.105 * np.minimum(1, 2 * DEPTH) ** 0.7 - 0.045 * np.maximum(0, (DEPTH - 0.6) / 0.4),
    "cifar": 0.29 + 0.29 * np.minimum(1, 2.5 * DEPTH) ** 0.8 - 0.15 * np.maximum(0, 2 * DEPTH - 1),
}


def answers(curve: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """Right or wrong, bool (n, L): images differ in difficulty, and neighbouring layers err alike."""
    hard, own = generator.standard_normal((n, 1)), generator.standard_normal((n, len(curve)))
    for layer in range(1, len(curve)):
        own[:, layer] = 0.86 * own[:, layer - 1] + 0.51 * own[:, layer]
    return np.sqrt(0.75) * hard + 0.5 * own < norm.ppf(curve)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("n", "times"), [(200, 1500), (1000, 800), (6000, 300)])
def test_the_interval_of_the_drop_covers_what_choosing_gives_on_average(curve, n, times):
    """The layer is chosen anew in each sample, from ten folds of n training images; n test images give the drop."""
    generator, layers = np.random.default_rng(n), range(13)
    drops, intervals = [], []
    for _ in range(times):
        folds = answers(CURVES[curve], n, generator).reshape(10, n // 10, 13).mean(1)
        tested = answers(CURVES[curve], n, generator)
        drops.append(CURVES[curve][middle_of_best(folds.mean(0))] - CURVES[curve][-1])
        intervals.append(compare_choice(dict(zip(layers, tested.T, strict=True)), folds, 12, n_boot=1000))
    low, high = np.array(intervals).T
    covered = ((low <= np.mean(drops)) & (np.mean(drops) <= high)).mean()
    assert 0.93 <= covered <= 0.97
