"""Features of every layer: ours against transformers' hidden states, and the store against files of numpy and pandas.

Size S (24 x 512, T = 1024) with random weights, saved once and loaded by both; the same random tokens. transformers
gives `output_hidden_states=True` and their means over positions, at the batch size that is fastest for it, which is
measured first, and without its key-value cache, which it would else fill. Ours runs as `extract` does by default.
Contestants have a process each; peak memory is all of that process, with its libraries and weights.
"""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import igpt_lab as lab
from benchmarks.harness import Result, in_turns, matmul, race, rate, row
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.planning import flops
from igpt_lab.features.settings import default_batch
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.image_sets import TokenSet
from igpt_lab.models.losses import align

S = dataclasses.replace(lab.SIZES["S"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
QUICK = dataclasses.replace(S, vocab_size=9, n_positions=16, n_embd=16, n_layer=4, n_head=2)
DTYPES, BATCHES = ("float32", "bfloat16"), (1, 2, 4, 8, 16)


def rows(quick: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        config, folder = QUICK if quick else S, Path(temporary) / "random"
        write_model(config, folder)
        best = {
            dtype: race({"port": partial(fastest, folder, dtype, quick)}, 1, warm=0)["port"].value for dtype in DTYPES
        }
        yield from layers(config, folder, best, quick)
        yield from memory(config, folder, quick)
        yield from distances(folder)
        yield from positions(config, Path(temporary), best["float32"], quick)
        yield from images(quick, Path(temporary))
    yield from store(quick)


def layers(config: lab.ImageGPTConfig, folder: Path, best: dict[str, int], quick: bool) -> Iterator[dict]:
    """Images a second, share of the matrix-multiply rate, memory, and the lower half of the layers."""
    images, runs = (2, 1) if quick else (max(BATCHES), 3)
    for dtype in DTYPES:
        half = list(range(config.n_layer // 2 + 1))
        makers = {
            "record": partial(ours, folder, dtype, images),
            "extract": partial(extracted, folder, dtype, images),
            "half": partial(extracted, folder, dtype, images, layers=half),
            "port": partial(port, folder, dtype, images, batch=best[dtype]),
            "rate": partial(matmul, getattr(torch, dtype)),
        }
        results = race(makers, runs, warm=0)
        case, peer = f"{config.n_layer} x {config.n_embd}, {dtype}", f"{peer_name()}, batch {best[dtype]}"
        for name in ("record", "extract"):
            speeds = [images / results[contestant].seconds for contestant in (name, "port")]
            yield row(f"{case}, {name}", "speed", "images/s", *speeds, peer, runs=runs)
        for what, square in (("", False), (", attention counted as T x T", True)):
            shares = [share(results, contestant, config, images, square=square) for contestant in ("record", "port")]
            unit = f"of {rate(results['rate']):.0f} GFLOP/s{what}"
            yield row(f"{case}, record", "share of the matrix-multiply rate", unit, *shares, peer, runs=runs)
        peaks = (results["extract"].peak, results["port"].peak)
        yield row(f"{case}, extract", "peak memory", "MB", *peaks, peer, runs=runs, less=True)
        seconds = (results["half"].seconds / images, results["extract"].seconds / images)
        yield row(f"{case}, layers 0..{half[-1]} only", "time", "s/image", *seconds, "ours, all layers", runs=runs,
                  less=True)  # fmt: skip


def share(results: dict[str, Result], name: str, config: lab.ImageGPTConfig, images: int, *, square: bool) -> float:
    done = images * flops(config, square=square) / results[name].seconds / 1e9
    return done / rate(results["rate"])


def memory(config: lab.ImageGPTConfig, folder: Path, quick: bool) -> Iterator[dict]:
    """Peak memory where both have many images at a time."""
    batch = 2 if quick else 16
    makers = {"ours": partial(ours, folder, "float32", batch, batch=batch),
              "port": partial(port, folder, "float32", batch, batch=batch)}  # fmt: skip
    peaks = [result.peak for result in race(makers, 1, warm=0).values()]
    case = f"{config.n_layer} x {config.n_embd}, float32, record, batch {batch}"
    yield row(case, "peak memory", "MB", *peaks, f"{peer_name()}, batch {batch}", runs=1, less=True)


def distances(folder: Path) -> Iterator[dict]:
    """Largest distance of a feature to transformers', over the largest feature of its layer."""
    for point, distance in race({"both": partial(distance_of, folder)}, 1, warm=0)["both"].value.items():
        yield row(f"features at {point}", f"largest distance to {peer_name()}", "of its layer's largest", distance,
                  runs=1)  # fmt: skip


def positions(config: lab.ImageGPTConfig, temporary: Path, best: int, quick: bool) -> Iterator[dict]:
    """Growth with T: few blocks, the whole width."""
    images, runs = (2, 1) if quick else (24, 3)
    for t in (4, 16) if quick else (256, 576, 1024):
        few, folder = dataclasses.replace(config, n_layer=4, n_positions=t), temporary / f"positions-{t}"
        write_model(few, folder)
        makers = {"ours": partial(ours, folder, "float32", images),
                  "port": partial(port, folder, "float32", images, batch=best)}  # fmt: skip
        results = race(makers, runs, warm=0)
        case, peer = f"4 x {few.n_embd}, float32, T = {t}", f"{peer_name()}, batch {best}"
        speeds = [images / result.seconds for result in results.values()]
        yield row(case, "speed", "images/s", *speeds, peer, runs=runs)
        peaks = [result.peak for result in results.values()]
        yield row(case, "peak memory", "MB", *peaks, peer, runs=runs, less=True)


def images(quick: bool, temporary: Path) -> Iterator[dict]:
    """Growth with N: the whole of `extract` on the bundled model, and over more parts at 4 x 4 pixels."""
    few = dataclasses.replace(lab.load_model("fashion-xs").config, n_positions=16)
    write_model(few, temporary / "few")
    cases = {
        "fashion-xs": ("fashion-xs", (4, 8, 16) if quick else (1000, 4000, 16_000)),
        "fashion-xs at 4 x 4 pixels": (temporary / "few", (4, 8) if quick else (16_000, 64_000)),
    }
    for name, (source, numbers) in cases.items():
        first = None
        for count in numbers:
            result = race({"ours": partial(extracted, source, "float32", count)}, 1, warm=0)["ours"]
            first = first or result
            case, peer = f"{name}, N = {count:,}", f"ours, N = {numbers[0]:,}"
            speeds = (count / result.seconds, numbers[0] / first.seconds)
            yield row(case, "speed", "images/s", *speeds, peer, runs=1)
            yield row(case, "peak memory", "MB", result.peak, first.peak, peer, runs=1, less=True)


def store(quick: bool) -> Iterator[dict]:
    """13 layers of width 512 in four parts, each file flushed to the disk, and one layer read back from all of them."""
    parts, size, count, width, runs = (2, 5, 3, 8, 1) if quick else (4, 2000, 13, 512, 3)
    values = np.random.default_rng(0).standard_normal((count, parts * size, width), dtype=np.float32)
    values.flags.writeable = False  # every contestant has the same
    case, layer = f"{count} layers, N = {parts * size:,}, D = {width}", count // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = {"ours": folder / "store", "np": folder / "np", "pandas": folder / "frame.parquet"}
        names = {f"{i}.{j}": values[i, :, j] for i in range(count) for j in range(width)}
        frame, key = pd.DataFrame(names, copy=False), key_of(parts * size, count)
        writers = {
            "ours": partial(write_store, files["ours"], key, values, parts),
            "np.save": partial(write_arrays, files["np"], values),
            "pandas.to_parquet": partial(write_frame, files["pandas"], frame),
        }
        written = in_turns(writers, runs)
        opened = FeatureStore.open(written["ours"].value)
        readers = {
            "ours": partial(opened.layer, "ln_1", layer, "train"),
            "np.load": partial(np.load, files["np"] / f"{layer}.npy"),
            "pandas.read_parquet": partial(read_frame, files["pandas"], [f"{layer}.{j}" for j in range(width)]),
        }
        read = in_turns(readers, 3 * runs)
        if not all(np.array_equal(result.value, values[layer]) for result in read.values()):
            raise SystemExit("the store does not read back what was written")
        layer_bytes = values[layer].nbytes
        for metric, results, total in (("write", written, values.nbytes), ("read one layer", read, layer_bytes)):
            speeds = {name: total / result.seconds / 1e9 for name, result in results.items()}
            for name in list(speeds)[1:]:
                times = runs if results is written else 3 * runs
                yield row(case, metric, "GB/s", speeds["ours"], speeds[name], name, runs=times)
        verified = in_turns({"ours": partial(FeatureStore.open, opened.path)}, runs)["ours"].seconds
        yield row(case, "open, all digests verified", "GB/s", values.nbytes / verified / 1e9, runs=runs)


def peer_name() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def write_model(config: lab.ImageGPTConfig, folder: Path) -> None:
    """Random weights and a random palette, in the layout that both read."""
    lab.ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    palette = np.random.default_rng(0).uniform(-1, 1, (config.n_colours, 3))
    lab.ImageGPTImageProcessorPil(palette, round(config.n_positions**0.5)).save_pretrained(folder)


def tokens_of(config, count: int) -> np.ndarray:
    """Random pixels (N, T), the same for everyone."""
    return np.random.default_rng(0).integers(config.vocab_size - 1, size=(count, config.n_positions))


# Makers: each is called in a process of its own, and has the model run once, on an image, before it is measured.


def ours(folder: Path, dtype: str, count: int, batch: int | None = None, device: str = "cpu") -> Callable:
    """The model inside `record`, in batches as `extract` makes them."""
    model = lab.load_model(folder).to(device)
    batch = batch or default_batch(model.config, model.device)
    inputs = align(torch.as_tensor(tokens_of(model.config, count)), "sos", model.config).to(device)

    def call(batches) -> None:
        low = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.inference_mode(), low, lab.record(model, ["ln_1"]) as pooled:
            for tokens in batches:
                pooled.run(tokens, use_cache=False)
                pooled["ln_1"].cpu().numpy()

    call(inputs[:1, None])
    return partial(call, inputs.split(batch))


def extracted(
    folder: str | Path, dtype: str, count: int, layers: list[int] | None = None, device: str = "cpu"
) -> Callable:
    """`extract` from tokens into a new store."""
    model = lab.load_model(folder)
    source = TokenSet("random", "train", np.arange(count), None, (), tokens_of(model.config, count))

    def call(source: TokenSet) -> None:
        with tempfile.TemporaryDirectory() as stores:
            lab.extract(model, source, store=stores, layers=layers, dtype=dtype, device=device, progress=False)

    call(source.select([0]))
    return partial(call, source)


def port_model(folder: Path, device: str = "cpu"):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.ImageGPTModel.from_pretrained(folder).eval().to(device)


def port(folder: Path, dtype: str, count: int, batch: int, device: str = "cpu") -> Callable:
    """The recipe that users of transformers follow."""
    model = port_model(folder, device)
    inputs = align(torch.as_tensor(tokens_of(model.config, count)), "sos", lab.load_model(folder).config).to(device)

    def call(batches) -> None:
        with torch.inference_mode(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            for tokens in batches:
                states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
                torch.stack([state.mean(1) for state in states], 1).float().cpu().numpy()

    call(inputs[:1, None])
    return partial(call, inputs.split(batch))


def fastest(folder: Path, dtype: str, quick: bool) -> Callable:
    """The batch size that suits transformers best; larger ones are not tried once one is 10% slower than the best."""

    def call() -> int:
        taken = {}
        for batch in BATCHES[:2] if quick else BATCHES:
            count = max(2, batch)
            trial, begun = port(folder, dtype, count, batch), time.perf_counter()
            trial()
            taken[batch] = (time.perf_counter() - begun) / count
            if taken[batch] > 1.1 * min(taken.values()):
                break
        return min(taken, key=taken.get)

    return call


def distance_of(folder: Path) -> Callable:
    """Features of two images at two points, against those made from transformers' hidden states and norms."""

    def call() -> dict[str, float]:
        model, theirs = lab.load_model(folder), port_model(folder)
        inputs = align(torch.as_tensor(tokens_of(model.config, 2)), "sos", model.config)
        with torch.inference_mode():
            with lab.record(model, ["ln_1", "resid_pre"]) as pooled:
                model.transformer(inputs, use_cache=False)
            *states, last = theirs(inputs, output_hidden_states=True, use_cache=False).hidden_states
            normed = [block.ln_1(state) for block, state in zip(theirs.h, states, strict=True)]
        measured = {"ln_1": pooled["ln_1"], "resid_pre": pooled["resid_pre"][:, :-1]}
        expected = {"ln_1": [*normed, last], "resid_pre": states}
        return {
            point: max(
                ((measured[point][:, i] - state.mean(1)).abs().max() / state.mean(1).abs().max()).item()
                for i, state in enumerate(expected[point])
            )
            for point in measured
        }

    return call


# Files.


def key_of(count: int, layers: int) -> FeatureKey:
    return FeatureKey(
        model="random", weights="", palette="", size=0, resample="", crop="", images="random",
        splits={"train": ("", count)}, layers={"ln_1": list(range(layers))}, pool="mean", alignment="sos",
        dtype="float32",
    )  # fmt: skip


def write_store(folder: Path, key: FeatureKey, values: np.ndarray, parts: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    target = StoreWriter.create(folder, key, {"train": parts})
    for number, rows in enumerate(np.array_split(np.arange(values.shape[1]), parts)):
        features = {f"ln_1.{i}": layer[rows[0] : rows[-1] + 1] for i, layer in enumerate(values)}
        target.write_part("train", number, rows, None, features, dict.fromkeys(features, [0.0, 0.0, 0]))
    return target.path


def write_arrays(folder: Path, values: np.ndarray) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i, layer in enumerate(values):
        with open(folder / f"{i}.npy", "wb") as file:
            np.save(file, layer)
            file.flush()
            os.fsync(file.fileno())


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        frame.to_parquet(file)
        file.flush()
        os.fsync(file.fileno())


def read_frame(path: Path, columns: list[str]) -> np.ndarray:
    return pd.read_parquet(path, columns=columns).to_numpy()
