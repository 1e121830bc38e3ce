"""Run a model over image sets once and keep every layer's pooled states in a feature store."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt_lab.checkpoints import bundled
from igpt_lab.data import ImageSet, TokenSet, tokenize
from igpt_lab.hooks import layers_of, pooling, record
from igpt_lab.model import ImageGPTForCausalImageModeling, align, best_device
from igpt_lab.pixels import ImageGPTImageProcessorPil
from igpt_lab.provenance import digest
from igpt_lab.store import FeatureKey, FeatureStore

ROWS = 2000  # rows of a part
# Fields of a configuration that no hidden state of a model in eval mode depends on: they are not in the store's key.
NOT_SEEN = (
    "resid_pdrop embd_pdrop attn_pdrop initializer_range use_cache tie_word_embeddings pad_token_id bos_token_id "
    "eos_token_id num_labels id2label label2id problem_type output_attentions output_hidden_states return_dict"
).split()


def load_model(source: str | Path, *, random: bool = False, seed: int = 0) -> ImageGPTForCausalImageModeling:
    """A model with its `name` and image `processor`, from a bundled name, a folder in the port's layout or a Hub name.

    `random=True` keeps the shape and draws the weights anew with `seed`: the control that was never trained.
    """
    processor = ImageGPTImageProcessorPil.from_pretrained(source)
    model = ImageGPTForCausalImageModeling.from_pretrained(source)
    model.name = Path(source).name
    if random:
        model.initialise(generator=torch.Generator().manual_seed(seed))
        model.name += "-random"
    here = Path(source).expanduser()
    known = str(source) in bundled() or not here.is_dir()
    model.source = {"name": str(source if known else here.resolve()), "random": random, "seed": seed}
    model.processor = processor
    if len(processor.clusters) != model.config.n_colours or processor.side**2 != model.config.n_positions:
        raise ValueError(
            f"{source}: the palette has {len(processor.clusters)} colours, its images {processor.side} pixels a side; "
            f"the model has {model.config.n_colours} colours and {model.config.n_positions} positions; they do not fit"
        )
    return model


def extract(
    model: ImageGPTForCausalImageModeling | str | Path,
    images: ImageSet | TokenSet | Sequence[ImageSet | TokenSet],
    *,
    store: str | Path = "stores",
    points: Sequence[str] = ("ln_1",),
    layers: Sequence[int] | None = None,
    pool: str = "mean",
    alignment: str = "sos",
    dtype: str = "float32",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FeatureStore:
    """Pooled states of all `layers` at `points`, for the splits of one image set, kept under the folder `store`.

    One forward pass a batch gives every layer. What is in the store and whole is not computed again, so an interrupted
    extraction goes on where it stopped. Prints an estimate first. `dtype="bfloat16"` runs the matrix products in it.
    `batch_size` is 8 on a CPU by default (larger batches leave its caches and were slower), 128 elsewhere.
    Raises ValueError for an unknown point, layer, pooling or alignment before any work is done.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    splits = {each.split: each for each in ([images] if isinstance(images, ImageSet | TokenSet) else images)}
    wanted = {point: layers_of(point, model.config.n_layer, layers) for point in points}
    pooling(pool)
    align(torch.zeros(1, 1, dtype=torch.long), alignment, model.config)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; expected 'float32' or 'bfloat16' (float16 overflows in ImageGPT)")
    parts = {split: math.ceil(len(each) / ROWS) for split, each in splits.items()}
    source = {"model": getattr(model, "source", None), "images": {split: each.source for split, each in splits.items()}}
    source["options"] = {  # for a repair, which runs this again
        "points": list(points), "layers": layers if layers is None else [int(layer) for layer in layers], "pool": pool,
        "alignment": alignment, "dtype": dtype, "batch_size": batch_size,
    }  # fmt: skip
    key = _key(model, splits, wanted, pool, alignment, dtype)
    target = FeatureStore.create(store, key, parts, source=source)
    todo = [(split, n) for split, count in parts.items() for n in range(count) if not target.has(split, n)]
    if not todo:
        return target
    model = model.to(device or best_device()).eval()
    batch_size = batch_size or (8 if model.device.type == "cpu" else 128)
    how = {"points": points, "layers": layers, "pool": pool, "alignment": alignment, "dtype": dtype}
    rows = sum(len(_rows(splits[split], n)) for split, n in todo)
    with tqdm(total=rows, desc=f"features of {model.name}", unit="image", disable=not progress) as bar:
        if progress:
            bar.set_postfix_str(_estimate(model, splits[todo[0][0]], rows, batch_size, how))
        for split, n in target.claims(todo):
            part = splits[split].select(_rows(splits[split], n))
            features, stats = _pooled(model, tokenize(part, model.processor, progress=False), batch_size, bar, **how)
            target.write_part(split, n, part.index, part.labels, features, stats)
    return FeatureStore.open(target.path)


def _key(
    model: ImageGPTForCausalImageModeling,
    splits: dict[str, ImageSet],
    layers: dict[str, list[int]],
    pool: str,
    alignment: str,
    dtype: str,
) -> FeatureKey:
    """The key of an extraction, with weights and palette by their content."""
    weights = {name: digest(tensor.cpu().numpy().tobytes()) for name, tensor in model.transformer.state_dict().items()}
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_SEEN}
    names = {each.name for each in splits.values()}
    if len(names) != 1:
        raise ValueError(f"one store holds the splits of one image set; got {sorted(names)}")
    if len({each.fingerprint for each in splits.values()}) < len(splits):
        raise ValueError(f"{names.pop()} gives the same images for {' and '.join(splits)}; it needs splits of its own")
    return FeatureKey(
        model=model.name,
        weights=digest({"config": config, "weights": weights}),
        palette=digest(model.processor.clusters.tobytes()),
        size=model.processor.side,
        resample=model.processor.resampling,
        crop=model.processor.crop,
        images=names.pop(),
        splits={split: (each.fingerprint, len(each)) for split, each in splits.items()},
        layers=layers,
        pool=pool,
        alignment=alignment,
        dtype=dtype,
    )


@torch.inference_mode()
def _pooled(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, batch_size: int, bar: tqdm | None, *,
    points: Sequence[str], layers: Sequence[int] | None, pool: str, alignment: str, dtype: str,
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:  # fmt: skip
    """Palette indices (N, T) -> {`point.layer`: float32 (N, D)}, and the statistics that the store keeps with them."""
    kept, stats = {point: [] for point in points}, {point: [] for point in points}
    low = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with low, record(model, points, layers=layers, pool=pool) as pooled:
        for start in range(0, len(tokens), batch_size):
            batch = torch.as_tensor(tokens[start : start + batch_size].astype(np.int64), device=model.device)
            model.transformer(align(batch, alignment, model.config), use_cache=False)
            for point in points:
                kept[point].append(pooled[point])
                stats[point].append(pooled.stats(point))
            if bar is not None:
                bar.update(len(batch))
    features, figures, states = {}, {}, tokens.size * model.config.n_embd
    for point in points:
        values, measured = torch.cat(kept[point]).cpu().numpy(), torch.stack(stats[point]).cpu().double().numpy()
        for i, layer in enumerate(pooled.layers[point]):
            features[f"{point}.{layer}"] = values[:, i]
            largest, zeros, bad = measured[:, i].T
            figures[f"{point}.{layer}"] = [float(largest.max()), float(zeros.sum() / states), int(bad.sum())]
    return features, figures


def _estimate(model: ImageGPTForCausalImageModeling, images: ImageSet, rows: int, batch_size: int, how: dict) -> str:
    """What `rows` images will take: bytes on disk by arithmetic, seconds by timing one batch."""
    tokens = tokenize(images.select(np.arange(min(batch_size, len(images)))), model.processor, progress=False)
    _pooled(model, tokens[:4], batch_size, None, **how)
    begun = time.perf_counter()
    features, _ = _pooled(model, tokens, batch_size, None, **how)
    seconds = (time.perf_counter() - begun) * rows / len(tokens)
    size = rows * (16 + 4 * sum(values.shape[1] for values in features.values()))
    return f"{size / 1e6:,.3g} MB, about {seconds:,.0f} s on {model.device}"


def _rows(images: ImageSet, part: int) -> np.ndarray:
    return np.arange(part * ROWS, min(len(images), (part + 1) * ROWS))
