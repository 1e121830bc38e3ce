"""OpenAI's ImageGPT: the published TensorFlow checkpoints, downloaded, and converted into our folder layout.

Names, shapes and directions of the variables are those of `src/model.py` in openai/image-gpt, the addresses those of
its `download.py`. TensorFlow is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
import warnings
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_lab.core import hub
from igpt_lab.core.arguments import checked, local
from igpt_lab.core.downloads import fetch
from igpt_lab.core.hub import CheckpointError
from igpt_lab.core.progress import tqdm
from igpt_lab.core.storage import Lock, NoLock, lock_of, unlink
from igpt_lab.images.processor import CONFIG, ImageGPTImageProcessorPil
from igpt_lab.images.token_files import TOKEN_SPLITS, mapped
from igpt_lab.models.config import SIZES, ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.tensorflow_bundle import FLOATS, Bundle

PALETTE = "kmeans_centers.npy"
OURS = {  # our names -> the original's, of the whole model and of each block
    "transformer.wpe.weight": ["model/wpe"],
    "transformer.wte.weight": ["model/wte", "model/sos"],
    "transformer.ln_f.weight": ["model/ln_f/g"],
    "lm_head.weight": ["model/wtet"],
    "score.weight": ["model/clf/wclf"],
}
BLOCK = {
    "ln_1.weight": ["ln_1/g"],
    "ln_2.weight": ["ln_2/g"],
    "attn.c_attn.weight": ["attn/q_proj", "attn/k_proj", "attn/v_proj"],
    "attn.c_proj.weight": ["attn/c_proj"],
    "mlp.c_fc.weight": ["mlp/c_fc/w"],
    "mlp.c_proj.weight": ["mlp/c_proj/w"],
}
ADDRESS = "https://openaipublic.blob.core.windows.net/image-gpt"
SHARDS = {"s": 32, "m": 32, "l": 64}
STEPS = (131_000, 262_000, 524_000, 1_000_000)
DATASETS = ("cifar10", "imagenet")
SPLITS = ("train", "validation", "test")
BYTES = {"unit": "B", "unit_scale": True}


def find_openai(folder: str | Path, *, step: int | None = None) -> Bundle:
    """The TensorFlow checkpoint in a folder, or with this prefix.

    Of several in a folder, the one of this `step`, or the one that the folder's file `checkpoint` calls the latest.
    """
    folder = local(str(folder).removesuffix(".index"))
    if Path(f"{folder}.index").is_file():
        return Bundle(folder)
    names = sorted(path.stem for path in folder.glob("*.index"))
    if not names:
        raise CheckpointError(
            f"{folder} has no TensorFlow checkpoint: expected model.ckpt-STEP.index and its .data-00000-of-00032, ..."
        )
    if step is not None:
        chosen = [name for name in names if _step(name) == step]
    else:
        latest = folder / "checkpoint"
        noted = latest.read_text(encoding="utf-8", errors="replace") if latest.is_file() else ""
        name = re.search(r'^model_checkpoint_path: "(?:.*/)?(.+)"', noted, re.MULTILINE)
        chosen = [name[1]] if name and name[1] in names else names
    if len(chosen) != 1:
        what = f"{len(names)} checkpoints" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{folder} has {what}: {', '.join(names)}; choose one by its step")
    return Bundle(folder / chosen[0])


def _step(name: str) -> int | None:
    number = re.search(r"-(\d+)$", name)
    return int(number[1]) if number else None


def openai_config(bundle: Bundle) -> ImageGPTConfig:
    """The configuration of an original model, read off the shapes of its variables.

    Raises CheckpointError, naming them, for variables that are missing, of another shape or type, or of no ImageGPT.
    Passed over are those outside `model/`, single numbers, and what an optimiser keeps for a variable.
    """
    shapes = {name: entry.shape for name, entry in bundle.entries.items()}
    blocks = {name.split("/")[1] for name in shapes if re.match(r"model/h\d+/", name)}
    needed = {"model/wpe": 2, "model/wte": 2, "model/h0/attn/q_proj": 3, "model/h0/mlp/c_fc/w": 2}
    wrong = [name for name, dims in needed.items() if len(shapes.get(name, ())) != dims]
    if wrong:
        raise CheckpointError(
            f"{bundle.index} is not a checkpoint of ImageGPT: it has no {wrong[0]} with {needed[wrong[0]]} axes"
        )
    (positions, width), (colours, _) = shapes["model/wpe"], shapes["model/wte"]
    heads, inner = shapes["model/h0/attn/q_proj"][0], shapes["model/h0/mlp/c_fc/w"][1]
    classes = shapes.get("model/clf/wclf", (0,))[0]
    square = (heads, width // max(1, heads), width)
    expected = {"model/wpe": (positions, width), "model/ln_f/g": (width,)}
    expected |= dict.fromkeys(("model/wte", "model/wtet"), (colours, width))
    expected |= {"model/sos": (width,)} if "model/sos" in shapes else {}
    expected |= {"model/clf/wclf": (classes, width)} if classes else {}
    for layer in range(len(blocks)):
        expected |= {f"model/h{layer}/attn/{part}_proj": square for part in "qkvc"}
        expected |= {f"model/h{layer}/ln_{i}/g": (width,) for i in (1, 2)}
        expected |= {f"model/h{layer}/mlp/c_fc/w": (width, inner), f"model/h{layer}/mlp/c_proj/w": (inner, width)}
    there = [name for name in expected if name in shapes]
    differs = [name for name in there if shapes[name] != expected[name]]
    faults = {
        "lacks": [name for name in expected if name not in shapes],
        "has in another shape": [f"{name} {shapes[name]}, not {expected[name]}" for name in differs],
        "has no floating-point numbers in": [name for name in there if bundle.entries[name].dtype not in FLOATS],
        "has besides": [name for name in shapes if shapes[name] and _of_a_model(name, expected)],
    }
    told = [f"{what} {', '.join(names[:6])}{', ...' * (len(names) > 6)}" for what, names in faults.items() if names]
    if told:
        raise CheckpointError(f"{bundle.index} is of another model: it {'; it '.join(told)}")
    values: dict[str, Any] = dict(
        vocab_size=colours + 1, n_positions=positions, n_embd=width, n_layer=len(blocks), n_head=heads,
        n_inner=None if inner == 4 * width else inner, num_labels=classes or None,
        bidirectional="model/sos" not in shapes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    try:
        return ImageGPTConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{bundle.index}: {error}") from error


def _of_a_model(name: str, expected: dict) -> bool:
    """Whether an unexpected variable is part of a network: not an optimiser's, whose names extend a variable's."""
    parts = name.split("/")
    known = any("/".join(parts[:n]) in expected for n in range(1, len(parts) + 1))
    return parts[0] == "model" and not known and "adam" not in name.lower()


def describe(bundle: Bundle) -> str:
    """One line on an original model: its size, step and shapes."""
    config, step = openai_config(bundle), _step(bundle.prefix.name)
    shape = (config.n_layer, config.n_embd, config.n_head)
    size = [name for name, known in SIZES.items() if (known.n_layer, known.n_embd, known.n_head) == shape]
    return (
        f"size {size[0] if size else 'of its own'}, step {'unknown' if step is None else f'{step:,}'}, "
        f"{'BERT' if config.bidirectional else 'autoregressive'}: {config.n_layer} blocks of width {config.n_embd}, "
        f"{config.n_head} heads, {config.n_colours} colours, {config.n_positions} positions"
        f"{_side_of(config) and f' ({_side_of(config)} pixels a side)'}, "
        f"{f'class head of {config.num_labels}' if 'model/clf/wclf' in bundle.entries else 'no class head'}, "
        f"{len(bundle.shards)} data files"
    )


def _side_of(config: ImageGPTConfig) -> int | str:
    side = math.isqrt(config.n_positions)
    return side if side**2 == config.n_positions else ""


@checked
def convert_openai(
    folder: str | Path,
    out: str | Path,
    *,
    palette: str | Path | None = None,
    bert: bool | None = None,
    step: int | None = None,
    progress: bool = True,
) -> Path:
    """OpenAI's original checkpoint -> a folder as `load_model` takes it, float32.

    The original has no biases: ours are zero. SOS becomes the last row of the token embedding, zero for a BERT model,
    which has none and by that is known. A class head is kept beside the output head. One tensor at a time is in memory.
    `out` gets its files when all are written.

    Args:
        folder: Folder of the checkpoint, or the prefix of its files.
        out: Folder that is written.
        palette: The original's `kmeans_centers.npy`, by default the one in `folder`; without one the weights are
            converted, and a warning says so.
        bert: Which kind is expected, True for BERT; None takes either.
        step: Which checkpoint, where the folder has several.
        progress: Show a bar.

    Returns:
        `out`.

    Raises:
        CheckpointError: A checkpoint that is not whole, is of another model or of the other kind, or several without
            `step`; a palette that is not there or not of it.

    Example:
        >>> folder = lab.convert_openai("openai-ar", "converted")
        >>> lab.load_model(folder).config.n_layer
        2
    """
    bundle, out = find_openai(folder, step=step), Path(out)
    config = openai_config(bundle)
    if bert is not None and bert != config.bidirectional:
        has = "no model/sos: it is a BERT" if config.bidirectional else "a variable model/sos: it is an autoregressive"
        raise CheckpointError(f"{bundle.index} has {has} model")
    processor = _processor(bundle, palette, config)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in ImageGPTForCausalImageModeling(config).state_dict().items()}
    if "model/clf/wclf" in bundle.entries:
        shapes["score.weight"] = (config.num_labels, config.n_embd)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(out) as lock:
        try:
            _remove_stale(out, lock)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
                _write(bundle, shapes, Path(made, "model.safetensors"), progress)
                if processor is not None:
                    processor.save_pretrained(made)
                hub.write_json(Path(made, "config.json"), config.to_dict())
                out.mkdir(exist_ok=True)
                for name in ("config.json", CONFIG):
                    (out / name).unlink(missing_ok=True)
                for path in sorted(Path(made).iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, out / path.name)
        finally:
            unlink(lock)
    return out


def _remove_stale(out: Path, lock: Lock | NoLock) -> None:
    """Remove what conversions to `out` left beside it when they were killed: who holds the lock is the only one."""
    if lock.is_locked:
        for folder in out.parent.glob(f".{escape(out.name)}.{'[a-z0-9_]' * 8}"):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)


def _processor(bundle: Bundle, palette: str | Path | None, config: ImageGPTConfig) -> ImageGPTImageProcessorPil | None:
    """The image processor for a palette file, checked against the model; None, with a warning, where there is none."""
    path = local(palette or bundle.prefix.parent / PALETTE)
    if palette is None and not path.is_file():
        warnings.warn(
            f"no palette: {path} is not there. The weights are converted, but images need a palette to become tokens; "
            f"fetch {ADDRESS}/color-clusters/{PALETTE} and convert again, with it there or as the palette",
            stacklevel=4,
        )
        return None
    try:
        centres = np.array(mapped(path))
    except ValueError as error:
        raise CheckpointError(f"the palette {path} is not there, or no .npy file of numbers") from error
    if centres.shape != (config.n_colours, 3) or centres.dtype.kind != "f":
        raise CheckpointError(
            f"the palette {path} is {centres.dtype} {centres.shape}; this model needs floats ({config.n_colours}, 3)"
        )
    if not (np.abs(centres) <= 1 + 1e-6).all():
        raise CheckpointError(f"the palette {path} has values outside [-1, 1]")
    side = _side_of(config)
    if not side:
        raise CheckpointError(f"{config.n_positions} positions are no square; a palette is for square images")
    return ImageGPTImageProcessorPil(clusters=centres, size=int(side))


def _write(bundle: Bundle, shapes: dict[str, tuple[int, ...]], path: Path, progress: bool) -> None:
    """The model's tensors to a safetensors file, one tensor in memory at a time.

    The format: the header's length in 8 bytes, the header in JSON, the values in the header's order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, tqdm(total=end, desc="convert", disable=not progress, **BYTES) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(np.ascontiguousarray(_tensor(bundle, name, shape), "<f4").data)
            bar.update(4 * math.prod(shape))
        file.flush()
        os.fsync(file.fileno())


def _tensor(bundle: Bundle, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of our tensors: linear maps are (in, out); the original's projections are (heads, D / heads, D)."""
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if place := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name):
        parts = [bundle.read(f"model/h{place[1]}/{part}") for part in BLOCK[place[2]]]
    else:
        parts = [bundle.read(part) for part in OURS[name] if part in bundle.entries]
    if name.endswith("c_attn.weight"):  # q[h, e] = sum over f of x[f] w[h, e, f]
        return np.concatenate([part.reshape(shape[0], shape[0]).T for part in parts], axis=1)
    if name.endswith("wte.weight"):
        sos = parts[1] if len(parts) > 1 else np.zeros(shape[1], np.float32)
        return np.concatenate([parts[0], sos[None]])
    return parts[0].reshape(shape)  # attention's c_proj among them: y[f] = sum over h, e of a[h, e] w[h, e, f]


# Download


def cache_folder() -> Path:
    """`igpt-lab/openai` under the user's cache folder, `~/.cache` or what XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt-lab" / "openai"


@checked
def download_openai(
    size: str | None = None,
    step: int = 1_000_000,
    *,
    bert: bool = False,
    datasets: tuple[str, ...] | list[str] = (),
    splits: tuple[str, ...] | list[str] = SPLITS,
    cache: str | Path | None = None,
    address: str = ADDRESS,
    progress: bool = True,
) -> Path:
    """Fetch what OpenAI publishes: weights with their palette, and token sets.

    A file that is whole is not fetched again, one that was cut short goes on where it stopped.

    Args:
        size: Of the model: "s", "m" or "l"; None fetches token sets alone.
        step: Steps of its training: 131000, 262000, 524000 or 1000000.
        bert: The model that predicts masked pixels, and not the autoregressive one.
        datasets: Of "cifar10" and "imagenet": 32 x 32 images as tokens.
        splits: Of the token sets: "train", "validation" and "test".
        cache: Folder of the files; by default one in the user's cache.
        address: Of the server.
        progress: Show a bar.

    Returns:
        The folder of the model, or of the token sets where there is no `size`.

    Raises:
        ValueError: What is not published, or nothing to fetch.
        OSError: The server does not answer or lacks a file, or there is no room.

    Example:
        >>> lab.download_openai("xl")
        Traceback (most recent call last):
            ...
        ValueError: size 'xl' at step 1000000 is not published: sizes s, m, l, steps (131000, 262000, 524000, 1000000)
    """
    if size is not None and (size not in SHARDS or step not in STEPS):
        raise ValueError(f"size {size!r} at step {step} is not published: sizes {', '.join(SHARDS)}, steps {STEPS}")
    if unknown := [name for name in datasets if name not in DATASETS]:
        raise ValueError(f"no token set {unknown[0]!r} is published; there are {', '.join(DATASETS)}")
    if unknown := [name for name in splits if name not in SPLITS]:
        raise ValueError(f"token sets have no split {unknown[0]!r}; they have {', '.join(SPLITS)}")
    if size is None and not (datasets and splits):
        raise ValueError("nothing to download: give a size, token sets, or both")
    cache = local(cache) if cache else cache_folder()
    model, files = f"igpt-{size}{'-bert' if bert else ''}/{step}", {}
    if size is not None:
        names = [f"model.ckpt-{step}.data-{i:05d}-of-{SHARDS[size]:05d}" for i in range(SHARDS[size])]
        files = {f"{address}/checkpoints/{model}/{n}": cache / model / n for n in [f"model.ckpt-{step}.index", *names]}
        files[f"{address}/color-clusters/{PALETTE}"] = cache / model / PALETTE
    parts = [f"{TOKEN_SPLITS[split]}{axis}" for split in splits for axis in "XY"]
    for name in (f"{dataset}_{part}.npy" for dataset in datasets for part in parts):
        files[f"{address}/datasets/{name}"] = cache / "datasets" / name
    fetch(files, progress=progress)
    return cache / (model if size is not None else "datasets")
