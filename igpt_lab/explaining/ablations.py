"""What it costs to leave out a part or to narrow attention: nats of the next pixel, and accuracy of a probe.

Paired over test images. What comes before the first changed block is computed once for a batch, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from sklearn.base import clone
from torch import Tensor
from tqdm.auto import tqdm

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import accuracy, compare
from igpt_lab.explaining.edits import Edits, edit, window
from igpt_lab.explaining.parts import PARTS, check_part, constant, derangement, means_of, resample, skip
from igpt_lab.features.hooks import layers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.cost import inner_width
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import check_alignment, cross_entropy
from igpt_lab.probing.solvers.linear_probe import LinearProbe

KINDS = ("skip", "mean", "resample")
MEMORY = 1 << 30  # bytes of a default batch's states


@dataclass(frozen=True)
class _Variant:
    """A changed model: its columns of the table, its first changed block, and the `with` block for a batch of n."""

    columns: dict[str, Any]
    first: int
    changed: Callable[[int], AbstractContextManager]


@checked
def leave_out(
    model: ImageGPTForCausalImageModeling,
    tokens: np.ndarray,
    *,
    parts: Sequence[str] = PARTS,
    kind: str = "skip",
    layers: Sequence[int] | None = None,
    train_tokens: np.ndarray | None = None,
    probe: Any = None,
    probe_layer: int | None = None,
    labels: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """What each part of each layer is worth: the model with it left out, less the model as it is.

    Args:
        tokens: Test images, int (N, T).
        parts: Of "block", "attention", "mlp", "head"; a block's own residual stream stays.
        kind: What stands in for what the part adds: "skip", nothing; "mean", its mean over `train_tokens`, position by
            position; "resample", what it adds in another test image, by a derangement from `seed`.
        layers: The blocks, all by default.
        train_tokens: Training images, int (M, T), for "mean".
        probe: A fitted classifier with `predict`, such as `LinearProbe`, of features (N, D) at `ln_1` of `probe_layer`,
            mean-pooled; it stays as it is. With `labels` (N,) of the test images.
        batch_size: Images at a time; by default so many that states take a gigabyte at most.

    Returns:
        A row for each part, layer and head: `part`, `layer`, `head` (none but of heads), `kind`, `nats` (a pixel's mean
        loss), `nats_change` with `low` and `high`, the 95% t interval over images, and `n`. With a probe also
        `probe_layer`, `accuracy`, `accuracy_change` with `accuracy_low`, `accuracy_high` and `p_value` by `compare`:
        fractions. A part behind the probe's layer changes nothing there.

    Raises:
        ValueError: A part, kind, layer or size that there is not, a probe without layer or labels, a bidirectional
            model.
    """
    blocks = _check(model, tokens, parts, kind, layers)
    _check_probe(model, tokens, probe, probe_layer, labels)
    variants = _variants(model, parts, kind, blocks, train_tokens, batch_size, progress)
    passes = _Passes(model, variants, probe_layer, kind == "resample", batch_size, progress, seed)
    return _table(passes, tokens, probe, labels)


@checked
def windows(
    model: ImageGPTForCausalImageModeling,
    tokens: np.ndarray,
    radii: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    *,
    probe: Any = None,
    probe_layer: int | None = None,
    labels: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What it costs to hide what is farther than a radius from the predicted pixel, in a range of blocks: see `window`.

    `ranges` are pairs (first, last) of blocks, the last included. A row for each range and radius: `radius`, `first`,
    `last`, `nats`, `nats_change`, `low`, `high` and `n`, and those of a probe, as of `leave_out`, as are the other
    arguments. Raises ValueError for a range or radius that there is not.
    """
    _check(model, tokens, PARTS, KINDS[0], None)
    _check_probe(model, tokens, probe, probe_layer, labels)
    variants = []
    for pair in ranges:
        first, last = pair
        if not 0 <= first <= last < model.config.n_layer:
            raise ValueError(f"blocks {first} to {last}; this model has blocks 0..{model.config.n_layer - 1}")
        for radius in radii:
            with window(model, radius):  # says what is wrong with it before any work
                columns = {"radius": radius, "first": first, "last": last}
            variants.append(_Variant(columns, first, _Window(model, radius, range(first, last + 1))))
    return _table(_Passes(model, variants, probe_layer, False, batch_size, progress), tokens, probe, labels)


@checked
def refit_after(
    model: ImageGPTForCausalImageModeling,
    train_tokens: np.ndarray,
    train_labels: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    parts: Sequence[str] = ("block",),
    kind: str = "skip",
    layers: Sequence[int] | None = None,
    probe: Any = None,
    batch_size: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of a probe refitted on the last layer of the model with a part left out, less that of the whole model.

    Features are mean-pooled `ln_f`. `probe`: an estimator that is cloned for every fit, by default `LinearProbe()`. Its
    C is as given: choose it beforehand, on training images. Other arguments are as of `leave_out`. The features of all
    variants are kept until their fit: 4 D (N + M) bytes for each.

    Returns:
        A row for each part, layer and head: `part`, `layer`, `head`, `kind`, `accuracy` with its exact interval `low`
        and `high`, `accuracy_change` with `accuracy_low`, `accuracy_high` and `p_value` by `compare`, and `n`.

    Raises:
        ValueError: As `leave_out` does, and for labels of another count than images.
    """
    blocks = _check(model, tokens, parts, kind, layers)
    for images, classes in ((train_tokens, train_labels), (tokens, labels)):
        if np.shape(classes) != (len(images),):
            raise ValueError(f"labels {np.shape(classes)} of {len(images)} images; expected one for each")
    variants = _variants(model, parts, kind, blocks, train_tokens, batch_size, progress)
    passes = _Passes(model, variants, model.config.n_layer, kind == "resample", batch_size, progress, seed)
    train, test = (np.concatenate([part.cpu() for _, part in passes.over(x)], 1) for x in (train_tokens, tokens))
    bar = tqdm(zip(train, test, strict=True), total=len(train), desc="probes", disable=not progress)
    right = [clone(probe or LinearProbe()).fit(x, train_labels).predict(z) == labels for x, z in bar]
    rows = []
    for variant, correct in zip(variants, right[1:], strict=True):
        own = accuracy(correct)
        own = {"accuracy": own["test_accuracy"], "low": own["low"], "high": own["high"]}
        rows.append(variant.columns | own | _accuracy_change(correct, right[0]) | {"n": len(labels)})
    return pd.DataFrame(rows).astype({"head": "Int64"})


def _check(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, parts: Sequence[str], kind: str,
    layers: Sequence[int] | None,
) -> list[int]:  # fmt: skip
    """The blocks; ValueError or RuntimeError for what cannot be done, before any work."""
    check_alignment("sos", model.config)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    for part in parts:
        check_part(model, part, 0, 0 if part == "head" else None)
    if len(checked_tokens(tokens, model.config)) < 2:
        raise ValueError(f"tokens {np.shape(tokens)}; expected two images or more, for an interval over images")
    if any(module.training for module in model.modules()):
        raise RuntimeError("the model is in training mode; call model.eval()")
    return layers_of("resid_post", model.config.n_layer, layers)


def _check_probe(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, probe: Any, layer: int | None, labels: Any
) -> None:
    if len({probe is None, layer is None, labels is None}) > 1:
        raise ValueError("a probe, its probe_layer and the labels of the test images come together; one is missing")
    if layer is not None:
        layers_of("ln_1", model.config.n_layer, [layer])
        if np.shape(labels) != (len(tokens),):
            raise ValueError(f"labels {np.shape(labels)} of {len(tokens)} images; expected one for each")


def _variants(
    model: ImageGPTForCausalImageModeling, parts: Sequence[str], kind: str, blocks: list[int],
    train_tokens: np.ndarray | None, batch_size: int | None, progress: bool,
) -> list[_Variant]:  # fmt: skip
    """The model with each part of each block left out."""
    means: dict = {}
    if kind == "mean":
        if train_tokens is None:
            raise ValueError("kind 'mean' needs train_tokens: a mean over test images would make each depend on all")
        means = means_of(model, train_tokens, parts, layers=blocks, batch_size=batch_size, progress=progress)
    variants = []
    for part in parts:
        for layer in blocks:
            for head in range(model.config.n_head) if part == "head" else (None,):
                columns = {"part": part, "layer": layer, "head": head, "kind": kind}
                block = _Without(model, part, layer, head, kind, means.get((part, layer)))
                variants.append(_Variant(columns, layer, block))
    return variants


@dataclass(frozen=True)
class _Without:
    """A part left out; called with the n images of a batch, behind which their donors stand if there are any."""

    model: ImageGPTForCausalImageModeling
    part: str
    layer: int
    head: int | None
    kind: str
    mean: Tensor | None

    def __call__(self, n: int) -> AbstractContextManager:
        return edit(self.model, self._edits(n))

    def _edits(self, n: int) -> Edits:
        place = self.model, self.part, self.layer
        if self.kind == "resample":
            return resample(*place, np.tile(np.arange(n, 2 * n), 2), head=self.head)
        if self.mean is not None:
            return constant(*place, self.mean, head=self.head)
        return skip(*place, head=self.head)


@dataclass(frozen=True)
class _Window:
    model: ImageGPTForCausalImageModeling
    radius: int
    blocks: range

    def __call__(self, n: int) -> AbstractContextManager:
        return window(self.model, self.radius, layers=self.blocks)


@dataclass(frozen=True)
class _Passes:
    """The model as it is and every variant of it, over images."""

    model: ImageGPTForCausalImageModeling
    variants: list[_Variant]
    feature_layer: int | None = None  # where features are read
    with_donors: bool = False
    batch_size: int | None = None
    progress: bool = True
    seed: int = 0

    def over(self, tokens: np.ndarray) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of a batch after another: nats (V + 1, n) of each image and float32 features (V + 1, n, D), the model first."""
        tokens = checked_tokens(tokens, self.model.config).astype(np.int64)
        donors = tokens[derangement(len(tokens), seed=self.seed)] if self.with_donors else tokens[:0]
        size = self.batch_size or _batch_size(self.model, 1 + self.with_donors)
        total = len(tokens) * (1 + len(self.variants))
        with tqdm(total=total, desc="left out", unit="image", disable=not self.progress) as bar:
            for start in range(0, len(tokens), size):
                rows = slice(start, start + size)
                pixels = torch.as_tensor(np.concatenate([tokens[rows], donors[rows]])).to(self.model.device)
                yield self._batch(pixels, len(tokens[rows]), bar)

    @torch.no_grad()
    def _batch(self, pixels: Tensor, count: int, bar: tqdm) -> tuple[Tensor, Tensor | None]:
        """`pixels` of `count` images, and behind them of their donors."""
        with record(self.model, ["resid_pre"], layers=[0], pool=lambda x, *_: x, alignment="sos") as embedded:
            embedded.run(pixels, use_cache=False)
        x, own = embedded["resid_pre"][:, 0], pixels[:count]
        read = None if self.feature_layer is None else self.feature_layer % (self.model.config.n_layer + 1)
        results: list[tuple[Tensor, Tensor | None]] = [self._onwards(x[:count], 0, own, read)]
        places: dict[int, list[int]] = {}
        for place, variant in enumerate(self.variants):
            places.setdefault(variant.first, []).append(place)
        changed: dict[int, tuple[Tensor, Tensor | None]] = {}
        bar.update(count)
        for layer in range(max(places, default=-1) + 1):
            for place in places.get(layer, ()):
                with self.variants[place].changed(count):
                    changed[place] = self._onwards(x, layer, own, read)
                bar.update(count)
            x = self._block(x, layer)
        results += [changed[place] for place in range(len(self.variants))]
        nats = torch.stack([losses for losses, _ in results])
        if read is None:
            return nats, None
        before = results[0][1]
        return nats, torch.stack([before if features is None else features for _, features in results])  # type: ignore[misc]

    def _onwards(self, x: Tensor, first: int, pixels: Tensor, read: int | None) -> tuple[Tensor, Tensor | None]:
        """States before block `first` -> nats (n,), and features (n, D) unless they are read before it."""
        backbone, features = self.model.transformer, None
        for layer in range(first, len(backbone.h) + 1):
            if layer == read:
                features = self._normed(x[: len(pixels)], layer).mean(dim=1, dtype=torch.float32)
            if layer < len(backbone.h):
                x = self._block(x, layer)[: len(pixels)]
        logits = self.model.lm_head(backbone.ln_f(x))
        return cross_entropy(logits, pixels, "none").view_as(pixels).mean(1), features

    def _block(self, x: Tensor, layer: int) -> Tensor:
        backbone = self.model.transformer
        bias, causal = backbone._bias(x, 0, None, self.model.config.reorder_and_upcast_attn)
        return backbone.h[layer](x, bias=bias, causal=causal)[0]

    def _normed(self, x: Tensor, layer: int) -> Tensor:
        backbone: Any = self.model.transformer
        return (backbone.ln_f if layer == len(backbone.h) else backbone.h[layer].ln_1)(x)


def _batch_size(model: ImageGPTForCausalImageModeling, copies: int) -> int:
    """Images at a time whose states, logits and, with `copies` of 2, donors fit into MEMORY."""
    config = model.config
    width = 2 * inner_width(config) + 10 * config.n_embd + 3 * config.n_colours  # of what a block and the head hold
    room = MEMORY // (4 * config.n_positions * width * copies)
    return max(1, min(room, default_batch(config, model.device)))


def _table(passes: _Passes, tokens: np.ndarray, probe: Any, labels: np.ndarray | None) -> pd.DataFrame:
    """A row for each variant, against the model as it is."""
    nats, guesses = [], []
    for losses, features in passes.over(tokens):
        nats.append(losses)
        if features is not None:
            flat = features.flatten(0, 1).cpu().numpy()
            guesses.append(np.asarray(probe.predict(flat)).reshape(len(losses), -1))
    losses = torch.cat(nats, 1).double().cpu().numpy() if nats[0].device.type != "mps" else torch.cat(nats, 1).cpu().numpy()
    rows = []
    right = np.concatenate(guesses, 1) == np.asarray(labels) if guesses else None
    for place, variant in enumerate(passes.variants, start=1):
        row = variant.columns | {"nats": float(losses[place].mean())} | _mean_change(losses[place] - losses[0])
        if right is not None:
            own = {"probe_layer": passes.feature_layer, "accuracy": float(right[place].mean())}
            row |= own | _accuracy_change(right[place], right[0])
        rows.append(row | {"n": len(tokens)})
    table = pd.DataFrame(rows)
    return table.astype({"head": "Int64"}) if "head" in table else table


def _mean_change(changes: np.ndarray) -> dict[str, float]:
    """Mean of paired differences (N,) with its 95% t interval."""
    reach = student.ppf(0.975, len(changes) - 1) * changes.std(ddof=1) / np.sqrt(len(changes))
    mean = float(changes.mean())
    return {"nats_change": mean, "low": mean - float(reach), "high": mean + float(reach)}


def _accuracy_change(correct: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Of the same images, bool (N,): with a part left out, less without."""
    paired = compare(correct, before)
    ends = {"accuracy_low": paired.low, "accuracy_high": paired.high, "p_value": paired.p_value}
    return {"accuracy_change": paired.difference} | ends
