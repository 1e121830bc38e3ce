"""Bits by layer: how much a linear readout of one state says about pixels, place, mean colour and class.

`linear_readout` states what a bit is. Letters: N images, S states of each, T positions, V colours, L blocks, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.progress import tqdm
from igpt_lab.core.side_by_side import side_by_side
from igpt_lab.explaining.linear_readout import Readout, interval_over_images, linear_readout
from igpt_lab.explaining.measurement import Measurement
from igpt_lab.features.hooks import backbone_of, check_eval, layers_of, numbers_of, record
from igpt_lab.features.settings import default_batch
from igpt_lab.images.tokens import checked_tokens
from igpt_lab.models.losses import check_causal, on_device

OF_LABELS = ("class", "class (mean state)")
TARGETS = ("current pixel", "next pixel", "row", "column", "mean colour", *OF_LABELS)
LEVELS = 8  # classes of the mean colour, with as many training images each
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: Rec. ITU-R BT.601
ROWS, WORK = (2_000, 12_000), 2e8  # training states by default, and their number times D V
ROOM = 2e9  # bytes of states that are kept


@checked
def bits_by_layer(
    model: nn.Module,
    train_tokens: np.ndarray,
    test_tokens: np.ndarray,
    *,
    targets: Sequence[str] | None = None,
    train_labels: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    palette: np.ndarray | None = None,
    layers: Sequence[int] | None = None,
    n_states: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Measurement:
    """Bits that a linear readout of a layer's states has about each of TARGETS.

    State i predicts pixel i and its slot holds pixel i - 1. `current pixel` is pixel i - 1, `next pixel` pixel i, `row`
    and `column` are those of pixel i, `mean colour` is the image's mean luminance in LEVELS classes that have as many
    images, and `class` the image's label, all from one state. `class (mean state)` is the label from the mean of all T
    states, as layer probes read it.

    Layers are those of the un-normed stream, 0..L. As the model's own head does, a readout sees each state divided by
    its root mean square (`ln_f`, whose gain changes nothing here, as features are standardised then): at layer L that
    head is one of the readouts. C is chosen on a fifth of the training images for each layer and target
    (`linear_readout`).

    Args:
        model: Ours, or transformers' of the same class.
        train_tokens, test_tokens: Palette indices, integers (N, T), of whole images.
        targets: All for which there is what they need, by default.
        train_labels, test_labels: Integers (N,), for the class.
        palette: Colours (V, 3) of any scale, for the mean colour; by default the model's own.
        layers: All by default.
        n_states: Positions of each image, never 0, the same for all layers and targets; by default as many as give
            2,000 to 12,000 training states, the fewer the wider D V.
        batch_size: Images at a time, by default chosen by the sizes.
        seed: Of the positions and of the held-out images.
        device: Where the readouts are fitted, by default where the model is.
        progress: Show bars.

    Returns:
        `Measurement`, whose table has a row per layer and target: `layer`, `target`, `bits` with its 95% interval
        `low`, `high`, `log_loss` and `entropy` in bits, `C`, `n_classes` of the target, `converged` (no derivative of
        the last fit is above TOLERANCE), `n_images` and `n_states` of the test images and their states, and `n_train`
        training states. The interval is over test images, which are drawn and not their states, with the readouts as
        they are. `of_images` has for (layer, target) the bits that each test image gains.

    Raises:
        ValueError: A bidirectional model, an unknown target or layer, a target without its labels or palette, tokens
            that are not whole images, and too many states.
        RuntimeError: A model in training mode.

    Example:
        >>> bits = lab.bits_by_layer(model, train_tokens, tokens, targets=["current pixel", "row"], layers=[0, 3])
        >>> bits.table[["layer", "target", "n_images", "n_states", "n_train"]]
           layer         target  n_images  n_states  n_train
        0      0  current pixel       100      1500     3000
        1      0            row       100      1500     3000
        2      3  current pixel       100      1500     3000
        3      3            row       100      1500     3000
    """
    places = layers_of("resid_pre", len(backbone_of(model).h), layers)
    tokens = [_whole_images(model, split) for split in (train_tokens, test_tokens)]
    labels = [_of_images(y, split) for y, split in zip((train_labels, test_labels), tokens, strict=True)]
    palette = _palette_of(model, palette)
    targets = _targets(targets, labels, palette)
    n_states = default_states(model.config, len(tokens[0])) if n_states is None else n_states
    positions = _drawn(tokens, n_states, seed)
    values = {name: _values(name, tokens, positions, labels, palette) for name in targets}
    _check_values(values)
    _check_memory(model, positions, len(places))
    device = best_device(device or next(model.parameters()).device)
    with tqdm(total=sum(map(len, tokens)), desc="states", unit="image", disable=not progress) as bar:
        train, test = (
            _states(model, *split, places, batch_size, device, bar) for split in zip(tokens, positions, strict=True)
        )

    def read(step: tuple[int, str]) -> Readout:
        place, name = step
        x, x_test = (_features(split[:, place], name) for split in (train, test))
        return linear_readout(x, values[name][0], x_test, values[name][1], seed=seed, device=device)

    steps = [(place, name) for place in range(len(places)) for name in targets]
    with closing(side_by_side(read, steps, device, train[:, 0].numel())) as fitted:
        bar = tqdm(fitted, total=len(steps), desc="readouts", unit="readout", disable=not progress)
        readouts = {(places[place], name): readout for (place, name), readout in zip(steps, bar, strict=True)}
    gains = {key: readout.gains.astype(np.float64) for key, readout in readouts.items()}
    return Measurement(_table(readouts, values, seed), gains, ("layer", "target"))


def _table(readouts: dict[tuple[int, str], Readout], values: dict[str, list[np.ndarray]], seed: int) -> pd.DataFrame:
    """A row for each readout by layer and target; the intervals of all rows come from the same draws of images."""
    low, high = interval_over_images(np.stack([readout.gains for readout in readouts.values()]), seed=seed)
    rows = []
    for i, ((layer, name), readout) in enumerate(readouts.items()):
        y, y_test = values[name]
        of_fit = {key: getattr(readout, key) for key in ("log_loss", "entropy", "C", "n_classes", "converged")}
        counts = {"n_images": len(y_test), "n_states": y_test.size, "n_train": y.size}
        rows.append(
            {"layer": layer, "target": name, "bits": readout.bits, "low": low[i], "high": high[i], **of_fit, **counts}
        )
    return pd.DataFrame(rows)


def _whole_images(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Tokens, checked against the model."""
    config = model.config
    check_causal(config)
    check_eval(model)
    tokens = checked_tokens(tokens, config)
    if tokens.shape[1] != config.n_positions or len(tokens) < 2:
        raise ValueError(f"tokens {tokens.shape}; expected two or more whole images, (N, {config.n_positions})")
    return tokens.astype(np.int64)


def _of_images(labels: np.ndarray | None, tokens: np.ndarray) -> np.ndarray | None:
    """Labels (N,) of these images, checked."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != tokens.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"labels {labels.dtype} {labels.shape}; expected integers ({len(tokens)},) from 0, one for each image"
        )
    return labels.astype(np.int64)


def _palette_of(model: Any, palette: np.ndarray | None) -> np.ndarray | None:
    """Colours (V, 3), given or the model's own."""
    colours = model.config.vocab_size - 1
    if palette is None:
        palette = getattr(getattr(model, "processor", None), "clusters", None)
    if palette is not None and np.shape(palette) != (colours, 3):
        raise ValueError(f"palette {np.shape(palette)}; expected the model's {colours} colours, ({colours}, 3)")
    return palette


def _targets(names: Sequence[str] | None, labels: list, palette: np.ndarray | None) -> list[str]:
    """The targets that are asked for, or all that can be had."""
    lacking = {name: "train_labels and test_labels" for name in OF_LABELS if any(y is None for y in labels)}
    lacking |= {"mean colour": "a palette"} if palette is None else {}
    if names is None:
        return [name for name in TARGETS if name not in lacking]
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"target {name!r}; expected one of {', '.join(TARGETS)}")
        if name in lacking:
            raise ValueError(f"target {name!r} needs {lacking[name]}; give them, or leave this target out")
    return list(names)


def default_states(config: Any, images: int) -> int:
    """States of each image: 2,000 to 12,000 in all, the fewer the wider D V."""
    rows = np.clip(WORK / (config.n_embd * (config.vocab_size - 1)), *ROWS)
    return int(np.clip(np.ceil(rows / images), 1, config.n_positions - 1))


def _drawn(tokens: list[np.ndarray], n_states: int, seed: int) -> list[np.ndarray]:
    """Positions (N, S) of each split, ascending, all different in an image, none of them 0: state 0 is constant."""
    width = tokens[0].shape[1]
    if not 1 <= n_states < width:
        raise ValueError(f"n_states={n_states}; expected 1 to {width - 1} states of each image of {width} positions")
    generator = np.random.default_rng(seed)
    return [np.sort(generator.random((len(split), width - 1)).argsort(1)[:, :n_states] + 1) for split in tokens]


def _values(name: str, tokens: list, positions: list, labels: list, palette: np.ndarray | None) -> list[np.ndarray]:
    """A target of both splits: int64 (N, S), or (N, 1) of whole images."""
    side = round(tokens[0].shape[1] ** 0.5)
    if name in ("current pixel", "next pixel"):
        back = int(name == "current pixel")
        return [np.take_along_axis(split, at - back, 1) for split, at in zip(tokens, positions, strict=True)]
    if name in ("row", "column"):
        if side**2 != tokens[0].shape[1]:
            raise ValueError(f"target {name!r} needs a square image; this one has {tokens[0].shape[1]} pixels")
        return [at // side if name == "row" else at % side for at in positions]
    of_images = labels
    if name == "mean colour":
        light = [(np.asarray(palette, float) @ LUMA)[split].mean(1) for split in tokens]
        edges = np.quantile(light[0], np.arange(1, LEVELS) / LEVELS)
        of_images = [np.searchsorted(edges, split, side="right") for split in light]
    if name == "class (mean state)":
        return [y[:, None] for y in of_images]
    return [np.repeat(y[:, None], at.shape[1], 1) for y, at in zip(of_images, positions, strict=True)]


def _check_values(values: dict[str, list[np.ndarray]]) -> None:
    """ValueError for a target that has one value in all training states."""
    for name, (of_train, _) in values.items():
        if of_train.min() == of_train.max():
            raise ValueError(
                f"target {name!r}: all training states have one value; expected two or more, or targets= without it"
            )


def _check_memory(model: Any, positions: list[np.ndarray], layers: int) -> None:
    """ValueError where the states that are kept would take more than ROOM."""
    states = sum(at.shape[0] * (at.shape[1] + 1) for at in positions)
    needed = 4.0 * states * layers * model.config.n_embd
    if needed > ROOM:
        raise ValueError(
            f"{states:,} states of {layers} layers need {needed / 1e9:,.1f} GB, at most {ROOM / 1e9:,.0f} GB are kept; "
            "ask for a lower n_states, fewer layers or fewer images"
        )


def _states(
    model: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    layers: list[int],
    batch_size: int | None,
    device: str | torch.device,
    bar: tqdm,
) -> Tensor:
    """Normed states at the positions (N, S), and behind them the mean over all: float32 (N, layers, S + 1, D)."""
    config = model.config
    kept = torch.empty(len(tokens), len(layers), positions.shape[1] + 1, config.n_embd, device=device)
    size = batch_size or default_batch(config, model.device)
    numbers, of_thread = numbers_of(model, size), threading.local()

    def pool(states: Tensor, point: str, layer: int) -> Tensor:
        x = states.float()
        x = x * (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt()
        at = of_thread.positions[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x.gather(1, at), x.mean(1, keepdim=True)], 1)

    @torch.no_grad()
    def read(rows: slice) -> slice:
        of_thread.positions = on_device(model, positions[rows])
        pooled.run(on_device(model, tokens[rows]), use_cache=False)
        kept[rows] = pooled["resid_pre"].to(device)
        return rows

    batches = [slice(start, start + size) for start in range(0, len(tokens), size)]
    with record(model, ["resid_pre"], layers=layers, pool=pool, alignment="sos") as pooled:
        for rows in side_by_side(read, batches, model.device, numbers):
            bar.update(len(tokens[rows]))
    return kept


def _features(states: Tensor, name: str) -> Tensor:
    """What a target is read from, (N, S, D) or (N, 1, D), of a layer's states (N, S + 1, D)."""
    return states[:, -1:] if name == "class (mean state)" else states[:, :-1]
