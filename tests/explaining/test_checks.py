"""The checks pass for a sound model, and each fails for one that is broken in the way it looks for."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import igpt_lab as lab
from conftest import TINY
from igpt_lab.app import cli
from igpt_lab.explaining.checks import LAWS
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

NAMES = [
    "hooks against plain formulas", "causality", "cached decoding against uncached", "batch of 1 against 32",
    "bfloat16 against float32", "cpu:0 against CPU", *LAWS[:-1], "float32 against float64", LAWS[-1],
]  # fmt: skip


def checked(model, **options):
    """With the CPU in the role of an accelerator."""
    return lab.check(model, device="cpu:0", progress=False, **options).set_index("check")


def model_of(**fields):
    """With every parameter away from its initial value."""
    model = ImageGPTForCausalImageModeling(dataclasses.replace(TINY, **fields)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "ln_" in name else 0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": True, "n_inner": 5},
     {"scale_attn_weights": False, "layer_norm_epsilon": 0.3}, {"n_positions": 49, "n_head": 4}],
)  # fmt: skip
def test_a_sound_model_passes(fields):
    table = checked(model_of(**fields))
    assert list(table.index) == NAMES and list(table.columns) == ["measured", "allowed", "unit", "passed"]
    assert table.passed.all() and not table.passed.isna().any()
    assert table.measured["causality"] == 0 and table.measured["bfloat16 against float32"] > 1e-4


def test_what_does_not_apply_is_not_counted():
    table = lab.check(model_of(bidirectional=True), device="cpu", progress=False).set_index("check")
    assert set(table.index[table.passed.isna()]) == {NAMES[1], NAMES[2], "device against CPU", *LAWS}
    assert table.unit["device against CPU"] == "no accelerator" and table.passed.all()


def rounded(bits):
    """x as a sum leaves it whose other term is 2^bits."""
    return lambda x: x + 2.0**bits - 2.0**bits


SABOTAGE = {
    "hooks against plain formulas": lambda x: 1.001 * x,
    "causality": lambda x: x + 1e-6 * x.roll(-1, dims=1),
    "cached decoding against uncached": lambda x: x * (1 + 1e-3 * x.shape[1]),
    "batch of 1 against 32": lambda x: x - 1e-3 * x.mean(0),
    "bfloat16 against float32": rounded(10),
    "float32 against float64": rounded(14),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_block_is_found(name):
    model = model_of()
    model.transformer.h[1].mlp.register_forward_hook(lambda _, __, output: SABOTAGE[name](output))
    table = checked(model)
    assert not table.passed[name] and table.measured[name] > table.allowed[name]


def scaled(_, __, output):
    return 1.01 * output


def drifting():
    """Adds more at each call."""
    calls = iter(range(1000))
    return lambda _, __, output: output + 1e-3 * next(calls)


BREAKS = {
    "lens at the last layer against the loss": lambda model: model.transformer.ln_f.register_forward_hook(scaled),
    "lens against the blocks left out": lambda model: model.transformer.ln_f.register_forward_hook(scaled),
    "patched with its own activations": lambda model: model.transformer.h[1].mlp.register_forward_hook(drifting()),
    "the first state the same for all images": lambda model: model.transformer.h[1].mlp.register_forward_hook(
        lambda _, __, output: output + 1e-3 * output.mean(1, keepdim=True)
    ),
    "attributions against the logits": lambda model: model.transformer.h[1].register_forward_hook(
        lambda _, __, output: (1.001 * output[0], *output[1:])
    ),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_model_that_breaks_a_law_is_found(law):
    model = model_of()
    BREAKS[law](model)
    table = checked(model)
    assert not table.passed[law] and table.measured[law] > table.allowed[law]


def test_a_device_that_computes_otherwise_is_found():
    class Moved(torch.nn.Module):
        """Forgets a little whenever it is moved, as a device would that computes otherwise."""

        factor = 1.0

        def _apply(self, *arguments, **options):
            self.factor *= 1.01
            return super()._apply(*arguments, **options)

        def forward(self, x):
            return x * self.factor

    model = model_of()
    model.transformer.drop = Moved()
    table = checked(model)
    assert not table.passed["cpu:0 against CPU"]


def test_non_finite_weights_fail():
    model = model_of()
    model.transformer.h[2].ln_1.weight.data[3] = float("nan")
    table = checked(model)
    assert not table.passed[["hooks against plain formulas", "causality", "float32 against float64"]].any()


def test_the_model_is_left_as_it_was(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    tiny.train()
    checked(tiny)
    assert tiny.training and tiny.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not any(module._forward_hooks for module in tiny.modules())


def test_given_images(tiny, test):
    assert checked(tiny, images=test).passed.all()
    assert "batch of 1 against 3" in checked(tiny, images=np.arange(48).reshape(3, 16) % 8).index
    for wrong in (np.zeros((2, 15), int), np.full((2, 16), 8)):
        with pytest.raises(ValueError, match=r"expected palette indices \(N, 16\)|tokens from 8 to 8; .* 0 to 7"):
            checked(tiny, images=wrong)
    zeros = [np.zeros((2, 16), kind) for kind in (bool, object)]
    for no_tokens in (np.full((2, 16), 3.9), *zeros, np.zeros((0, 16), int)):
        with pytest.raises(ValueError, match="expected"):
            checked(tiny, images=no_tokens)


def test_the_command(tiny_folder, tiny_images, monkeypatch, capsys):
    assert cli.main(["check", str(tiny_folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("pass ") for line in lines) == 11
    assert "left out  device against CPU: no accelerator" in lines and max(map(len, lines)) <= 80
    assert cli.main(["check", str(tiny_folder), "--device", "cpu", "--images", str(tiny_images)]) == 0
    capsys.readouterr()
    failed = pd.DataFrame([("causality", 0.5, 0.0, "", False)], columns="check measured allowed unit passed".split())
    monkeypatch.setattr(lab, "check", lambda *_, **__: failed, raising=False)
    assert cli.main(["check", str(tiny_folder)]) == 1
    assert capsys.readouterr().out.startswith("FAIL      causality: 5.0e-01, at most 0")
