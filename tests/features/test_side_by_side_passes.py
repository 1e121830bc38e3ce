"""Forward passes side by side: the bits of those one after another, and in turn where others listen."""

import threading

import numpy as np
import pytest
import torch

import igpt_lab as lab
from igpt_lab.core import side_by_side
from igpt_lab.explaining import readouts
from igpt_lab.explaining.attentive import states_of
from igpt_lab.features.hooks import Pooled

TOKENS = np.random.default_rng(0).integers(0, 8, (20, 16))
OPTIONS = {"device": "cpu", "batch_size": 3, "progress": False}


@pytest.fixture
def side_by_side_from(monkeypatch):
    """A function that sets the size from which on passes run side by side, in two threads; it returns who ran one."""
    before, run = torch.get_num_threads(), Pooled.run

    def chosen(least: int) -> set[int]:
        ran: set[int] = set()
        monkeypatch.setattr(side_by_side, "LEAST", least)
        monkeypatch.setattr(
            Pooled, "run", lambda *inputs, **named: (ran.add(threading.get_ident()), run(*inputs, **named))
        )
        torch.set_num_threads(2)
        return ran

    yield chosen
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_and_statistics_are_the_same_bits(tiny, train, tmp_path, side_by_side_from, dtype):
    stores, here = [], threading.get_ident()
    for name, least in (("in turn", 2**18), ("side by side", 1)):
        ran = side_by_side_from(least)
        stores.append(
            lab.extract(tiny, train, store=tmp_path / name, points=["ln_1", "mlp_out"], dtype=dtype, **OPTIONS)
        )
        assert ran == {here} if least > 1 else ran and here not in ran
    in_turn, beside = stores
    assert in_turn.part("train", 0).read_bytes() == beside.part("train", 0).read_bytes()
    assert in_turn.stats().equals(beside.stats())


def test_readouts_attentive_probes_and_lenses_see_the_same_bits(tiny, side_by_side_from):
    positions = np.random.default_rng(1).integers(0, 16, (20, 2))
    read, attended, lenses = [], [], []
    for least in (2**18, 1):
        ran = side_by_side_from(least)
        with readouts.tqdm(disable=True) as bar:
            read.append(readouts._states(tiny, TOKENS, positions, [0, 3], 3, "cpu", bar))
        attended.append(states_of(tiny, TOKENS, ("ln_1", [1, 3], "sos"), torch.float32))
        lenses.append(lab.logit_lens(tiny, TOKENS, batch_size=3))
        assert (threading.get_ident() in ran) is (least > 1)
    assert lenses[0].equals(lenses[1]) and torch.equal(*read) and torch.equal(*attended)


@pytest.mark.parametrize("kind", ["skip", "mean", "resample"])
def test_what_is_left_out_costs_the_same_bits(tiny, side_by_side_from, kind):
    measured = []
    for least in (2**18, 1):
        ran = side_by_side_from(least)
        options = {"batch_size": 5, "progress": False}
        of_parts = lab.leave_out(tiny, TOKENS, kind=kind, train_tokens=TOKENS, **options)
        of_windows = lab.windows(tiny, TOKENS, [0, 1], [(0, 1), (1, 2)], **options)
        measured.append(of_parts.of_images | of_windows.of_images)
        assert (threading.get_ident() in ran) is (least > 1 or kind == "mean")
    in_turn, beside = measured
    assert in_turn.keys() == beside.keys() and all(np.array_equal(in_turn[key], beside[key]) for key in in_turn)


def test_a_hook_or_an_edit_of_others_is_never_in_two_threads(tiny, train, tmp_path, side_by_side_from):
    ran, heard = side_by_side_from(1), set()
    handle = tiny.transformer.h[1].register_forward_hook(lambda *_: heard.add(threading.get_ident()))
    lab.extract(tiny, train, store=tmp_path, **OPTIONS)
    handle.remove()
    with lab.edit(tiny, lab.skip(tiny, "mlp", 1)):
        states_of(tiny, TOKENS, ("ln_1", [1, 3], "sos"), torch.float32)
    assert ran == heard == {threading.get_ident()}


def test_a_compiled_model_has_the_same_features(tiny, train, tmp_path, side_by_side_from):
    side_by_side_from(1)
    plain = lab.extract(tiny, train, store=tmp_path / "plain", **OPTIONS)
    tiny.transformer.h[1].compile(backend="eager")
    with pytest.warns(UserWarning, match="without its compiler"):
        compiled = lab.extract(tiny, train, store=tmp_path / "compiled", **OPTIONS)
    assert plain.part("train", 0).read_bytes() == compiled.part("train", 0).read_bytes()


def test_memory_that_runs_out_in_a_thread_halves_the_batches(tiny, train, tmp_path, side_by_side_from, monkeypatch):
    in_turn = lab.extract(tiny, train, store=tmp_path / "all", **OPTIONS)
    side_by_side_from(1)
    run = Pooled.run

    def scarce(pooled, batch, **named):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA")
        run(pooled, batch, **named)

    monkeypatch.setattr(Pooled, "run", scarce)
    store = lab.extract(tiny, train, store=tmp_path / "scarce", **OPTIONS)
    assert in_turn.part("train", 0).read_bytes() == store.part("train", 0).read_bytes()


def test_each_thread_reads_what_it_ran_itself(tiny):
    first, second = torch.from_numpy(TOKENS[:2]), torch.from_numpy(TOKENS[2:4])
    with torch.no_grad(), lab.record(tiny, alignment="sos") as pooled:
        pooled.run(first)
        states = pooled["ln_1"]
        thread = threading.Thread(target=torch.no_grad()(lambda: pooled.run(second)))
        thread.start()
        thread.join()
        assert torch.equal(pooled["ln_1"], states)
