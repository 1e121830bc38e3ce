"""Samples against the model's own distribution, with and without the cache."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from igpt_lab.model import ImageGPTForCausalImageModeling, align
from igpt_lab.sampling import complete, prime_rows, sample


def test_first_pixel_follows_the_softmax(tiny):
    drawn = sample(tiny, 4000, seed=3, progress=False)[:, 0]
    expected = tiny(torch.tensor([[8]])).logits[0, 0].softmax(-1).detach().double().numpy()
    assert chisquare(np.bincount(drawn, minlength=8), 4000 * expected / expected.sum()).pvalue > 1e-3


def test_each_pixel_inverts_the_uncached_distribution(tiny):
    drawn = sample(tiny, 5, seed=2, temperature=0.7, progress=False)
    assert drawn.shape == (5, 16) and drawn.min() >= 0 and drawn.max() < 8  # never SOS
    logits = tiny(align(torch.as_tensor(drawn), "sos", tiny.config)).logits.double() / 0.7
    cumulative = logits.softmax(-1).cumsum(-1).detach().numpy()
    uniform = np.stack([np.random.default_rng([2, i]).random(16) for i in range(5)])
    np.testing.assert_array_equal(drawn, (cumulative <= uniform[..., None]).sum(-1))


def test_an_image_does_not_depend_on_its_neighbours(tiny):
    np.testing.assert_array_equal(sample(tiny, 3, seed=1, progress=False), sample(tiny, 9, seed=1, progress=False)[:3])
    assert (sample(tiny, 3, seed=1, progress=False) != sample(tiny, 3, seed=2, progress=False)).any()


def test_cold_samples_are_greedy(tiny):
    tokens = torch.full((1, 1), 8)
    for _ in range(16):
        tokens = torch.cat([tokens, tiny(tokens).logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(sample(tiny, 1, temperature=1e-6, progress=False), tokens[:, 1:])


def test_completions_keep_the_upper_rows(tiny):
    primes = sample(tiny, 3, seed=5, progress=False)
    drawn = complete(tiny, primes, completions=4, seed=6, progress=False)
    assert drawn.shape == (3, 4, 16) and prime_rows(tiny, 0.5) == 2
    np.testing.assert_array_equal(drawn[:, :, :8], np.repeat(primes[:, None, :8], 4, axis=1))
    assert len(np.unique(drawn.reshape(12, 16), axis=0)) > 3
    logits = tiny(align(torch.as_tensor(drawn.reshape(12, 16)), "sos", tiny.config)).logits.double()
    cumulative = logits.softmax(-1).cumsum(-1).detach().numpy()
    uniform = np.stack([np.random.default_rng([6, i]).random(16) for i in range(12)])
    expected = (cumulative <= uniform[..., None]).sum(-1)
    np.testing.assert_array_equal(drawn.reshape(12, 16)[:, 8:], expected[:, 8:])


def test_bad_input(tiny):
    with pytest.raises(ValueError, match="temperature 0"):
        sample(tiny, 1, temperature=0)
    with pytest.raises(ValueError, match=r"expected \(S, 16\)"):
        complete(tiny, np.zeros((2, 9), int))
    with pytest.raises(ValueError, match="keep=1"):
        complete(tiny, np.zeros((2, 16), int), keep=1)


def test_meta_device(tiny):
    model = ImageGPTForCausalImageModeling(tiny.config).to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # all steps run there; only the copy to the host cannot
        sample(model, 2, progress=False)
