"""Two processes against one: the same losses, and one run on changing numbers of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def torchrun(processes, *command):
    """Run a module or a file of Python in so many processes, without torchrun where it is one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    alone = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), *map(str, command)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(out, processes, *arguments):
    """A command that trains; its losses, and what is in its state."""
    torchrun(processes, "-m", "igpt_lab", *arguments, "--out", out)
    with safe_open(out / "state.safetensors", "np") as file:
        log = pd.DataFrame(json.loads(file.metadata()["log"]))[["train_loss", "validation_loss"]]
        return log, {name: file.get_tensor(name) for name in file.keys()}


def pretrain(images, out, processes, steps, *more):
    command = ["pretrain", images, "--side", 4, "--colours", 8, "--layers", 2, "--width", 8]
    command += ["--holdout", 10, "--validate", 10, "--batch-size", 7, "--steps", steps, "--warmup", 2, "--cooldown", 1]
    command += "--log-every 1 --save-every 1 --snapshots 1 --dtype float32 --clip 1 --no-compile".split()
    return losses(out, processes, *command, *more)


def test_two_processes_give_the_losses_of_one_and_one_goes_on_where_they_stopped(tiny_images, tmp_path):
    one, weights = pretrain(tiny_images, tmp_path / "one", 1, 6)
    few, _ = pretrain(tiny_images, tmp_path / "two", 2, 4)
    pd.testing.assert_frame_equal(few, one[:5], rtol=0, atol=1e-6)
    both, theirs = pretrain(tiny_images, tmp_path / "two", 1, 6)
    pd.testing.assert_frame_equal(both, one, rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(pretrain(tiny_images, tmp_path / "one", 2, 8)[0][:7], one)
    assert len(one) == 7 and one.validation_loss.iloc[-1] < one.validation_loss.iloc[0]
    assert all(abs(weights[name] - theirs[name]).max() < 1e-5 for name in weights)


def test_a_model_in_shares_trains_as_a_whole_one_does_and_its_files_are_whole(tiny_images, tmp_path):
    one, weights = pretrain(tiny_images, tmp_path / "one", 1, 5, "--shard")
    few, _ = pretrain(tiny_images, tmp_path / "two", 2, 3, "--shard")
    pd.testing.assert_frame_equal(few, one[:4], rtol=0, atol=1e-6)
    both, theirs = pretrain(tiny_images, tmp_path / "two", 2, 5, "--shard")
    pd.testing.assert_frame_equal(both, one, rtol=0, atol=1e-6)
    assert all(abs(weights[name] - theirs[name]).max() < 1e-5 for name in weights)
    again, _ = pretrain(tiny_images, tmp_path / "two", 1, 7, "--shard")
    assert len(again) == 8 and again[:6].equals(both)
    for part in "", "checkpoints/step-000005":
        files = [tmp_path / name / part for name in ("one", "two")]
        assert (files[0] / "config.json").read_text() == (files[1] / "config.json").read_text()


HELD = """
import sys
from pathlib import Path
from conftest import TINY
from igpt_lab.training import parallel
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.training.settings import PretrainConfig
from igpt_lab.training.trainer import Trainer

model = ImageGPTForCausalImageModeling(TINY)
every = sum(w.numel() for name, w in model.named_parameters() if not name.endswith("bias"))
with parallel.together():
    trainer = Trainer(model, PretrainConfig(300), Path("none"), lambda: None, shard=True)
    mine = [sum(t.to_local().numel() for t in each.values()) for each in (trainer.weights, trainer.moments)]
    Path(sys.argv[1], str(parallel.rank())).write_text(f"{every} {mine[0]} {mine[1]}")
"""


def test_each_process_holds_its_share_of_weights_and_moments(tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    torchrun(2, tmp_path / "held.py", tmp_path)
    every, *mine = zip(*([int(n) for n in (tmp_path / rank).read_text().split()] for rank in "01"), strict=True)
    assert sum(mine[0]) == every[0] and sum(mine[1]) == 2 * every[0]  # Adam has two moments
    assert max(mine[0]) < 0.6 * every[0]


def test_two_processes_fine_tune_like_one(tiny_folder, tiny_images, tmp_path):
    command = ["finetune", tiny_folder, tiny_images, "--batch-size", 7, "--log-every", 1, "--save-every", 1, "--pad", 0]
    command += "--dtype float32 --no-compile --learning-rate 1e-2 --device cpu --steps".split()
    one, weights = losses(tmp_path / "one", 1, *command, 5)
    few, _ = losses(tmp_path / "two", 2, *command, 3)
    pd.testing.assert_frame_equal(few, one[:4], rtol=0, atol=1e-6)
    both, theirs = losses(tmp_path / "two", 2, *command, 5)
    pd.testing.assert_frame_equal(both, one, rtol=0, atol=1e-6)
    felt = [name for name in weights if not name.endswith("c_attn.bias")]  # a key's bias changes no softmax
    assert len(one) == 6 and all(abs(weights[name] - theirs[name]).max() < 1e-5 for name in felt)
    for name in ("model.safetensors", "causal/model.safetensors", "confusion.csv"):
        assert (tmp_path / "one" / name).stat().st_size == (tmp_path / "two" / name).stat().st_size
