"""Probes of clean images on corrupted ones: as the same probe on each set alone gives it, and what seeds change."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.probing.results import ProbeResult
from igpt_lab.training import shift

PAGE = (Path(__file__).parents[2] / "docs/studies.md").read_text(encoding="utf-8")
POINTS = ["ln_1", "mlp_act"]
LEVELS = {"contrast": [0.3], "blur": [1.0, 0.5]}


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """Two seeds of a next-pixel family, of which the second has other weights, and one of BERT."""
    root, first = tmp_path_factory.mktemp("runs"), lab.load_model(tiny_folder)
    folders = {name: root / name for name in ("pixel-seed-0", "pixel-seed-1", "bert-seed-0")}
    shutil.copytree(tiny_folder, folders["pixel-seed-0"])
    bert = lab.ImageGPTForCausalImageModeling(replace(first.config, bidirectional=True))
    for name, model in {"pixel-seed-1": lab.load_model(tiny_folder, random=True, seed=1), "bert-seed-0": bert}.items():
        model.save_pretrained(folders[name])
        first.processor.save_pretrained(folders[name])
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def splits(tiny_images):
    return [lab.load_images(tiny_images, split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def table(runs, splits, tmp_path_factory):
    store = tmp_path_factory.mktemp("stores")
    return lab.probe_shift(runs, *splits, points=POINTS, corruptions=LEVELS, folds=3, store=store, progress=False)


def test_every_run_point_version_and_layer_has_a_row(table):
    assert table.groupby(["family", "seed_of_pretraining"], sort=False).ngroups == 3
    versions = table[["corruption", "level"]].drop_duplicates().to_numpy().tolist()
    assert versions == [["contrast", 1.0], ["contrast", 0.3], ["blur", 0.0], ["blur", 0.5], ["blur", 1.0]]
    assert table[table.point == "ln_1"].layer.tolist() == [0, 1, 2, 3] * 15
    assert table[table.point == "mlp_act"].layer.tolist() == [0, 1, 2] * 15
    assert table.n_test.eq(40).all() and table.n_train.eq(60).all()


def test_a_version_is_what_the_same_probe_says_of_it_alone(table, runs, splits, tmp_path):
    model, (train, test) = lab.load_model(runs["pixel-seed-0"]), splits
    blurred = lab.corrupt(test, "blur", 1.0)
    store = lab.extract(model, [train, test], store=tmp_path, points=POINTS, progress=False)
    other = lab.extract(model, blurred, store=tmp_path, points=POINTS, progress=False)
    for point in POINTS:
        fitted, clean = (lab.Features.from_store(store, split, point) for split in ("train", "test"))
        for corruption, level, tested in (
            ("blur", 1.0, lab.Features.from_store(other, "test", point)), ("contrast", 1.0, clean),
        ):  # fmt: skip
            alone = lab.probe_layers(fitted, tested, folds=3, progress=False)
            rows = table.query("model == 'pixel-seed-0' and point == @point")
            rows = rows[(rows.corruption == corruption) & (rows.level == level)]
            names = ["layer", "test_accuracy", "low", "high", "in_peak_set", "chosen", "C", "validation_accuracy"]
            names += ["log_loss", "log_loss_low", "log_loss_high"]
            pd.testing.assert_frame_equal(rows[names].reset_index(drop=True), alone.table[names])
            drop = lab.compare_layers(alone)
            ours = rows[["drop", "drop_low", "drop_high", "drop_p", "drop_choice_low", "drop_choice_high"]].iloc[0]
            theirs = [drop.difference, drop.low, drop.high, drop.p_value, drop.choice_low, drop.choice_high]
            assert ours.tolist() == pytest.approx(theirs, abs=1e-12)


def test_the_chosen_layer_is_that_of_clean_images_and_the_best_that_of_the_scored_ones(table):
    for _, of_point in table.groupby(["model", "point"]):
        assert of_point[of_point.chosen].layer.nunique() == 1 and of_point.chosen.sum() == 5
    for _, rows in table.groupby(["model", "point", "corruption", "level"]):
        best, last = rows[rows.best].iloc[0], rows.iloc[-1]
        assert rows.best.sum() == 1 and best.test_accuracy == rows.test_accuracy.max()
        assert best.drop_best == pytest.approx(best.test_accuracy - last.test_accuracy, abs=1e-12)
        assert 0 <= best.drop_best_low <= best.drop_best <= best.drop_best_high and best.drop_best >= best["drop"]


def test_the_change_of_the_drop_is_against_the_clean_images(table):
    versions = table[table.layer == 0].set_index(["model", "point", "corruption", "level"])
    for (model, point, corruption, _), row in versions.iterrows():
        clean = versions.loc[model, point, corruption, 1.0 if corruption == "contrast" else 0.0]
        assert row.drop_change == pytest.approx(row["drop"] - clean["drop"], abs=1e-12)
        assert row.drop_change_low <= row.drop_change <= row.drop_change_high


def test_paired_images_make_the_change_certain():
    """Layer 0 is right on all images and layer 1 on none, but on the corrupted ones both are right on all."""
    clean, corrupted = [[True] * 50, [False] * 50], [[True] * 50, [True] * 50]
    correct = {layer: np.array(clean[layer] + corrupted[layer]) for layer in (0, 1)}
    fitted = pd.DataFrame({"layer": [0, 1], "control": "model", "chosen": [True, False], "n_test": 100})
    fitted = fitted.assign(test_accuracy=0.0, low=0.0, high=0.0, in_peak_set=False)
    result = ProbeResult(fitted, correct, 0, {}, np.array([[0.9, 0.1], [0.8, 0.2]]))
    first, second = (rows.iloc[0] for _, rows in shift._scored(result, [("blur", 0.0), ("blur", 2.0)]).groupby("level"))
    assert (first["drop"], second["drop"], second.drop_change) == (1, 0, -1) and first.drop_change == 0
    assert second.drop_change_high < -0.85


def test_seeds_in_a_row(table):
    by_run = lab.summarise_shift_runs(table)
    summary = lab.summarise_shift(by_run)
    assert len(by_run) == 3 * 2 * 5 and len(summary) == 2 * 2 * 5
    rows = by_run.query("family == 'pixel' and point == 'ln_1' and corruption == 'blur' and level == 0.5")
    row = summary.query("family == 'pixel' and point == 'ln_1' and corruption == 'blur' and level == 0.5").iloc[0]
    for measure in ("drop", "drop_best", "drop_change", "best_depth", "height"):
        seeds = lab.over_seeds(rows[measure])
        assert (row[f"{measure}_mean"], row[f"{measure}_high"]) == pytest.approx((seeds.mean, seeds.high))
    assert row.drop_best_images_low == pytest.approx(rows.drop_best_low.mean())
    assert row.best_depth_images_high == pytest.approx(rows.peak_high.mean())
    keys = ["family", "seed_of_pretraining", "point", "corruption", "level"]
    both = by_run.merge(table[table.best], on=keys)
    assert len(both) == 30 and (both.best_layer == both.layer).all()
    assert (both.best_height == both.test_accuracy).all() and (both.best_depth == both.layer / both.last_layer).all()
    assert (by_run.drop_p_holm >= by_run.drop_p).all()


def test_the_page_of_studies_names_columns_of_these_tables(table):
    by_run = lab.summarise_shift_runs(table)
    tables = {"shift": lab.summarise_shift(by_run), "shift_runs": by_run, "shift_layers": table}
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `shift")}
    assert list(rows) == [f"{name}.csv" for name in tables]
    for name, columns in tables.items():
        named = re.findall(r"`(\w+)`", rows[f"{name}.csv"])
        endings = [part for part in named if part[0] == "_"] or [""]
        assert {part + ending for part in named if part[0] != "_" for ending in endings} <= set(columns)


def test_the_command_writes_two_figures_and_three_tables(runs, tiny_images, tmp_path, capsys):
    command = ["shift", runs["pixel-seed-0"], runs["bert-seed-0"], "--images", str(tiny_images), "--points", "ln_2"]
    assert cli.main([*command, "--store", str(tmp_path / "stores"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("pixel, ln_2, contrast 1: accuracy") and printed[-1].endswith("shift_layers.csv")
    summary, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("shift", "shift_layers"))
    assert summary.family.tolist() == ["pixel", "bert"] * 8 and summary.n_seeds.eq(1).all()
    runs_table = pd.read_csv(tmp_path / "shift_runs.csv")
    assert len(runs_table) == 16 and len(layers) == 16 * 3
    for name in ("shift", "shift_points"):
        assert (tmp_path / f"{name}.csv").read_bytes() == (tmp_path / "shift.csv").read_bytes()


def test_what_cannot_be_is_refused_before_any_work(runs, splits, tmp_path):
    train, test = splits
    twice = {"a-seed-0": runs["pixel-seed-0"], "a": runs["pixel-seed-0"]}
    with pytest.raises(ValueError, match="a-seed-0, a are of the same family and seed"):
        lab.probe_shift(twice, train, test, store=tmp_path)
    with pytest.raises(ValueError, match="'fog'; expected one of contrast, blur"):
        lab.probe_shift(runs, train, test, corruptions={"fog": [1.0]}, store=tmp_path)
    with pytest.raises(ValueError, match="got no corruptions; expected levels of contrast or blur"):
        lab.probe_shift(runs, train, test, corruptions={}, store=tmp_path)
    with pytest.raises(ValueError, match="no point 'ln_3'; expected .*; did you mean"):
        lab.probe_shift(runs, train, test, points=["ln_3"], store=tmp_path)
    np.save(tmp_path / "few_teX.npy", np.zeros((3, 16), int))
    with pytest.raises(ValueError, match="holds tokens, and a corruption changes images"):
        lab.probe_shift(runs, train, lab.load_tokens(tmp_path / "few"), store=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["few_teX.npy"]
