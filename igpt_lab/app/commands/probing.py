"""Commands that probe every layer: under every protocol, and at every checkpoint of a pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import igpt_lab as lab
from igpt_lab.app import runs
from igpt_lab.app.commands.options import (
    DEVICE,
    IMAGES,
    LAYERS,
    LIMIT,
    MODEL,
    REVISION,
    STORE,
    argument,
    command,
)
from igpt_lab.core import display

OUT = argument("--out", help=f"folder for the figure and its table (default: {runs.MINE}/MODEL-IMAGES)")


@command(MODEL, IMAGES, LIMIT, LAYERS, STORE, OUT, DEVICE, REVISION)
def ablate(
    model: str, images: str, limit: int | None, store: str, out: str | None, revision: str | None, **options: Any
) -> None:
    """Probe every layer under every protocol (alignment, point, scaling): a figure, its table, what it says."""
    train, test = (lab.load_images(images, split, limit=limit) for split in ("train", "test"))
    loaded = lab.load_model(model, revision=revision)
    ablation = lab.ablate_protocol(loaded, train, test, store=store, **options)
    title = f"{loaded.name} on {train.name}"
    curves = lab.figures.protocol_curves(ablation.table, ablation.effects, ablation.stopped, title=title)
    record = lab.RunRecord("protocol", ablation.to_dict(), seed=0)
    folder = runs.results_folder(model, images, out, under=runs.MINE)
    files = lab.figures.save_figure(curves, Path(folder) / "protocol", data=ablation.table, record=record)
    print(ablation.describe(), *files, sep="\n")


@command(
    argument(
        "models", nargs="+", metavar="MODEL", help="folders of pretrain, bundled names, or folders of step-* folders"
    ),
    argument("--images", required=True, help=IMAGES.help),
    LIMIT,
    LAYERS,
    argument("--final", action="store_true", help="only the end of each: models side by side, with raw pixels"),
    STORE,
    OUT,
    argument("--name", help="of the figure (default: training_dynamics, or model_comparison with --final)"),
)
def dynamics(
    models: list[str], images: str, limit: int | None, layers: list[int] | None, final: bool, store: str,
    out: str | None, name: str | None,
) -> None:  # fmt: skip
    """Probe every checkpoint of one or more pretrainings at every layer: accuracy over the loss, curves over depth."""
    train, test = (lab.load_images(images, split, limit=limit) for split in ("train", "test"))
    folders = {Path(model).name: model for model in models}
    if len(folders) < len(models):
        raise ValueError(f"models {', '.join(models)}: expected folders of different names, which tell them apart")
    if final:
        kind = "model_comparison"
        table = lab.probe_models(folders, train, test, store=store, layers=layers)
        figure = lab.figures.model_comparison(table, title=f"Models on {train.name}")
    else:
        kind = "training_dynamics"
        table = _probe_runs(folders, train, test, store=store, layers=layers)
        figure = lab.figures.training_dynamics(table, title=f"{', '.join(folders)} on {train.name}")
    record = lab.RunRecord(kind, {"images": train.name, "limit": limit, "models": list(folders)}, seed=0)
    whole = models[0] if len(models) == 1 else "-".join(folders)
    target = runs.results_folder(whole, images, out, under=runs.MINE)
    files = lab.figures.save_figure(figure, Path(target) / (name or kind), data=table, record=record)
    print(*map(_best_layer, table[table.chosen].itertuples()), *files, sep="\n")


def _probe_runs(folders: dict[str, str], train: Any, test: Any, **options: Any) -> Any:
    """One table of all checkpoints in the folders of several pretrainings."""
    import pandas as pd

    tables = [
        lab.probe_checkpoints(lab.checkpoints_of(folder), train, test, name=run, **options)
        for run, folder in folders.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _best_layer(row: Any) -> str:
    """What a row of the chosen layer says, in a line."""
    accuracy = f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
    if row.control != display.MODEL:
        return f"{row.model}, {row.control}: {accuracy}"
    return (
        f"{row.model}, step {row.step:,}: {row.loss:.4f} nats per token, layer {row.layer} {accuracy}, "
        f"less the last {100 * row.drop:+.1f} points, p = {row.drop_p:.2g}"
    )
