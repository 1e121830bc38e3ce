"""Every instrument at once, on a tiny model, from the command and from Python."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.explaining.explain import _between_ends
from igpt_lab.explaining.predictions import PREDICTIONS, describe
from igpt_lab.explaining.sizes import estimated_seconds
from igpt_lab.figures import saving
from igpt_lab.images.image_sets import TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

FIGURES = (
    "lens strip bits bits_relative positions prefixes attention offsets looks windows left_out heads attentive".split()
)


def test_the_command_saves_what_each_instrument_measured_and_prints_the_answers(
    tiny_folder, tiny_images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(saving, "render", lambda figure, kind: b"")  # most of the time; figures have their own tests
    arguments = ["explain", str(tiny_folder), str(tiny_images), "--chosen", "1", "--store", str(tmp_path / "stores")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"about \d+ min on cpu\n", printed)
    suffixes = ("png", "pdf", "svg", "csv", "json")
    wanted = {f"{name}.{suffix}" for name in FIGURES for suffix in suffixes} | {"refit.csv", "answers.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == wanted
    answers = pd.read_csv(tmp_path / "out" / "answers.csv")
    assert answers.drop_duplicates("prediction").prediction.tolist() == [asked.words for asked in PREDICTIONS]
    assert (answers.n == 40).all() and answers[["value", "low", "high"]].notna().all(axis=None)
    assert " ".join(describe(answers).split()) in " ".join(printed.split()) and "c = 1" in printed
    bits = pd.read_csv(tmp_path / "out" / "bits.csv").set_index(["layer", "target"]).bits
    at = [bits[layer, "next pixel"] for layer in (0, 1, 3)]
    assert answers.value[0] == pytest.approx((at[2] - at[1]) / 2 - (at[1] - at[0]))
    refit = pd.read_csv(tmp_path / "out" / "refit.csv")
    assert refit.layer.tolist() == [1, 2] and answers.value[9] == pytest.approx(refit.accuracy_change.mean())


def test_what_cannot_be_explained_is_refused_before_any_work(tiny, train, test, tmp_path, monkeypatch):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    monkeypatch.setattr(type(tiny.transformer), "forward", None)
    for chosen in (0, 3):
        with pytest.raises(ValueError, match=f"layer c = {chosen}, and the last .* is L = 3"):
            lab.explain(tiny, train, test, chosen=chosen, **options)
    with pytest.raises(ValueError, match="has no labels"):
        lab.explain(tiny, replace(train, labels=None), test, **options)
    model = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True)).eval()
    with pytest.raises(ValueError, match="hidden pixels, not the next one; use a causal model"):
        lab.explain(model, train, test, **options)
    assert not list(tmp_path.iterdir())


def test_where_an_end_is_chosen_the_layer_beside_it_stands_for_it():
    assert _between_ends(2, 4) == 2
    for end, beside in ((0, 1), (4, 3)):
        with pytest.warns(UserWarning, match=f"chose layer {end} of 0..4, which is an end.* c = {beside} is used"):
            assert _between_ends(end, 4) == beside
    with pytest.raises(ValueError, match="expected c from 1 to 0"):
        _between_ends(0, 1)


def test_the_command_refuses_it_before_its_estimate(tiny, tiny_folder, tiny_images, tmp_path, capsys):
    bert = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True))
    bert.processor = tiny.processor
    bert.save_pretrained(tmp_path / "bert")
    for model, words in (
        (tiny_folder, "layer c = 3"),
        (tmp_path / "bert", "hidden pixels, not the next one; use a causal model"),
    ):
        arguments = ["explain", str(model), str(tiny_images), "--chosen", "3", "--store", str(tmp_path)]
        assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) != 0
        printed = capsys.readouterr()
        assert not printed.out and words in printed.err and len(printed.err.splitlines()) == 1


def test_the_estimate_is_of_some_seconds(tiny, train, test):
    assert 0 < estimated_seconds(tiny, train, test) < 600


def test_a_stopped_run_keeps_what_was_finished(tiny_folder, tiny_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(saving, "render", lambda figure, kind: b"")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("igpt_lab.explaining.explain.leave_out", stopped)
    arguments = ["explain", str(tiny_folder), str(tiny_images), "--chosen", "1", "--store", str(tmp_path / "stores")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert "finished work is kept" in capsys.readouterr().err
    kept = {path.stem for path in (tmp_path / "out").glob("*.csv")}
    assert kept == set(FIGURES) - {"left_out", "heads", "attentive"}
    bits = pd.read_csv(tmp_path / "out" / "bits.csv")
    assert bits.layer.nunique() == 4 and bits.bits.notna().all()


def test_out_that_is_a_file_is_refused_before_any_work(tiny_folder, tiny_images, tmp_path, capsys):
    (tmp_path / "afile").write_text("mine")
    assert cli.main(["explain", str(tiny_folder), str(tiny_images), "--out", str(tmp_path / "afile")]) == 1
    printed = capsys.readouterr()
    assert not printed.out and "afile is a file; expected a folder" in printed.err
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize("shape", [{"n_layer": 1}, {"n_positions": 1}])
def test_a_model_without_a_middle_is_refused_before_any_work(shape, tiny, train, test, tmp_path):
    model = ImageGPTForCausalImageModeling(replace(tiny.config, **shape)).eval()
    with pytest.raises(ValueError, match="expected 2 blocks or more"):
        lab.explain(model, train, test, store=tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_attentive_probe_takes_as_many_images_as_memory_holds(tiny, train, test, tmp_path, monkeypatch):
    explain = importlib.import_module("igpt_lab.explaining.explain")
    monkeypatch.setattr(explain, "MEMORY", 4 * tiny.config.n_positions * tiny.config.n_embd * 20)
    images = [explain._Images.drawn(tiny, split, 40, 0) for split in (train, test)]
    run = explain._Run.begun(tiny, *images, 1, 0, {"store": tmp_path, "device": "cpu", "progress": False})
    assert set(run.attentive().table.n_train) == {20}


def test_probe_shares_and_positions_are_from_one_extraction_what_three_give(tiny, train, test, tmp_path):
    explain = importlib.import_module("igpt_lab.explaining.explain")
    images, options = (train, test), {"device": "cpu", "progress": False}
    drawn = [explain._Images.drawn(tiny, split, 40, 0) for split in images]
    run = explain._Run.begun(tiny, *drawn, 1, 0, {"store": tmp_path / "one"} | options)
    store = lab.extract(tiny, [split.images for split in drawn], store=tmp_path / "two", **options)
    alone = lab.probe_layers(*(lab.Features.from_store(store, split) for split in ("train", "test")), **options)
    pd.testing.assert_frame_equal(run.probe.table, alone.table)
    shares = lab.probe_prefixes(tiny, *(split.images for split in drawn), shares=4, store=tmp_path / "two", **options)
    pd.testing.assert_frame_equal(run.prefixes().table, shares.table)
    places = lab.probe_positions(tiny, *(split.images for split in drawn), store=tmp_path / "two", **options)
    pd.testing.assert_frame_equal(run.positions().table, places.table)


def test_fewer_pixels_than_shares(tiny, train, test, tmp_path):
    explain = importlib.import_module("igpt_lab.explaining.explain")
    small = ImageGPTForCausalImageModeling(replace(tiny.config, n_positions=3)).eval()
    pixels = np.random.default_rng(0).integers(8, size=(2, 20, 3))
    tokens = [TokenSet("shades", split, np.arange(20), np.arange(20) % 2, (), pixels[number])
              for number, split in enumerate(("train", "test"))]  # fmt: skip
    small.name, small.processor = "small", None
    drawn = [explain._Images.drawn(small, split, 20, 0) for split in tokens]
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    table = explain._Run.begun(small, *drawn, 1, 0, options).prefixes().table
    assert sorted(set(table.share)) == [pytest.approx(i / 3) for i in (1, 2, 3)]
