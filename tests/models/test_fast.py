"""`fast`: paths for a processor's sake give what the plain formulas of the network give."""

import subprocess
import sys

import pytest
import torch

from igpt_lab.core import devices
from igpt_lab.models import fast
from igpt_lab.models.config import ImageGPTConfig, quick_gelu
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, Linear

SHAPE = {"vocab_size": 9, "n_positions": 36, "n_embd": 16, "n_layer": 2, "n_head": 2}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENS = torch.arange(72).view(2, 36) % 8


def random_model(**changes) -> ImageGPTForCausalImageModeling:
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**SHAPE | DRY | changes), init=None)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"activation_function": "relu"}, {"bidirectional": True}])
@torch.no_grad()
def test_inference_without_the_fast_paths_is_the_same(changes, monkeypatch):
    model = random_model(**changes).double()
    torch.nn.init.zeros_(model.transformer.h[0].mlp.c_fc.bias)
    quick = model(TOKENS, output_hidden_states=True)
    monkeypatch.setattr(fast, "applies", lambda x: False)
    plain = model(TOKENS, output_hidden_states=True)
    for one, other in zip((quick.logits, *quick.hidden_states), (plain.logits, *plain.hidden_states), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("onednn", [False, True])
@torch.no_grad()
def test_an_activation_is_written_over_nobody_elses_tensor(onednn, monkeypatch):
    monkeypatch.setattr(devices, "mkl_is_slow", lambda: onednn and torch.backends.mkldnn.is_available())
    layer, x = Linear(4, 8), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    expected = quick_gelu(layer(x))
    quick = fast.hidden(quick_gelu, x, layer, Linear)
    torch.testing.assert_close(quick, expected, atol=1e-6, rtol=1e-5)
    assert onednn or quick.equal(expected)
    over = layer(x)
    assert fast.quick_gelu_(over).data_ptr() == over.data_ptr() and over.equal(expected)
    assert fast.hidden(torch.relu, x, layer, Linear).equal(layer(x).relu())
    watched = []
    hook = layer.register_forward_hook(lambda *call: watched.append(call[2]))
    assert fast.hidden(quick_gelu, x, layer, Linear).equal(expected) and watched[0].equal(layer(x))
    hook.remove()
    with torch.enable_grad():
        assert fast.hidden(quick_gelu, x, layer, Linear).grad_fn is not None
    with torch.autocast("cpu", torch.float16):
        assert fast.hidden(quick_gelu, x, layer, Linear).dtype == torch.float16
    of_torch = torch.nn.Linear(4, 8)
    assert fast.hidden(quick_gelu, x, of_torch, Linear).equal(quick_gelu(of_torch(x)))
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    assert fast.hidden(quick_gelu, x, layer, Linear).equal(quick_gelu(layer(x)))
    doubled = type("Doubled", (Linear,), {"forward": lambda self, x: 2 * Linear.forward(self, x)})(4, 8)
    doubled.load_state_dict(layer.state_dict())
    assert fast.hidden(quick_gelu, x, doubled, Linear).equal(quick_gelu(doubled(x)))
    assert x.equal(before)


@torch.no_grad()
def test_an_activation_in_bfloat16_is_as_near_as_its_rounding():
    layer, x = Linear(16, 64), torch.randn(3, 30, 16, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.weight, 0, 0.5, generator=torch.Generator().manual_seed(1))
    exact = quick_gelu(layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fast.hidden(quick_gelu, x, layer, Linear)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("changes", [{}, {"bidirectional": True}])
@torch.enable_grad()
def test_prepared_training_has_the_same_gradients(changes):
    model = random_model(**changes).double().train()
    zero = {f"transformer.h.{i}.{name}.bias" for i in range(2) for name in ("attn.c_attn", "mlp.c_fc")}
    for name in zero:
        torch.nn.init.zeros_(model.get_parameter(name))
    kept = {name: weight for name, weight in model.named_parameters() if name not in zero}
    hidden = {"masked": TOKENS == 3} if changes else {}

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(TOKENS, labels=TOKENS, **hidden).loss, list(kept.values()))

    before = gradients()
    assert model.prepare_training() == zero
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("positions", "bfloat16", "chunks"),
    [(144, False, 2), (1023, False, 8), (1024, False, 0), (1024, True, 8)],
)
def test_attention_is_written_out_where_that_is_faster(positions, bfloat16, chunks):
    model = random_model(n_positions=positions)
    model.prepare_training(bfloat16=bfloat16)
    assert [block.attn.chunks for block in model.transformer.h] == [chunks] * 2


def test_the_backbone_has_an_earlier_name():
    model = random_model()
    with pytest.warns(DeprecationWarning, match="backbone"):
        assert model.trunk is model.backbone is model.transformer


def test_a_model_is_loaded_without_torch_s_compiler():
    """Its import takes seconds."""
    code = "import sys, igpt_lab as lab; lab.load_model('fashion-xs'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
