"""Where the peak lies on images unlike those of pretraining: probes of clean images, scored on corrupted ones.

Probes, their C and the layer are those of clean training images alone, as under a distribution shift that nobody
foresaw. Each probe is fitted once and scored on every version of the test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import compare_choice, middle_of_best
from igpt_lab.core.devices import best_device
from igpt_lab.core.peaks import layer_table
from igpt_lab.core.progress import tqdm
from igpt_lab.core.seeds import OVER_IMAGES, families_of, group_by_seed, summarise_runs, summarise_seeds
from igpt_lab.core.significance import holm, mean_difference
from igpt_lab.features.extraction import extract
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.corruptions import CORRUPTIONS, corrupt
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features
from igpt_lab.probing.labels import log_loss_columns
from igpt_lab.probing.probes import CS, probe_layers
from igpt_lab.probing.results import ProbeResult
from igpt_lab.training.dynamics import checkpoints_of

# Under the mean over positions, `qkv` is an affine map of `ln_1`, and `resid_post` is the next block's `resid_pre`.
POINTS = ("resid_pre", "ln_1", "head_out", "attn_out", "resid_mid", "ln_2", "mlp_act", "mlp_out")
LEVELS: dict[str, tuple[float, ...]] = {"contrast": (0.7, 0.4, 0.2), "blur": (1.0, 2.0, 4.0)}
KEYS = ["point", "corruption", "level"]
MEASURES = OVER_IMAGES | {
    "best_depth": OVER_IMAGES["depth"],
    "drop_best": ("drop_best_low", "drop_best_high"),
    "drop_change": ("drop_change_low", "drop_change_high"),
}


@checked
def probe_shift(
    runs: Mapping[str, str | Path],
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    points: Sequence[str] = POINTS,
    corruptions: Mapping[str, Sequence[float]] = LEVELS,
    store: str | Path = "stores",
    Cs: Sequence[float] = CS,
    folds: int = 10,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How a probe of clean images does on corrupted ones, by run, point of the block and layer.

    Args:
        runs: Name -> source; a name FAMILY-seed-S is seed S of its family, and each run's last checkpoint is probed.
        train_images, test_images: Two splits with labels, of images and not of tokens.
        points: Places in a block, see `record`.
        corruptions: Levels of each (`corrupt`); before them comes the level that changes nothing, the clean images.
        store: Folder of the stores.
        Cs: Inverse strengths of the penalty to choose from.
        folds: Of the cross-validation.
        seed: Of the folds.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        A row per run, point of the block, version of the test images and layer. The columns are those of `probe_layers`
        for the clean training images, with the accuracy and log loss on a version of the test images, and `family`,
        `seed_of_pretraining`, `model`, `step`, `point`, `corruption`, `level`. `chosen` marks the layer that the folds
        of the training images chose, the same for every version; `best` the layer that is best on these test images,
        which is nobody's choice. Accuracies are fractions. The same in all layers of a version are

        - `drop`: accuracy of the chosen layer less the last one's, with `drop_low`, `drop_high` and `drop_p`
          (`compare`), and `drop_choice_low`, `drop_choice_high` (`compare_choice`);
        - `drop_best`: that of the best layer, with an interval that holds although the best was picked on these images:
          the highest of the lower, and of the upper ends that hold for all layers at once (`layer_table`);
        - `drop_change`: `drop` less that on the clean images, paired over images (`mean_difference`).

    Raises:
        ValueError: Two runs of one family and seed, an unknown point, corruption or level, or tokens for images.

    Example:
        >>> chosen = {"points": ["ln_1"], "corruptions": {"contrast": [0.5]}, "Cs": [0.1]}
        >>> table = lab.probe_shift({"tiny-seed-0": "tiny"}, train_images, test_images, **chosen)
        >>> table[["family", "seed_of_pretraining", "corruption", "level", "layer"]].tail(2)
          family  seed_of_pretraining corruption  level  layer
        6   tiny                    0   contrast    0.5      2
        7   tiny                    0   contrast    0.5      3
    """
    families_of(runs)
    checkpoints = {name: checkpoints_of(source).popitem() for name, source in runs.items()}
    versions = _versions(test_images, corruptions)
    tables, steps = [], len(runs) * (len(versions) + len(points))
    with tqdm(total=steps, desc="image sets", disable=not progress) as bar:
        for name, (step, folder) in checkpoints.items():
            model = load_model(folder).to(best_device(device))
            reading: dict[str, Any] = {"store": store, "points": points, "device": device, "progress": False}
            clean, stores = extract(model, [train_images, test_images], **reading), {}
            for key, images in versions.items():
                stores[key] = clean if images is test_images else extract(model, images, **reading)
                bar.update()
            for point in points:
                train = Features.from_store(clean, train_images.split, point)
                test = _one_behind_another([*stores.values()], test_images.split, point)
                result = probe_layers(train, test, Cs=Cs, folds=folds, seed=seed, device=device, progress=False)
                tables.append(_scored(result, list(stores)).assign(model=name, step=step, point=point))
                bar.update()
    table = group_by_seed(pd.concat(tables, ignore_index=True))
    front = ["family", "seed_of_pretraining", "model", "step", *KEYS]
    return table[front + [column for column in table if column not in front]]


@checked
def summarise_shift_runs(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each run, point and version of the test images of `probe_shift`: `summarise_runs`, and the best layer.

    `best_layer`, `best_depth` (as a share of the last one) and `best_height` are of the layer that is best on these
    test images. `drop_p_holm` is corrected for all rows.
    """
    groups = []
    for keys, rows in table.groupby(KEYS, sort=False):
        runs, best = summarise_runs(rows), rows[rows.best.eq(True)]
        runs = runs.assign(best_layer=best.layer.to_numpy(), best_height=best.test_accuracy.to_numpy())
        runs = runs.assign(best_depth=runs.best_layer / runs.last_layer.clip(lower=1))
        groups.append(_with_keys(runs, keys))
    runs = pd.concat(groups, ignore_index=True)
    return runs.assign(drop_p_holm=list(holm({str(row): p for row, p in enumerate(runs.drop_p)}).values()))


@checked
def summarise_shift(runs: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """A row for each family, point and version of the test images of `summarise_shift_runs`: seeds, beside images.

    Columns as `summarise_seeds`, of `depth`, `height` and `drop` (of the layer that clean training images chose),
    `best_depth` and `drop_best` (of the layer that is best on these test images), and `drop_change`.
    """
    groups = [
        _with_keys(summarise_seeds(rows, alpha=alpha, measures=MEASURES), keys)
        for keys, rows in runs.groupby(KEYS, sort=False)
    ]
    return pd.concat(groups, ignore_index=True)


def _with_keys(table: pd.DataFrame, keys: tuple) -> pd.DataFrame:
    """The table with the point, corruption and level behind its first column, the family."""
    for place, (name, value) in enumerate(zip(KEYS, keys, strict=True), start=1):
        table.insert(place, name, value)
    return table


def _versions(
    images: ImageSet | TokenSet, corruptions: Mapping[str, Sequence[float]]
) -> dict[tuple[str, float], ImageSet | TokenSet]:
    """(corruption, level) -> images, from the clean ones on, which are the set itself, to the most corrupted."""
    versions: dict[tuple[str, float], ImageSet | TokenSet] = {}
    for corruption, levels in corruptions.items():
        changed = {float(level): corrupt(images, corruption, level) for level in levels}
        clean = CORRUPTIONS[corruption].clean
        for level in sorted({clean, *changed}, key=lambda level: abs(level - clean)):
            versions[corruption, level] = images if level == clean else changed[level]
    if not versions:
        raise ValueError(f"got no corruptions; expected levels of {' or '.join(CORRUPTIONS)}")
    return versions


def _one_behind_another(stores: Sequence[FeatureStore], split: str, point: str) -> Features:
    """The features of all versions of the test images as those of one set, so that a probe is fitted once for all."""
    parts = [Features.from_store(store, split, point) for store in stores]
    layers = {layer: np.concatenate([part.layers[layer] for part in parts]) for layer in parts[0].layers}
    labels, index = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "index"))
    return Features(layers, labels, index, parts[0].names)


def _scored(result: ProbeResult, versions: Sequence[tuple[str, float]]) -> pd.DataFrame:
    """The rows of all layers for each version, whose test images are one behind another in `result`."""
    right = {layer: correct.reshape(len(versions), -1) for layer, correct in result.correct.items()}
    last = max(right)
    lost = right[result.chosen].astype(float) - right[last]
    tables = []
    bits = {layer: values.reshape(len(versions), -1) for layer, values in result.log_loss.items()}
    for i, (corruption, level) in enumerate(versions):
        correct = {layer: rows[i] for layer, rows in right.items()}
        losses = [{"layer": layer} | (log_loss_columns(bits[layer][i]) if bits else {}) for layer in correct]
        clean = versions.index((corruption, CORRUPTIONS[corruption].clean))
        change = mean_difference(lost[i : i + 1] - lost[clean])
        rows = _of_version(result, correct, pd.DataFrame(losses), last).assign(corruption=corruption, level=level)
        ends = {f"drop_change_{end}": change[end] for end in ("low", "high")}
        tables.append(rows.assign(drop_change=change["difference"], **ends))
    return pd.concat(tables, ignore_index=True)


def _of_version(result: ProbeResult, correct: dict[int, np.ndarray], losses: pd.DataFrame, last: int) -> pd.DataFrame:
    """The rows of all layers for one version of the test images, but for the change; `losses` are its log losses."""
    tested = layer_table(correct, chosen=result.chosen, last=last)
    drop = tested[tested.layer == result.chosen].iloc[0]
    best = int(middle_of_best(tested.test_accuracy.to_numpy()))
    choice_low, choice_high = compare_choice(correct, result.folds, last)
    scores = tested[["layer", "test_accuracy", "low", "high", "in_peak_set"]].merge(losses, on="layer")
    fitted = result.table.drop(columns=[*scores.columns[1:]])
    return fitted.merge(scores, on="layer").assign(
        n_test=len(correct[last]), best=lambda rows: rows.layer == tested.layer[best],
        drop=drop.minus_last, drop_low=drop.minus_last_low, drop_high=drop.minus_last_high, drop_p=drop.minus_last_p,
        drop_choice_low=choice_low, drop_choice_high=choice_high, drop_best=tested.minus_last.max(),
        drop_best_low=tested.minus_last_low_all.max(), drop_best_high=tested.minus_last_high_all.max(),
    )  # fmt: skip
