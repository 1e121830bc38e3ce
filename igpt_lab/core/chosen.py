"""The layer that validation chose, in words: from tables and json, for figures, reports, cards and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from igpt_lab.core.choice import Choice, choice_of
from igpt_lab.core.depth import layers_of
from igpt_lab.core.display import span

OLDER = {  # names in json files written when the chosen layer was called the best
    "best_layer": "chosen_layer",
    "best_accuracy": "chosen_accuracy",
    "best_interval": "chosen_interval",
    "only_best": "only_chosen",
}


def with_new_names(facts: Mapping) -> dict:
    """A comparison or a summary, of any age, with the names of today."""
    return {OLDER.get(name, name): value for name, value in facts.items()}


def choice_in(rows: pd.DataFrame) -> Choice | None:
    """How sure a choice is, by `rows` of one table of probes, a row a layer; None where the table does not say.

    Tables of earlier versions have no `n_validation`.
    """
    if not {"layer", "validation_accuracy", "n_validation"} <= set(rows) or rows.empty:
        return None
    accuracies, counts = (pd.to_numeric(rows[name], "coerce") for name in ("validation_accuracy", "n_validation"))
    if not accuracies.between(0, 1).all() or not np.isfinite(counts).all() or counts.min() < 1:
        return None
    return choice_of(layers_of(rows.layer), accuracies.to_numpy(float), int(counts.iloc[0]))


def about_choice(rows: pd.DataFrame) -> list[str]:
    """Of rows as for `choice_in`: which layers are within one standard error, and what is wrong with a poor choice.

    Empty where the table does not say, and where there is nothing to say.
    """
    choice = choice_in(rows)
    if choice is None:
        return []
    near = f"within one standard error: {span(choice.within_error)}" if len(choice.within_error) > 1 else ""
    return [words for words in (near, choice.words()) if words]


def difference_in_words(comparison: Mapping) -> str:
    """+4.0 points [3.0, 5.1] over test images, [2.6, 5.3] with the choice; of a comparison without a choice less.

    Where the chosen layer is the last one, that it is.
    """
    if "chosen_layer" in comparison and comparison["chosen_layer"] == comparison.get("last_layer"):
        return "none, as the chosen layer is the last"
    difference, low, high = (100 * comparison[name] for name in ("difference", "low", "high"))
    words = f"{difference:+.1f} points [{low:.1f}, {high:.1f}]"
    ends = [comparison.get(name) for name in ("choice_low", "choice_high")]
    known = [f"{100 * end:.1f}" for end in ends if isinstance(end, int | float) and math.isfinite(end)]
    return words if len(known) < 2 else f"{words} over test images, [{', '.join(known)}] with the choice"
