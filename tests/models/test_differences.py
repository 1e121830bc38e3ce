"""Where this package differs from transformers' ImageGPT, and that it does: each shown on both.

Accidents are those of transformers 5.23. A test that fails after an update of transformers on a line that says what the
port does has found a mended accident: then its row leaves docs/differences.md.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers_peer import Case, same, same_output, transformers, twin

import igpt_lab as lab
from igpt_lab.core.hub import bundled
from igpt_lab.features.hooks import record
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, KeyValueCache, Norm
from igpt_lab.models.losses import align, next_pixel_loss

CONFIG = lab.ImageGPTConfig(
    vocab_size=17, n_positions=16, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
Causal = ImageGPTForCausalImageModeling


def case_of(**changes) -> Case:
    return Case(dataclasses.replace(CONFIG, **changes), n=2, t=16, seed=0)


@pytest.fixture(autouse=True)
def seeded():
    """transformers draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def port():
    return transformers()


# What is trained and measured


@torch.no_grad()
def test_the_port_s_loss_leaves_a_pixel_out_and_ours_scores_all():
    model, tokens = case_of().model(Causal), case_of().tokens()
    theirs, ours = twin(model), next_pixel_loss(model, tokens)
    # Labels equal to the input, as its documentation says: the first pixel is never scored.
    but_first = tokens.clone()
    but_first[:, 0] = -100
    assert torch.equal(theirs(tokens, labels=tokens).loss, theirs(tokens, labels=but_first).loss)
    # With SOS in front the last pixel is not, and an image with SOS is longer than the model.
    sos = torch.full((2, 1), CONFIG.sos_token_id)
    shifted = align(tokens, "sos", CONFIG)
    assert torch.equal(shifted, torch.cat([sos, tokens], dim=1)[:, :-1])
    losses = F.cross_entropy(theirs(shifted).logits.mT, tokens, reduction="none")
    same(theirs(shifted, labels=shifted).loss, losses[:, :-1].mean())
    with pytest.raises(IndexError):
        theirs(torch.cat([sos, tokens], dim=1))
    same(ours, losses.mean())
    for i in range(CONFIG.n_positions):
        other = tokens.clone()
        other[:, i] = (other[:, i] + 1) % CONFIG.n_colours
        assert next_pixel_loss(model, other) != ours, f"pixel {i} is not scored"


@torch.no_grad()
def test_the_port_s_recipe_feeds_pixels_without_sos_and_ours_takes_both(port):
    """What its processor gives goes to its model as it is, so that features are those of inputs never trained on."""
    greys = np.stack([np.linspace(-1, 1, CONFIG.n_colours)] * 3, axis=1)
    processor = port.ImageGPTImageProcessorPil(clusters=greys, size={"height": 4, "width": 4})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    fed = processor(images=Image.fromarray(pixels), return_tensors="pt")["input_ids"]
    assert fed.shape == (1, CONFIG.n_positions)
    assert fed.max() < CONFIG.sos_token_id
    assert align(fed, "raw", CONFIG) is fed
    assert align(fed, "sos", CONFIG).tolist() == [[CONFIG.sos_token_id, *fed[0, :-1].tolist()]]
    model = case_of().model(lab.ImageGPTModel)
    same(model(fed).last_hidden_state, twin(model)(fed).last_hidden_state)
    assert (model(align(fed, "sos", CONFIG))[0] - model(fed)[0]).abs().max() > 0.1


@torch.no_grad()
def test_hidden_states_mix_two_kinds_and_recorded_ones_do_not():
    model, tokens = case_of().model(lab.ImageGPTModel), case_of().tokens()
    theirs = twin(model)
    states = theirs(tokens, output_hidden_states=True).hidden_states
    same_output(model(tokens, output_hidden_states=True), theirs(tokens, output_hidden_states=True))
    with record(model, points=["ln_1", "resid_pre"]) as ours:
        model(tokens)
    for layer in range(CONFIG.n_layer):
        same(ours["resid_pre"][:, layer], states[layer].mean(1))
        same(ours["ln_1"][:, layer], theirs.h[layer].ln_1(states[layer]).mean(1))
        assert (ours["ln_1"][:, layer] - states[layer].mean(1)).abs().max() > 0.1
    same(ours["ln_1"][:, -1], states[-1].mean(1))
    assert (ours["resid_pre"][:, -1] - states[-1].mean(1)).abs().max() > 0.1


@torch.no_grad()
def test_the_port_drops_out_by_default_and_bundled_models_do_not(port):
    """The original has no dropout. Defaults are transformers', so that its code means the same here."""
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    assert {getattr(config(), name) for config in (port.ImageGPTConfig, lab.ImageGPTConfig) for name in names} == {0.1}
    tokens = case_of().tokens()
    theirs = twin(case_of(**dict.fromkeys(names, 0.1)).model(Causal)).train()
    assert not torch.equal(theirs(tokens).logits, theirs(tokens).logits)
    assert "fashion-xs" in bundled()
    for name in bundled():
        model = Causal.from_pretrained(name).train()
        assert {getattr(model.config, field) for field in names} == {0.0}
        tokens = torch.zeros(1, 8, dtype=torch.long)
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_the_port_s_first_loss_is_not_ln_v_and_ours_is(port):
    config = dataclasses.replace(CONFIG, n_embd=256, n_layer=1)
    tokens = torch.randint(16, (64, 16), generator=torch.Generator().manual_seed(0))
    theirs = port.ImageGPTForCausalImageModeling(port.ImageGPTConfig(n_embd=256, n_layer=1, n_head=4, vocab_size=17))
    first = F.cross_entropy(theirs.eval()(align(tokens, "sos", config)).logits.mT, tokens).item()
    assert abs(first - math.log(16)) > 0.01
    assert theirs.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    ours = Causal(config)
    assert next_pixel_loss(ours, tokens).item() == pytest.approx(math.log(16), abs=1e-6)
    assert not ours.lm_head.weight.any()


@pytest.mark.parametrize("cls", [ImageGPTForCausalImageModeling, ImageGPTForImageClassification])
def test_init_port_draws_at_the_scales_of_the_port_and_the_original_at_others(port, cls):
    shape = {"vocab_size": 257, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "num_labels": 100}
    settings = shape | {"add_cross_attention": True}
    theirs = dict(getattr(port, cls.__name__)(port.ImageGPTConfig(**settings)).named_parameters())
    ours = dict(cls(lab.ImageGPTConfig(**settings), init="transformers").named_parameters())
    original = dict(cls(lab.ImageGPTConfig(**settings)).named_parameters())
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        if weight.std() == 0:  # biases are zero and gains one in all three
            assert torch.equal(ours[name], weight) and torch.equal(original[name], weight), name
            continue
        assert ours[name].std().item() == pytest.approx(weight.std().item(), rel=0.04), name
        assert abs(ours[name].mean().item()) < 0.05 * weight.std().item(), name
        equal = original[name].std().item() == pytest.approx(weight.std().item(), rel=0.2)
        assert equal == name.endswith(("wte.weight", "mlp.c_fc.weight")), name


# Generation


def test_the_docstring_says_tied_the_default_is_untied_and_tying_adds_a_column_for_sos(port):
    assert "tied to the input" in " ".join(port.ImageGPTForCausalImageModeling.__doc__.split())
    assert port.ImageGPTConfig().tie_word_embeddings is lab.ImageGPTConfig().tie_word_embeddings is False
    for tied, columns in ((False, 16), (True, 17)):
        case = case_of(tie_word_embeddings=tied)
        model = case.model(Causal)
        for one in (model, twin(model)):
            assert (one.lm_head.weight is one.transformer.wte.weight) == tied
            assert one(case.tokens()).logits.shape == (2, 16, columns)


def test_a_tied_port_draws_sos_as_if_it_were_a_colour_and_ours_never_does():
    tied, start = case_of(tie_word_embeddings=True).model(Causal), torch.tensor([[3]])
    with torch.no_grad():
        tied.transformer.wte.weight[-1] = 5 * tied.transformer(start).last_hidden_state[0, -1]
    drawn = twin(tied).generate(start, max_new_tokens=1, do_sample=False)
    assert drawn.tolist() == [[3, tied.config.sos_token_id]]
    assert tied.generate(start, max_new_tokens=8).max() < tied.config.n_colours


def test_the_port_draws_from_50_colours_unless_told_and_ours_from_all():
    """top_k=50 is transformers' default for text; the paper leaves nothing out."""
    case = Case(dataclasses.replace(CONFIG, vocab_size=201), n=1, t=1, seed=0)
    model, start = case.model(Causal), torch.full((3000, 1), 200)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    theirs = twin(model).generate(start, max_new_tokens=1, do_sample=True)
    assert len(theirs[:, 1].unique()) == 50
    ours = model.generate(start, max_new_tokens=1, do_sample=True, generator=torch.Generator().manual_seed(0))
    assert len(ours[:, 1].unique()) == 200


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_port_generates_20_tokens_unless_told_and_ours_asks():
    model = case_of(n_positions=64).model(Causal)
    assert twin(model).generate(torch.tensor([[16]]), do_sample=False).shape == (1, 1 + 20)
    with pytest.raises(ValueError, match="expected either max_length or max_new_tokens"):
        model.generate(torch.tensor([[16]]))


def test_past_the_last_position_the_port_ends_in_an_index_error_and_ours_says_why():
    model, tokens = case_of().model(Causal), torch.zeros(1, 17, dtype=torch.long)
    for call in (lambda it: it(tokens), lambda it: it.generate(tokens[:, :1], max_length=18, do_sample=False)):
        with pytest.raises(IndexError, match="index out of range"):
            call(twin(model))
    with pytest.raises(ValueError, match="17 positions, but the model has 16; shorten the input"):
        model(tokens)
    with pytest.raises(ValueError, match="18 tokens from 1 given; expected more than those and at most 17"):
        model.generate(tokens[:, :1], max_length=18)


def test_the_port_hides_a_colour_that_is_its_padding_and_ours_reads_it():
    """As for text of several lengths, it takes the padding's token in a prompt for padding."""
    model, start = case_of().model(Causal), torch.tensor([[5, 1, 2, 3], [1, 5, 5, 2]])
    plain = twin(model).generate(start, max_length=17, do_sample=False)
    assert not torch.equal(twin(model).generate(start, max_length=17, do_sample=False, pad_token_id=5), plain)
    for options in ({}, {"pad_token_id": 5}):
        assert torch.equal(model.generate(start, max_length=17, **options), plain)


def test_the_port_has_more_constraints_of_text_and_ours_refuses_them():
    model, start = case_of().model(Causal), torch.tensor([[16]])
    for name, value in {"no_repeat_ngram_size": 2, "suppress_tokens": [3], "min_p": 0.5}.items():
        assert twin(model).generate(start, max_new_tokens=3, do_sample=False, **{name: value}).shape == (1, 4)
        with pytest.raises(TypeError, match=rf"generate\(\) has no {name}="):
            model.generate(start, max_new_tokens=3, **{name: value})


def test_beams_of_the_port_may_end_at_a_token_and_ours_end_at_one_length():
    model, start, ends = case_of().model(Causal), torch.tensor([[16]]), list(range(14))
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    assert twin(model).generate(start, eos_token_id=ends, pad_token_id=0, **options).shape[1] < 4
    with pytest.raises(ValueError, match="with num_beams; expected none, as beams end at one length here"):
        model.generate(start, eos_token_id=ends, **options)
    assert torch.equal(model.generate(start, **options), twin(model).generate(start, **options))


@torch.no_grad()
def test_the_port_s_caches_are_not_ours_and_ours_says_so(port):
    model, tokens = case_of().model(Causal), case_of().tokens()
    caches = port.DynamicCache(), port.StaticCache(twin(model).config, max_cache_len=16)
    for cache in caches:
        same(twin(model)(tokens, past_key_values=cache).logits, model(tokens).logits)
        with pytest.raises(TypeError, match=f"past_key_values is a {type(cache).__name__}; expected a KeyValueCache"):
            model(tokens, past_key_values=cache)


def test_a_head_that_was_resized_loads_nowhere_in_the_port_and_here_it_does(port, tmp_path):
    """With as many rows as `wte`, it is no longer of the shape that `config.json` asks for."""
    model, tokens = case_of().model(Causal), case_of().tokens()
    theirs = twin(model)
    for one, folder in ((model, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        one.resize_token_embeddings(20)
        assert one.lm_head.weight.shape == (20, 24)
        one.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        port.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = Causal.from_pretrained(tmp_path / folder)
        assert again.config.n_colours == 19 and again.generate(tokens[:, :1], max_new_tokens=3).max() < 19
        same(again(tokens).logits[..., :16], model(tokens).logits[..., :16])


# Images


@torch.no_grad()
def test_the_port_s_processor_makes_65536_tokens_by_default_and_a_checkpoint_s_own_number(port, tmp_path):
    greys = np.stack([np.linspace(-1, 1, 16)] * 3, axis=1)
    image = Image.new("RGB", (9, 7), (200, 100, 0))
    by_default = port.ImageGPTImageProcessorPil(clusters=greys)(images=image, return_tensors="pt")["input_ids"]
    assert by_default.shape == (1, 256 * 256)
    assert by_default.shape[1] > port.ImageGPTConfig().n_positions == 1024
    port.ImageGPTImageProcessorPil(clusters=greys, size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    theirs = port.ImageGPTImageProcessorPil.from_pretrained(tmp_path)(images=image, return_tensors="pt")["input_ids"]
    ours = lab.ImageGPTImageProcessorPil.from_pretrained(tmp_path).encode([image])
    assert theirs.tolist() == ours.tolist() == [[theirs[0, 0]] * 16]


def test_the_port_squashes_an_image_and_ours_can_crop_its_centre_as_the_paper_does(port, tmp_path):
    """8 x 4 pixels, black in the middle and white at both sides: squashed, a grey edge stays; cropped, none does."""
    greys = np.stack([np.linspace(-1, 1, 16)] * 3, axis=1)
    port.ImageGPTImageProcessorPil(clusters=greys, size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, [0, 1, 6, 7]] = 255
    image = Image.fromarray(pixels)
    theirs = port.ImageGPTImageProcessorPil.from_pretrained(tmp_path)(images=image, return_tensors="np")["input_ids"]
    assert (theirs.reshape(4, 4)[:, [0, 3]] > 10).all()
    np.testing.assert_array_equal(lab.ImageGPTImageProcessorPil.from_pretrained(tmp_path).encode([image]), theirs)
    cropping = lab.ImageGPTImageProcessorPil.from_pretrained(tmp_path, crop="center")
    assert (cropping.encode([image]) == 0).all()


def test_the_port_ignores_data_format_and_ours_follows_it(port):
    """It is among the arguments of a call in both."""
    greys, image = np.stack([np.linspace(-1, 1, 16)] * 3, axis=1), Image.new("RGB", (9, 7))
    options = {"do_color_quantize": False, "return_tensors": "np", "data_format": "channels_last"}
    theirs = port.ImageGPTImageProcessorPil(clusters=greys, size={"height": 4, "width": 5})(image, **options)
    ours = lab.ImageGPTImageProcessorPil(clusters=greys, size={"height": 4, "width": 5})(image, **options)
    assert theirs["pixel_values"].shape == (1, 3, 4, 5)
    assert ours["pixel_values"].shape == (1, 4, 5, 3)


# Numbers and memory


def test_the_port_loads_in_the_type_of_the_file_and_ours_in_float32_unless_told(port, tmp_path):
    case_of().model(Causal).save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert port.ImageGPTForCausalImageModeling.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Causal.from_pretrained(tmp_path).dtype == torch.float32
    assert Causal.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_in_float16_the_port_s_norm_gives_zeros_above_255_and_ours_does_not(port):
    from transformers.models.imagegpt.modeling_imagegpt import ImageGPTLayerNorm

    theirs, ours = ImageGPTLayerNorm(4, eps=1e-5), Norm(4, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    theirs.half(), ours.half()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float16)
    assert torch.equal(theirs(255 * signs), signs)
    for size in (256, 300, 60000):
        assert not theirs(size * signs).any()
        assert torch.equal(ours(size * signs), signs)


@torch.no_grad()
def test_in_float16_an_outlying_state_makes_the_port_blind_to_its_pixel():
    """One large coordinate, as trained models have: the norm gives zeros, so that every block adds the same."""
    model, tokens = case_of().model(Causal), case_of().tokens()
    model.transformer.wpe.weight[3, 5] = 2000.0
    wanted = model(tokens).logits
    halves = [(it.half()(tokens).logits.float() - wanted)[:, 3].abs().max() for it in (twin(model), model)]
    assert halves[0] > 0.5
    assert halves[1] < 0.1


def test_the_port_holds_a_square_of_positions_in_every_layer_and_ours_none():
    model = case_of().model(Causal)
    squares = {name: buffer.shape for name, buffer in twin(model).named_buffers()}
    assert squares == {f"transformer.h.{layer}.attn.bias": (1, 1, 16, 16) for layer in range(CONFIG.n_layer)}
    assert not list(model.buffers())


@torch.no_grad()
def test_the_port_averages_ids_of_three_axes_over_the_wrong_one_and_ours_over_pixels():
    case = case_of(num_labels=3, id2label=None)
    model, tokens = case.model(ImageGPTForImageClassification), case.tokens()
    logits = model(tokens).logits
    assert twin(model)(tokens[:, None]).logits.shape == (2, 16, 3)
    same(model(tokens[:, None]).logits, logits[:, None])
    with pytest.raises(RuntimeError):
        twin(model)(tokens[0])
    same(model(tokens[0]).logits, logits[0])


# Masks and encoders


@torch.no_grad()
def test_the_port_reads_a_mask_of_four_axes_as_zeros_and_ones_and_ours_adds_it():
    model, tokens = case_of().model(Causal), case_of().tokens()
    nothing = torch.zeros(2, 1, 16, 16)  # added to the scores, it hides nothing
    theirs, plain = twin(model), model(tokens).logits
    same(theirs(tokens).logits, plain)
    assert (theirs(tokens, attention_mask=nothing).logits - plain).abs().max() > 0.1
    same(model(tokens, attention_mask=nothing).logits, plain)


def with_encoder(length: int = 16) -> tuple:
    """A model with cross-attention, transformers' as it is, tokens and an encoder's states."""
    case = case_of(add_cross_attention=True)
    model = case.model(Causal)
    return model, twin(model, mend=False), case.tokens(), case.normal(2, length, CONFIG.n_embd)


@torch.no_grad()
def test_the_port_ignores_the_encoder_s_mask_and_ours_applies_it():
    model, theirs, tokens, encoder = with_encoder(5)
    hide = {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)}
    options = {"encoder_hidden_states": encoder, "use_cache": False}
    plain = theirs(tokens, **options).logits
    assert torch.equal(theirs(tokens, **options, **hide).logits, plain)
    same(model(tokens, **options).logits, plain)
    shown = model(tokens, **options | {"encoder_hidden_states": encoder[:, :2]}).logits
    same(model(tokens, **options, **hide).logits, shown)
    assert (shown - plain).abs().max() > 0.05


@torch.no_grad()
def test_the_port_hides_the_encoder_behind_the_mask_of_its_own_tokens_and_ours_does_not():
    model, theirs, tokens, encoder = with_encoder()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, 10:] = 0
    options = {"encoder_hidden_states": encoder, "use_cache": False, "output_attentions": True, "attention_mask": mask}
    assert all(not weights[..., 10:].any() for weights in theirs(tokens, **options).cross_attentions)
    assert all((weights[..., 10:] > 0).all() for weights in model(tokens, **options).cross_attentions)
    shorter = options | {"encoder_hidden_states": encoder[:, :5].contiguous()}
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(tokens, **shorter)
    assert model(tokens, **shorter).logits.isfinite().all()


@torch.no_grad()
def test_with_an_encoder_the_port_s_own_cache_fails_and_ours_works():
    model, theirs, tokens, encoder = with_encoder(5)
    with pytest.raises(UnboundLocalError, match="is_updated"):
        theirs(tokens, encoder_hidden_states=encoder)
    assert model(tokens, encoder_hidden_states=encoder).past_key_values.get_seq_length() == 16


@torch.no_grad()
def test_with_an_encoder_the_port_s_cache_doubles_it_at_each_step_and_ours_does_not(port):
    model, theirs, tokens, encoder = with_encoder(5)
    caches, lengths = (
        [KeyValueCache(), port.EncoderDecoderCache(port.DynamicCache(), port.DynamicCache())],
        [],
    )
    for step in range(4):
        for one, cache in zip((model, theirs), caches, strict=True):
            options = {"encoder_hidden_states": encoder, "past_key_values": cache, "output_attentions": True}
            lengths.append(one(tokens[:, step, None], **options).cross_attentions[0].shape[-1])
    assert lengths == [5, 5, 5, 10, 5, 20, 5, 40]


@torch.no_grad()
def test_without_an_encoder_a_port_with_cross_attention_gives_no_attentions_and_ours_does():
    model, theirs, tokens, _ = with_encoder()
    with pytest.raises(IndexError):
        theirs(tokens, output_attentions=True)
    assert len(model(tokens, output_attentions=True).attentions) == CONFIG.n_layer


@torch.no_grad()
def test_the_port_s_first_labels_decide_for_all_later_ones_and_ours_decide_each_time():
    """transformers writes the kind of problem that it guessed into its configuration."""
    case = case_of(num_labels=3, id2label=None)
    model, tokens = case.model(ImageGPTForImageClassification), case.tokens()
    theirs, several = twin(model), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    wanted = twin(model)(tokens, labels=several).loss
    theirs(tokens, labels=torch.tensor([0, 1]))
    assert theirs.config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="batch_size"):
        theirs(tokens, labels=several)
    model(tokens, labels=torch.tensor([0, 1]))
    assert model.config.problem_type is None
    same(model(tokens, labels=several).loss, wanted)
