"""Extraction on real worker processes against the local engine: the same bytes, whatever is done to the workers."""

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from igpt_lab.core import cluster
from igpt_lab.features import prepared, writing
from igpt_lab.features.extraction import extract, extract_share
from igpt_lab.features.manifest import FeatureKey, StoreError, read_manifest
from igpt_lab.features.on_cluster import extract_on_cluster
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.upkeep import verify
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.loading import load_images
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.streaming import probe_on_cluster, probe_streaming

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]
LOCAL = {"device": "cpu", "progress": False}


def files(store):
    """All of a store, by name."""
    paths = [path for path in store.path.rglob("*") if path.is_file()]
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 10)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """600 images of 4 x 4 pixels."""
    folder, generator = tmp_path_factory.mktemp("images") / "many" / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(600):
        Image.fromarray(generator.integers(0, 256, (4, 4), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder.parent


@pytest.fixture(scope="module")
def two_workers():
    """A cluster that outlives a driver: address, and the object that holds it."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0, silence_logs="CRITICAL"
    ) as pool:
        yield pool


def processes(pool):
    return [nanny.process.pid for nanny in pool.workers.values() if nanny.process and nanny.process.pid]


class Given:
    """Work for `cluster.run`: a function of this file."""

    def __init__(self, function):
        self.function = function

    def open(self):
        return self.function


def squared(number, folder):
    """Of 3 the first worker fails for want of room; 5 is wrong itself; 17 hangs, the first time."""
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{number}\n")
    calls = (Path(folder) / "calls").read_text().split().count(str(number))
    if number == 3 and calls == 1:
        raise OSError(28, "No space left on device")
    if number == 5:
        raise ValueError("row 17 is no image")
    if number == 17 and calls == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return number**2


def squares(numbers, folder, pool):
    """(name, result) of each of these numbers, with no deadline of its own."""
    tasks = [(f"task {n}", (n, str(folder))) for n in numbers]
    return cluster.run(Given(squared), tasks, scheduler=pool.scheduler_address, workers=2)


def test_what_fails_for_its_own_reason_is_told_after_the_rest(two_workers, tmp_path):
    results = {}
    with pytest.raises(cluster.ClusterError, match="(?s)1 failed, all others.*task 5: ValueError: row 17 is no image"):
        for name, result in squares(range(10), tmp_path, two_workers):
            results[name] = result
    assert results == {f"task {n}": n**2 for n in range(10) if n != 5}
    assert sorted((tmp_path / "calls").read_text().split()) == sorted("01233456789")


def test_what_hangs_goes_elsewhere(two_workers, tmp_path, monkeypatch):
    """The deadline comes when nothing but the stopped worker's task is left, however long that takes."""

    def limit(run):
        stopped = (psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in processes(two_workers))
        return 0 if not run.banned and len(run.begun) == 1 and any(stopped) else math.inf

    monkeypatch.setattr(cluster._Run, "limit", limit)
    results = dict(squares(range(12, 20), tmp_path, two_workers))
    assert results == {f"task {n}": n**2 for n in range(12, 20)}
    calls = (tmp_path / "calls").read_text().split()
    assert sorted(calls) == sorted([*map(str, range(12, 20)), "17"])


def test_a_deadline_is_the_one_that_was_given():
    run = cluster._Run(None, Given(squared), 1, 12)
    assert run.limit() == 12
    run.deadline, run.seconds = None, [1.0, 2.0, 60.0]
    assert run.limit() == 600
    run.seconds = [50.0, 60.0, 70.0]
    assert run.limit() == 1200


def test_the_bytes_are_those_of_the_local_engine(tiny, train, test, tmp_path, two_workers):
    options = {"scheduler": two_workers.scheduler_address, **LOCAL}
    local = extract(tiny, [train, test], store=tmp_path / "local", **LOCAL)
    there = extract_on_cluster(tiny, [train, test], store=tmp_path / "dask", **options)
    assert files(there) == files(local) and len(files(local)) == 11
    assert sorted(path.name for path in (tmp_path / "dask").iterdir()) == [there.path.name, "tokens"]
    before = {path: path.stat().st_mtime_ns for path in there.path.rglob("*.parquet")}
    there.part("train", 2).write_bytes(b"damaged")
    assert files(extract_on_cluster(tiny, [train, test], store=tmp_path / "dask", **options)) == files(local)
    after = {path: path.stat().st_mtime_ns for path in there.path.rglob("*.parquet")}
    assert [path for path in before if before[path] != after[path]] == [there.part("train", 2)]


def test_shares_on_a_cluster_by_the_new_call_and_by_the_old_one(tiny, train, tmp_path, two_workers):
    options = {"store": tmp_path / "dask", "scheduler": two_workers.scheduler_address, **LOCAL}
    some = extract_on_cluster(tiny, train, share=(1, 2), **options)
    assert [some.has("train", number) for number in range(6)] == [True, False] * 3
    with pytest.warns(DeprecationWarning, match=r"extract\(engine=, part=, scheduler=\).* use lab.extract_on_cluster"):
        whole = extract(tiny, train, engine="dask", part=(2, 2), **options)
    assert files(whole) == files(extract(tiny, train, store=tmp_path / "local", **LOCAL))


def test_probes_on_workers_are_those_of_one_process(tiny, train, test, tmp_path, two_workers):
    store = extract(tiny, [train, test], store=tmp_path, **LOCAL)
    features = [Features.from_store(store, split) for split in ("train", "test")]
    options = {"scheduler": two_workers.scheduler_address, "progress": False}
    quick = {"steps": 30, "batch_size": 16, "learning_rates": (1.0, 0.1), "device": "cpu"}
    for here, there in (
        (probe_layers(*features, progress=False), probe_on_cluster(store, **options)),
        (probe_streaming(store, progress=False, **quick), probe_on_cluster(store, **options, **quick)),
    ):
        pd.testing.assert_frame_equal(there.table, here.table, check_dtype=False, rtol=1e-3, atol=1e-5)
        assert there.chosen == here.chosen and list(there.predicted) == list(here.predicted)
        assert all((there.predicted[layer] == here.predicted[layer]).all() for layer in here.predicted)
    with pytest.raises(KeyError, match="has no layers"):
        probe_on_cluster(store, layers=[9], **options)


def test_other_weights_images_and_versions_are_refused(tiny, tiny_folder, train, tmp_path, two_workers, monkeypatch):
    options = {"store": tmp_path, "scheduler": two_workers.scheduler_address, **LOCAL}
    tiny.transformer.h[0].mlp.c_fc.weight.data += 1
    with pytest.raises(cluster.ClusterError, match="(?s)6 failed.*part 0: ValueError: tiny has other weights"):
        extract_on_cluster(tiny, train, **options)
    tiny = load_model(tiny_folder)
    with pytest.raises(cluster.ClusterError, match="is not the same on this worker"):
        extract_on_cluster(tiny, train.select(np.arange(59, -1, -1)), **options)
    monkeypatch.setattr(cluster, "made_by", lambda: {"torch": "1.0"})
    with pytest.raises(cluster.ClusterError, match="torch is 1.0, there"):
        extract_on_cluster(tiny, train, **options)
    held = load_images(train.images(), "train", labels=train.labels, name="mine")
    with pytest.raises(ValueError, match=r"mine train has none: write its splits with images.save\('FOLDER/train.parq"):
        extract_on_cluster(tiny, held, **options)
    tiny.source = None
    with pytest.raises(ValueError, match="workers load the model by its name"):
        extract_on_cluster(tiny, train, **options)


def test_a_bad_image_is_told_with_its_part_and_row_after_the_others(tiny_folder, tmp_path, two_workers):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for i in range(40):
        Image.new("L", (4, 4), i).save(folder / f"{i:02d}.png")
    (folder / "17.png").write_bytes(b"no image")
    images = load_images(tmp_path / "images", "train")
    options = {"store": tmp_path / "s", "scheduler": two_workers.scheduler_address, **LOCAL}
    with pytest.raises(cluster.ClusterError, match="(?s)1 failed.*train part 1: ValueError: images train row 17 "):
        extract_on_cluster(tiny_folder, images, **options)
    assert len(list((tmp_path / "s").glob("tiny-*/train/*.parquet"))) == 3
    skipping = extract_on_cluster(
        tiny_folder, images, on_bad_image="skip", **options | {"store": tmp_path / "skipping"}
    )
    local = extract(tiny_folder, images, store=tmp_path / "l", on_bad_image="skip", **LOCAL)
    assert files(skipping) == files(local) and list(skipping.skipped("train").row) == [17]


def test_a_store_begun_by_another_version_is_refused(tiny, train, tmp_path, monkeypatch):
    real = writing.made_by()
    extract_share(tiny, train, store=tmp_path, share=(1, 3), **LOCAL)
    for name in ("torch", "code"):
        monkeypatch.setattr(writing, "made_by", lambda name=name: real | {name: "older"})
        with pytest.raises(StoreError, match=f"begun by other versions: {name} is older, there .*; finish it with"):
            extract(tiny, train, store=tmp_path, **LOCAL)
    monkeypatch.setattr(writing, "made_by", lambda: real | {"matplotlib": "older"})
    extract(tiny, train, store=tmp_path, **LOCAL)


def test_two_versions_that_begin_at_once_do_not_mix(tiny, train, tmp_path, monkeypatch):
    real = writing.made_by()
    whole = extract(tiny, train, store=tmp_path / "whole", **LOCAL)
    target = StoreWriter.create(tmp_path, FeatureKey(**whole.key), {"train": 6})
    extract_share(tiny, train, store=tmp_path, share=(1, 6), **LOCAL)
    monkeypatch.setattr(writing, "made_by", lambda: real | {"torch": "older"})
    with pytest.raises(StoreError, match="begun by other versions"):
        features = {f"ln_1.{layer}": np.zeros((10, 8), np.float32) for layer in range(4)}
        target.write_part("train", 1, np.arange(10, 20), None, features, {})
    assert not target.part("train", 1).exists()


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_in_any_order_fill_one_store(tiny, train, test, tmp_path, order):
    whole = extract(tiny, [train, test], store=tmp_path / "whole", **LOCAL)
    for number in order:
        with_some = extract_share(tiny, [train, test], store=tmp_path / "shares", share=(number, 3), **LOCAL)
        assert bool(with_some.problems()) == (number != order[-1])
    assert files(with_some) == files(whole)
    with pytest.raises(ValueError, match=r"share=\(4, 3\); expected"):
        extract_share(tiny, train, store=tmp_path, share=(4, 3), **LOCAL)


def test_shares_of_processes_at_once(tiny_folder, many, tmp_path):
    command = [sys.executable, "-m", "igpt_lab", "extract", str(tiny_folder), str(many), "--split", "train"]
    command += ["--dtype", "float32", "--part"]
    paths = tmp_path / "shares", tmp_path / "whole"
    jobs = [subprocess.Popen([*command, f"{i}/2", "--store", str(paths[0])], stderr=subprocess.DEVNULL) for i in (2, 1)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    monkey = extract(tiny_folder, load_images(many, "train"), store=paths[1], **LOCAL)
    shared = FeatureStore.open(next(paths[0].glob("tiny-*")))
    assert verify(shared.path) == []
    np.testing.assert_array_equal(shared.layer("ln_1", 3, "train"), monkey.layer("ln_1", 3, "train"))


def test_twenty_killed_workers(tiny_folder, many, tmp_path, two_workers, monkeypatch):
    images, killed, ended = load_images(many, "train"), [], threading.Event()
    listed, list_part = [], StoreWriter.list_part

    def in_step(self, split, number, entry):
        """However fast the machine is, the twentieth comes before the sixtieth part."""
        listed.append(number)
        until = time.monotonic() + 60
        while len(killed) < len(listed) // 3 and time.monotonic() < until:
            time.sleep(0.01)
        list_part(self, split, number, entry)

    def kill():
        rng = random.Random(0)
        while len(killed) < 20 and not ended.wait(rng.uniform(0.02, 0.3)):
            if alive := processes(two_workers):
                with suppress(psutil.NoSuchProcess):  # its nanny has not seen yet that it is gone
                    victim = psutil.Process(rng.choice(alive))
                    victim.kill()
                    killed.append(victim.pid)
                    psutil.wait_procs([victim], timeout=5)

    monkeypatch.setattr(StoreWriter, "list_part", in_step)
    monkeypatch.setattr(cluster, "DEATHS", 21)  # chance may take one part's worker five times of twenty
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        options = {"scheduler": two_workers.scheduler_address}
        there = extract_on_cluster(tiny_folder, images, store=tmp_path / "dask", **options, **LOCAL)
    finally:
        ended.set()
        killer.join()
    assert len(set(killed)) == 20
    assert verify(there.path) == [] and np.array_equal(there.index("train"), np.arange(600))
    assert files(there) == files(extract(tiny_folder, images, store=tmp_path / "local", **LOCAL))


DRIVER = """
import sys
from igpt_lab import load_images
from igpt_lab.features import prepared
from igpt_lab.features.on_cluster import extract_on_cluster
prepared.ROWS = 10
if __name__ == "__main__":
    model, images, store, address = sys.argv[1:]
    images = load_images(images, "train")
    options = {"scheduler": address, "device": "cpu", "dtype": "float32", "progress": False}
    extract_on_cluster(model, images, store=store, **options)
"""


def test_a_killed_driver_goes_on_where_it_was(tiny_folder, many, tmp_path, two_workers):
    (tmp_path / "driver.py").write_text(DRIVER)
    where = str(tiny_folder), str(many), str(tmp_path / "dask"), two_workers.scheduler_address
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py", *where])
    until = time.monotonic() + 60
    while time.monotonic() < until and len(finished := list(tmp_path.glob("dask/tiny-*/train/*.parquet"))) < 10:
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and 10 <= len(finished) < 60
    listed = FeatureStore(finished[0].parents[1], read_manifest(finished[0].parents[1]))
    done = [listed.part("train", n) for n in range(60) if listed.has("train", n)]
    before = {path: path.stat().st_mtime_ns for path in done}
    assert done and subprocess.run([sys.executable, tmp_path / "driver.py", *where]).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in done}
    local = extract(tiny_folder, load_images(many, "train"), store=tmp_path / "local", **LOCAL)
    assert files(FeatureStore.open(listed.path)) == files(local)


UNGUARDED = """
from igpt_lab.core import cluster
cluster._run = lambda *_: ["it ran"]
def call():
    return cluster.run(None, [])
try:
    call()
except cluster.ClusterError as error:
    print(error)
if __name__ == "__main__":
    print(*call())
"""


def test_a_script_that_its_own_workers_would_run_again_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"{script} line 7 starts worker processes, which import this script: put what it does under "
        '`if __name__ == "__main__":`, or give the address of a scheduler',
        "it ran",
    ], done.stderr


def test_nobody_else_reaches_the_scheduler_that_is_started_here():
    with cluster.connected(None, 1, 1) as client:
        scheduler, workers = client.scheduler.address, list(client.nthreads())
        assert client.submit(abs, -1).result() == 1
        for address in (scheduler, *workers):
            assert address.startswith("tls://127.0.0.1:")
            for other, security in (
                (address.replace("tls:", "tcp:"), None),
                (address, distributed.Security.temporary()),  # a key of its own
                (address, None),
            ):
                with pytest.raises((OSError, TypeError)):  # refused, or nothing to talk TLS with
                    asyncio.run(ask(other, security))


async def ask(address, security):
    """What a scheduler or worker says to a first message."""
    arguments = security.get_connection_args("client") if security else {}
    comm = await distributed.comm.connect(address, timeout=5, **arguments)
    try:
        await comm.write({"op": "identity", "reply": True})
        return await comm.read()
    finally:
        comm.abort()


def private_tmpfs():
    """May this process give a child a disk of its own?"""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not private_tmpfs(), reason="needs user namespaces")
def test_a_full_disk_on_one_worker(tiny_folder, train, tmp_path, capsys):
    target = tmp_path / "dask"
    target.mkdir()
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs="CRITICAL") as pool:
        worker = f"{sys.executable} -m distributed.cli.dask_worker {pool.scheduler_address} --nthreads 1 --no-dashboard"
        full = f"mount -t tmpfs -o size=4k tmpfs {target} && exec {worker}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        jobs = [
            subprocess.Popen(["unshare", "-rm", "sh", "-c", full], **quiet),
            subprocess.Popen(worker.split(), **quiet),
        ]
        try:
            with distributed.Client(pool) as client:
                client.wait_for_workers(2, timeout=60)
            there = extract_on_cluster(tiny_folder, train, store=target, scheduler=pool.scheduler_address, **LOCAL)
        finally:
            for job in jobs:
                job.terminate()
                job.wait(30)
    assert "No space left on device" in capsys.readouterr().err
    assert files(there) == files(extract(tiny_folder, train, store=tmp_path / "local", **LOCAL))


def test_without_distributed_all_else_works_and_the_error_says_what_to_install(tiny_folder, tiny_images, tmp_path):
    (tmp_path / "distributed.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path(__file__).parents[2]))])
    command = [sys.executable, "-m", "igpt_lab", "extract", tiny_folder, tiny_images, "--store", tmp_path / "s"]
    for extra, code in (((), 0), (("--engine", "dask", "--random"), 1)):
        done = subprocess.run([*command, *extra], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "pip install 'distributed>=2025.1' 'cryptography>=42'" in done.stderr and "Traceback" not in done.stderr
