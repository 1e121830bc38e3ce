"""The chosen layer in words: json files of any age, tables with and without what says how sure a choice is."""

import numpy as np
import pandas as pd
import pytest

from igpt_lab.core.chosen import about_choice, choice_in, difference_in_words, with_new_names


def rows(n_validation=90, accuracies=(0.80, 0.79, 0.50, 0.40, 0.30)):
    return pd.DataFrame({"layer": [3, 4, 5, 6, 7], "validation_accuracy": accuracies, "n_validation": n_validation})


def test_names_of_earlier_files_become_those_of_today():
    older = {"best_layer": 1, "best_accuracy": 0.5, "only_best": 3, "best_interval": [0, 1], "low": 0.1}
    assert list(with_new_names(older)) == ["chosen_layer", "chosen_accuracy", "only_chosen", "chosen_interval", "low"]
    assert with_new_names(with_new_names(older)) == with_new_names(older)


def test_a_difference_has_the_intervals_that_there_are():
    comparison = {"difference": 0.0405, "low": 0.0302, "high": 0.051}
    assert difference_in_words(comparison) == "+4.0 points [3.0, 5.1]"
    both = "+4.0 points [3.0, 5.1] over test images, [2.6, 5.3] with the choice"
    assert difference_in_words(comparison | {"choice_low": 0.026, "choice_high": 0.053}) == both
    for unknown in (np.nan, None, "0.1"):
        assert (
            difference_in_words(comparison | {"choice_low": unknown, "choice_high": 0.053}) == "+4.0 points [3.0, 5.1]"
        )


def test_a_table_says_how_sure_its_choice_is():
    poor = about_choice(rows())  # the standard error of 0.8 on 90 images is 4.2 points
    assert poor[0] == "within one standard error: 3, 4" and poor[1].startswith(
        "a poor choice: one standard error is 4.2 points on 90"
    )
    assert choice_in(rows()).enough == 300  # 0.8 * 0.2 / 0.025 ** 2 = 256, rounded up
    assert about_choice(rows(10_000)) == []  # 0.4 points, and no other layer within them
    assert about_choice(rows(1000)) == ["within one standard error: 3, 4"]


@pytest.mark.parametrize(
    "table",
    [
        rows().drop(columns="n_validation"), rows().drop(columns="validation_accuracy"), rows(0), rows(np.nan),
        rows(accuracies=(0.8, np.nan, 0.5, 0.4, 0.3)), rows(accuracies=("a", 0.7, 0.5, 0.4, 0.3)), rows()[:0],
    ],
)  # fmt: skip
def test_where_a_table_does_not_say_nothing_is_said(table):
    assert about_choice(table) == []
