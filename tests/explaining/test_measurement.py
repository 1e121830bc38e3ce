"""Paired differences over test images, against scipy and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from igpt_lab.explaining.measurement import UNCHANGED, Measurement

TABLE = pd.DataFrame({"layer": [0, 3], "head": [1, 1], "nats": [1.0, 2.0]})


def made_up(n: int = 30) -> Measurement:
    generator = np.random.default_rng(0)
    keys = [(0, 1), (3, 1), UNCHANGED]
    return Measurement(TABLE, {key: generator.normal(size=n) for key in keys}, ("layer", "head"))


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_a_contrast_is_the_mean_of_the_weighted_sum_with_its_t_interval(alpha):
    measured = made_up()
    got = measured.contrast({(0, 1): 0.5, (3, 1): -2, UNCHANGED: 1.5}, alpha=alpha)
    a, b, whole = measured.of_images.values()
    test = stats.ttest_1samp(a / 2 - 2 * b + 1.5 * whole, 0).confidence_interval(1 - alpha)
    np.testing.assert_allclose(list(got.values()), [(a / 2 - 2 * b + 1.5 * whole).mean(), *test, 30])
    assert list(got) == ["value", "low", "high", "n"]


def test_noise_that_two_share_is_gone_from_their_difference():
    noise = 100 * np.arange(4.0)
    measured = Measurement(TABLE, {(0, 1): noise + 1, (3, 1): noise}, ("layer", "head"))
    assert measured.contrast({(0, 1): 1, (3, 1): -1}) == {"value": 1, "low": 1, "high": 1, "n": 4}


def test_it_is_shown_as_its_table():
    assert repr(made_up()) == repr(TABLE) and made_up()._repr_html_() == TABLE.to_html()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "weights are empty"),
        ({(2, 1): 1}, "layer 2, head 1 was not measured; measured are layer 0, 3; head 1"),
        ({(0, 1, "correct"): 1}, "layer 0, head 1, correct was not measured"),
        ({(3, 1): 1}, "layer 3, head 1 has no finite value in 2 images"),
    ],
)
def test_what_was_not_measured_is_said_in_a_line(weights, words):
    measured = made_up()
    measured.of_images[3, 1][:2] = np.nan
    with pytest.raises(ValueError, match=words) as caught:
        measured.contrast(weights)
    assert "\n" not in str(caught.value)
