"""Every instrument on one model and its images, on few images each, and the answers to the predictions.

For closer intervals call the instruments themselves with more images than `sizes` has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.progress import tqdm
from igpt_lab.explaining.ablations import leave_out, refit_after, windows
from igpt_lab.explaining.attention import AttentionSummary, attention_from, attention_maps
from igpt_lab.explaining.attentive import probe_attentive
from igpt_lab.explaining.baselines import pixel_baselines
from igpt_lab.explaining.lenses import as_they_are, lens_strip, lens_table
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.explaining.positions import even_positions, probe_slices, slice_of
from igpt_lab.explaining.predictions import answer, check_chosen, describe
from igpt_lab.explaining.readouts import bits_by_layer
from igpt_lab.explaining.sizes import LAYERS, MEMORY, RADII, SHARES, STEPS, TEST, TRAIN, state_bytes
from igpt_lab.explaining.tuned_lens import fit_tuned_lens
from igpt_lab.features.extraction import extract
from igpt_lab.features.hooks import check_eval
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.splits import stratified_draw
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model, tokens_of
from igpt_lab.models.losses import check_causal
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.solvers.linear_probe import LinearProbe

Model = ImageGPTForCausalImageModeling | str | Path


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What every instrument measured, and `answers`, the table of `lab.answer`, with c = `chosen`.

    `probe` is of the mean of `ln_1`; `lens` has the logit lens and the tuned lens, `baselines` what counting pixels
    gives beside them; `parts` are blocks, attention and MLPs left out, with that probe at c, and `heads` heads. `strip`
    (`lens_strip`) and `looks` (`attention_from` the pixel in the middle) are of the first test image drawn.
    """

    chosen: int
    probe: ProbeResult
    lens: pd.DataFrame
    baselines: pd.DataFrame
    strip: pd.DataFrame
    bits: Measurement
    positions: Measurement
    prefixes: Measurement
    attention: AttentionSummary
    looks: pd.DataFrame
    windows: Measurement
    parts: Measurement
    heads: Measurement
    refit: Measurement
    attentive: Measurement
    answers: pd.DataFrame

    def __repr__(self) -> str:
        return f"c = {self.chosen}\n{describe(self.answers)}"

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return self.answers.to_html()


@checked
def explain(
    model: Model,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    chosen: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Explanation:
    """Run every instrument on a few images, and answer the predictions about layer c.

    At most 2,500 training images and 1,000 test images are used: of each instrument TRAIN and TEST of
    `explaining.sizes`, and for the attentive probe as many training images as keep their states below 2 GB.

    Args:
        model: One that predicts pixels in their order, or what `load_model` takes; it is moved to the device.
        train_images, test_images: With labels; of each the images are a stratified draw by `seed`.
        store: Folder of the stores of features.
        chosen: c, by default the layer that cross-validation on the training images chooses (`probe_layers`); where
            that is the first layer or the last, the one beside it, with a warning.
        seed: Of all draws.
        device: By default the accelerator where there is one.
        progress: Show bars.

    Returns:
        `Explanation`: what each instrument returned, by name, and the table `answers` (`answer`).

    Raises:
        ValueError: A bidirectional model, one of a single block or pixel, images without labels, or `chosen` is the
            first layer or the last.
        RuntimeError: A model in training mode.

    Example:
        >>> shape = lab.ImageGPTConfig(vocab_size=9, n_positions=4, n_embd=4, n_layer=2, n_head=1)
        >>> small = lab.ImageGPTForCausalImageModeling(shape).eval()
        >>> small.name, small.processor = "small", lab.ImageGPTImageProcessor(model.processor.clusters, size=2)
        >>> two_classes = [images.select(np.flatnonzero(images.labels < 2)) for images in (train_images, test_images)]
        >>> explanation = lab.explain(small, *two_classes, chosen=1, store="stores")
        >>> explanation.chosen, len(explanation.bits.table), explanation.answers.prediction.nunique()
        (1, 21, 7)
    """
    options: dict[str, Any] = {"store": store, "chosen": chosen, "seed": seed, "device": device, "progress": progress}
    return Explanation(**dict(instruments(model, train_images, test_images, **options)))


@checked
def instruments(
    model: Model,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    chosen: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Name and value of each field of `explain`'s Explanation, as soon as it is measured; the answers come last."""
    model = load_model(model) if isinstance(model, str | Path) else model
    check_explainable(model, chosen)
    check_eval(model)
    model = model.to(best_device(device))
    train = _Images.drawn(model, train_images, max(TRAIN.values()), seed)
    test = _Images.drawn(model, test_images, max(TEST.values()), seed)
    names = [field.name for field in fields(Explanation) if field.name not in ("chosen", "probe", "answers")]
    with tqdm(total=1 + len(names), desc="explain", unit="instrument", disable=not progress) as bar:
        run = _Run.begun(model, train, test, chosen, seed, {"store": store, "device": device, "progress": progress})
        yield "chosen", run.chosen
        yield "probe", run.probe
        bar.update()
        measured: dict[str, Any] = {}
        for name in names:
            measured[name] = getattr(run, name)()
            yield name, measured[name]
            bar.update()
    asked = ("bits", "prefixes", "attention", "refit", "windows", "attentive")
    yield "answers", answer(run.chosen, **{name: measured[name] for name in asked})


def check_explainable(model: ImageGPTForCausalImageModeling, chosen: int | None) -> None:
    """ValueError for a model that has no layer c between its ends, and where `chosen` is not one of these."""
    config = model.config
    check_causal(config)
    if config.n_layer < 2 or config.n_positions < 2:
        raise ValueError(
            f"a model of n_layer={config.n_layer}, n_positions={config.n_positions}; expected 2 blocks or more, as the "
            "predictions are of a layer between the first and the last, and 2 pixels or more"
        )
    if chosen is not None:
        check_chosen(chosen, config.n_layer)


@dataclass(frozen=True)
class _Images:
    """Images of a split, with their palette indices (N, T) and labels (N,)."""

    images: Any
    tokens: np.ndarray
    labels: np.ndarray
    seed: int

    @classmethod
    def drawn(cls, model: Any, images: ImageSet | TokenSet, count: int, seed: int) -> _Images:
        images = images.select(stratified_draw(images.require_labels(), count, seed=seed))
        return cls(images, tokens_of(model, images), images.require_labels(), seed)

    def some(self, count: int) -> _Images:
        """A stratified draw of at most so many."""
        rows = stratified_draw(self.labels, count, seed=self.seed)
        return _Images(self.images.select(rows), self.tokens[rows], self.labels[rows], self.seed)


@dataclass(frozen=True)
class _Run:
    """The instruments, each named as the field of an Explanation that it fills."""

    model: ImageGPTForCausalImageModeling
    train: _Images
    test: _Images
    shares: int  # how many prefixes: SHARES, or one for each position where there are fewer
    places: list[int]  # positions whose states are probed
    pooled: list[Features]  # of both splits: the mean of each share, the last of all states; then each place's state
    probe: ProbeResult
    chosen: int
    of_store: dict[str, Any]  # options of what extracts
    options: dict[str, Any]  # and of what does not

    @classmethod
    def begun(
        cls, model: Any, train: _Images, test: _Images, chosen: int | None, seed: int, of_store: dict[str, Any]
    ) -> _Run:
        """The probe of each layer, and c."""
        splits = [train.some(TRAIN["probe"]).images, test.some(TEST["probe"]).images]
        shares, places = min(SHARES, model.config.n_positions), even_positions(model.config.n_positions)
        store = extract(model, splits, pool=f"prefix:{shares}+at:{','.join(map(str, places))}", **of_store)
        options = {"seed": seed, "progress": of_store["progress"]}
        pooled = [Features.from_store(store, split.split) for split in splits]
        means = (slice_of(part, shares - 1, shares + len(places)) for part in pooled)
        probe = probe_layers(*means, device=of_store["device"], **options)
        chosen = _between_ends(probe.chosen, model.config.n_layer) if chosen is None else chosen
        return cls(model, train, test, shares, places, pooled, probe, chosen, of_store, options)

    @property
    def last(self) -> int:
        return self.model.config.n_layer

    def few(self) -> _Images:
        return self.test.some(TEST["few"])

    def strength(self, layer: int) -> float:
        """C that was chosen for the probe of a layer."""
        return float(self.probe.table.set_index("layer").C[layer])

    def of_probe(self) -> dict[str, Any]:
        """The probe at c with its layer, and the labels of few images."""
        features = slice_of(self.pooled[0], self.shares - 1, self.shares + len(self.places))
        probe = LinearProbe(C=self.strength(self.chosen)).fit(features.layers[self.chosen], features.labels)
        return {"probe": probe, "probe_layer": self.chosen, "labels": self.few().labels}

    def lens(self) -> pd.DataFrame:
        tuned = fit_tuned_lens(self.model, self.train.some(TRAIN["lens"]).tokens, steps=STEPS, **self.options)
        lenses: dict[str, Any] = {"logit lens": as_they_are, "tuned lens": tuned}
        return lens_table(self.model, self.test.some(TEST["lens"]).tokens, lenses, progress=self.options["progress"])

    def baselines(self) -> pd.DataFrame:
        colours = self.model.config.vocab_size - 1
        return pixel_baselines(self.train.tokens, self.test.some(TEST["lens"]).tokens, colours)

    def strip(self) -> pd.DataFrame:
        return lens_strip(self.model, self.test.tokens[0])

    def bits(self) -> Measurement:
        train, test = self.train.some(TRAIN["bits"]), self.test.some(TEST["bits"])
        labels: dict[str, Any] = {"train_labels": train.labels, "test_labels": test.labels}
        return bits_by_layer(self.model, train.tokens, test.tokens, **labels, **self.options)

    def positions(self) -> Measurement:
        """As `probe_positions`, from the features that the first probe has."""
        train, test = self._pooled(self.shares, len(self.places))
        return probe_slices(train, test, self.places, device=self.of_store["device"], **self.options)

    def prefixes(self) -> Measurement:
        """As `probe_prefixes`, from the same features."""
        seen = [i / self.shares for i in range(1, self.shares + 1)]
        train, test = self._pooled(0, self.shares)
        return probe_slices(train, test, seen, name="share", device=self.of_store["device"], **self.options)

    def _pooled(self, place: int, number: int) -> list[Features]:
        """At few layers, of the vectors of `pooled` so many from a place on."""
        parts = [slice_of(part, place, self.shares + len(self.places), number) for part in self.pooled]
        return [replace(part, layers={n: part.layers[n] for n in self.few_layers()}) for part in parts]

    def few_layers(self) -> list[int]:
        """Those of probes of a part of each image, c among them."""
        return sorted({*np.linspace(0, self.last, LAYERS).round().astype(int).tolist(), self.chosen})

    def attention(self) -> AttentionSummary:
        return attention_maps(self.model, self.few().tokens, progress=self.options["progress"])

    def looks(self) -> pd.DataFrame:
        return attention_from(self.model, self.test.tokens[0], self.model.config.n_positions // 2)

    def windows(self) -> Measurement:
        ranges = [(0, self.chosen - 1), (self.chosen, self.last - 1)]
        options = {"progress": self.options["progress"], **self.of_probe()}
        return windows(self.model, self.few().tokens, RADII, ranges, **options)

    def parts(self) -> Measurement:
        parts = ["block", "attention", "mlp"]
        return leave_out(self.model, self.few().tokens, parts=parts, **self.of_probe(), **self.options)

    def heads(self) -> Measurement:
        return leave_out(self.model, self.test.some(TEST["heads"]).tokens, parts=["head"], **self.options)

    def refit(self) -> Measurement:
        train, test = self.train.some(TRAIN["refit"]), self.test.some(TEST["refit"])
        options: dict[str, Any] = {
            "layers": range(self.chosen, self.last),
            "probe": LinearProbe(C=self.strength(self.last)),
        }
        return refit_after(self.model, train.tokens, train.labels, test.tokens, test.labels, **options, **self.options)

    def attentive(self) -> Measurement:
        train = self.train.some(min(TRAIN["attentive"], int(MEMORY // state_bytes(self.model.config))))
        test = self.test.some(TEST["attentive"])
        layers = sorted({0, self.chosen // 2, self.chosen, (self.chosen + self.last) // 2, self.last})
        options: dict[str, Any] = {"layers": layers, "queries": math.gcd(4, self.model.config.n_embd)}
        options["progress"] = self.options["progress"]
        return probe_attentive(self.model, train.tokens, train.labels, test.tokens, test.labels, **options)


def _between_ends(chosen: int, last: int) -> int:
    """The layer that cross-validation chose, or where that is an end the one beside it, with a warning."""
    inside = min(max(chosen, 1), last - 1)
    check_chosen(inside, last)
    if inside != chosen:
        warnings.warn(
            f"cross-validation chose layer {chosen} of 0..{last}, which is an end; the predictions compare what is "
            f"before c with what is from c on, so c = {inside} is used",
            stacklevel=5,
        )
    return inside
