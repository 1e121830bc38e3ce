"""Scores of layers that need no labels, and what a layer that one of them picks loses against the one labels choose.

Which end of a score is the better one was fixed from the literature before any regret was computed (SCORES).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import middle_of_best
from igpt_lab.core.depth import in_depth
from igpt_lab.core.display import say_once
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy, compare
from igpt_lab.explaining.trajectories import MEASURES, measure_states
from igpt_lab.features.extraction import extract
from igpt_lab.features.store import StoredLayers
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.tokens import tokenize
from igpt_lab.images.views import second_view
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.entropies import dime, info_nce, lidar, matrix_entropy
from igpt_lab.probing.geometry import measure_layers
from igpt_lab.probing.results import ProbeResult


class Score(NamedTuple):
    """Which end of a score picks the layer, and who says so."""

    better: str
    source: str


SCORES = {
    "effective_rank": Score("highest", "Garrido et al., 2023: RankMe, the rank of the features"),
    "participation_ratio": Score("highest", "as the effective rank, by variance"),
    "intrinsic_dimension": Score("highest", "Cheng et al., 2025: abstraction at the peak of the dimension"),
    "matrix_entropy": Score("highest", "Skean et al., 2025: entropy of a set, as a rank"),
    "image_entropy": Score("lowest", "Skean et al., 2025: the valley of an autoregressive vision model"),
    "curvature": Score("lowest", "Hosseini and Fedorenko, 2023: paths that are straightened"),
    "info_nce": Score("lowest", "van den Oord et al., 2018; Skean et al., 2025: a loss"),
    "lidar": Score("highest", "Thilak et al., 2024: the rank of what tells images apart"),
    "dime": Score("highest", "Skean et al., 2023: what two views share"),
}
RULES = ("middle layer", "last layer")  # that look at nothing


@checked
def score_layers(
    model: ImageGPTForCausalImageModeling | str | Path,
    images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    of_states: int = 200,
    shift: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Every score of every layer of a model, from images alone.

    Two extractions go to `store`: of the images, and of a second view of them (`second_view`).

    Args:
        model: A model, or what `load_model` takes.
        images: One split, of images and not of tokens; labels are not read. LiDAR takes more of them than a layer is
            wide; of fewer it is left out, as stderr says, and its column is NaN.
        store: Folder of the stores.
        of_states: Images, at most, from the first on, of whose single states `measure_states` reckons.
        shift: Of the second view, in pixels.
        seed: Of the second view, and of DiME's permutations.
        device: Where model and search run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        A row per layer: `layer`; the columns of `measure_layers` for `intrinsic_dimension`, `effective_rank` and
        `participation_ratio`; `matrix_entropy`, `info_nce` and `dime` in nats, `lidar` in dimensions; `image_entropy`
        in nats, `curvature` and `curvature_at_row_ends` in radians, each with `_low` and `_high`, 95% over images;
        `tokens_changed`, the share of tokens that differ between the views; `n` images and `n_states` of these.

    Raises:
        ValueError: Tokens for images, or images that do not fit the model.

    Example:
        >>> table = lab.score_layers(model, train_images, of_states=20)
        >>> table[["layer", "n", "n_states"]]
           layer    n  n_states
        0      0  200        20
        1      1  200        20
        2      2  200        20
        3      3  200        20
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    both = images, second_view(images, shift=shift, seed=seed)
    options: dict[str, Any] = {"store": store, "device": device, "progress": progress}
    layers, views = (StoredLayers(extract(model, split, **options), split.split) for split in both)
    tokens, others = (tokenize(split, model.processor, progress=progress) for split in both)
    table = measure_layers(layers, device=device, progress=progress).drop(columns=["control", "neighbours", "discard"])
    table = table[[name for name in table if not name.startswith("label_overlap")]]
    rows = [
        _scores(layers[layer], views[layer], seed)
        for layer in tqdm(layers, desc="scores", unit="layer", disable=not progress)
    ]
    states = measure_states(model, tokens[:of_states], progress=progress).table
    table = table.join(_whole(rows)).join(_wide(states), on="layer")
    return table.assign(tokens_changed=float((tokens != others).mean()), n_states=len(tokens[:of_states]))


def _scores(first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, float]:
    """Of two views (N, D) of a layer; NaN for one that they are too few for, which stderr names."""
    scores: dict[str, Callable[[], float]] = {
        "matrix_entropy": lambda: matrix_entropy(first),
        "info_nce": lambda: info_nce(first, second),
        "lidar": lambda: lidar(first, second),
        "dime": lambda: dime(first, second, seed=seed),
    }
    values = {}
    for name, score in scores.items():
        try:
            values[name] = score()
        except ValueError as error:
            say_once(f"igpt-lab: {name} is left out: {error}")
            values[name] = np.nan
    return values


def _whole(rows: list[dict[str, float]]) -> pd.DataFrame:
    """Scores of the layers, a column of NaN for one that some layer lacks: layers are compared by it."""
    table = pd.DataFrame(rows)
    return table.assign(**{name: np.nan for name in table if table[name].isna().any()})


def _wide(states: pd.DataFrame) -> pd.DataFrame:
    """The table of `measure_states` with a row per layer, and the columns of each measure."""
    parts = []
    for measure in MEASURES:
        rows = states[states.measure == measure].set_index("layer")[["value", "low", "high"]]
        parts.append(rows.set_axis([measure, f"{measure}_low", f"{measure}_high"], axis=1))
    return pd.concat(parts, axis=1)


@checked
def regret(scores: pd.DataFrame, result: ProbeResult, *, n_boot: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """What is lost where a score without labels picks the layer: a row for each of SCORES, and for two plain rules.

    Args:
        scores: A row per layer, as `score_layers` gives them, or `measure_layers` of any network; `layer` and any
            columns of SCORES, of which those without any value are left out.
        result: Probes of the same layers, of which labels chose one.
        n_boot: Draws of the bootstrap over test images (`significance.compare`).
        seed: Of these.

    Returns:
        A row per score: `score`, `better` (the end that picks: highest or lowest), `source`; `picked_layer` (of equal
        ones the middle), `test_accuracy` there with its exact 95% interval `low`, `high`; `chosen_layer`, the one that
        labels chose, and `chosen_accuracy`; `regret`, the accuracy of the chosen layer less that of the picked one, on
        the same test images, with its 95% interval `regret_low`, `regret_high` and McNemar's `p_value`; `n_test`. Last
        come the rules "middle layer" and "last layer", which look at nothing. Accuracies are fractions. Intervals take
        the probes and both layers as they are.

    Raises:
        ValueError: Scores of other layers than the probes', without any of SCORES, or that are not finite.

    Example:
        >>> scores = pd.DataFrame({"layer": [0, 1, 2, 3], "effective_rank": [3.0, 5.0, 4.0, 2.0]})
        >>> lost = lab.regret(scores, result)
        >>> lost[["score", "better", "picked_layer", "n_test"]]
                    score   better  picked_layer  n_test
        0  effective_rank  highest             1     100
        1    middle layer                      2     100
        2      last layer                      3     100
    """
    layers = in_depth(result.correct)
    names = [name for name in SCORES if name in scores and scores[name].notna().any()]
    if "layer" not in scores or len(scores) != len(layers) or set(scores.layer) != set(layers) or not names:
        raise ValueError(
            f"scores with columns {list(scores)}; expected a row for each of the layers {layers}, and one or more of "
            f"{', '.join(SCORES)}"
        )
    scores = scores.set_index("layer").loc[layers]
    picks = {}
    for name in names:
        values = scores[name].to_numpy(float)
        if not np.isfinite(values).all():
            wrong = layers[int(np.argmin(np.isfinite(values)))]
            raise ValueError(f"{name} is not finite at layer {wrong}; leave the column out")
        sign = 1 if SCORES[name].better == "highest" else -1
        picks[name] = layers[int(middle_of_best(sign * values))]
    picks |= dict(zip(RULES, (layers[len(layers) // 2], layers[-1]), strict=True))
    return pd.DataFrame([_lost(name, layer, result, n_boot, seed) for name, layer in picks.items()])


def _lost(name: str, layer: int, result: ProbeResult, n_boot: int, seed: int) -> dict:
    """A row of `regret`."""
    better, source = SCORES.get(name, Score("", "no score: what one would take without any"))
    paired = compare(result.correct[result.chosen], result.correct[layer], n_boot=n_boot, seed=seed)
    same = layer == result.chosen  # nothing is lost, and that is certain
    ends = {"regret": paired.difference, "regret_low": 0.0 if same else paired.low}
    ends |= {"regret_high": 0.0 if same else paired.high, "p_value": paired.p_value, "n_test": paired.n_test}
    chosen = {"chosen_layer": result.chosen, "chosen_accuracy": paired.accuracy_a}
    named = {"score": name, "better": better, "source": source, "picked_layer": layer}
    return named | accuracy(result.correct[layer]) | chosen | ends
