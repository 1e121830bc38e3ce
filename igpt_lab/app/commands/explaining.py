"""The command that runs every instrument on a model, and says which of the predictions hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import igpt_lab as lab
from igpt_lab.app import runs
from igpt_lab.app.commands.options import (
    CONFIG,
    DEVICE,
    IMAGES,
    LABEL,
    MODEL,
    REVISION,
    STORE,
    argument,
    command,
    set_of,
    train_and_test,
)
from igpt_lab.core.provenance import atomic_write

if TYPE_CHECKING:
    import pandas as pd

    from igpt_lab.core.provenance import RunRecord
    from igpt_lab.explaining.explain import Explanation


@command(
    MODEL,
    IMAGES,
    LABEL,
    CONFIG,
    argument("--chosen", type=int, help="the layer c of the predictions (default: by validation)"),
    STORE,
    argument("--out", help=f"folder for the figures and tables (default: {runs.MINE}/MODEL-IMAGES)"),
    argument("--seed", type=int, default=0, help="seed of the random numbers, 0 or above"),
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "runs/mine photos --chosen 6 --out results/mine/why"),
)
def explain(
    model: str, images: str, label: str | None, config: str | None, chosen: int | None, store: str, out: str | None,
    seed: int, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Why the middle: every instrument on a few images, the figures, and which of the seven predictions hold.

    The figures have their tables beside them; the table of the refitted probes is refit.csv, that of the answers
    answers.csv.
    """
    from igpt_lab.explaining.explain import check_explainable, estimated_seconds

    train, test = train_and_test(images, label=label, config=config)
    loaded = lab.load_model(model, revision=revision)
    check_explainable(loaded, chosen)
    folder = Path(runs.results_folder(model, set_of(images, label), out, under=runs.MINE))
    seconds = estimated_seconds(loaded, train, test, chosen)
    print(f"about {max(1, round(seconds / 60))} min on the CPU", flush=True)
    explained = lab.explain(loaded, train, test, store=store, chosen=chosen, seed=seed, device=device)
    title = f"{loaded.name} on {train.name}"
    record = lab.RunRecord("explain", {"images": train.name, "model": model, "chosen": explained.chosen}, seed=seed)
    files = _save(explained, title, folder, record)
    print(title, explained, *files, sep="\n")


def _save(explained: Explanation, title: str, folder: Path, record: RunRecord) -> list[Path]:
    """Every figure with its table, and the two tables that have no figure."""
    files: list[Path] = []

    def save(name: str, figure: object, table: pd.DataFrame) -> None:
        files.extend(lab.figures.save_figure(figure, folder / name, data=table, record=record))

    probe, attention, figures = explained.probe.table, explained.attention, lab.figures
    marks = explained.baselines
    save("lens", figures.lens_curve(explained.lens, probe, marks=marks, title=title), explained.lens)
    save("strip", figures.lens_strip(explained.strip, title=title), explained.strip)
    save("bits", figures.bits_curve(explained.bits.table, title=title), explained.bits.table)
    save("positions", figures.position_map(explained.positions.table, title=title), explained.positions.table)
    save("prefixes", figures.prefix_curve(explained.prefixes.table, title=title), explained.prefixes.table)
    save("attention", figures.attention_depth(attention.table, title=title), attention.table)
    save("offsets", figures.offset_maps(attention.offsets, title=title), attention.offsets)
    save("looks", figures.attention_from(explained.looks, title=title), explained.looks)
    save("windows", figures.window_curve(explained.windows.table, title=title), explained.windows.table)
    save("left_out", figures.leave_out_curve(explained.parts.table, title=title), explained.parts.table)
    save("heads", figures.head_map(explained.heads.table, title=title), explained.heads.table)
    save("attentive", figures.attentive_curve(explained.attentive.table, title=title), explained.attentive.table)
    for name, table in ("refit", explained.refit.table), ("answers", explained.answers):
        files.append(atomic_write(folder / f"{name}.csv", table.to_csv(index=False)))
    return files
