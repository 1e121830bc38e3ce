"""Targets beyond the class: how well a ridge regression on each layer predicts numbers about an image.

For standardised features x and a target y a fit minimises, over weights w and an intercept b,

    sum over rows of (y - x w - b)^2  +  alpha |w|^2,

which is scikit-learn's objective. Alpha is the one with the least squared error when each row in turn is left out,
which has a closed form (Allen, 1974; Golub, Heath and Wahba, 1979): with the singular value decomposition X = U S V'
of the centred features and the shrinkage f = S^2 / (S^2 + alpha), the residual of a row that is left out is
(y - its fit) / (1 - 1/N - sum over j of f_j U_ij^2). So one decomposition of a layer serves all strengths and targets.

Letters: N rows, D features, R = min(N, D), Y targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from igpt_lab.core.arguments import checked
from igpt_lab.core.display import MODEL, card, line, shown_control
from igpt_lab.core.progress import tqdm
from igpt_lab.core.values import check_finite
from igpt_lab.probing.features import Features, as_array, as_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALPHAS = tuple(np.logspace(-3, 7, 21).tolist())
N_BOOT = 2_000  # draws of test images, the same for all layers and targets
LARGEST = 1e100  # of a target: the squares of such numbers, and the sums of these, are finite
Layers = Features | Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class TargetResult:
    """`table`: a row for each target and layer; `predicted`: (layer, target) -> float64 (N_test,).

    `chosen`: target -> the layer of the highest `validation_r2`, which test images have no part in.
    """

    table: pd.DataFrame
    predicted: dict[tuple, np.ndarray]
    chosen: dict[str, Any]

    def __repr__(self) -> str:
        return line("TargetResult", self._facts())

    def _repr_html_(self) -> str:
        return card("TargetResult", self._facts())

    def plot(self, **options) -> Axes:
        """R² over depth: `options` are arguments of `lab.figures.target_curves`, such as `ax`."""
        from igpt_lab import figures

        return figures.target_curves(self.table, **options)

    def _facts(self) -> dict[str, str]:
        rows = self.table[self.table.chosen].set_index("target")
        best = {
            name: f"R² {row.test_r2:.2f} [{row.low:.2f}, {row.high:.2f}] at layer {row.layer}"
            for name, row in rows.iterrows()
        }
        images = f"{int(self.table.n_train.iloc[0]):,} train, {int(self.table.n_test.iloc[0]):,} test"
        return {"control": shown_control(self.table.control.iloc[0]), **best, "images": images}


@checked
def probe_targets(
    train: Layers,
    test: Layers,
    train_targets: Any,
    test_targets: Any,
    *,
    alphas: Sequence[float] = ALPHAS,
    control: str = MODEL,
    seed: int = 0,
    progress: bool = True,
) -> TargetResult:
    """Ridge regressions of every layer on numbers about its images, with no labels: several targets at once.

    Alpha of each layer and target is chosen by leaving out one training image at a time, in closed form: the same fits
    as scikit-learn's `RidgeCV` on standardised features. A layer is decomposed once for all targets.

    Args:
        train, test: Features, `StoredLayers`, or layer -> (N, D); `StoredLayers` need no labels.
        train_targets, test_targets: Numbers in the order of the images: a table with a column per target, such as that
            of `image_properties`, a dict of arrays (N,), or one array (N,).
        alphas: Strengths of the penalty to choose from.
        control: What the column `control` says.
        seed: Of the bootstrap.
        progress: Show a bar.

    Returns:
        `TargetResult`, whose `table` has a row per target and layer: `control`, `layer`, `target`; `alpha`, and
        `at_edge` where it is the first or last of `alphas`; `validation_r2`, of the training images, each left out in
        turn; `test_r2`, 1 less the squared error as a share of the variance of the test images, with its 95% interval
        `low`, `high` by a bootstrap over these; `chosen`, the target's layer of the highest `validation_r2`;
        `n_train`, `n_test`, `n_features`, `seed`. R² is 1 at best and has no lower bound.

    Raises:
        ValueError: Other layers in test than in train, another number of targets than of images, a column that is not
            of finite numbers or has one value alone, or alphas that are not above 0.
        TypeError: What is neither features nor layers by number.

    Example:
        >>> numbers = [lab.image_properties(split, model.processor) for split in (train_tokens, tokens)]
        >>> probed = lab.probe_targets(train, test, *numbers)
        >>> probed.table[["layer", "target", "n_train", "n_test"]].iloc[3:6]
           layer          target  n_train  n_test
        3      0      brightness      200     100
        4      0        contrast      200     100
        5      0  high_frequency      200     100
    """
    sides = [as_layers(side) for side in (train, test)]
    wanted, tested = _table_of(train_targets, "train"), _table_of(test_targets, "test")
    for what, ours, theirs in (("layers", *sides), ("targets", wanted, tested)):
        if list(ours) != list(theirs):
            raise ValueError(f"{what} of train: {list(ours)}, of test: {list(theirs)}; expected the same")
    grid = np.array(sorted(alphas), float)
    if not (grid > 0).all():
        raise ValueError(f"alpha={grid[0]}; expected numbers above 0")
    rows, errors = [], []
    predicted: dict[tuple, np.ndarray] = {}
    y, y_test = wanted.to_numpy(float), tested.to_numpy(float)
    for layer in tqdm(sides[0], desc=f"targets {shown_control(control)}".strip(), disable=not progress):
        x, x_test = (
            _matrix(sides[0][layer], layer, len(y), "train"),
            _matrix(sides[1][layer], layer, len(y_test), "test"),
        )
        if x.shape[1] != x_test.shape[1]:
            widths = f"{x.shape[1]} features in train, {x_test.shape[1]} in test"
            raise ValueError(f"layer {layer} has {widths}; expected the same")
        fit = fit_ridge(x, y, grid)
        guess = fit.predict(x_test)
        errors.append((y_test - guess) ** 2)
        for i, name in enumerate(wanted):
            predicted[layer, name] = guess[:, i]
            facts = {"control": control, "layer": layer, "target": name, "alpha": float(fit.alphas[i])}
            facts |= {"at_edge": len(grid) > 1 and fit.alphas[i] in (grid[0], grid[-1])}
            sizes = {"n_train": len(x), "n_test": len(x_test), "n_features": x.shape[1], "seed": seed}
            rows.append(facts | {"validation_r2": float(fit.validation_r2[i])} | sizes)
    return _result(rows, np.stack(errors), y_test, predicted, seed)


def _result(rows: list[dict], errors: np.ndarray, y: np.ndarray, predicted: dict, seed: int) -> TargetResult:
    """Rows with R² of squared errors (L, N, Y) of test targets (N, Y), and which layer is each target's."""
    value, low, high = (ends.ravel() for ends in r2_with_interval(errors, y, seed=seed))
    table = pd.DataFrame(rows)
    best = table.groupby("target").validation_r2.transform("max")
    first = table[table.validation_r2 == best].drop_duplicates("target").index
    table.insert(6, "test_r2", value)
    table.insert(7, "low", low)
    table.insert(8, "high", high)
    table.insert(9, "chosen", table.index.isin(first))
    chosen = table[table.chosen].set_index("target").layer.to_dict()
    return TargetResult(table, predicted, chosen)


@dataclass(frozen=True, eq=False)
class Ridge:
    """Fits of Y targets: `weights` (D, Y) of features less `mean` (D,), `intercepts` and `alphas` (Y,).

    `validation_r2` (Y,): 1 less the squared error of the rows when each is left out, as a share of the variance.
    """

    weights: np.ndarray
    mean: np.ndarray
    intercepts: np.ndarray
    alphas: np.ndarray
    validation_r2: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Features (N, D) -> float64 (N, Y)."""
        return (x - self.mean) @ self.weights + self.intercepts


def fit_ridge(x: np.ndarray, y: np.ndarray, alphas: np.ndarray) -> Ridge:
    """Ridge regressions of targets y (N, Y) on x (N, D), standardised, each with the alpha that leaving out chooses."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean, middle = x.mean(0), y.mean(0)
    scale = np.where(x.std(0) > 1e-6 * np.abs(mean), x.std(0), 1)  # 1 for a feature that varies by rounding alone
    left, values, right = np.linalg.svd((x - mean) / scale, full_matrices=False)
    squares, seen = values**2, left.T @ (y - middle)
    leverage = left**2
    losses = []
    for alpha in alphas:
        shrink = squares / (squares + alpha)
        residuals = y - middle - left @ (shrink[:, None] * seen)
        losses.append(np.square(residuals / (1 - 1 / len(x) - leverage @ shrink)[:, None]).mean(0))
    best = np.argmin(losses, axis=0)
    chosen = alphas[best]
    weights = right.T @ (values[:, None] / (squares[:, None] + chosen) * seen) / scale[:, None]
    return Ridge(weights, mean, middle, chosen, 1 - np.min(losses, axis=0) / y.var(0))


def r2_with_interval(errors: np.ndarray, y: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R² of squared errors (L, N, Y) of targets y (N, Y), and the ends of its 95% interval, each (L, Y).

    A percentile bootstrap over images, whose draws are the same for all layers and targets: the variance of the
    targets is that of the images drawn. Where it is 0 in more than one draw of 40, as of few images, the interval has
    no lower end: -inf.
    """
    n, generator = len(y), np.random.default_rng(seed)
    y = y - y.mean(0)
    value = 1 - errors.mean(1) / y.var(0)
    parts = np.concatenate([errors.transpose(1, 0, 2).reshape(n, -1), y, y**2], axis=1)
    draws = []
    for size in [len(part) for part in np.array_split(np.arange(N_BOOT), 20)]:
        means = generator.multinomial(n, np.full(n, 1 / n), size) @ parts / n
        lost, first, second = np.split(means, [-2 * y.shape[1], -y.shape[1]], axis=1)
        draws.append(1 - lost.reshape(size, *value.shape) / np.maximum(second - first**2, 1e-300)[:, None])
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975], axis=0)
    return value, np.where(low < -LARGEST, -np.inf, low), high


def _matrix(x: np.ndarray, layer: Any, n: int, split: str) -> np.ndarray:
    """A layer of a split as float64 (n, D), checked."""
    x = as_array(x).astype(np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"layer {layer} has shape {x.shape}; expected (N, D), a row for each image")
    if len(x) != n:
        raise ValueError(
            f"the targets of {split} have {n} rows, layer {layer} has {len(x)} images there; expected a row for each"
        )
    check_finite(f"layer {layer}", x)
    return x


def _table_of(targets: Any, split: str) -> pd.DataFrame:
    """Targets as a table of finite numbers, each column with two values or more."""
    table = _as_table(targets, split)
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise ValueError(f"the targets of {split} have {twice!r} more than once; expected a name for each")
    if table.empty:
        raise ValueError(f"the targets of {split} have shape {table.shape}; expected a column or more, a row per image")
    for name in table:
        if (kind := table[name].dtype).kind in "cmM":
            raise ValueError(f"target {name!r} of {split} is {kind}; expected real numbers")
        numbers = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
        if not np.isfinite(numbers).all():
            wrong = int((~np.isfinite(numbers)).sum())
            raise ValueError(f"target {name!r} of {split} has no finite number in {wrong} rows; leave it or them out")
        if np.ptp(numbers) == 0:
            raise ValueError(f"target {name!r} has one value in all {len(table)} images of {split}; leave it out")
        largest = np.abs(numbers).max()
        if largest > LARGEST or np.ptp(numbers) < 1 / LARGEST:
            raise ValueError(f"target {name!r} of {split} has values up to {largest:g}, whose squares are no float64")
    return table.astype(float)


def _as_table(targets: Any, split: str) -> pd.DataFrame:
    """Targets of any kind as a table; ValueError where they are not a number or a row for each image."""
    if isinstance(targets, pd.Series):
        targets = targets.to_frame(targets.name if targets.name is not None else "target")
    if isinstance(targets, Mapping):
        columns = {name: as_array(column) for name, column in targets.items()}
        if wrong := {name: column.shape for name, column in columns.items() if column.ndim != 1}:
            raise ValueError(f"targets of {split} have the shapes {wrong}; expected (N,) of each")
        targets = pd.DataFrame(columns)
    if isinstance(targets, pd.DataFrame):
        return targets.reset_index(drop=True)
    values = as_array(targets)
    if values.ndim not in (1, 2) or not values.size:
        what = f"{type(targets).__name__} of shape {values.shape}"
        raise ValueError(f"the targets of {split} are a {what}; expected (N,), (N, targets), a dict or a table")
    names = [f"target {i}" for i in range(values.shape[1])] if values.ndim == 2 else ["target"]
    return pd.DataFrame(values.reshape(len(values), -1), columns=names)
