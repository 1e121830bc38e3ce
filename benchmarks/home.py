"""The main job: features of every layer and their probes, by `igpt-lab probe` and by a script written by hand.

The script takes transformers' model and image processor and scikit-learn's logistic regression, from the same images to
the same quantities: means of the normed states of every layer, start token in front, and for each layer the accuracy on
the test images of a probe of standardised features, whose strength a tenth of the training images chooses. It has the
batch size and dtype, the processor and the solver that are fastest for it, which are measured first and are not in its
time; nor is decoding the images. It fits as many layers at once as there are cores, a process of one thread each.

`igpt-lab probe` computes in float32, or in bfloat16 on a CPU with AMX, chooses by ten folds in place of one tenth,
probes raw pixels too, compares layers and writes figure and tables, all of which is in its time. Only untrained
networks and permuted labels, its other controls, are left out. README's lines of Python do that without raw pixels. Two
rows are of functions of ours that do what the script does and no more: features in bfloat16 where that is the script's
fastest, and one tenth held out. Peak memory is of the main process, without the script's workers.
"""

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import igpt_lab as lab
from benchmarks.extract import peer_name
from benchmarks.harness import race, row
from benchmarks.probes import sklearn_version
from igpt_lab.app import cli
from igpt_lab.core.hub import resolve
from igpt_lab.probing.probes import CS

MODEL, IMAGES = "fashion-xs", "fashion-mini"
BATCHES, DTYPES, SOLVERS = (8, 32, 128), ("float32", "bfloat16"), ("lbfgs", "newton-cholesky")
PROCESSORS = ("ImageGPTImageProcessorPil", "ImageGPTImageProcessor")
TRIAL = 256  # images of which each setting of the script is measured


def rows(quick: bool) -> Iterator[dict]:
    size = (100, [0, 20]) if quick else (None, list(range(21)))
    makers: dict[str, Callable] = {
        "ours": partial(ours, *size), "alike": partial(alike, *size), "script": partial(script, *size)
    }  # fmt: skip
    results = race(makers if quick else makers | {"README": lines_of_readme}, 1, warm=0)
    table, seconds = results["ours"].value
    accuracies, of_script, settings = results["script"].value
    probes = zip(table.itertuples(), accuracies, strict=True)
    inside = [probe.low <= accuracy <= probe.high for probe, accuracy in probes]
    used = f"{settings['features']}; scikit-learn {sklearn_version()}, {settings['probes']}"
    peer = f"a script by hand: {peer_name()}, {used}"
    case = f"{MODEL}, {table.n_train.iloc[0] + table.n_test.iloc[0]:,} images, {len(table)} layers"
    for stage in ("features", "probes"):
        yield row(case, f"time of {stage}", "s", seconds[stage], of_script[stage], peer, runs=1, less=True)
    for stage, taken in results["alike"].value.items():
        metric = f"time of {stage}, as the script does it"
        yield row(case, metric, "s", taken, of_script[stage], peer, runs=1, less=True)
    yield row(case, "time", "s", sum(seconds.values()), sum(of_script.values()), peer, runs=1, less=True)
    same = "accuracies of the script that lie in our 95% intervals"
    yield row(case, same, f"of {len(inside)} layers", float(sum(inside)), runs=1)
    if "README" in results:
        yield row(case, "time of README's lines of Python", "s", results["README"].seconds, runs=1)
    yield row(case, "peak memory", "MB", results["ours"].peak, results["script"].peak, peer, runs=1, less=True)


# Makers: each is called in a process of its own. Their calls return accuracies and the seconds of each stage.


def ours(limit: int | None, layers: list[int]) -> Callable:
    """The command, and the rows of its table that are the model's."""

    def call() -> tuple[pd.DataFrame, dict[str, float]]:
        begun, extract = time.perf_counter(), lab.extract
        taken: list[float] = []
        lab.extract = lambda *inputs, **options: _timed(taken, extract, *inputs, **options)
        with tempfile.TemporaryDirectory() as folder:
            command = ["probe", MODEL, IMAGES, "--untrained", "0", "--permutations", "0", "--device", "cpu"]
            command += ["--layers", *map(str, layers)] + ([] if limit is None else ["--limit", str(limit)])
            if cli.main([*command, "--store", f"{folder}/stores", "--out", f"{folder}/out"]):
                raise RuntimeError("igpt-lab probe failed")
            table = pd.read_csv(f"{folder}/out/probe.csv")
        rest = time.perf_counter() - begun - taken[0]
        return table[table.control == "model"], {"features": taken[0], "probes": rest}

    return call


def alike(limit: int | None, layers: list[int]) -> Callable:
    """The same quantities as the script's: products in bfloat16 where the processor gains by it, one tenth held out."""
    model = lab.load_model(MODEL)
    images = [lab.load_images(IMAGES, split, limit=limit) for split in ("train", "test")]
    for split in images:
        split.images()  # decoded, as the script's are

    def call() -> dict[str, float]:
        taken: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            options = {"layers": layers, "dtype": "bfloat16", "store": folder, "device": "cpu"}
            store = _timed(taken, lab.extract, model, images, **options)
            train, test = (lab.Features.from_store(store, split) for split in ("train", "test"))
            _timed(taken, lab.probe_layers, train, test, folds=1, device="cpu")
        return dict(zip(("features", "probes"), taken, strict=True))

    return call


def script(limit: int | None, layers: list[int]) -> Callable:
    """The script, with the settings that are fastest; these in words are the third thing that it returns."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = resolve(MODEL)
    model = transformers.ImageGPTModel.from_pretrained(folder).eval()
    splits = [lab.load_images(IMAGES, split, limit=limit) for split in ("train", "test")]
    pictures = [images.images() for images in splits]
    y, y_test = (images.labels for images in splits)
    few = pictures[0][:TRIAL]
    processors = [getattr(transformers, name).from_pretrained(folder) for name in PROCESSORS]
    processor = _fastest({kind: partial(encode, kind, few) for kind in processors})
    ids = encode(processor, few)
    settings = [(dtype, batch) for dtype in DTYPES for batch in BATCHES]
    dtype, batch = _fastest({setting: partial(features, model, ids, *setting) for setting in settings})
    x = features(model, ids, dtype, batch)[:, 0]
    solver = _fastest({name: partial(fit, name, x, y[: len(x)], 1.0) for name in SOLVERS})

    def call() -> tuple[list[float], dict[str, float], dict[str, str]]:
        taken: list[float] = []
        train, test = (
            _timed(taken, lambda split=split: features(model, encode(processor, split), dtype, batch))
            for split in pictures
        )
        jobs = [delayed(probe)(solver, train[:, i], y, test[:, i], y_test) for i in layers]
        accuracies = _timed(taken, Parallel(n_jobs=os.cpu_count()), jobs)
        words = {"features": f"{type(processor).__name__}, batch {batch}, {dtype}", "probes": solver}
        return accuracies, {"features": taken[0] + taken[1], "probes": taken[2]}, words

    return call


def lines_of_readme() -> Callable:
    """The Python of README, in a folder of its own."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            exec(code, {})

    return call


def encode(processor, pictures: list) -> np.ndarray:
    """Palette indices (N, T), so many images at a time that all their distances fit into the caches."""
    batches = [pictures[start : start + 16] for start in range(0, len(pictures), 16)]
    return np.concatenate(
        [np.asarray(processor(images=images)["input_ids"]).reshape(len(images), -1) for images in batches]
    )


@torch.inference_mode()
def features(model, ids: np.ndarray, dtype: str, batch: int) -> np.ndarray:
    """Means of the normed states of every layer, (N, L + 1, D)."""
    sos = np.full((len(ids), 1), model.config.vocab_size - 1)
    inputs = torch.as_tensor(np.concatenate([sos, ids[:, :-1]], 1))
    pooled = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for part in inputs.split(batch):
            *states, last = model(part, output_hidden_states=True, use_cache=False).hidden_states
            normed = [block.ln_1(state) for block, state in zip(model.h, states, strict=True)]
            pooled.append(torch.stack([state.float().mean(1) for state in (*normed, last)], 1))
    return torch.cat(pooled).numpy()


def probe(solver: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Accuracy on the test images, with the strength that a tenth of the training images chooses."""
    with threadpool_limits(1):
        rest, held, y_rest, y_held = train_test_split(x, y, test_size=0.1, stratify=y, random_state=0)
        right = [fit(solver, rest, y_rest, C).score(held, y_held) for C in CS]
        return float(fit(solver, x, y, CS[int(np.argmax(right))]).score(x_test, y_test))


def fit(solver: str, x: np.ndarray, y: np.ndarray, C: float):
    """Standardised features and a regression that is let end by its own tolerance."""
    with warnings.catch_warnings(action="ignore"):
        return make_pipeline(StandardScaler(), LogisticRegression(C=C, solver=solver, max_iter=1000)).fit(x, y)


def _timed(taken: list[float], call: Callable, *inputs, **options):
    """What the call returns; its seconds are added to the list."""
    begun = time.perf_counter()
    value = call(*inputs, **options)
    taken.append(time.perf_counter() - begun)
    return value


def _fastest(calls: dict):
    """The key of the call that takes the least time, each called twice."""
    seconds: dict = {}
    for key, call in calls.items():
        for _ in range(2):
            taken: list[float] = []
            _timed(taken, call)
            seconds[key] = taken[0]
    return min(seconds, key=seconds.__getitem__)
