"""Devices by name: what this machine has, or one line that lists it."""

import threading
import time

import numpy as np
import pytest
import torch

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.core.devices import best_device, drawing, precision, without_autocast
from igpt_lab.models.losses import losses_of


def test_devices_by_name(monkeypatch):
    assert best_device(None) == best_device() and best_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", torch.device("cuda", 1)):
        assert best_device(name) == torch.device(name)
    for name in ("gpu", "cuda:2", "mps", "meta", "cuda:x", "", [1], "x" * 1000):
        with pytest.raises(
            ValueError, match="there is no device .*; expected one of this machine: cpu, cuda:0, cuda:1$"
        ):
            best_device(name)
    assert best_device("mps", here=False).type == "mps"


@pytest.mark.skipif(best_device().type != "cpu", reason="a machine without an accelerator is meant")
def test_a_device_that_is_not_there_is_one_line(tiny_folder, tiny, train, tmp_path, capsys):
    for name in ("gpu", "cuda", "cuda:1"):
        words = f"there is no device {name!r}; expected one of this machine: cpu"
        options = ["--store", str(tmp_path / "s"), "--device", name]
        assert cli.main(["extract", str(tiny_folder), train.source["name"], *options]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"igpt-lab: {words}"
        for call in (
            lambda name=name: lab.check(tiny, device=name),
            lambda name=name: lab.extract(tiny, train, device=name),
        ):
            with pytest.raises(ValueError, match=words):
                call()


def test_draws_of_two_threads_follow_from_their_seeds_and_leave_those_of_the_process():
    def draw(seed, drawn):
        for _ in range(20):
            with drawing(torch.device("cpu"), seed):
                drawn.append(torch.rand(3))
                time.sleep(0.001)
                drawn.append(torch.rand(3))

    alone, at_once = [[], []], [[], []]
    before = torch.get_rng_state()
    for seed, drawn in enumerate(alone):
        draw(seed, drawn)
    threads = [threading.Thread(target=draw, args=(seed, drawn)) for seed, drawn in enumerate(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(torch.stack(one), torch.stack(other)) for one, other in zip(alone, at_once, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0]) and not torch.equal(alone[0][0], alone[0][1])


def test_a_block_has_the_precision_that_is_asked_for_whatever_is_on_around_it():
    cpu, x = torch.device("cpu"), torch.rand(2, 2)
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            with precision(cpu):
                assert (x @ x).dtype == torch.float32
            with precision(cpu, bfloat16=True):
                assert (x @ x).dtype == torch.bfloat16
            with without_autocast():
                assert (x @ x).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu") == on
    with precision(torch.device("meta")):  # where there is no autocast
        pass


def test_what_is_measured_does_not_depend_on_the_user_s_autocast(tiny, train, test):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((40, 6)).astype(np.float32), np.arange(40) % 2
    tokens = generator.integers(tiny.config.n_colours, size=(6, tiny.config.n_positions))
    features = lab.Features({0: x, 1: x[:, ::-1] ** 3}, y)
    quiet = {"progress": False}
    measures = {
        "losses": lambda: losses_of(tiny, tokens),
        "lens": lambda: lab.logit_lens(tiny, tokens, **quiet),
        "attribution": lambda: lab.attribute(tiny, tokens, **quiet),
        "attention": lambda: lab.attention_maps(tiny, tokens, **quiet).table,
        "states": lambda: lab.measure_states(tiny, tokens, **quiet).table,
        "features": lambda: lab.features_of(tiny, tokens, layer=2, **quiet),
        "samples": lambda: lab.sample(tiny, 2, seed=0, **quiet).log_p,
        "fits": lambda: np.asarray(lab.fit_logistic(x, y, [0.1, 1.0]).weights),
        "probes": lambda: lab.probe_layers(features, features, folds=2, **quiet).table,
        "neighbours": lambda: lab.probe_neighbours(features, features, ks=[1, 3], folds=2, **quiet).table,
        "alignment": lambda: lab.cka(features, **quiet),
        "tokens": lambda: lab.tokenize(test, tiny.processor, **quiet),
    }
    for name, measure in measures.items():
        alone = measure()
        with torch.autocast("cpu", torch.bfloat16):
            inside = measure()
        told = [value.tolist() if isinstance(value, np.ndarray) else value.to_csv() for value in (alone, inside)]
        assert told[0] == told[1], name
