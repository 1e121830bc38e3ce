"""Devices by name: what this machine has, or one line that lists it."""

import threading
import time

import pytest
import torch

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.core.devices import best_device, drawing


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
