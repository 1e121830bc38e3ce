"""The commands on tiny input: what they print, leave behind, and say of bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import igpt_lab as lab
from igpt_lab.app import cli, runs
from igpt_lab.app import notebooks as workbench
from igpt_lab.core.display import MODEL
from igpt_lab.features.poolings import POOLINGS
from igpt_lab.features.store import FeatureStore
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import losses_of

PACKAGE = Path(lab.__file__).parents[1]


def test_extract_leaves_a_store(tiny_folder, tiny_images, tmp_path, capsys):
    arguments = ["extract", str(tiny_folder), str(tiny_images), "--split", "test", "--limit", "10"]
    assert cli.main([*arguments, "--store", str(tmp_path)]) == 0
    store = FeatureStore.open(capsys.readouterr().out.strip())
    assert store.splits == ["test"] and store.layer("ln_1", 3, "test").shape == (10, 8)
    some = "--point mlp_out --point ln_1 --layers 0 2 --pool max --batch-size 3 --on-bad-image skip".split()
    assert cli.main([*arguments, "--store", str(tmp_path), *some]) == 0
    store = FeatureStore.open(capsys.readouterr().out.strip())
    assert store.layers == {"mlp_out": [0, 2], "ln_1": [0, 2]} and store.key["pool"] == "max"
    assert cli.main([*arguments, "--store", str(tmp_path), "--random"]) == 0
    assert "tiny-random-" in capsys.readouterr().out


def test_a_probe_of_few_images_says_how_little_it_knows(tiny_folder, tmp_path, capsys, monkeypatch):
    generator = np.random.default_rng(3)
    for split, count in (("train", 30), ("test", 10)):
        for name in ("cat", "dog", "fox"):  # noise: no layer can tell them apart
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for option in ("--untrained", "--permutations"):  # before anything is extracted
        assert cli.main(["probe", str(tiny_folder), "photos", option, "-1"]) == 1
        assert f"{option} -1; expected 0 or more" in capsys.readouterr().err and not Path("stores").exists()
    assert cli.main(["probe", str(tiny_folder), "photos"]) == 0
    printed, table = capsys.readouterr().out, pd.read_csv("results/mine/tiny-photos/probe.csv")
    assert table.control.value_counts().to_dict() == {
        "model": 4, "raw pixels": 1, "random network": 3 * 4, "permuted labels": 10 * 4
    }  # fmt: skip
    assert Path("results/mine/tiny-photos/probe.txt").read_text() in printed and "permuted labels at the" in printed
    printed = " ".join(printed.split())  # which was in lines of 80 columns
    assert re.search(r"untrained networks, .*: \S+( to \S+)? points; the trained one's less their mean: [+-]", printed)
    assert pd.read_csv("results/mine/tiny-photos/probe_layers.csv").layer.tolist() == [0, 1, 2, 3]
    table = table[table.control == "model"]
    chosen = table[table.chosen.astype(str) == "True"].iloc[0]
    assert chosen.n_train == chosen.n_validation == 90 and chosen.folds == 10
    assert f"chosen layer {chosen.layer}: {chosen.test_accuracy:.1%} [{chosen.low:.1%}, {chosen.high:.1%}]" in printed
    drop = re.search(r"points \[(.+), (.+)\] over test images, \[(.+), (.+)\] with the choice, p = ", printed)
    low, high, choice_low, choice_high = map(float, drop.groups())
    assert choice_low <= low and high <= choice_high and high - low > 10  # of 30 test images
    many = table.within_error.sum()
    why = rf"{many} of 4 layers are within one standard error \(" if many > 2 else "one standard error is "
    ends = r"(about [\d,]+ would do|these layers differ too little for any number)"
    assert re.search(rf"a poor choice: {why}[\d.]+ points on 90 held-out images\)?; {ends}", printed)
    assert "best" not in printed and "a poor choice" in Path("results/mine/tiny-photos/probe.svg").read_text()
    assert cli.main(["report", "results/mine/tiny-photos", "--no-pdf"]) == 0
    assert "A poor choice" in Path("results/mine/tiny-photos/report.html").read_text()


def test_a_label_and_a_configuration_are_chosen_on_the_command_line(tiny_folder, tmp_path, capsys, monkeypatch):
    """Two columns of labels, in a folder of a folder: each label has results and a store of its own."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(4), "coarse_label": datasets.ClassLabel(2)}
    for split in ("train", "test"):
        pixels = generator.integers(0, 256, (24, 4, 4), np.uint8)
        columns = {"img": [Image.fromarray(image) for image in pixels], "fine_label": [0, 1, 2, 3] * 6}
        columns["coarse_label"] = [0, 0, 1, 1] * 6
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        data.to_parquet(tmp_path / f"set/full/{split}.parquet")
        data.select(range(8)).to_parquet(tmp_path / f"set/small/{split}.parquet")
    options = ["--config", "full", "--untrained", "0", "--permutations", "0", "--device", "cpu"]
    assert cli.main(["probe", str(tiny_folder), "set", *options]) == 0
    assert cli.main(["probe", str(tiny_folder), "set", *options, "--label", "coarse_label"]) == 0
    results = [folder.parent.name for folder in tmp_path.glob("results/mine/*/probe.csv")]
    assert sorted(results) == ["tiny-set", "tiny-set-coarse_label"]
    stores = [FeatureStore.open(path.parent) for path in tmp_path.glob("stores/*/manifest.json")]
    assert sorted(len(np.unique(store.labels("train"))) for store in stores) == [2, 4]
    assert all(len(store.labels("train")) == 24 for store in stores)
    assert cli.main(["probe", str(tiny_folder), "set", *options, "--pool", "max", "--out", "of-max"]) == 0
    assert ", pooled by max" in Path("of-max/probe.txt").read_text().splitlines()[0]
    pools = {path: FeatureStore.open(path.parent).key["pool"] for path in tmp_path.glob("stores/*/manifest.json")}
    assert sorted(pools.values()) == ["max", "mean", "mean"]
    capsys.readouterr()
    assert (
        cli.main(["extract", str(tiny_folder), "set", "--config", "small", "--label", "coarse", "--device", "cpu"]) == 1
    )
    assert "did you mean 'coarse_label'? Its columns are img, fine_label, coarse_label" in capsys.readouterr().err


def test_extract_at_chosen_positions(tiny_folder, tiny_images, tmp_path, capsys):
    arguments = ["extract", str(tiny_folder), str(tiny_images), "--split", "test", "--store", str(tmp_path)]
    assert cli.main([*arguments, "--pool", "at:0,5"]) == 0
    store = FeatureStore.open(capsys.readouterr().out.strip())
    assert store.key["pool"] == "at:0,5" and store.layer("ln_1", 3, "test").shape[1] == 16
    with pytest.raises(SystemExit):
        cli.main(["extract", "--help"])
    text = capsys.readouterr().out
    assert [pool for pool in POOLINGS if pool not in text] == []


def test_a_bert_model_is_extracted_and_its_loss_is_told_apart(tiny, tmp_path, capsys):
    bert = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True))
    bert.save_pretrained(tmp_path / "bert")
    np.save(tmp_path / "set_teX.npy", np.zeros((5, 16), np.uint8))
    store = str(tmp_path / "s")
    arguments = [str(tmp_path / "bert"), str(tmp_path / "set"), "--split", "test"]
    assert cli.main(["extract", *arguments, "--store", store]) == 0
    first = FeatureStore.open(capsys.readouterr().out.strip())
    assert first.manifest["key"]["alignment"] == "raw"
    assert cli.main(["extract", *arguments, "--store", store, "--alignment", "raw", "--revision", "v1"]) == 0
    assert capsys.readouterr().out.strip() == str(first.path)
    assert cli.main(["extract", *arguments, "--store", store, "--alignment", "sos"]) == 1
    assert "a bidirectional model has no SOS" in capsys.readouterr().err
    assert cli.main(["evaluate", *arguments]) == 1
    assert capsys.readouterr().err == (
        f"igpt-lab: {arguments[0]} predicts masked pixels, so its loss needs masks: see igpt_lab.masked_pixel_loss\n"
    )


def test_sample_and_complete_leave_a_gallery_with_tokens_and_seeds(tiny_folder, tiny_images, tmp_path, capsys):
    drawing = "--seed 3 --top-p 0.9 --out".split()
    assert cli.main(["sample", str(tiny_folder), "--count", "5", *drawing, str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"s.{kind}") for kind in "png pdf svg csv json".split()]
    model = lab.load_model(tiny_folder)
    table, drawn = pd.read_csv(tmp_path / "s.csv", index_col="seed"), lab.sample(model, 5, seed=3, top_p=0.9)
    np.testing.assert_array_equal(table, drawn.tokens)
    assert table.index.tolist() == drawn.seeds.tolist()
    made = json.loads((tmp_path / "s.json").read_text())
    assert made["seed"] == 3 and made["config"]["top_p"] == 0.9 and made["config"]["model"] == "tiny"
    assert made["config"]["finished_rows"] == [4] * 5

    arguments = ["--limit", "2", "--completions", "3", "--keep", "0.25", *drawing, str(tmp_path / "c")]
    assert cli.main(["complete", str(tiny_folder), str(tiny_images), *arguments]) == 0
    table, made = pd.read_csv(tmp_path / "c.csv", index_col="seed"), json.loads((tmp_path / "c.json").read_text())
    images = lab.load_images(tiny_images, "test", limit=2)
    assert made["config"]["index"] == images.index.tolist() and table.shape == (6, 16)
    primes = lab.tokenize(images, model.processor)[:, :4]
    np.testing.assert_array_equal(table.to_numpy().reshape(2, 3, 16)[:, :, :4], primes[:, None].repeat(3, axis=1))


def test_a_picture_file_is_completed_and_an_interruption_has_its_exit_code(tiny_folder, tmp_path, monkeypatch):
    Image.new("RGB", (9, 7), "white").save(tmp_path / "Mine.PNG")
    arguments = ["complete", str(tiny_folder), str(tmp_path / "Mine.PNG"), "--out", str(tmp_path / "c")]
    assert cli.main(arguments) == 0
    assert (pd.read_csv(tmp_path / "c.csv", index_col="seed").iloc[:, :8] == 7).all(axis=None)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("igpt_lab.sampling.decoding.Decoder.step", stop)
    with pytest.warns(UserWarning, match="0 of 4 images complete"):
        assert cli.main(arguments) == 130
    assert json.loads((tmp_path / "c.json").read_text())["config"]["finished_rows"] == [2] * 4


def test_a_model_without_a_palette_draws_no_image(tiny, tmp_path, capsys):
    tiny.save_pretrained(tmp_path / "bare")
    assert cli.main(["sample", str(tmp_path / "bare")]) == 1
    assert "has no palette" in capsys.readouterr().err


def test_loss_of_an_untrained_model_is_ln_v_and_a_run_can_begin_with_a_model(tiny_images, tmp_path, capsys):
    arguments = "--side 4 --colours 6 --layers 2 --width 8 --heads 2 --batch-size 4 --warmup 1 --steps 3 --holdout 5 "
    arguments += "--validate 5 --log-every 2 --save-every 2 --snapshots 1"
    assert cli.main(["pretrain", str(tiny_images), "--out", str(tmp_path / "m"), *arguments.split()]) == 0
    assert pd.read_csv(tmp_path / "m/log.csv").validation_bits_per_pixel[0] == pytest.approx(2.58496, abs=1e-4)
    assert cli.main(["evaluate", str(tmp_path / "m"), str(tiny_images), "--limit", "12"]) == 0
    printed = capsys.readouterr().out
    assert "m on 12 images" in " ".join(printed.split())
    model, images = lab.load_model(tmp_path / "m"), lab.load_images(tiny_images, "test", limit=12)
    bits = losses_of(model, tokens_of(model, images)) / np.log(2)
    assert f"{bits.mean():.4f} bits per pixel ({np.std(bits, ddof=1) / np.sqrt(12):.4f})" in printed
    assert cli.main(["pretrain", str(tiny_images), "--out", str(tmp_path / "m"), *arguments.split()]) == 0  # finished

    more = ["pretrain", str(tiny_images), "--out", str(tmp_path / "on"), "--init", str(tmp_path / "m")]
    assert cli.main([*more, *arguments.split()]) == 1
    assert "sets the shape of the network; leave out --bert, --side" in capsys.readouterr().err
    assert cli.main([*more, *arguments.split()[10:]]) == 0
    logs = [pd.read_csv(tmp_path / name / "log.csv").validation_loss for name in ("m", "on")]
    assert logs[1][0] == logs[0].iloc[-1] > logs[1].iloc[-1]
    palettes = [(tmp_path / name / "preprocessor_config.json").read_text() for name in ("m", "on")]
    assert palettes[0] == palettes[1]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["extract", "fashion-xz", "fashion-mini"], "did you mean 'fashion-xs'"),
        (["extract", "TINY", "fashion-minni"], "fashion-mini"),
        (["evaluate", "EMPTY", "fashion-mini"], "config.json"),
        (["extract", "TINY", "EMPTY"], "EMPTY"),
        (["extract", "TINY", ""], "the name of the images is empty"),
        (["extract", "", "fashion-mini"], "the model's name is empty"),
        (["extract", "TINY", "fashion-mini", "--workers", "0"], "workers=0; expected at least 1"),
        (["sample", "fashion-xs", "--count", "-1"], "count=-1; expected at least 0"),
        (["sample", "fashion-xs", "--seed", "-1"], "seed=-1; expected at least 0"),
        (["sample", "fashion-xs", "--top-k", "0"], "top_k=0; expected at least 1"),
        (["reproduce", "--model", "fashion-xz"], "did you mean 'fashion-xs'"),
        (["stores"], "no folder stores"),
        (["prune", "nowhere", "--yes"], "no folder nowhere"),
        (["verify", "nowhere", "--repair"], "no folder nowhere"),
        (["verify", "EMPTY"], "it has no manifest.json"),
    ],
)
def test_bad_input_is_one_line(arguments, culprit, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    words = [str(tiny_folder) if word == "TINY" else word for word in arguments]
    assert cli.main(words) == 1
    message = capsys.readouterr().err
    assert culprit in message and message.startswith("igpt-lab: ") and message.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["EMPTY"]


def test_a_share_of_another_form_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["extract", "fashion-xs", "fashion-mini", "--part", "3"])
    assert "argument --part: '3'; expected I/N, such as 3/8" in capsys.readouterr().err


def test_a_command_ends_quietly_when_nobody_reads_it(tmp_path):
    command = [sys.executable, "-m", "igpt_lab", "plan", "S", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PACKAGE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # as a shell gives it of SIGPIPE


def test_a_name_that_is_no_text_is_printed_with_escapes(tmp_path):
    folder = os.fsencode(tmp_path) + b"/no-\xff-text"
    done = subprocess.run([sys.executable, "-m", "igpt_lab", "stores", folder], capture_output=True, cwd=PACKAGE)
    assert done.returncode == 1 and done.stderr.endswith(b"no-\\udcff-text\n"), done.stderr


def test_a_name_from_a_file_does_not_steer_the_terminal(tmp_path, capsys):
    name = "a\x1b]52;c;cHdu\x07\x9b2J\x08\u202eb"
    pq.write_table(pa.table({name: [1]}), tmp_path / "test.parquet")
    assert cli.main(["check", "fashion-xs", "--images", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert ascii(name)[1:-1] in shown and shown.rstrip("\n").isprintable()


def test_a_class_name_is_one_line(tiny_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "config.json").read_text())
    names = {"0": "cat\x1b[2J\nx.png  dog 99.9%", "1": "dog"}
    (model / "config.json").write_text(json.dumps(config | {"id2label": names}))
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(2, config["n_embd"])}, model / "model.safetensors")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert cli.main(["classify", str(model), str(tmp_path / "x.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and shown.rstrip("\n").isprintable() and "cat\\x1b[2J x.png" in shown


def test_stores_are_listed_verified_repaired_and_pruned(tiny_folder, tiny_images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["extract", str(tiny_folder), str(tiny_images), "--split", "test", "--limit", "10"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert cli.main(["stores"]) == cli.main(["prune"]) == cli.main(["verify", str(path)]) == 0
    printed = capsys.readouterr().out
    name, facts = printed.splitlines()[:2]
    assert name.startswith(path.name) and name.endswith(" MB  complete")
    assert facts == "    test 10; ln_1 4 layers; sos, mean" and max(map(len, printed.splitlines()[:2])) <= 80
    assert "nothing to prune in stores" in printed and "whole, every digest as listed" in printed
    part = path / "test/part-00000-of-00001.parquet"
    good = part.read_bytes()
    part.write_bytes(good[:-40])
    assert cli.main(["verify", str(path)]) == 1
    assert capsys.readouterr().out.count("\n") == 2  # its digest, and that it is not Parquet
    assert cli.main(["verify", str(path), "--repair"]) == 0
    assert "repaired" in capsys.readouterr().out and part.read_bytes() == good
    part.unlink()
    assert cli.main(["stores"]) == cli.main(["prune"]) == 0 and path.exists()
    printed = capsys.readouterr().out
    assert "0 of 1 parts" in printed and f"incomplete store  {path}" in printed and "--yes deletes them" in printed
    assert cli.main(["prune", "--yes"]) == 0 and list(Path("stores").iterdir()) == [Path("stores/tokens")]
    assert cli.main(["stores"]) == 0 and "no stores in stores" in capsys.readouterr().out


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def test_parameters_are_set_where_they_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path)
    nbformat.write(notebook("out = None\nrows = 5\nks = [1, 2]", "print(out, rows)"), tmp_path / "one.ipynb")
    assert workbench.parameters("one") == {"out": None, "rows": 5, "ks": [1, 2]}
    kept = tmp_path / "run/notebooks/one.ipynb"
    assert workbench.run_notebook("one", {"rows": 5, "ks": [1, 2]}, tmp_path / "run", "") is None
    assert [cell.source for cell in nbformat.read(kept, as_version=4).cells][1:] == ["print(out, rows)"]
    place = tmp_path / 'a "b" {c}'
    for out in (tmp_path / "run", place, place):
        assert workbench.run_notebook("one", {"out": str(place), "rows": 6}, out, "") is None
        assert nbformat.read(out / "notebooks/one.ipynb", as_version=4).cells[2].outputs[0].text == f"{place} 6\n"
    assert kept.read_bytes() == (place / "notebooks/one.ipynb").read_bytes()  # no times, no random ids
    with pytest.raises(
        ValueError, match="notebook one has no parameter 'row'; expected one of out, rows, ks; did you mean 'rows'?"
    ):
        workbench.run_notebook("one", {"row": 6}, tmp_path, "")


def test_a_failing_notebook_is_named_with_its_cell(tiny_folder, tiny_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workbench, "NOTEBOOKS", ("one", "two"))
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path)
    for name, last in (("one", "print(rows)"), ("two", "rows[0]")):
        nbformat.write(notebook("rows = 1", "rows + 1", last, "rows"), tmp_path / f"{name}.ipynb")
    arguments = ["--model", str(tiny_folder), "--images", str(tiny_images), "--out", str(tmp_path / "out")]
    assert cli.main(["reproduce", *arguments]) == 1
    assert "notebook two, cell 3 failed: TypeError" in capsys.readouterr().err
    kept, failed = (nbformat.read(tmp_path / f"out/notebooks/{name}.ipynb", as_version=4) for name in ("one", "two"))
    assert kept.cells[2].outputs[0].text == "1\n"
    assert len(failed.cells) == 4 and failed.cells[2].outputs[0].ename == "TypeError" and not failed.cells[3].outputs
    assert not (tmp_path / "out/summary.json").exists()


def test_a_dead_kernel_is_named_with_its_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path)
    nbformat.write(notebook("rows = 1", "import os; os._exit(1)", "rows"), tmp_path / "one.ipynb")
    assert workbench.run_notebook("one", {}, tmp_path / "out", "") == "notebook one, cell 2 failed: the kernel died"


def test_tidy_drops_progress_only():
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a:  50%|##  | 1/2"),
        nbformat.v4.new_output("stream", name="stderr", text="Warning: mind this"),
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
        nbformat.v4.new_output("display_data", {"text/plain": "a: 100%"}, metadata={"progress": True}),
        nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=1),
    ]
    workbench._tidy(nbformat.v4.new_notebook(cells=[cell]))
    assert [output.get("text") for output in cell.outputs] == ["Warning: mind this", None]


def test_summary_reads_what_the_notebooks_left(tmp_path):
    rows = [(MODEL, 0, 0.5, 0.4, 0.6, False), (MODEL, 1, 0.8, 0.7, 0.9, True), (MODEL, 2, 0.6, 0.5, 0.7, False)]
    rows.append(("raw pixels", 0, 0.3, 0.2, 0.4, True))
    table = pd.DataFrame(rows, columns=["control", "layer", "test_accuracy", "low", "high", "chosen"])
    table.assign(n_test=40).to_csv(tmp_path / "layer_curve.csv", index=False)
    record = {"config": {"comparison": {"p_value": 0.001}}}
    (tmp_path / "layer_curve.json").write_text(json.dumps(record))
    assert runs.summary(tmp_path) == {
        "n_layers": 2, "chosen_layer": 1, "chosen_accuracy": 0.8, "chosen_interval": [0.7, 0.9], "first_accuracy": 0.5,
        "last_accuracy": 0.6, "p_value": 0.001, "test_rows": 40,
    }  # fmt: skip
