"""Linear probes that see only k labels of each class: accuracy over k, draw by draw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from pandas.core.groupby import DataFrameGroupBy

from igpt_lab.core.arguments import checked
from igpt_lab.core.depth import Layer, in_depth
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL, card, line, shown_control
from igpt_lab.core.draws import Spread, spread
from igpt_lab.core.progress import tqdm
from igpt_lab.images.splits import few_per_class
from igpt_lab.probing.choosing import ChosenC, Fold, choose_C, chosen_layer, folds_inside
from igpt_lab.probing.features import Features, check_known, check_same_layers, stacks, test_layers
from igpt_lab.probing.labels import bits_of, matched, meet_test
from igpt_lab.probing.solvers.logistic import Fits, fit_logistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER_KS = (4, 25, 400)  # labels per class in section 4.5 of Chen et al. (2020)
PAPER_DRAWS = 5
BOTH = ["low_all", "high_all"]  # of a 95% interval over draws and test images together
LINE = ["control", "k", "layer_rule", "layer"]


@dataclass(frozen=True, eq=False)
class FewLabelResult:
    """`table`: a row for each k, draw and layer; `subsets`: (k, draw) -> rows of the source that were used.

    `correct`: bool (N_test,) for each row of the table, as `significance.compare` and `spread` take them; `predicted`:
    labels (N_test,) for each row; `log_loss`: bits (N_test,) for each row, as of `ProbeResult`. In the table `overlap`
    is the mean share of their rows that two draws of this k have in common (0: disjoint); `low_all` and `high_all`, the
    same for all draws of a k and layer rule, are the 95% interval of their mean over draws and test images together
    (nan for one draw, or draws of the same rows).
    """

    table: pd.DataFrame
    subsets: dict[tuple[int, int], np.ndarray]
    correct: list[np.ndarray]
    predicted: list[np.ndarray] = field(default_factory=list)
    log_loss: list[np.ndarray] = field(default_factory=list)

    def __repr__(self) -> str:
        return line("FewLabelResult", self._facts())

    def _repr_html_(self) -> str:
        return card("FewLabelResult", self._facts())

    def plot(self, **options) -> Axes:
        """Accuracy over labels per class: `options` are arguments of `lab.figures.few_label_curve`, such as `ax`."""
        from igpt_lab import figures

        return figures.few_label_curve(self.table, **options)

    def _facts(self) -> dict[str, str]:
        chosen, failed = self.table[self.table.layer_rule == "chosen"], (~self.table.converged.astype(bool)).sum()
        means = chosen.groupby("k")[["test_accuracy", *BOTH]].mean()
        draws, shared = self.table.draw.nunique(), chosen[chosen.overlap > 0].groupby("k").overlap.first()
        known = means[means.low_all.notna()]
        intervals = {k: f" [{row.low_all:.1%}, {row.high_all:.1%}]" for k, row in known.iterrows()}
        shown = {
            "control": shown_control(self.table.control.iloc[0]),
            **{f"{k} labels a class": f"{mean:.1%}{intervals.get(k, '')}" for k, mean in means.test_accuracy.items()},
            "over": f"{draws} draws and all test images together: mean [95% interval]" if draws > 1 else "one draw",
            "two draws share": ", ".join(f"{share:.0%} of their rows at k = {k}" for k, share in shared.items()),
        }
        return shown | {"not converged": f"{failed} of {len(self.table)} probes" if failed else ""}

    def subset_lists(self) -> dict[str, list[int]]:
        """`subsets` as plain JSON, keys like `k4-draw0`."""
        return {f"k{k}-draw{draw}": rows.tolist() for (k, draw), rows in self.subsets.items()}

    def summary(self) -> pd.DataFrame:
        """Test accuracy, a row for each k and layer rule: `mean` and `std` (n - 1) over `count` draws, and intervals.

        95% intervals of the mean: `low` and `high` over test images alone, `low_all` and `high_all` over draws and
        test images together (see `draws.spread`). `overlap` is as in the table.
        """
        lines = {name: _spread(rows, self.correct) for name, rows in _lines(self.table)}
        table = pd.DataFrame.from_dict({name: line.to_dict() for name, line in lines.items()}, orient="index")
        table.index = pd.MultiIndex.from_tuples(lines, names=LINE)
        table = table.rename(columns={"standard_deviation": "std", "n_draws": "count"})
        return table[["mean", "std", "count", "low", "high", *BOTH]].join(_lines(self.table).overlap.first())


def _lines(table: pd.DataFrame) -> DataFrameGroupBy:
    """The rows of each k and layer rule: all draws."""
    return table.assign(layer=table.layer.where(table.layer_rule == "fixed", "chosen").astype(str)).groupby(LINE)


def _spread(rows: pd.DataFrame, correct: Sequence[np.ndarray]) -> Spread:
    return spread([correct[row] for row in rows.index], overlap=float(rows.overlap.iloc[0]))


def _overlap(subsets: Sequence[np.ndarray]) -> float:
    """The mean share of rows that two of these subsets, of equal size, have in common; 0 for a single one."""
    times, count = np.unique(np.concatenate(subsets), return_counts=True)[1], len(subsets)
    return float((times * (times - 1)).sum() / (count * max(count - 1, 1) * len(subsets[0])))


def _check_enough(counts: np.ndarray, names: Sequence[str] | np.ndarray, k: int) -> None:
    """ValueError where the smallest class has fewer than k rows."""
    if counts.min() < k:
        name, fewest = names[int(counts.argmin())], counts.min()
        raise ValueError(f"class {name} has {fewest} rows; {k} per class were asked for, give ks of at most {fewest}")


@checked
def probe_few_labels(
    train: Features,
    test: Features,
    *,
    protocol: str | None = None,
    ks: Sequence[int] = (1, 4, 25, 100, 400),
    draws: int = 5,
    seed: int = 0,
    layers: Collection[int | str] | None = None,
    Cs: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    max_iter: int = 1000,
    control: str = MODEL,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FewLabelResult:
    """Probes that see only k labels per class, in several draws.

    Subsets are nested and stratified (`few_per_class`). C and layer are chosen inside the k labels by cross-validation:
    4 folds up to k = 50, one fold of them above; with k = 1 nothing can be held out, C is the middle of `Cs`, the layer
    is the middle one, and `C_rule` says `fixed`.

    Args:
        train, test: Features with labels.
        protocol: "paper" takes its setting, k = 4, 25 and 400 with 5 draws (section 4.5), in place of `ks` and `draws`.
        ks: Labels per class.
        draws: Subsets for each k.
        seed: Of the subsets.
        layers: The layers of the rows `fixed`, first and last by default.
        Cs: Inverse strengths of the penalty to choose from.
        max_iter: Passes of a fit, at most.
        control: What the column `control` says.
        device: Where fits run, by default the accelerator where there is one.
        progress: Show a bar.

    Returns:
        `FewLabelResult`, whose `table` has rows per k and draw: `control`, `k`, `draw`; `layer_rule`, `fixed` for each
        of `layers` or `chosen` where the layer is chosen too; `layer`, `C`, `test_accuracy`, `log_loss` in bits (see
        `probe_layers`), `C_rule`, `validation_accuracy`, `converged`, `n_train`, `n_test`, `seed`; `overlap`, the share
        of images that two draws have in common (0 where each class has draws * k rows); `low_all` and `high_all`, 95%
        of the mean accuracy over draws and test images together. Accuracies are fractions.

    Raises:
        ValueError: A class with fewer rows than the largest k, an unknown protocol or layer, or train and test of other
            layers.

    Example:
        >>> few = lab.probe_few_labels(train, test, ks=[1, 2], draws=2, layers=[3])
        >>> few.table[["k", "draw", "layer_rule", "n_train", "n_test"]].head(4)
           k  draw layer_rule  n_train  n_test
        0  1     0     chosen       10     100
        1  1     0      fixed       10     100
        2  1     1     chosen       10     100
        3  1     1      fixed       10     100
    """
    if protocol not in (None, "paper"):
        raise ValueError(f"protocol={protocol!r}; expected 'paper' or None")
    if protocol:
        ks, draws = PAPER_KS, PAPER_DRAWS
    check_same_layers(train, test)
    deep = in_depth(train.layers)
    fixed = list(dict.fromkeys([deep[0], deep[-1]] if layers is None else layers))
    check_known(fixed, train.layers)
    classes, y = np.unique(train.labels, return_inverse=True)
    _check_enough(np.bincount(y), [train.names[label] for label in classes] if train.names else classes, max(ks))
    subsets = [_Subset.of(train.labels, y, k, draw, draws, seed) for k in dict.fromkeys(ks) for draw in range(draws)]
    fitting = {"max_iter": max_iter, "device": best_device(device)}
    name = f"few labels {shown_control(control)}".strip()
    with tqdm(total=2 * len(train.layers), desc=name, disable=not progress) as bar:
        _choose(subsets, train, test, y, Cs, fitting, bar)
        _predict(subsets, train, test, y, fixed, fitting, bar)
    rows: list[dict] = []
    predictions, made = {}, []
    for subset in subsets:
        for rule, layer in [("chosen", subset.best), *(("fixed", layer) for layer in fixed)]:
            predictions[len(rows)] = classes[subset.predicted[layer]]
            made.append((layer, *subset.fits[layer]))
            sizes = {"n_train": len(subset.rows), "n_test": len(test.index), "seed": seed}
            rows.append({"control": control, **subset.row(rule, layer), **sizes})
    correct, log_loss = meet_test(predictions, matched(train, test), partial(_losses, made, test))
    bits = [log_loss[row] for row in predictions]
    table = pd.DataFrame(rows)
    table.insert(6, "test_accuracy", [right.mean() for right in correct.values()])
    table.insert(7, "log_loss", [of_row.mean() for of_row in bits])
    used = {(subset.k, subset.draw): train.index[subset.rows] for subset in subsets}
    shares = {k: _overlap([rows for (of_k, _), rows in used.items() if of_k == k]) for k in ks}
    table = table.assign(overlap=table.k.map(shares))
    for _, line_rows in _lines(table):
        both = _spread(line_rows, list(correct.values()))
        table.loc[line_rows.index, BOTH] = both.low_all, both.high_all
    return FewLabelResult(table, used, list(correct.values()), list(predictions.values()), bits)


def _losses(made: Sequence[tuple[int, Fits, int]], test: Features, places: np.ndarray) -> dict[int, np.ndarray]:
    """Held-out bits of each row's fit, `made` of a layer, fits and a place among them; each layer is read once."""
    bits: dict[int, np.ndarray] = {}
    for layer in {layer for layer, *_ in made}:
        x = test.layers[layer]
        of_layer = {row: made[row][1:] for row in range(len(made)) if made[row][0] == layer}
        bits |= {row: bits_of(fits.logits(x, place)[0], places) for row, (fits, place) in of_layer.items()}
    return bits


@dataclass(eq=False)
class _Subset:
    """The k labels per class of one draw, and what was found with them: choices and predictions by layer."""

    k: int
    draw: int
    rows: np.ndarray  # int64 (K * k,), positions in train
    folds: list[Fold]
    rule: str  # how C was chosen, in words
    choices: dict[Layer, ChosenC] = field(default_factory=dict)
    predicted: dict[Layer, np.ndarray] = field(default_factory=dict)  # int64 (N_test,), positions in the classes
    converged: dict[Layer, bool] = field(default_factory=dict)
    fits: dict[Layer, tuple[Fits, int]] = field(default_factory=dict)  # those of a layer, and its place among them

    @classmethod
    def of(cls, labels: np.ndarray, y: np.ndarray, k: int, draw: int, draws: int, seed: int) -> _Subset:
        """Of `labels` (N,), which are y (N,) when they are counted from 0."""
        rows = few_per_class(labels, k, seed=seed, draw=draw, draws=draws)
        return cls(k, draw, rows, *folds_inside(y[rows], k, seed))

    @property
    def best(self) -> Layer:
        return chosen_layer(self.choices)

    def row(self, rule: str, layer: Layer) -> dict:
        """Of the table, but for what test says."""
        choice = self.choices[layer]
        return {
            "k": self.k, "draw": self.draw, "layer_rule": rule, "layer": layer, "C": float(choice.C),
            "C_rule": self.rule, "validation_accuracy": choice.accuracy,
            "converged": self.converged[layer] and choice.converged,
        }  # fmt: skip


def _choose(
    subsets: list[_Subset],
    train: Features,
    test: Features,
    y: np.ndarray,
    Cs: Sequence[float],
    fitting: dict,
    bar: tqdm,
) -> None:
    """The first pass over the layers: of each subset the choice of C for every layer."""
    for layers, x in stacks(train):
        test_layers(layers, x, test)  # says now what would stop the second pass
        for subset in subsets:
            choices = choose_C(x[:, subset.rows], y[subset.rows], subset.folds, Cs, fitting)
            subset.choices |= zip(layers, choices, strict=True)
        bar.update(len(layers))


def _predict(
    subsets: list[_Subset], train: Features, test: Features, y: np.ndarray, fixed: list[Layer], fitting: dict, bar: tqdm
) -> None:
    """The second pass: of each subset a refit of its best layer and of the `fixed` ones, and what they say of test."""
    best = {subset.best for subset in subsets}
    for layers, x in stacks(train):
        tested = {layer: test.layers[layer] for layer in layers if layer in {*best, *fixed}}
        for subset in subsets:
            used = [i for i, layer in enumerate(layers) if layer in (subset.best, *fixed)]
            if not used:
                continue
            Cs = [[subset.choices[layers[i]].C] for i in used]
            fits = fit_logistic(x[used][:, subset.rows], y[subset.rows], Cs, **fitting)
            for fit, layer in enumerate(layers[i] for i in used):
                subset.predicted[layer] = fits.predict(tested[layer], fit)[0]
                subset.converged[layer] = bool(fits.converged[fit, 0])
                subset.fits[layer] = fits, fit
        bar.update(len(layers))
