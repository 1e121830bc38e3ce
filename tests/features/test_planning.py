"""A plan against numbers worked out by hand."""

from pathlib import Path

import pytest

from igpt_lab.app.cli import main
from igpt_lab.features.planning import DEVICES, IMAGES, SHARE, describe, plan
from igpt_lab.models.config import SIZES, ImageGPTConfig
from igpt_lab.models.cost import block_weights
from igpt_lab.models.imagegpt import ImageGPTModel


@pytest.mark.parametrize("size", ["S", "M", "L"])
def test_flops_are_those_of_the_shapes(size):
    costs, config = plan(SIZES[size], 1000, devices="1xA100"), SIZES[size]
    t, d = config.n_positions, config.n_embd
    one = config.n_layer * (24 * t * d**2 + 2 * t * (t + 1) * d)  # 12 D^2 weights, and half of T x T twice
    assert costs["flops"] == pytest.approx(1000 * one, rel=1e-12)
    assert costs["seconds"] == pytest.approx(costs["flops"] / (DEVICES["A100"][0] * SHARE))


@pytest.mark.parametrize("n_inner", [None, 24])
def test_weights_are_those_of_a_model_s_matrices(n_inner):
    config = ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=8, n_layer=3, n_head=2, n_inner=n_inner)
    model = ImageGPTModel(config)
    assert block_weights(config) == sum(weight.numel() for weight in model.h.parameters() if weight.ndim == 2)
    assert n_inner or block_weights(config) == 12 * 3 * 8**2


def test_imagenet_at_size_l():
    costs = plan(SIZES["L"], 1_281_167, devices="8xH100")
    assert costs["bytes"] == 1_281_167 * (4 * 49 * 1536 + 16) and round(costs["bytes"] / 1e9) == 386
    assert 1e18 < costs["flops"] / 2 < 2e18  # multiply-adds, as the issue has them
    assert costs["parts"] == 641 and 8 * costs["seconds"] / 3600 == pytest.approx(costs["device_hours"] * 81 * 8 / 641)
    assert "386 GB in 641 parts" in describe(costs)


def test_the_command(capsys):
    assert main(["plan", "S", "cifar10", "--devices", "2xH200"]) == 0
    assert f"{IMAGES['cifar10']:,} images" in capsys.readouterr().out
    assert main(["plan", "S", "1000", "--devices", "8xB9000"]) == 1
    assert "expected a number and a name, such as 8xH100" in capsys.readouterr().err


def test_the_table_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    for size in "SML":
        for name, title in (("cifar10", "CIFAR-10"), ("imagenet", "ImageNet")):
            costs = plan(SIZES[size], IMAGES[name], devices="8xH100")
            line = f"| {size} | {title} | {costs['flops']:.2e} | {costs['bytes'] / 1e9:,.3g} | {costs['parts']:,} |"
            line += (
                f" {costs['device_hours']:,.3g} | {costs['seconds'] / 60:,.3g} | {costs['device_bytes'] / 1e9:,.3g} |"
            )
            assert line in text
