"""`fast`: paths for a processor's sake give what the plain formulas of the network give."""

import subprocess
import sys

import pytest
import torch

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


@torch.no_grad()
def test_an_activation_is_written_over_nobody_elses_tensor():
    layer, x = Linear(4, 4), torch.arange(8.0).view(2, 4)
    assert fast.activation(quick_gelu, x.clone(), layer, Linear).equal(quick_gelu(x))
    over = x.clone()
    assert fast.activation(quick_gelu, over, layer, Linear).data_ptr() == over.data_ptr()
    hook = layer.register_forward_hook(lambda *_: None)
    assert fast.activation(quick_gelu, over, layer, Linear).data_ptr() != over.data_ptr()
    hook.remove()
    subclass = type("Watched", (Linear,), {})
    for act, maker in ((torch.relu, layer), (quick_gelu, torch.nn.Linear(4, 4)), (quick_gelu, subclass(4, 4))):
        assert fast.activation(act, over, maker, Linear).data_ptr() != over.data_ptr()
    with torch.enable_grad():
        assert fast.activation(quick_gelu, over, layer, Linear).data_ptr() != over.data_ptr()


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
