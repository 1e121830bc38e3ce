"""Lenses against the model's loss, a model cut short, a plain loop over transformers' model, and cases by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers_peer import twin

import igpt_lab as lab
from conftest import SHARED
from igpt_lab.explaining import laws
from igpt_lab.explaining.lenses import as_they_are, lens_table
from igpt_lab.features.hooks import record
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import losses_of

QUIET = {"progress": False}
NATS = {
    "fashion-xs": "5.31 3.41 3.11 2.75 2.59 2.33 2.18 2.07 1.92 1.81 1.74 1.66 1.57 1.49 1.42 1.35 1.28 1.17 1.10 1.05 "
    "1.00",
    "cifar10-xs": "7.73 5.95 5.73 5.68 5.46 5.29 5.13 4.99 4.88 4.65 4.37 4.16 3.91 3.67 3.43 3.10 2.81 2.60 2.42 2.28 "
    "2.22",
}  # of every layer, from an independent program


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(8, size=(6, 16))


def random_model(config, **changes):
    """All weights, biases and gains away from their initial values."""
    model, generator = ImageGPTForCausalImageModeling(replace(config, **changes)), torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        weight.data.normal_(1 if "ln_" in name else 0, 0.3, generator=generator)
    return model.eval()


def cut(model, blocks):
    """A copy of a model without its blocks from `blocks` on."""
    short = copy.deepcopy(model)
    short.transformer.h = short.transformer.h[:blocks]
    return short


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"n_inner": 3, "n_head": 4}])
def test_the_lens_at_the_last_layer_is_the_loss(tiny, tokens, changes):
    model = random_model(tiny.config, **changes)
    table = lab.logit_lens(model, tokens, **QUIET)
    assert table.layer.tolist() == [0, 1, 2, 3] and set(table.kind) == {"logit lens"} and set(table.n) == {6}
    losses = losses_of(model, tokens)
    assert table.nats[3] == pytest.approx(losses.mean(), abs=1e-5)
    assert table.error_to_final[3] == pytest.approx(0, abs=1e-6) and (table.error_to_final[:3] > 1e-3).all()
    low, high = losses.mean() + np.array([-1, 1]) * 2.570582 * losses.std(ddof=1) / np.sqrt(6)  # t, 5 degrees
    np.testing.assert_allclose(table.loc[3, ["low", "high"]].to_list(), [low, high], atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_the_later_blocks_is_the_lens_bit_for_bit(tiny, tokens, tied):
    model = random_model(tiny.config, tie_word_embeddings=tied)
    table, columns = lab.logit_lens(model, tokens, **QUIET), ["nats", "low", "high", "entropy", "rgb_error", "n"]
    pixels = torch.as_tensor(tokens)
    for layer in range(4):
        short = cut(model, layer)
        with torch.no_grad():
            logits = short(torch.cat([torch.full((6, 1), 8), pixels[:, :-1]], 1)).logits
        assert laws.lens_logits(model, pixels, layer).equal(logits)
        alone = lab.logit_lens(short, tokens, layers=[layer], **QUIET)
        assert table.loc[layer, columns].tolist() == pytest.approx(alone.loc[0, columns].tolist(), abs=0, nan_ok=True)
        assert table.nats[layer] == pytest.approx(losses_of(short, tokens).mean(), abs=1e-6)


def plain_loop(port, tokens, colours):
    """Means over images and pixels by the layer's definition: nats, KL, entropy, and nats of the start token."""
    inputs = torch.cat([torch.full((len(tokens), 1), colours), tokens[:, :-1]], 1)
    with torch.no_grad():
        out = port(inputs, output_hidden_states=True)
        block = port.transformer.h[-1](out.hidden_states[-2])
        last = block[0] if isinstance(block, tuple) else block
        final, rows = F.log_softmax(out.logits[..., :colours], -1), []
        for h in (*out.hidden_states[:-1], last):
            normed = h / (h.pow(2).mean(-1, keepdim=True) + port.config.layer_norm_epsilon).sqrt()
            logits = (normed * port.transformer.ln_f.weight) @ port.lm_head.weight.T
            q = F.log_softmax(logits[..., :colours], -1)
            nats = -F.log_softmax(logits, -1).gather(-1, tokens[..., None]).mean()
            kl = F.kl_div(q, final, log_target=True, reduction="none").sum(-1).mean()
            start = -(F.softmax(logits, -1)[..., :colours].sum(-1)).log().mean()
            rows.append([nats, kl, torch.distributions.Categorical(logits=q).entropy().mean(), start])
    return np.array(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_the_lens_against_a_plain_loop_on_both_models(tiny, tokens, tied):
    model = random_model(tiny.config, tie_word_embeddings=tied)
    port = twin(model)
    want = plain_loop(port, torch.as_tensor(tokens), 8)
    for network in (model, port):
        table = lab.logit_lens(network, tokens, batch_size=4, **QUIET)
        got = table[["nats", "error_to_final", "entropy", "start_token"]]
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert table.rgb_error.isna().all() and (table.start_token > 0).all() == tied


def test_without_the_last_layer_all_else_is_the_same(tiny, tokens):
    table = lab.logit_lens(tiny, tokens, **QUIET)
    part = lab.logit_lens(tiny, tokens, layers=[2, 0], final=False, **QUIET)
    assert part.equals(table.loc[[2, 0]].assign(error_to_final=np.nan).reset_index(drop=True))


def test_the_distance_of_colours_by_hand(tiny, tokens):
    table = lab.logit_lens(tiny, tokens, layers=[-1], **QUIET)
    p = tiny(torch.cat([torch.full((6, 1), 8), torch.as_tensor(tokens)[:, :-1]], 1)).logits.softmax(-1).detach().numpy()
    colours = np.linspace(0, 1, 8)[:, None].repeat(3, 1)
    squared = ((colours[:, None] - colours) ** 2).sum(-1)  # of every colour to every other
    assert table.rgb_error[0] == pytest.approx((p * squared[tokens]).sum(-1).mean(), abs=1e-6)


def test_the_scale_of_a_state_changes_nothing(tiny, tokens):
    one = lens_table(tiny, tokens, {"a": as_they_are})
    seven = lens_table(tiny, tokens, {"a": lambda states, layer: 7 * states})
    np.testing.assert_allclose(one.drop(columns="kind"), seven.drop(columns="kind"), atol=1e-4)  # eps is not scaled
    tiny.transformer.ln_f.eps = 0.0
    one = lens_table(tiny, tokens, {"a": as_they_are})
    seven = lens_table(tiny, tokens, {"a": lambda states, layer: 7 * states})
    np.testing.assert_allclose(one.drop(columns="kind"), seven.drop(columns="kind"), atol=1e-5)


def copier(config, *, shift):
    """A model whose blocks add nothing and whose head repeats the token in its slot, or the colour of its place."""
    model = ImageGPTForCausalImageModeling(replace(config, n_embd=16, tie_word_embeddings=False)).eval()
    for weight in model.parameters():
        weight.data.zero_()
    model.transformer.ln_f.weight.data.fill_(1)
    model.lm_head.weight.data[:8, :8] = 20 * torch.eye(8)
    if shift:
        model.transformer.wte.weight.data[:8, :8] = torch.eye(8)  # slot i holds pixel i - 1
    else:
        model.transformer.wpe.weight.data[:, :8] = torch.eye(8).repeat(2, 1)  # place i says colour i mod 8
    return model


def test_state_i_predicts_pixel_i(tiny):
    repeated = np.full((1, 16), 5)  # slot i has pixel i - 1, which is pixel i, but for the first
    strip = lab.lens_strip(copier(tiny.config, shift=True), repeated)
    assert (strip.nats[strip.position > 0] < 1e-6).all() and (strip.nats[strip.position == 0] > 2).all()
    steps = np.arange(16)[None] % 8  # place i has colour i mod 8: no shift between states and labels
    strip = lab.lens_strip(copier(tiny.config, shift=False), steps)
    assert (strip.nats < 1e-6).all() and (strip.token == strip.position % 8).all()
    assert lab.logit_lens(copier(tiny.config, shift=False), steps, **QUIET).nats.max() < 1e-6


def test_with_raw_input_every_offset_moves_by_one(tiny, tokens):
    """State i has seen the pixels before i, and with raw input pixel i as well: it predicts the next one."""
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 8
    for alignment, first in (("sos", 7), ("raw", 6)):
        states = []
        for images in (tokens, changed):
            with torch.no_grad(), record(tiny, ["resid_pre"], pool=lambda x, *_: x, alignment=alignment) as kept:
                kept.run(torch.as_tensor(images), use_cache=False)
            states.append(kept["resid_pre"])
        differs = (states[0] != states[1]).any(-1)  # (N, layers, T)
        assert differs[..., first].all() and not differs[..., :first].any()
    with torch.no_grad(), record(tiny, ["resid_pre"], layers=[3], pool=lambda x, *_: x, alignment="raw") as kept:
        kept.run(torch.as_tensor(tokens), use_cache=False)
        logits = tiny.lm_head(tiny.transformer.ln_f(kept["resid_pre"][:, 0]))
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.as_tensor(tokens)[:, 1:].flatten())
    torch.testing.assert_close(losses, tiny(torch.as_tensor(tokens), labels=torch.as_tensor(tokens)).loss)


def test_a_strip_is_the_lens_of_one_image(tiny, tokens):
    strip, table = lab.lens_strip(tiny, tokens[2]), lab.logit_lens(tiny, tokens[2:3], **QUIET)
    np.testing.assert_allclose(strip.groupby("layer").nats.mean(), table.nats, atol=1e-6)
    assert len(strip) == 4 * 16 and (strip.row * 4 + strip.column == strip.position).all()
    best = strip.pivot(index="layer", columns="position", values="token").to_numpy()
    for position, settled in enumerate(strip.settled[strip.layer == 0]):
        assert (best[settled:, position] == best[3, position]).all()
        assert settled == 0 or best[settled - 1, position] != best[3, position]
    part = lab.lens_strip(tiny, tokens[2], layers=[1, -1])
    whole = strip[strip.layer.isin([1, 3])].reset_index(drop=True)
    assert part.equals(whole) and strip.settled.nunique() > 1
    grey = np.rint(255 * tokens[2] / 7)
    assert (strip.true_red[strip.layer == 0] == grey).all() and strip.red.between(0, 255).all()


def test_the_laws_hold_and_see_a_fault(tiny, tokens):
    for model in (tiny, random_model(tiny.config, tie_word_embeddings=True)):
        assert laws.lens_against_loss(model, tokens) < 1e-5 and laws.state_0_spread(model, tokens) == 0
        assert [laws.lens_against_skip(model, tokens, layer) for layer in range(4)] == [0, 0, 0, 0]
        assert len(model.transformer.h) == 3 and laws.attribution_error(model.double(), tokens) < 1e-10
    tiny.float().transformer.h[1].register_forward_hook(
        lambda _, __, out: (out[0] + torch.arange(6.0).view(6, 1, 1), *out[1:])
    )
    assert laws.state_0_spread(tiny, tokens) > 0.1


@pytest.mark.parametrize("name", NATS)
def test_known_numbers_of_the_bundled_models(name):
    """On all images that the numbers are of, at the first layers, which take a few blocks."""
    if name == "cifar10-xs" and not (SHARED / "cifar10" / "test.parquet").is_file():
        pytest.skip("needs ../shared/cifar10")
    source, limit = ("fashion-mini", 400) if name == "fashion-xs" else (SHARED / "cifar10", 256)
    model = lab.load_model(name)
    tokens = lab.tokenize(lab.load_images(source, "test", limit=limit), model.processor, progress=False)
    table = lab.logit_lens(model, tokens, layers=[0, 1, 2, 3], final=False, **QUIET)
    want = NATS[name].split()
    # Two digits, and a little more: 5.7248 of layer 2 of cifar10-xs was written down as 5.73.
    assert np.abs(table.nats - [float(want[layer]) for layer in table.layer]).max() < 0.0055


def test_bfloat16_is_near(tiny, tokens):
    exact = lab.logit_lens(tiny, tokens, **QUIET)
    low = lab.logit_lens(copy.deepcopy(tiny).bfloat16(), tokens, **QUIET)
    np.testing.assert_allclose(low.nats, exact.nats, rtol=0.02)


def test_baselines_are_counts(tokens):
    train = np.random.default_rng(1).integers(4, size=(20, 9)) * 2  # even colours of 8
    table = lab.pixel_baselines(train, train[:5], 8)
    assert table.baseline.tolist() == ["ln V", "unigram", "previous pixel"] and set(table.n) == {5}
    counts = np.array([(train == colour).sum() for colour in range(8)]) + 1
    assert table.nats[0] == np.log(8) and table.low[0] == table.high[0] == np.log(8)
    assert table.nats[1] == pytest.approx(-np.log(counts / counts.sum())[train[:5]].mean())
    chain = (np.arange(9) + np.arange(20)[:, None]) % 8  # the next pixel follows from the previous one
    table = lab.pixel_baselines(chain, chain, 8)
    assert table.nats[2] < 0.5 < 2 < table.nats[1]
    pairs = np.zeros((9, 8))
    for image in chain:
        for before, pixel in zip([8, *image], image, strict=False):
            pairs[before, pixel] += 1
    unigram = np.array([(chain == colour).sum() + 1 for colour in range(8)])
    p = pairs + unigram / unigram.sum()  # c = 1, which fits the held-out images best
    p = p / p.sum(1, keepdims=True)
    want = -np.mean([np.log(p[before, pixel]) for image in chain for before, pixel in zip([8, *image], image,
                                                                                        strict=False)])  # fmt: skip
    assert table.nats[2] == pytest.approx(want)


def test_what_no_lens_can_read_is_refused_before_any_work(tiny, tokens, monkeypatch):
    monkeypatch.setattr(type(tiny.transformer), "forward", None)
    bert = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True))
    for instrument in (lab.logit_lens, lab.lens_strip, lab.attribute, lab.fit_tuned_lens):
        with pytest.raises(ValueError, match=r"a bidirectional \(BERT\) model predicts hidden pixels"):
            instrument(bert, tokens[:1])
    with pytest.raises(ValueError, match="layer 4 at resid_pre; this model has layers 0..3 there"):
        lab.logit_lens(tiny, tokens, layers=[4])
    with pytest.raises(ValueError, match=r"expected integers \(S, 16\)"):
        lab.logit_lens(tiny, np.zeros((2, 17), int))
    with pytest.raises(ValueError, match="the model's colours are 0 to 7"):
        lab.logit_lens(tiny, tokens + 1)
    with pytest.raises(ValueError, match=r"\(0, 16\); expected at least one image"):
        lab.logit_lens(tiny, tokens[:0])
    with pytest.raises(ValueError, match="ImageGPTModel has no head over colours"):
        lab.logit_lens(tiny.transformer, tokens)
    with pytest.raises(ValueError, match=r"expected those of one image"):
        lab.lens_strip(tiny, tokens)
    with pytest.raises(ValueError, match="1 training images and 6 others"):
        lab.pixel_baselines(tokens[:1], tokens, 8)
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_no_instrument_measures_dropout(tiny, tokens):
    """A model in training mode gives other numbers at each call."""
    lens = lab.fit_tuned_lens(tiny, tokens, steps=1, **QUIET)
    tiny.transformer.h[1].mlp.train()
    for measure in (
        lab.logit_lens, lab.attribute, lab.fit_tuned_lens, lab.attention_maps,
        lambda *of: lab.lens_strip(tiny, tokens[0]), lambda *of: lab.tuned_lens(*of, lens),
        lambda *of: lab.attribute_logits(*of, 3), lambda *of: lab.attention_from(tiny, tokens[0], 3),
        lambda *of: lab.bits_by_layer(*of, tokens), lambda *of: lab.mean_of(tiny, "mlp", 0, tokens),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"the model is in training mode; call model.eval\(\)"):
            measure(tiny, tokens)
