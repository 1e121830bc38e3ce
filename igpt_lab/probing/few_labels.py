"""Linear probes that see only k labels of each class: accuracy over k, draw by draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from igpt_lab.core.devices import best_device
from igpt_lab.core.display import card, line
from igpt_lab.images.splits import few_per_class
from igpt_lab.probing.probes import (
    PAPER,
    Features,
    _best_layer,
    _choose_C,
    _folds,
    _known,
    _meet_test,
    _same_layers,
    _stacks,
    _tested,
)
from igpt_lab.probing.solvers.logistic import fit_logistic


@dataclass(frozen=True, eq=False)
class FewLabelResult:
    """`table`: a row for each k, draw and layer; `subsets`: (k, draw) -> rows of the source that were used.

    `correct`: bool (N_test,) for each row of the table, as `significance.compare` and `spread` take them; `predicted`:
    labels (N_test,) for each row.
    """

    table: pd.DataFrame
    subsets: dict[tuple[int, int], np.ndarray]
    correct: list[np.ndarray]
    predicted: list[np.ndarray] = field(default_factory=list)

    def __repr__(self) -> str:
        return line("FewLabelResult", self._facts())

    def _repr_html_(self) -> str:
        return card("FewLabelResult", self._facts())

    def _facts(self) -> dict[str, str]:
        chosen, failed = self.table[self.table.layer_rule == "chosen"], (~self.table.converged.astype(bool)).sum()
        spread = chosen.groupby("k").test_accuracy.agg(["mean", "std"])
        facts = {f"{k} labels a class": f"{row['mean']:.1%} ({100 * row['std']:.1f})" for k, row in spread.iterrows()}
        shown = {
            "control": self.table.control.iloc[0],
            **facts,
            "over": f"{self.table.draw.nunique()} draws: mean (deviation)",
        }
        return shown | {"not converged": f"{failed} of {len(self.table)} probes" if failed else ""}

    def subset_lists(self) -> dict[str, list[int]]:
        """`subsets` as plain JSON, keys like `k4-draw0`."""
        return {f"k{k}-draw{draw}": rows.tolist() for (k, draw), rows in self.subsets.items()}

    def summary(self) -> pd.DataFrame:
        """Mean and standard deviation (n - 1) over draws of the test accuracy, a row for each k and layer rule."""
        named = self.table.assign(layer=self.table.layer.where(self.table.layer_rule == "fixed", "chosen").astype(str))
        return named.groupby(["control", "k", "layer_rule", "layer"]).test_accuracy.agg(["mean", "std", "count"])


def probe_few_labels(
    train: Features,
    test: Features,
    *,
    protocol: str | None = None,
    ks: Sequence[int] = (1, 4, 25, 100, 400),
    draws: int = 5,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    Cs: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    max_iter: int = 1000,
    control: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FewLabelResult:
    """Probes that see only k labels a class; `draws` nested, stratified subsets for each k.

    `protocol="paper"` takes its setting, k = 4, 25 and 400 with 5 draws (section 4.5), in place of `ks` and `draws`.
    Rows with `layer_rule` `fixed` are those of `layers` (first and last by default); in the row `chosen` the layer is
    chosen too. C and layer are chosen inside the k labels by cross-validation: 4 folds up to k = 50, one fold of them
    above; with k = 1 nothing can be held out, C is the middle of `Cs`, the layer is the middle one, and `C_rule` says
    `fixed`. Standard deviation over draws is not the interval over test images.
    """
    if protocol not in (None, "paper"):
        raise ValueError(f"protocol={protocol!r}; expected 'paper' or None")
    ks, draws = (PAPER["ks"], PAPER["draws"]) if protocol else (ks, draws)
    _same_layers(train, test)
    fixed = [min(train.layers), max(train.layers)] if layers is None else list(dict.fromkeys(layers))
    _known(fixed, train.layers)
    subsets = {(k, d): few_per_class(train.labels, k, seed=seed, draw=d) for k in ks for d in range(draws)}
    classes, y = np.unique(train.labels, return_inverse=True)
    folds = {case: _folds(y[rows], case[0], seed) for case, rows in subsets.items()}
    how = {"max_iter": max_iter, "device": device or best_device()}
    found, kept = {case: {} for case in subsets}, {}
    with tqdm(total=2 * len(train.layers), desc=f"few labels {control}".strip(), disable=not progress) as bar:
        for some, x in _stacks(train):
            _tested(some, x, test)  # says now what would stop the second pass
            for case, rows in subsets.items():
                found[case] |= zip(some, _choose_C(x[:, rows], y[rows], folds[case][0], Cs, how), strict=True)
            bar.update(len(some))
        best = {case: _best_layer(each) for case, each in found.items()}
        for some, x in _stacks(train):
            tested = {layer: test.layers[layer] for layer in some if layer in {*best.values(), *fixed}}
            for case, rows in subsets.items():
                used = [i for i, layer in enumerate(some) if layer in (best[case], *fixed)]
                if not used:
                    continue
                fits = fit_logistic(x[used][:, rows], y[rows], [[found[case][some[i]][0]] for i in used], **how)
                for i, layer in enumerate(some[j] for j in used):
                    predicted = classes[fits.predict(tested[layer], i)[0]]
                    kept[case, layer] = predicted, bool(fits.converged[i, 0])
            bar.update(len(some))
    rows, predictions = [], {}
    for (k, draw), each in found.items():
        for rule, layer in [("chosen", best[k, draw]), *(("fixed", layer) for layer in fixed)]:
            (C, validation, sure), (predicted, reached) = each[layer], kept[(k, draw), layer]
            predictions[len(rows)] = predicted
            rows.append({
                "control": control, "k": k, "draw": draw, "layer_rule": rule, "layer": layer, "C": float(C),
                "C_rule": folds[k, draw][1], "validation_accuracy": validation, "converged": reached and sure,
                "n_train": len(subsets[k, draw]), "n_test": len(test.index), "seed": seed,
            })  # fmt: skip
    correct = _meet_test(predictions, test)
    table = pd.DataFrame(rows)
    table.insert(6, "test_accuracy", [each.mean() for each in correct.values()])
    used = {case: train.index[rows] for case, rows in subsets.items()}
    return FewLabelResult(table, used, list(correct.values()), list(predictions.values()))
