"""What runs on a device against the same on the CPU: what `make gpu` runs.

The device is the accelerator of this machine, or the CPU where there is none, or what IGPT_LAB_DEVICE names. Float32 is
held against float64 on the CPU, with TF32 off; bfloat16 keeps eight bits, so it is held to be near, and to differ.

The paths: the network, its gradients, compiled, with its cache and in shares; sampling; extraction, of other networks
too; probes, with few labels and by neighbours; two instruments; training, in bfloat16 and compiled too, stopped, and on
classes.
"""

import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import igpt_lab as lab
from igpt_lab.core.devices import best_device
from igpt_lab.features.hooks import POINTS
from igpt_lab.models.losses import align, losses_of
from igpt_lab.sampling.decoding import Decoder
from igpt_lab.training import parallel
from igpt_lab.training.settings import PretrainConfig
from igpt_lab.training.trainer import Trainer

DEVICE = best_device(os.environ.get("IGPT_LAB_DEVICE") or None)
EXACT, LOW = 1e-4, 3e-2  # of the largest number of a tensor, in float32 and in bfloat16
SHAPE = lab.ImageGPTConfig(
    vocab_size=33, n_positions=64, n_embd=64, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
RECIPE = PretrainConfig(
    steps=6, batch_size=8, warmup=1, holdout=8, validate=8, log_every=1, save_every=2, dtype="float32", compile=False
)
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def model_of(dtype=torch.float32, device=DEVICE):
    """Every tensor, biases too, moved off its initial value: the same numbers on every device."""
    model, generator = lab.ImageGPTForCausalImageModeling(SHAPE).eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float("ln_" in name), 0.1, generator=generator)
    return model.to(device, dtype)


def pixels(count=6):
    return torch.randint(SHAPE.n_colours, (count, SHAPE.n_positions), generator=torch.Generator().manual_seed(1))


def inputs(device=DEVICE):
    return align(pixels(), "sos", SHAPE).to(device)


def assert_near(values, expected, bound, least=-1.0):
    """Within a share of the largest expected number, and further off than another one."""
    expected = torch.as_tensor(expected).cpu().double()  # where some devices have no such numbers
    assert expected.std() > 1e-3
    distance = (torch.as_tensor(values).cpu().double() - expected).abs().max() / expected.abs().max()
    assert least < distance <= bound, f"{distance:.1e}"


@contextmanager
def autocast(low):
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
        yield


@pytest.fixture(scope="module")
def expected():
    """Logits, and pooled states by point, in float64 on the CPU."""
    model = model_of(torch.float64, "cpu")
    with torch.no_grad(), lab.record(model, POINTS) as pooled:
        logits = model(inputs("cpu"), use_cache=False).logits
        return logits, {point: pooled[point] for point in POINTS}


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_logits_and_states_at_every_point(expected, low):
    model = model_of()
    with torch.no_grad(), autocast(low), lab.record(model, POINTS) as pooled:
        logits = model(inputs(), use_cache=False).logits
        states = {point: pooled[point] for point in POINTS}
    bounds = (LOW, EXACT) if low else (EXACT,)  # what is as near as float32 was not in bfloat16
    assert_near(logits, expected[0], *bounds)
    for point, values in expected[1].items():
        assert_near(states[point], values, *bounds)


def test_gradients():
    def gradients(model):
        lab.next_pixel_loss(model, pixels().to(model.device)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    ours, exact = gradients(model_of()), gradients(model_of(torch.float64, "cpu"))
    largest = max(gradient.abs().max() for gradient in exact.values())
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (ours[name].cpu().double() - gradient).abs().max() <= EXACT * largest, name


@pytest.mark.slow
def test_a_compiled_model(expected):
    model = torch.compile(model_of())
    try:
        with torch.no_grad():
            assert_near(model(inputs(), use_cache=False).logits, expected[0], EXACT)
    finally:
        torch.compiler.reset()


def test_the_cache(expected):
    model, tokens, logits, cache = model_of(), inputs(), [], None
    with torch.no_grad():
        for part in tokens.split([20, 1, 1, 42], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_near(torch.cat(logits, 1), expected[0], EXACT)


def captured(advance):
    """The same step, captured once and played again and again."""
    with torch.cuda.device(DEVICE):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be captured
            advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = advance()

    def play():
        graph.replay()
        return output

    return play


def steps_of(decoder, tokens):
    """Logits (T - 5, N, V) of the pixels from the sixth on; on CUDA one captured step is played again and again."""
    decoder.fill(tokens[:, :5].numpy())
    fed, place = tokens[:, 4].to(DEVICE), decoder.positions[5:6].clone()

    def advance():
        return decoder.step(fed, place)

    if DEVICE.type == "cuda":
        advance = captured(advance)
    for position in range(5, SHAPE.n_positions):
        fed.copy_(tokens[:, position - 1])
        place.fill_(position)
        yield advance().clone()


def test_a_sampler_s_step_is_the_same_again_and_again_and_can_be_captured(expected):
    with torch.inference_mode():
        steps = torch.stack(list(steps_of(Decoder(model_of(), 6), pixels())), dim=1)
    assert_near(steps, expected[0][:, 5:, : SHAPE.n_colours], EXACT)


def test_samples_have_the_probability_that_the_cpu_gives_them():
    drawn = lab.sample(model_of(), 16, seed=3, progress=False)
    losses = losses_of(model_of(device="cpu"), drawn.tokens)
    np.testing.assert_allclose(-drawn.log_p.mean(1), losses, rtol=1e-4)
    here = lab.sample(model_of(device="cpu"), 16, seed=3, progress=False)
    assert (drawn.tokens == here.tokens).all(1).mean() > 0.8  # rounding decides where two colours are level


@pytest.mark.parametrize(("dtype", "bounds"), [("float32", (EXACT,)), ("bfloat16", (LOW, EXACT))])
def test_stored_features_are_those_of_the_cpu(tiny_folder, train, tmp_path, dtype, bounds):
    there, here = (
        lab.extract(lab.load_model(tiny_folder), train, store=tmp_path / name, device=device, dtype=kind,
                    progress=False)
        for name, device, kind in (("there", DEVICE, dtype), ("here", "cpu", "float32"))
    )  # fmt: skip
    for layer in here.layers["ln_1"]:
        of_layer = bounds if layer else (EXACT,)  # before the first block there are no products
        assert_near(there.layer("ln_1", layer, "train"), here.layer("ln_1", layer, "train"), *of_layer)


@pytest.mark.parametrize(("dtype", "bounds"), [("float32", (EXACT,)), ("bfloat16", (LOW, EXACT))])
def test_stored_states_of_another_network(train, tmp_path, dtype, bounds):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    options = {"modules": ["1", "3"], "progress": False}
    here = lab.extract(network, train, store=tmp_path / "here", device="cpu", **options)
    there = lab.extract(network, train, store=tmp_path / "there", device=DEVICE, dtype=dtype, **options)
    for name in here.names:
        assert_near(there.layer("modules", name, "train"), here.layer("modules", name, "train"), *bounds)


def halves():
    """Features of two halves: 300 images of three classes, of which the middle layer tells most."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    layers = {
        layer: (generator.standard_normal((300, 16)) + strength * np.eye(16)[labels]).astype(np.float32)
        for layer, strength in enumerate((0.5, 2.0, 1.0))
    }
    parts = slice(200), slice(200, 300)
    return [lab.Features({n: values[part] for n, values in layers.items()}, labels[part]) for part in parts]


@pytest.mark.parametrize("probe", [lab.probe_layers, partial(lab.probe_neighbours, ks=[1, 3, 10], folds=3)])
def test_probes_choose_and_score_as_on_the_cpu(probe):
    there, here = (probe(*halves(), device=device, progress=False) for device in (DEVICE, "cpu"))
    assert there.chosen == here.chosen == 1
    for layer in here.correct:
        assert (there.correct[layer] != here.correct[layer]).sum() <= 1  # an image that lies between two classes


def test_probes_with_few_labels_score_as_on_the_cpu():
    options = {"ks": [4, 16], "draws": 2, "progress": False}
    there, here = (lab.probe_few_labels(*halves(), device=device, **options).table for device in (DEVICE, "cpu"))
    assert (there.test_accuracy - here.test_accuracy).abs().max() <= 0.02


def test_instruments_measure_as_on_the_cpu():
    there, here = model_of(), model_of(device="cpu")
    measures = {
        "lens": lambda model: lab.logit_lens(model, pixels().numpy(), progress=False).nats,
        "attention": lambda model: lab.attention_maps(model, pixels().numpy(), progress=False).table.distance,
    }
    for measure in measures.values():
        assert_near(measure(there).tolist(), measure(here).tolist(), EXACT)


def training_losses(out):
    return pd.read_csv(out / "log.csv").train_loss.dropna().to_numpy()


def pretrain(out, recipe=RECIPE, device=DEVICE, **options):
    return lab.pretrain(pixels(40).numpy(), SHAPE, recipe, out, device=device, progress=False, **options)


def test_training_steps(tmp_path):
    there, here = pretrain(tmp_path / "there"), pretrain(tmp_path / "here", device="cpu")
    np.testing.assert_allclose(training_losses(there), training_losses(here), rtol=1e-4)
    weights = [load_file(out / "model.safetensors") for out in (there, here)]
    for name, values in weights[1].items():
        assert (weights[0][name] - values).abs().max() < 1e-3, name


ELSEWHERE = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="tests/training/test_compiled.py has it, and takes a minute"
)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, pytest.param({"compile": True}, marks=ELSEWHERE)])
def test_training_steps_in_bfloat16_and_compiled(tmp_path, options):
    try:
        there = training_losses(pretrain(tmp_path / "there", replace(RECIPE, **options)))
    finally:
        torch.compiler.reset()
    here = training_losses(pretrain(tmp_path / "here", device="cpu"))
    np.testing.assert_allclose(there, here, rtol=1e-2 if "dtype" in options else 1e-4)
    assert "dtype" not in options or np.abs(there / here - 1).max() > 1e-5


def test_fine_tuning_steps(tiny_folder, train, tmp_path):
    tuning = lab.FinetuneConfig(steps=4, batch_size=8, holdout=0, pad=1, log_every=1, dtype="float32")
    there, here = (
        lab.finetune(tiny_folder, train, tuning, tmp_path / name, device=device, progress=False)
        for name, device in (("there", DEVICE), ("here", "cpu"))
    )
    np.testing.assert_allclose(training_losses(there), training_losses(here), rtol=1e-4)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    whole = pretrain(tmp_path / "whole")
    update, done = Trainer.update, []

    def stopping(trainer, batch):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(update(trainer, batch))
        return done[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", stopping)
        pretrain(tmp_path / "stopped")
    np.testing.assert_allclose(training_losses(pretrain(tmp_path / "stopped")), training_losses(whole), rtol=1e-5)


@pytest.fixture
def one_process():
    """A group of processes that is this one."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE.type not in ("cpu", "cuda"), reason="shares are passed between CPUs or CUDA devices")
def test_a_model_in_shares(one_process):
    model, whole = model_of(), model_of()
    parallel.shard(model, model.transformer.h)
    losses = [lab.next_pixel_loss(network, pixels().to(DEVICE)) for network in (model, whole)]
    for loss in losses:
        loss.backward()
    assert_equal = partial(torch.testing.assert_close, rtol=EXACT, atol=EXACT)
    assert_equal(losses[0], losses[1])
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert hasattr(weight, "full_tensor"), name
        assert_equal(parallel.whole(weight.grad), other.grad)
