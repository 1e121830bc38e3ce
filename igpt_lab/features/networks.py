"""Any torch network over image sets: the layers of its modules in the feature store, as those of an ImageGPT are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from igpt_lab.core.devices import best_device, precision
from igpt_lab.core.progress import tqdm
from igpt_lab.features.fingerprints import digest_of_function, digest_of_network, fingerprint_of, probe_picture
from igpt_lab.features.hooks import check_eval, evaluating
from igpt_lab.features.manifest import FeatureKey, cut_at
from igpt_lab.features.modules import (
    BLOCKS,
    Inputs,
    ModulePooling,
    ModuleStates,
    blocks_of,
    described,
    module_pooling,
    modules_named,
)
from igpt_lab.features.prepared import ROWS, Computed, Extraction, Model, Read, by_split, root_of
from igpt_lab.features.reading import Reader, first_picture, floats
from igpt_lab.features.runner import Batches, Features, Stats
from igpt_lab.features.settings import DTYPES, ON_BAD_IMAGE, images_in_key
from igpt_lab.images.tokens import Part
from igpt_lab.models.loading import load_model
from igpt_lab.models.pretrained import ImageGPTPreTrainedModel

POINT = "modules"  # of the store: its layers 0, 1, ... are the modules in the order of depth
SMALL, LARGE = 32, 256  # images at a time, on a CPU and on an accelerator
AT_RANDOM = (
    "each time, in eval mode; leave out of the network what draws at random, such as masking, or dropout always on"
)
OF_THE_BATCH = (
    "beside another one; leave out of the network what looks at others, such as batch norm without running statistics"
)


def is_other(model: object) -> bool:
    """Is it a torch network that is no ImageGPT of ours, compiled or not?"""
    plain = getattr(model, "_orig_mod", model)
    return isinstance(plain, nn.Module) and not isinstance(plain, ImageGPTPreTrainedModel)


def imagegpt(model: Any) -> Model:
    """The model; TypeError for a network that is no ImageGPT."""
    if is_other(model):
        kind = type(model).__name__
        raise TypeError(f"a {kind} is no ImageGPT; lab.extract takes other networks, shares and a cluster do not")
    return model


def refuse(options: Mapping[str, Any]) -> None:
    """TypeError for options, those that are not None or False, that modules have not."""
    for name, value in options.items():
        if value:
            raise TypeError(f"{name}= is of an ImageGPT; the layers of a network's modules are named by modules=")


@dataclass(frozen=True)
class NetworkSettings:
    """What is asked of an extraction from modules; `extract` says what each is."""

    modules: str | Sequence[str] | None = None
    pool: str | Callable = "mean"
    preprocess: Callable | None = None
    dtype: str | None = None
    batch_size: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ValueError(
                f"dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}, or None for the network's own"
            )
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={self.on_bad_image!r}; expected 'error' or 'skip'")

    def names(self, network: nn.Module) -> list[str]:
        """The names of the modules that are asked for."""
        if self.modules is None or self.modules == BLOCKS:
            return blocks_of(network)
        return list(modules_named(network, [self.modules] if isinstance(self.modules, str) else self.modules))

    @property
    def pooling(self) -> ModulePooling:
        """The pooling, a function of the user's under its name and the digest of its code."""
        if isinstance(self.pool, str):
            return module_pooling(self.pool)
        name = getattr(self.pool, "__name__", type(self.pool).__name__)
        return module_pooling(self.pool, f"{name} {digest_of_function(self.pool)[:16]}")

    def options(self) -> dict:
        """The settings that the manifest keeps beside the key."""
        return {"batch_size": self.batch_size, "on_bad_image": self.on_bad_image}


def prepare_network(
    network: nn.Module | str | Path,
    images: Any,
    settings: NetworkSettings,
    *,
    store: str | Path,
    device: str | torch.device | None = None,
) -> NetworkExtraction:
    """An extraction from modules, checked by a forward pass of one image; ValueError for what cannot be."""
    network = load_model(network) if isinstance(network, str | Path) else getattr(network, "_orig_mod", network)
    splits, root = by_split(images), root_of(store)
    names, pooling = settings.names(network), settings.pooling
    reader = Reader(settings.preprocess or floats, settings.on_bad_image == "skip")
    picture = first_picture(splits[min(splits)])
    fingerprint = fingerprint_of(reader.read, picture)
    own, device = own_dtype(network), device_of(network, device)
    if settings.dtype not in (None, _short(own)) and own != torch.float32:  # autocast leaves float64 as it is
        raise ValueError(
            f"the network's weights are {_short(own)}, and dtype={settings.dtype!r} is of float32 weights; "
            "network.float() makes them so, or leave dtype out"
        )
    dtype = settings.dtype or _short(own)
    trial = Passes(network.to(device), names, pooling, dtype, device, settings.batch_size)
    pair = reader.read(picture), reader.read(probe_picture(picture.size))
    names = trial.try_out(*pair, is_plain=settings.preprocess is None)
    key = FeatureKey(
        model=_title(network), weights=digest_of_network(network), palette="none", size=0, resample="none", crop="none",
        **images_in_key(list(splits.values())), layers={POINT: list(range(len(names)))}, pool=pooling.name,
        alignment="none", dtype=dtype, modules=tuple(names), preprocess=fingerprint,
    )  # fmt: skip
    settings = replace(settings, modules=names)
    rows = cut_at(root / key.folder(), key, ROWS)
    return NetworkExtraction(network, splits, settings, root, device, key, None, rows, trial, reader)


def _title(network: nn.Module) -> str:
    name = getattr(network, "name", None)
    return name if isinstance(name, str) and name else type(network).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def own_dtype(network: nn.Module) -> torch.dtype:
    """Of the network's first weights that are floats, float32 without any."""
    return next((weights.dtype for weights in network.parameters() if weights.is_floating_point()), torch.float32)


def device_of(network: nn.Module, asked: str | torch.device | None) -> torch.device:
    """The device that is asked for, or the accelerator where the network is, or the one of this machine."""
    here = next((weights.device for weights in network.parameters()), torch.device("cpu"))
    return here if asked is None and here.type not in ("cpu", "meta") else best_device(asked)


@dataclass(frozen=True)
class NetworkExtraction(Extraction):
    """One extraction from modules with nothing left to choose; see `Extraction`."""

    passes: Any = None  # Passes, tried out
    reader: Any = None  # Reader

    @property
    def source(self) -> dict:
        """Where the images are; no name loads the network, so a repair is to run the same extraction again."""
        return super().source | {"model": None}

    def computed(self, parts: Iterable[Part | None], workers: int | None, bar: tqdm) -> Computed:
        """Each of `parts` with what was read of it, its features and statistics."""
        pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
        try:
            self.tell(bar, lambda: self.passes.estimate(bar.total))
            for part in parts:
                if part is not None:
                    yield part, *self.passes.over(part, self.reader, pool, bar)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Passes(Batches):
    """The forward passes of a network over images, with its modules' states pooled."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], pooling: ModulePooling, dtype: str, device: torch.device,
        batch_size: int | None,
    ):  # fmt: skip
        super().__init__(batch_size or (SMALL if device.type == "cpu" else LARGE), device)
        self.network, self.states = network, ModuleStates(network, names, pooling)
        self.weights, self.dtype = own_dtype(network), dtype
        self.one: Inputs = {}  # what one image becomes
        self.widths: dict[str, int] = {}  # of each module's features, in the order of depth

    def try_out(self, one: Inputs, other: Inputs, *, is_plain: bool = False) -> list[str]:
        """Passes of one image twice, of another, and of both; returns the modules' names in the order of depth.

        `other` is of other pixels, whatever the first image is. `is_plain`: there is no `preprocess`.

        ValueError for modules that cannot be layers, and for states that are not finite, or not of the image alone.
        """
        for name, x in one.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"preprocess gives {name or 'values'} that are not finite")
        if described(other) != described(one):
            what = f"{described(other)} for a generated picture, and {described(one)} for the first image"
            raise ValueError(f"preprocess gives {what}, of the same size; let it resize")
        with evaluating(self.network), torch.no_grad(), self._precision(), self.states.hooked():
            names = self.states.try_out(self._moved(_beside(one, one)), is_plain=is_plain)
            alone = dict(self.states.values)
            for name, value in alone.items():
                if not value.isfinite().all() or self.states.stats[name][0][2]:
                    what = f"{described(one)}, weights {_short(self.weights)}"
                    raise ValueError(f"{name} gives values that are not finite for the first image ({what})")
                self._check_same(name, value[0], value[1], AT_RANDOM)
            self.states.run(self._moved(_beside(other, other)))
            others = dict(self.states.values)
            self.states.run(self._moved(_beside(one, other)))
            for name, (first, second) in self.states.values.items():
                self._check_same(name, alone[name][0], first, OF_THE_BATCH)
                self._check_same(name, others[name][0], second, OF_THE_BATCH)
        self.one, self.widths = one, {name: value.shape[1] for name, value in alone.items()}
        return names

    def _check_same(self, name: str, one: Tensor, again: Tensor, words: str) -> None:
        """ValueError, in words that say what was tried, where a module's features of the same image differ."""
        rounding = 1e-3 if self.weights in (torch.float32, torch.float64) and self.dtype != "bfloat16" else 0.05
        if one.shape != again.shape or (one - again).abs().max() > rounding * one.abs().max():
            raise ValueError(f"{name} gives something else of the same image {words}")

    def over(self, part: Part, reader: Reader, pool: ThreadPoolExecutor, bar: tqdm) -> tuple[Read, Features, Stats]:
        """A part's images -> which of them could be read, their features, and statistics; see `Batches.fitting`."""
        check_eval(self.network)
        return self.fitting(lambda: self._run(part, reader, pool, bar), bar, f"a single image, {described(self.one)}")

    def _run(self, part: Part, reader: Reader, pool: ThreadPoolExecutor, bar: tqdm) -> tuple[Read, Features, Stats]:
        values: dict[str, list[Tensor]] = {name: [] for name in self.widths}
        stats: dict[str, list[Tensor]] = {name: [] for name in self.widths}
        counts, kept = dict.fromkeys(self.widths, 0), []
        skipped = []
        with torch.no_grad(), self._precision(), self.states.hooked():
            for batch in reader.ahead(part, self.batch_size, self.one, pool):
                kept.append(batch.positions)
                skipped += batch.skipped
                if len(batch.positions):
                    self.states.run(self._moved(batch.inputs))
                    for name in self.widths:
                        measured, count = self.states.stats[name]
                        values[name].append(self._as_wide(name))
                        stats[name].append(measured)
                        counts[name] += count
                bar.update(len(batch.positions) + len(batch.skipped))
        features: Features = {}
        summary: Stats = {}
        for layer, (name, width) in enumerate(self.widths.items()):
            column, of_layer = f"{POINT}.{layer}", values[name]
            features[column] = torch.cat(of_layer).cpu().numpy() if of_layer else np.zeros((0, width), np.float32)
            summary[column] = _summary(stats[name], counts[name])
        return Read(np.concatenate(kept), skipped), features, summary

    def _as_wide(self, name: str) -> Tensor:
        """A module's features; ValueError where they are of another width than those of the first image."""
        value = self.states.values[name]
        if value.shape[1] != self.widths[name]:
            wrong = f"{value.shape[1]} features for some images, {self.widths[name]} for others"
            raise ValueError(f"{name} gives {wrong}; pool over what differs, or let preprocess resize")
        return value

    def _moved(self, inputs: Inputs) -> Inputs:
        """On the device, floats in the dtype of the weights."""
        to = {name: self.weights if x.is_floating_point() else None for name, x in inputs.items()}
        return {name: x.to(self.device, dtype=to[name]) for name, x in inputs.items()}

    def _precision(self) -> AbstractContextManager:
        """A block in which matrix products have the dtype that is asked for."""
        return precision(self.device, bfloat16=self.dtype == "bfloat16" and self.weights != torch.bfloat16)

    def estimate(self, rows: int) -> str:
        """What `rows` images will take: bytes by arithmetic, seconds by a batch, without those of `preprocess`."""
        size = min(self.batch_size, rows)
        batch = {name: x[None].repeat(size, *[1] * x.ndim) for name, x in self.one.items()}

        def timed() -> float:
            nonlocal batch
            batch = {name: x[: self.batch_size] for name, x in batch.items()}
            begun = time.perf_counter()
            with torch.no_grad(), self._precision(), self.states.hooked():
                self.states.run(self._moved(batch))
                next(iter(self.states.values.values())).cpu()  # waits for the device
            return (time.perf_counter() - begun) * rows / len(next(iter(batch.values())))

        seconds = self.fitting(timed, None, f"a single image, {described(self.one)}")
        megabytes = rows * (16 + 4 * sum(self.widths.values())) / 1e6
        return f"{megabytes:,.3g} MB, about {seconds:,.0f} s on {self.device}"


def _beside(one: Inputs, other: Inputs) -> Inputs:
    """A batch of two images."""
    return {name: torch.stack([x, other[name]]) for name, x in one.items()}


def _summary(stats: list[Tensor], count: int) -> list[float]:
    """[max |x|, share of exact zeros, count of values that are not finite], of batches."""
    if not stats:
        return [0.0, 0.0, 0]
    largest, zeros, bad = torch.stack(stats).cpu().double().numpy().T
    return [float(largest.max()), float(zeros.sum() / count), int(bad.sum())]
