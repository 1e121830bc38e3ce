"""What a layer's states are reduced to: the mean over positions, the last, the maximum, or means over parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import compare, holm
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult, compare_layers

POOLS = ("mean", "last", "max", "grid:2", "grid:4")


@checked
def compare_poolings(
    model: ImageGPTForCausalImageModeling | str | Path,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    pools: Sequence[str] = POOLS,
    store: str | Path = "stores",
    layers: Sequence[int] | None = None,
    folds: int = 5,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Probe layers under each pooling; one extraction for each goes to `store`.

    `grid:4` has 16 times the features of `mean`.

    Args:
        model: A model, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        pools: Poolings as `record` takes them.
        store: Folder of the stores.
        layers: By default every second, and the last.
        folds: Of the cross-validation that chooses C and layer.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        A row per pooling: `pool`, `chosen_layer`, `n_features`, `test_accuracy` of the chosen layer with its exact 95%
        interval `low`, `high` and `log_loss` in bits, `last_accuracy` of the last, and `drop` between them with
        `drop_low`, `drop_high` and `drop_p` (`compare_layers`), `n_test`. `less_first` is the accuracy of the chosen
        layer less that of the first of `pools`, on the same test images, with its interval `less_first_low`,
        `less_first_high`; `p_value` (McNemar) is corrected for all poolings in `p_holm`. Accuracies are fractions.

    Raises:
        ValueError: An unknown pooling or layer, images without labels or that do not fit the model.

    Example:
        >>> pools = ["mean", "grid:2"]
        >>> table = lab.compare_poolings(model, train_images, test_images, pools=pools, layers=[3], folds=2)
        >>> table[["pool", "chosen_layer", "n_features", "n_test"]]
             pool  chosen_layer  n_features  n_test
        0    mean             3           8     100
        1  grid:2             3          32     100
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    last = model.config.n_layer
    layers = sorted({*range(0, last, 2), last}) if layers is None else layers
    rows: dict[str, dict] = {}
    results: dict[str, ProbeResult] = {}
    for pool in tqdm(pools, desc="poolings", unit="pooling", disable=not progress):
        features = extract(
            model, [train_images, test_images], store=store, pool=pool, layers=layers, device=device, progress=progress
        )
        train, test = (Features.from_store(features, images.split) for images in (train_images, test_images))
        results[pool] = probe_layers(train, test, control=pool, folds=folds, device=device, progress=progress)
        rows[pool] = {"pool": pool} | _row(results[pool]) | _against(results[pool], results[pools[0]])
    corrected = holm({pool: row["p_value"] for pool, row in rows.items() if pool != pools[0]})
    return pd.DataFrame([row | {"p_holm": corrected.get(pool, 1.0)} for pool, row in rows.items()])


def _row(result: ProbeResult) -> dict:
    """The chosen layer and the drop from it to the last."""
    row, drop = result.table.set_index("layer").loc[result.chosen], compare_layers(result)
    facts = {"chosen_layer": result.chosen, "n_features": int(row.n_features)}
    facts |= {name: row[name] for name in ("test_accuracy", "low", "high", "log_loss")}
    ends = {"drop": drop.difference, "drop_low": drop.low, "drop_high": drop.high, "drop_p": drop.p_value}
    return facts | {"last_accuracy": drop.last_accuracy, **ends, "n_test": drop.n_test}


def _against(result: ProbeResult, first: ProbeResult) -> dict:
    """The chosen layers of two poolings on the same test images."""
    paired = compare(result.correct[result.chosen], first.correct[first.chosen])
    ends = {"less_first": paired.difference, "less_first_low": paired.low, "less_first_high": paired.high}
    return ends | {"p_value": paired.p_value}
