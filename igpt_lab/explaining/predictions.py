"""The seven predictions of "Why the middle?", and the rule by which measurements answer them.

Chen et al. (2020) suggest two phases: first each position gathers its surroundings, then what was gathered serves to
predict the next pixel. Every prediction is that a number is above 0. It is "held" where its 95% t interval over test
images lies above 0, "failed" where it lies below, and "not resolved" where it contains 0.

c is the layer that validation chose for the class, and L the last one: the last that was measured, or the end of the
last block that was. Each function takes `chosen`, c, and returns a table with COLUMNS whose first row is the answer;
where that is the worst of several numbers, these follow. Each raises ValueError where c is not between 0 and L, as
there is then nothing to compare, and for what was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import holm, mean_interval
from igpt_lab.explaining.measurement import UNCHANGED, Measurement

COLUMNS = ("prediction", "number", "value", "low", "high", "n", "verdict")
VERDICTS = ("failed", "not resolved", "held")  # from the worst on
LEVEL = 0.05
QUARTERS = (0.25, 0.5, 0.75, 1.0)
RADIUS = 3  # pixels of the window


@dataclass(frozen=True)
class Prediction:
    """What is predicted, and the number above 0 that it says."""

    words: str
    number: str


PREDICTIONS = (
    Prediction(
        "A linear readout of the next pixel improves mainly after the class peak.",
        "bits about the next pixel gained a block from c to L, less those gained a block from 0 to c",
    ),
    Prediction(
        "The input pixel is forgotten up to the peak, and not after it.",
        "bits about the current pixel lost a block from 0 to c, less those lost a block from c to L",
    ),
    Prediction(
        "The class grows with the share of the image that is seen, up to the peak; late layers lose it at all "
        "positions.",
        "at every quarter of the image: accuracy at c less accuracy at L (p corrected for the four); and at c: "
        "accuracy with the whole image less that with a quarter",
    ),
    Prediction(
        "Attention is wide before the peak and narrow after it, measured against uniform attention.",
        "mean distance over that of uniform attention: mean over blocks before c, less mean over blocks from c on",
    ),
    Prediction(
        "Leaving out a block before the peak costs class and pixels; one after it costs pixels only, and a probe that "
        "is fitted again on the last layer gains.",
        "mean over blocks from c on: accuracy of the last layer's probe, fitted again without the block, less with it",
    ),
    Prediction(
        "Attention that sees 3 pixels only costs few nats after the peak.",
        "nats lost with a window of 3 in the blocks before c, less those lost with it in the blocks from c on, each a "
        "block",
    ),
    Prediction("An attentive probe keeps the fall.", "accuracy of the attentive probe at c less at L"),
)  # as notebook 9 has them


@checked
def next_pixel_after_peak(bits: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 1, from `bits_by_layer` with the target `next pixel` at layers 0, c and L."""
    return _answered(0, bits.contrast(_speeds(bits, chosen, "next pixel")))


@checked
def current_pixel_forgotten_before(bits: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 2, from `bits_by_layer` with the target `current pixel` at layers 0, c and L."""
    return _answered(1, bits.contrast(_speeds(bits, chosen, "current pixel")))


@checked
def class_by_share(prefixes: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 3, from `probe_prefixes` with `shares` a multiple of four, at layers c and L: a row for each number.

    It is held where all five numbers are, and failed where one is. That of a quarter of the image is held where its p
    of the paired t test, corrected for the four (Holm, 1979: `p_holm`), is at most 0.05 as well. The first row repeats
    the least favourable one: the lowest value among those of the worst verdict.
    """
    last = int(prefixes.table.layer.max())
    check_chosen(chosen, last)
    rows, p_values = [], {}
    for share in QUARTERS:
        weights = {(share, chosen): 1.0, (share, last): -1.0}
        name = f"at {share:.0%} of the image: accuracy at c less at L"
        rows.append({"number": name} | _judged(prefixes.contrast(weights)))
        p_values[name] = _p_value(prefixes.weighted(weights))
    for row, corrected in zip(rows, holm(p_values).values(), strict=True):
        row["p_holm"] = corrected
        if row["verdict"] == "held" and corrected > LEVEL:
            row["verdict"] = "not resolved"
    grown = prefixes.contrast({(QUARTERS[-1], chosen): 1.0, (QUARTERS[0], chosen): -1.0})
    rows.append({"number": "at c: accuracy with the whole image less that with a quarter"} | _judged(grown))
    worst = min(rows, key=lambda row: (VERDICTS.index(row["verdict"]), row["value"]))
    table = pd.DataFrame([worst | {"number": PREDICTIONS[2].number}, *rows])
    return table.assign(prediction=PREDICTIONS[2].words)[[*COLUMNS, "p_holm"]]


@checked
def attention_narrows(attention: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 4, from `attention_maps` of all blocks."""
    blocks = int(attention.table.layer.max()) + 1
    check_chosen(chosen, blocks)
    heads = attention.table["head"].unique().tolist()
    weights: dict[tuple, float] = {}
    for layer in range(blocks):
        share = 1 / chosen if layer < chosen else -1 / (blocks - chosen)
        weights |= {(layer, head): share / len(heads) for head in heads}
    return _answered(3, attention.contrast(weights))


@checked
def later_blocks_cost_no_class(refit: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 5, from `refit_after` with the part `block` of all blocks from c on."""
    blocks = int(refit.table.layer.max()) + 1
    check_chosen(chosen, blocks)
    weights = {("block", layer, None): 1 / (blocks - chosen) for layer in range(chosen, blocks)}
    return _answered(4, refit.contrast({**weights, UNCHANGED: -1.0}))


@checked
def short_window_after_peak(windows: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 6, from `windows` of radius 3 over the blocks 0 to c - 1, and over those from c to the last."""
    blocks = int(windows.table["last"].max()) + 1
    check_chosen(chosen, blocks)
    before, after = 1 / chosen, 1 / (blocks - chosen)
    ranges = {(RADIUS, 0, chosen - 1): before, (RADIUS, chosen, blocks - 1): -after}
    return _answered(5, windows.contrast({**ranges, UNCHANGED: after - before}))


@checked
def attentive_fall(attentive: Measurement, chosen: int) -> pd.DataFrame:
    """Prediction 7, from `probe_attentive` at layers c and L: of each image the mean over seeds.

    `seeds_low` and `seeds_high` are the 95% t interval over seeds, NaN of one seed.
    """
    last = int(attentive.table.layer.max())
    check_chosen(chosen, last)
    seeds = attentive.table.seed.unique().tolist()
    falls = {seed: {(chosen, "attentive", seed): 1.0, (last, "attentive", seed): -1.0} for seed in seeds}
    weights = {key: weight / len(seeds) for fall in falls.values() for key, weight in fall.items()}
    answer = _answered(6, attentive.contrast(weights))
    _, low, high = mean_interval(np.array([attentive.weighted(fall).mean() for fall in falls.values()]))
    return answer.assign(seeds_low=float(low), seeds_high=float(high))


@checked
def answer(
    chosen: int,
    *,
    bits: Measurement | None = None,
    prefixes: Measurement | None = None,
    attention: Measurement | None = None,
    refit: Measurement | None = None,
    windows: Measurement | None = None,
    attentive: Measurement | None = None,
) -> pd.DataFrame:
    """The answers that these measurements give to PREDICTIONS, in their order; those of no measurement are left out.

    Args:
        chosen: c, the layer that validation chose for the class; not the first and not the last.
        bits: Of `bits_by_layer`, answers the first and the second.
        prefixes: Of `probe_prefixes`, the third.
        attention: Of `attention_maps`, the fourth.
        refit: Of `refit_after`, the fifth.
        windows: Of `windows`, the sixth.
        attentive: Of `probe_attentive`, the seventh.

    Returns:
        `prediction`, `number` (what is predicted to be above 0), its `value` with the 95% t interval over images `low`,
        `high`, `n` images, `verdict` ("held", "failed" or "not resolved"), and where they apply `p_holm` and `seeds_*`.
        The first row of a prediction is its answer; that of the third is followed by its five numbers.

    Raises:
        ValueError: No measurement, c not between the first layer and the last, or a layer, head or share that was not
            measured.

    Example:
        >>> targets = ["current pixel", "next pixel"]
        >>> bits = lab.bits_by_layer(model, train_tokens[:50], tokens, targets=targets, n_states=5)
        >>> lab.answer(1, bits=bits)[["prediction", "n"]]
                                                  prediction    n
        0  A linear readout of the next pixel improves ma...  100
        1  The input pixel is forgotten up to the peak, a...  100
    """
    questions = (
        (next_pixel_after_peak, bits),
        (current_pixel_forgotten_before, bits),
        (class_by_share, prefixes),
        (attention_narrows, attention),
        (later_blocks_cost_no_class, refit),
        (short_window_after_peak, windows),
        (attentive_fall, attentive),
    )
    tables = [function(measured, chosen) for function, measured in questions if measured is not None]
    if not tables:
        raise ValueError("no measurement; expected one or more of bits, prefixes, attention, refit, windows, attentive")
    return pd.concat(tables, ignore_index=True)


def describe(answers: pd.DataFrame) -> str:
    """A table of `answer` in words, a line for each row; the numbers that one answer is made of are set in."""
    lines = []
    for row in answers.itertuples():
        is_first = row.number in {prediction.number for prediction in PREDICTIONS}
        name = row.prediction if is_first else f"  {row.number}"
        p_holm = getattr(row, "p_holm", np.nan)
        corrected = "" if np.isnan(p_holm) else f", p = {p_holm:.2g} (Holm)"
        lines.append(f"{name} {row.verdict}: {row.value:.4g} [{row.low:.4g}, {row.high:.4g}]{corrected}")
    return "\n".join(lines)


def verdict(low: float, high: float) -> str:
    """What an interval says of a number that is predicted to be above 0."""
    return "held" if low > 0 else "failed" if high < 0 else "not resolved"


def _judged(numbers: dict[str, float]) -> dict:
    return {**numbers, "verdict": verdict(numbers["low"], numbers["high"])}


def _answered(place: int, numbers: dict[str, float]) -> pd.DataFrame:
    """The row of a prediction that one number decides."""
    asked = PREDICTIONS[place]
    return pd.DataFrame([{"prediction": asked.words, "number": asked.number} | _judged(numbers)])[list(COLUMNS)]


def check_chosen(chosen: int, last: int) -> None:
    if not 0 < chosen < last:
        raise ValueError(
            f"layer c = {chosen}, and the last that was measured is L = {last}: the predictions compare what is before "
            f"c with what is from c on; expected c from 1 to {last - 1}, and measurements up to the last layer"
        )


def _speeds(bits: Measurement, chosen: int, target: str) -> dict[tuple, float]:
    """Weights of bits gained a block from c to L, less those gained a block from 0 to c."""
    last = int(bits.table.layer.max())
    check_chosen(chosen, last)
    before, after = 1 / chosen, 1 / (last - chosen)
    return {(0, target): before, (chosen, target): -before - after, (last, target): after}


def _p_value(differences: np.ndarray) -> float:
    """Two-sided p of the paired t test; of differences that are all the same, 1 where they are 0, else 0."""
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(ttest_1samp(differences, 0).pvalue)
