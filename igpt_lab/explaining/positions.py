"""Which positions know the class: probes of single states, and of the mean over the share of an image seen so far.

With a start token state i has seen the pixels before i alone, so position 0 knows nothing of its image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import side_by_side
from igpt_lab.core.significance import compare
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features, check_same_layers
from igpt_lab.probing.probes import CS, probe_layers
from igpt_lab.probing.results import ProbeResult

Model = ImageGPTForCausalImageModeling | str | Path
COUNT = 8  # positions, or shares, by default


@checked
def probe_positions(
    model: Model,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    point: str = "ln_1",
    store: str | Path = "stores",
    folds: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Measurement:
    """Class accuracy of single states.

    One extraction, pooled `at:p,...`, goes to `store`.

    Args:
        model: A model, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        positions: Of 0..T - 1; by default eight from the first to the last, evenly.
        layers: All by default.
        point: Place in a block, see `record`.
        store: Folder of the stores.
        folds: Of the cross-validation that chooses C and layer.
        seed: Of the folds.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        `Measurement`, whose table has a row per `position` and layer, as of `probe_slices`.

    Raises:
        ValueError: A position, layer or point that the model has not, images without labels or that do not fit the
            model.

    Example:
        >>> probed = lab.probe_positions(
        ...     model, train_images, test_images, positions=[3, 15], layers=[3], store="stores"
        ... )
        >>> probed.table[["position", "layer", "n_test"]]
           position  layer  n_test
        0         3      3     100
        1        15      3     100
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    positions = even_positions(model.config.n_positions) if positions is None else list(positions)
    if min(positions) < 0:
        raise ValueError(f"positions {positions}; expected some of 0 to {model.config.n_positions - 1}")
    store_of = {"store": store, "points": [point], "layers": layers, "device": device, "progress": progress}
    pool = f"at:{','.join(map(str, positions))}"
    train, test = _features(model, train_images, test_images, pool, store_of)
    return probe_slices(train, test, positions, folds=folds, seed=seed, device=device, progress=progress)


@checked
def probe_prefixes(
    model: Model,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    shares: int = COUNT,
    layers: Sequence[int] | None = None,
    point: str = "ln_1",
    store: str | Path = "stores",
    folds: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Measurement:
    """Class accuracy of the mean over the first states, by the share of the image that they see.

    Share i / g is the mean of the first ceil(T i / g) states, and share 1 the pooling `mean`. One extraction, pooled
    `prefix:g`, goes to `store`.

    Args:
        model: One that predicts pixels in their order, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        shares: g, the number of shares.
        layers: All by default.
        point: Place in a block, see `record`.
        store: Folder of the stores.
        folds: Of the cross-validation that chooses C and layer.
        seed: Of the folds.
        device: Where model and fits run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        `Measurement`, whose table has a row per `share` (a fraction) and layer, as of `probe_slices`.

    Raises:
        ValueError: A bidirectional model, whose every state sees the whole image; more shares than positions, a layer
            or point that the model has not, images without labels or that do not fit the model.

    Example:
        >>> probed = lab.probe_prefixes(model, train_images, test_images, shares=2, layers=[3], store="stores")
        >>> probed.table[["share", "layer", "n_test"]]
           share  layer  n_test
        0    0.5      3     100
        1    1.0      3     100
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    if model.config.bidirectional:
        raise ValueError("each state of a bidirectional model sees the whole image, so no prefix is a share of it")
    if shares < 1:
        raise ValueError(f"shares={shares}; expected 1 to {model.config.n_positions}")
    store_of = {"store": store, "points": [point], "layers": layers, "device": device, "progress": progress}
    train, test = _features(model, train_images, test_images, f"prefix:{shares}", store_of)
    seen = [i / shares for i in range(1, shares + 1)]
    return probe_slices(train, test, seen, name="share", folds=folds, seed=seed, device=device, progress=progress)


@checked
def probe_slices(
    train: Features,
    test: Features,
    slices: Sequence[int | float],
    *,
    name: str = "position",
    Cs: Sequence[float] = CS,
    folds: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Measurement:
    """Probe vectors that stand one behind the other in features (N, g D), such as `at:p,...` and `prefix:g` give.

    Each is probed by `probe_layers` as if it were alone.

    Args:
        train, test: Features with labels.
        slices: What the g vectors are called.
        name: The column of that.
        Cs: Inverse strengths of the penalty to choose from.
        folds: Of the cross-validation; two by default, as there are g times as many fits as for one curve.
        seed: Of the folds.
        device: Where fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `Measurement`, whose table has the rows of `probe_layers` for each slice, with the column `name`, and `drop`,
        the accuracy of the slice's chosen layer less that of its last, on the same test images, with its 95% interval
        `drop_low`, `drop_high` and McNemar's `drop_p` (`compare`). `of_images` has for (slice, layer) whether each test
        image is right, 0 or 1.

    Raises:
        ValueError: Features whose width is no multiple of g, and as `probe_layers`.

    Example:
        >>> probed = lab.probe_slices(train, test, [1, 2], name="half", Cs=[0.1])  # features of width 8, in two halves
        >>> probed.table[["half", "layer", "n_features"]].tail(2)
           half  layer  n_features
        6     2      2           4
        7     2      3           4
    """
    device = best_device(device)

    def probe(place: int) -> ProbeResult:
        parts = (slice_of(features, place, len(slices)) for features in (train, test))
        return probe_layers(*parts, Cs=Cs, folds=folds, seed=seed, device=device, progress=False)

    check_same_layers(train, test)
    first = next(iter(train.layers.values()))  # all are taken to be as wide: a store reads each anew
    numbers = len(train.layers) * first.size // max(len(slices), 1)
    with closing(side_by_side(probe, range(len(slices)), device, numbers)) as probed:
        results = list(tqdm(probed, total=len(slices), desc=f"probes by {name}", unit=name, disable=not progress))
    tables = []
    correct: dict[tuple, np.ndarray] = {}
    for value, result in zip(slices, results, strict=True):
        paired = compare(result.correct[result.chosen], result.correct[max(result.correct)])
        ends = {"drop_low": paired.low, "drop_high": paired.high, "drop_p": paired.p_value}
        table = result.table.assign(drop=paired.difference, **ends)
        table.insert(1, name, value)
        tables.append(table)
        correct |= {(value, layer): right.astype(np.float64) for layer, right in result.correct.items()}
    return Measurement(pd.concat(tables, ignore_index=True), correct, (name, "layer"))


def _features(
    model: ImageGPTForCausalImageModeling,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    pool: str,
    options: dict,
) -> list[Features]:
    """Those of train and of test, from one extraction."""
    store = extract(model, [train_images, test_images], pool=pool, **options)
    (point,) = options["points"]
    return [Features.from_store(store, images.split, point) for images in (train_images, test_images)]


def even_positions(count: int) -> list[int]:
    """COUNT of the positions 0..count - 1, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, COUNT).round().astype(int)).tolist()


def slice_of(features: Features, place: int, count: int, number: int = 1) -> Features:
    """Of `count` vectors that stand one behind the other in each layer, the `number` from `place` on."""
    return replace(features, layers=_Slice(features.layers, place, count, number))


@dataclass(frozen=True)
class _Slice(Mapping):
    """Of the `count` vectors side by side in each layer (N, count D) the `number` from `place` on, (N, number D)."""

    layers: Mapping[int, np.ndarray]
    place: int
    count: int
    number: int

    def __getitem__(self, layer: int) -> np.ndarray:
        values = self.layers[layer]
        width, rest = divmod(values.shape[1], self.count)
        if rest:
            raise ValueError(f"layer {layer} has {values.shape[1]} features; expected a multiple of {self.count}")
        return values[:, self.place * width : (self.place + self.number) * width]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
