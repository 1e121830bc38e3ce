"""A probe that is not linear: what a support vector machine with a Gaussian kernel makes of pixels, or of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from joblib import Parallel, delayed
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from igpt_lab.core.arguments import checked
from igpt_lab.core.choice import middle_of_best
from igpt_lab.core.display import MODEL
from igpt_lab.core.progress import tqdm
from igpt_lab.probing.choosing import Fold, folds_of
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import Probed, facts_of, layer_by_layer
from igpt_lab.probing.results import ProbeResult


@checked
def probe_svm(
    train: Features,
    test: Features,
    *,
    Cs: Sequence[float] = (1.0, 10.0, 100.0),
    gammas: Sequence[float] = (0.3, 1.0, 3.0),
    folds: int = 3,
    seed: int = 0,
    control: str = MODEL,
    progress: bool = True,
) -> ProbeResult:
    """scikit-learn's SVC with a Gaussian kernel on features as they are.

    C and gamma of each layer, and the layer, are chosen by cross-validation (ties: the middle one). Then all of train
    is fitted and test is met once. Time and memory grow with the square of the rows: 6,000 need 1 GB.

    Args:
        train, test: Features with labels.
        Cs: Inverse strengths of the penalty to choose from.
        gammas: Of the kernel, to choose from; 1 is scikit-learn's "scale", 1 / (D times the variance of train), so the
            unit of pixels is of no account.
        folds: Stratified ones of train.
        seed: Of the folds.
        control: What the column `control` says.
        progress: Show a bar.

    Returns:
        `ProbeResult`, whose `table` is that of `probe_layers` with `gamma` and without a certificate; `converged` is
        libsvm's own word. There is no `log_loss`, as the machine has no probabilities.

    Raises:
        ValueError: One class alone, train and test of other layers, values that are not finite, a C that is not above
            0, or `folds` below 1.

    Example:
        >>> kernel = lab.probe_svm(train, test, Cs=[1.0], gammas=[1.0], folds=2)
        >>> kernel.table[["layer", "C", "gamma", "n_test"]]
           layer    C  gamma  n_test
        0      0  1.0    1.0     100
        1      1  1.0    1.0     100
        2      2  1.0    1.0     100
        3      3  1.0    1.0     100
    """
    classes, y = np.unique(train.labels, return_inverse=True)
    splits = folds_of(train.labels, folds, seed, train.names)
    held = np.array([len(rows) for _, rows in splits])
    grid = list(product(sorted(Cs), sorted(gammas)))

    def right(kernel: np.ndarray, fold: Fold, C: float, gamma: float) -> int:
        fit, others = fold
        machine = _fitted(kernel[np.ix_(fit, fit)] ** gamma, y[fit], C)
        return int((machine.predict(kernel[np.ix_(others, fit)] ** gamma) == y[others]).sum())

    def probe(x: np.ndarray, tested: list[np.ndarray]) -> Iterator[Probed]:
        for values, others in zip(x, tested, strict=True):
            unit = 1 / (values.shape[1] * values.var(dtype=np.float64) or 1)
            kernel = rbf_kernel(values, gamma=unit)  # its powers are those of other gammas
            jobs = [delayed(right)(kernel, fold, C, gamma) for C, gamma in grid for fold in splits]
            fits = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(jobs)  # libsvm lets other threads run
            bar = tqdm(fits, "choose C and gamma", len(jobs), unit="fit", leave=False, disable=not progress)
            scores = np.fromiter(bar, float, len(jobs)).reshape(len(grid), -1) / held
            place = int(middle_of_best(scores.mean(1)))
            C, gamma = grid[place]
            machine = _fitted(kernel**gamma, y, C)
            predicted = classes[machine.predict(rbf_kernel(others, values, gamma=gamma * unit))]
            row = {"C": C, "gamma": gamma, "validation_accuracy": float(scores[place].mean())}
            yield row | {"converged": machine.fit_status_ == 0}, predicted, scores[place], None

    return layer_by_layer(train, test, probe, facts_of(splits, control, seed), progress)


def _fitted(kernel: np.ndarray, y: np.ndarray, C: float) -> SVC:
    return SVC(C=C, kernel="precomputed", cache_size=500).fit(kernel, y)
