"""Published numbers against the collection that they were carried over from, and the rule of agreement by hand."""

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from conftest import SHARED
from igpt_lab.core.published import verdict

COLLECTION = SHARED / "paper/numbers.csv"
NAMES = {"loss": "generative_loss", "linear probe": "linear_probe", "few labels": "low_data"}
NAMES |= {"best layer less last": "linear_probe_last_layer_drop"}


def test_values_are_in_the_units_of_our_tables():
    assert lab.published("S", "imagenet", "loss").value.tolist() == [2.0895]
    assert lab.published(experiment="loss").tolerance.tolist() == [0.001] * 3
    best = lab.published("l", "cifar-10", "linear probe").iloc[0]
    assert (best.value, best.unit) == (pytest.approx(0.963), "fraction") and best.tolerance == pytest.approx(0.0005)
    assert pd.isna(best.layer) and pd.isna(best["std"]) and best.source == "Chen et al. (2020), V2"
    by_layer = lab.published("s", "CIFAR10", "linear probe")
    assert by_layer.layer.tolist() == list(range(25)) and by_layer.value[16] == pytest.approx(0.7862)
    assert by_layer.tolerance.max() == pytest.approx(0.00005)  # of 76.40, whose 0 is printed, too
    assert lab.published("m", "CIFAR-10").empty


@pytest.mark.skipif(not COLLECTION.is_file(), reason=f"the collection is not at {COLLECTION}")
def test_every_value_is_that_of_the_collection():
    theirs, ours = pd.read_csv(COLLECTION), lab.published()
    for row in ours.itertuples():
        same = theirs[(theirs.experiment == NAMES[row.experiment]) & (theirs.dataset == row.images)]
        same = same[same.model.isin([f"iGPT-{row.size.upper()}", "imagegpt-small" if row.size == "s" else ""])]
        same = same[same.source.eq("paper_v2" if row.source.startswith("Chen") else "port_notebook")]
        same = same[np.isclose(same.value * (1 if row.unit == "nats" else 0.01), row.value)]
        assert len(same) >= 1, row
        assert np.isclose(0.01 * same["std"], row.std, equal_nan=True).any() or row.unit == "nats"


@pytest.mark.parametrize(
    ("ours", "low", "high", "theirs", "expected"),
    [
        (0.95, 0.94, 0.96, (0.963, np.nan, 0.0005, "fraction"), "differs by -1.3 points"),
        (0.95, 0.94, 0.9626, (0.963, np.nan, 0.0005, "fraction"), "agrees"),  # 96.26% and 96.3 as printed
        (0.70, 0.69, 0.71, (0.732, 0.015, 0.0005, "fraction"), "differs by -3.2 points"),
        (0.70, 0.69, 0.717, (0.732, 0.015, 0.0005, "fraction"), "agrees"),
        (2.0904, 2.0904, 2.0904, (2.0895, np.nan, 0.001, "nats"), "agrees"),
        (2.0906, 2.0906, 2.0906, (2.0895, np.nan, 0.001, "nats"), "differs by +0.0011 nats"),
        (2.0906, 2.0900, 2.0912, (2.0895, np.nan, 0.001, "nats"), "agrees"),  # within what was drawn
    ],
)
def test_a_number_agrees_by_rule(ours, low, high, theirs, expected):
    assert verdict(ours, low, high, pd.Series(theirs, ["value", "std", "tolerance", "unit"])) == expected
