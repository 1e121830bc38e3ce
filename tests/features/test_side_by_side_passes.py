"""Forward passes side by side: the bits of those one after another, and in turn where others listen."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

import igpt_lab as lab
from igpt_lab.core import side_by_side
from igpt_lab.explaining import lenses, passes, readouts
from igpt_lab.explaining.attentive import states_of
from igpt_lab.features.hooks import Pooled
from igpt_lab.models.losses import losses_of

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
    read, attended, tables = [], [], []
    for least in (2**18, 1):
        ran = side_by_side_from(least)
        with readouts.tqdm(disable=True) as bar:
            read.append(readouts._states(tiny, TOKENS, positions, [0, 3], 3, "cpu", bar))
        attended.append(states_of(tiny, TOKENS, ("ln_1", [1, 3], "sos"), torch.float32))
        tables.append(lab.logit_lens(tiny, TOKENS, batch_size=3))
        assert (threading.get_ident() in ran) is (least > 1)
    assert tables[0].equals(tables[1]) and torch.equal(*read) and torch.equal(*attended)


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


def test_an_activation_of_others_is_never_in_two_threads(tiny, side_by_side_from):
    ran, heard = side_by_side_from(1), set()
    plain = tiny.transformer.h[1].mlp.act
    tiny.transformer.h[1].mlp.act = lambda x: (heard.add(threading.get_ident()), plain(x))[1]
    lab.logit_lens(tiny, TOKENS, batch_size=3)
    assert ran == heard == {threading.get_ident()}


def test_what_hangs_on_a_model_and_cannot_be_copied_is_left_alone(tiny, side_by_side_from):
    side_by_side_from(1)
    options = {"parts": ["mlp", "head"], "batch_size": 5, "progress": False}
    plain = lab.leave_out(tiny, TOKENS, **options).table
    tiny.lock, tiny.latest = threading.Lock(), tiny(torch.from_numpy(TOKENS)).logits  # which has a graph
    assert plain.equals(lab.leave_out(tiny, TOKENS, **options).table)


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


def test_where_one_image_in_each_thread_is_too_much_they_go_in_turn(
    tiny, train, tmp_path, side_by_side_from, monkeypatch, capsys
):
    in_turn = lab.extract(tiny, train, store=tmp_path / "all", **OPTIONS)
    side_by_side_from(1)
    run, here = Pooled.run, threading.get_ident()

    def scarce(pooled, batch, **named):
        if len(batch) > 1 or threading.get_ident() != here:
            raise torch.OutOfMemoryError("CUDA")
        run(pooled, batch, **named)

    monkeypatch.setattr(Pooled, "run", scarce)
    store = lab.extract(tiny, train, store=tmp_path / "scarce", **OPTIONS)
    assert in_turn.part("train", 0).read_bytes() == store.part("train", 0).read_bytes()
    assert "continuing with one image at a time" in capsys.readouterr().err


@pytest.mark.parametrize("least", [2**18, 1])
def test_two_threads_on_one_model_have_each_their_own_numbers(tiny, side_by_side_from, least):
    side_by_side_from(least)
    halves = [TOKENS[:10], TOKENS[10:]] * 4

    def lens(tokens):
        return lab.logit_lens(tiny, tokens, batch_size=3, progress=False)

    expected = [lens(tokens) for tokens in halves]
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lens, halves))
    assert all(table.equals(alone) for table, alone in zip(tables, expected, strict=True))


def test_a_recording_that_ends_within_the_pass_of_another_thread_leaves_it_alone(tiny):
    ids, recording = torch.from_numpy(TOKENS[:2]), ExitStack()
    expected = tiny(ids).logits
    handle = tiny.transformer.register_forward_pre_hook(lambda *_: recording.close())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(recording.enter_context, lab.record(tiny, alignment="sos")).result()
        assert torch.equal(tiny(ids).logits, expected)
    handle.remove()


def test_inside_a_recording_all_numbers_are_the_same(tiny, train, tmp_path):
    def numbers(name):
        store = lab.extract(tiny, train, store=tmp_path / name, device="cpu", progress=False)
        return [lab.logit_lens(tiny, TOKENS).nats, losses_of(tiny, TOKENS), store.layer("ln_1", 3, "train")]

    expected = numbers("outside")
    with lab.record(tiny, alignment="sos") as pooled:
        inside = numbers("inside")
        losses_of(tiny, TOKENS[:2])
        states = pooled["ln_1"]
        with pytest.raises(RuntimeError, match="leave the `edit`, `window` or `record` block first"):
            lab.leave_out(tiny, TOKENS, layers=[0])
    assert all(np.array_equal(*pair) for pair in zip(inside, expected, strict=True))
    with torch.no_grad(), lab.record(tiny, alignment="sos") as pooled:
        pooled.run(torch.from_numpy(TOKENS[:2]))
    assert torch.equal(states, pooled["ln_1"])


def test_an_interruption_between_batches_leaves_no_thread(tiny, side_by_side_from, monkeypatch):
    side_by_side_from(1)

    def interrupted(results, **_):
        yield next(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(lenses, "tqdm", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as kept:  # with its frames, as a notebook keeps those of the last error
        lab.logit_lens(tiny, TOKENS, batch_size=2)
    assert set(threading.enumerate()) == before and torch.get_num_threads() == 2 and kept.tb


@pytest.mark.parametrize("threads", [2, 16, 64])
@pytest.mark.parametrize("size", ["S", "M", "L"])
def test_batches_at_once_are_held_by_the_memory_that_is_promised(monkeypatch, size, threads):
    config = lab.SIZES[size]
    with torch.device("meta"):
        model = lab.ImageGPTForCausalImageModeling(replace(config, n_layer=1))
    model.config.n_layer = config.n_layer
    monkeypatch.setattr(type(model), "device", torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layers = config.n_layer + 1
    images, at_most = lenses._sizes(model, layers, None)
    at_once = side_by_side.at_once(model.device, lenses.numbers_of(model, images), at_most)
    of_image = layers * config.n_positions * config.n_embd
    assert images * at_once * of_image <= max(lenses.HELD, of_image)
    images, numbers, at_most = passes.Passes(model, [])._sizes()
    at_once = side_by_side.at_once(model.device, numbers, at_most)
    states = 10 * config.n_embd + 2 * 4 * config.n_embd + 3 * config.n_colours
    assert images * at_once * 4 * config.n_positions * states <= passes.MEMORY
