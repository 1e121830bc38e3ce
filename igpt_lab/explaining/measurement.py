"""What an instrument measured: its table, and for each row the values of the test images, for paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import mean_interval

UNCHANGED = (None, None, None)  # the key of the model as it is, where each row is of a changed one
CORRECT = "correct"  # behind a key: whether a probe is right, where the row's own values are something else


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """`table`, and `of_images`: a row's key -> float64 (N,), the values of its main measure for each test image.

    A key is what the row has in the columns `keys`, as plain Python values. What else there are keys for, the
    instrument says.
    """

    table: pd.DataFrame
    of_images: dict[tuple, np.ndarray]
    keys: tuple[str, ...]

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table.to_html()

    @checked
    def contrast(self, weights: Mapping[tuple, float], *, alpha: float = 0.05) -> dict[str, float]:
        """Mean over images of the sum of weight times value, with its t interval: `value`, `low`, `high`, `n`."""
        total = self.weighted(weights)
        value, low, high = map(float, mean_interval(total, alpha=alpha))
        return {"value": value, "low": low, "high": high, "n": len(total)}

    def weighted(self, weights: Mapping[tuple, float]) -> np.ndarray:
        """The sum of weight times value, float64 (N,), paired over images.

        Raises ValueError for no key at all, one that was not measured, and values that are no numbers.
        """
        if not weights:
            raise ValueError("weights are empty; expected a number for one key or more")
        for key in weights:
            if key not in self.of_images:
                raise ValueError(f"{self._named(key)} was not measured; measured are {self._measured()}")
            if missing := int((~np.isfinite(self.of_images[key])).sum()):
                raise ValueError(f"{self._named(key)} has no finite value in {missing} images; leave this key out")
        return np.sum([weight * self.of_images[key] for key, weight in weights.items()], axis=0)

    def _named(self, key: tuple) -> str:
        named = ", ".join(f"{name} {value}" for name, value in zip(self.keys, key, strict=False))
        return ", ".join([named, *map(str, key[len(self.keys) :])])

    def _measured(self) -> str:
        """The values of each column of keys, in a line."""
        return "; ".join(f"{name} {', '.join(map(str, self.table[name].unique()))}" for name in self.keys)
