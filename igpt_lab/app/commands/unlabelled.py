"""The command that needs no labels: probes for properties of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app import runs
from igpt_lab.app.commands.options import (
    CONFIG,
    DEVICE,
    IMAGES,
    LAYERS,
    LIMIT,
    MODEL,
    REVISION,
    STORE,
    argument,
    command,
    train_and_test,
)

OUT = argument("--out", help=f"folder for the figure and its table (default: {runs.MINE}/MODEL-IMAGES)")


@command(
    MODEL,
    IMAGES,
    LIMIT,
    CONFIG,
    LAYERS,
    STORE,
    OUT,
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "cifar10-xs photos --limit 2000 --layers 0 6 12"),
)
def properties(
    model: str, images: str, limit: int | None, config: str | None, layers: list[int] | None, store: str,
    out: str | None, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Probe every layer for colour, brightness, contrast, frequencies, orientation and symmetry: no labels are needed.

    Written is the figure of R² over depth, with its table: properties.csv.
    """
    splits = train_and_test(images, limit=limit, config=config)
    loaded = lab.load_model(model, revision=revision)
    features = lab.extract(loaded, splits, store=store, layers=layers, device=device)
    numbers = [lab.image_properties(split, loaded.processor) for split in splits]
    result = lab.probe_targets(*(lab.StoredLayers(features, split.split) for split in splits), *numbers)
    curves = lab.figures.target_curves(result.table, title=f"{loaded.name} on {splits[0].name}")
    record = lab.RunRecord("properties", {"store": features.key}, seed=0)
    folder = Path(runs.results_folder(model, images, out, under=runs.MINE))
    files = lab.figures.save_figure(curves, folder / "properties", data=result.table, record=record)
    print(*map(_in_words, result.table[result.table.chosen].to_dict("records")), *files, sep="\n")


def _in_words(row: dict[str, Any]) -> str:
    """The best layer of a target, in a line."""
    return f"{row['target']}: R² {row['test_r2']:.3f} [{row['low']:.3f}, {row['high']:.3f}] at layer {row['layer']}"
