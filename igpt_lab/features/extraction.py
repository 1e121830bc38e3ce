"""Run a model over image sets once and keep every layer's pooled states in a feature store."""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt_lab.core import cluster
from igpt_lab.core.devices import best_device
from igpt_lab.core.provenance import digest
from igpt_lab.core.storage import Remote, place
from igpt_lab.features.hooks import layers_of, pooling, record
from igpt_lab.features.manifest import FeatureKey, explain_miss
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet, load_images
from igpt_lab.images.tokens import cached_tokens, tokenize
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.models.losses import align

ROWS = 2000  # rows of a part
# Fields of a configuration that no hidden state of a model in eval mode depends on: they are not in the store's key.
NOT_SEEN = (
    "resid_pdrop embd_pdrop attn_pdrop initializer_range use_cache tie_word_embeddings pad_token_id bos_token_id "
    "eos_token_id num_labels id2label label2id problem_type output_attentions output_hidden_states return_dict"
).split()


def extract(
    model: ImageGPTForCausalImageModeling | str | Path,
    images: ImageSet | TokenSet | Sequence[ImageSet | TokenSet],
    *,
    store: str | Path = "stores",
    points: Sequence[str] = ("ln_1",),
    layers: Sequence[int] | None = None,
    pool: str = "mean",
    alignment: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    on_bad_image: str = "error",
    device: str | torch.device | None = None,
    workers: int | None = None,
    engine: str = "local",
    scheduler: str | None = None,
    deadline: float | None = None,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> FeatureStore:
    """Pooled states of `layers` (all by default) at `points`, for the splits of one image set, kept under `store`.

    One forward pass a batch gives every layer; blocks above the deepest one do not run. What is in the store and whole
    is not computed again, so an interrupted extraction goes on where it stopped. Images are decoded by `workers`
    threads ahead of the device, once for all models of one palette (see `token_cache`). Prints an estimate first.

    `alignment` is "sos" by default, "raw" for a bidirectional model, which has no SOS. `dtype` of the matrix products,
    "float32" or "bfloat16": by default bfloat16 on CUDA alone. `batch_size` is halved where memory runs out.
    `on_bad_image="skip"` leaves out images that cannot be read, and the store lists them. Raises ValueError for an
    unknown point, layer, pooling or alignment before any work is done.

    With `engine="dask"` parts are computed by the workers of the cluster at `scheduler`, or by `workers` processes of
    this machine (one for each CUDA device, else one); a part may take `deadline` seconds, see `cluster.run`. Model and
    images are then loaded by name on every worker, and `store` is a folder that all of them share. The bytes are those
    of the local engine on the same kind of device. `part=(i, n)`, 1 <= i <= n, computes every n-th part alone, for job
    arrays: the store that is returned may not be complete.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    splits = {each.split: each for each in ([images] if isinstance(images, ImageSet | TokenSet) else images)}
    device = torch.device(device or best_device())
    alignment = alignment or ("raw" if model.config.bidirectional else "sos")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    wanted = {point: layers_of(point, model.config.n_layer, layers) for point in points}
    pooling(pool).check(model.config.n_positions)
    align(torch.zeros(1, 1, dtype=torch.long), alignment, model.config)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; expected 'float32' or 'bfloat16' (float16 overflows in ImageGPT)")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r}; expected 'error' or 'skip'")
    if engine not in ("local", "dask") or (engine == "local" and scheduler):
        raise ValueError(f"engine={engine!r}, scheduler={scheduler!r}; expected 'local', or 'dask' with its scheduler")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ValueError(f"part={part}; expected (i, n) with 1 <= i <= n")
    for each in splits.values():
        if model.processor is None and isinstance(each, ImageSet):
            tokenize(each, None)  # says what is missing
    root = place(store)
    if part is not None and isinstance(root, Remote):
        raise ValueError(f"part={part} needs locks, and {root} is on an object store; engine='dask' can fill it")
    parts = {split: _parts(each) for split, each in splits.items()}
    source = {"model": getattr(model, "source", None), "images": {split: each.source for split, each in splits.items()}}
    source["options"] = {  # for a repair, which runs this again
        "points": list(points), "layers": layers if layers is None else [int(layer) for layer in layers], "pool": pool,
        "alignment": alignment, "dtype": dtype, "batch_size": batch_size, "on_bad_image": on_bad_image,
    }  # fmt: skip
    key = _key(model, splits, wanted, pool, alignment, dtype)
    miss = explain_miss(store, key) if progress else ""
    target = FeatureStore.create(store, key, {split: len(each) for split, each in parts.items()}, source=source)
    every = [(split, n) for split, each in parts.items() for n in range(len(each))]
    todo = [each for each in (every[part[0] - 1 :: part[1]] if part else every) if not target.has(*each)]
    if not todo:
        return _finished(target, every, part)
    target.refuse_other_versions()
    how = {
        "points": list(points), "layers": layers, "pool": pool, "alignment": alignment, "dtype": dtype,
        "batch_size": batch_size or default_batch(model.config, device),
    }  # fmt: skip
    if engine == "dask":
        workers = workers or max(1, torch.cuda.device_count() * (device.type == "cuda"))
        threads = 0 if scheduler else max(1, torch.get_num_threads() // workers)
        work = _Work(source, key, root.absolute(), parts, how, on_bad_image == "skip", device.type, threads)
        _on_cluster(work, target, splits, todo, scheduler, workers, deadline, progress)
        return _finished(target, every, part)
    runner = _Runner(model.to(device).eval(), **how)
    rows = sum(len(parts[split][n]) for split, n in todo)
    with (
        closing(target),
        tqdm(total=rows, desc=f"features of {model.name}", unit="image", disable=not progress) as bar,
        ThreadPoolExecutor(1) as writer,
        closing(target.claims(todo)) as claims,
        closing(
            cached_tokens(
                splits, model.processor, parts, claims, root=root,
                fits=(model.config.n_positions, model.config.n_colours), skip_bad=on_bad_image == "skip",
                workers=workers,
            )
        ) as made,
    ):  # fmt: skip
        if miss:
            bar.write(miss, file=sys.stderr)
        if progress:
            bar.set_postfix_str(runner.estimate(rows))
        written = None
        for split, n, tokens in made:
            features, stats = runner.over(tokens.tokens, bar)
            bar.update(len(tokens.skipped))
            if written is not None:
                written.result()
            chosen = splits[split].select(tokens.positions)
            written = writer.submit(
                target.write_part, split, n, chosen.index, chosen.labels, features, stats, tokens.skipped
            )
        if written is not None:
            written.result()
    return _finished(target, every, part)


def _finished(target: FeatureStore, every: list[tuple[str, int]], part: tuple[int, int] | None) -> FeatureStore:
    """The store, opened; where only some of its parts were asked for and others are missing, as it is."""
    if part and not all(target.has(*each, verify=False) for each in every):
        return target
    finished = FeatureStore.open(target.path, verify=False)  # each part was verified before, or written just now
    _warn_of_bad_states(finished)
    return finished


@dataclass(frozen=True)
class _Work:
    """All that a worker of a cluster needs to compute any part of a store; `open` loads it."""

    source: dict
    key: FeatureKey
    root: Path
    parts: dict[str, list[np.ndarray]]
    how: dict
    skip_bad: bool
    device: str
    threads: int  # of each worker on this machine; 0 leaves them as they are

    def open(self) -> Callable[[str, int, str], dict]:
        """The function that computes a part; ValueError where this worker's model is another one."""
        if self.threads:
            torch.set_num_threads(self.threads)
        source = dict(self.source["model"])
        model = load_model(source.pop("name"), **source)
        if (found := _weights(model)) != self.key.weights:
            raise ValueError(f"{model.name} has other weights on this worker: {found[:8]}, not {self.key.weights[:8]}")
        splits = {split: load_images(**each, split=split) for split, each in self.source["images"].items()}
        model.to(cluster.device_of_worker(self.device)).eval()
        target = FeatureStore.create(
            self.root, self.key, {s: len(p) for s, p in self.parts.items()}, source=self.source
        )
        return partial(self.part, model, splits, target, threading.Lock())

    def part(self, model, splits, target, alone, split: str, number: int, images: str) -> dict:
        """Compute and write a part, and say what the manifest is to list; ValueError for other images than `images`."""
        positions = self.parts[split][number]
        chosen = splits[split].select(positions[positions < len(splits[split])])
        if chosen.fingerprint != images:
            raise ValueError(f"{chosen.name} {split}, rows {chosen.index[:1]} and on, is not the same on this worker")
        [(*_, tokens)] = cached_tokens(
            splits, model.processor, self.parts, [(split, number)], root=self.root,
            fits=(model.config.n_positions, model.config.n_colours), skip_bad=self.skip_bad, workers=1,
        )  # fmt: skip
        with alone:  # what is decoded and written beside it does not keep the device waiting
            features, stats = _Runner(model, **self.how).over(tokens.tokens)
        chosen = splits[split].select(tokens.positions)
        return target.write_part(
            split, number, chosen.index, chosen.labels, features, stats, tokens.skipped, listed=False
        )


def _on_cluster(
    work: _Work, target: FeatureStore, splits: dict, todo: list[tuple[str, int]], scheduler: str | None,
    workers: int, deadline: float | None, progress: bool,
) -> None:  # fmt: skip
    """Compute `todo` on Dask workers, and list each part when it is there."""
    if not work.source["model"] or not all(work.source["images"].values()):
        raise ValueError(
            "engine='dask' loads model and images on every worker: give what load_model and load_images do"
        )
    on_cuda, named = work.device == "cuda", {}

    def tasks() -> Iterator[tuple[str, tuple] | None]:
        for part in target.claims(todo):
            if part is not None:
                name = f"{part[0]} part {part[1]}"
                named[name] = part
                part = name, (*part, splits[part[0]].select(work.parts[part[0]][part[1]]).fingerprint)
            yield part

    rows = sum(len(work.parts[split][n]) for split, n in todo)
    with (
        closing(target),
        tqdm(total=rows, desc=f"features of {target.key['model']}", unit="image", disable=not progress) as bar,
        closing(tasks()) as claimed,
        closing(
            cluster.run(
                work, claimed, scheduler=scheduler, slots=1 + on_cuda, deadline=deadline, workers=workers
            )
        ) as made,
    ):  # fmt: skip
        for name, entry in made:
            target.list_part(*named[name], entry)
            bar.update(len(work.parts[named[name][0]][named[name][1]]))


def default_batch(config: ImageGPTConfig, device: torch.device) -> int:
    """Images at a time: on a CPU as many as stay near its caches, elsewhere what fills a large accelerator.

    A function of the shapes alone, since another batch size may round in another way.
    """
    return max(1, (3_200 if device.type == "cpu" else 131_072) // config.n_positions)


def _parts(images: ImageSet | TokenSet) -> list[np.ndarray]:
    """The positions of each part of a split."""
    return [np.arange(start, min(start + ROWS, len(images))) for start in range(0, len(images), ROWS)]


def _key(
    model: ImageGPTForCausalImageModeling,
    splits: dict[str, ImageSet],
    layers: dict[str, list[int]],
    pool: str,
    alignment: str,
    dtype: str,
) -> FeatureKey:
    """The key of an extraction, with weights and palette by their content."""
    names = {each.name for each in splits.values()}
    if len(names) != 1:
        raise ValueError(f"one store holds the splits of one image set; got {sorted(names)}")
    if len({each.fingerprint for each in splits.values()}) < len(splits):
        raise ValueError(f"{names.pop()} gives the same images for {' and '.join(splits)}; it needs splits of its own")
    processor = model.processor
    return FeatureKey(
        model=model.name,
        weights=_weights(model),
        palette=digest(processor.clusters.tobytes()) if processor else "none",
        size=processor.side if processor else math.isqrt(model.config.n_positions),
        resample=processor.resampling if processor else "none",
        crop=processor.crop if processor else "none",
        images=names.pop(),
        splits={split: (each.fingerprint, len(each)) for split, each in splits.items()},
        layers=layers,
        pool=pool,
        alignment=alignment,
        dtype=dtype,
    )


def _weights(model: ImageGPTForCausalImageModeling) -> str:
    """Digest of the weights, and of what in the configuration a hidden state depends on."""
    weights = {name: digest(tensor.cpu().numpy().tobytes()) for name, tensor in model.transformer.state_dict().items()}
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_SEEN}
    return digest({"config": config, "weights": weights})


@dataclass
class _Runner:
    """What a model is asked for, and in which way."""

    model: ImageGPTForCausalImageModeling
    points: Sequence[str]
    layers: Sequence[int] | None
    pool: str
    alignment: str
    dtype: str
    batch_size: int

    def over(self, tokens: np.ndarray, bar: tqdm | None = None) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
        """Palette indices (N, T) -> {`point.layer`: float32 (N, D)}, and the statistics that the store keeps with them.

        Where memory runs out, all of them again in batches of half the size.
        """
        while True:
            done = 0 if bar is None else bar.n
            try:
                return self._over(tokens, bar)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise MemoryError(
                        f"no memory for a single image of {tokens.shape[1]} positions on {self.model.device}"
                    ) from error
            self.batch_size //= 2
            tqdm.write(f"out of memory: going on with batches of {self.batch_size}", file=sys.stderr)
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            if bar is not None:
                bar.update(done - bar.n)

    @torch.inference_mode()
    def _over(self, tokens: np.ndarray, bar: tqdm | None) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
        model, device = self.model, self.model.device
        if any(module.training for module in model.modules()):
            raise RuntimeError("the model is in training mode; call model.eval()")
        pixels = torch.as_tensor(tokens.astype(np.int32))
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # the kernels behind it wait for it
        kept, stats = {point: [] for point in self.points}, {point: [] for point in self.points}
        low = torch.autocast(device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()
        how = {"layers": self.layers, "pool": self.pool, "alignment": self.alignment}
        with low, record(model, self.points, **how) as pooled:
            for batch in pixels.split(self.batch_size) if len(pixels) else ():
                pooled.run(batch.to(device).long(), use_cache=False)
                for point in self.points:
                    kept[point].append(pooled[point])
                    stats[point].append(pooled.stats(point))
                if bar is not None:
                    bar.update(len(batch))
        features, figures, states = {}, {}, tokens.size * model.config.n_embd
        for point in self.points:
            if not kept[point]:  # a part without an image that can be read
                width = pooling(self.pool).width(model.config.n_embd)
                names = [f"{point}.{layer}" for layer in pooled.layers[point]]
                features |= {name: np.zeros((0, width), np.float32) for name in names}
                figures |= {name: [0.0, 0.0, 0] for name in names}
                continue
            values, measured = torch.cat(kept[point]).cpu().numpy(), torch.stack(stats[point]).cpu().double().numpy()
            for i, layer in enumerate(pooled.layers[point]):
                features[f"{point}.{layer}"] = values[:, i]
                largest, zeros, bad = measured[:, i].T
                figures[f"{point}.{layer}"] = [float(largest.max()), float(zeros.sum() / states), int(bad.sum())]
        return features, figures

    def estimate(self, rows: int) -> str:
        """What `rows` images will take: bytes and memory by arithmetic, seconds by timing a batch of random tokens."""
        config, size = self.model.config, min(self.batch_size, rows)
        tokens = np.random.default_rng(0).integers(config.n_colours, size=(size, config.n_positions))
        features, _ = self.over(tokens[:4])
        begun = time.perf_counter()
        self.over(tokens)
        seconds = (time.perf_counter() - begun) * rows / size
        row = 4 * sum(values.shape[1] for values in features.values())
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        width = 8 * config.n_embd + 2 * (config.n_inner or 4 * config.n_embd)  # of what a block holds at once
        part = min(rows, ROWS) * row * 5  # in batches, together, as columns, as a file and its copy
        memory = weights + size * config.n_positions * width * 4 + part
        return (
            f"{rows * (16 + row) / 1e6:,.3g} MB, {memory / 1e9:,.2g} GB of memory, about {seconds:,.0f} s on "
            f"{self.model.device}"
        )


def _warn_of_bad_states(store: FeatureStore) -> None:
    """Name the layers whose states are not finite, or so large that float16 could not hold them."""
    stats = store.stats()
    bad, large = stats[stats.non_finite > 0], stats[(stats.non_finite == 0) & (stats.max_abs > 65_504)]
    for rows, what in ((bad, "are not finite"), (large, "overflow in float16 (above 65,504)")):
        for point, of_point in rows.groupby("point", sort=False):
            layers = ", ".join(map(str, sorted(of_point.layer.unique())))
            warnings.warn(f"{store.path.name}, {point}: layers {layers} have states that {what}", stacklevel=3)


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA says so by its class, a CPU's allocator in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
