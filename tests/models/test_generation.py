"""What `generate` is asked for: the tokens, the scores and the errors of transformers."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers_peer import Case, cases, few, same, transformers, twin

from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling as Causal
from igpt_lab.models.imagegpt import KeyValueCache
from igpt_lab.models.scores import cut, forbidden, penalised

CONFIG = ImageGPTConfig(
    vocab_size=17, n_positions=16, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
CASE = Case(CONFIG, n=2, t=16, seed=0)
ASKED = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
untied = {"tie_word_embeddings": False, "add_cross_attention": False}


@st.composite
def demands(draw) -> dict:
    """Arguments of `generate` that change scores."""
    words = st.lists(st.integers(0, 2), min_size=1, max_size=3)
    return {
        "repetition_penalty": draw(st.sampled_from([0.5, 1.0, 1.3, 4.0])),
        "bad_words_ids": draw(st.none() | st.lists(words, min_size=1, max_size=3).filter(_leaves_a_colour)),
        "remove_invalid_values": draw(st.booleans()),
    }


def _leaves_a_colour(words: list) -> bool:
    return not all([token] in words for token in range(3))


def agree(case: Case, start: torch.Tensor, options: dict, seed: int) -> None:
    """Every output of both, tokens exactly and numbers to 1e-5 of what is finite."""
    model, outs = case.model(Causal), []
    for one in (model, twin(model)):
        torch.manual_seed(seed)
        outs.append(one.generate(start, return_dict_in_generate=True, **options, **ASKED))
    ours, theirs = outs
    assert list(ours) == [name for name in theirs if name != "past_key_values"]
    for name in ours:
        if name in ("sequences", "beam_indices"):
            assert torch.equal(ours[name], theirs[name]), name
        elif name == "sequences_scores":
            same(ours[name], theirs[name])
        else:
            for one, other in zip(ours[name], theirs[name], strict=True):
                _same(one, other)


def _same(one, other) -> None:
    if isinstance(one, tuple):
        assert len(one) == len(other)
        for of_one, of_other in zip(one, other, strict=True):
            same(of_one, of_other)
    else:
        finite = other > torch.finfo(torch.float32).min
        assert torch.equal(finite, one > torch.finfo(torch.float32).min)
        same(one[finite], other[finite])


@given(case=cases(**untied), asked=demands(), cached=st.booleans(), draws=st.booleans(), seed=st.integers(0, 99))
@few
def test_penalties_and_forbidden_words_make_the_tokens_and_scores_of_the_port(case, asked, cached, draws, seed):
    start = torch.cat([torch.full((case.n, 1), case.config.sos_token_id), case.tokens()[:, 1:]], dim=1)
    options = {"max_length": case.config.n_positions + 1, "use_cache": cached, "do_sample": draws, "top_k": 0}
    agree(case, start, asked | options, seed)


@given(
    case=cases(**untied), asked=demands(), cached=st.booleans(), beams=st.integers(2, 4), copies=st.integers(1, 4),
    penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]), early=st.sampled_from([True, False, "never"]),
)  # fmt: skip
@few
def test_beams_are_those_of_the_port_token_for_token(case, asked, cached, beams, copies, penalty, early):
    case = replace(case, config=replace(case.config, vocab_size=20))  # with fewer, beams may be copies of each other
    options = {"num_beams": beams, "num_return_sequences": min(copies, beams), "length_penalty": penalty,
               "early_stopping": early, "do_sample": False, "use_cache": cached}  # fmt: skip
    agree(case, case.tokens(1), asked | options | {"max_length": case.config.n_positions + 1}, 0)


@given(
    case=cases(**untied), cached=st.booleans(), beams=st.integers(2, 3), seed=st.integers(0, 99),
    top_k=st.sampled_from([0, 1, 7]), top_p=st.sampled_from([1.0, 0.9, 0.01]), temperature=st.sampled_from([0.7, 1.0]),
)  # fmt: skip
@few
def test_drawn_beams_are_those_of_the_port_token_for_token(case, cached, beams, seed, top_k, top_p, temperature):
    case = replace(case, config=replace(case.config, vocab_size=20))
    options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": True, "use_cache": cached,
               "top_k": top_k, "top_p": top_p, "temperature": temperature}  # fmt: skip
    agree(case, case.tokens(1), options | {"max_length": case.config.n_positions + 1}, seed)


@pytest.mark.parametrize("beams", [2, 3])
def test_with_as_many_beams_as_images_there_are_the_best_is_the_likeliest(beams):
    """Of two colours and two pixels there are four images: four beams see them all."""
    case = Case(replace(CONFIG, vocab_size=beams + 1), n=1, t=2, seed=1)
    model, start = case.model(Causal), torch.full((1, 1), beams)
    images = torch.cartesian_prod(*[torch.arange(beams)] * 2)
    fed = torch.cat([start.expand(len(images), 1), images[:, :1]], dim=1)
    chance = model(fed).logits.log_softmax(-1).gather(2, images[..., None]).sum(dim=(1, 2)).detach()
    options = {"max_new_tokens": 2, "num_beams": beams**2, "num_return_sequences": 3, "length_penalty": 0.0}
    out = model.generate(start, **options, return_dict_in_generate=True, output_scores=True)
    want, order = chance.topk(3)
    assert torch.equal(out.sequences[:, 1:], images[order])
    same(out.sequences_scores, want)


@given(seed=st.integers(0, 999), colours=st.integers(3, 20), penalty=st.sampled_from([0.3, 1.5, 9.0]))
@few
def test_scores_of_the_steps_are_those_of_the_port(seed, colours, penalty):
    port, generator = transformers(), torch.Generator().manual_seed(seed)
    scores, tokens = torch.randn(3, colours, generator=generator), torch.randint(3, (3, 5), generator=generator)
    assert torch.equal(
        penalised(scores, tokens, penalty), port.RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores)
    )
    words = [[0, 1], [2], [1, 2, 0], tokens[0, -2:].tolist() + [1], [0] * 6]
    want = port.NoBadWordsLogitsProcessor(words)(tokens, scores)
    assert torch.equal(forbidden(scores, tokens, words), want)
    for least in (1, 2, 3):
        want = port.TopKLogitsWarper(2, min_tokens_to_keep=least)(None, scores)
        want = port.TopPLogitsWarper(0.1, min_tokens_to_keep=least)(None, want)
        assert torch.equal(cut(scores, 2, 0.1, least=least), want)


def test_the_token_that_ends_a_row_is_no_forbidden_word_as_theirs():
    model, start = CASE.model(Causal), CASE.tokens(1)
    first = int(model.generate(start, max_new_tokens=1)[0, 1])
    options = {"bad_words_ids": [[first], [(first + 1) % 16]], "eos_token_id": first, "max_length": 17,
               "do_sample": False}  # fmt: skip
    ours, theirs = model.generate(start, **options), twin(model).generate(start, **options)
    assert torch.equal(ours, theirs)
    assert ours[0, 1] == first


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "top_k": 3}])
def test_types_of_tokens_go_on_with_the_last_one_as_theirs(options):
    types = CASE.tokens(4).flip(1)
    options = {"do_sample": False, "max_length": 17, "token_type_ids": types} | options
    agree(CASE, CASE.tokens(4), options, 0)
    assert not torch.equal(types[:, -1], types[:, -2])


@pytest.mark.parametrize("room", [True, False])
def test_a_cache_in_another_order_goes_on_as_that_of_the_images_in_it(room):
    model, tokens, rows = CASE.model(Causal), CASE.tokens(8), torch.tensor([1, 1])
    placement = {"device": tokens.device, "dtype": model.dtype}
    cache = KeyValueCache.of(CONFIG, 2, 8, **placement) if room else KeyValueCache()
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache)
        cache.reorder_cache(rows)
        got = model(tokens[:, 5:], past_key_values=cache).logits
        want = model(torch.cat([tokens[rows, :5], tokens[:, 5:]], dim=1)).logits[:, 5:]
    same(got, want)


def test_what_beams_return_may_be_trained_on():
    model = CASE.model(Causal)
    out = model.generate(CASE.tokens(1), max_length=16, num_beams=2, return_dict_in_generate=True, output_scores=True)
    assert not out.sequences.is_inference() and not out.sequences_scores.is_inference()
    model(out.sequences, labels=out.sequences).loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0; expected a number above 0"),
        ({"bad_words_ids": []}, r"bad_words_ids=\[\]; expected one word or more"),
        ({"bad_words_ids": [[-1]]}, r"bad_words_ids is \[\[-1\]\]; expected lists of tokens"),
        ({"bad_words_ids": [[16]]}, "bad_words_ids ends a word with 16; expected a token below 16"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 of num_beams=2"),
        ({"num_beams": 0}, "num_beams is 0; expected a whole number above 0"),
    ],
)
def test_what_cannot_be_is_an_error_as_theirs(options, words):
    model, start = CASE.model(Causal), CASE.tokens(1)
    with pytest.raises(ValueError, match=words):
        model.generate(start, max_new_tokens=2, **options)
    with pytest.raises((ValueError, ZeroDivisionError)):
        twin(model).generate(start, max_new_tokens=2, do_sample=False, **options)
