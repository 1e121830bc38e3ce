"""`losses`: over images, with every reduction, against the loss of one batch and against single conditionals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import igpt_lab as lab
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import losses_of, masked_loss_of, surprisal

QUIET = {"progress": False}


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(8, size=(7, 16))


def changed(tiny, **changes):
    """A random model of another configuration, whose head is not zero."""
    model = ImageGPTForCausalImageModeling(replace(tiny.config, **changes), init="transformers").eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_surprisal_adds_up_to_the_loss(tiny, tokens, tied):
    model = changed(tiny, tie_word_embeddings=True) if tied else tiny
    bits = surprisal(model, tokens, batch_size=3, **QUIET)
    assert bits.shape == (7, 16) and bits.dtype == np.float32
    nats = lab.next_pixel_loss(model, torch.as_tensor(tokens)).item()
    assert bits.mean() * np.log(2) == pytest.approx(nats, rel=1e-5)
    logits = model(torch.tensor([[8]])).logits[0, 0]
    assert len(logits) == 8 + tied
    first = logits.double().softmax(-1).log2().numpy()
    np.testing.assert_allclose(bits[:, 0], -first[tokens[:, 0]], rtol=1e-5)


def test_surprise_is_an_earlier_name(tiny, tokens):
    with pytest.warns(DeprecationWarning, match="surprisal"):
        earlier = lab.surprise(tiny, tokens, **QUIET)
    np.testing.assert_array_equal(earlier, lab.surprisal(tiny, tokens, **QUIET))


def test_reductions_are_means_of_the_loss_of_each_pixel(tiny, tokens):
    with torch.no_grad():
        by_pixel = lab.next_pixel_loss(tiny, torch.as_tensor(tokens), reduction="none").numpy()
    for reduction, expected in (("pixel", by_pixel), ("image", by_pixel.mean(1)), ("all", by_pixel.mean())):
        losses = losses_of(tiny, tokens, reduction=reduction, batch_size=3)
        assert losses.dtype == np.float64 and losses.shape == expected.shape
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses_of(tiny, tokens[:0]).shape == (0,)
    assert losses_of(tiny, tokens[:0], reduction="pixel").shape == (0, 16)
    with pytest.raises(ValueError, match="reduction 'mean'; expected 'pixel', 'image' or 'all'"):
        losses_of(tiny, tokens, reduction="mean")


def test_a_masked_loss_is_over_all_masked_pixels(tiny, tokens):
    model = changed(tiny, bidirectional=True)
    masked = np.random.default_rng(1).random(tokens.shape) < 0.3
    whole = lab.masked_pixel_loss(model, torch.as_tensor(tokens), torch.as_tensor(masked)).item()
    assert masked_loss_of(model, tokens, masked, batch_size=2) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="predicts masked pixels"):
        losses_of(model, tokens)
