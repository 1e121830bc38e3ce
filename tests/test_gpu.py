"""Every path on one device against the CPU: what `make gpu` runs.

The device is the accelerator of this machine, or the CPU where there is none, or what IGPT_LAB_DEVICE names. Float32 is
held against float64 on the CPU, with TF32 off; bfloat16 has a bound of its own, as it keeps eight bits.
"""

import os
from contextlib import contextmanager
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


def assert_near(values, expected, bound):
    """Within a share of the largest expected number."""
    expected = torch.as_tensor(expected).double().cpu()
    assert expected.std() > 1e-3
    distance = (torch.as_tensor(values).double().cpu() - expected).abs().max()
    assert distance <= bound * expected.abs().max(), f"{distance / expected.abs().max():.1e}"


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
    assert_near(logits, expected[0], LOW if low else EXACT)
    for point, values in expected[1].items():
        assert_near(states[point], values, LOW if low else EXACT)


def test_gradients():
    def gradients(model):
        lab.next_pixel_loss(model, pixels().to(model.device)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    ours, exact = gradients(model_of()), gradients(model_of(torch.float64, "cpu"))
    largest = max(gradient.abs().max() for gradient in exact.values())
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (ours[name].double().cpu() - gradient).abs().max() <= EXACT * largest, name


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


def steps_of(decoder, tokens):
    """Logits (T - 5, N, V) of the pixels from the sixth on; on CUDA one captured step is played again and again."""
    decoder.fill(tokens[:, :5].numpy())
    fed, place = tokens[:, 4].to(DEVICE), decoder.positions[5:6].clone()

    def advance():
        return decoder.step(fed, place)

    if DEVICE.type == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be captured
            advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = advance()

        def advance():
            graph.replay()
            return output

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


@pytest.mark.parametrize(("dtype", "bound"), [("float32", EXACT), ("bfloat16", LOW)])
def test_stored_features_are_those_of_the_cpu(tiny_folder, train, tmp_path, dtype, bound):
    there, here = (
        lab.extract(lab.load_model(tiny_folder), train, store=tmp_path / name, device=device, dtype=kind,
                    progress=False)
        for name, device, kind in (("there", DEVICE, dtype), ("here", "cpu", "float32"))
    )  # fmt: skip
    for layer in here.layers["ln_1"]:
        assert_near(there.layer("ln_1", layer, "train"), here.layer("ln_1", layer, "train"), bound)


def test_probes_choose_and_score_as_on_the_cpu():
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    layers = {
        layer: (generator.standard_normal((300, 16)) + strength * np.eye(16)[labels]).astype(np.float32)
        for layer, strength in enumerate((0.5, 2.0, 1.0))
    }
    parts = slice(200), slice(200, 300)
    halves = [lab.Features({n: values[part] for n, values in layers.items()}, labels[part]) for part in parts]
    there, here = (lab.probe_layers(*halves, device=device, progress=False) for device in (DEVICE, "cpu"))
    assert there.chosen == here.chosen == 1
    for layer in layers:
        assert (there.correct[layer] != here.correct[layer]).sum() <= 1  # an image that lies between two classes


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
