"""Samples against the model's own distribution, whatever the batch, and against transformers' greedy decoding."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import igpt_lab as lab
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import align
from igpt_lab.models.scores import cut
from igpt_lab.sampling import sampling
from igpt_lab.sampling.sampling import choose, complete, prime_rows, sample

QUIET = {"progress": False}


def noise_of(seeds, side=4, colours=8):
    """Gumbel noise (S, T, V) as the module promises it: each row of pixels from the generator [seed, row]."""
    rows = [[np.random.default_rng([s, row]).random((side, colours)) for row in range(side)] for s in seeds]
    return -np.log(-np.log(np.array(rows).reshape(len(seeds), -1, colours)))


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(align(torch.as_tensor(tokens), "sos", model.config)).logits.double().numpy()


FILTERS = [
    {}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_follow_the_softmax_after_each_filter(tiny, filters):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | filters
    logits = torch.as_tensor(logits_of(tiny, np.zeros((1, 16), int)))[0, :1]
    expected = exact(logits[0].numpy(), **settings)
    noise = settings["temperature"] * torch.as_tensor(noise_of(range(400)).reshape(-1, 8))
    drawn, _ = choose(logits.expand(len(noise), -1).float(), noise.float(), *settings.values())
    counts = np.bincount(drawn, minlength=8)
    assert counts[expected == 0].sum() == 0 and (expected > 0).sum() >= 2
    assert chisquare(counts[expected > 0], len(noise) * expected[expected > 0]).pvalue > 1e-3


def exact(logits, temperature, top_k, top_p):
    """The distribution after the filters, spelt out for one image in numpy."""
    order = np.argsort(-logits)[:top_k]
    p = np.exp(logits[order] / temperature)
    p /= p.sum()
    last = np.searchsorted(np.cumsum(p), top_p or 1.0) + 1
    result = np.zeros(len(logits))
    result[order[:last]] = p[:last] / p[:last].sum()
    return result


def test_first_pixels_of_whole_samples_follow_the_softmax(tiny):
    drawn = sample(tiny, 3000, seed=3, batch_size=1000, **QUIET).tokens[:, 0]
    logits = logits_of(tiny, np.zeros((1, 16), int))[0, 0]
    assert chisquare(np.bincount(drawn, minlength=8), 3000 * exact(logits, 1, None, None)).pvalue > 1e-3


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_each_pixel_is_the_argmax_of_uncached_logits_and_noise(tiny, filters):
    drawn = sample(tiny, 5, seed=2, **filters, **QUIET)
    assert drawn.tokens.shape == (5, 16) and drawn.tokens.min() >= 0 and drawn.tokens.max() < 8  # never SOS
    temperature = filters.get("temperature", 1)
    logits = torch.as_tensor(logits_of(tiny, drawn.tokens)).flatten(0, 1) / temperature
    kept = cut(logits, filters.get("top_k"), filters.get("top_p")).view(5, 16, 8).numpy()
    np.testing.assert_array_equal(drawn.tokens, (kept + noise_of(drawn.seeds)).argmax(-1))


def test_log_p_is_the_model_s_own(tiny):
    drawn = sample(tiny, 4, temperature=2, top_k=4, **QUIET)
    tokens = torch.as_tensor(drawn.tokens)
    total = lab.next_pixel_loss(tiny, tokens).item() * tokens.numel()
    assert -drawn.log_p.sum() == pytest.approx(total, rel=1e-5)
    finished = complete(tiny, drawn.tokens, completions=2, **QUIET)
    total = lab.next_pixel_loss(tiny, torch.as_tensor(finished.tokens).flatten(0, 1)).item() * finished.tokens.size
    assert finished.log_p.shape == (4, 2, 16) and -finished.log_p.sum() == pytest.approx(total, rel=1e-5)


def test_an_image_does_not_depend_on_its_batch(tiny):
    many = sample(tiny, 9, seed=1, **QUIET)
    for count, batch_size in ((3, None), (9, 1), (9, 2), (9, 4)):
        few = sample(tiny, count, seed=1, batch_size=batch_size, **QUIET)
        np.testing.assert_array_equal(few.tokens, many.tokens[:count])
        np.testing.assert_array_equal(few.seeds, many.seeds[:count])
    assert (sample(tiny, 9, seed=2, **QUIET).tokens != many.tokens).any()
    again = sample(tiny, 2, seed=many.seeds[[7, 4]], **QUIET)
    np.testing.assert_array_equal(again.tokens, many.tokens[[7, 4]])


def test_near_ties_are_decided_by_the_image_alone(tiny, monkeypatch):
    """Logits shaken by half the tolerance, as no batch shakes them, draw the same images."""
    expected = sample(tiny, 40, top_p=0.9, **QUIET).tokens
    monkeypatch.setattr(sampling, "TIE", 0.1)
    alone, step = [], sampling.Decoder.step
    shaken = torch.Generator().manual_seed(0)

    def shake(*arguments, **options):
        logits = step(*arguments, **options)
        return logits + 0.02 * (torch.rand(logits.shape, generator=shaken) - 0.5)

    monkeypatch.setattr(sampling.Decoder, "step", shake)
    method = sampling._Canvas._alone
    monkeypatch.setattr(sampling._Canvas, "_alone", lambda *it: alone.append(1) or method(*it))
    np.testing.assert_array_equal(sample(tiny, 40, top_p=0.9, **QUIET).tokens, expected)
    assert 0 < len(alone) < 40 * 16 / 2


def test_choices_are_sure_where_no_logit_within_the_tolerance_changes_them():
    far, near = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 3.0, 3.00005]])
    silent = torch.zeros(1, 3)
    assert [it.item() for it in choose(far, silent, 1.0, None, None)] == [2, True]
    assert [it.item() for it in choose(near, silent, 1.0, None, None)] == [2, False]
    loud = torch.tensor([[9.0, 9.0, 0.0]])  # at a cut between the last two, the noise decides which would win
    assert [it.item() for it in choose(near, loud, 1.0, 1, None)] == [2, False]
    assert [it.item() for it in choose(near, loud * 0, 1.0, 2, None)] == [2, False]
    assert [it.item() for it in choose(far, loud, 1.0, 1, None)] == [2, True]
    two, favours_the_first = torch.tensor([[0.0, 1.0]]), torch.tensor([[9.0, 0.0]])
    second = two.softmax(-1)[0, 1].item()
    assert not choose(two, favours_the_first, 1.0, None, second)[1]  # the nucleus may end with it or before it
    assert [it.item() for it in choose(two, favours_the_first, 1.0, None, second - 0.01)] == [1, True]
    assert [it.item() for it in choose(two, favours_the_first, 1.0, None, second + 0.01)] == [0, True]


def test_greedy_equals_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in tiny.config.to_dict().items() if k not in ("bidirectional", "model_type")}
    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**values)).eval()
    theirs.load_state_dict(tiny.state_dict(), strict=False)
    prime = np.array([[1, 2, 3], [4, 5, 6], [0, 0, 7]])
    with_sos = torch.as_tensor(np.pad(prime, ((0, 0), (1, 0)), constant_values=8))
    expected = theirs.generate(with_sos, max_length=17, do_sample=False)[:, 1:]
    drawn = complete(tiny, prime, completions=1, temperature=0, **QUIET)
    np.testing.assert_array_equal(drawn.tokens[:, 0], expected)
    one = theirs.generate(torch.tensor([[8]]), max_length=17, do_sample=False)[:, 1:]
    np.testing.assert_array_equal(sample(tiny, 2, temperature=0, **QUIET).tokens, one.expand(2, -1))


def test_completions_keep_the_upper_rows(tiny):
    primes = sample(tiny, 3, seed=5, **QUIET).tokens
    drawn = complete(tiny, primes, completions=4, seed=6, **QUIET)
    assert drawn.tokens.shape == (3, 4, 16) and drawn.rows.tolist() == [[4] * 4] * 3 and prime_rows(tiny, 0.5) == 2
    np.testing.assert_array_equal(drawn.tokens[:, :, :8], np.repeat(primes[:, None, :8], 4, axis=1))
    flat = drawn.tokens.reshape(12, 16)
    assert len(np.unique(flat, axis=0)) > 3
    expected = (logits_of(tiny, flat) + noise_of(drawn.seeds.ravel())).argmax(-1)
    np.testing.assert_array_equal(flat[:, 8:], expected[:, 8:])
    fewer = complete(tiny, primes[:2], completions=3, seed=6, **QUIET)
    np.testing.assert_array_equal(fewer.tokens, drawn.tokens[:2, :3])


def test_any_leading_tokens_are_a_prime(tiny):
    prime = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], np.uint16)
    drawn = complete(tiny, torch.as_tensor(prime.astype(np.int32)), completions=2, **QUIET)
    np.testing.assert_array_equal(drawn.tokens[:, :, :5], np.repeat(prime[:, None], 2, axis=1))
    nothing = complete(tiny, np.zeros((1, 0), int), completions=2, **QUIET)
    assert nothing.tokens.shape == (1, 2, 16)


def test_images_come_through_the_palette(tiny, test):
    """An image set, and what another model drew, of another palette and size."""
    expected = complete(tiny, lab.tokenize(test, tiny.processor, **QUIET)[:2], **QUIET)
    np.testing.assert_array_equal(complete(tiny, test.select([0, 1]), **QUIET).tokens, expected.tokens)
    other = ImageGPTForCausalImageModeling(
        ImageGPTConfig(vocab_size=3, n_positions=64, n_embd=8, n_layer=1, n_head=1), init="transformers"
    )
    pictures = ImageGPTImageProcessorPil([[-1, -1, -1], [1, 1, 1]], 8).decode(sample(other, 2, **QUIET).tokens)
    drawn = complete(tiny, pictures, keep=0.25, **QUIET).tokens
    np.testing.assert_array_equal(drawn[:, 0, :4], tiny.processor.encode(pictures)[:, :4])


def test_an_interruption_keeps_whole_rows(tiny, monkeypatch):
    whole, step, taken = sample(tiny, 5, **QUIET), sampling.Decoder.step, []

    def interrupted(*arguments, **options):
        taken.append(1)
        if len(taken) == 15 + 10:  # in the second batch, after SOS and ten steps
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(sampling.Decoder, "step", interrupted)
    with pytest.warns(UserWarning, match="stopped with 2 of 5 images complete"):
        drawn = sample(tiny, 5, batch_size=2, **QUIET)
    assert drawn.rows.tolist() == [4, 4, 2, 2, 0]
    np.testing.assert_array_equal(drawn.tokens[:2], whole.tokens[:2])
    np.testing.assert_array_equal(drawn.tokens[2:4, :8], whole.tokens[2:4, :8])
    assert not drawn.tokens[2:, 8:].any() and np.isnan(drawn.log_p[2:4, 8:]).all() and np.isnan(drawn.log_p[4]).all()
    assert not np.isnan(drawn.log_p[2:4, :8]).any()


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    sample(tiny, 1, **QUIET)
    assert tiny.training


def test_a_table_has_a_row_for_each_image(tiny):
    drawn = complete(tiny, np.zeros((2, 3), int), completions=3, **QUIET)
    table = drawn.table()
    assert table.index.name == "seed" and table.index.tolist() == drawn.seeds.ravel().tolist()
    np.testing.assert_array_equal(table.to_numpy(), drawn.tokens.reshape(6, 16))


def test_bad_input(tiny):
    for values, said in (
        ({"temperature": -1}, "temperature -1"), ({"top_p": 2}, "top_p=2"), ({"top_k": -1}, "top_k=-1"),
        ({"seed": np.arange(3)}, "3 seeds for 1 images"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            sample(tiny, 1, **values)
    with pytest.raises(ValueError, match=r"expected integers \(S, 16\) or fewer"):
        complete(tiny, np.zeros((2, 17), int))
    with pytest.raises(ValueError, match="keep=1"):
        complete(tiny, np.zeros((2, 16), int), keep=1)
    with pytest.raises(ValueError, match="tokens from 0 to 8; the model's colours are 0 to 7"):
        complete(tiny, np.full((2, 5), 8) * [0, 0, 1, 1, 1])
    tiny.processor = None
    with pytest.raises(ValueError, match="this model has none"):
        complete(tiny, np.zeros((2, 4, 4, 3), np.uint8))


def test_nothing_is_drawn_where_nothing_is_asked_for(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(tiny, 0, **QUIET).tokens.shape == (0, 16)
