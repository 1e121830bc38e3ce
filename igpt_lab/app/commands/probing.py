"""Commands that probe every layer: once, under every protocol, at every checkpoint, and on corrupted images."""

from __future__ import annotations

import math
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
    LIST,
    MODEL,
    ON_BAD_IMAGE,
    OUT,
    POOL,
    REVISION,
    STORE,
    argument,
    command,
    in_lines,
    set_of,
    train_and_test,
)
from igpt_lab.core import display
from igpt_lab.core.hub import resolve
from igpt_lab.core.provenance import atomic_write


@command(
    MODEL,
    IMAGES,
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    LAYERS,
    POOL,
    argument(
        "--untrained",
        type=int,
        default=3,
        help="number of controls: networks of the same shape with random weights, each as costly as the model; "
        "0 for none",
    ),
    argument(
        "--permutations",
        type=int,
        default=10,
        help="number of controls with the training labels in random order; 0 for none",
    ),
    STORE,
    OUT,
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini", "runs/mine photos --limit 2000 --untrained 0 --out results/mine/photos"),
)
def probe(
    model: str, images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, layers: list[int] | None,
    pool: str, untrained: int, permutations: int, store: str, out: str | None, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Probe every layer, beside controls: the curve, the chosen layer against the last, and how sure the choice is.

    C and layer are chosen by cross-validation on the train split; the test split is met once. Controls are raw pixels,
    untrained networks and permuted labels. Written are the figure with its table, probe_layers.csv (every layer against
    the chosen one) and probe.txt, which is what the command prints.
    """
    import pandas as pd

    for name, count in {"--untrained": untrained, "--permutations": permutations}.items():
        if count < 0:
            raise ValueError(f"{name} {count}; expected 0 or more")
    splits = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    loaded = lab.load_model(model, revision=revision)
    options: dict[str, Any] = {"store": store, "layers": layers, "pool": pool, "device": device}
    features, train, test = _features(loaded, splits, options)
    result = lab.probe_layers(train, test, device=device)
    random = [_untrained(model, revision, seed, splits, options) for seed in range(untrained)]
    drops = lab.compare_drops(result, random).to_dict() if random else None
    tables = [result.table, *(of_seed.table.assign(draw=seed) for seed, of_seed in enumerate(random))]
    if loaded.processor is not None:
        pixels = (lab.Features.from_pixels(split, loaded.processor) for split in splits)
        tables.append(lab.probe_layers(*pixels, control="raw pixels", device=device).table)
    if permutations:
        tables.append(lab.probe_permuted(train, test, result, permutations=permutations, device=device))
    pooled = "" if pool == "mean" else f", pooled by {pool}"
    comparison, title = lab.compare_layers(result).to_dict(), f"{loaded.name} on {splits[0].name}{pooled}"
    drawn = pd.concat(tables, ignore_index=True)
    curve = lab.figures.layer_curve(drawn, title=title, comparison=comparison)
    settings = {"store": features.key, "comparison": comparison, "drop less that of untrained networks": drops}
    record = lab.RunRecord("probe", settings, seed=0)
    folder = Path(runs.results_folder(model, set_of(images, label), out, under=runs.MINE))
    files = lab.figures.save_figure(curve, folder / "probe", data=drawn, record=record)
    by_layer = lab.layer_table(result.correct, chosen=result.chosen)
    files.append(atomic_write(folder / "probe_layers.csv", by_layer.to_csv(index=False)))
    text = f"{title}, {len(train.labels):,} training images\n" + _summary(result.table, drawn, comparison, drops)
    text = in_lines(text)
    files.append(atomic_write(folder / "probe.txt", text + "\n"))
    print(text, *files, sep="\n")


def _features(model: Any, splits: list, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The store of a model, and the features of train and test."""
    store = lab.extract(model, splits, **options)
    return store, *(lab.Features.from_store(store, split.split) for split in splits)


def _untrained(model: str, revision: str | None, seed: int, splits: list, options: dict[str, Any]) -> Any:
    """The probe of a network of the model's shape that was never trained."""
    random = lab.load_model(model, revision=revision, random=True, seed=seed)
    _, train, test = _features(random, splits, options)
    return lab.probe_layers(train, test, control="random network", folds=3, device=options["device"])


def _summary(table: Any, drawn: Any, comparison: dict[str, Any], drops: dict[str, Any] | None) -> str:
    """What the probe says, and its controls among the rows `drawn`, in a few lines."""
    chosen = table[table.chosen].iloc[0]
    reached = f"{chosen.test_accuracy:.1%} [{chosen.low:.1%}, {chosen.high:.1%}] of {chosen.n_test:,} test images"
    lines = [f"chosen layer {chosen.layer}: {reached}", runs.about_curve(table, comparison)]
    for pixels in drawn[drawn.control == "raw pixels"].itertuples():
        lines.append(f"raw pixels: {pixels.test_accuracy:.1%} [{pixels.low:.1%}, {pixels.high:.1%}]")
    if drops is not None:
        ends = dict.fromkeys(f"{100 * drops[f'control_{end}']:.1f}" for end in ("lowest", "highest"))
        theirs = f"{' to '.join(ends)} points"
        interval = f"[{100 * drops['low']:.1f}, {100 * drops['high']:.1f}]"
        more = f"the trained one's less their mean: {100 * drops['difference']:+.1f} points {interval}"
        lines.append(f"untrained networks, their chosen less last: {theirs}; {more}")
    permuted = drawn[(drawn.control == "permuted labels") & (drawn.layer == chosen.layer)].test_accuracy
    if len(permuted):
        ends = dict.fromkeys(f"{accuracy:.1%}" for accuracy in (permuted.min(), permuted.max()))
        lines.append(f"permuted labels at the chosen layer: {' to '.join(ends)}")
    return "\n".join(lines)


@command(
    MODEL,
    IMAGES,
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    LAYERS,
    STORE,
    OUT,
    DEVICE,
    REVISION,
    examples=("fashion-xs fashion-mini --limit 600", "runs/mine photos --layers 0 6 12"),
)
def ablate(
    model: str, images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, store: str, out: str | None,
    revision: str | None, **options: Any,
) -> None:  # fmt: skip
    """Probe every layer under every protocol (alignment, point, scaling): a figure, its table, what it says."""
    train, test = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    loaded = lab.load_model(model, revision=revision)
    ablation = lab.ablate_protocol(loaded, train, test, store=store, **options)
    title = f"{loaded.name} on {train.name}"
    curves = lab.figures.protocol_curves(ablation.table, ablation.effects, ablation.stopped, title=title)
    record = lab.RunRecord("protocol", ablation.to_dict(), seed=0)
    folder = runs.results_folder(model, set_of(images, label), out, under=runs.MINE)
    files = lab.figures.save_figure(curves, Path(folder) / "protocol", data=ablation.table, record=record)
    print(in_lines(ablation.describe()), *files, sep="\n")


@command(
    argument(
        "models", nargs="+", metavar="MODEL", help="folders of pretrain, bundled names, or folders of step-* folders"
    ),
    argument("--images", required=True, help=IMAGES.help),
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    LAYERS,
    argument(
        "--final",
        action="store_true",
        help="probe only the last checkpoint of each model, and compare models, or seeds of a family, with raw pixels",
    ),
    STORE,
    OUT,
    argument(
        "--name",
        help="name of the files of the figure (default: training_dynamics; with --final model_comparison, or seeds)",
    ),
    DEVICE,
    REVISION,
    examples=("cifar10-xs --images photos", "runs/wide-seed-0 runs/wide-seed-1 --images photos --final"),
)
def dynamics(
    models: list[str], images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, layers: list[int] | None,
    final: bool, store: str, out: str | None, name: str | None, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Probe every checkpoint of one or more pretrainings at every layer: accuracy over the loss, curves over depth.

    With --final, a run named FAMILY-seed-S is seed S of its family, and any other its own family's seed 0: the figure
    has a line for each seed, its table a row for each run and layer. Beside it are NAME_runs.csv, a row for each run
    (where its curve begins, peaks and ends), NAME_summary.csv, a row for each family: mean, deviation and t interval
    over seeds, beside the interval over images, and NAME_differences.csv, a row for each pair of families and measure.
    """
    from igpt_lab.core.seeds import families_of, is_seeded

    train, test = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    folders = _by_name(models, revision)
    of_seeds = final and any(map(is_seeded, folders))
    kind = "seeds" if of_seeds else "model_comparison" if final else "training_dynamics"
    if of_seeds:
        families_of(folders)  # an error in the names, before hours of probes
    probe = lab.probe_models if final else _probe_runs
    table = probe(folders, train, test, store=store, layers=layers, device=device)
    whole = models[0] if len(models) == 1 else "-".join(folders)
    stem = Path(runs.results_folder(whole, set_of(images, label), out, under=runs.MINE)) / (name or kind)
    tables: list[Path] = []
    if of_seeds:
        table = lab.group_by_seed(table)
        figure = lab.figures.seed_curves(table, title=f"Seeds of pretraining on {train.name}")
        tables = _save_summaries(table, stem)
    elif final:
        figure = lab.figures.model_comparison(table, title=f"Models on {train.name}")
    else:
        figure = lab.figures.training_dynamics(table, title=f"{', '.join(folders)} on {train.name}")
    record = lab.RunRecord(kind, {"images": train.name, "limit": limit, "models": list(folders)}, seed=0)
    files = lab.figures.save_figure(figure, stem, data=table, record=record)
    rows = table.groupby(["model", "step", "control"], sort=False)
    lines = (line for _, of_one in rows for line in _chosen_layer(of_one))
    print(in_lines("\n".join(lines)), *files, *tables, sep="\n")


def _by_name(models: list[str], revision: str | None) -> dict[str, Path]:
    """Names of models -> their folders; ValueError where two have one name."""
    folders = {Path(model).name: resolve(model, revision=revision) for model in models}
    if len(folders) < len(models):
        raise ValueError(f"models {', '.join(models)}; expected models whose folders have different names; rename one")
    return folders


@command(
    argument("models", nargs="+", metavar="RUN", help="folders of pretrain, named FAMILY-seed-S where they are seeds"),
    argument("--images", required=True, help=IMAGES.help),
    LIMIT,
    LABEL,
    CONFIG,
    ON_BAD_IMAGE,
    argument(
        "--points",
        **LIST,
        metavar="POINT",
        help="places in a block, such as ln_1 mlp_out (default: those of lab.probe_shift)",
    ),
    STORE,
    OUT,
    argument("--name", default="shift", help="name of the files of the figure and its tables"),
    DEVICE,
    REVISION,
    examples=("runs/wide-seed-0 runs/wide-seed-1 --images photos", "runs/mine --images photos --points ln_1 mlp_out"),
)
def shift(
    models: list[str], images: str, limit: int | None, label: str | None, config: str | None,
    on_bad_image: str, points: list[str] | None,
    store: str, out: str | None, name: str, device: str | None, revision: str | None,
) -> None:  # fmt: skip
    """Probe clean images at every point of the block, and score on test images of less contrast and of more blur.

    A run named FAMILY-seed-S is seed S of its family. The figure NAME shows one point, NAME_points all; their table has
    a row for each family, point, corruption and level. Beside it are NAME_runs.csv, a row for each run, and
    NAME_layers.csv, a row for each run and layer.
    """
    train, test = train_and_test(images, limit=limit, label=label, config=config, on_bad_image=on_bad_image)
    folders = _by_name(models, revision)
    at = {} if points is None else {"points": points}
    layers = lab.probe_shift(folders, train, test, store=store, device=device, **at)
    of_runs = lab.summarise_shift_runs(layers)
    summary, title = lab.summarise_shift(of_runs), f"Corrupted {train.name}"
    shown = "ln_1" if "ln_1" in set(summary.point) else summary.point[0]
    whole = models[0] if len(models) == 1 else "-".join(folders)
    folder = Path(runs.results_folder(whole, set_of(images, label), out, under=runs.MINE))
    record = lab.RunRecord("shift", {"images": train.name, "limit": limit, "models": list(folders)}, seed=0)
    drawn = {
        name: lab.figures.shift_curves(summary, point=shown, title=title),
        f"{name}_points": lab.figures.shift_points(summary, title=title),
    }
    files = []
    for file, figure in drawn.items():
        files += lab.figures.save_figure(figure, folder / file, data=summary, record=record)
    for ending, table in {"runs": of_runs, "layers": layers}.items():
        files.append(atomic_write(folder / f"{name}_{ending}.csv", table.to_csv(index=False)))
    rows = summary[summary.point == shown].to_dict("records")
    print(in_lines("\n".join(map(_of_a_level, rows))), *files, sep="\n")


def _of_a_level(row: dict[str, Any]) -> str:
    """What a row of the summary of `shift` says, in a line."""
    words = [f"accuracy {row['height_mean']:.1%}"]
    for measure, name in {"drop": "drop", "drop_best": "from the best layer", "drop_change": "change"}.items():
        mean, low, high = (100 * row[f"{measure}_{part}"] for part in ("mean", "images_low", "images_high"))
        words.append(f"{name} {mean:.1f} [{low:.1f}, {high:.1f}] over images")
    return f"{row['family']}, {row['point']}, {row['corruption']} {row['level']:g}: {'; '.join(words)}"


def _save_summaries(table: Any, stem: Path) -> list[Path]:
    """Print what each family says over its seeds, and write its three tables beside the figure."""
    by_run = lab.summarise_runs(table)
    summary = lab.summarise_seeds(by_run)
    print(in_lines("\n".join(map(_family, summary.to_dict("records")))))
    files = {"runs": by_run, "summary": summary, "differences": lab.compare_families(by_run)}
    return [
        atomic_write(stem.with_name(f"{stem.name}_{ending}.csv"), rows.to_csv(index=False))
        for ending, rows in files.items()
    ]


def _family(row: dict[str, Any]) -> str:
    """What a row of the summary says, in a line."""
    words, several = [], row["n_seeds"] > 1
    for measure in ("depth", "height", "drop"):
        mean, low, high = (100 * row[f"{measure}_{part}"] for part in ("mean", "low", "high"))
        images = " to ".join(f"{100 * row.get(f'{measure}_images_{end}', math.nan):.1f}" for end in ("low", "high"))
        seeds = f" [{low:.1f}, {high:.1f}] over seeds," if several else ","
        words.append(f"{measure} {mean:.1f}{seeds} {images} over images")
    return f"{row['family']}, {row['n_seeds']} seed{'s' * several}: {'; '.join(words)}"


def _probe_runs(folders: dict[str, Path], train: Any, test: Any, **options: Any) -> Any:
    """One table of all checkpoints in the folders of several pretrainings."""
    import pandas as pd

    tables = [
        lab.probe_checkpoints(lab.checkpoints_of(folder), train, test, name=run, **options)
        for run, folder in folders.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _chosen_layer(rows: Any) -> list[str]:
    """What the rows of one checkpoint or control say of their chosen layer, in a line, and of a poor choice in one."""
    from igpt_lab.core import chosen

    row = rows[rows.chosen].iloc[0]
    accuracy = f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
    if row.control != display.MODEL:
        return [f"{row.model}, {row.control}: {accuracy}"]
    line = f"{row.model}, step {row.step:,}: {row.loss:.4f} nats per token, chosen layer {row.layer} {accuracy}"
    if "drop" in row:
        drop = {name.removeprefix("drop_"): row[name] for name in row.index if name.startswith("drop_")}
        difference = chosen.difference_in_words(drop | {"difference": row["drop"]})
        line += f", less the last {difference}, p = {row.drop_p:.2g}"
    return [line, *(f"  {words}" for words in chosen.about_choice(rows))]
