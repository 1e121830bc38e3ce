"""What it costs to leave out a part or to narrow attention: nats of the next pixel, and accuracy of a probe.

Paired over test images. `passes` runs the model with everything left out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import clone
from torch import Tensor

from igpt_lab.core.arguments import checked
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import side_by_side
from igpt_lab.core.significance import accuracy, compare, mean_interval
from igpt_lab.explaining.measurement import CORRECT, UNCHANGED, Measurement
from igpt_lab.explaining.parts import PARTS, check_part
from igpt_lab.explaining.passes import Passes
from igpt_lab.explaining.variants import Variant, with_windows, without_parts
from igpt_lab.features.hooks import check_eval, check_untouched, layers_of
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import check_causal
from igpt_lab.probing.solvers.linear_probe import LinearProbe

KINDS = ("skip", "mean", "resample")
KEYS = ("part", "layer", "head")


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
) -> Measurement:
    """What each part of each layer is worth: the model with it left out, less the model as it is.

    Args:
        model: One that predicts pixels in their order, in eval mode.
        tokens: Test images, int (N, T).
        parts: Of "block", "attention", "mlp", "head"; a block's own residual stream stays.
        kind: What stands in for what the part adds: "skip", nothing; "mean", its mean over `train_tokens`, position by
            position; "resample", what it adds in another test image, by a derangement from `seed`.
        layers: The blocks, all by default.
        train_tokens: Training images, int (M, T), for "mean".
        probe: A fitted classifier with `predict`, such as `LinearProbe`, of features (N, D) at `ln_1` of `probe_layer`,
            mean-pooled; it stays as it is.
        probe_layer: The layer of these features.
        labels: int (N,), of the test images, for the probe.
        batch_size: Images at a time; by default so many that states take a gigabyte at most.
        progress: Show a bar.
        seed: Of the derangement.

    Returns:
        `Measurement`, whose table has a row per part, layer and head: `part`, `layer`, `head` (none but of heads),
        `kind`, `nats` (a pixel's mean loss), `nats_change` with `low` and `high`, the 95% t interval over images, and
        `n`. With a probe also `probe_layer`, `accuracy`, `accuracy_change` with `accuracy_low`, `accuracy_high` and
        `p_value` by `compare`: fractions. A part behind the probe's layer changes nothing there. `of_images` has for
        (part, layer, head) each image's nats with it left out, and for UNCHANGED those of the model as it is; with a
        probe also for each of these keys with CORRECT behind it whether the probe is right, 0 or 1.

    Raises:
        ValueError: A part, kind, layer or size that there is not, a probe without layer or labels, a bidirectional
            model.
        TypeError: A probe that cannot predict.
        RuntimeError: A model in training mode.

    Example:
        >>> left_out = lab.leave_out(model, tokens, parts=["block", "head"], layers=[0])
        >>> left_out.table[["part", "layer", "head", "kind", "nats", "n"]].round(3)
            part  layer  head  kind   nats    n
        0  block      0  <NA>  skip  2.079  100
        1   head      0     0  skip  2.079  100
        2   head      0     1  skip  2.079  100
    """
    blocks = _check(model, tokens, parts, kind, layers, train_tokens)
    probe_layer = _check_probe(model, tokens, probe, probe_layer, labels)
    variants = without_parts(model, parts, kind, blocks, train_tokens, batch_size, progress)
    passes = Passes(model, variants, probe_layer, kind == "resample", batch_size, progress, seed)
    return _measured(passes, tokens, KEYS, probe, labels)


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
) -> Measurement:
    """What it costs to hide what is farther than a radius from the predicted pixel, in a range of blocks: see `window`.

    Args:
        model: One that predicts pixels in their order, in eval mode.
        tokens: Test images, int (N, T).
        radii: In pixels, 0 or more.
        ranges: Pairs (first, last) of blocks, the last included.
        probe, probe_layer, labels: As of `leave_out`.
        batch_size: Images at a time; by default so many that states take a gigabyte at most.
        progress: Show a bar.

    Returns:
        `Measurement`, whose table has a row per range and radius: `radius`, `first`, `last`, and the columns `nats`,
        `nats_change`, `low`, `high`, `n` and, with a probe, of accuracy that `leave_out` has. `of_images` has keys
        (radius, first, last) and UNCHANGED, with CORRECT behind them as there.

    Raises:
        ValueError: A range or radius that there is not, and as `leave_out`.
        TypeError: A probe that cannot predict.
        RuntimeError: A model in training mode.

    Example:
        >>> hidden = lab.windows(model, tokens, radii=[0, 1], ranges=[(0, 2)])
        >>> hidden.table[["radius", "first", "last", "nats", "n"]].round(3)
           radius  first  last   nats    n
        0       0      0     2  2.079  100
        1       1      0     2  2.079  100
    """
    _check(model, tokens, PARTS, KINDS[0], None)
    probe_layer = _check_probe(model, tokens, probe, probe_layer, labels)
    variants = with_windows(model, radii, ranges)
    passes = Passes(model, variants, probe_layer, False, batch_size, progress)
    return _measured(passes, tokens, ("radius", "first", "last"), probe, labels)


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
) -> Measurement:
    """Accuracy of a probe refitted on the last layer of the model with a part left out, less that of the whole model.

    Features are mean-pooled `ln_f`. Those of all variants are kept until their fit: 4 D (N + M) bytes for each.

    Args:
        model: One that predicts pixels in their order, in eval mode.
        train_tokens: Training images, int (M, T).
        train_labels: int (M,).
        tokens: Test images, int (N, T).
        labels: int (N,).
        parts, kind, layers: As of `leave_out`.
        probe: An estimator that is cloned for every fit, by default `LinearProbe()`. Its C is as given: choose it
            beforehand, on training images.
        batch_size: Images at a time; by default so many that states take a gigabyte at most.
        progress: Show bars.
        seed: Of the derangement of "resample".

    Returns:
        `Measurement`, whose table has a row per part, layer and head: `part`, `layer`, `head`, `kind`, `accuracy` with
        its exact interval `low` and `high`, `accuracy_change` with `accuracy_low`, `accuracy_high` and `p_value` by
        `compare`, and `n`; accuracies are fractions. `of_images` has for (part, layer, head) and for UNCHANGED, the
        whole model, whether the probe is right, 0 or 1.

    Raises:
        ValueError: As `leave_out`, and for labels of another count than images.
        RuntimeError: A model in training mode.

    Example:
        >>> refit = lab.refit_after(model, train_tokens, train.labels, tokens, test.labels, layers=[0, 1])
        >>> refit.table[["part", "layer", "kind", "n"]]
            part  layer  kind    n
        0  block      0  skip  100
        1  block      1  skip  100
    """
    blocks = _check(model, tokens, parts, kind, layers, train_tokens)
    train_labels, labels = np.asarray(train_labels), np.asarray(labels)
    for images, classes in ((train_tokens, train_labels), (tokens, labels)):
        if np.shape(classes) != (len(images),):
            raise ValueError(f"labels {np.shape(classes)} of {len(images)} images; expected one for each")
    if pd.isna(train_labels).any() or len(pd.unique(train_labels)) < 2:
        raise ValueError("train_labels are of one class, or some are missing; expected two classes or more")
    probe = LinearProbe() if probe is None else clone(probe)  # an error of `clone` comes before any work
    variants = without_parts(model, parts, kind, blocks, train_tokens, batch_size, progress)
    passes = Passes(model, variants, model.config.n_layer, kind == "resample", batch_size, progress, seed)
    train, test = (torch.cat([part for _, part in passes.over(x)], 1).numpy() for x in (train_tokens, tokens))

    def refit(of_variant: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        x, z = of_variant
        return clone(probe).fit(x, train_labels).predict(z) == labels

    device = torch.device("cpu") if type(probe) is LinearProbe else None  # another may not be made for threads
    with closing(side_by_side(refit, zip(train, test, strict=True), device, train[0].size)) as fitted:
        right = list(tqdm(fitted, total=len(train), desc="probes", disable=not progress))
    rows = []
    for variant, correct in zip(variants, right[1:], strict=True):
        own = accuracy(correct)
        own = {"accuracy": own["test_accuracy"], "low": own["low"], "high": own["high"]}
        rows.append(variant.columns | own | _accuracy_change(correct, right[0]) | {"n": len(labels)})
    of_images = {key: correct.astype(np.float64) for key, correct in zip(_keys(variants), right, strict=True)}
    return Measurement(pd.DataFrame(rows).astype({"head": "Int64"}), of_images, KEYS)


def _check(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, parts: Sequence[str], kind: str,
    layers: Sequence[int] | None, train_tokens: np.ndarray | None = None,
) -> list[int]:  # fmt: skip
    """The blocks; ValueError or RuntimeError for what cannot be done, before any work."""
    check_causal(model.config)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    for part in parts:
        check_part(model, part, 0, 0 if part == "head" else None)
    count, width = checked_tokens(tokens, model.config).shape
    if train_tokens is not None and np.shape(train_tokens)[1:] != (width,):
        raise ValueError(f"train_tokens {np.shape(train_tokens)}; expected images of {width} pixels, as tokens are")
    if count < 2 or not width:
        raise ValueError(f"tokens {count, width}; expected two images or more, for an interval over images")
    check_eval(model)
    check_untouched(model)
    return layers_of("resid_post", model.config.n_layer, layers)


def _check_probe(
    model: ImageGPTForCausalImageModeling, tokens: np.ndarray, probe: Any, layer: int | None, labels: Any
) -> int | None:
    """The probe's layer, counted from 0; an error where something is missing or does not fit."""
    if len({probe is None, layer is None, labels is None}) > 1:
        raise ValueError("probe, probe_layer and labels belong together, and one is missing; give all three, or none")
    if layer is None:
        return None
    if not hasattr(probe, "predict"):
        raise TypeError(f"a probe of type {type(probe).__name__}; expected a fitted classifier with `predict`")
    width, fitted = model.config.n_embd, getattr(probe, "n_features_in_", model.config.n_embd)
    if fitted != width:
        raise ValueError(f"the probe was fitted on {fitted} features; expected the {width} of this model's `ln_1`")
    if np.shape(labels) != (len(tokens),):
        raise ValueError(f"labels {np.shape(labels)} of {len(tokens)} images; expected one for each")
    return layers_of("ln_1", model.config.n_layer, [layer])[0]


def _keys(variants: list[Variant], names: Sequence[str] = KEYS) -> list[tuple]:
    """Keys of the model as it is and of its variants, in the order of their passes."""
    return [UNCHANGED, *(tuple(variant.columns[name] for name in names) for variant in variants)]


def _measured(
    passes: Passes, tokens: np.ndarray, names: tuple[str, ...], probe: Any, labels: np.ndarray | None
) -> Measurement:
    """A row for each variant, against the model as it is; `names` are the columns of its key."""
    parts: list[Tensor] = []
    guesses: list[np.ndarray] = []
    for nats, features in passes.over(tokens):
        parts.append(nats)
        if probe is not None:
            guesses.append(np.reshape(probe.predict(features.flatten(0, 1).numpy()), nats.shape))
    losses = torch.cat(parts, 1).cpu().numpy().astype(np.float64)
    right = np.concatenate(guesses, 1) == np.asarray(labels) if guesses else None
    keys = _keys(passes.variants, names)
    of_images = dict(zip(keys, losses, strict=True))
    if right is not None:
        of_images |= {(*key, CORRECT): correct.astype(np.float64) for key, correct in zip(keys, right, strict=True)}
    rows = []
    for place, variant in enumerate(passes.variants, start=1):
        change, low, high = map(float, mean_interval(losses[place] - losses[0]))
        row = variant.columns | {"nats": float(losses[place].mean()), "nats_change": change, "low": low, "high": high}
        if right is not None:
            own = {"probe_layer": passes.feature_layer, "accuracy": float(right[place].mean())}
            row |= own | _accuracy_change(right[place], right[0])
        rows.append(row | {"n": len(tokens)})
    table = pd.DataFrame(rows)
    return Measurement(table.astype({"head": "Int64"}) if "head" in table else table, of_images, names)


def _accuracy_change(correct: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Of the same images, bool (N,): with a part left out, less without."""
    paired = compare(correct, before)
    ends = {"accuracy_low": paired.low, "accuracy_high": paired.high, "p_value": paired.p_value}
    return {"accuracy_change": paired.difference} | ends
