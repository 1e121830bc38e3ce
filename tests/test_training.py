"""The recipe by its formulas, Adam by a plain loop, and a stopped run against one that was never stopped."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import TINY
from igpt_lab import training
from igpt_lab.checkpoints import CheckpointError
from igpt_lab.model import ImageGPTForCausalImageModeling, align
from igpt_lab.training import Recipe, next_pixel_loss_of, pretrain, snapshot_steps

TOKENS = np.random.default_rng(0).integers(0, 8, (30, 16)).astype(np.uint16)
RECIPE = Recipe(
    steps=9, batch_size=4, warmup=2, learning_rate=0.01, holdout=6, validate=5, log_every=3, save_every=2, snapshots=3
)


def run(out, recipe=RECIPE, tokens=TOKENS):
    return pretrain(tokens, TINY, recipe, out, device="cpu", progress=False)


def weights(out):
    return ImageGPTForCausalImageModeling.from_pretrained(out).state_dict()


def test_learning_rate_by_hand():
    recipe = Recipe(steps=110, warmup=10, learning_rate=1.0)
    assert recipe.rate(0) == 0.1 and recipe.rate(9) == 1 and recipe.rate(10) == 1
    assert recipe.rate(60) == pytest.approx(0.5) and recipe.rate(110) == pytest.approx(0)


def test_first_loss_is_ln_v_and_the_log_is_right(tmp_path):
    log = pd.read_csv(run(tmp_path) / "log.csv")
    assert log.step.tolist() == [0, 3, 6, 9] and log.tokens.tolist() == [0, 192, 384, 576]
    assert log.validation_loss[0] == pytest.approx(math.log(8), abs=1e-5)
    np.testing.assert_allclose(log.validation_bits_per_pixel, log.validation_loss / math.log(2), rtol=1e-5)
    held_out = training._split(TOKENS, TINY, RECIPE)[1]
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert log.validation_loss[3] == pytest.approx(next_pixel_loss_of(model, held_out[:5], batch_size=2), abs=1e-5)
    pixels = torch.as_tensor(held_out[:5].astype(np.int64))
    logp = model(align(pixels, "sos", TINY)).logits.log_softmax(-1).gather(2, pixels[..., None])
    assert log.validation_loss[3] == pytest.approx(-logp.mean().item(), abs=1e-5)


def test_equals_a_plain_loop(tmp_path):
    model = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(0))
    train = training._split(TOKENS, TINY, RECIPE)[0]
    trained = [p for n, p in model.named_parameters() if "bias" not in n]
    first, second = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained]
    for step, rows in enumerate(training._batches(len(train), RECIPE, 0)):
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


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path, monkeypatch, stop):
    whole, stopped, update = run(tmp_path / "whole"), tmp_path / "stopped", training._Trainer.update

    def dies(self, batch):
        if self.step == stop:
            raise MemoryError
        update(self, batch)

    monkeypatch.setattr(training._Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run(stopped)
    monkeypatch.undo()
    run(stopped)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    logs = [pd.read_csv(out / "log.csv").drop(columns="tokens_per_second") for out in (whole, stopped)]
    pd.testing.assert_frame_equal(*logs)
    for step in snapshot_steps(RECIPE):
        assert (stopped / f"checkpoints/step-{step:06d}/config.json").exists()


def test_interrupt_saves_the_step_at_hand(tmp_path, monkeypatch):
    import signal

    update = training._Trainer.update

    def interrupted(self, batch):
        update(self, batch)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training._Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved after step 5"):
        run(tmp_path / "a")
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(training._Trainer, "update", lambda self, b: (steps.append(self.step), update(self, b)))
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
    (tmp_path / "training.json").write_text(json.dumps(begun))
    run(tmp_path)
    begun["config"]["n_layer"] = 4
    (tmp_path / "training.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="whose config differs"):
        run(tmp_path)


def test_batches_are_passes_over_the_training_rows():
    recipe = Recipe(steps=12, batch_size=5, warmup=0, holdout=1, validate=1)
    rows = np.concatenate(list(training._batches(20, recipe, 0)))
    assert all(sorted(rows[i : i + 20]) == list(range(20)) for i in (0, 20, 40))
    np.testing.assert_array_equal(np.concatenate(list(training._batches(20, recipe, 7))), rows[35:])
    train, held_out = training._split(np.arange(30 * 16).reshape(30, 16) % 8, TINY, RECIPE)
    assert len(train) == 24 and len(held_out) == 6


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="token 9 >= 8 colours"):
        run(tmp_path / "a", tokens=TOKENS + 2)
    with pytest.raises(ValueError, match=r"expected \(N, 16\)"):
        run(tmp_path / "a", tokens=TOKENS[:, :9])
    assert not (tmp_path / "a").exists()
    run(tmp_path)
    with pytest.raises(ValueError, match="whose recipe differs"):
        run(tmp_path, recipe=Recipe(steps=10, batch_size=4, warmup=2, holdout=6, validate=5))
    with pytest.raises(ValueError, match="whose tokens differs"):
        run(tmp_path, tokens=TOKENS[::-1])
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="state.safetensors cannot be read"):
        run(tmp_path)
    with pytest.raises(ValueError, match="warmup within steps"):
        Recipe(steps=5)


def test_a_loss_that_is_no_number_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "next_pixel_loss", lambda model, pixels: model.lm_head.weight.sum() * math.nan)
    with pytest.raises(FloatingPointError, match="last good state"):
        run(tmp_path)
