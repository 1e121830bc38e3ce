"""Parts left out, against laws of the network and passes of the edited model; windows by the same."""

import os
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.ensemble import RandomForestClassifier

import igpt_lab as lab
from conftest import SHARED, assert_means
from igpt_lab.core import side_by_side
from igpt_lab.core.significance import compare
from igpt_lab.explaining.ablations import leave_out, refit_after, windows
from igpt_lab.explaining.edits import edit, window
from igpt_lab.explaining.measurement import CORRECT, UNCHANGED
from igpt_lab.explaining.parts import PARTS, derangement, mean_of, means_of, resample, skip
from igpt_lab.features.hooks import record
from igpt_lab.models.losses import align, losses_of
from igpt_lab.probing.solvers.linear_probe import LinearProbe

TOKENS = np.random.default_rng(0).integers(0, 8, (6, 16))
TRAIN = np.random.default_rng(1).integers(0, 8, (9, 16))
LABELS = np.array([0, 1, 0, 1, 1, 0])
QUIET = {"progress": False}


def states(model, point, layer, tokens=TOKENS):
    with torch.no_grad(), record(model, [point], layers=[layer], pool=lambda x, *_: x.clone(), alignment="sos") as kept:
        kept.run(torch.as_tensor(tokens), use_cache=False)
    return kept[point][:, 0]


@torch.no_grad()
def logits(model, edits=None):
    with edit(model, edits or {}):
        return model(align(torch.as_tensor(TOKENS), "sos", model.config)).logits


def head_of(part):
    return 1 if part == "head" else None


@pytest.mark.parametrize("part", PARTS)
def test_a_part_above_a_layer_changes_none_of_its_features(tiny, part):

    def features():
        """At all layers, of a pass that runs to the end."""
        with torch.no_grad(), record(tiny, ["ln_1"], pool=lambda x, *_: x.clone(), alignment="sos") as kept:
            tiny(torch.as_tensor(TOKENS))
        return kept["ln_1"].unbind(1)

    want = features()
    for skipped in range(3):
        with edit(tiny, skip(tiny, part, skipped, head=head_of(part))):
            same = [one.equal(other) for one, other in zip(features(), want, strict=True)]
        assert same == [layer <= skipped for layer in range(4)]


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_without_the_blocks_from_a_layer_on_its_logit_lens_is_what_the_model_says(tiny, layer):
    """N_f and the head of the un-normed state before the block, bit for bit."""
    edits = {}
    for block in range(layer % 4 if layer < 0 else layer, 3):
        edits |= skip(tiny, "block", block)
    with torch.no_grad():
        want = tiny.lm_head(tiny.transformer.ln_f(states(tiny, "resid_pre", layer)))
    assert logits(tiny, edits).equal(want)


def test_without_its_heads_attention_gives_its_bias(tiny):
    bias = tiny.transformer.h[1].attn.c_proj.bias.detach()
    with edit(tiny, skip(tiny, "head", 1, head=0)):
        got = logits(tiny, skip(tiny, "head", 1, head=1))
    assert got.equal(logits(tiny, {("attn_out", 1): bias.expand_as}))
    assert got.equal(logits(tiny, skip(tiny, "head", 1, head=0) | skip(tiny, "head", 1, head=1)))
    assert not got.equal(logits(tiny, skip(tiny, "attention", 1)))
    bias.zero_()  # as in released weights
    with edit(tiny, skip(tiny, "head", 1, head=0)):
        got = logits(tiny, skip(tiny, "head", 1, head=1))
    assert got.equal(logits(tiny, skip(tiny, "attention", 1)))


def test_without_attention_and_mlp_there_is_no_block(tiny):
    got = logits(tiny, skip(tiny, "attention", 1) | skip(tiny, "mlp", 1))
    assert got.equal(logits(tiny, skip(tiny, "block", 1)))


def test_one_head_left_out_is_its_rows_of_the_output_matrix_set_to_zero(tiny):
    got = logits(tiny, skip(tiny, "head", 2, head=1))
    tiny.transformer.h[2].attn.c_proj.weight.data[4:] = 0
    torch.testing.assert_close(got, logits(tiny))


@pytest.mark.parametrize("part", PARTS)
def test_the_mean_is_that_of_training_images_whatever_the_batch(tiny, part):
    after, before = {
        "block": ("resid_post", "resid_pre"), "attention": ("resid_mid", "resid_pre"),
        "mlp": ("resid_post", "resid_mid"), "head": ("head_out", None),
    }[part]  # fmt: skip
    want = states(tiny, after, 1, TRAIN).double().mean(0)
    want = want if before is None else want - states(tiny, before, 1, TRAIN).double().mean(0)
    for size in (1, 4, 9):
        got = means_of(tiny, TRAIN, [part], batch_size=size, progress=False)[part, 1]
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    edits = mean_of(tiny, part, -2, TRAIN, head=head_of(part), **QUIET)
    with edit(tiny, edits):
        added = states(tiny, after, 1)
        added = added if before is None else added - states(tiny, before, 1)
    columns = slice(4, 8) if part == "head" else slice(None)
    torch.testing.assert_close(added[..., columns].double(), want[..., columns].expand(6, -1, -1), atol=1e-5, rtol=1e-5)
    if part == "head":
        assert added[..., :4].equal(states(tiny, "head_out", 1)[..., :4])


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_image(tiny, part):
    """With every part of a layer that sees the image replaced by the donor's, logits differ from both."""
    donors = derangement(6, seed=3)
    edits = resample(tiny, part, 0, donors, head=head_of(part))
    point = {"block": "resid_post", "attention": "attn_out", "mlp": "mlp_out", "head": "head_out"}[part]
    own = states(tiny, point, 0)
    with edit(tiny, edits):
        got = states(tiny, point, 0)
    if part == "block":
        before = states(tiny, "resid_pre", 0)
        torch.testing.assert_close(got - before, (own - before)[donors])
    elif part == "head":
        assert got[..., 4:].equal(own[donors][..., 4:]) and got[..., :4].equal(own[..., :4])
    else:
        assert got.equal(own[donors])


def test_a_derangement_leaves_none_in_its_place():
    for count in (2, 3, 100):
        for seed in range(20):
            donors = derangement(count, seed=seed)
            assert sorted(donors) == list(range(count)) and (donors != np.arange(count)).all()
    assert not np.array_equal(derangement(100), derangement(100, seed=1))
    with pytest.raises(ValueError, match="1 images; expected two or more"):
        derangement(1)


def edits_of(model, row, kind):
    head = None if pd.isna(row.head) else int(row.head)
    if kind == "mean":
        return mean_of(model, row.part, row.layer, TRAIN, head=head, **QUIET)
    if kind == "resample":
        return resample(model, row.part, row.layer, derangement(6, seed=5), head=head)
    return skip(model, row.part, row.layer, head=head)


@pytest.mark.parametrize("kind", ["skip", "mean", "resample"])
def test_the_table_is_what_passes_of_the_edited_model_give(tiny, kind):
    probe = LinearProbe().fit(states(tiny, "ln_1", 2).mean(1).numpy(), LABELS)
    options = {"probe": probe, "probe_layer": 2, "labels": LABELS, "batch_size": 4, "seed": 5}
    measured = leave_out(tiny, TOKENS, kind=kind, train_tokens=TRAIN, **options, **QUIET)
    table = measured.table
    rows = [(part, layer) for part in PARTS for layer in range(3) for _ in range(2 if part == "head" else 1)]
    assert list(zip(table.part, table.layer, strict=True)) == rows
    assert table["head"].dropna().tolist() == [0, 1] * 3 and set(table.kind) == {kind}
    plain, before = losses_of(tiny, TOKENS), probe.predict(states(tiny, "ln_1", 2).mean(1).numpy()) == LABELS
    np.testing.assert_allclose(measured.of_images[UNCHANGED], plain, atol=1e-5)
    np.testing.assert_array_equal(measured.of_images[*UNCHANGED, CORRECT], before)
    for row in table.itertuples():
        with edit(tiny, edits_of(tiny, row, kind)):
            losses = losses_of(tiny, TOKENS)
            right = probe.predict(states(tiny, "ln_1", 2).mean(1).numpy()) == LABELS
        np.testing.assert_allclose([row.nats, row.nats_change], [losses.mean(), (losses - plain).mean()], atol=1e-5)
        ends = stats.ttest_1samp(losses - plain, 0).confidence_interval()
        np.testing.assert_allclose([row.low, row.high], ends, atol=1e-4)
        key = row.part, row.layer, None if pd.isna(row.head) else row.head
        np.testing.assert_allclose(measured.of_images[key], losses, atol=1e-5)
        np.testing.assert_array_equal(measured.of_images[*key, CORRECT], right)
        contrast = measured.contrast({key: 1, UNCHANGED: -1})
        np.testing.assert_allclose([contrast["value"], contrast["low"]], [row.nats_change, row.low], atol=1e-12)
        want = compare(right, before)
        got = row.accuracy, row.accuracy_change, row.accuracy_low, row.accuracy_high, row.p_value
        assert got == (want.accuracy_a, want.difference, want.low, want.high, want.p_value)
        assert row.layer < 2 or row.accuracy_change == 0
    smaller = leave_out(tiny, TOKENS, kind=kind, train_tokens=TRAIN, **options | {"batch_size": 1}, **QUIET).table
    np.testing.assert_allclose(smaller.nats_change, table.nats_change, atol=1e-5)


def test_what_a_probe_finds_on_the_last_layer_after_a_part_is_left_out(tiny):
    labels = np.arange(9) % 2
    refit = refit_after(tiny, TRAIN, labels, TOKENS, LABELS, parts=["block", "head"], layers=[2, 1], **QUIET)
    table = refit.table
    assert list(table.columns[:4]) == ["part", "layer", "head", "kind"] and len(table) == 6
    for row in table.itertuples():
        with edit(tiny, edits_of(tiny, row, "skip")):
            train, test = (states(tiny, "ln_1", 3, tokens).mean(1).numpy() for tokens in (TRAIN, TOKENS))
        assert row.accuracy == LinearProbe().fit(train, labels).score(test, LABELS)
    plain = [states(tiny, "ln_1", 3, tokens).mean(1).numpy() for tokens in (TRAIN, TOKENS)]
    whole = LinearProbe().fit(plain[0], labels).score(plain[1], LABELS)
    np.testing.assert_allclose(table.accuracy - table.accuracy_change, whole)
    assert refit.of_images[UNCHANGED].mean() == whole
    assert_means(refit, "accuracy")


def test_windows_are_those_of_the_with_block(tiny):
    probe = LinearProbe().fit(states(tiny, "ln_1", 3).mean(1).numpy(), LABELS)
    options = {"probe": probe, "probe_layer": -1, "labels": LABELS}
    measured = windows(tiny, TOKENS, [0, 2, 4], [(1, 2), (0, 0)], **options, batch_size=4, **QUIET)
    table = measured.table
    assert_means(measured, "nats")
    np.testing.assert_allclose(measured.of_images[UNCHANGED], losses_of(tiny, TOKENS), atol=1e-5)
    assert list(table.columns[:6]) == ["radius", "first", "last", "nats", "nats_change", "low"]
    assert table[["first", "last", "radius"]].values.tolist() == [
        [1, 2, 0], [1, 2, 2], [1, 2, 4], [0, 0, 0], [0, 0, 2], [0, 0, 4]
    ]  # fmt: skip
    for row in table.itertuples():
        with window(tiny, row.radius, layers=range(row.first, row.last + 1)):
            np.testing.assert_allclose(row.nats, losses_of(tiny, TOKENS).mean(), atol=1e-5)
            right = probe.predict(states(tiny, "ln_1", 3).mean(1).numpy()) == LABELS
        assert row.accuracy == right.mean()
        np.testing.assert_array_equal(measured.of_images[row.radius, row.first, row.last, CORRECT], right)
    np.testing.assert_allclose(table.nats_change[table.radius == 4], 0, atol=1e-5)
    assert (table.nats_change[table.radius < 4].abs() > 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tiny, dtype):
    model = tiny.to(dtype)
    table = leave_out(model, TOKENS, parts=["head", "block"], kind="mean", train_tokens=TRAIN, **QUIET).table
    assert table.nats_change.notna().all()


def test_scores_in_float32(tiny):
    want = leave_out(tiny, TOKENS, parts=["block"], **QUIET).table
    tiny.config = tiny.transformer.config = replace(tiny.config, reorder_and_upcast_attn=True)
    for block in tiny.transformer.h:
        block.attn.upcast = True
    got = leave_out(tiny, TOKENS, parts=["block"], **QUIET).table
    np.testing.assert_allclose(got.nats_change, want.nats_change, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ["atention"]}, "part 'atention'; expected one of block, attention, mlp, head"),
        ({"kind": "zero"}, "kind 'zero'; expected one of skip, mean, resample"),
        ({"layers": [3]}, "layer 3 at resid_post; this model has layers 0..2 there"),
        ({"kind": "mean"}, "kind 'mean' needs train_tokens"),
        ({"probe_layer": 1}, "belong together, and one is missing"),
        (
            {"probe": LinearProbe(), "probe_layer": 4, "labels": LABELS},
            "layer 4 at ln_1; this model has layers 0..3 there",
        ),
        (
            {"probe": LinearProbe(), "probe_layer": 1, "labels": LABELS[1:]},
            r"labels \(5,\) of 6 images; expected one for each",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_any_work(tiny, options, words, monkeypatch):
    monkeypatch.setattr(tiny.transformer, "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=words) as caught:
        leave_out(tiny, TOKENS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "probe", "error", "words"),
    [
        (np.zeros(6, int), None, ValueError, "of one class, or some are missing"),
        (np.array([0, 1, np.nan, 0, 1, 0]), None, ValueError, "of one class, or some are missing"),
        (LABELS, "ridge", TypeError, "does not seem to be a scikit-learn estimator"),
        (LABELS, LinearProbe, TypeError, "an instance of scikit-learn estimator instead of a class"),
    ],
)
def test_what_cannot_be_refitted_is_said_before_any_work(tiny, labels, probe, error, words, monkeypatch):
    monkeypatch.setattr(tiny.transformer, "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(error, match=words):
        refit_after(tiny, TOKENS, labels, TOKENS, LABELS, probe=probe, **QUIET)


def test_any_estimator_of_scikit_learn_is_refitted_by_the_thread_that_called(tiny, monkeypatch):
    threads = set()

    class Forest(RandomForestClassifier):  # it has a length, which an unfitted one does not know
        def fit(self, x, y):
            threads.add(threading.get_ident())
            return super().fit(x, y)

    monkeypatch.setattr(side_by_side, "LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        refit = refit_after(tiny, TOKENS, LABELS, TOKENS, LABELS, probe=Forest(3, random_state=0), **QUIET)
    finally:
        torch.set_num_threads(before)
    assert threads == {threading.get_ident()} and len(refit.table) == 3


def test_nothing_is_left_out_inside_an_edit_or_a_recording(tiny):
    for block in (edit(tiny, {("mlp_out", np.int32(1)): torch.neg}), window(tiny, 1), lab.record(tiny)):
        with block, pytest.raises(RuntimeError, match="leave the `edit`, `window` or `record` block first"):
            leave_out(tiny, TOKENS, layers=[2])
    leave_out(tiny, TOKENS, layers=[2], **QUIET)


def test_other_bad_input(tiny):
    with pytest.raises(ValueError, match="head 2; this model has heads 0..1"):
        skip(tiny, "head", 0, head=2)
    for part, head in (("head", None), ("mlp", 0)):
        with pytest.raises(ValueError, match="a head has a number, and only a head"):
            skip(tiny, part, 0, head=head)
    for pair in ((1, 3), (2, 1)):
        with pytest.raises(ValueError, match=f"blocks {pair[0]} to {pair[1]}; .* this model's blocks 0..2"):
            windows(tiny, TOKENS, [1], [pair])
    for ranges in ([(0,)], (0, 1), [("a", "b")], [(0.0, 1.0)]):
        with pytest.raises(ValueError, match="expected two whole numbers, the first block and the last"):
            windows(tiny, TOKENS, [1], ranges)
    with pytest.raises(ValueError, match="radius -1"):
        windows(tiny, TOKENS, [-1], [(1, 2)])
    with pytest.raises(ValueError, match="expected two images or more"):
        leave_out(tiny, TOKENS[:1])
    with pytest.raises(ValueError, match="expected two images or more"):
        leave_out(tiny, TOKENS[:, :0])
    with pytest.raises(ValueError, match="expected integers"):
        leave_out(tiny, TOKENS.astype(float))
    with pytest.raises(ValueError, match="donors float64"):
        resample(tiny, "mlp", 0, np.zeros(3))
    with pytest.raises(ValueError, match="a batch of 6 images for 2 donors"):
        logits(tiny, resample(tiny, "mlp", 0, [1, 0]))
    with pytest.raises(TypeError, match="a probe of type int; expected a fitted classifier with `predict`"):
        leave_out(tiny, TOKENS, probe=1, probe_layer=1, labels=LABELS)
    narrow = LinearProbe().fit(np.random.default_rng(0).normal(size=(6, 5)), LABELS)
    with pytest.raises(ValueError, match="fitted on 5 features; expected the 8 of this model's `ln_1`"):
        leave_out(tiny, TOKENS, probe=narrow, probe_layer=1, labels=LABELS)
    with pytest.raises(ValueError, match=r"train_tokens \(6, 5\); expected images of 16 pixels"):
        leave_out(tiny, TOKENS, kind="mean", train_tokens=TOKENS[:, :5])
    with pytest.raises(RuntimeError, match="training mode"):
        leave_out(tiny.train(), TOKENS)
    tiny.eval().config = replace(tiny.config, bidirectional=True)
    with pytest.raises(ValueError, match="hidden pixels, not the next one; use a causal model"):
        leave_out(tiny, TOKENS)
    with pytest.raises(ValueError, match="hidden pixels, not the next one; use a causal model"):
        mean_of(tiny, "mlp", 0, TRAIN, **QUIET)


def test_the_names_are_offered():
    for function in (edit, window, skip, mean_of, resample, derangement, leave_out, refit_after, windows):
        assert getattr(lab, function.__name__) is function


FULL = "8.25 0.76 0.12 0.09 0.06 0.04 0.04 0.03 0.02 0.02 0.01 0.01 0.00 0.01 0.01 0.01 0.01 0.02 0.04 0.07".split()
CIFAR = pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="CIFAR-10 is not beside this folder")


def costs(limit, layers=None):
    """Nats that each block of cifar10-xs costs on the first test images of a stratified draw."""
    model, images = lab.load_model("cifar10-xs"), lab.load_images(SHARED / "cifar10", "test", limit=limit)
    tokens = lab.tokenize(images, model.processor, progress=False)
    return leave_out(model, tokens, parts=["block"], layers=layers, **QUIET).table.nats_change


@CIFAR
def test_blocks_of_cifar10_xs_on_a_few_images():
    np.testing.assert_allclose(costs(20, [0, 1, 19]), [8.25, 0.76, 0.07], rtol=0.3)


@CIFAR
@pytest.mark.skipif("IGPT_LAB_ALL" not in os.environ, reason="takes a minute; set IGPT_LAB_ALL to run it")
def test_the_blocks_of_cifar10_xs_cost_what_a_trial_found():
    assert [f"{change:.2f}" for change in costs(256)] == FULL
