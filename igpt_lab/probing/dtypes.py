"""What matrix products in bfloat16 cost a probe: the same layers in both number formats, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import compare, holm
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult


@checked
def compare_dtypes(
    model: ImageGPTForCausalImageModeling | str | Path,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    layers: Sequence[int] | None = None,
    folds: int = 10,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Probe layers whose features were computed in float32 and in bfloat16; an extraction of each goes to `store`.

    Args:
        model: A model, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        store: Folder of the stores.
        layers: All by default.
        folds: Of the cross-validation that chooses C and layer.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        A row per layer: `layer`; `relative_error`, the largest difference between the two formats' features of test
        images, over the largest feature of the layer; `changed`, the share of test images that get another class;
        `C` and `C_bfloat16`; `accuracy` and `accuracy_bfloat16`, and `difference`, the second less the first, on the
        same images, with its 95% interval `low`, `high`, `p_value` (McNemar), corrected for all layers in `p_holm`;
        `chosen` and `chosen_bfloat16`, whether cross-validation chose the layer; `n_test`. Accuracies are fractions.

    Raises:
        ValueError: A layer that the model has not, images without labels or that do not fit the model.

    Example:
        >>> table = lab.compare_dtypes(model, train_images, test_images, layers=[1, 3], folds=2, progress=False)
        >>> table[["layer", "n_test"]]
           layer  n_test
        0      1     100
        1      3     100
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    images, probed = [train_images, test_images], []
    for dtype in ("float32", "bfloat16"):
        features = extract(model, images, store=store, dtype=dtype, layers=layers, device=device, progress=progress)
        train, test = (Features.from_store(features, split.split) for split in images)
        result = probe_layers(train, test, control=dtype, folds=folds, device=device, progress=progress)
        probed.append((test, result))
    (test, wide), (test_low, low) = probed
    rows = [
        {"layer": layer, "relative_error": _distance(test_low.layers[layer], test.layers[layer])}
        | _against(low, wide, layer)
        for layer in wide.correct
    ]
    corrected = holm({str(row["layer"]): row["p_value"] for row in rows})
    return pd.DataFrame([row | {"p_holm": corrected[str(row["layer"])]} for row in rows])


def _distance(low: np.ndarray, wide: np.ndarray) -> float:
    """The largest difference, over the largest number; 0 where there is no difference, of zeros too."""
    largest = np.abs(low - wide).max()
    return float(largest / np.abs(wide).max()) if largest else 0.0


def _against(low: ProbeResult, wide: ProbeResult, layer: int) -> dict:
    """Classes and accuracy of a layer in bfloat16 against float32."""
    paired = compare(low.correct[layer], wide.correct[layer])
    strengths = [result.table.set_index("layer").C[layer] for result in (wide, low)]
    predicted = [result.predicted[layer] for result in (wide, low)]
    return {
        "changed": float(np.mean(predicted[0] != predicted[1])),
        "C": strengths[0], "C_bfloat16": strengths[1],
        "accuracy": paired.accuracy_b, "accuracy_bfloat16": paired.accuracy_a,
        "difference": paired.difference, "low": paired.low, "high": paired.high, "p_value": paired.p_value,
        "chosen": layer == wide.chosen, "chosen_bfloat16": layer == low.chosen, "n_test": paired.n_test,
    }  # fmt: skip
