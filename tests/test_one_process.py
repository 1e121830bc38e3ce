"""A kernel lives for days: calls that are repeated leave memory, files, threads and the process as they were."""

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from matplotlib import pyplot

import igpt_lab as lab

TIMES = 40
CALLS = [
    "load_model", "load_images", "extract again", "extract anew", "features", "probe_layers", "probe_few_labels",
    "compare_layers", "sample", "complete", "surprisal", "figure", "explore", "pretrain", "finetune",
]  # fmt: skip


@pytest.fixture(scope="module")
def calls(tiny_folder, tiny_images, tmp_path_factory):
    """The calls of the main job by name, each as a user repeats it."""
    out = tmp_path_factory.mktemp("out")
    model, quiet = lab.load_model(tiny_folder), {"progress": False}
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    store = lab.extract(model, images, store=out / "stores", **quiet)
    train, test = (lab.Features.from_store(store, split) for split in ("train", "test"))
    result = lab.probe_layers(train, test, **quiet)
    tokens = np.random.default_rng(0).integers(0, 8, (30, 16))
    recipe = lab.PretrainConfig(2, 4, warmup=0, holdout=6, validate=5, compile=False)
    tuning = lab.FinetuneConfig(2, 4, learning_rate=0.01, pad=1, compile=False)
    compiled = replace(recipe, compile=True)
    made = iter(range(10**6))

    def figure():
        curve = lab.figures.layer_curve(result.table)
        lab.figures.save_figure(curve, out / "curve", data=result.table, record=lab.RunRecord("curve", {}, seed=0))

    return {
        "load_model": lambda: lab.load_model(tiny_folder),
        "load_images": lambda: list(lab.load_images(tiny_images, "train")),
        "extract again": lambda: lab.extract(model, images, store=out / "stores", **quiet),
        "extract anew": lambda: lab.extract(model, images, store=out / f"stores-{next(made)}", **quiet),
        "features": lambda: lab.Features.from_store(store, "train"),
        "probe_layers": lambda: lab.probe_layers(train, test, **quiet),
        "probe_few_labels": lambda: lab.probe_few_labels(train, test, ks=[4], draws=1, **quiet),
        "compare_layers": lambda: repr(lab.compare_layers(result)),
        "sample": lambda: lab.sample(model, 4, **quiet),
        "complete": lambda: lab.complete(model, images[1].select([0, 1]), completions=2, **quiet),
        "surprisal": lambda: lab.surprisal(model, tokens, **quiet),
        "figure": figure,
        "explore": lambda: lab.explore(store, out=out, **quiet).close(),
        "pretrain": lambda: lab.pretrain(tokens, model.config, recipe, out / f"run-{next(made)}", **quiet),
        "finetune": lambda: lab.finetune(model, images[0], tuning, out / f"run-{next(made)}", **quiet),
        "compiled": lambda: lab.pretrain(tokens, model.config, compiled, out / f"run-{next(made)}", **quiet),
    }  # fmt: skip


def test_the_calls_are_those_of_the_list(calls):
    assert list(calls) == [*CALLS, "compiled"]


def children_of(task: Path) -> int:
    """Child processes of a thread, which may have ended since it was listed."""
    try:
        return len((task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def held() -> dict[str, int]:
    """What a process holds of its machine, but for memory."""
    tasks = Path("/proc/self/task")
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir(tasks)),
        "children": sum(map(children_of, tasks.iterdir())),
        "figures": len(pyplot.get_fignums()),
        "widgets": len(_instances),
    }


def memory() -> float:
    """Of this process, MB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts what Linux says of a process")
@pytest.mark.parametrize("name", CALLS)
def test_forty_repetitions_hold_no_more_than_the_first(calls, name, capsys):
    for _ in range(TIMES // 4):  # what is loaded and made once
        calls[name]()
    before = held()
    readings = [memory()]
    for _ in range(4):
        for _ in range(TIMES // 4):
            calls[name]()
        readings.append(memory())
    assert {what: (before[what], count) for what, count in held().items() if count > before[what]} == {}
    # A leak grows in every quarter. An allocator takes a larger piece in one of them.
    assert np.median(np.diff(readings)) < TIMES // 4 * 0.1, f"{np.round(readings, 1)} MB after each {TIMES // 4} calls"


def state() -> dict:
    """What belongs to the process, and is the same for all code in it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path), "signals": handlers,
        "hooks": [sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook, sys.gettrace()],
        "recursion": sys.getrecursionlimit(), "collects": [gc.isenabled(), gc.get_threshold()],
        "warnings": list(warnings.filters), "showwarning": warnings.showwarning,
        "logging": [logging.root.level, list(logging.root.handlers), logging.root.manager.disable],
        "random": random.getstate(), "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "numpy errors": np.geterr(),
        "numpy prints": np.get_printoptions(), "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "autocast": torch.is_autocast_enabled("cpu"), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(), "denormal": (torch.tensor([1e-40]) * 1).item(),
        "module hooks": [
            dict(hooks) for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and name.endswith("_hooks")
        ],
        "rcParams": dict(mpl.rcParams), "backend": mpl.get_backend(),
        "pandas": [pd.get_option(name) for name in ("display.max_rows", "display.width", "display.precision")],
        "dynamo": torch._dynamo.config.get_config_copy(), "stance": torch._dynamo.eval_frame._stance.stance,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*CALLS, "compiled"])
def test_a_call_leaves_the_process_as_it_was(calls, name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a C++ compiler
    calls[name]()  # packages that are imported now may do as they like
    before = state()
    calls[name]()
    after = state()
    assert [what for what in before if before[what] != after[what]] == []
