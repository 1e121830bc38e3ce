"""What a layer curve is held against: permuted labels, networks that were never trained, a task without meaning."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import Layer, in_depth
from igpt_lab.core.devices import best_device
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy, compare, mean_difference
from igpt_lab.probing.features import Features, check_known, check_same_layers, over_stacks, test_layers
from igpt_lab.probing.labels import bits_of, log_loss_columns, matched, meet_test
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic


@dataclass(frozen=True)
class DropComparison:
    """What a network loses from its chosen layer to its last, against what control networks lose, each from its own.

    `drop` and `control_drops` are accuracies of the chosen layers less those of the last; `control_mean`,
    `control_lowest` and `control_highest` are over the controls. `difference` is `drop` less `control_mean`, with its
    95% interval over the test images, which all networks share; the networks and their layers are held as they are.
    """

    chosen_layer: int | str
    last_layer: int | str
    drop: float
    control_layers: list[Layer]
    control_drops: list[float]
    control_mean: float
    control_lowest: float
    control_highest: float
    difference: float
    low: float
    high: float
    n_test: int

    def to_dict(self) -> dict:
        """Its fields by name."""
        return asdict(self)


@checked
def compare_drops(
    result: ProbeResult,
    controls: Sequence[ProbeResult],
    *,
    layer: int | str | None = None,
    n_boot: int = 10_000,
    seed: int = 0,
) -> DropComparison:
    """The drop of a trained network against that of controls, such as networks of other random weights.

    An untrained network falls towards its end too: what training did is the difference.

    Args:
        result: Of the trained network.
        controls: One or more, on the same test images.
        layer: Where the controls are compared with their last layer; by default the one that each chose.
        n_boot: Draws of the bootstrap over test images (`significance.mean_difference`).
        seed: Of these.

    Returns:
        `DropComparison`: both drops and their difference, as fractions, with its 95% interval.

    Raises:
        ValueError: Results on other numbers of test images, or without the layer.

    Example:
        >>> untrained = lab.load_model("tiny", random=True, seed=1)
        >>> stored = lab.extract(untrained, [train_images, test_images], store="stores")
        >>> features = [lab.Features.from_store(stored, split) for split in ("train", "test")]
        >>> control = lab.probe_layers(*features, folds=2)
        >>> drops = lab.compare_drops(result, [control], layer=1)
        >>> drops.last_layer, drops.control_layers, drops.n_test
        (3, [1], 100)
    """
    sizes = sorted({len(row) for probed in (result, *controls) for row in probed.correct.values()})
    if len(sizes) > 1:
        raise ValueError(f"results on {' and '.join(map(str, sizes))} test images; expected the same ones")
    last = in_depth(result.correct)[-1]
    layers = [control.chosen if layer is None else layer for control in controls]
    for control, from_layer in zip(controls, layers, strict=True):
        check_known([from_layer, last], control.correct)
    ours = _lost(result, result.chosen, last)
    theirs = np.stack([_lost(control, from_layer, last) for control, from_layer in zip(controls, layers, strict=True)])
    drops = theirs.mean(1).tolist()
    paired = mean_difference((ours - theirs.mean(0))[None], n_boot=n_boot, seed=seed)
    return DropComparison(
        chosen_layer=result.chosen, last_layer=last, drop=float(ours.mean()), control_layers=layers,
        control_drops=drops, control_mean=float(np.mean(drops)), control_lowest=min(drops), control_highest=max(drops),
        difference=paired["difference"], low=paired["low"], high=paired["high"], n_test=len(ours),
    )  # fmt: skip


def _lost(result: ProbeResult, layer: Layer, last: Layer) -> np.ndarray:
    """What each test image adds to the drop from a layer to the last: float64 (N,), 1, 0 or -1."""
    return result.correct[layer].astype(float) - result.correct[last]


@checked
def probe_permuted(
    train: Features,
    test: Features,
    result: ProbeResult,
    *,
    permutations: int = 10,
    layers: Sequence[int | str] | None = None,
    control: str = "permuted labels",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Probes of training labels in random order, which must fall to chance.

    Each layer keeps the C that the probe of the real labels chose for it. How far the real accuracy stands from these:
    `significance.permutation_p`.

    Args:
        train, test: Of the real labels.
        result: What `probe_layers` gave of them.
        permutations: How many; the same for all layers.
        layers: By default those of the features.
        control: What the column `control` says.
        seed: Of the permutations.
        device: Where fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        A row per layer and permutation: `control`, `layer`, `draw` (which permutation), `C`, `converged`, `chosen` (the
        layer that the real probe chose), `test_accuracy` as a fraction with its exact 95% interval `low`, `high`,
        `log_loss` in bits with its own (of the real labels, see `probe_layers`),
        `n_train`, `n_test`, `n_classes` K (chance is 1 / K, where classes are of one size), `seed`.

    Raises:
        ValueError: No permutation, a layer that features or result have not, or train and test of other layers.

    Example:
        >>> table = lab.probe_permuted(train, test, result, permutations=2, layers=[3])
        >>> table[["layer", "draw", "n_train", "n_test", "n_classes"]]
           layer  draw  n_train  n_test  n_classes
        0      3     0      200     100         10
        1      3     1      200     100         10
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations}; expected 1 or more")
    if layers is not None:
        check_known(layers, train.layers)
        train, test = (replace(rows, layers={i: rows.layers[i] for i in layers}) for rows in (train, test))
    check_same_layers(train, test)
    strengths = result.table.set_index("layer").C
    check_known(list(train.layers), strengths.index)
    classes, y = np.unique(train.labels, return_inverse=True)
    facts = {"n_train": len(y), "n_test": len(test.index), "n_classes": len(classes), "seed": seed}
    place, caller = best_device(device), threading.current_thread()

    def of_stack(layers: list[Layer], x: np.ndarray) -> tuple[list[Layer], list[tuple[Fits, list[np.ndarray]]]]:
        tested, Cs = test_layers(layers, x, test), strengths[layers].to_numpy()[:, None]
        of_draws = []
        for draw in range(permutations):
            shuffled = np.random.default_rng([seed, 7, draw]).permutation(y)
            fits = fit_logistic(x, shuffled, Cs, device=place)
            of_draws.append((fits, [classes[fits.predict(tested[i], i)[0]] for i in range(len(layers))]))
            if threading.current_thread() is caller:  # a notebook shows what the thread of its cell draws
                bar.update(len(layers))
        return layers, of_draws

    predictions: dict[tuple[int, Layer], np.ndarray] = {}
    made: dict[Layer, list[tuple[Fits, int]]] = {}
    rows: list[dict] = []
    with tqdm(total=len(train.layers) * permutations, desc=control, unit="probe", disable=not progress) as bar:
        for stacked, of_draws in over_stacks(of_stack, train, place):
            for draw, (fits, predicted) in enumerate(of_draws):
                for i, layer in enumerate(stacked):
                    predictions[draw, layer] = predicted[i]
                    made.setdefault(layer, []).append((fits, i))
                    row = {"control": control, "layer": layer, "draw": draw, "C": float(strengths[layer])}
                    rows.append(row | {"converged": bool(fits.converged[i, 0]), "chosen": layer == result.chosen})
            bar.update(len(made) * permutations - bar.n)
    rows.sort(key=lambda row: row["draw"])  # and within a draw the layers in their order

    def losses(places: np.ndarray) -> dict[tuple[int, Layer], np.ndarray]:
        bits: dict[tuple[int, Layer], np.ndarray] = {}
        for layer, of_draws in made.items():
            x = test.layers[layer]
            bits |= {(draw, layer): bits_of(fits.logits(x, i)[0], places) for draw, (fits, i) in enumerate(of_draws)}
        return bits

    correct, bits = meet_test(predictions, matched(train, test), losses)
    keys = [(row["draw"], row["layer"]) for row in rows]
    scores = [accuracy(correct[key]) | log_loss_columns(bits[key]) for key in keys]
    return pd.DataFrame([row | score | facts for row, score in zip(rows, scores, strict=True)])


@checked
def selectivity(result: ProbeResult, control: ProbeResult, *, n_boot: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """How much of each layer's accuracy is not due to the probe itself (Hewitt and Liang, 2019): a row per layer.

    `control`: the probe of labels without meaning (`control_task`) on the same images. `selectivity` is the accuracy
    less `control_accuracy`, with a paired 95% interval over test images (`significance.compare`); the others have that
    of `probe_layers`. Whether it falls from the chosen layer to the last: `compare_drops` with a `layer`.
    """
    check_known(list(result.correct), control.correct)
    rows = []
    for layer, right in result.correct.items():
        paired = compare(right, control.correct[layer], n_boot=n_boot, seed=seed)
        task = {f"control_{name.removeprefix('test_')}": v for name, v in accuracy(control.correct[layer]).items()}
        ends = {"selectivity": paired.difference, "selectivity_low": paired.low, "selectivity_high": paired.high}
        facts = {"chosen": layer == result.chosen, "n_test": paired.n_test}
        rows.append({"layer": layer, **accuracy(right), **task, **ends, **facts})
    return pd.DataFrame(rows)
