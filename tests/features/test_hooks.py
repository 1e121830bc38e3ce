"""Recorded points against the model's own hidden states, the block's equations, and transformers' model."""

import numpy as np
import pytest
import torch

from conftest import TOKENS, recorded
from igpt_lab.features.hooks import POINTS, layers_of, record
from igpt_lab.features.poolings import pooling
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling


def test_equals_hidden_states(tiny):
    with torch.no_grad():
        states = tiny(TOKENS, output_hidden_states=True).hidden_states
    pooled = recorded(tiny)
    assert pooled["ln_1"].shape == (5, 4, 8) and pooled["attn_out"].shape == (5, 3, 8)
    means = torch.stack([state.mean(1) for state in states[:3]], 1)
    torch.testing.assert_close(pooled["resid_pre"][:, :3], means)
    torch.testing.assert_close(pooled["ln_1"][:, 3], states[3].mean(1))
    x = states[1].numpy().astype(float)  # the norm by its formula
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tiny.transformer.h[1].ln_1.weight.detach().numpy()
    np.testing.assert_allclose(pooled["ln_1"][:, 1], normed.mean(1), atol=1e-5)


def test_points_obey_the_block(tiny):
    pooled = recorded(tiny)
    torch.testing.assert_close(pooled["resid_pre"][:, :3] + pooled["attn_out"], pooled["resid_mid"])
    torch.testing.assert_close(pooled["resid_mid"] + pooled["mlp_out"], pooled["resid_post"])
    torch.testing.assert_close(pooled["resid_post"], pooled["resid_pre"][:, 1:])


def test_same_on_the_port(tiny, tiny_folder):
    transformers = pytest.importorskip("transformers")
    port = transformers.ImageGPTForCausalImageModeling.from_pretrained(tiny_folder).eval()
    ours, theirs = recorded(tiny), recorded(port)
    for point in POINTS:
        torch.testing.assert_close(ours[point], theirs[point], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alignment", ["sos", "raw"])
def test_pixels_are_aligned_on_both_models(tiny, tiny_folder, alignment):
    transformers = pytest.importorskip("transformers")
    port = transformers.ImageGPTModel.from_pretrained(tiny_folder).eval()
    shifted = torch.cat([torch.full((5, 1), 8), TOKENS[:, :-1]], 1) if alignment == "sos" else TOKENS
    with torch.no_grad():
        expected = port(shifted, output_hidden_states=True).hidden_states[2].mean(1)
        for model in (tiny, port):
            for call in (lambda model: model(TOKENS), lambda model: model(input_ids=TOKENS)):
                with record(model, ["resid_pre"], layers=[2], alignment=alignment) as pooled:
                    call(model)
                torch.testing.assert_close(pooled["resid_pre"][:, 0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected 'sos' or 'raw'"), record(tiny, alignment="shift"):
        pass


@pytest.mark.parametrize("point", POINTS)
def test_a_run_ends_with_what_is_asked_on_both_models(tiny, tiny_folder, point):
    transformers = pytest.importorskip("transformers")
    port = transformers.ImageGPTModel.from_pretrained(tiny_folder).eval()
    whole = recorded(tiny)[point][:, 1:2]
    for model in (tiny, port):
        trunk, ran = getattr(model, "transformer", model), []
        for i, block in enumerate(trunk.h):
            block.register_forward_pre_hook(lambda *_, i=i, ran=ran: ran.append(i))
        with torch.no_grad(), record(model, [point], layers=[1]) as pooled:
            pooled.run(TOKENS)
            assert ran == [0, 1]
            torch.testing.assert_close(pooled[point], whole, atol=1e-5, rtol=1e-5)
            model(TOKENS)  # and a call of the model itself goes to its end
            assert ran == [0, 1, 0, 1, 2]


def test_a_layer_that_does_not_run_exactly_once_is_an_error(tiny):
    with record(tiny, ["mlp_out"]), pytest.raises(RuntimeError, match="mlp_out of layer 1 did not run"):
        tiny.transformer.h[1].forward = lambda x, **_: (x, None, None)
        tiny(TOKENS)
    again = tiny.transformer.h[2]
    del tiny.transformer.h[1].forward
    again.mlp.forward = lambda x: again.mlp.c_proj(x.repeat(1, 1, 4)) + 0 * again.ln_2(x)
    with record(tiny, ["ln_2"]), pytest.raises(RuntimeError, match="ln_2 of layer 2 ran twice"):
        tiny(TOKENS)


def test_layers_by_name(tiny):
    everything, some = recorded(tiny), recorded(tiny, layers=[2, 0, -1, 2])
    torch.testing.assert_close(some["ln_1"], everything["ln_1"][:, [2, 0, 3, 2]])
    torch.testing.assert_close(some["mlp_out"], everything["mlp_out"][:, [2, 0, 2, 2]])


def test_statistics(tiny):
    with torch.no_grad(), record(tiny, ["resid_pre"]) as pooled:
        tiny(TOKENS)
        states = tiny(TOKENS, output_hidden_states=True).hidden_states
    assert pooled.stats("resid_pre")[1, 0] == states[1].abs().max()
    assert pooled.stats("resid_pre")[:, 1:].sum() == 0
    tiny.transformer.wte.weight.data[TOKENS[0, 0]] = float("nan")
    with torch.no_grad(), record(tiny, ["resid_pre"], layers=[0]) as pooled:
        tiny(TOKENS)
    assert pooled.stats("resid_pre")[0, 2] == (TOKENS == TOKENS[0, 0]).sum() * 8


def test_hooks_are_gone_and_others_stay(tiny):
    calls = []
    tiny.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.modules())

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), record(tiny, POINTS):
            assert hooks() > 1
            raise error
        assert hooks() == 1
    tiny(TOKENS)
    assert calls == [1]

    def generator():
        with record(tiny, POINTS):
            yield

    begun = generator()
    next(begun)
    assert hooks() > 1
    begun.close()
    assert hooks() == 1


@pytest.mark.parametrize("compilation", ["called before", "called first inside", "in place", "a part"])
@torch.no_grad()
def test_a_compiled_model_is_recorded_without_its_compiler(tiny, compilation):
    want, logits = recorded(tiny), tiny(TOKENS).logits
    torch._dynamo.reset()
    model = tiny
    if compilation == "in place":
        model.compile(backend="aot_eager")
    elif compilation == "a part":
        model.transformer = torch.compile(model.transformer, backend="aot_eager", fullgraph=True)
    else:
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compilation != "called first inside":
        model(TOKENS)
    with pytest.warns(UserWarning, match="a compiled model is recorded without its compiler"):
        got = recorded(model)
    for point in POINTS:
        torch.testing.assert_close(got[point], want[point])
    torch.testing.assert_close(model(TOKENS).logits, logits)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_gradient_checkpointing_records_once(tiny):
    want = recorded(tiny)
    tiny.train().gradient_checkpointing_enable()
    with record(tiny, POINTS) as pooled:
        for _ in range(2):
            tiny(TOKENS, labels=TOKENS).loss.backward()
    for point in POINTS:
        torch.testing.assert_close(pooled[point], want[point])


def test_one_name_and_one_layer_are_lists_of_one_and_none_is_refused(tiny):
    with record(tiny, "ln_1", layers=2) as pooled:
        tiny(TOKENS)
    torch.testing.assert_close(pooled["ln_1"], recorded(tiny)["ln_1"][:, 2:3])
    with pytest.raises(ValueError, match="layers is empty; expected at least one"), record(tiny, layers=[]):
        pass
    with pytest.raises(TypeError, match="layers='last' is of type str"), record(tiny, layers="last"):
        pass


def test_bad_names(tiny):
    with pytest.raises(ValueError, match="did you mean 'attn_out'"):
        layers_of("atn_out", 3)
    with pytest.raises(ValueError, match="layers 0..2 there"):
        layers_of("mlp_out", 3, [3])
    with pytest.raises(ValueError, match="grid:g"):
        pooling("median")
    with pytest.raises(ValueError, match="multiple of 3"):
        recorded(tiny, pool="grid:3")
    with record(tiny, ["ln_1"]) as pooled, pytest.raises(RuntimeError, match="did not run"):
        pooled["ln_1"]
    with pytest.raises(KeyError, match="was not recorded"):
        pooled["ln_2"]


def test_meta_device(tiny):
    with torch.device("meta"):
        model = ImageGPTForCausalImageModeling(tiny.config)
        with record(model, POINTS) as pooled:
            model(torch.zeros(2, 16, dtype=torch.long))
    assert all(pooled[point].is_meta and pooled.stats(point).is_meta for point in POINTS)
