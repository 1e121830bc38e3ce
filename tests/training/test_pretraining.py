"""The recipe by its formulas, Adam by a plain loop, and a stopped run against one that was never stopped."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from conftest import TINY
from igpt_lab.core.devices import memory_kept
from igpt_lab.core.hub import CheckpointError
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import align, losses_of, next_pixel_loss
from igpt_lab.training import pretraining
from igpt_lab.training import trainer as trainer_module
from igpt_lab.training.pretraining import pretrain, snapshot_steps
from igpt_lab.training.settings import PretrainConfig

TOKENS = np.random.default_rng(0).integers(0, 8, (30, 16)).astype(np.uint16)
RECIPE = PretrainConfig(
    steps=9, batch_size=4, warmup=2, learning_rate=0.01, holdout=6, validate=5, log_every=3, save_every=2, snapshots=3,
    dtype="float32", compile=False,
)  # fmt: skip


def run(out, recipe=RECIPE, tokens=TOKENS, config=TINY):
    return pretrain(tokens, config, recipe, out, device="cpu", progress=False)


def weights(out):
    return ImageGPTForCausalImageModeling.from_pretrained(out).state_dict()


def test_learning_rate_by_hand():
    recipe = PretrainConfig(steps=110, warmup=10, learning_rate=1.0)
    assert recipe.rate(0) == 0.1 and recipe.rate(9) == 1 and recipe.rate(10) == 1
    assert recipe.rate(60) == pytest.approx(0.5) and recipe.rate(110) == pytest.approx(0)
    recipe = PretrainConfig(steps=110, warmup=10, learning_rate=1.0, cooldown=20)
    assert recipe.rate(4) == 0.5 and recipe.rate(89) == recipe.rate(90) == 1
    assert recipe.rate(100) == 0.5 and recipe.rate(109) == 0.05 and recipe.rate(110) == 0


def test_first_loss_is_ln_v_and_the_log_is_right(tmp_path):
    log = pd.read_csv(run(tmp_path) / "log.csv")
    assert log.step.tolist() == [0, 3, 6, 9] and log.tokens.tolist() == [0, 192, 384, 576]
    assert log.validation_loss[0] == pytest.approx(math.log(8), abs=1e-5)
    np.testing.assert_allclose(log.validation_bits_per_pixel, log.validation_loss / math.log(2), rtol=1e-5)
    held_out = pretraining._split(TOKENS, TINY, RECIPE)[1]
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert log.validation_loss[3] == pytest.approx(losses_of(model, held_out[:5], batch_size=2).mean(), abs=1e-5)
    pixels = torch.as_tensor(held_out[:5].astype(np.int64))
    logp = model(align(pixels, "sos", TINY)).logits.log_softmax(-1).gather(2, pixels[..., None])
    assert log.validation_loss[3] == pytest.approx(-logp.mean().item(), abs=1e-5)


def test_tensorboard_shows_the_log_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    update = trainer_module.Trainer.update

    def dies(self, *batch):
        if self.step == 4:
            raise MemoryError
        update(self, *batch)

    monkeypatch.setattr(trainer_module.Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run(tmp_path)
    monkeypatch.undo()
    log = pd.read_csv(run(tmp_path) / "log.csv")
    shown = accumulator(str(tmp_path / "tensorboard")).Reload()
    for name in log.columns.drop("step"):
        events, rows = shown.Scalars(name), log[log[name].notna()]
        assert [event.step for event in events] == rows.step.tolist(), name
        assert [event.value for event in events] == pytest.approx(rows[name].tolist(), rel=1e-5)


def test_losses_of_images_are_what_a_product_of_conditionals_gives():
    model = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    losses = losses_of(model, TOKENS[:7], batch_size=3)
    for image, loss in zip(TOKENS[:7].astype(np.int64), losses, strict=True):
        total = 0.0
        for t in range(16):  # one pixel after another, each from those before it alone
            before = torch.as_tensor([[8, *image[:t]]])
            total -= model(before).logits[0, -1].double().log_softmax(0)[image[t]].item()
        assert loss == pytest.approx(total / 16, abs=1e-6)
    assert losses_of(model, TOKENS[:7], reduction="all") == pytest.approx(losses.mean(), abs=1e-9)


def test_equals_a_plain_loop(tmp_path):
    model = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(0))
    train = pretraining._split(TOKENS, TINY, RECIPE)[0]
    trained = [p for n, p in model.named_parameters() if "bias" not in n]
    first, second = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained]
    for step, rows in enumerate(trainer_module.batches(len(train), RECIPE, 0)):
        pixels = torch.as_tensor(train[rows].astype(np.int64))
        logits = model(torch.cat([torch.full((4, 1), 8), pixels[:, :-1]], 1)).logits
        loss = -logits.log_softmax(-1).gather(2, pixels[..., None]).mean()
        rate = 0.01 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 7)) / 2)
        for p, m, v, g in zip(trained, first, second, torch.autograd.grad(loss, trained), strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.95).add_(g * g, alpha=0.05)
            p.data -= rate * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    for name, tensor in weights(run(tmp_path)).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-4, rtol=1e-3)
        assert not name.endswith("bias") or not tensor.any()


def test_a_bert_model_learns_hidden_pixels_from_all_others(tmp_path):
    config, recipe = replace(TINY, bidirectional=True), replace(RECIPE, masked=0.4, steps=1, warmup=0)
    pretrain(TOKENS, config, recipe, tmp_path, device="cpu", progress=False)
    model = ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(0))
    train, held_out = pretraining._split(TOKENS, config, recipe)
    pixels, draw = train[next(trainer_module.batches(len(train), recipe, 0))], np.random.default_rng([0, 3, 0])
    trained = {n: p for n, p in model.named_parameters() if "bias" not in n}
    loss = hidden_loss(model, pixels, draw.random(pixels.shape) < 0.4)
    for (name, before), gradient in zip(trained.items(), torch.autograd.grad(loss, trained.values()), strict=True):
        seen = gradient.abs() > 1e-5  # Adam's first step is the sign of the gradient
        change = (weights(tmp_path)[name] - before.detach())[seen] / 0.01
        torch.testing.assert_close(change, -gradient[seen].sign(), atol=0.02, rtol=0)
    after = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    hidden = np.random.default_rng([0, 4]).random((5, 16)) < 0.4
    row = pd.read_csv(tmp_path / "log.csv").iloc[-1]
    assert row.validation_loss == pytest.approx(hidden_loss(after, held_out[:5], hidden).item(), abs=1e-5)
    assert row.train_loss == pytest.approx(math.log(8), abs=1e-5)


def hidden_loss(model, pixels, hidden):
    """-log p of the hidden pixels alone, none of which the model sees."""
    tokens = torch.as_tensor(pixels.astype(np.int64))
    hidden = torch.as_tensor(hidden)
    said = model(tokens * ~hidden, masked=hidden).logits.log_softmax(-1)  # not even by their tokens
    return -said.gather(2, tokens[..., None])[..., 0][hidden].mean()


EVERYTHING = replace(
    RECIPE, optimizer="muon", clip=0.5, flip=True, accumulate=2, cooldown=3, dtype="bfloat16", recompute=True
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, stop",
    [(RECIPE, 1), (RECIPE, 5), (EVERYTHING, 5), (replace(EVERYTHING, compile=True, recompute=False), 7)],
    ids=["1", "5", "everything", "compiled"],
)
def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path, monkeypatch, recipe, stop):
    whole, stopped, update = run(tmp_path / "whole", recipe), tmp_path / "stopped", trainer_module.Trainer.update

    def dies(self, batch):
        if self.step == stop:
            raise MemoryError
        update(self, batch)

    monkeypatch.setattr(trainer_module.Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run(stopped, recipe)
    monkeypatch.undo()
    run(stopped, recipe)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    times = ["tokens_per_second", "compile_seconds"]
    logs = [pd.read_csv(out / "log.csv").drop(columns=times, errors="ignore") for out in (whole, stopped)]
    pd.testing.assert_frame_equal(*logs)
    for step in snapshot_steps(RECIPE):
        assert (stopped / f"checkpoints/step-{step:06d}/config.json").exists()


def test_what_dropout_draws_follows_from_the_seed_and_leaves_the_random_numbers_of_the_process(tmp_path):
    config, before = replace(TINY, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3), torch.get_rng_state()
    recipe = replace(RECIPE, cooldown=1)
    whole = weights(run(tmp_path / "whole", recipe, config=config))
    assert torch.equal(torch.get_rng_state(), before)
    run(tmp_path / "longer", replace(recipe, steps=4), config=config)
    torch.rand(5)
    longer = weights(run(tmp_path / "longer", recipe, config=config))
    assert all(torch.equal(tensor, longer[name]) for name, tensor in whole.items())
    plain, name = weights(run(tmp_path / "plain", recipe)), "transformer.h.0.mlp.c_fc.weight"
    assert not torch.allclose(plain[name], whole[name], atol=1e-4)  # it drops


def test_killed_at_any_moment_it_resumes_to_the_same_numbers(tmp_path):
    recipe = replace(EVERYTHING, steps=40, save_every=4)
    whole, killed = run(tmp_path / "whole", recipe), tmp_path / "killed"
    code = f"from test_pretraining import *; run({str(killed)!r}, {recipe!r}); print('finished')"
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
        state, deadline = killed / "state.safetensors", time.monotonic() + 60
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        process.kill()
        process.wait()
    run(killed, recipe)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name


def test_a_run_with_a_cooldown_can_be_made_longer_and_one_with_a_cosine_cannot(tmp_path):
    run(tmp_path / "a", replace(RECIPE, steps=4, cooldown=2, warmup=1))
    with pytest.raises(ValueError, match="whose recipe differs"):
        run(tmp_path / "a", replace(RECIPE, steps=9, cooldown=2, warmup=1))  # its steps 2 and 3 were slower
    run(tmp_path / "b", replace(RECIPE, steps=4, cooldown=0, warmup=4))  # all steps in the warm-up, no cosine yet
    longer = replace(RECIPE, steps=9, cooldown=3, warmup=4)
    run(tmp_path / "b", longer)
    assert json.loads((tmp_path / "b" / "training.json").read_text())["recipe"]["steps"] == 9
    run(tmp_path / "whole", longer)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "b")[name]), name


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts", replace(RECIPE, accumulate=4))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], atol=1e-4, rtol=1e-3)


def test_flips_by_hand():
    image = np.array([[1, 2, 3, 4]])
    flipped = {tuple(pretraining._flipped(image, np.random.default_rng(seed))[0]) for seed in range(20)}
    assert flipped == {(1, 2, 3, 4), (2, 1, 4, 3)}


def trainer_of(tmp_path, **changes):
    model = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "state.safetensors"
    return trainer_module.Trainer(
        model, replace(RECIPE, **changes), path, lambda pixels: next_pixel_loss(model, pixels)
    )


def test_clip_bounds_the_gradient(tmp_path):
    norms = []
    for clip in (None, 1e-3):
        trainer = trainer_of(tmp_path, clip=clip)
        trainer.update(TOKENS[:4])
        norms.append(torch.linalg.vector_norm(torch.cat([w.grad.flatten() for w in trainer.weights.values()])))
    assert norms[0] > 1e-2 and norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_muon_s_first_step_is_orthogonal_for_the_blocks_matrices_and_adam_s_for_the_rest(tmp_path):
    trainer = trainer_of(tmp_path, optimizer="muon", warmup=0)
    before = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
    trainer.model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))  # else no gradient below it
    before["lm_head.weight"] = trainer.model.lm_head.weight.detach().clone()
    trainer.update(TOKENS[:4])
    for name, weight in trainer.weights.items():
        change = (weight.detach() - before[name]) / 0.01
        if ".h." in name and weight.ndim == 2:  # singular values within what five Newton-Schulz steps reach
            sizes = torch.linalg.svdvals(change) / (0.2 * max(weight.shape) ** 0.5)
            assert 0.3 < sizes.quantile(0.3) and sizes.max() < 1.4, name
        else:  # Adam's first step is the sign of the gradient
            seen = weight.grad.abs() > 1e-5
            torch.testing.assert_close(change[seen], -weight.grad[seen].sign(), atol=0.02, rtol=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
@torch.enable_grad()
def test_attention_in_parts_is_attention(parts):
    model, tokens, gradients = (
        ImageGPTForCausalImageModeling(TINY).double().train(),
        torch.as_tensor(TOKENS[:2]).long(),
        [],
    )
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(weight.numel()))
    for number in (0, parts):
        for block in model.transformer.h:
            block.attn.chunks = number
        gradients.append(torch.autograd.grad(next_pixel_loss(model, tokens), list(model.parameters())))
    for fused, written in zip(*gradients, strict=True):
        torch.testing.assert_close(written, fused, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.enable_grad()
def test_attention_in_parts_runs_on_any_device(dtype):
    model = ImageGPTForCausalImageModeling(TINY).to(device="meta", dtype=dtype).train()
    for block in model.transformer.h:
        block.attn.chunks = 2
    next_pixel_loss(model, torch.zeros(2, TINY.n_positions, dtype=torch.int64, device="meta")).backward()
    assert all(weight.grad.is_meta for weight in model.parameters())


def test_training_leaves_out_biases_that_are_zero_and_no_others(tmp_path):
    model = ImageGPTForCausalImageModeling(TINY, init="transformers").train()
    some = model.transformer.h[1].mlp.c_fc
    torch.nn.init.normal_(some.bias)
    pixels, loss = torch.as_tensor(TOKENS[:4]).long(), lambda pixels: next_pixel_loss(model, pixels)
    expected = loss(pixels).item()
    trainer = trainer_module.Trainer(model, RECIPE, tmp_path / "state", loss)
    trainer.update(TOKENS[:4])
    assert trainer.total.item() == pytest.approx(expected, rel=1e-5)
    assert [layer for layer in model.modules() if getattr(layer, "biased", False)] == [some]
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)  # weights that are put in later have their say
    model.eval()
    with torch.no_grad():
        without_autograd = loss(pixels).item()
    with torch.enable_grad():
        assert loss(pixels).item() == pytest.approx(without_autograd, rel=1e-5)


def resident() -> float:
    """Memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="kept by glibc alone")
def test_freed_memory_is_kept_and_given_back():
    begun = resident()
    with memory_kept():
        torch.ones(50_000_000)
        assert resident() > begun + 150
    assert resident() < begun + 60


def test_memory_is_not_kept_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    with memory_kept():
        pass


def test_what_is_left_open_is_settled_by_the_device_and_the_length_of_the_run():
    cuda, cpu, long = torch.device("cuda"), torch.device("cpu"), PretrainConfig(steps=10**9)
    assert PretrainConfig(steps=500).settled(TINY, cuda).dtype == "bfloat16"
    assert long.settled(TINY, cuda).compile and not PretrainConfig(steps=500).settled(TINY, cpu).compile
    assert not long.settled(replace(TINY, scale_attn_by_inverse_layer_idx=True), cuda).compile
    chosen = PretrainConfig(steps=10**9, dtype="float32", compile=False)
    assert chosen.settled(TINY, cuda) == chosen
    assert PretrainConfig(steps=500).settled(TINY, cpu).dtype in ("float32", "bfloat16")


def test_interrupt_saves_the_step_at_hand(tmp_path, monkeypatch):
    import signal

    update = trainer_module.Trainer.update

    def interrupted(self, batch):
        update(self, batch)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer_module.Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved after step 5"):
        run(tmp_path / "a")
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(trainer_module.Trainer, "update", lambda self, b: (steps.append(self.step), update(self, b)))
    run(tmp_path / "a")
    assert steps == [5, 6, 7, 8]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_older_than_some_fields_of_the_configuration_goes_on(tmp_path):
    run(tmp_path)
    begun = json.loads((tmp_path / "training.json").read_text())
    begun["config"] = {
        name: begun["config"][name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    }
    begun["config"] |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    del begun["init"]
    (tmp_path / "training.json").write_text(json.dumps(begun))
    run(tmp_path)
    begun["config"]["n_layer"] = 4
    (tmp_path / "training.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="whose config differs"):
        run(tmp_path)


def test_a_run_begins_with_the_weights_of_another_model_and_says_which(tmp_path):
    seen = run(tmp_path / "seen")
    init = ImageGPTForCausalImageModeling.from_pretrained(seen)
    pretrain(TOKENS, TINY, RECIPE, tmp_path / "on", init=init, device="cpu", progress=False)
    logs = [pd.read_csv(tmp_path / name / "log.csv").validation_loss for name in ("seen", "on")]
    assert logs[1][0] == logs[0].iloc[-1] and logs[1].iloc[-1] != logs[0].iloc[-1]
    drawn = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(RECIPE.seed))
    same = pretrain(TOKENS, TINY, RECIPE, tmp_path / "same", init=drawn, device="cpu", progress=False)
    assert all(torch.equal(weights(same)[name], value) for name, value in weights(seen).items())
    with pytest.raises(ValueError, match="whose init differs"):
        pretrain(TOKENS, TINY, RECIPE, tmp_path / "on", init=drawn, device="cpu", progress=False)
    with pytest.raises(ValueError, match="whose init differs"):
        run(tmp_path / "on")
    with pytest.raises(ValueError, match="init and config are of different shapes"):
        pretrain(TOKENS, replace(TINY, n_embd=32), RECIPE, tmp_path / "new", init=drawn, device="cpu")
    assert not (tmp_path / "new").exists()


def test_batches_are_passes_over_the_training_rows():
    recipe = PretrainConfig(steps=12, batch_size=5, warmup=0, holdout=1, validate=1)
    rows = np.concatenate(list(trainer_module.batches(20, recipe, 0)))
    assert all(sorted(rows[i : i + 20]) == list(range(20)) for i in (0, 20, 40))
    np.testing.assert_array_equal(np.concatenate(list(trainer_module.batches(20, recipe, 7))), rows[35:])
    train, held_out = pretraining._split(np.arange(30 * 16).reshape(30, 16) % 8, TINY, RECIPE)
    assert len(train) == 24 and len(held_out) == 6


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="token 9 >= 8 colours"):
        run(tmp_path / "a", tokens=TOKENS + 2)
    with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
        run(tmp_path / "a", tokens=TOKENS[:, :9])
    with pytest.raises(ValueError, match="holdout=6 of 6 images leaves none to train on; try holdout=1 and a validate"):
        run(tmp_path / "a", tokens=TOKENS[:6])
    assert not (tmp_path / "a").exists()
    run(tmp_path)
    with pytest.raises(ValueError, match="whose recipe differs") as error:
        run(tmp_path, recipe=replace(RECIPE, batch_size=5))
    assert "differs: {'batch_size': 4} there, {'batch_size': 5} here; choose another folder" in str(error.value)
    with pytest.raises(ValueError, match="whose recipe differs"):
        run(tmp_path, recipe=PretrainConfig(steps=10, batch_size=4, warmup=2, holdout=6, validate=5))
    with pytest.raises(ValueError, match="whose tokens differs"):
        run(tmp_path, tokens=TOKENS[::-1])
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="state.safetensors cannot be read"):
        run(tmp_path)
    with pytest.raises(ValueError, match="warmup and cooldown within steps"):
        PretrainConfig(steps=5)
    with pytest.raises(ValueError, match="no multiple of accumulate=3"):
        PretrainConfig(steps=500, accumulate=3)
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        PretrainConfig(steps=500, optimizer="sgd")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3.5])
def test_a_loss_that_is_no_number_or_jumps_stops_with_the_last_good_state(tmp_path, monkeypatch, bad):
    usual, steps = pretraining.next_pixel_loss, []

    def sometimes_bad(model, pixels, **options):
        steps.append(model.training)
        return usual(model, pixels, **options) + (bad if sum(steps) == 6 else 0)

    monkeypatch.setattr(pretraining, "next_pixel_loss", sometimes_bad)
    with pytest.raises(FloatingPointError, match=r"steps 5 to 6 .* last good state is .*state.safetensors, of step 4;"):
        run(tmp_path)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
