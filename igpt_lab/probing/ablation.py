"""How much of a layer curve is the network, and how much the protocol? One model, one image set, every protocol.

Published curves of ImageGPT's layers differ in four ways besides the network: alignment (is the start token in front,
as in training?), point (normed or not), scaling (are features standardised?) and solver (does the probe converge?).
Here every combination is run on the same images, with C and the layer always chosen on the same held-out rows; beside
them stands the recipe of the notebook that came with transformers' ImageGPT, the only complete per-layer table that
others have published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import compare, mean_difference, peak_set
from igpt_lab.features.extraction import extract
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.probes import CS, Features, ProbeResult, probe_layers
from igpt_lab.probing.solvers.logistic import fit_logistic, fit_sklearn

FACTORS = {  # a factor, its level in this package and the other one
    "alignment": ("sos", "raw"),
    "point": ("ln_1", "resid_pre"),
    "scaling": ("standardised", "unscaled"),
    "solver": ("converged", "100 iterations"),
}
SOLVERS = {"converged": (fit_logistic, 1000), "100 iterations": (fit_sklearn, 100)}
OURS = tuple(level for level, _ in FACTORS.values())
TRANSFORMERS = ("raw", "hidden states", "unscaled", "1000 iterations")  # hidden states: un-normed, but the last
ENDS = ("difference", "low", "high")
AT = ("chosen layer", "last layer", "drop")


@dataclass(frozen=True, eq=False)
class Ablation:
    """`results`: a `ProbeResult` for each (alignment, point, scaling, solver): all of FACTORS', and TRANSFORMERS.

    `table`: a row for each setting and layer. `settings`: a row for each setting, with the layer that validation chose,
    the last layer, and `drop`, what is lost between them. `effects`: a row for each difference between two settings.
    """

    results: Mapping[tuple[str, str, str, str], ProbeResult]
    keys: Mapping[str, dict]
    table: pd.DataFrame
    settings: pd.DataFrame
    effects: pd.DataFrame

    def to_dict(self) -> dict:
        """What a figure's record needs: the stores' keys, settings and effects; nan becomes None."""
        tables = self.settings, self.effects
        settings, effects = (table.astype(object).where(table.notna(), None) for table in tables)
        return {
            "stores": dict(self.keys),
            "settings": settings.to_dict("records"),
            "effects": effects.to_dict("records"),
        }

    def single(self) -> pd.DataFrame:
        """The rows of `effects` in which `a` is this package's setting and `b` departs from it in one factor."""
        ours = {name: ", ".join(OURS[:i] + OURS[i + 1 :]) for i, name in enumerate(FACTORS)}
        return self.effects[self.effects.others == self.effects.factor.map(ours)].reset_index(drop=True)

    def describe(self) -> str:
        """The average effects, a line for each factor, in points of accuracy with 95% intervals over test images."""
        average = self.effects[self.effects.others == "average"]
        lines = [_line(f"{a} less {b}", rows) for (a, b), rows in average.groupby(["a", "b"], sort=False)]
        return "\n".join([*lines, _line("ours less the port's recipe", self.effects[self.effects.factor == "recipe"])])


@checked
def ablate_protocol(
    model: ImageGPTForCausalImageModeling | str | Path,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    layers: Sequence[int] | None = None,
    Cs: Sequence[float] = CS,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Ablation:
    """Probe `layers` (all by default) in all 16 settings of FACTORS, and by the recipe of transformers.

    Two extractions, one for each alignment, go to `store`. In every setting C and the layer are chosen on the same
    held-out tenth of train, and test is met once. `solver` alone decides how a fit ends: `logistic.fit_logistic` at its
    optimum, `logistic.fit_sklearn` after 100 iterations at most. The recipe of transformers has C = 1 and at most 1000
    iterations, mixes un-normed states with a normed last one, and takes the layer that is best on test.

    `effects` has `difference`, accuracy of level `a` less that of level `b` of a `factor`, on the same test images: at
    the layer that each setting chose, at the last one, and for the `drop` from one to the other. Where `others` names
    levels of the other factors, it is `significance.compare` of two settings; where it is "average", the mean over all
    eight pairs. Both with a 95% interval over test images, by bootstrap.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    probing: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    results, keys = {}, {}
    splits = [images.split for images in (train_images, test_images)]
    for alignment in FACTORS["alignment"]:
        stored = extract(
            model, [train_images, test_images], store=store, points=FACTORS["point"], layers=layers,
            alignment=alignment, device=device, progress=progress,
        )  # fmt: skip
        keys[alignment] = stored.key
        features = {point: _features(stored, splits, point) for point in FACTORS["point"]}
        for point, scaling, solver in product(*list(FACTORS.values())[1:]):
            setting = (alignment, point, scaling, solver)
            results[setting] = _probe(features[point], setting, SOLVERS[solver], Cs, probing)
    normed, unnormed = (features[point] for point in FACTORS["point"])  # of raw, the last alignment
    last = model.config.n_layer
    mixed = _hidden_states(normed[0], unnormed[0], last), _hidden_states(normed[1], unnormed[1], last)
    results[TRANSFORMERS] = _probe(mixed, TRANSFORMERS, (fit_sklearn, 1000), [1.0], probing)
    settings = pd.DataFrame([_setting_row(setting, result) for setting, result in results.items()])
    table = pd.concat([_with_setting(setting, result) for setting, result in results.items()], ignore_index=True)
    return Ablation(results, keys, table, settings, pd.DataFrame([*_effects(results), *_recipe_effects(results)]))


def _line(name: str, rows: pd.DataFrame) -> str:
    rows = rows.assign(**100 * rows[list(ENDS)])
    effects = [f"{at} {d:+.1f} [{low:+.1f}, {high:+.1f}]" for at, d, low, high in rows[["at", *ENDS]].values]
    return f"{name:<33}" + "   ".join(effects)


def _features(store: FeatureStore, splits: Sequence[str], point: str) -> tuple[Features, Features]:
    """Features of train and of test."""
    train, test = (Features.from_store(store, split, point) for split in splits)
    return train, test


def _probe(
    features: tuple[Features, Features],
    setting: tuple[str, ...],
    solver: tuple[Callable, int],
    Cs: Sequence[float],
    probing: dict[str, Any],
) -> ProbeResult:
    """The probe of one setting, on features of train and test, with a solver and its limit of iterations."""
    train, test = features
    solve, max_iter = solver
    scaled, name = setting[2] == "standardised", ", ".join(setting)
    return probe_layers(
        train, test, Cs=Cs, standardise=scaled, solver=solve, max_iter=max_iter, control=name, **probing
    )


def _hidden_states(normed: Features, unnormed: Features, last: int) -> Features:
    """transformers' `output_hidden_states`: blocks' un-normed inputs, and at layer L the final norm."""
    layers = {layer: (normed if layer == last else unnormed).layers[layer] for layer in unnormed.layers}
    return replace(unnormed, layers=layers)


def _named(setting: tuple) -> dict[str, str]:
    return {"recipe": "port" if setting == TRANSFORMERS else "", **dict(zip(FACTORS, setting, strict=True))}


def _with_setting(setting: tuple, result: ProbeResult) -> pd.DataFrame:
    rows = result.table.drop(columns="control").assign(chosen=result.table.layer == _chosen(setting, result))
    return pd.concat([pd.DataFrame([_named(setting)] * len(rows)), rows], axis=1)


def _chosen(setting: tuple, result: ProbeResult) -> int:
    """The layer that a setting reports: by validation, in the recipe of transformers the best on test."""
    accuracies = result.table.set_index("layer").test_accuracy
    return int(accuracies.idxmax()) if setting == TRANSFORMERS else result.chosen


def _setting_row(setting: tuple, result: ProbeResult) -> dict:
    rows, chosen, last = result.table.set_index("layer"), _chosen(setting, result), max(result.correct)
    drop, peak = compare(result.correct[chosen], result.correct[last]), peak_set(result.correct).layers
    names = ["test_accuracy", "low", "high"]
    at_last = rows.loc[last, names].rename(lambda name: "last_" + name.removeprefix("test_"))
    return {
        **_named(setting), "layer": chosen, **rows.loc[chosen, names], **at_last, "drop": drop.difference,
        "drop_low": drop.low, "drop_high": drop.high, "drop_p": drop.p_value, "peak_from": min(peak),
        "peak_to": max(peak), "best_on_test": int(rows.test_accuracy.idxmax()),
        "best_on_test_accuracy": rows.test_accuracy.max(), "n_layers": len(rows),
        "converged": int(rows.converged.sum()), "median_iterations": float(rows.iterations.median()),
        "n_test": drop.n_test,
    }  # fmt: skip


def _effects(results: Mapping[tuple, ProbeResult]) -> list[dict]:
    """Rows of `effects` for each factor: eight pairs of settings that differ in it alone, then their average."""
    rows = []
    for place, (factor, (a, b)) in enumerate(FACTORS.items()):
        contexts = list(product(*[levels for name, levels in FACTORS.items() if name != factor]))
        pairs = [(rest[:place] + (a,) + rest[place:], rest[:place] + (b,) + rest[place:]) for rest in contexts]
        named = {"factor": factor, "a": a, "b": b}
        for at in AT[:2]:
            for rest, pair in zip(contexts, pairs, strict=True):
                rows.append(named | {"others": ", ".join(rest), "at": at} | _difference(results, pair, at))
        for at in AT:
            rows.append(named | {"others": "average", "at": at} | mean_difference(_paired(results, pairs, at)))
    return rows


def _recipe_effects(results: Mapping[tuple, ProbeResult]) -> list[dict]:
    """Rows of `effects` for this package's setting against the recipe of transformers."""
    named = {"factor": "recipe", "a": "ours", "b": "port", "others": ""}
    pair = (OURS, TRANSFORMERS)
    rows = [named | {"at": at} | _difference(results, pair, at) for at in AT[:2]]
    return [*rows, named | {"at": "drop"} | mean_difference(_paired(results, [pair], "drop"))]


def _difference(results: Mapping[tuple, ProbeResult], pair: tuple[tuple, tuple], at: str) -> dict:
    """`significance.compare` of two settings at one layer."""
    a, b = (_correct(setting, results[setting], at) for setting in pair)
    compared = compare(a, b)
    return {name: getattr(compared, name) for name in ("difference", "low", "high", "p_value", "n_test")}


def _correct(setting: tuple, result: ProbeResult, at: str) -> np.ndarray:
    return result.correct[max(result.correct) if at == "last layer" else _chosen(setting, result)]


def _paired(results: Mapping[tuple, ProbeResult], pairs: Sequence[tuple[tuple, tuple]], at: str) -> np.ndarray:
    """What each test image adds to the differences of pairs of settings: float64 (P, N)."""
    if at == "drop":
        return _paired(results, pairs, "chosen layer") - _paired(results, pairs, "last layer")
    a, b = (np.stack([_correct(pair[i], results[pair[i]], at) for pair in pairs]).astype(float) for i in (0, 1))
    return a - b
