"""The forward passes of an extraction: tokens in, pooled states of every layer out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from igpt_lab.core.devices import precision
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import at_once, side_by_side
from igpt_lab.features.hooks import check_eval, numbers_of, record
from igpt_lab.features.poolings import pooling
from igpt_lab.features.settings import ExtractionSettings, default_batch, width_at
from igpt_lab.models.cost import inner_width
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

Features = dict[str, np.ndarray]  # `<point>.<layer>` -> float32 (N, D)
Stats = dict[str, list[float]]  # `<point>.<layer>` -> [max |x|, share of exact zeros, count of non-finite values]


Result = TypeVar("Result")


class Batches:
    """Forward passes on a device, and the size of their batches, which shrinks where memory runs out.

    `in_turn`: batches never run side by side, which they no longer do where there is no memory for one image each.
    """

    def __init__(self, batch_size: int, device: torch.device, *, in_turn: bool = True):
        self.batch_size, self.device = batch_size, device
        self.in_turn = in_turn

    def fitting(self, run: Callable[[], Result], bar: tqdm | None, one: str) -> Result:
        """What `run` returns; where memory runs out it runs again, with batches of half the size.

        Raises MemoryError where there is none for a batch of one, which is called `one`.
        """
        while True:
            done = 0 if bar is None else bar.n
            try:
                return run()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1 and self.in_turn:
                    raise MemoryError(f"no memory for {one} on {self.device}") from error
            self._shrink()
            if bar is not None:
                bar.update(done - bar.n)

    def _shrink(self) -> None:
        self.in_turn = self.in_turn or self.batch_size == 1
        size = f"batches of {self.batch_size // 2}" if self.batch_size > 1 else "one image at a time"
        self.batch_size = max(1, self.batch_size // 2)
        tqdm.write(f"out of memory: continuing with {size}", file=sys.stderr)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()


class Runner(Batches):
    """A model with the settings of an extraction."""

    def __init__(self, model: ImageGPTForCausalImageModeling, settings: ExtractionSettings):
        size = settings.batch_size or default_batch(model.config, model.device)
        super().__init__(size, model.device, in_turn=at_once(model.device, numbers_of(model, size)) == 1)
        self.model, self.settings = model, settings

    def over(self, tokens: np.ndarray, bar: tqdm | None = None) -> tuple[Features, Stats]:
        """Palette indices (N, T) -> the features, and the statistics that the store keeps with them.

        Where memory runs out, all of them again in batches of half the size. Raises MemoryError where there is none for
        a single image, and RuntimeError for a model in training mode.
        """
        check_eval(self.model)
        return self.fitting(lambda: self._run(tokens, bar), bar, f"a single image of {tokens.shape[1]} positions")

    def _run(self, tokens: np.ndarray, bar: tqdm | None) -> tuple[Features, Stats]:
        if not len(tokens):  # a part without an image that can be read
            return self._nothing()
        settings, device = self.settings, self.device
        pixels = torch.as_tensor(tokens.astype(np.int32))
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # the kernels behind it wait for it
        values: dict[str, list[Tensor]] = {point: [] for point in settings.points}
        stats: dict[str, list[Tensor]] = {point: [] for point in settings.points}
        recording = record(
            self.model, settings.points, layers=settings.layers, pool=settings.pool, alignment=settings.alignment
        )
        batches = pixels.split(self.batch_size)
        numbers = 0 if self.in_turn else numbers_of(self.model, self.batch_size)

        def states(batch: Tensor) -> list[tuple[Tensor, Tensor]]:
            with torch.inference_mode(), precision(device, bfloat16=settings.dtype == "bfloat16"):
                pooled.run(batch.to(device).long(), use_cache=False)
                return [(pooled[point], pooled.stats(point)) for point in settings.points]

        with recording as pooled, closing(side_by_side(states, batches, device, numbers)) as passes:
            for batch, of_points in zip(batches, passes, strict=True):
                for point, (of_batch, measured) in zip(settings.points, of_points, strict=True):
                    values[point].append(of_batch)
                    stats[point].append(measured)
                if bar is not None:
                    bar.update(len(batch))
        return self._by_layer(values, stats, pooled.layers, tokens.size)

    def _by_layer(
        self, values: dict[str, list[Tensor]], stats: dict[str, list[Tensor]], layers: dict[str, list[int]], states: int
    ) -> tuple[Features, Stats]:
        """What the batches left, as one array and one list for each layer; `states` is the count of states pooled."""
        features: Features = {}
        summary: Stats = {}
        for point, numbers in layers.items():
            pooled = torch.cat(values[point]).cpu().numpy()  # (N, layers, D)
            measured = torch.stack(stats[point]).cpu().double().numpy()  # (batches, layers, 3)
            count = states * width_at(point, self.model.config)
            for i, layer in enumerate(numbers):
                features[f"{point}.{layer}"] = pooled[:, i]
                largest, zeros, bad = measured[:, i].T
                summary[f"{point}.{layer}"] = [float(largest.max()), float(zeros.sum() / count), int(bad.sum())]
        return features, summary

    def _nothing(self) -> tuple[Features, Stats]:
        """Of no image: arrays of no rows, as wide as the pooling makes them."""
        config, pool = self.model.config, pooling(self.settings.pool)
        features: Features = {}
        for point, layers in self.settings.layers_at(config).items():
            rows = np.zeros((0, pool.width(width_at(point, config))), np.float32)
            features |= {f"{point}.{layer}": rows for layer in layers}
        return features, {name: [0.0, 0.0, 0] for name in features}

    def estimate(self, rows: int, part_rows: int) -> str:
        """What `rows` images in parts of `part_rows` will take: bytes and memory by arithmetic, seconds by a batch."""
        config, batches = self.model.config, at_once(self.device, numbers_of(self.model, self.batch_size))
        size = min(self.batch_size * batches, rows)
        tokens = np.random.default_rng(0).integers(config.n_colours, size=(size, config.n_positions))
        features, _ = self.over(tokens[:4])
        begun = time.perf_counter()
        self.over(tokens)
        seconds = (time.perf_counter() - begun) * rows / size
        row = 4 * sum(values.shape[1] for values in features.values())
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        width = 8 * config.n_embd + 2 * inner_width(config)  # of what a block holds at once
        part = min(rows, part_rows) * row * 5  # in batches, together, as columns, as a file and its copy
        memory = weights + size * config.n_positions * width * 4 + part
        return (
            f"{rows * (16 + row) / 1e6:,.3g} MB, {memory / 1e9:,.2g} GB of memory, about {seconds:,.0f} s on "
            f"{self.model.device}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """CUDA says so by its class, MPS and a CPU's allocator in words alone."""
    said = any(words in str(error) for words in ("can't allocate memory", "MPS backend out of memory"))
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)
