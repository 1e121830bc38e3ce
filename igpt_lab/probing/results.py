"""What a probe of layers returns, and the chosen layer against the last."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import Choice, choice_of, compare_choice
from igpt_lab.core.chosen import difference_in_words
from igpt_lab.core.depth import in_depth, layers_of
from igpt_lab.core.display import Summary, card, line, p_number, percent, shown_control, span, spark
from igpt_lab.core.significance import compare
from igpt_lab.probing.features import check_known

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """`table`: a row a layer; `correct`: layer -> bool (N_test,); `chosen`: the layer that validation chose.

    A layer is a number, or a name.

    `predicted`: layer -> labels (N_test,), what the probe says. `folds`: float64 (K, L), accuracies of the layers, in
    the table's order, on the rows that each of K folds held out. `log_loss`: layer -> float64 (N_test,), -log2 of the
    probability that the probe gives to the image's class, in bits; none of a probe without probabilities. `rows`: the
    digest of the features and training labels that it is of, "" where that is not known.
    """

    table: pd.DataFrame
    correct: dict[Any, np.ndarray]
    chosen: Any
    predicted: dict[Any, np.ndarray] = field(default_factory=dict)
    folds: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    log_loss: dict[Any, np.ndarray] = field(default_factory=dict)
    rows: str = ""

    @property
    def choice(self) -> Choice:
        """The chosen layer, and how sure the choice is."""
        return choice_of(
            layers_of(self.table.layer), self.table.validation_accuracy.to_numpy(), int(self.table.n_validation.iloc[0])
        )

    def __repr__(self) -> str:
        return line("ProbeResult", self._facts())

    def _repr_html_(self) -> str:
        values, facts = self.table.test_accuracy.tolist(), self._facts()
        curve = spark(values, self.table.layer.tolist().index(self.chosen), words="test accuracy over layers")
        return card("ProbeResult", facts, below=curve if len(values) > 1 else "")

    def summary(self) -> Summary:
        """Test accuracy of the chosen, the first and the last layer in percent, as `85.5 [84.4, 86.6]`; `to_latex`."""
        table = self.table.set_index("layer")
        depth = in_depth(table.index)
        places = {"chosen layer": self.chosen}
        places |= {"first layer": depth[0], "last layer": depth[-1]} if len(depth) > 1 else {}
        rows = {name: table.loc[layer] for name, layer in places.items()}
        words = [percent(row.test_accuracy, row.low, row.high) for row in rows.values()]
        named = {"": list(rows), "layer": list(places.values()), "test accuracy (%), 95% interval": words}
        return Summary(pd.DataFrame(named))

    def plot(self, **options) -> Axes:
        """The layer curve, as `lab.figures.layer_curve` plots it: `options` are its arguments, such as `ax`."""
        from igpt_lab import figures

        return figures.layer_curve(self.table, **options)

    def _facts(self) -> dict[str, str]:
        table, choice = self.table.set_index("layer"), self.choice
        chosen, last = table.loc[self.chosen], in_depth(table.index)[-1]
        failed = table.index[~table.converged.astype(bool)]
        accuracies = {
            layer: f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]"
            for layer, row in table.loc[[self.chosen, last]].iterrows()
        }
        near = span(choice.within_error) if len(choice.within_error) > 1 else ""
        return {
            "control": shown_control(self.table.control.iloc[0]),
            "chosen layer": f"{self.chosen} of {span(table.index)}, by validation: {accuracies[self.chosen]}",
            "within one standard error": near,
            "last layer": f"{last}: {accuracies[last]}" if last != self.chosen else "",
            "may be the best": span(table.index[table.in_peak_set.astype(bool)]),
            "beware": choice.words(),
            "not converged": span(failed),
            "images": f"{int(chosen.n_train):,} train, {int(chosen.n_test):,} test",
        }


@dataclass(frozen=True)
class Comparison:
    """Chosen layer against last on the same test images; `difference` of accuracies with two 95% intervals.

    Where the two are one layer, `low` and `high` are 0: nothing is compared.

    `low`, `high`: over test images, with the layers as they are. `choice_low`, `choice_high`: over the folds that chose
    the layer and test images together; nan where another layer was named. `only_chosen`, `only_last`: test images that
    only one of the two gets right. `p_value`: McNemar's exact test.
    """

    chosen_layer: int | str
    last_layer: int | str
    chosen_accuracy: float
    last_accuracy: float
    difference: float
    low: float
    high: float
    choice_low: float
    choice_high: float
    only_chosen: int
    only_last: int
    n_test: int
    p_value: float

    def __repr__(self) -> str:
        return line("Comparison", self._facts())

    def _repr_html_(self) -> str:
        return card("Comparison", self._facts())

    def summary(self) -> Summary:
        """Both accuracies in percent, their difference in points with its interval, p and images; `to_latex`."""
        rows = {
            f"layer {self.chosen_layer} (%)": f"{100 * self.chosen_accuracy:.1f}",
            f"layer {self.last_layer} (%)": f"{100 * self.last_accuracy:.1f}",
            "difference (points), 95% interval": percent(self.difference, self.low, self.high, sign="+"),
            "p (McNemar's exact test)": f"{self.p_value:.2g}",
            "test images": f"{self.n_test:,}",
        }
        return Summary(pd.DataFrame({"": list(rows), "test accuracy": list(rows.values())}))

    def _facts(self) -> dict[str, str]:
        return {
            "chosen layer": f"{self.chosen_layer}: {self.chosen_accuracy:.1%}",
            "last layer": f"{self.last_layer}: {self.last_accuracy:.1%}",
            "difference": difference_in_words(self.to_dict()),
            "only one right": f"{self.only_chosen:,} images the chosen, {self.only_last:,} the last",
            "p": f"{p_number(self.p_value)} (McNemar's exact test, {self.n_test:,} test images)",
        }

    def to_dict(self) -> dict:
        """Its fields by name, as `layer_curve` takes them."""
        return asdict(self)


@checked
def compare_layers(
    result: ProbeResult,
    layer: int | str | None = None,
    last: int | str | None = None,
    *,
    n_boot: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """The paired test of a layer against another.

    p, intervals and their sources: `significance.compare` and `choice.compare_choice`.

    Args:
        result: What `probe_layers` gave.
        layer: By default the chosen one.
        last: By default the last one.
        n_boot: Bootstrap draws.
        seed: Of these.

    Returns:
        `Comparison`: accuracies and their difference as fractions. `low` and `high` are 95% over test images,
        `choice_low` and `choice_high` with the choice of the layer too (NaN for a layer that was not chosen).

    Raises:
        ValueError: A layer that the result has not.

    Example:
        >>> comparison = lab.compare_layers(result, layer=1)
        >>> comparison.chosen_layer, comparison.last_layer, comparison.n_test
        (1, 3, 100)
    """
    layer = result.chosen if layer is None else layer
    last = in_depth(result.correct)[-1] if last is None else last
    check_known([layer, last], result.correct)
    paired = compare(result.correct[layer], result.correct[last], n_boot=n_boot, seed=seed)
    low, high = (0.0, 0.0) if layer == last else (paired.low, paired.high)
    ends = (math.nan, math.nan)
    if layer == result.chosen and result.folds.size:
        ends = compare_choice(result.correct, result.folds, last, n_boot=n_boot, seed=seed)
    return Comparison(
        chosen_layer=layer, last_layer=last, chosen_accuracy=paired.accuracy_a, last_accuracy=paired.accuracy_b,
        difference=paired.difference, low=low, high=high, choice_low=ends[0], choice_high=ends[1],
        only_chosen=paired.only_a, only_last=paired.only_b, n_test=paired.n_test, p_value=paired.p_value,
    )  # fmt: skip
