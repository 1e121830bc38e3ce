"""A decoder's steps against the model's own pass over the whole sequence, laid out either way."""

import numpy as np
import pytest
import torch

from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import align
from igpt_lab.sampling import decoding
from igpt_lab.sampling.decoding import Decoder

SHAPE = {"vocab_size": 65, "n_positions": 16, "n_embd": 64, "n_layer": 3, "n_head": 2}
OPTIONS = {
    "plain": {},
    "other width and activation": {"n_inner": 96, "activation_function": "gelu_new"},
    "scales": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "tied": {"tie_word_embeddings": True},
    "cross-attention without an encoder": {"add_cross_attention": True},
    "odd sizes": {"vocab_size": 8, "n_embd": 24, "n_head": 3},
}


def model_of(**changes) -> ImageGPTForCausalImageModeling:
    """Every tensor moved off its initial value; dropout on, which a decoder must not apply."""
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**SHAPE | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float("ln_" in name), 0.15, generator=generator)
    return model.tie_weights()


def pixels_of(model, count=3):
    generator = torch.Generator().manual_seed(2)
    shape = count, model.config.n_positions
    return torch.randint(model.config.n_colours, shape, generator=generator)


def expected(model, tokens):
    """Logits (N, T, V) of every pixel, by one uncached pass."""
    with torch.inference_mode():
        return model(align(tokens, "sos", model.config), use_cache=False).logits[..., : model.config.n_colours]


@pytest.mark.parametrize("seen", [True, False], ids=["what is filled", "whole cache, masked"])
@pytest.mark.parametrize("large", [0, 1 << 60], ids=["by oneDNN", "as stored"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_equal_the_uncached_pass(options, large, seen, monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", large)
    model = model_of(**options)
    tokens = pixels_of(model)
    logits = expected(model, tokens)
    decoder = Decoder(model, 3)
    decoded, _ = decoder.fill(tokens[:, :5].numpy())
    torch.testing.assert_close(decoded, logits[:, 5], atol=1e-5, rtol=0)
    for position in range(6, 16):
        now = decoder.positions[position : position + 1]
        decoded = decoder.step(tokens[:, position - 1], now, seen=position + 1 if seen else None)
        torch.testing.assert_close(decoded, logits[:, position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_the_model_s_own_precision(dtype):
    model = model_of().to(dtype)
    tokens = pixels_of(model)
    decoder = Decoder(model, 3)
    decoder.fill(tokens[:, :4].numpy())
    decoded = decoder.step(tokens[:, 4], decoder.positions[5:6], seen=6)
    assert decoded.dtype == dtype
    allowed = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(decoded, expected(model, tokens)[:, 5], atol=allowed, rtol=0)


def test_equal_primes_are_passed_through_once():
    model, passed = model_of(), []
    handle = model.transformer.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape))
    tokens = pixels_of(model)[[1, 0, 1, 1]]
    logits, log_p = Decoder(model, 4).fill(tokens[:, :7].numpy())
    handle.remove()
    assert passed == [(2, 8)]  # SOS and seven pixels, of two images
    every = expected(model, tokens)
    torch.testing.assert_close(logits, every[:, 7], atol=1e-5, rtol=0)
    own = every.log_softmax(-1).gather(-1, tokens[..., None])[:, :7, 0]
    torch.testing.assert_close(log_p, own, atol=1e-5, rtol=0)


def test_a_step_runs_on_the_meta_device():
    """Where nothing has a value, whatever reads one fails: so does what a CUDA graph could not hold."""
    decoder = Decoder(model_of().to("meta"), 2)
    tokens = torch.zeros(2, dtype=torch.long, device="meta")
    room = decoder.cache.room
    for _ in range(2):
        logits = decoder.step(tokens, decoder.positions[3:4])
        assert logits.device.type == "meta" and logits.shape == (2, 64)
    assert decoder.cache.room is room
    filled, log_p = decoder.fill(np.zeros((2, 5), np.int64))
    assert filled.shape == (2, 64) and log_p.shape == (2, 5)


def test_a_bidirectional_model_is_refused():
    with pytest.raises(ValueError, match="continues no image"):
        Decoder(model_of(bidirectional=True), 1)
