"""The tuned lens: its objective and the gradient against a plain loop, zero against the logit lens, files, refusals."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_lenses import QUIET, random_model
from transformers_peer import twin

import igpt_lab as lab
from igpt_lab.explaining.lenses import as_they_are, lens_table
from igpt_lab.explaining.tuned_lens import FILES, TunedLens, digest_of_model, divergence, moved

MEASURES = ["nats", "error_to_final", "entropy", "start_token"]


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(8, size=(6, 16))


def zero_lens(model):
    return TunedLens(torch.zeros(3, 8, 8), torch.zeros(3, 8), digest_of_model(model))


def by_hand(model, h, matrix, bias, final):
    """KL(final || lens), a state after another, by the formula."""
    total = 0.0
    for state, target in zip(h, final, strict=True):
        x = state + matrix @ state + bias
        x = x / torch.sqrt((x * x).mean() + 1e-5) * model.transformer.ln_f.weight
        q = F.softmax(model.lm_head.weight[:8] @ x, 0)
        total = total + (target.exp() * (target - q.log())).sum()
    return total / len(h)


@pytest.mark.parametrize("tied", [False, True])
def test_the_objective_and_its_gradient_against_a_plain_loop(tiny, tied):
    model, generator = random_model(tiny.config, tie_word_embeddings=tied), torch.Generator().manual_seed(0)
    h, matrix, bias = (torch.randn(shape, generator=generator) for shape in ((7, 8), (8, 8), (8,)))
    final = F.log_softmax(torch.randn(7, 8, generator=generator), -1)
    weights = [(0.3 * matrix).requires_grad_(), bias.requires_grad_()]
    ours, theirs = divergence(model, moved(h, *weights), final), by_hand(model, h, *weights, final)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for one, other in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_zero_is_the_logit_lens_exactly(tiny, tokens, tied):
    model = random_model(tiny.config, tie_word_embeddings=tied)
    plain, tuned = lab.logit_lens(model, tokens, **QUIET), lab.tuned_lens(model, tokens, zero_lens(model), **QUIET)
    assert set(tuned.kind) == {"tuned lens"} and tuned.assign(kind="logit lens").equals(plain)
    strip = lab.lens_strip(model, tokens[0], lens=zero_lens(model))
    assert strip.assign(kind="logit lens").equals(lab.lens_strip(model, tokens[0]))


@pytest.fixture(scope="module")
def fitted(tiny_folder):
    """A model, images to train on, and its tuned lens."""
    model = lab.load_model(tiny_folder)
    before = copy.deepcopy(model.state_dict())
    train = np.random.default_rng(5).integers(8, size=(60, 16))
    lens = lab.fit_tuned_lens(model, train, steps=75, learning_rate=1e-2, **QUIET)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return model, train, lens


def test_two_lenses_in_the_same_passes_give_the_tables_of_each(tiny, tokens):
    model = random_model(tiny.config)
    lens = lab.fit_tuned_lens(model, tokens, steps=2, **QUIET)
    both = lens_table(model, tokens, {"logit lens": as_they_are, "tuned lens": lens})
    plain, tuned = lab.logit_lens(model, tokens, **QUIET), lab.tuned_lens(model, tokens, lens, **QUIET)
    pd.testing.assert_frame_equal(both, pd.concat([plain, tuned], ignore_index=True))


def test_training_brings_every_layer_nearer_to_the_last(fitted):
    model, train, lens = fitted
    plain, tuned = lab.logit_lens(model, train, **QUIET), lab.tuned_lens(model, train, lens, **QUIET)
    assert (tuned.error_to_final[:3] < 0.9 * plain.error_to_final[:3]).all()
    assert tuned.loc[3, MEASURES].equals(plain.loc[3, MEASURES])
    held = train[np.random.default_rng(0).permutation(60)[-6:]]
    first = lens.log[lens.log.step == 0].held_out.to_numpy()
    np.testing.assert_allclose(lab.logit_lens(model, held, **QUIET).error_to_final[:3], first, atol=1e-5)
    best = lens.log.groupby("layer").held_out.min()
    np.testing.assert_allclose(lab.tuned_lens(model, held, lens, **QUIET).error_to_final[:3], best, atol=1e-5)


def test_a_seed_gives_the_same_lens_again(tiny, tokens):
    one, same, other = (lab.fit_tuned_lens(tiny, tokens, steps=2, seed=seed, **QUIET) for seed in (0, 0, 1))
    assert one.log.equals(same.log) and one.matrices.equal(same.matrices) and not one.log.equals(other.log)
    assert one.log.step.tolist() == [0, 0, 0, 2, 2, 2]


def test_a_rate_that_breaks_training_leaves_the_logit_lens_and_ends_early(tiny, tokens):
    lens = lab.fit_tuned_lens(tiny, tokens, steps=1000, learning_rate=float("inf"), **QUIET)
    assert lens.log.step.max() == 100 and not lens.matrices.any() and not lens.biases.any()


def test_a_saved_lens_is_loaded_and_another_models_is_refused(fitted, tiny, tokens, tmp_path, monkeypatch):
    model, _, lens = fitted
    lens.save(tmp_path / "lens")
    loaded = TunedLens.load(tmp_path / "lens")
    assert loaded.matrices.equal(lens.matrices) and loaded.biases.equal(lens.biases) and loaded.log.equals(lens.log)
    assert (loaded.model, loaded.settings) == (lens.model, lens.settings)
    table = lab.tuned_lens(model, tokens, loaded, **QUIET)
    theirs = lab.tuned_lens(twin(model), tokens, loaded, **QUIET)  # the same weights
    np.testing.assert_allclose(theirs[MEASURES], table[MEASURES], atol=1e-5)
    other = type(model)(replace(model.config, n_head=1)).eval()
    other.load_state_dict(model.state_dict())
    for of_one_head in (other, twin(other)):
        with pytest.raises(ValueError, match="this tuned lens is of another model than"):
            lab.tuned_lens(of_one_head, tokens, loaded)
    tiny.lm_head.weight.data[0, 0] += 1e-3
    monkeypatch.setattr(type(tiny.transformer), "forward", None)  # before any work
    for instrument in (
        lambda: lab.tuned_lens(tiny, tokens, loaded),
        lambda: lab.lens_strip(tiny, tokens[0], lens=lens),
    ):
        with pytest.raises(ValueError, match="this tuned lens is of another model than tiny; fit one for it"):
            instrument()
    with pytest.raises(TypeError, match="lens is a str; expected a TunedLens"):
        lab.lens_strip(tiny, tokens[0], lens="lens")
    for matrices, words in ((lens.matrices[:1], "expected .3, 8, 8."), (lens.matrices * np.nan, "not finite")):
        with pytest.raises(ValueError, match=words):
            lab.tuned_lens(model, tokens, replace(lens, matrices=matrices), **QUIET)
    file = tmp_path / "lens" / FILES[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not belong to tuned_lens.json beside it"):
        TunedLens.load(tmp_path / "lens")
    file.write_bytes(b"no tensors")
    for folder in (tmp_path / "lens", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no tuned lens as `save` writes it"):
            TunedLens.load(folder)


def test_an_interrupted_fit_leaves_the_model_as_it_was(tiny, tokens):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    handle = tiny.transformer.h[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.fit_tuned_lens(tiny, tokens, **QUIET)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())
    assert all(weight.grad is None for weight in tiny.parameters())


def test_training_images_are_needed_on_both_sides(tiny, tokens):
    for held_out in (0, 6):
        with pytest.raises(ValueError, match=f"6 training images, {held_out} held out; expected at least one of each"):
            lab.fit_tuned_lens(tiny, tokens, held_out=held_out)
    with pytest.raises(ValueError, match="steps=0; expected at least 1"):
        lab.fit_tuned_lens(tiny, tokens, steps=0)
