"""Commands over the feature stores: extract, check, plan, stores, verify, prune."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from typing import Any

import igpt_lab as lab
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
    POOL,
    REVISION,
    SPLIT,
    STORE,
    argument,
    command,
    in_lines,
)

SPLITS = ["train", "test"]  # where none is named
POINTS = ["ln_1"]
ROOT = argument("root", nargs="?", **STORE.settings, help=STORE.help)


def _share(text: str) -> tuple[int, int]:
    """3/8 as (3, 8)."""
    share = re.fullmatch(r"(\d+)/(\d+)", text)
    if not share:
        raise argparse.ArgumentTypeError(f"{text!r}; expected I/N, such as 3/8")
    return int(share[1]), int(share[2])


@command(
    MODEL,
    IMAGES,
    argument("--splits", **LIST, help=f"splits of the images (default: {' '.join(SPLITS)})"),
    LIMIT,
    LABEL,
    CONFIG,
    STORE,
    argument("--random", action="store_true", help="use random weights: the untrained control"),
    argument(
        "--points",
        **LIST,
        help="places in a block: resid_pre, ln_1, qkv, head_out, attn_out, resid_mid, ln_2, mlp_act, mlp_out, "
        f"resid_post (default: {' '.join(POINTS)})",
    ),
    LAYERS,
    POOL,
    argument(
        "--alignment", choices=["sos", "raw"], help="start token in front, or not (default: sos; raw for a BERT model)"
    ),
    argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="number format of matrix products (default: bfloat16 on CUDA and on CPUs with AMX, else float32)",
    ),
    argument("--batch-size", type=int, help="number of images at a time (default: by the device)"),
    ON_BAD_IMAGE,
    argument(
        "--engine",
        choices=["local", "dask"],
        default="local",
        help="local: in this process; dask: on the workers of a cluster",
    ),
    argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask scheduler, tcp://... (default: workers are started on this machine)",
    ),
    argument(
        "--workers", type=int, help="processes with --engine dask (default: one per device), else threads that decode"
    ),
    argument(
        "--deadline",
        type=float,
        help="seconds that a worker may take for a part (default: 20 times the median, at least 600)",
    ),
    argument(
        "--part", type=_share, metavar="I/N", help="every N-th part from the I-th on, for job arrays (default: all)"
    ),
    DEVICE,
    REVISION,
    examples=(
        "fashion-xs fashion-mini",
        "runs/mine photos --splits train --points ln_1 mlp_out --layers 0 6 12 --pool grid:2",
    ),
)
def extract(
    model: str, images: str, splits: list[str] | None, limit: int | None, label: str | None, config: str | None,
    store: str, random: bool,
    revision: str | None, points: list[str] | None, engine: str, scheduler: str | None, deadline: float | None,
    part: tuple[int, int] | None, **options: Any,
) -> None:  # fmt: skip
    """Pooled features of every layer of a model over an image set, into a feature store."""
    if scheduler and engine != "dask":
        raise ValueError(f"--scheduler {scheduler} needs --engine dask; give both options, or neither")
    of_images: dict[str, Any] = {"limit": limit, "label": label, "config": config}
    loaded_splits = [lab.load_images(images, name, **of_images) for name in splits or SPLITS]
    loaded = lab.load_model(model, revision=revision, random=random)
    options |= {"store": store, "points": points or POINTS}
    if engine == "dask":
        options |= {"scheduler": scheduler, "deadline": deadline, "share": part}
        filled = lab.extract_on_cluster(loaded, loaded_splits, **options)
    elif part:
        filled = lab.extract_share(loaded, loaded_splits, share=part, **options)
    else:
        filled = lab.extract(loaded, loaded_splits, **options)
    print(filled.path)


@command(
    MODEL,
    argument("--images", help=f"{IMAGES.help} (default: random tokens)"),
    SPLIT,
    DEVICE,
    REVISION,
    examples=("fashion-xs", "runs/mine --images photos --split train"),
)
def check(model: str, images: str | None, split: str, device: str | None, revision: str | None) -> int:
    """Measure whether a model's features can be trusted; a table of checks, and exit code 1 when one fails."""
    real_images = None if images is None else lab.load_images(images, split)
    table = lab.check(lab.load_model(model, revision=revision), device=device, images=real_images)
    print(*map(_checked, table.to_dict("records")), sep="\n")
    return int((table.passed == False).any())  # noqa: E712  # <NA> where a check does not apply


def _checked(row: dict[str, Any]) -> str:
    """A check in a line or two: its verdict, what was measured of what is allowed, and in what unit, or why not."""
    if row["measured"] != row["measured"]:
        return in_lines(f"left out  {row['check']}: {row['unit']}")
    verdict = "pass" if row["passed"] else "FAIL"
    return in_lines(f"{verdict:<8}  {row['check']}: {row['measured']:.1e}, at most {row['allowed']:g}, {row['unit']}")


@command(
    argument("model", help=f"S, M, L, XL, or {MODEL.help}"),
    argument("images", help=f"a number, cifar10, imagenet, or {IMAGES.help}"),
    argument(
        "--devices", default="1xH100", help="number and kind of accelerators, such as 8xH100: V100, A100, H100 or H200"
    ),
    REVISION,
    examples=("L imagenet --devices 8xH100", "fashion-xs 60000"),
)
def plan(model: str, images: str, devices: str, revision: str | None) -> None:
    """What an extraction of all layers costs on accelerators: FLOPs, bytes, time and memory, by arithmetic."""
    from igpt_lab.features import planning
    from igpt_lab.models import checkpoints

    config = lab.SIZES[model] if model in lab.SIZES else None
    if config is None:
        config = lab.ImageGPTConfig.from_pretrained(checkpoints.resolve(model, revision=revision, weights=False))
    count = planning.IMAGES.get(images) or (int(images) if images.isdigit() else None)
    count = count or sum(len(lab.load_images(images, split)) for split in SPLITS)
    print(in_lines(planning.describe(planning.plan(config, count, devices=devices))))


@command(
    ROOT,
    examples=("", "results/mine/fashion-xs-fashion-mini/stores"),
)
def stores(root: str) -> None:
    """List the feature stores in a folder: completeness and size; rows, layers, alignment and pooling."""
    from igpt_lab.features import upkeep

    table = upkeep.list_stores(root)
    print("\n".join(map(_listed, table.to_dict("records"))) or f"no stores in {root}")


def _listed(store: dict[str, Any]) -> str:
    """A store in two lines that fit into 80 columns, of a name of usual length."""
    name = _shown(store["store"])
    if not store["rows"]:  # it cannot be read, and its state says why
        return "\n".join([name, *textwrap.wrap(store["state"], 76, initial_indent="    ", subsequent_indent="    ")])
    aligned = "" if store["alignment"] == "none" else f"{store['alignment']}, "
    facts = f"{store['rows']}; {store['layers']} layers; {aligned}{store['pool']}"
    lines = textwrap.wrap(facts, 80, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"{name}  {store['MB']:,.1f} MB  {store['state']}", *lines])


@command(
    argument("store", help="folder of one store"),
    argument(
        "--repair", action="store_true", help="compute the bad parts again, from the model and images they came from"
    ),
    argument("--yes", action="store_true", help="fetch model and images for a repair where they are not on this disk"),
    examples=("stores/STORE", "stores/STORE --repair"),
)
def verify(store: str, repair: bool, yes: bool) -> int:
    """Recompute a store's digests, rows and columns, and list every problem; exit code 1 if there is one."""
    from igpt_lab.features import upkeep

    problems = upkeep.verify(store)
    for line in dict.fromkeys(problem for _, _, problem in problems):
        print(line)
    if problems and repair:
        upkeep.repair(store, problems, remote=_allowed(upkeep.sources_of(store), yes))
        problems = upkeep.verify(store)
        print(f"{store}: " + ("still not whole" if problems else "repaired"))
    elif not problems:
        print(f"{store}: whole, every digest as listed")
    return int(bool(problems))


def _allowed(sources: Any, yes: bool) -> bool:
    """Show what a manifest names, and ask, where there is somebody to ask, about what is not on this disk."""
    for what, name in sources.places.items():
        print(f"{what}: {name!r}")
    if not sources.remote or yes or not sys.stdin.isatty():
        return yes
    return input(f"fetch {', '.join(sources.remote)}, as this store's manifest says? [y/N] ").lower() in ("y", "yes")


@command(
    ROOT,
    argument("--yes", action="store_true", help="delete what is listed, except what igpt-lab did not write"),
    examples=("", "stores --yes"),
)
def prune(root: str, yes: bool) -> None:
    """Show incomplete stores, leftover temporary files and parts that no manifest lists; --yes deletes them."""
    from igpt_lab.features import upkeep

    for path, why in upkeep.not_ours(root):
        print(f"{'kept':>13}  {why}  {_shown(path)}")
    leftovers = upkeep.leftovers(root)
    if not leftovers:
        print(f"nothing to prune in {root}")
        return
    sizes = []
    for leftover in leftovers:
        size, line = leftover.size, f"{leftover.what}  {_shown(leftover.path)}"
        try:
            kept = "a process uses it now" if yes and not upkeep.remove(leftover) else ""
        except OSError as error:  # one that cannot be deleted does not stop the others
            kept = str(error)
        if kept:
            print(f"{'kept':>13}  {kept}  {line}")
            continue
        print(f"{size / 1e6:10,.3f} MB  {line}")
        sizes.append(size)
    hint = "deleted" if yes else "--yes deletes them"
    print(f"{sum(sizes) / 1e6:10,.3f} MB  in {len(sizes)} of these; {hint}")


def _shown(path: object) -> str:
    """A path for a terminal, whatever bytes its name has."""
    return str(path) if str(path).isprintable() else ascii(str(path))
