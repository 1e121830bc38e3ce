"""Commands that need no labels: probes for properties of images, and scores of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app import runs
from igpt_lab.app.commands.options import (
    CONFIG,
    DEVICE,
    IMAGES,
    LABEL,
    LAYERS,
    LIMIT,
    MODEL,
    ON_BAD_IMAGE,
    OUT,
    REVISION,
    STORE,
    argument,
    command,
    in_lines,
    loaded,
    set_of,
    train_and_test,
)
from igpt_lab.core.provenance import atomic_write


@command(
    MODEL,
    IMAGES,
    LIMIT,
    CONFIG,
    ON_BAD_IMAGE,
    LAYERS,
    STORE,
    OUT,
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "cifar10-xs photos --limit 2000 --layers 0 6 12"),
)
def properties(
    model: str, images: str, limit: int | None, config: str | None, on_bad_image: str,
    layers: list[int] | None, store: str, out: str | None, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Probe every layer for colour, brightness, contrast, frequencies, orientation and symmetry: no labels are needed.

    Written is the figure of R² over depth, with its table: properties.csv.
    """
    splits = train_and_test(images, limit=limit, config=config, on_bad_image=on_bad_image)
    network = lab.load_model(model, revision=revision)
    features = lab.extract(network, splits, store=store, layers=layers, device=device)
    numbers = [lab.image_properties(split, network.processor) for split in splits]
    result = lab.probe_targets(*(lab.StoredLayers(features, split.split) for split in splits), *numbers)
    curves = lab.figures.target_curves(result.table, title=f"{network.name} on {splits[0].name}")
    record = lab.RunRecord("properties", {"store": features.key}, seed=0)
    folder = Path(runs.results_folder(model, images, out, under=runs.MINE))
    files = lab.figures.save_figure(curves, folder / "properties", data=result.table, record=record)
    lines = map(_in_words, result.table[result.table.chosen].to_dict("records"))
    print(in_lines("\n".join(lines)), *files, sep="\n")


def _in_words(row: dict[str, Any]) -> str:
    """The best layer of a target, in a line."""
    return f"{row['target']}: R² {row['test_r2']:.3f} [{row['low']:.3f}, {row['high']:.3f}] at layer {row['layer']}"


@command(
    MODEL,
    IMAGES,
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    argument("--scored", type=int, default=1000, help="number of training images that are scored"),
    STORE,
    argument("--out", help=f"folder for the tables (default: {runs.MINE}/MODEL-IMAGES)"),
    argument("--name", default="scores", help="name of the files"),
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "runs/mine photos --scored 2000 --limit 4000"),
)
def scores(
    model: str, images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, scored: int, store: str,
    out: str | None, name: str, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Score every layer without labels; where there are labels, say what the layer that each score picks loses.

    Scores are of training images alone, a draw of --scored of them. Written are NAME.csv, a row for each layer, and
    with labels NAME_regret.csv: accuracy of the layer that labels choose, less that of the layer that a score picks.
    --limit is of the images that are probed.
    """
    options = {"label": label, "config": config}
    whole = loaded(images, "train", on_bad_image, **options)
    few = _drawn(whole, scored)
    network = lab.load_model(model, revision=revision)
    table = lab.score_layers(network, few, store=store, device=device)
    stem = Path(runs.results_folder(model, set_of(images, label), out, under=runs.MINE)) / name
    files = [_save(table, stem, network, few)]
    if few.labels is not None:
        splits = [_drawn(whole, limit), loaded(images, "test", on_bad_image, limit=limit, **options)]
        features = lab.extract(network, splits, store=store, device=device)
        train, test = (lab.Features.from_store(features, split.split) for split in splits)
        lost = lab.regret(table, lab.probe_layers(train, test, device=device))
        lost = lost.assign(n_scored=len(few), n_train=len(train.labels), tokens_changed=table.tokens_changed[0])
        files.append(_save(lost, stem.with_name(f"{name}_regret"), network, few))
        print(in_lines("\n".join(map(_pick, lost.to_dict("records")))))
    print(*files, sep="\n")


def _drawn(images: Any, limit: int | None) -> Any:
    """What `load_images` gives with this limit, of images that it has given whole."""
    if limit is None:
        return images
    return replace(lab.load_images(images, limit=limit), source=images.source | {"limit": limit})


def _save(table: Any, stem: Path, model: Any, images: Any) -> Path:
    """Write a table with the names of model and images in front."""
    table = table.copy()
    table.insert(0, "model", model.name)
    table.insert(1, "images", images.name)
    return atomic_write(stem.with_name(f"{stem.name}.csv"), table.to_csv(index=False))


def _pick(row: dict[str, Any]) -> str:
    """What a score picks, in a line."""
    lost, low, high = (100 * row[name] for name in ("regret", "regret_low", "regret_high"))
    better = f" ({row['better']})" if row["better"] else ""
    return f"{row['score']}{better}: layer {row['picked_layer']} loses {lost:.1f} points [{low:.1f}, {high:.1f}]"
