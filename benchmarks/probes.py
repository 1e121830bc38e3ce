"""Logistic regression for 13 layers and six strengths: ours against scikit-learn's, to the same objective.

Features are pooled `ln_1` states of a network of size S's width with random weights (12 blocks, 8 x 8 pixels, bfloat16
products) on 45,000 images of CIFAR-10, extracted once into runs/benchmarks; where ../shared/cifar10 is absent, random
ones of a power-law spectrum. scikit-learn's L-BFGS is stopped at the first evaluation whose objective is within 1e-6 of
the optimum, in float64 (in float32 it does not get there), from the solution of the strength before, in as many
processes of one thread as there are cores, which is faster than one process with all of them. Ours stops by its own
tolerance, and must be within 1e-6 too.
"""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression, _logistic
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import igpt_lab as lab
from benchmarks.extract import key_of
from benchmarks.harness import race, row
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.probing.solvers.logistic import fit_logistic

CIFAR, CACHE = Path(__file__).resolve().parents[2] / "shared/cifar10", Path("runs/benchmarks")
CS, GAP, TOL = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), 1e-6, 1e-5


def rows(quick: bool) -> Iterator[dict]:
    layers, n, width = (2, 300, 8) if quick else (13, 45_000, 512)
    name, path = ("random features", None) if quick or not CIFAR.is_dir() else ("CIFAR-10, random network", CIFAR)
    data = Path(features(path, layers, n, width))
    with np.load(data) as stored:
        y = stored["labels"]
    targets = {layer: optimum(data, layer) for layer in range(layers)}
    yield from whole(data, targets, f"{layers} layers x {len(CS)} strengths, {n:,} x {width}, {name}")
    yield from newton(data, layers // 2, (100, 4) if quick else (6_000, 64))
    yield from growth(data, layers // 2, n, width, int(y.max()) + 1)
    yield from folds((60, 40) if quick else (6_000, 1_000))
    yield from large((300, 3, 8) if quick else (60_000, 25, 512))


def folds(shape: tuple[int, int]) -> Iterator[dict]:
    """What cross-validation costs: `probe_layers` with ten folds against one tenth that is held out."""
    train, test = shape
    images = [lab.load_images("fashion-mini", split, limit=n) for split, n in (("train", train), ("test", test))]
    path = lab.extract("fashion-xs", images, store=CACHE).path
    results = race({"ours": partial(stored, path), "peer": partial(stored, path, 1)}, 1, warm=0)
    case, seconds = (
        f"21 layers of fashion-xs, {train:,} x 96, choice and refit",
        [result.seconds for result in results.values()],
    )
    yield row(case, "time with ten folds", "s", *seconds, "ours, one tenth held out", runs=1, less=True)
    yield row(
        case, "peak memory", "MB", *(result.peak for result in results.values()), "ours, one tenth", runs=1, less=True
    )


def large(shape: tuple[int, int, int]) -> Iterator[dict]:
    """A store that is read a layer at a time: all of `probe_layers`, choice and refit of every layer."""
    n, layers, width = shape
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        path = write_store(Path(folder), n, layers, width)
        result = race({"ours": partial(stored, path)}, 1, warm=0)["ours"]
        case, held = f"store of {n:,} x {layers} layers x {width}, random features", n * layers * width * 4 / 1e6
        yield row(case, "peak memory", "MB", result.peak, held, "its features alone", runs=1, less=True)
        yield row(case, "time", "s", result.seconds, runs=1)
        if not result.value:
            raise SystemExit("a layer of the large store did not converge")


def whole(data: Path, targets: dict[int, np.ndarray], case: str) -> Iterator[dict]:
    makers = {"ours": partial(ours, data, list(targets)), "peer": partial(theirs, data, targets)}
    results = race(makers, 1, warm=0)
    for objectives, target in zip(results["ours"].value[0], targets.values(), strict=True):
        if ((objectives - target) / target > GAP).any():
            raise SystemExit(f"ours ended {((objectives - target) / target).max():.1e} above the optimum")
    peer, seconds = f"scikit-learn {sklearn_version()}, lbfgs", [result.seconds for result in results.values()]
    yield row(case, "time to a gap of 1e-6", "s", *seconds, peer, runs=1, less=True)
    yield row(case, "peak memory, all layers held", "MB", results["ours"].peak, runs=1)
    worst = np.abs(results["ours"].value[1] - results["peer"].value).max()
    yield row(case, "largest difference of training accuracy", "", worst, runs=1)


def newton(data: Path, layer: int, shape: tuple[int, int]) -> Iterator[dict]:
    """Where its Hessian of all weights is small, scikit-learn has Newton's method."""
    makers = {"ours": partial(ours, data, [layer], shape), "peer": partial(cholesky, data, layer, shape)}
    results = race(makers, 3)
    case, peer = f"1 layer x {len(CS)} strengths, {shape[0]:,} x {shape[1]}", "newton-cholesky"
    yield row(case, "time", "s", *(result.seconds for result in results.values()), peer, runs=3, less=True)


def growth(data: Path, layer: int, n: int, width: int, classes: int) -> Iterator[dict]:
    """One layer, a half and a quarter of the rows, the features, the classes, the strengths."""
    full = race({"ours": partial(ours, data, [layer])}, 3)["ours"]
    for what, smaller in {
        "N": [{"shape": (n // 4, width)}, {"shape": (n // 2, width)}],
        "D": [{"shape": (n, width // 4)}, {"shape": (n, width // 2)}],
        "K": [{"classes": 2}, {"classes": max(2, classes // 2)}],
        "strengths": [{"Cs": CS[:1]}, {"Cs": CS[:3]}],
    }.items():
        for change in smaller:
            result = race({"ours": partial(ours, data, [layer], **change)}, 3)["ours"]
            value = {"N": 0, "D": 1}.get(what)
            size = next(iter(change.values())) if value is None else change["shape"][value]
            size = len(size) if what == "strengths" else size
            case = f"1 layer, {what} = {size:,}"
            peer = f"ours, N = {n:,}, D = {width}, K = {classes}, {len(CS)} strengths"
            yield row(case, "time", "s", result.seconds, full.seconds, peer, runs=3, less=True)
            yield row(case, "peak memory", "MB", result.peak, full.peak, peer, runs=3, less=True)


def features(images: Path | None, layers: int, n: int, width: int) -> Path:
    """A file of layers `l0`, `l1`, ... float32 (N, D) and `labels`, made where it is absent."""
    path = CACHE / f"features-{layers}-{n}-{width}{'' if images else '-random'}.npz"
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    if images is None:
        random = np.random.default_rng(0)
        labels, arrays = np.arange(n) % 10, {}
        for layer in range(layers):
            signal = random.standard_normal((10, width))[labels] * 0.1 + random.standard_normal((n, width))
            turn = np.linalg.qr(random.standard_normal((width, width)))[0]
            arrays[f"l{layer}"] = (signal * np.arange(1, width + 1) ** -1.0 @ turn).astype(np.float32)
    else:
        source = lab.load_images(images, "train", limit=n)
        side = 8
        shrunk = [lab.ImageGPTImageProcessorPil(np.zeros((2, 3)), side).resize(batch) for batch in source.batches(500)]
        config = dataclasses.replace(
            lab.SIZES["S"], n_layer=layers - 1, n_positions=side**2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        model = lab.ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(0))
        palette = lab.fit_palette(np.concatenate(shrunk[:4]), config.n_colours)
        model.save_pretrained(CACHE / "random-S")
        lab.ImageGPTImageProcessorPil(palette, side).save_pretrained(CACHE / "random-S")
        store = lab.extract(CACHE / "random-S", source, store=CACHE, dtype="bfloat16")
        labels = store.labels("train")
        arrays = {f"l{layer}": store.layer("ln_1", layer, "train") for layer in range(layers)}
    np.savez(path, labels=labels, **arrays)
    return path


def load(data: Path, layer: int, shape: tuple[int, int] | None = None, classes: int | None = None):
    """Features and labels of a layer, of the first rows, features and classes."""
    with np.load(data) as stored:
        x, y = stored[f"l{layer}"], stored["labels"]
    kept = y < (classes or y.max() + 1)
    rows, width = shape or x.shape
    return x[kept][:rows, :width], y[kept][:rows]


def optimum(data: Path, layer: int) -> np.ndarray:
    """The objectives (S,) at a gradient of 1e-9."""
    fits = fit_logistic(*load(data, layer), CS, tol=1e-9, dtype=torch.float64, max_iter=10_000)
    if not fits.converged.all():
        raise SystemExit(f"layer {layer}: no optimum to compare with, gradients {fits.gradient}")
    return fits.objective[0]


# Makers: each is called in a process of its own.


def ours(data: Path, layers: list[int], shape=None, classes=None, Cs=CS) -> Callable:
    loaded = [load(data, layer, shape, classes) for layer in layers]

    def call() -> tuple[list[np.ndarray], np.ndarray]:
        fits = [fit_logistic(x, y, Cs, tol=TOL) for x, y in loaded]
        right = [(fit.predict(x) == y).mean(1) for fit, (x, y) in zip(fits, loaded, strict=True)]
        return [fit.objective[0] for fit in fits], np.array(right)

    return call


def write_store(root: Path, n: int, layers: int, width: int) -> Path:
    """Train of n rows and test of a tenth, the class in the mean, features of a power-law spectrum."""
    random, size = np.random.default_rng(0), 2000
    key = dataclasses.replace(key_of(n, layers), splits={"train": ("", n), "test": ("", n // 10)})
    means, scale = random.standard_normal((10, width)) * 0.1, np.arange(1, width + 1) ** -1.0
    store = StoreWriter.create(root, key, {"train": -(-n // size), "test": -(-n // 10 // size)})
    for split, count in (("train", n), ("test", n // 10)):
        for number, begin in enumerate(range(0, count, size)):
            index = np.arange(begin, min(begin + size, count))
            features = {
                f"ln_1.{layer}": (random.standard_normal((len(index), width), np.float32) + means[index % 10]) * scale
                for layer in range(layers)
            }
            store.write_part(split, number, index, index % 10, features, dict.fromkeys(features, [0.0, 0.0, 0]))
    return store.path


def stored(path: Path, folds: int = 10) -> Callable:
    """Probes of every layer of a store; did all converge?"""

    def call() -> bool:
        train, test = (lab.Features.from_store(FeatureStore.open(path), split) for split in ("train", "test"))
        return bool(lab.probe_layers(train, test, folds=folds, progress=False).table.converged.all())

    return call


def theirs(data: Path, targets: dict[int, np.ndarray]) -> Callable:
    def call() -> np.ndarray:
        jobs = [delayed(path_to_gap)(data, layer, target) for layer, target in targets.items()]
        return np.array(Parallel(n_jobs=min(len(jobs), os.cpu_count()))(jobs))

    return call


class Reached(Exception):
    """The objective is near enough; the weights."""


def path_to_gap(data: Path, layer: int, target: np.ndarray) -> list[float]:
    """scikit-learn's own calls, stopped at the gap; training accuracy of each strength."""
    x, y = load(data, layer)
    x = StandardScaler().fit_transform(x.astype(np.float64))
    minimise, weights, accuracies = _logistic.optimize.minimize, None, []
    for C, objective in zip(CS, target, strict=True):

        def stopping(loss, start, begin=weights, goal=objective * (1 + GAP), **options):
            def near(w, *arguments):
                value = loss(w, *arguments)
                if value[0] <= goal:
                    raise Reached(w.copy())
                return value

            return minimise(near, start if begin is None else begin, **options)

        _logistic.optimize.minimize = stopping
        try:
            with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
                LogisticRegression(C=C, tol=1e-12, max_iter=20_000).fit(x, y)
            raise SystemExit(f"scikit-learn ended before the gap, at layer {layer}, C={C}")
        except Reached as reached:
            weights = reached.args[0]
        finally:
            _logistic.optimize.minimize = minimise
        scores = weights.reshape(y.max() + 1, -1, order="F")
        accuracies.append(float(((x @ scores[:, :-1].T + scores[:, -1]).argmax(1) == y).mean()))
    return accuracies


def cholesky(data: Path, layer: int, shape: tuple[int, int]) -> Callable:
    x, y = load(data, layer, shape)

    def call() -> None:
        scaled = StandardScaler().fit_transform(x.astype(np.float64))
        with warnings.catch_warnings(action="ignore"):
            for C in CS:
                LogisticRegression(C=C, solver="newton-cholesky").fit(scaled, y)

    return call


def sklearn_version() -> str:
    import sklearn

    return sklearn.__version__
