"""Two Dask workers with one thread each against one such worker: the same store, start-up not counted."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import igpt_lab as lab
from benchmarks.extract import QUICK, S, write_model
from benchmarks.harness import row
from igpt_lab.features import prepared
from igpt_lab.features.store import FeatureStore

ROWS = 4  # of a part, so that each worker has several


def rows(quick: bool) -> Iterator[dict]:
    from distributed import Client, LocalCluster

    config, count, runs = (QUICK, 32, 1) if quick else (dataclasses.replace(S, n_layer=4), 48, 2)
    prepared.ROWS, taken, stores = ROWS, {1: [], 2: []}, {}
    with tempfile.TemporaryDirectory() as temporary:
        model, tokens = Path(temporary) / "model", Path(temporary) / "random_teX.npy"
        write_model(config, model)
        np.save(tokens, np.random.default_rng(0).integers(config.n_colours, size=(count, config.n_positions)))
        for run in range(runs):
            for workers in (1, 2):
                with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0,
                                  silence_logs="CRITICAL") as pool, Client(pool) as client:  # fmt: skip
                    client.run(torch.set_num_threads, 1)
                    warm(model, tokens, Path(temporary) / f"warm-{run}-{workers}", pool.scheduler_address)
                    begun = time.perf_counter()
                    store = extracted(model, tokens, Path(temporary) / f"{run}-{workers}", pool.scheduler_address)
                    seconds = time.perf_counter() - begun
                    stores[workers] = {p.name: p.read_bytes() for p in sorted(store.path.rglob("*.parquet"))}
                    taken[workers].append(seconds)
    if stores[1] != stores[2]:
        raise SystemExit("one worker and two do not give the same bytes")
    one, two = (float(np.median(taken[workers])) for workers in (1, 2))
    case = f"{config.n_layer} x {config.n_embd}, float32, N = {count}, one thread a worker"
    yield row(case, "time of two workers", "s", two, one, "ours, one worker", runs=runs, less=True)
    yield row(case, "time of two workers", "of one worker's", two / one, runs=runs)


def warm(model: Path, tokens: Path, store: Path, scheduler: str) -> None:
    """Every worker imports torch and loads the model once."""
    extracted(model, tokens, store, scheduler, limit=2 * ROWS)


def extracted(model: Path, tokens: Path, store: Path, scheduler: str, limit: int | None = None) -> FeatureStore:
    """The store of at most `limit` images; the workers open the model again for each, which is counted."""
    images = lab.load_images(tokens, "test", limit=limit)
    return lab.extract_on_cluster(model, images, store=store, scheduler=scheduler, device="cpu", progress=False)
