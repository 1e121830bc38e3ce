"""Compiled training against uncompiled, run after run in one process."""

import gc
import logging
import os
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.runtime.cache_dir_utils import cache_dir

from conftest import TINY
from igpt_lab.features.hooks import record
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.training import trainer as trainer_module
from igpt_lab.training.finetuning import finetune
from igpt_lab.training.pretraining import pretrain
from igpt_lab.training.settings import FinetuneConfig, PretrainConfig

RECIPE = PretrainConfig(steps=1, warmup=0, holdout=6, validate=5, dtype="float32", compile=True)
# blocks, width, heads, positions, batch size: the first two failed one after the other, and from the ninth on nothing
# was compiled
SHAPES = [
    (2, 96, 2, 144, 16), (2, 128, 4, 256, 8), *[(1, 8 * i, i, 16, 4) for i in range(1, 6)], (1, 8, 2, 9, 4),
    (3, 8, 2, 16, 2), (1, 8, 1, 16, 3), (1, 16, 2, 25, 2), (2, 16, 4, 4, 8),
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Everything of torch.compile but the C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def from_torch():
    """What torch's loggers say from warnings on."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("torch").addHandler(handler)
    yield records
    logging.getLogger("torch").removeHandler(handler)


def compiled_of(model) -> dict[str, int]:
    """How much torch has compiled of the forward passes of its parts, by whoever it was in this process."""
    kinds = {type(part) for part in model.modules()} - {torch.nn.ModuleList}
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return {kind.__name__: len(entries(kind.forward.__code__)) for kind in kinds}


def config_of(blocks, width, heads, positions):
    return replace(TINY, n_layer=blocks, n_embd=width, n_head=heads, n_positions=positions)


def random_tokens(config, rows=30):
    return np.random.default_rng(0).integers(0, 8, (rows, config.n_positions))


def first_step(out, config: ImageGPTConfig, recipe, monkeypatch):
    """Loss of the first step and one of its gradients, of a run from random weights of which none is 0."""
    model, gradients = ImageGPTForCausalImageModeling(config, init="transformers"), []
    for name, weight in model.named_parameters():
        offset = 1 if "ln_" in name else 0
        if not name.endswith("bias"):
            weight.data.normal_(offset, 0.3, generator=torch.Generator().manual_seed(1))
    update = trainer_module.Trainer.update

    def noting(self, *batch):
        update(self, *batch)
        gradients.append(self.weights["transformer.h.0.attn.c_attn.weight"].grad.clone())

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.Trainer, "update", noting)
        pretrain(random_tokens(config), config, recipe, out, init=model, device="cpu", progress=False)
    return pd.read_csv(out / "log.csv").train_loss.iloc[-1], gradients[0]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "shapes"), [("aot_eager", SHAPES), ("inductor", SHAPES[:4])])
def test_many_shapes_in_one_process_train_compiled(tmp_path, monkeypatch, capsys, from_torch, backend, shapes):
    """Twelve; by the C++ compiler, which takes most of the time and knows nothing of earlier shapes, four of them."""
    graphs, compile, call = [], torch.compile, torch._dynamo.lookup_backend(backend)

    def counting(graph, inputs):
        graphs.append(graph)
        return call(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(compile, backend=counting))
    with warnings.catch_warnings(record=True) as warned:
        for number, (*shape, batch_size) in enumerate(shapes):
            config, recipe = config_of(*shape), replace(RECIPE, batch_size=batch_size)
            loss, gradient = first_step(tmp_path / f"{number}", config, recipe, monkeypatch)
            plain = first_step(tmp_path / f"{number}-plain", config, replace(recipe, compile=False), monkeypatch)
            assert loss == pytest.approx(plain[0], abs=1e-4)
            torch.testing.assert_close(gradient, plain[1], atol=1e-4, rtol=1e-4)
            assert len(graphs) == number + 1, shape  # once for all blocks
    assert not [record.getMessage() for record in from_torch]
    assert not [warning for warning in warned if warning.category is not DeprecationWarning]  # of TensorBoard's
    assert "uncompiled" not in capsys.readouterr().out
    inputs = [node for graph in graphs for node in graph.graph.nodes if node.op == "placeholder"]
    assert all(type(size) is int for node in inputs for size in node.meta["example_value"].shape)


@pytest.mark.slow
def test_nothing_is_left_of_a_run_also_when_it_is_stopped(tmp_path, monkeypatch):
    functions, models, compile = [], [], torch.compile
    update = trainer_module.Trainer.update
    before = compiled_of(ImageGPTForCausalImageModeling(TINY))

    def noting(function, **options):
        functions.append(weakref.ref(function))
        return compile(function, backend="aot_eager", **options)

    def stopped(self, *batch):
        update(self, *batch)
        models.append(self.model)
        if self.step == 2:
            raise {1: KeyboardInterrupt, 2: MemoryError}[len(functions)]

    monkeypatch.setattr(torch, "compile", noting)
    for number, error in enumerate([KeyboardInterrupt, MemoryError, None]):
        recipe = replace(RECIPE, batch_size=2 + number, steps=3 if error else 1)
        monkeypatch.setattr(trainer_module.Trainer, "update", stopped)
        with pytest.raises(error) if error else nullcontext():
            pretrain(random_tokens(TINY), TINY, recipe, tmp_path / f"{number}", device="cpu", progress=False)
        model = models[-1]
        assert not any("forward" in vars(part) or part._compiled_call_impl for part in model.modules())
    gc.collect()
    assert len(functions) == 3 and not [function for function in functions if function() is not None]
    assert compiled_of(model) == before
    graphs = []
    theirs = compile(model.train(), dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    tokens = torch.as_tensor(random_tokens(TINY)[:3])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)
    assert len(graphs) == 1  # a user's own compilation finds the model as it was


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_compiling_fails_a_run_goes_on_uncompiled_and_says_why(tmp_path, monkeypatch, capsys, where):
    def fails(graph, inputs):
        raise OSError(30, "Read-only file system", "/cache")

    backend = fails if where == "forward" else aot_autograd(fw_compiler=nop, bw_compiler=fails)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile, backend=backend))
    losses = []
    for number, compiles in enumerate([True, False]):
        recipe = replace(RECIPE, steps=4, log_every=1, batch_size=4, compile=compiles, accumulate=2)
        pretrain(random_tokens(TINY), TINY, recipe, tmp_path / f"{number}", device="cpu", progress=False)
        losses.append(pd.read_csv(tmp_path / f"{number}/log.csv").train_loss)
    np.testing.assert_array_equal(*losses)
    lines = [line for line in capsys.readouterr().out.splitlines() if "compil" in line]
    assert len(lines) == 1 and "goes on uncompiled" in lines[0] and "Read-only file system: '/cache'" in lines[0]


def test_what_torch_notes_in_the_environment_is_gone_after_a_run(tmp_path, monkeypatch):
    def noting(graph, inputs):
        noted.append(cache_dir())
        return graph.forward

    noted: list[str] = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noting))
    for own in ("", str(tmp_path / "cache")):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if own:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
        before = dict(os.environ)
        pretrain(random_tokens(TINY), TINY, RECIPE, tmp_path / f"run{len(own)}", device="cpu", progress=False)
        assert dict(os.environ) == before
    assert noted[-1] == str(tmp_path / "cache") and noted[0] != noted[-1]


def test_where_torch_is_told_not_to_compile_the_run_says_so(tmp_path, quick, capsys):
    """torch then runs what it should compile as it is, and says nothing."""
    with torch.compiler.set_stance("force_eager"):
        pretrain(random_tokens(TINY), TINY, RECIPE, tmp_path, device="cpu", progress=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "compil" in line]
    assert len(lines) == 1 and "goes on uncompiled" in lines[0] and "torch compiled nothing" in lines[0]


@pytest.mark.slow
def test_formats_and_records_and_more_steps_follow_each_other_in_one_process(tmp_path, quick, capsys, from_torch):
    """float32, bfloat16, the states of what was trained, and the first run made longer, against runs without."""
    states = {}
    for compiles in (True, False):
        usual = replace(RECIPE, batch_size=4, cooldown=1, compile=compiles, log_every=1)
        runs = [(usual, "a"), (replace(usual, dtype="bfloat16"), "b"), (replace(usual, steps=3), "a")]
        for recipe, name in runs:
            out = tmp_path / f"{name}-{compiles}"
            pretrain(random_tokens(TINY), TINY, recipe, out, device="cpu", progress=False)
            model = ImageGPTForCausalImageModeling.from_pretrained(out)
            with record(model, alignment="sos") as pooled, torch.no_grad():
                model(torch.as_tensor(random_tokens(TINY)))
            states.setdefault(compiles, []).append(pooled["ln_1"][TINY.n_layer])
    for ours, plain, atol in zip(states[True], states[False], [1e-4, 0.05, 1e-4], strict=True):
        torch.testing.assert_close(ours, plain, atol=atol, rtol=0)
    assert capsys.readouterr().out.count("compiled: ") == 3 and not from_torch


def test_an_error_of_the_run_itself_is_raised(tmp_path):
    model = ImageGPTForCausalImageModeling(TINY)
    trainer = trainer_module.Trainer(model, RECIPE, tmp_path / "state", lambda pixels: pixels.no_such_thing)
    with trainer.compiled, pytest.raises(AttributeError, match="no_such_thing"):
        trainer.update(random_tokens(TINY))


def test_the_log_has_the_seconds_of_compiling(tmp_path, quick, capsys):
    for compiles in (True, False):
        recipe = replace(RECIPE, batch_size=4, compile=compiles)
        pretrain(random_tokens(TINY), TINY, recipe, tmp_path / f"{compiles}", device="cpu", progress=False)
    log = pd.read_csv(tmp_path / "True/log.csv")
    assert log.compile_seconds[0] == 0 and 0 < log.compile_seconds[1] < 600
    assert "compile_seconds" not in pd.read_csv(tmp_path / "False/log.csv")
    assert capsys.readouterr().out.count("compiled: ") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc stands for a folder that cannot be written")
@pytest.mark.parametrize("broken", ["no compiler", "no cache"])
def test_without_a_compiler_or_a_cache_a_run_goes_on(tmp_path, broken):
    changes = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if broken == "no cache":
        changes = {"TORCHINDUCTOR_CACHE_DIR": "/proc"}  # where not even root may write
    code = "from test_compiled import *; pretrain(random_tokens(TINY), TINY, replace(RECIPE, batch_size=4), "
    code += f"{str(tmp_path / 'run')!r}, device='cpu', progress=False)"
    paths = os.pathsep.join(str(Path(__file__).parents[i]) for i in range(3))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | changes | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "goes on uncompiled" in done.stdout, done.stderr
    assert len(pd.read_csv(tmp_path / "run/log.csv")) == 2


def test_fine_tuning_compiled_has_the_losses_of_fine_tuning(quick, tiny, train, tmp_path):
    tuning = FinetuneConfig(steps=3, batch_size=4, learning_rate=0.01, log_every=1, pad=1, dtype="float32")
    logs, before = {}, compiled_of(tiny)
    for compiled in (False, True):
        finetune(tiny, train, replace(tuning, compile=compiled), tmp_path / str(compiled), device="cpu", progress=False)
        logs[compiled] = pd.read_csv(tmp_path / str(compiled) / "log.csv")
    assert logs[True].compile_seconds.max() > 0 and compiled_of(tiny) == before
    losses = [name for name in logs[True] if "loss" in name]
    assert len(losses) > 1
    np.testing.assert_allclose(logs[True][losses], logs[False][losses], atol=1e-4)  # step 0 has no training loss
