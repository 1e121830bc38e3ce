"""The benchmarks' harness: medians in turns, ratios, a process a contestant, and the files of a quick run."""

import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import igpt_lab as lab
from benchmarks import explaining, gpu, harness
from benchmarks import explaining_peers as peers
from igpt_lab.features.planning import flops

ROOT = Path(__file__).resolve().parents[1]


def holder(megabytes):
    """Maker of a call that holds so much memory and returns how often it was called."""
    calls = []

    def call():
        calls.append(np.ones(megabytes * 2**17))
        del calls[:-1]
        call.count = getattr(call, "count", 0) + 1
        return call.count

    return call


def failing():
    raise ValueError("no such setting")


def test_calls_are_in_turns():
    order = []
    results = harness.in_turns({name: partial(order.append, name) for name in "abc"}, 3)
    assert order == list("abc") * 3 and list(results) == list("abc")
    values = iter([(3.0, "x", 1.0), (9.0, "y", 2.0), (1.0, "z", 3.0)])
    assert harness._medians({"a": lambda: next(values)}, 3)["a"] == harness.Result(3.0, "z", 3.0)


def slow(file):
    """Maker that takes half a second and writes down when; so does its call."""

    def call():
        begun = time.monotonic()
        time.sleep(0.5)
        with file.open("a") as lines:
            lines.write(f"{begun} {time.monotonic()}\n")

    call()
    return call


def test_nothing_of_a_contestant_runs_beside_another(tmp_path):
    harness.race(dict.fromkeys("ab", partial(slow, tmp_path / "times")), 1, warm=0)
    times = [float(word) for word in (tmp_path / "times").read_text().split()]
    assert len(times) == 8 and times == sorted(times)


def test_contestants_have_their_own_process(capfd):
    makers = {"small": partial(holder, 1), "large": partial(holder, 200), "broken": failing}
    results = harness.race(makers, 2, optional=["broken"])
    assert list(results) == ["small", "large"]
    assert "without broken: ValueError: no such setting" in capfd.readouterr().err
    assert results["small"].value == 3  # one call to warm up, two measured
    assert 150 < results["large"].peak - results["small"].peak < 450
    with pytest.raises(RuntimeError, match="(?s)broken: .*no such setting"):
        harness.race({"broken": failing}, 1)


def test_one_model_at_a_time_has_the_memory_while_the_best_batch_is_looked_for():
    class Call:
        def __call__(self):
            pass

    made, alive = [], []

    def make(folder, dtype, count, batch, device):
        alive.append(sum(call() is not None for call in made))
        if batch == 256:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
        call = Call()
        made.append(weakref.ref(call))
        return call

    assert gpu.at_best_batch(make, None, False)() in gpu.BATCHES and set(alive) == {0}


def test_the_device_that_is_named_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setenv("IGPT_LAB_DEVICE", "cuda:1")
    monkeypatch.setattr(harness, "best_device", torch.device)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    harness.use_device()
    assert chosen == [1]


def test_ratio_is_above_one_where_we_are_better():
    assert harness.row("", "speed", "", 6.0, 2.0, "p", runs=1)["ratio"] == 3
    assert harness.row("", "time", "", 2.0, 6.0, "p", runs=1, less=True)["ratio"] == 3
    assert np.isnan(harness.row("", "distance", "", 2.0, runs=1)["ratio"])


def test_flops_against_torch_own_count():
    config = lab.ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=8, n_layer=3, n_head=2)
    model = lab.ImageGPTForCausalImageModeling(config).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, dtype=torch.long), output_attentions=True)  # attention written out, T x T
    assert flops(config, head=True, square=True) == counter.get_total_flops()
    attention = 4 * 3 * 8 * 16 * 16
    assert flops(config) == flops(config, square=True) - attention * (1 - 17 / 32)


@pytest.mark.slow
def test_a_quick_run_leaves_its_table(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "benchmarks", "pixels", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table, text = pd.read_csv(tmp_path / "pixels.csv"), (tmp_path / "pixels.md").read_text()
    assert list(table.columns) == "case metric unit ours peer peer_name ratio runs".split()
    assert len(table) >= 4 and np.allclose(table.ratio, table.ours / table.peer, rtol=1e-3)
    assert text.count("\n| ImageGPTImageProcessorPil") == 4 and " threads, torch " in text.splitlines()[-1]
    assert text.rstrip().endswith("`make bench BENCH=pixels ARGS=--quick`")


@pytest.fixture
def setting(tiny_folder, tmp_path):
    """Six random images of the tiny model."""
    return explaining.Setting("tiny", str(tiny_folder), 6, str(tmp_path), runs=1)


def test_every_instrument_of_explaining_is_measured():
    parts = {"edit", "skip", "mean_of", "resample", "derangement", "window", "linear_readout", "probe_slices"}
    whole = {"explain", "answer", "check"}  # instruments together, and no instrument
    scores = {"measure_states", "score_layers", "regret"}  # of a layer without labels
    offered = {name for name, home in lab._HOME.items() if home.startswith("explaining.") and name.islower()}
    assert {name.partition(",")[0] for name in explaining.INSTRUMENTS} == offered - parts - whole - scores


@pytest.mark.skipif(not explaining.CLEAR.exists(), reason="only Linux tells the largest memory since a moment")
def test_memory_of_an_instrument_is_above_what_was_before(setting, monkeypatch):
    held = np.ones(400 * 2**17)
    instruments = {f"{size}": (explaining.MANY, lambda case, size=size: np.ones(size * 2**17)) for size in (1, 200)}
    monkeypatch.setattr(explaining, "INSTRUMENTS", instruments)
    small, large = (explaining.measured(name, setting)() for name in instruments)
    assert small < 50 and 150 < large < 300 and len(held)


@pytest.mark.parametrize("batch", [1, 4])
def test_peers_of_explaining_give_our_numbers(setting, batch):
    pytest.importorskip("transformers")
    port = explaining.port_of(setting)
    for whole in (True, False):
        ours, theirs = explaining.lens_of_ours(setting, whole)(), peers.lens_of_port(port, whole, batch)()
        assert ours.shape == theirs.shape == (4, 4 if whole else 1)
        np.testing.assert_allclose(ours, theirs, atol=explaining.AGREE["nats"])
    ours, theirs = explaining.attention_of_ours(setting)(), peers.attention_of_port(port, batch)()
    np.testing.assert_allclose(ours, theirs, atol=explaining.AGREE[explaining.RELATIVE])


def test_a_wrong_name_is_told():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "pixel"], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "no benchmark 'pixel'; there are home, pixels, extract, probes, sample, train" in done.stderr
    )
