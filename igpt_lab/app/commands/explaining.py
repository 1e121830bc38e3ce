"""The command that runs every instrument on a model, and says which of the predictions hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import igpt_lab as lab
from igpt_lab.app import runs
from igpt_lab.app.commands.options import (
    CONFIG,
    DEVICE,
    IMAGES,
    LABEL,
    LIMIT,
    MODEL,
    ON_BAD_IMAGE,
    REVISION,
    STORE,
    argument,
    command,
    in_lines,
    set_of,
    train_and_test,
)
from igpt_lab.core.provenance import atomic_write

if TYPE_CHECKING:
    import pandas as pd

    from igpt_lab.core.provenance import RunRecord


FIGURES = {  # an instrument -> the stem of its files, and its figure
    "strip": ("strip", "lens_strip"),
    "bits": ("bits", "bits_curve"),
    "positions": ("positions", "position_map"),
    "prefixes": ("prefixes", "prefix_curve"),
    "looks": ("looks", "attention_from"),
    "windows": ("windows", "window_curve"),
    "parts": ("left_out", "leave_out_curve"),
    "heads": ("heads", "head_map"),
    "attentive": ("attentive", "attentive_curve"),
}


@command(
    MODEL,
    IMAGES,
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    argument("--chosen", type=int, help="the layer c of the predictions (default: by validation)"),
    STORE,
    argument("--out", help=f"folder for the figures and tables (default: {runs.MINE}/MODEL-IMAGES)"),
    argument("--seed", type=int, default=0, help="seed of the random numbers, 0 or above"),
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "runs/mine photos --limit 500 --chosen 6 --out results/mine/why"),
)
def explain(
    model: str, images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, chosen: int | None, store: str,
    out: str | None, seed: int, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Why the middle: every instrument on a few images, the figures, and which of the seven predictions hold.

    At most 2,500 training images and 1,000 test images are drawn.

    Each figure is written as soon as its instrument is done, with its table beside it. The table of the refitted
    probes is refit.csv, that of the answers answers.csv.
    """
    from igpt_lab.core.devices import best_device
    from igpt_lab.explaining.explain import Explanation, check_explainable
    from igpt_lab.explaining.sizes import estimated_seconds

    train, test = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    loaded = lab.load_model(model, revision=revision)
    check_explainable(loaded, chosen)
    folder = Path(runs.results_folder(model, set_of(images, label), out, under=runs.MINE))
    where = best_device(device)
    seconds = estimated_seconds(loaded.to(where), train, test, chosen)
    print(f"about {max(1, round(seconds / 60))} min on {where}", flush=True)
    options: dict[str, Any] = {"store": store, "chosen": chosen, "seed": seed, "device": device}
    facts = {"images": train.name, "limit": limit, "model": model}
    measured, files = explain_into(folder, loaded, train, test, facts, options)
    print(in_lines(f"{loaded.name} on {train.name}\n{Explanation(**measured)}"), *files, sep="\n")


def explain_into(
    folder: Path, model: Any, train: Any, test: Any, facts: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:
    """What each instrument measured, by name, and the files of its figures and tables, the answers the last.

    `facts` are noted beside every figure; `options` are those of `instruments`, with a seed.
    """
    from igpt_lab.explaining.explain import instruments

    measured: dict[str, Any] = {}
    files: list[Path] = []
    for name, value in instruments(model, train, test, **options):
        measured[name] = value
        record = lab.RunRecord("explain", facts | {"chosen": measured["chosen"]}, seed=options["seed"])
        files += _save(name, measured, f"{model.name} on {train.name}", folder, record)
    return measured, files


def _save(name: str, measured: dict[str, Any], title: str, folder: Path, record: RunRecord) -> list[Path]:
    """Write what the last instrument measured, so that a run that is stopped later keeps it."""
    if name in ("refit", "answers"):
        table = measured["refit"].table if name == "refit" else measured["answers"]
        return [atomic_write(folder / f"{name}.csv", table.to_csv(index=False))]
    files: list[Path] = []
    for stem, figure, table in _figures(name, measured, title):
        files += lab.figures.save_figure(figure, folder / stem, data=table, record=record)
    return files


def _figures(name: str, measured: dict[str, Any], title: str) -> Iterator[tuple[str, Any, pd.DataFrame]]:
    """Stem, figure and table of each figure that can be plotted once the instrument `name` is done."""
    value = measured[name]
    if name == "baselines":
        lens, probe = measured["lens"], measured["probe"].table
        yield "lens", lab.figures.lens_curve(lens, probe, marks=value, title=title), lens
    elif name == "attention":
        yield "attention", lab.figures.attention_depth(value.table, title=title), value.table
        yield "offsets", lab.figures.offset_maps(value.offsets, title=title), value.offsets
    elif name in FIGURES:
        stem, plot = FIGURES[name]
        table = getattr(value, "table", value)
        yield stem, getattr(lab.figures, plot)(table, title=title), table
        if name == "bits":
            yield "bits_relative", lab.figures.bits_curve(table, relative=True, title=title), table
