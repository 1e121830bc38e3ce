"""Every checkpoint against the same steps taken one by one, and a run's checkpoints found by name."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.core.chosen import about_choice
from igpt_lab.core.display import MODEL
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import losses_of
from igpt_lab.training.dynamics import checkpoints_of, probe_checkpoints, probe_models


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    """A tiny pretraining with three checkpoints, at steps 2, 4 and 6, and the images it was trained on."""
    out, images = tmp_path_factory.mktemp("dynamics") / "run", lab.load_images(tiny_images, "train")
    processor = lab.ImageGPTImageProcessorPil(np.arange(24).reshape(8, 3) / 12 - 1, 4)
    config = lab.ImageGPTConfig(
        vocab_size=9, n_positions=16, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    recipe = lab.PretrainConfig(
        steps=6, batch_size=4, warmup=2, learning_rate=0.05, holdout=5, validate=5, log_every=2, snapshots=3,
        dtype="float32", compile=False,
    )  # fmt: skip
    return lab.pretrain(lab.tokenize(images, processor), config, recipe, out, processor=processor, progress=False)


def test_checkpoints_are_found_in_order_and_the_model_is_the_last(run, tiny_folder, tmp_path):
    steps = {step: folder.name for step, folder in checkpoints_of(run).items()}
    assert steps == {2: "step-000002", 4: "step-000004", 6: run.name}
    assert list(checkpoints_of(run / "checkpoints")) == [2, 4, 6]  # without the model: those of others
    assert checkpoints_of(tiny_folder) == {1: tiny_folder}  # no log says how many steps
    with pytest.raises(ValueError, match="neither a model nor checkpoints"):
        checkpoints_of(tmp_path)


def test_each_checkpoint_is_what_one_by_one_gives(run, tiny_images, tmp_path):
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = probe_checkpoints(checkpoints_of(run), *images, store=tmp_path, name="tiny", progress=False)
    assert table.groupby("step").layer.apply(list).to_dict() == {step: [0, 1, 2, 3] for step in (0, 2, 4, 6)}
    assert set(table.model) == {"tiny"} and (table.groupby("step").chosen.sum() == 1).all()
    untrained = table[table.step == 0].loss
    assert untrained.to_numpy() == pytest.approx(math.log(8), abs=1e-6)  # its head is zero: every colour alike
    model = lab.load_model(checkpoints_of(run)[4])
    store = lab.extract(model, images, store=tmp_path / "other", progress=False)
    result = lab.probe_layers(*(lab.Features.from_store(store, split) for split in ("train", "test")), progress=False)
    rows, losses = table[table.step == 4], losses_of(model, tokens_of(model, images[1]))
    assert rows.test_accuracy.tolist() == result.table.test_accuracy.tolist()
    assert rows.loss.iloc[0] == pytest.approx(losses.mean(), abs=1e-9)
    assert rows.loss_error.iloc[0] == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)), abs=1e-9)
    ends = lab.compare_layers(result)
    assert rows.drop_choice_low.tolist() == [ends.choice_low] * 4 and rows.n_validation.tolist() == [60] * 4
    assert rows.drop_choice_high.tolist() == [ends.choice_high] * 4 and rows.drop_low.tolist() == [ends.low] * 4
    assert rows["drop"].iloc[0] == pytest.approx(
        result.correct[result.chosen].mean() - result.correct[3].mean(), abs=1e-12
    )


def test_a_bert_model_has_no_next_pixel_loss(tiny, tiny_images, tmp_path):
    bert = lab.ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True))
    bert.save_pretrained(tmp_path / "step-5")
    tiny.processor.save_pretrained(tmp_path / "step-5")
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = probe_checkpoints(
        checkpoints_of(tmp_path), *images, store=tmp_path, untrained=False, layers=[0, 3], progress=False
    )
    assert table.loss.isna().all() and table.layer.tolist() == [0, 3] and set(table.step) == {5}


def test_models_side_by_side_are_the_last_checkpoints_and_raw_pixels(run, tiny_images, tmp_path, capsys):
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    early = run / "checkpoints" / "step-000002"
    table = probe_models({"run": run, "early": early}, *images, store=tmp_path)
    whole = probe_checkpoints(checkpoints_of(run), *images, store=tmp_path, progress=False)
    for name, step in ("run", 6), ("early", 2):
        rows = table[(table.model == name) & (table.control == MODEL)]
        assert rows.test_accuracy.tolist() == whole[whole.step == step].test_accuracy.tolist()
        assert rows["drop"].tolist() == whole[whole.step == step]["drop"].tolist()
    processor = lab.load_model(run).processor
    pixels = [lab.Features.from_pixels(image_set, processor) for image_set in images]
    alone = lab.probe_layers(*pixels, progress=False).table.test_accuracy.iloc[0]
    assert table[table.control == "raw pixels"].test_accuracy.tolist() == [alone, alone]
    command = ["dynamics", str(run), str(early), "--images", str(tiny_images), "--final", "--name", "both"]
    assert cli.main([*command, "--store", str(tmp_path), "--out", str(tmp_path)]) == 0
    np.testing.assert_allclose(pd.read_csv(tmp_path / "both.csv").test_accuracy, table.test_accuracy)
    assert f"step-000002, raw pixels: {alone:.1%}" in capsys.readouterr().out


def test_runs_named_as_seeds_are_grouped_into_families(run, tiny_images, tmp_path, capsys):
    sources = {"a-seed-0": checkpoints_of(run)[2], "a-seed-1": checkpoints_of(run)[4], "b": run}
    folders = [str(shutil.copytree(source, tmp_path / "runs" / name)) for name, source in sources.items()]
    command = ["dynamics", *folders, "--images", str(tiny_images), "--final", "--layers", "1", "3"]
    assert cli.main([*command, "--store", str(tmp_path), "--out", str(tmp_path), "--name", "study"]) == 0
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = probe_models(dict(zip(sources, folders, strict=True)), *images, store=tmp_path, layers=[1, 3])
    saved = pd.read_csv(tmp_path / "study.csv")
    np.testing.assert_allclose(saved.test_accuracy, table.test_accuracy)
    assert list(saved.family) == ["a"] * 6 + ["b"] * 3 and set(saved.seed_of_pretraining) == {0, 1}
    by_run, summary = (pd.read_csv(tmp_path / f"study_{name}.csv") for name in ("runs", "summary"))
    chosen = table[table.chosen & (table.control == MODEL)]
    assert by_run.chosen_layer.tolist() == chosen.layer.tolist()
    assert by_run.height.tolist() == pytest.approx(chosen.test_accuracy.tolist())
    assert summary.family.tolist() == ["a", "b"] and summary.n_seeds.tolist() == [2, 1]
    assert summary.height_mean[0] == pytest.approx(chosen.test_accuracy[:2].mean())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a, 2 seeds") and Path(printed[-1]).name == "study_differences.csv"
    assert cli.main(["figures", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "study.svg").read_bytes() == (tmp_path / "study.svg").read_bytes()
    again = shutil.copytree(run, tmp_path / "runs" / "b-seed-0")
    assert cli.main(["dynamics", str(again), *command[1:]]) == 1
    assert "b-seed-0, b are of the same family and seed" in capsys.readouterr().err


def test_the_command_s_figure_goes_to_the_user_s_folder_of_its_models_and_images(
    run, tiny_images, tmp_path, monkeypatch
):
    early = checkpoints_of(run)[2]
    monkeypatch.chdir(tmp_path)
    for models in ([run], [run, early]):
        command = ["dynamics", *map(str, models), "--images", str(tiny_images), "--final", "--layers", "1", "3"]
        assert cli.main(command) == 0
    folders = {path.parent.as_posix() for path in Path().glob("results/**/model_comparison.csv")}
    assert folders == {f"results/mine/run-{tiny_images.name}", f"results/mine/run-step-000002-{tiny_images.name}"}


def test_the_command_draws_what_the_function_gives(run, tiny_images, tmp_path, capsys):
    arguments = ["dynamics", str(run), "--images", str(tiny_images), "--store", str(tmp_path), "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    images = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    table = probe_checkpoints(checkpoints_of(run), *images, store=tmp_path, name=run.name, progress=False)
    drawn = pd.read_csv(tmp_path / "training_dynamics.csv")
    np.testing.assert_allclose(drawn.test_accuracy, table.test_accuracy)
    np.testing.assert_allclose(drawn.loss, table.loss)
    printed = capsys.readouterr().out.replace("\n    ", " ").splitlines()  # lines of 80 columns, joined
    doubts, lines = ([line for line in printed if line.startswith("  ") == is_doubt] for is_doubt in (True, False))
    assert [line.split(":")[0] for line in lines[:4]] == [f"{run.name}, step {step}" for step in (0, 2, 4, 6)]
    assert len(lines) == 4 + 5 and all(Path(path).is_file() for path in lines[4:])
    for (_, rows), line in zip(table.groupby("step"), lines[:4], strict=True):
        assert f"chosen layer {rows.layer[rows.chosen].item()} " in line and "with the choice, p = " in line
        assert all(words in [doubt.strip() for doubt in doubts] for words in about_choice(rows))
    assert any("a poor choice" in doubt for doubt in doubts)  # 60 images
    assert (
        cli.main([*arguments[:2], *arguments[1:]]) == 1
        and "whose folders have different names" in capsys.readouterr().err
    )
