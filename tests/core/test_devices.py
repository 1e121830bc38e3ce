"""Devices by name: what this machine has, or one line that lists it."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import igpt_lab as lab
from conftest import TINY
from igpt_lab.app import cli
from igpt_lab.core.devices import best_device, drawing, gains_by_bfloat16, precision, without_autocast
from igpt_lab.features import settings
from igpt_lab.features.runner import is_out_of_memory
from igpt_lab.features.settings import ExtractionSettings
from igpt_lab.models.losses import losses_of
from igpt_lab.training.settings import PretrainConfig


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


@pytest.mark.parametrize(("known", "gains"), [("amx_bf16", True), ("avx512_bf16", False), ("avx2", False)])
def test_features_are_in_bfloat16_on_a_cpu_with_amx_and_on_cuda(monkeypatch, known, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {known: True})
    monkeypatch.setattr(settings, "gains_by_bfloat16", gains_by_bfloat16)
    for name, dtype in (("cpu", "bfloat16" if gains else "float32"), ("cuda", "bfloat16"), ("mps", "float32")):
        assert ExtractionSettings().settled(TINY, torch.device(name)).dtype == dtype
        assert ExtractionSettings(dtype="float32").settled(TINY, torch.device(name)).dtype == "float32"


@pytest.mark.parametrize(("known", "gains"), [("avx512_bf16", True), ("avx2", False)])
def test_training_is_in_bfloat16_on_a_cpu_that_multiplies_it_and_on_cuda(monkeypatch, known, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {known: True})
    for name, dtype in (("cpu", "bfloat16" if gains else "float32"), ("cuda", "bfloat16"), ("mps", "float32")):
        assert PretrainConfig(steps=1, warmup=0).settled(TINY, torch.device(name)).dtype == dtype


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


class TwoDevices:
    """As `torch.cuda` has them: `manual_seed` is of the current device."""

    def __init__(self):
        self.current, self.generators = 0, [torch.Generator().manual_seed(number) for number in range(2)]

    def get_rng_state(self, device):
        return self.generators[device.index].get_state()

    def set_rng_state(self, state, device):
        self.generators[device.index].set_state(state)

    def manual_seed(self, number):
        self.generators[self.current].manual_seed(number)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_draws_on_a_device_that_is_not_the_current_one_follow_from_the_seed(monkeypatch):
    module, drawn = TwoDevices(), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    before = [generator.get_state() for generator in module.generators]
    for _ in range(2):
        with drawing(torch.device("cuda", 1), 5):
            drawn.append(torch.rand(3, generator=module.generators[1]))
    assert torch.equal(*drawn)
    for generator, state in zip(module.generators, before, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_mps_draws_without_naming_its_device(monkeypatch):
    generator = torch.Generator()
    module = SimpleNamespace(
        get_rng_state=generator.get_state, set_rng_state=generator.set_state,
        manual_seed=generator.manual_seed,
    )  # fmt: skip
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    before = generator.get_state()
    with drawing(torch.device("mps"), 5):
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)


def test_the_words_of_an_accelerator_without_memory():
    full = "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB). Tried to allocate 512.00 MB."
    assert is_out_of_memory(RuntimeError(full)) and is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
