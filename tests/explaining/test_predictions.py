"""Made-up measurements, the answer of which is known by hand."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import igpt_lab as lab
from igpt_lab.explaining import predictions
from igpt_lab.explaining.measurement import UNCHANGED, Measurement
from igpt_lab.explaining.predictions import COLUMNS, PREDICTIONS, QUARTERS

N, C, L = 200, 2, 5  # images, chosen layer, last layer
NOISE = np.random.default_rng(0).normal(size=N)
NOISE -= NOISE.mean()


def measured(values: dict[tuple, object], keys: tuple[str, ...]) -> Measurement:
    """Numbers, or values of images, by key; the table has the keys alone."""
    of_images = {key: np.broadcast_to(np.asarray(value, float), N) for key, value in values.items()}
    return Measurement(pd.DataFrame([key for key in values if key != UNCHANGED], columns=keys), of_images, keys)


def bits(target, at_0, at_c, at_last):
    return measured({(0, target): at_0, (C, target): at_c, (L, target): at_last}, ("layer", "target"))


def right(share):
    """Of N images the first share."""
    return (np.arange(N) < round(share * N)).astype(float)


def shares(at_c, at_last):
    """Accuracies at c and at the last layer, of each quarter."""
    values = {(share, C): right(value) for share, value in zip(QUARTERS, at_c, strict=True)}
    values |= {(share, L): right(value) for share, value in zip(QUARTERS, at_last, strict=True)}
    return measured(values, ("share", "layer"))


def attention(before, after):
    """Ratios of 5 blocks of two heads, the one as much above the mean as the other is below."""
    heads = ((layer, head) for layer in range(L) for head in range(2))
    return measured({key: (before if key[0] < C else after) + 0.3 * key[1] - 0.15 for key in heads}, ("layer", "head"))


def refit(whole, *without):
    """Accuracy of the whole model, and without block 2, 3 and 4."""
    values = {("block", C + place, None): value for place, value in enumerate(without)}
    return measured({**values, UNCHANGED: whole}, ("part", "layer", "head"))


def windows(whole, before, after):
    return measured({(3, 0, 1): before, (3, 2, 4): after, UNCHANGED: whole}, ("radius", "first", "last"))


def attentive(*falls):
    """What falls from c to the last layer, for each seed; the probe of the mean is another matter."""
    values = {(layer, "mean", seed): 0.5 for layer in (C, L) for seed in range(len(falls))}
    for seed, fall in enumerate(falls):
        values |= {(C, "attentive", seed): right(0.4 + fall), (L, "attentive", seed): right(0.4)}
    return measured(values, ("layer", "probe", "seed"))


current, following = partial(bits, "current pixel"), partial(bits, "next pixel")
FOUR = [0.4, 0.5, 0.6, 0.7]
CASES = [  # function, measurement, value by hand, verdict
    # gains 3/3 a block from c, 1/2 before
    ("next_pixel_after_peak", following(0, 1 + NOISE / 9, 4), 0.5, "held"),
    ("next_pixel_after_peak", following(0, 2 + NOISE / 9, 2), -1, "failed"),
    ("next_pixel_after_peak", following(0, 2 + NOISE, 5.1), 1 / 30, "not resolved"),
    # loses 2/2 a block up to c, 1.5/3 from there on
    ("current_pixel_forgotten_before", current(4, 2 + NOISE / 9, 0.5), 0.5, "held"),
    ("current_pixel_forgotten_before", current(4, 4 + NOISE / 9, 1), -1, "failed"),
    ("current_pixel_forgotten_before", current(4 + NOISE, 2, -1), 0, "not resolved"),
    ("class_by_share", shares(FOUR, [0.3, 0.35, 0.4, 0.4]), 0.1, "held"),
    ("class_by_share", shares(FOUR, [0.3, 0.6, 0.4, 0.4]), -0.1, "failed"),
    ("class_by_share", shares(FOUR, [0.3, 0.5, 0.4, 0.4]), 0, "not resolved"),
    ("class_by_share", shares([0.7, 0.6, 0.6, 0.6], [0.5] * 4), -0.1, "failed"),
    ("attention_narrows", attention(1 + NOISE, 0.6), 0.4, "held"),
    ("attention_narrows", attention(0.6, 1 + NOISE), -0.4, "failed"),
    ("attention_narrows", attention(1 + 9 * NOISE, 0.9), 0.1, "not resolved"),
    ("later_blocks_cost_no_class", refit(right(0.5), right(0.6), right(0.5), right(0.7)), 0.1, "held"),
    ("later_blocks_cost_no_class", refit(right(0.5), right(0.5), right(0.4), right(0.3)), -0.1, "failed"),
    ("later_blocks_cost_no_class", refit(right(0.5), right(0.6), right(0.5), right(0.4)), 0, "not resolved"),
    # loses 0.8/2 a block before c, 0.6/3 from c on
    ("short_window_after_peak", windows(3 + NOISE, 3.8 + NOISE, 3.6 + 1.1 * NOISE), 0.2, "held"),
    ("short_window_after_peak", windows(3, 3.2 + NOISE / 9, 3.6), -0.1, "failed"),
    ("short_window_after_peak", windows(3, 3.4 + NOISE, 3.6), 0, "not resolved"),
    ("attentive_fall", attentive(0.1, 0.05, 0.15), 0.1, "held"),
    ("attentive_fall", attentive(-0.1, -0.1, -0.1), -0.1, "failed"),
    ("attentive_fall", attentive(0.1, -0.1), 0, "not resolved"),
]


@pytest.mark.parametrize(("name", "measurement", "value", "verdict"), CASES, ids=[f"{c[0]} {c[3]}" for c in CASES])
def test_the_answer_is_the_one_by_hand(name, measurement, value, verdict):
    table = getattr(predictions, name)(measurement, C)
    assert list(table)[:7] == list(COLUMNS)
    row = table.iloc[0]
    assert row.verdict == verdict and row.n == N and row.low <= row.value <= row.high
    assert row.value == pytest.approx(value, abs=1e-9)
    place = list(dict.fromkeys(case[0] for case in CASES)).index(name)
    assert (row.prediction, row.number) == (PREDICTIONS[place].words, PREDICTIONS[place].number)


def test_an_interval_by_scipy():
    noise, other = NOISE, np.random.default_rng(1).normal(size=(2, N))
    row = predictions.short_window_after_peak(windows(noise, other[0], other[1]), C).iloc[0]
    per_block = (other[0] - noise) / 2 - (other[1] - noise) / 3
    assert [row.low, row.high] == pytest.approx(list(stats.ttest_1samp(per_block, 0).confidence_interval(0.95)))


def test_the_five_numbers_of_the_class_by_share():
    table = predictions.class_by_share(shares(FOUR, [0.38, 0.46, 0.5, 0.6]), C)
    assert table.value.tolist() == pytest.approx([0.02, 0.02, 0.04, 0.1, 0.1, 0.3])
    assert table.number[5] == "at c: accuracy with the whole image less that with a quarter"
    p = [stats.ttest_rel(right(a), right(b)).pvalue for a, b in [(0.4, 0.38), (0.5, 0.46), (0.6, 0.5), (0.7, 0.6)]]
    assert table.p_holm[1:5].tolist() == pytest.approx([p[0], 2 * p[1], 4 * p[2], 4 * p[2]])
    assert table.low[1] > 0 or table.verdict[1] == "not resolved"
    assert table.verdict[3:].tolist() == ["held"] * 3 and table.verdict[0] == table.verdict[1]


def test_a_quarter_that_is_above_0_by_its_own_interval_alone_is_not_resolved():
    at_last = [0.375] * 2 + [0.575] * 2
    table = predictions.class_by_share(shares([0.4, 0.4, 0.6, 0.6], at_last), C)
    p = stats.ttest_rel(right(0.4), right(0.375)).pvalue
    assert 0.0125 < p < 0.05 and (table.low[1:5] > 0).all()
    assert table.p_holm[1:5].tolist() == pytest.approx([4 * p] * 4)
    assert table.verdict.tolist() == ["not resolved"] * 5 + ["held"]
    assert predictions.describe(table).splitlines()[1].endswith(f"], p = {4 * p:.2g} (Holm)")


def test_the_spread_over_seeds_stands_beside_the_interval_over_images():
    row = predictions.attentive_fall(attentive(0.1, 0.05, 0.15), C).iloc[0]
    spread = stats.t.interval(0.95, 2, 0.1, np.std([0.1, 0.05, 0.15], ddof=1) / 3**0.5)
    assert [row.seeds_low, row.seeds_high] == pytest.approx(list(spread))
    of_images = right(0.45) / 3 + right(0.5) / 3 + right(0.55) / 3 - right(0.4)
    assert [row.low, row.high] == pytest.approx(list(stats.ttest_1samp(of_images, 0).confidence_interval()))
    assert predictions.attentive_fall(attentive(0.1), C)[["seeds_low", "seeds_high"]].isna().all(axis=None)


def test_all_answers_in_a_table():
    both = following(0, 1, 4)
    both.of_images.update(current(4, 2, 0.5).of_images)
    table = lab.answer(
        C, bits=both, prefixes=shares(FOUR, [0.3] * 4), attention=attention(1, 0.6), refit=refit(0, 1, 1, 1),
        windows=windows(3, 4, 3), attentive=attentive(0.1, 0.2),
    )  # fmt: skip
    assert list(table)[:7] == list(COLUMNS) and len(table) == 7 + 5 and (table.verdict == "held").all()
    first = table.drop_duplicates("prediction")
    assert first.number.tolist() == [prediction.number for prediction in PREDICTIONS]
    assert lab.answer(C, attentive=attentive(0.1)).prediction.tolist() == [PREDICTIONS[6].words]
    with pytest.raises(ValueError, match="no measurement; expected one or more of bits"):
        lab.answer(C)


def test_they_are_those_of_the_notebook():
    notebook = Path(__file__).resolve().parents[2] / "notebooks" / "09_why_the_middle.ipynb"
    text = "".join("".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    for place, prediction in enumerate(PREDICTIONS, start=1):
        assert f"| {place} | {prediction.words} | {prediction.number} | " in text


@pytest.mark.parametrize("chosen", [0, L])
@pytest.mark.parametrize("case", {case[0]: case for case in CASES}.values(), ids=lambda case: case[0])
def test_a_peak_at_an_end_is_refused_in_a_line(case, chosen):
    with pytest.raises(ValueError, match=f"layer c = {chosen}, and the last that was measured is L = 5") as caught:
        getattr(predictions, case[0])(case[1], chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", {case[0]: case for case in CASES if "narrows" not in case[0]}.values(), ids=str)
def test_what_was_not_measured_is_refused_in_a_line(case):
    with pytest.raises(ValueError, match="was not measured; measured are") as caught:
        getattr(predictions, case[0])(case[1], 1)
    assert "\n" not in str(caught.value)


def test_all_blocks_and_one_number_for_each():
    partly = attention(1, 0.6)
    del partly.of_images[1, 1]
    with pytest.raises(ValueError, match="layer 1, head 1 was not measured"):
        predictions.attention_narrows(partly, C)
