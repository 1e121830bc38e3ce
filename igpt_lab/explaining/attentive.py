"""Is a layer poor, or only its mean? A probe that attends to its un-pooled states, beside one of their mean.

`attentive_fit` has the two readouts and says how they are fitted. States of as many layers are kept as memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import middle_of_best
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import side_by_side
from igpt_lab.core.significance import accuracy, compare
from igpt_lab.explaining.attentive_fit import PROBES, Fitted, Training, fit_both, held_out
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.features.hooks import check_eval, layers_of, numbers_of, record
from igpt_lab.features.settings import default_batch, width_at
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.losses import on_device
from igpt_lab.probing.labels import bits_of, log_loss_columns, say_unseen

KEYS = ("layer", "probe", "seed")
LAYERS = 6  # by default, evenly over depth
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@checked
def probe_attentive(
    model: nn.Module,
    train_tokens: np.ndarray,
    train_labels: np.ndarray,
    test_tokens: np.ndarray,
    test_labels: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    point: str = "ln_1",
    seeds: Sequence[int] = (0, 1, 2),
    queries: int = 4,
    epochs: int = 40,
    patience: int = 5,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    dtype: str = "float32",
    memory: float = 2.0,
    alignment: str | None = None,
    progress: bool = True,
) -> Measurement:
    """The attentive probe and the probe of the mean (`attentive_fit`), layer by layer.

    Args:
        model: Ours or transformers', in eval mode.
        train_tokens, test_tokens: Palette indices (N, T), as `tokenize` gives them.
        train_labels, test_labels: int (N,).
        layers: By default six, evenly from the first to the last.
        point: Place in a block, see `record`.
        seeds: Of the weights at the start and of the held-out tenth; the order of images is the same in all.
        queries: M, a divisor of the width of the states.
        epochs, patience, batch_size, learning_rate: Of both fits, see `Training`.
        dtype: In which the training states of a layer are kept, `float32` or `bfloat16`.
        memory: GB that they may take; the more layers' fit in, the fewer passes the model makes. None of test images
            are kept.
        alignment: "sos", or "raw" for a bidirectional model.
        progress: Show a bar.

    Returns:
        `Measurement`, whose table has a row per layer, probe and seed: `layer`, `probe`, `seed`, `test_accuracy` with
        its exact 95% interval over test images (`low`, `high`), `log_loss` in bits with its own (see `probe_layers`),
        `validation_accuracy`, `parameters`, `epochs` until the weights that are kept, `chosen` (the probe's and seed's
        best layer by validation), `drop` (its test accuracy less the last layer's, with `drop_low`, `drop_high` and
        McNemar's `drop_p`), `n_train`, `n_validation` of these, `n_test`. Accuracies are fractions. `of_images` has for
        (layer, probe, seed) whether each test image is right, 0 or 1.

    Raises:
        ValueError: Another layer, point, dtype or number of queries, training images of one class, labels of another
            count, and what are no tokens of whole images.
        MemoryError: States that do not fit into `memory`.
        RuntimeError: A model in training mode.

    Example:
        >>> labels = train.labels, test.labels
        >>> probed = lab.probe_attentive(
        ...     model, train_tokens, labels[0], tokens, labels[1], layers=[1, 3], seeds=[0], epochs=2
        ... )
        >>> probed.table[["layer", "probe", "seed", "n_train", "n_validation", "n_test"]]
           layer      probe  seed  n_train  n_validation  n_test
        0      1  attentive     0      200            20     100
        1      1       mean     0      200            20     100
        2      3  attentive     0      200            20     100
        3      3       mean     0      200            20     100
    """
    config: Any = model.config
    alignment = alignment or ("raw" if getattr(config, "bidirectional", False) else "sos")
    tokens = [_whole(checked_tokens(images, config), config) for images in (train_tokens, test_tokens)]
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    _check_labels(tokens, (train_labels, test_labels))
    check_eval(model)
    width = width_at(point, config)
    if queries < 1 or width % queries:
        raise ValueError(f"queries={queries}; expected a divisor of the width {width} of the states at {point}")
    at_once = _layers_at_once(tokens[0], width, dtype, memory)
    known = list(dict.fromkeys(layers_of(point, config.n_layer, layers)))
    if layers is None:
        known = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, LAYERS).round().astype(int))]
    training = Training(epochs, patience, batch_size, learning_rate)
    classes, y = np.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the training images are all of class {classes[0]}; a probe needs two classes or more")
    held = held_out(y, seeds)
    logits: dict[tuple, Tensor] = {}
    rows = []
    with tqdm(total=len(known) * (2 * epochs + 2), desc="attentive probe", unit="pass", disable=not progress) as bar:
        for some in (known[start : start + at_once] for start in range(0, len(known), at_once)):
            place = (point, some, alignment)
            states = states_of(model, tokens[0], place, DTYPES[dtype])
            bar.update(len(some))
            fits = [fit_both(of_layer, y, held, seeds, queries, training, bar) for of_layer in states]
            del states
            readouts = {layer: [readout for readout, _ in both] for layer, both in zip(some, fits, strict=True)}
            predicted = _predict(model, tokens[1], place, readouts)
            bar.update(len(some))
            for layer, both, of_layer in zip(some, fits, predicted, strict=True):
                for probe, (_, fitted), of_probe in zip(PROBES, both, of_layer, strict=True):
                    for s, seed in enumerate(seeds):
                        logits[layer, probe, seed] = of_probe[s]
                        rows.append({"layer": layer, "probe": probe, "seed": seed} | _facts(fitted, s))
    say_unseen(test_labels, classes, ())
    places = np.searchsorted(classes, test_labels).clip(max=len(classes) - 1)
    places = np.where(classes[places] == test_labels, places, -1)
    correct = {key: values.argmax(-1).numpy() == places for key, values in logits.items()}
    bits = {key: bits_of(values, places) for key, values in logits.items()}
    sizes = {"n_train": len(y), "n_validation": int(held[0].sum()), "n_test": len(test_labels)}
    of_images = {key: right.astype(np.float64) for key, right in correct.items()}
    return Measurement(_table(rows, correct, bits, sizes), of_images, KEYS)


def states_of(model: nn.Module, tokens: np.ndarray, place: tuple[str, list[int], str], dtype: torch.dtype) -> Tensor:
    """States (layers, N, T, D) of palette indices (N, T) at a place: point, layers and alignment."""
    kept: Tensor | None = None
    start = 0
    for states in _passes(model, tokens, place, lambda states, *_: states.to(dtype)):
        kept = states.new_empty(len(states), len(tokens), *states.shape[2:]) if kept is None else kept
        kept[:, start : start + states.shape[1]] = states
        start += states.shape[1]
    assert kept is not None
    return kept


def _passes(
    model: nn.Module,
    tokens: np.ndarray,
    place: tuple[str, list[int], str],
    reduce: Callable[[Tensor, str, int], Tensor],
) -> Iterator[Tensor]:
    """What `reduce` makes of a batch's states (B, T, D) of each layer, layers first; blocks above them do not run."""
    point, layers, alignment = place
    config: Any = model.config
    device = next(model.parameters()).device
    size = default_batch(config, device)
    numbers = numbers_of(model, size)

    @torch.no_grad()
    def states(rows: np.ndarray) -> Tensor:
        pooled.run(on_device(model, rows), use_cache=False)
        return pooled[point].transpose(0, 1)

    batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    with record(model, [point], layers=layers, pool=reduce, alignment=alignment) as pooled:
        yield from side_by_side(states, batches, device, numbers)


def _predict(
    model: nn.Module,
    tokens: np.ndarray,
    place: tuple[str, list[int], str],
    readouts: dict[int, list[Callable[[Tensor], Tensor]]],
) -> Tensor:
    """Logits (layers, P, S, N, K) that each layer's P readouts see in images, batch by batch."""

    def reduce(states: Tensor, point: str, layer: int) -> Tensor:
        return torch.stack([readout(states.float()) for readout in readouts[layer]]).permute(2, 0, 1, 3)  # images first

    return torch.cat([some.cpu() for some in _passes(model, tokens, place, reduce)], 1).permute(0, 2, 3, 1, 4)


def _facts(fitted: Fitted, s: int) -> dict:
    """What the table says of the fit of the seed at place s."""
    parameters = sum(values[s].numel() for values in fitted.weights.values())
    chosen = {"validation_accuracy": fitted.validation_accuracy[s], "epochs": fitted.epochs[s]}
    return {**chosen, "parameters": parameters}


def _table(
    rows: list[dict], correct: dict[tuple, np.ndarray], bits: dict[tuple, np.ndarray], sizes: dict[str, int]
) -> pd.DataFrame:
    """Rows with accuracy and log loss on test images, and what falls from the chosen layer to the last."""
    drops = {}
    table = pd.DataFrame(rows)
    for (probe, seed), curve in table.sort_values("layer").groupby(["probe", "seed"], sort=False):
        layers = curve.layer.tolist()
        chosen = layers[int(middle_of_best(curve.validation_accuracy.to_numpy()))]
        paired = compare(correct[chosen, probe, seed], correct[layers[-1], probe, seed])
        ends = {"drop_low": paired.low, "drop_high": paired.high, "drop_p": paired.p_value}
        drops[probe, seed] = chosen, {"drop": paired.difference, **ends}
    made = []
    for row in rows:
        place = {name: row[name] for name in KEYS}
        chosen, drop = drops[row["probe"], row["seed"]]
        key = tuple(place.values())
        own = accuracy(correct[key]) | log_loss_columns(bits[key])
        made.append({**place, **own, **row, "chosen": row["layer"] == chosen, **drop, **sizes})
    return pd.DataFrame(made)


def _whole(tokens: np.ndarray, config) -> np.ndarray:
    if tokens.shape[1] != config.n_positions or not len(tokens):
        raise ValueError(f"tokens {tokens.shape}; expected whole images (N, {config.n_positions}), at least one")
    return tokens


def _check_labels(tokens: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> None:
    for name, images, of_images in zip(("train", "test"), tokens, labels, strict=True):
        if np.shape(of_images) != (len(images),):
            raise ValueError(
                f"{name}: labels {np.shape(of_images)} for {len(images)} images; expected one for each image"
            )


def _layers_at_once(tokens: np.ndarray, width: int, dtype: str, memory: float) -> int:
    """How many layers' states `memory` GB hold; MemoryError where it is none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    needed = tokens.size * width * DTYPES[dtype].itemsize / 1e9
    if needed > memory:
        other = ", dtype='bfloat16'" if dtype == "float32" else ""
        raise MemoryError(
            f"a layer's states of {len(tokens):,} images are {needed:,.1f} GB in {dtype}, and memory={memory:g}: give "
            f"fewer training images{other}, or more memory"
        )
    return int(memory / needed)
