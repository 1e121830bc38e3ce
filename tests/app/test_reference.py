"""A run held against the shipped one, on tables made by hand."""

import json
import math

import pandas as pd
import pytest

from igpt_lab.app import notebooks as workbench
from igpt_lab.app import reference, runs
from igpt_lab.core.display import MODEL

PEAK = (1, 3)
SECONDS = {"00_tour": 30.2, "02_layer_probe": 64.8}
STORE = {"weights": "ab", "palette": "cd", "splits": {"test": ["ef", 100]}}


def table(**accuracies) -> pd.DataFrame:
    """Layers 0 to 3 with the interval +-0.05, layer 1 chosen; raw pixels beside them."""
    values = {"layer0": 0.5, "layer1": 0.8, "layer2": 0.7, "layer3": 0.6, "pixels": 0.4} | accuracies
    rows = [(MODEL, i, values[f"layer{i}"], i == 1, i in PEAK) for i in range(4)]
    rows += [("raw pixels", 0, values["pixels"], True, True)]
    made = pd.DataFrame(rows, columns=["control", "layer", "test_accuracy", "chosen", "in_peak_set"])
    return made.assign(low=made.test_accuracy - 0.05, high=made.test_accuracy + 0.05)


def drop(difference=0.2, p_value=1e-5) -> dict:
    return {"difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p_value": p_value}


def verdicts(ours: pd.DataFrame, comparison: dict) -> dict:
    compared = reference.compare(reference.numbers(ours, comparison), reference.numbers(table(), drop()))
    return dict(zip(compared.number, compared.verdict, strict=True))


def chosen(layer: int) -> pd.DataFrame:
    made = table()
    return made.assign(chosen=(made.layer == layer) | (made.control != MODEL))


def test_a_run_is_the_same_as_itself():
    assert set(verdicts(table(), drop()).values()) == {"the same"}
    assert list(verdicts(table(), drop())) == [
        "chosen layer", "accuracy, chosen layer", "accuracy, first layer", "accuracy, last layer",
        "accuracy, raw pixels", "chosen minus last", "p, chosen against last",
    ]  # fmt: skip


def test_an_accuracy_is_within_its_interval_or_differs():
    outcomes = verdicts(table(layer0=0.54, layer3=0.54, pixels=0.46), drop())
    assert outcomes["accuracy, first layer"] == "within its interval"
    assert outcomes["accuracy, last layer"] == outcomes["accuracy, raw pixels"] == "differs"
    assert outcomes["accuracy, chosen layer"] == outcomes["chosen layer"] == "the same"


@pytest.mark.parametrize(("layer", "verdict"), [(1, "the same"), (3, "within its interval"), (2, "differs")])
def test_a_chosen_layer_is_within_the_reference_s_peak_set_or_differs(layer, verdict):
    assert verdicts(chosen(layer), drop())["chosen layer"] == verdict


def test_the_fall_to_the_last_layer_has_its_own_interval():
    assert verdicts(table(), drop(0.29))["chosen minus last"] == "within its interval"
    assert verdicts(table(), drop(0.31))["chosen minus last"] == "differs"


@pytest.mark.parametrize(
    ("reference_p", "p", "verdict"),
    [
        (1e-5, 1e-5, "the same"), (1e-5, math.nextafter(1e-5, 1), "the same"), (1e-5, 9e-4, "within its interval"),
        (1e-5, 0.001, "differs"), (0.002, 0.049, "within its interval"), (0.002, 0.05, "differs"),
        (0.06, 1.0, "within its interval"), (1.0, 1.0, "the same"), (0.002, 0.0009, "differs"),
    ],
)  # fmt: skip
def test_a_p_value_is_on_the_same_side_of_both_thresholds_or_differs(reference_p, p, verdict):
    ours, theirs = (reference.numbers(table(), drop(p_value=value)) for value in (p, reference_p))
    assert reference.compare(ours, theirs).verdict.iloc[-1] == verdict


def test_an_older_table_has_no_word_for_the_model():
    older = table().assign(control=table().control.replace(MODEL, ""))
    pd.testing.assert_frame_equal(reference.numbers(older, drop()), reference.numbers(table(), drop()))


def test_numbers_that_only_one_has_are_left_out():
    bare = table()[lambda rows: rows.control == MODEL]
    assert "accuracy, raw pixels" not in verdicts(bare, drop())


def save(folder, ours: pd.DataFrame, store: dict) -> None:
    folder.mkdir(parents=True)
    ours.assign(n_test=100).to_csv(folder / "layer_curve.csv", index=False)
    (folder / "layer_curve.json").write_text(json.dumps({"config": {"store": store, "comparison": drop()}}))


def test_a_run_ends_with_the_verdicts_in_its_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path / "notebooks")
    save(tmp_path / "results/fashion-xs-fashion-mini", table(), STORE)
    save(tmp_path / "run", table(layer0=0.54, layer3=0.7), STORE)
    facts = {"model": "fashion-xs", "images": "fashion-mini", "quick": False, "seconds": SECONDS}
    text = runs.conclude(tmp_path / "run", facts)
    assert "held against results/fashion-xs-fashion-mini" in text
    assert "\n95 s: 00_tour 30 s, 02_layer_probe 65 s\n" in text
    assert text.endswith("against the reference: 5 the same, 1 within its interval, 1 differs")
    kept = json.loads((tmp_path / "run/summary.json").read_text())["reference"]
    assert kept["accuracy, last layer"] == "differs" and kept["chosen layer"] == "the same"
    listed = pd.read_csv(tmp_path / "run/reference.csv").set_index("number")
    assert listed.here["accuracy, last layer"] == 0.7 and listed.reference["accuracy, last layer"] == 0.6
    assert (
        listed.interval["chosen layer"] == "layers 1, 3" and listed.interval["accuracy, last layer"] == "0.55 to 0.65"
    )
    assert (tmp_path / "run/summary.txt").read_text() == text + "\n"


def test_a_run_s_summary_has_the_drop_with_the_choice_and_says_that_it_is_poor(tmp_path):
    folder = tmp_path / "run"
    save(folder, table().assign(validation_accuracy=table().test_accuracy, n_validation=90), STORE)
    wide = drop() | {"choice_low": 0.05, "choice_high": 0.35}
    (folder / "layer_curve.json").write_text(json.dumps({"config": {"store": STORE, "comparison": wide}}))
    text = runs.conclude(folder, {"model": "fashion-xs", "images": "photos", "quick": False, "seconds": SECONDS})
    assert "chosen layer 1 of 0..3: 80.0% [75.0%, 85.0%]\n" in text and "best" not in text
    assert "+20.0 points [10.0, 30.0] over test images, [5.0, 35.0] with the choice, p = 1e-5 (McNemar" in text
    assert "\na poor choice: one standard error is 4.2 points on 90 held-out images; about " in text


@pytest.mark.parametrize(
    ("changes", "store", "reason"),
    [
        ({"quick": True}, STORE, "few images is not compared"),
        ({"images": "photos"}, STORE, "no run is shipped as fashion-xs-photos"),
        ({}, STORE | {"splits": {"test": ["00", 100]}}, "shipped as fashion-xs-fashion-mini has other splits"),
        ({}, STORE | {"weights": "00"}, "shipped as fashion-xs-fashion-mini has other weights"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path, monkeypatch, changes, store, reason):
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path / "notebooks")
    save(tmp_path / "results/fashion-xs-fashion-mini", table(), STORE)
    save(tmp_path / "run", table(), store)
    facts = {"model": "fashion-xs", "images": "fashion-mini", "quick": False, "seconds": SECONDS} | changes
    assert reason in runs.conclude(tmp_path / "run", facts)
    assert reason in json.loads((tmp_path / "run/summary.json").read_text())["reference"]
    assert not (tmp_path / "run/reference.csv").exists()


def test_the_shipped_runs_are_the_same_as_themselves():
    for model, images in (("fashion-xs", "fashion-mini"), ("cifar10-xs", "cifar10")):
        shipped = runs.shipped(model, images)
        compared = reference.hold_against(shipped, shipped)
        assert set(compared.verdict) == {"the same"} and len(compared) == 9
