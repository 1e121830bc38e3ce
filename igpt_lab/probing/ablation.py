"""How much of a layer curve is the network, and how much the protocol? One model, one image set, every protocol.

Published curves of ImageGPT's layers differ in four ways besides the network: alignment (is the start token in front,
as in training?), point (normed or not), scaling (are features standardised?) and solver (does the probe converge?).
Here every combination of the first three is run to convergence on the same images, with C and the layer always chosen
by the same cross-validation; beside them stands the recipe of the notebook that came with transformers' ImageGPT, the
only complete per-layer table that others have published. A stopped solver is no factor: its accuracy depends on the
order of the rows, the precision and the processor, so of it the spread is shown (`stopped`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.peaks import peak_set
from igpt_lab.core.significance import compare, holm
from igpt_lab.features.extraction import extract
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.effects import AT, AVERAGE, ENDS, Setting, effects_of, with_holm
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import CS, probe_layers
from igpt_lab.probing.results import ProbeResult
from igpt_lab.probing.solvers.logistic import fit_sklearn
from igpt_lab.probing.stopped import repeat_stopped, spread_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = {  # a factor, its level in this package and the other one
    "alignment": ("sos", "raw"),
    "point": ("ln_1", "resid_pre"),
    "scaling": ("standardised", "unscaled"),
}
OURS: Setting = tuple(level for level, _ in FACTORS.values())
UNSCALED: Setting = ("sos", "resid_pre", "unscaled")  # where a stopped solver is furthest from its optimum
TRANSFORMERS: Setting = ("raw", "hidden states", "unscaled")  # hidden states: un-normed, but the last


@dataclass(frozen=True, eq=False)
class Ablation:
    """`results`: a `ProbeResult` for each (alignment, point, scaling): all of FACTORS', and TRANSFORMERS.

    `table`: a row for each setting and layer. `settings`: a row for each setting, with the layer that validation chose,
    the last layer, and `drop`, what is lost between them. `effects`: a row for each difference between two settings,
    and for each interaction of two factors. `repeats`: a row for each repeat of a fit that should not depend on what
    differs between them, and `stopped` their spread (`stopped.spread_of`).
    """

    results: Mapping[Setting, ProbeResult]
    keys: Mapping[str, dict]
    table: pd.DataFrame
    settings: pd.DataFrame
    effects: pd.DataFrame
    repeats: pd.DataFrame
    stopped: pd.DataFrame

    def plot(self, **options) -> Figure:
        """What each setting and factor changes: `options` are arguments of `lab.figures.protocol_curves`."""
        from igpt_lab import figures

        return figures.protocol_curves(self.table, self.effects, self.stopped, **options)

    def to_dict(self) -> dict:
        """What a figure's record needs: the stores' keys, and the tables but for `table`; nan becomes None."""
        tables = {name: getattr(self, name) for name in ("settings", "effects", "repeats", "stopped")}
        rows = {name: table.astype(object).where(table.notna(), None) for name, table in tables.items()}
        return {"stores": dict(self.keys), **{name: table.to_dict("records") for name, table in rows.items()}}

    def single(self) -> pd.DataFrame:
        """The rows of `effects` in which `a` is this package's setting and `b` departs from it in one factor.

        `p_holm` corrects for these rows alone.
        """
        ours = {name: ", ".join(OURS[:i] + OURS[i + 1 :]) for i, name in enumerate(FACTORS)}
        return with_holm(self.effects[self.effects.others == self.effects.factor.map(ours)].reset_index(drop=True))

    def average(self) -> pd.DataFrame:
        """The rows of `effects` that are not of one pair of settings: averages, the recipe, and interactions."""
        return self.effects[self.effects.others.isin([AVERAGE, ""])].reset_index(drop=True)

    def describe(self) -> str:
        """What `average` has, a line for each, in points of accuracy with 95% intervals over test images."""
        lines = self.average().groupby(["factor", "a", "b"], sort=False)
        return "\n".join(_line(factor, a, b, rows) for (factor, a, b), rows in lines)


@checked
def ablate_protocol(
    model: ImageGPTForCausalImageModeling | str | Path,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    *,
    store: str | Path = "stores",
    layers: Sequence[int] | None = None,
    Cs: Sequence[float] = CS,
    folds: int = 5,
    orders: int = 3,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Ablation:
    """Probe layers in all 8 settings of FACTORS, and by the recipe of transformers.

    Two extractions, one for each alignment, go to `store`. In every setting C and the layer are chosen by the same
    cross-validation on train; test is met once. The recipe of transformers has C = 1 and at most 1000 iterations of
    scikit-learn's, mixes un-normed states with a normed last one, and takes the layer that is best on test.

    Args:
        model: One that predicts pixels in their order, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        store: Folder of the stores.
        layers: Layers to probe, all by default.
        Cs: Inverse strengths of the penalty to choose from.
        folds: Of the cross-validation; half of `probe_layers`' by default, as there are many probes.
        orders: Orders of the training rows in which stopped fits are repeated.
        seed: Of the folds.
        device: Where the model and the fits run, by default the accelerator where there is one.
        progress: Show bars.

    Returns:
        `Ablation`. Its `table` has the rows of `probe_layers` for each setting, with `recipe`, `alignment`, `point`,
        `scaling` and `solver` in front. Accuracies and differences are fractions, with 95% intervals `low`, `high`.

        `settings` has a row per setting: the chosen `layer` with its `test_accuracy`, `low`, `high`; `last_accuracy`,
        `last_low`, `last_high` of the last layer; `drop` between them, with `drop_low`, `drop_high`, `drop_p` and
        `drop_holm`, corrected for all settings; `peak_from` and `peak_to`, the first and last layer that may be the
        best; `best_on_test`, the layer that is best on test, with `best_on_test_accuracy`; `n_layers`, how many of them
        `converged` and their `median_iterations`; `n_test`.

        `effects` has `difference`, accuracy of level `a` less that of level `b` of a `factor`, on the same test images,
        `at` the layer that each setting chose, the last one, and for the drop from one to the other, with `p_value`.
        Where `others` names levels of the other factors, it is `significance.compare` of two settings; where it is
        "average", the mean over all four pairs (`effects.average_difference`). Of a row with the factor "interaction",
        `a` and `b` are factors, and `difference` is how much more the choice of this package in `a` gains beside its
        choice in `b` than beside the other level of `b`. `p_holm` is corrected within its family, `effects.effects_of`.

        `repeats` fits this package's setting and UNSCALED again, `at` the chosen and the last layer with the `C` chosen
        there, in each `order` of the training rows, two precisions (`dtype`) and one or two `threads`, stopped and at
        the optimum; `stopped` has their spread: `min`, `max` and `sd` of the test accuracy.

    Raises:
        ValueError: Images without labels or that do not fit the model, a layer that there is not, a C that is not above
            0, or `folds` below 1.

    Example:
        >>> ablation = lab.ablate_protocol(
        ...     model, train_images, test_images, layers=[1, 3], Cs=[0.1], folds=2, orders=1
        ... )
        >>> ablation.settings[["alignment", "point", "scaling", "n_test"]].tail(2)
          alignment          point   scaling  n_test
        7       raw      resid_pre  unscaled     100
        8       raw  hidden states  unscaled     100
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    probing: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    results: dict[Setting, ProbeResult] = {}
    keys, repeats = {}, []
    splits = [images.split for images in (train_images, test_images)]
    for alignment in FACTORS["alignment"]:
        stored = extract(
            model, [train_images, test_images], store=store, points=FACTORS["point"], layers=layers,
            alignment=alignment, device=device, progress=progress,
        )  # fmt: skip
        keys[alignment] = stored.key
        features = {point: _features(stored, splits, point) for point in FACTORS["point"]}
        for point, scaling in product(FACTORS["point"], FACTORS["scaling"]):
            setting = (alignment, point, scaling)
            results[setting] = _probe(features[point], setting, Cs=Cs, folds=folds, **probing)
            if setting in (OURS, UNSCALED):
                repeats.append(_repeats(features[point], setting, results[setting], orders, progress))
    normed, unnormed = (features[point] for point in FACTORS["point"])  # of raw, the last alignment
    results[TRANSFORMERS] = probe_as_transformers(normed, unnormed, model.config.n_layer, **probing)
    settings = pd.DataFrame([_setting_row(setting, result) for setting, result in results.items()])
    settings.insert(settings.columns.get_loc("drop_p") + 1, "drop_holm", pd.Series(holm(settings.drop_p.to_dict())))
    table = pd.concat([_with_setting(setting, result) for setting, result in results.items()], ignore_index=True)
    correct = {setting: {at: _correct(setting, result, at) for at in AT[:2]} for setting, result in results.items()}
    all_repeats = pd.concat(repeats, ignore_index=True)
    stopped = spread_of(all_repeats, [*FACTORS, "at", "layer", "C"])
    effects = effects_of(correct, FACTORS, TRANSFORMERS)
    return Ablation(results, keys, table, settings, effects, all_repeats, stopped)


def _line(factor: str, a: str, b: str, rows: pd.DataFrame) -> str:
    rows = rows.assign(**100 * rows[list(ENDS)])
    effects = [f"{at} {d:+.1f} [{low:+.1f}, {high:+.1f}]" for at, d, low, high in rows[["at", *ENDS]].values]
    name = f"{a} x {b}" if factor == "interaction" else f"{a} less {b}"
    return f"{name:<33}" + "   ".join(effects)


def _features(store: FeatureStore, splits: Sequence[str], point: str) -> tuple[Features, Features]:
    """Features of train and of test."""
    train, test = (Features.from_store(store, split, point) for split in splits)
    return train, test


def _probe(features: tuple[Features, Features], setting: Setting, **probing: Any) -> ProbeResult:
    """The probe of one setting, on features of train and test."""
    return probe_layers(*features, standardise=setting[2] == "standardised", control=", ".join(setting), **probing)


def probe_as_transformers(
    normed: tuple[Features, Features], unnormed: tuple[Features, Features], last: int, **probing: Any
) -> ProbeResult:
    """The recipe of transformers' notebook, from train and test at both points without the start token.

    `last` is L. The layer that it takes is the best on test, which `chosen` of the result is not.
    """
    train, test = (_hidden_states(*points, last) for points in zip(normed, unnormed, strict=True))
    recipe: dict[str, Any] = {"Cs": [1.0], "folds": 1, "solver": fit_sklearn, "max_iter": 1000}
    return _probe((train, test), TRANSFORMERS, **recipe, **probing)


def _repeats(
    features: tuple[Features, Features], setting: Setting, result: ProbeResult, orders: int, progress: bool
) -> pd.DataFrame:
    """Repeats of one setting, at its chosen layer and at the last one."""
    tables, Cs = [], result.table.set_index("layer").C
    for at, layer in zip(AT, (result.chosen, max(result.correct)), strict=False):
        standardise = setting[2] == "standardised"
        rows = repeat_stopped(
            *features, layer, float(Cs[layer]), standardise=standardise, orders=orders, progress=progress
        )
        names = {**dict(zip(FACTORS, setting, strict=True)), "at": at, "layer": layer, "C": float(Cs[layer])}
        tables.append(pd.concat([pd.DataFrame([names] * len(rows)), rows], axis=1))
    return pd.concat(tables, ignore_index=True)


def _hidden_states(normed: Features, unnormed: Features, last: int) -> Features:
    """transformers' `output_hidden_states`: blocks' un-normed inputs, and at layer L the final norm."""
    layers = {layer: (normed if layer == last else unnormed).layers[layer] for layer in unnormed.layers}
    return replace(unnormed, layers=layers)


def _named(setting: Setting) -> dict[str, str]:
    is_theirs = setting == TRANSFORMERS
    names = {"recipe": "transformers" if is_theirs else "", **dict(zip(FACTORS, setting, strict=True))}
    return names | {"solver": "1000 iterations" if is_theirs else "converged"}


def _with_setting(setting: Setting, result: ProbeResult) -> pd.DataFrame:
    rows = result.table.drop(columns="control").assign(chosen=result.table.layer == _chosen(setting, result))
    return pd.concat([pd.DataFrame([_named(setting)] * len(rows)), rows], axis=1)


def _chosen(setting: Setting, result: ProbeResult) -> int:
    """The layer that a setting reports: by validation, in the recipe of transformers the best on test."""
    accuracies = result.table.set_index("layer").test_accuracy
    return int(accuracies.idxmax()) if setting == TRANSFORMERS else result.chosen


def _setting_row(setting: Setting, result: ProbeResult) -> dict:
    rows, chosen = result.table.set_index("layer"), _chosen(setting, result)
    last = max(result.correct)
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


def _correct(setting: Setting, result: ProbeResult, at: str) -> np.ndarray:
    return result.correct[max(result.correct) if at == "last layer" else _chosen(setting, result)]
