"""What a folder holds of a run against forged, damaged and foreign files; one line says what is wrong."""

import json
import shutil
import signal
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import igpt_lab as lab
from conftest import TINY
from igpt_lab.app import cli
from igpt_lab.app.commands import training as commands
from igpt_lab.core.hub import CheckpointError
from igpt_lab.core.storage import held, lock_of
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.training import finetuning, pretraining
from igpt_lab.training.dynamics import checkpoints_of
from igpt_lab.training.pretraining import pretrain
from igpt_lab.training.resuming import STATE, in_use, interruptible, note_run, read_state, write_note
from igpt_lab.training.settings import FinetuneConfig, PretrainConfig
from igpt_lab.training.trainer import Trainer

TOKENS = np.random.default_rng(0).integers(0, 8, (30, 16)).astype(np.uint16)
RECIPE = PretrainConfig(
    steps=4, batch_size=4, warmup=4, learning_rate=0.01, holdout=6, validate=5, log_every=2, save_every=2, snapshots=1,
    dtype="float32", compile=False,
)  # fmt: skip
FUZZED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def run(out, recipe=RECIPE, tokens=TOKENS, **options):
    return pretrain(tokens, TINY, recipe, out, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(state):
    with safe_open(state, "pt") as file:
        note = file.metadata()
        return {name: file.get_tensor(name).clone() for name in file.keys()}, note


def forge(folder, change=lambda tensors, note: None):
    """Write a state file anew, its checksum right."""
    tensors, note = content(folder / STATE)
    del note["sha256"]
    change(tensors, note)
    save_file(tensors, folder / STATE, write_note(tensors, note))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts}


BIAS = "model.transformer.ln_f.weight"
FORGED = {
    "another run": lambda tensors, note: note.update(run="0" * 64),
    "beyond the end": lambda tensors, note: note.update(step="5"),
    "beyond the end of its own": lambda tensors, note: note.update(step="5", schedule='{"steps": 9}'),
    "a tensor that broadcasts": lambda tensors, note: tensors.update({BIAS: torch.ones(1)}),
    "another dtype": lambda tensors, note: tensors.update({BIAS: tensors[BIAS].double()}),
    "one tensor less": lambda tensors, note: tensors.pop(BIAS),
    "one tensor more": lambda tensors, note: tensors.update(another=torch.ones(1)),
    "no step": lambda tensors, note: note.pop("step"),
    "a log of numbers": lambda tensors, note: note.update(log="[1, 2]"),
    "a lowest loss that is no number": lambda tensors, note: note.update(lowest="nan"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_state_that_is_not_of_this_run_is_refused_and_stays(folder, change):
    forge(folder, change)
    before = files(folder)
    with pytest.raises(ValueError) as refused:
        run(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    assert before == files(folder)


def test_a_state_of_a_run_with_other_rates_is_refused_and_one_that_was_made_longer_is_not(tmp_path):
    falling, constant = replace(RECIPE, steps=6, warmup=0), replace(RECIPE, steps=4, warmup=0, cooldown=1)
    shutil.copytree(run(tmp_path / "a", falling), tmp_path / "b")
    forge(tmp_path / "b", lambda tensors, note: note.update(step="3", schedule='{"steps": 7, "cooldown": 0}'))
    with pytest.raises(ValueError, match="whose recipe differs"):
        run(tmp_path / "b", falling)
    run(tmp_path / "c", replace(constant, cooldown=4, warmup=0, steps=4))
    with pytest.raises(ValueError, match="whose recipe differs"):
        run(tmp_path / "c", constant)


@FUZZED
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_found(finished, tmp_path, place, bit):
    data = bytearray((finished / STATE).read_bytes())
    place = int(place**3 * len(data))  # half of them in the header
    data[place] ^= 1 << bit
    (tmp_path / STATE).write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read") as refused:
        read_state(tmp_path / STATE)
    assert "\n" not in str(refused.value)


@FUZZED
@given(st.sampled_from(["step", "log", "lowest", "schedule"]), JSON | st.lists(JSON), st.data())
def test_odd_notes_in_a_state_end_in_one_line_or_are_numbers(finished, tmp_path, name, value, data):
    text = data.draw(
        st.sampled_from([json.dumps(value), json.dumps([{"step": value, "validation_loss": 1.0}]), "[" * 9999])
    )
    tensors, note = content(finished / STATE)
    note = {key: other for key, other in note.items() if key != "sha256"} | {name: text}
    save_file(tensors, tmp_path / STATE, write_note(tensors, note))
    try:
        state = read_state(tmp_path / STATE)
    except CheckpointError as error:
        assert str(error).startswith(f"{tmp_path / STATE} cannot be read") and "\n" not in str(error)
        return
    assert type(state.step) is int and all(isinstance(row["step"], int | float) for row in state.log)
    assert pd.DataFrame(state.log).size < 99 and state.lowest == state.lowest


def older(folder):
    """Take from the files what older versions did not write."""
    tensors, note = content(folder / STATE)
    save_file(tensors, folder / STATE, {name: note[name] for name in ("step", "log", "lowest")})
    record = json.loads((folder / "training.json").read_text())
    del record["palette"]
    (folder / "training.json").write_text(json.dumps(record))


def test_a_run_of_an_older_version_goes_on_to_the_same_numbers_and_says_so(tmp_path, monkeypatch):
    recipe = replace(RECIPE, steps=6)
    expected, stopped, update = content(run(tmp_path / "whole", recipe) / STATE), tmp_path / "stopped", Trainer.update

    def dies(self, *batch):
        if self.step == 4:
            raise MemoryError
        update(self, *batch)

    monkeypatch.setattr(Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run(stopped, recipe)
    monkeypatch.undo()
    older(stopped)
    with pytest.warns(UserWarning, match=f"{STATE} is of an older version"):
        run(stopped, recipe)
    tensors, note = content(stopped / STATE)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected[0].items())
    assert note["run"] == expected[1]["run"]


def test_a_record_that_is_lost_is_written_again_for_the_same_run_alone(folder):
    record = (folder / "training.json").read_text()
    (folder / "training.json").unlink()
    with pytest.raises(ValueError, match=f"holds {STATE} that is not of this run"):
        run(folder, tokens=TOKENS[::-1])
    assert not (folder / "training.json").exists()
    run(folder)
    assert (folder / "training.json").read_text() == record


def test_a_folder_with_another_run_or_model_is_refused(folder, tiny_folder, tiny, train, tmp_path):
    before = files(folder), files(tiny_folder)
    tuning = FinetuneConfig(steps=2, batch_size=4, pad=1, learning_rate=0.01)
    with pytest.raises(ValueError, match="holds training.json that is not of this run"):
        lab.finetune(tiny, train, tuning, folder, device="cpu", progress=False)
    with pytest.raises(ValueError, match="holds model.safetensors that is not of this run"):
        run(tiny_folder)
    processor = lab.ImageGPTImageProcessorPil(np.arange(24).reshape(8, 3) / 12 - 1, 4)
    with pytest.raises(ValueError, match="whose palette differs"):
        run(folder, processor=processor)
    assert before == (files(folder), files(tiny_folder))


@FUZZED
@given(st.data(), JSON)
def test_a_damaged_record_ends_in_one_line(finished, tmp_path, data, value):
    record = json.loads((finished / "training.json").read_text())
    inner = data.draw(st.sampled_from([record, record["recipe"], record["config"]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    path = tmp_path / "training.json"
    path.write_text(json.dumps(record))
    made = json.loads((finished / "training.json").read_text())
    del made["versions"]
    try:
        note_run(path, made, "recipe", RECIPE, pretraining._upgraded)
    except ValueError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"recipe": 3}', "\x00", '{"recipe": {"stepz": 3}}'])
def test_a_record_that_is_none_ends_in_one_line(folder, text):
    (folder / "training.json").write_text(text)
    with pytest.raises(ValueError, match="training.json") as refused:
        run(folder)
    assert "\n" not in str(refused.value) and (folder / "training.json").read_text() == text


def test_a_folder_in_use_is_refused_and_free_again_afterwards(folder):
    lock = lock_of(folder / STATE)
    with lock, pytest.raises(ValueError, match="is in use by another run"):
        run(folder)
    with in_use(folder), in_use(folder):
        assert held(Path(lock.lock_file))
        run(folder)
        assert held(Path(lock.lock_file))
    run(folder)
    assert not list(folder.glob("*.lock")) and not list(folder.glob(".*lock"))


SHAPE = ["--side=4", "--layers=1", "--width=8", "--heads=1", "--steps=2", "--warmup=1", "--batch-size=4", "--holdout=5"]
SHAPE += ["--validate=5", "--snapshots=1", "--dtype=float32", "--no-compile"]


def test_a_palette_is_of_its_images_and_colours(tiny_images, tmp_path, monkeypatch, capsys):
    out, tokenize = tmp_path / "run", lab.tokenize
    command = ["pretrain", str(tiny_images), "--out", str(out), *SHAPE]

    def stops(*_):
        assert held(Path(lock_of(out / STATE).lock_file))  # from the beginning
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "tokenize", stops)
    assert cli.main([*command, "--colours=8"]) == 130
    palette = (out / "preprocessor_config.json").read_bytes()
    for other in (["--colours=6"], ["--colours=8", "--limit=40"], ["--colours=8", "--side=2"]):
        assert cli.main([*command, *other]) == 1
        assert "holds a palette (preprocessor_config.json) of other images, side or colours" in capsys.readouterr().err
    noted = (out / "palette.json").read_text()
    for damaged in ("", "[]", "{}"):
        (out / "palette.json").write_text(damaged)
        assert cli.main([*command, "--colours=8"]) == 1
        assert str(out) in capsys.readouterr().err.splitlines()[-1]
    (out / "palette.json").write_text(noted)
    monkeypatch.setattr(lab, "tokenize", tokenize)
    assert cli.main([*command, "--colours=8"]) == 0
    assert (out / "preprocessor_config.json").read_bytes() == palette
    (out / "palette.json").unlink()  # as of an older version: its tokens say whose it is
    assert cli.main([*command, "--colours=8"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--colours=9"]) == 1 and "whose config differs" in capsys.readouterr().err


def test_a_palette_is_fitted_without_all_images_at_once(tiny_images, tmp_path, monkeypatch):
    counts, images = [], ImageSet.images

    def counting(self, positions=None):
        counts.append(len(self) if positions is None else len(positions))
        return images(self, positions)

    monkeypatch.setattr(ImageSet, "images", counting)
    source = lab.load_images(tiny_images, "train")
    commands._save_palette(source, tmp_path, {"side": 4, "colours": 8})
    assert max(counts, default=0) <= 16
    saved = lab.ImageGPTImageProcessorPil.from_pretrained(tmp_path).clusters
    np.testing.assert_array_equal(saved, lab.fit_palette(np.stack([np.asarray(image) for image in source]), 8))


def test_images_without_splits_have_no_test_accuracy(tiny_folder, tmp_path, capsys):
    for name, level in (("dark", 0), ("light", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4, 4), abs(level - i)).save(tmp_path / "images" / name / f"{i}.png")
    command = ["finetune", str(tiny_folder), str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--pad=1"]
    assert cli.main(command) == 1
    assert "gives the same images for train and test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_stop_a_run_before_they_are_saved(tmp_path, monkeypatch, tiny_images, capsys):
    update = Trainer.update

    def breaks(self, *batch):
        update(self, *batch)
        if self.step == 4:
            next(iter(self.weights.values())).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(Trainer, "update", breaks)
    with pytest.raises(FloatingPointError, match=f"after step 4; the last good state is .*{STATE}, of step 2;"):
        run(tmp_path / "a")
    assert read_state(tmp_path / "a" / STATE).step == 2
    with pytest.raises(FloatingPointError, match="after step 4; the last good state is that before the first step;"):
        run(tmp_path / "b", replace(RECIPE, save_every=50))
    assert not list(tmp_path.glob("*/checkpoints")) and not list(tmp_path.glob("*/model.safetensors"))
    command = ["pretrain", str(tiny_images), "--out", str(tmp_path / "c"), "--colours=8", *SHAPE, "--steps=4"]
    assert cli.main(command) == 1
    assert "igpt-lab: weights are not finite" in capsys.readouterr().err.splitlines()[-1]


def test_checkpoints_are_whole_and_of_the_step_that_they_say(folder):
    (folder / "checkpoints" / "step-000002").mkdir()
    (folder / "checkpoints" / "step-000002" / "model.safetensors").touch()
    assert list(checkpoints_of(folder)) == [4] and checkpoints_of(folder)[4] == folder
    with pytest.raises(KeyboardInterrupt):  # the same run, made longer and stopped
        with pytest.MonkeyPatch.context() as patch:
            update = Trainer.update
            patch.setattr(Trainer, "update", lambda self, *batch: (update(self, *batch), _interrupt(self.step == 6)))
            run(folder, replace(RECIPE, steps=8, cooldown=4))
    assert pd.read_csv(folder / "log.csv").step.iloc[-1] == 6
    assert checkpoints_of(folder)[4].name == "step-000004" and 6 not in checkpoints_of(folder)
    (folder / "log.csv").write_text("a,b\n")
    with pytest.raises(CheckpointError, match="log.csv or training.json does not say"):
        checkpoints_of(folder)


def _interrupt(now):
    if now:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [False, True])
def test_a_run_that_settles_by_itself_whether_to_compile_can_be_made_longer(tmp_path, monkeypatch, first):
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    recipe = replace(RECIPE, compile=None, cooldown=1, warmup=1)
    for steps, pays in ((2, first), (4, not first)):
        monkeypatch.setattr("igpt_lab.training.settings.WORTH_COMPILING", 0 if pays else 1e99)
        monkeypatch.setattr("shutil.which", lambda name: name)
        run(tmp_path, replace(recipe, steps=steps))
    assert pd.read_csv(tmp_path / "log.csv").step.iloc[-1] == 4
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["compile"] == first


def test_a_ctrl_c_while_torch_s_compiler_is_imported_comes_after_it(tmp_path, monkeypatch):
    """Half imported it would fail in each later run of the process."""
    imported = []

    def importing(name):
        signal.raise_signal(signal.SIGINT)
        imported.append(name)

    monkeypatch.setattr("igpt_lab.training.resuming.import_module", importing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert imported == ["torch._dynamo"]


def test_a_ctrl_c_while_a_run_ends_leaves_the_handlers_as_they_were(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    change = signal.signal

    def pressed(number, handler):
        change(number, handler)
        if number == signal.SIGINT:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interruptible():
        monkeypatch.setattr(signal, "signal", pressed)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("rate", ["high", None, -1.0, [1]])
def test_a_pretraining_s_rate_that_is_none_is_refused(tiny_folder, train, tmp_path, rate):
    model = lab.load_model(shutil.copytree(tiny_folder, tmp_path / "model"))
    (tmp_path / "model" / "training.json").write_text(json.dumps({"recipe": {"learning_rate": rate}}))
    with pytest.raises(ValueError, match="training.json: learning_rate is"):
        finetuning._checked(FinetuneConfig(pad=1), model, train)


def test_a_state_warns_of_nothing_where_it_is_whole(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(folder)
