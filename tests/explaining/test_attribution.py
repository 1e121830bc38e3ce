"""Attributions add up to the logits, by heads too, and one part's share against switching that part off by hand."""

import numpy as np
import pytest
import torch
from test_lenses import QUIET, random_model
from transformers_peer import twin

import igpt_lab as lab


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(8, size=(6, 16))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.cat([torch.full((6, 1), 8), torch.as_tensor(tokens)[:, :-1]], 1)).logits[..., :8]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_components_add_up(tiny, tokens, heads, tied):
    model = random_model(tiny.config, tie_word_embeddings=tied)
    port = twin(model).double()
    want = logits_of(model.double(), tokens)
    for network in (model, port):
        for position in (0, 7, 15):
            parts, names = lab.attribute_logits(network, tokens, position, heads=heads)
            assert parts.shape == (6, len(names), 8) and len(names) == 2 + 3 * (4 if heads else 2)
            np.testing.assert_allclose(parts.sum(1), want[:, position], atol=1e-10)
        table = lab.attribute(network, tokens, heads=heads, batch_size=4, **QUIET)
        true = want.gather(-1, torch.as_tensor(tokens)[..., None])[..., 0] - want.mean(-1)
        assert table.logit.sum() == pytest.approx(true.mean().item(), abs=1e-10)
        assert (table.low < table.logit).all() and table.component.is_unique
        assert table[["component", "layer", "head", "part"]].equals(names)


def test_logits_are_attributed_in_batches(tiny, tokens, monkeypatch):
    whole, _ = lab.attribute_logits(tiny, tokens, 5)
    runs = []
    tiny.transformer.register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    monkeypatch.setattr("igpt_lab.explaining.lenses.images_at_once", lambda model: 4)
    parts, _ = lab.attribute_logits(tiny, tokens, 5)
    assert runs == [4, 2]
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_heads_and_their_bias_are_the_attention(tiny, tokens):
    whole = lab.attribute(tiny, tokens, **QUIET).query("part == 'attention'")
    parts = lab.attribute(tiny, tokens, heads=True, **QUIET).query("part in ['head', 'attention bias']")
    np.testing.assert_allclose(parts.groupby("layer").logit.sum(), whole.logit, atol=1e-5)
    assert parts[parts.part == "head"].groupby("layer")["head"].apply(list).tolist() == [[0, 1]] * 3


def test_logits_are_made_of_a_few_images_at_a_time(tiny, tokens, monkeypatch):
    whole, _ = lab.attribute_logits(tiny, tokens, 3, heads=True)
    sizes = []
    tiny.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("igpt_lab.explaining.lenses.NUMBERS", 4 * 16 * 32)
    parts, _ = lab.attribute_logits(tiny, tokens, 3, heads=True)
    assert sizes == [4, 2]
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_a_part_is_what_the_logits_lose_without_it(tiny, tokens):
    """The last MLP, switched off while the last norm's scale is held."""
    kept = {}
    tiny.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: kept.setdefault("h", inputs[0]))
    tiny.transformer.h[2].mlp.register_forward_hook(lambda _, __, out: kept.setdefault("mlp", out))
    logits_of(tiny, tokens)
    scale = (kept["h"].pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    norm = tiny.transformer.ln_f.weight
    with_it, without = (tiny.lm_head(h * scale * norm) for h in (kept["h"], kept["h"] - kept["mlp"]))
    parts, names = lab.attribute_logits(tiny, tokens, 3)
    assert names.component.iloc[-1] == "MLP 2"
    np.testing.assert_allclose(parts[:, -1], (with_it - without)[:, 3].detach(), atol=1e-5)
    with pytest.raises(ValueError, match="no position 16; expected one from 0 to 15"):
        lab.attribute_logits(tiny, tokens, 16)
