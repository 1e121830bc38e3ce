"""Edits against laws of the network, a pass written out by hand, and transformers' model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt_lab.explaining.edits import Edits, edit, window
from igpt_lab.explaining.parts import skip
from igpt_lab.features.extraction import extract
from igpt_lab.features.hooks import POINTS, layers_of, record
from igpt_lab.features.settings import width_at
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import align
from igpt_lab.sampling.sampling import sample

TOKENS = torch.randint(0, 8, (5, 16), generator=torch.Generator().manual_seed(0))
PLACES = [(point, layer) for point in POINTS for layer in layers_of(point, 3)]


def port(folder, name="ImageGPTForCausalImageModeling"):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name).from_pretrained(folder).eval()


def hooks_of(model):
    """How many hooks are registered at any module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def states(model, place, tokens=TOKENS):
    """The states (N, T, D) at a place."""
    with torch.no_grad(), record(model, [place[0]], layers=[place[1]], pool=lambda x, *_: x.clone()) as kept:
        model(tokens)
    return kept[place[0]][:, 0]


@torch.no_grad()
def logits(model, edits, tokens=TOKENS, **options):
    with edit(model, edits, **options):
        return model(tokens).logits


@pytest.mark.parametrize("place", PLACES)
def test_a_run_patched_with_its_own_activations_changes_nothing(tiny, tiny_folder, place):
    for model in (tiny, port(tiny_folder)):
        own, want = states(model, place), logits(model, {})
        assert logits(model, {place: lambda x, own=own: own}).equal(want)
        assert not logits(model, {place: lambda x: 2 * x + 1}).equal(want)


@pytest.mark.parametrize("place", PLACES)
def test_both_models_are_edited_alike(tiny, tiny_folder, place):
    ours, theirs = (logits(model, {place: lambda x: x.flip(1)}) for model in (tiny, port(tiny_folder)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("edit_first", [True, False])
def test_record_sees_the_edited_value(tiny, place, edit_first):
    def change(x):
        return x.flip(0) + 1

    own, point, layer = states(tiny, place), *place
    blocks = [edit(tiny, {place: change}), record(tiny, [point], layers=[layer], pool=lambda x, *_: x)]
    first, second = blocks if edit_first else blocks[::-1]
    with torch.no_grad(), first as a, second as b:
        tiny(TOKENS)
        assert (b if edit_first else a)[point][:, 0].equal(change(own))
    assert hooks_of(tiny) == 0


def test_an_edit_reaches_what_comes_after_it_and_nothing_before(tiny):
    """The residual branch too: with all that layer 1 adds undone, a value put in at its middle comes out of it."""
    new = torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(1))
    silent = {("mlp_out", 1): torch.zeros_like}
    for point in ("resid_mid", "resid_post"):
        with edit(tiny, {(point, 1): lambda x: new} | silent):
            assert states(tiny, ("resid_pre", 2)).equal(new)
            assert states(tiny, ("resid_pre", 1)).equal(states(tiny, ("resid_post", 0)))
    with edit(tiny, {("resid_pre", 1): lambda x: new, ("attn_out", 1): torch.zeros_like} | silent):
        assert states(tiny, ("resid_post", 1)).equal(new)
        assert not states(tiny, ("resid_post", 0)).equal(new)


def test_edits_at_one_place_are_made_from_the_inside_out(tiny):
    own = states(tiny, ("ln_1", 1))
    with edit(tiny, {("ln_1", 1): lambda x: 2 * x}), edit(tiny, {("ln_1", 1): lambda x: x + 1}):
        torch.testing.assert_close(states(tiny, ("ln_1", 1)), 2 * (own + 1))


@pytest.mark.parametrize("kind", [dict, Edits])
def test_edits_that_are_joined_at_one_place_are_made_from_left_to_right(kind):
    place, twos = ("mlp_out", 1), torch.tensor([2.0])
    edits = kind({place: torch.neg, ("mlp_out", 2): torch.neg}) | Edits({place: torch.exp})
    assert edits[place](twos) == torch.exp(-twos) and edits["mlp_out", 2](twos) == -twos
    edits |= {place: torch.neg}
    assert edits[place](twos) == -torch.exp(-twos)


def test_a_negative_layer_counts_from_the_end(tiny):
    for point, last in (("resid_pre", 3), ("mlp_out", 2)):
        assert logits(tiny, {(point, -1): torch.neg}).equal(logits(tiny, {(point, last): torch.neg}))


def test_gradients_flow_through_an_edit(tiny):
    for point in POINTS:
        new = torch.zeros(width_at(point, tiny.config), requires_grad=True)
        with edit(tiny, {(point, 1): lambda x, new=new: x + new}):
            tiny(TOKENS, labels=TOKENS).loss.backward()
        assert new.grad.abs().sum() > 0


def test_gradient_checkpointing_edits_again_in_the_backward_pass(tiny):
    gradients = []
    for again in (False, True):
        tiny.zero_grad()
        tiny.train()
        if again:
            tiny.gradient_checkpointing_enable()
        with edit(tiny, {("resid_mid", 1): torch.sin} | skip(tiny, "block", 0)):
            tiny(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(tiny.transformer.wte.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_compiled_model_is_edited_without_its_compiler(tiny):
    edits = {("mlp_out", 1): torch.zeros_like}
    want, plain = logits(tiny, edits), tiny(TOKENS).logits
    torch._dynamo.reset()
    model = torch.compile(tiny, backend="eager")
    model(TOKENS)
    with pytest.warns(UserWarning, match="a compiled model is edited without its compiler"):
        torch.testing.assert_close(logits(model, edits), want)
    torch.testing.assert_close(model(TOKENS).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_value_of_another_dtype_is_taken_in_the_models(tiny, dtype):
    model = tiny.to(dtype)
    for place in (("resid_mid", 1), ("head_out", 0)):
        assert logits(model, {place: lambda x: x.float()}).dtype == dtype


def broken(x):
    raise OSError("broken")


@pytest.mark.parametrize(
    ("edits", "error", "words"),
    [
        ({("attn_outt", 0): torch.neg}, ValueError, "did you mean 'attn_out'"),
        ({("mlp_out", 3): torch.neg}, ValueError, r"layer 3 at mlp_out; this model has layers 0..2 there"),
        ({("mlp_out", 2): torch.neg, ("mlp_out", -1): torch.neg}, ValueError, "mlp_out of layer 2 is given twice"),
        ({("mlp_out", 2): 0}, TypeError, r"\('mlp_out', 2\): int; expected \(point, layer\): function"),
        ({"mlp_out": torch.neg}, TypeError, "'mlp_out': .* expected"),
        ({("mlp_out", 1.0): torch.neg}, TypeError, r"\('mlp_out', 1.0\): .* expected \(point, layer\)"),
        ({("mlp_out", "1"): torch.neg}, TypeError, r"\('mlp_out', '1'\): .* expected \(point, layer\)"),
        ({(1, "mlp_out"): torch.neg}, TypeError, r"\(1, 'mlp_out'\): .* expected \(point, layer\)"),
        ([("mlp_out", 2)], TypeError, r"edits are a list; expected \{\(point, layer\): function\}"),
        ({("mlp_out", 1): lambda x: None}, TypeError, r"returned a NoneType; expected a tensor \(5, 16, 8\)"),
        ({("resid_mid", 1): lambda x: x[:1]}, ValueError, r"returned \(1, 16, 8\) on cpu; expected \(5, 16, 8\)"),
        ({("ln_1", 3): lambda x: x.to("meta")}, ValueError, "on meta; expected .* on cpu"),
        ({("mlp_act", 1): broken}, OSError, "broken"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_no_hook_is_left(tiny, edits, error, words):
    want = logits(tiny, {})
    with pytest.raises(error, match=words) as caught:
        logits(tiny, edits)
    assert "\n" not in str(caught.value)
    assert hooks_of(tiny) == 0
    assert logits(tiny, {}).equal(want)


def test_a_place_that_does_not_run_exactly_once_is_an_error(tiny):
    tiny.transformer.h[1].forward = lambda x, **_: (x, None, None)
    with pytest.raises(RuntimeError, match="mlp_out of layer 1 did not run"):
        logits(tiny, {("mlp_out", 1): torch.neg})
    del tiny.transformer.h[1].forward
    tiny.transformer.h[1].mlp.forward = lambda x: tiny.transformer.h[1].ln_2(x)  # noqa: PLW0108 (with its hooks)
    with pytest.raises(RuntimeError, match="ln_2 of layer 1 ran twice"):
        logits(tiny, {("ln_2", 1): torch.neg})
    assert hooks_of(tiny) == 0


def test_a_run_that_ends_early_can_be_edited(tiny):
    with edit(tiny, {("mlp_out", 0): torch.zeros_like, ("mlp_out", 2): torch.neg}):
        want = states(tiny, ("resid_pre", 1))
        with torch.no_grad(), record(tiny, ["resid_pre"], layers=[1], pool=lambda x, *_: x) as kept:
            for _ in range(2):
                kept.run(TOKENS)
                assert kept["resid_pre"][:, 0].equal(want)


def drawn(model, **options):
    return model.generate(TOKENS[:, :3], max_length=17, do_sample=False, **options)


@pytest.mark.parametrize("place", [("resid_mid", 1), ("head_out", 0), ("resid_pre", 3)])
def test_cached_decoding_under_a_position_wise_edit(tiny, tiny_folder, place):
    plain = drawn(tiny)
    for model in (tiny, port(tiny_folder)):
        with edit(model, {place: torch.neg} | skip(model, "block", 1 if place[1] != 1 else 0), position_wise=True):
            cached, uncached = (drawn(model, use_cache=cache) for cache in (True, False))
        assert cached.equal(uncached) and not cached.equal(plain)


def test_what_would_draw_wrong_images_is_refused(tiny):
    with edit(tiny, {("mlp_out", 1): lambda x: x.flip(1)}):
        with pytest.raises(ValueError, match="a cached step shows an edit one position, and not which"):
            drawn(tiny)
        assert drawn(tiny, use_cache=False).shape == (5, 17)
        with pytest.raises(ValueError, match="inside an `edit` block draws no images by steps; use model.generate"):
            sample(tiny, 2, progress=False)
    with window(tiny, 1), pytest.raises(ValueError, match="inside an `edit` block"):
        sample(tiny, 2, progress=False)
    assert sample(tiny, 2, progress=False).tokens.shape == (2, 16)


def test_edited_features_get_into_no_store(tiny, test, tmp_path):
    with edit(tiny, {("mlp_out", 1): torch.neg}), pytest.raises(ValueError, match="use `record` there"):
        extract(tiny, test, store=tmp_path, device="cpu", progress=False)


# Windows: T = 16, side 4.


def attended(model, layer, radius):
    """Attention's output (N, T, D) of a layer written out, pixel by pixel, from the inputs of the layer."""
    block, x = model.transformer.h[layer], states(model, ("ln_1", layer), align(TOKENS, "sos", model.config))
    query, key, value = block.attn.c_attn(x).view(5, 16, 3, 2, 4).unbind(2)
    out = torch.zeros(5, 16, 2, 4)
    for i in range(16):
        y, x = divmod(i, 4)  # of the predicted pixel
        near = [j for j in range(1, i + 1) if max(abs((j - 1) // 4 - y), abs((j - 1) % 4 - x)) <= radius]
        slots = [0, *near]
        scores = torch.einsum("nhc,njhc->nhj", query[:, i], key[:, slots]) / math.sqrt(4)
        out[:, i] = torch.einsum("nhj,njhc->nhc", scores.softmax(-1), value[:, slots])
    return out.flatten(2)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_window_is_attention_to_near_pixels_and_the_start(tiny, tiny_folder, layer, radius):
    fed = align(TOKENS, "sos", tiny.config)
    with torch.no_grad():
        want = attended(tiny, layer, radius)
    for model in (tiny, port(tiny_folder)):
        with window(model, radius, layers=[layer]):
            torch.testing.assert_close(states(model, ("head_out", layer), fed), want, atol=1e-5, rtol=1e-5)
        assert hooks_of(model) == 0


def test_a_window_of_nothing_leaves_the_start_token(tiny):
    fed = align(TOKENS, "sos", tiny.config)
    x = states(tiny, ("ln_1", 1), fed)
    value = tiny.transformer.h[1].attn.c_attn(x[:, :1]).detach()[..., 16:].expand(5, 16, 8)
    with window(tiny, 0, layers=[1]):
        torch.testing.assert_close(states(tiny, ("head_out", 1), fed), value)


@pytest.mark.parametrize("options", [{}, {"reorder_and_upcast_attn": True}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_window_as_wide_as_the_image_hides_nothing(tiny, options):
    model = ImageGPTForCausalImageModeling(replace(tiny.config, **options)).eval()
    model.load_state_dict(tiny.state_dict())
    fed = align(TOKENS, "sos", model.config)
    with torch.no_grad():
        want = model(fed).logits
        for radius in (4, 40):
            with window(model, radius):
                torch.testing.assert_close(model(fed).logits, want)
        with window(model, 2):
            assert (model(fed).logits - want).abs().max() > 1e-3


def test_a_window_in_cached_decoding_and_with_a_mask(tiny, tiny_folder):
    begun = F.pad(TOKENS[:, :3], (1, 0), value=8)
    for model in (tiny, port(tiny_folder)):
        with window(model, 1, layers=[0, 2]):
            cached, uncached = (
                model.generate(begun, max_length=17, do_sample=False, use_cache=cache) for cache in (True, False)
            )
        assert cached.equal(uncached)
        shown = torch.ones(5, 16).index_fill(1, torch.tensor([3, 4]), 0)
        fed = align(TOKENS, "sos", tiny.config)
        other = fed.index_fill(1, torch.tensor([3, 4]), 7)
        with window(model, 2), torch.no_grad():
            one, two = (model(ids, attention_mask=shown).logits for ids in (fed, other))
        torch.testing.assert_close(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": -1}, "radius -1 of 16 positions; expected 0 or more"),
        ({"radius": 1, "layers": [3]}, "layer 3 at attn_out; this model has layers 0..2 there"),
    ],
)
def test_no_window(tiny, options, words):
    with pytest.raises(ValueError, match=words), window(tiny, **options):
        pass


def test_no_window_for_a_bidirectional_model(tiny):
    tiny.config = replace(tiny.config, bidirectional=True)
    with pytest.raises(ValueError, match="a bidirectional model sees all pixels at once"), window(tiny, 1):
        pass


def test_a_window_is_gone_after_an_error(tiny):
    with pytest.raises(OSError, match="broken"), window(tiny, np.int64(1)):
        broken(None)
    assert hooks_of(tiny) == 0 and not tiny.transformer.edits
