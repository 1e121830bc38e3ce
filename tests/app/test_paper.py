"""The released weights beside published numbers: a small checkpoint and token sets, served in the published layout."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from original import AR, BERT, DATA, original_graph, serving
from scipy.special import log_softmax
from scipy.stats import binomtest

import igpt_lab as lab
from igpt_lab.app import cli, paper, paper_cost, paper_files
from igpt_lab.core import downloads
from igpt_lab.core import published as published_numbers
from igpt_lab.figures import saving
from igpt_lab.models import openai

GENERATOR = np.random.default_rng(0)
COUNTS = {"cifar10_tr": 45, "cifar10_va": 15, "cifar10_te": 30, "imagenet_te": 50}
LABELS = {name: np.arange(count) % 3 for name, count in COUNTS.items()}
TOKENS = {name: (labels[:, None] + GENERATOR.integers(0, 4, (len(labels), 9))) % 6 for name, labels in LABELS.items()}
TOKENS = {name: tokens.astype(np.uint16) for name, tokens in TOKENS.items()}


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """The server, with what `download_openai` asks for: igpt-s after 1,000,000 steps, igpt-s-bert after 131,000."""
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setattr(saving, "render", lambda figure, kind: b"")  # figures have their own tests
    monkeypatch.setattr(paper, "ROWS", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving() as server:
        for place, prefix, step in (("igpt-s/1000000", AR, 1_000_000), ("igpt-s-bert/131000", BERT, 131_000)):
            for file in prefix.parent.glob(f"{prefix.name}.*"):
                name = file.name.replace(prefix.name, f"model.ckpt-{step}")
                server.files[f"/checkpoints/{place}/{name}"] = file.read_bytes()
        server.files["/color-clusters/kmeans_centers.npy"] = npy(np.linspace(-1, 1, 18).reshape(6, 3))
        for name, tokens in TOKENS.items():
            server.files[f"/datasets/{name}X.npy"] = npy(tokens)
            server.files[f"/datasets/{name}Y.npy"] = npy(np.eye(3, dtype=np.float32)[LABELS[name]])
        monkeypatch.setitem(openai.download_openai.__wrapped__.__kwdefaults__, "address", server.address)
        yield server


def original_losses() -> np.ndarray:
    """Nats per token of each ImageNet image, by the original graph in NumPy."""
    tokens = TOKENS["imagenet_te"].astype(int)
    with np.load(DATA / "openai-ar.npz") as file:
        logits, _ = original_graph(dict(file), tokens, 2)
    return -np.take_along_axis(log_softmax(logits, -1), tokens[..., None], -1).mean((1, 2))


def publish(monkeypatch, tmp_path, accuracies: str) -> None:
    """Published numbers for the tiny model: its true loss, a wild best accuracy, and layers of the recipe."""
    lines = ["source,experiment,size,images,setting,layer,value,std,unit"]
    lines += [f"A,loss,s,ImageNet,test,,{original_losses().mean():.4f},,nats"]
    lines += ["A,linear probe,s,CIFAR-10,,,1.0,,percent", "A,few labels,s,CIFAR-10,4 labels a class,,50.0,50,percent"]
    lines += [f"B,linear probe,s,CIFAR-10,,{layer},{text},,percent" for layer, text in enumerate(accuracies.split())]
    (tmp_path / "published.csv").write_text("\n".join(lines))
    monkeypatch.setattr(published_numbers, "FILE", tmp_path / "published.csv")


def stopped(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_end_to_end_and_stopped_and_resumed(published, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(openai.SHARDS, "s", 3)
    publish(monkeypatch, tmp_path, "50.00 0.00 100.00")
    out, words = tmp_path / "out", ["paper", "--size", "s", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with monkeypatch.context() as interrupted:
        interrupted.setattr(lab, "probe_few_labels", stopped, raising=False)
        assert cli.main(words) == 130
    assert "finished work is kept" in capsys.readouterr().err
    tables = {"loss", "probe_ours", "probe_paper", "probe_transformers"}
    assert {file.stem for file in out.glob("*.csv")} == tables and len(list((out / "loss").iterdir())) == 3
    asked = {path for method, path, _ in published.log if "/datasets/" in path}
    assert asked == {f"/datasets/{name}{axis}.npy" for name in TOKENS for axis in "XY"}  # no more than is needed
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.csv")}
    published.shutdown(), published.server_close()
    with monkeypatch.context() as resumed:
        for name in ("losses_of", "probe_as_transformers"):
            resumed.setattr(paper, name, stopped)
        assert cli.main(words) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    printed = capsys.readouterr().out
    assert (out / "paper.txt").read_text() in printed and "the features" not in printed
    check(pd.read_csv(out / "paper.csv").set_index("quantity"), pd.read_csv(out / "probe_transformers.csv"))
    assert (out / "explain/answers.csv").is_file() and (out / "layer_curve.json").is_file()
    drawn = json.loads((out / "layer_curve.json").read_text())["drawing"]["arguments"]
    assert "A,linear probe" in drawn["published"]["csv"]
    for name in ("extract", "convert_openai", "load_model"):
        monkeypatch.setattr(lab, name, stopped, raising=False)
    assert cli.main(words) == 0  # all is there: nothing is loaded
    assert cli.main([*words, "--limit", "9"]) == 1
    assert "has results of limit None; choose another folder with --out" in capsys.readouterr().err


def check(rows: pd.DataFrame, by_layer: pd.DataFrame) -> None:
    """The table paper.csv against what is known of the tiny model."""
    loss = rows.loc["loss, ImageNet test tokens, 50 of 50 images"]
    assert loss.ours == pytest.approx(original_losses().mean(), abs=1e-6) and loss.low == loss.high == loss.ours
    assert loss.verdict == "agrees" and loss.source == "A"
    best = rows[rows.index.str.startswith("linear probe, a tenth held out")].iloc[0]
    assert best.verdict == f"differs by {100 * best.ours - 1:+.1f} points" and best.published == 0.01
    few = rows.loc["4 labels a class, chosen layer"]
    assert few.verdict == "agrees" and few.published_std == 0.5 and not rows.index.str.startswith("25 labels").any()
    assert by_layer.n_train.tolist() == [60] * 3 and by_layer.n_test.tolist() == [30] * 3  # validation is folded back
    for layer, value in enumerate((0.5, 0.0, 1.0)):
        row = rows.loc[f"linear probe as in transformers' notebook, layer {layer}"]
        ends = binomtest(round(row.ours * 30), 30).proportion_ci(method="exact")
        assert (row.low, row.high) == pytest.approx((ends.low, ends.high)) and row.source == "B"
        agrees = ends.low - 0.00005 <= value <= ends.high + 0.00005
        assert row.verdict == ("agrees" if agrees else f"differs by {100 * (row.ours - value):+.1f} points")
    drop = rows[rows.index.str.startswith("chosen layer less last")]
    assert set(drop.verdict) == {"nothing published"} and len(drop) == 2


def test_a_bert_model_has_features_alone(published, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(openai.SHARDS, "s", 1)
    publish(monkeypatch, tmp_path, "50.00 60.00 70.00")
    words = ["paper", "--size", "s", "--bert", "--step", "131000", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(words) == 0
    rows = pd.read_csv(tmp_path / "out/paper.csv")
    assert set(rows.verdict) == {"nothing published"} and not rows.quantity.str.startswith("loss").any()
    assert not (tmp_path / "out/loss.csv").exists() and not (tmp_path / "out/explain").exists()
    assert not any("imagenet" in path for _, path, _ in published.log)


def test_a_plan_computes_and_fetches_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openai, "fetch", stopped)
    assert cli.main(["paper", "--size", "l", "--plan", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:] if " h " in line] == [
        "download", "convert", "loss", "features", "probes", "explain", "all",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


def asked_for(**changes) -> paper.Paper:
    values = {"size": "s", "step": 1_000_000, "bert": False, "images": None, "limit": None, "cache": None}
    return paper.Paper(**values | {"out": None, "device": "cpu"} | changes)


def test_the_estimate_is_arithmetic():
    table = paper_cost.estimate(asked_for(), paper_cost.Rates(1e12, 1e12)).set_index("stage")
    blocks = 12 * 24 * 512**2
    attention = 4 * 24 * 512 * (1024 + 1) / 2
    of_image = 1024 * (2 * blocks + attention)
    assert table.hours["loss"] == pytest.approx(50_000 * (of_image + 1024 * 2 * 512 * 512) / 1e12 / 3600)
    assert table.hours["features"] == pytest.approx(2 * 60_000 * of_image / 1e12 / 3600)  # with SOS and without
    assert table.gigabytes["features"] == pytest.approx(3 * 60_000 * 25 * 512 * 4 / 1e9)
    assert table.gigabytes["convert"] == pytest.approx(4 * 0.076, rel=0.01)  # 76 million weights
    assert table.gigabytes["download"] == pytest.approx(table.gigabytes["convert"] + 110_000 * 1024 * 8 / 1e9)
    assert table.hours["all"] == pytest.approx(table.hours[:-1].sum())
    few = paper_cost.estimate(asked_for(size="m", limit=600), paper_cost.Rates(1e12, 1e12)).set_index("stage")
    assert few.gigabytes["features"] == pytest.approx(1_200 * 37 * 1024 * 4 / 1e9)  # once: no curve of M was published


def test_what_was_published_is_of_the_last_step_and_of_the_images():
    assert asked_for().published("loss", "ImageNet").value.item() == 2.0895 and asked_for().has_recipe
    assert asked_for(step=131_000).published("loss", "ImageNet").empty
    assert asked_for(bert=True).published("linear probe").empty
    large = asked_for(size="l", images="uoft-cs/cifar100")
    assert large.published("linear probe").value.item() == pytest.approx(0.828) and not large.has_recipe
    assert asked_for(images="photos").published("linear probe").empty


def test_accuracies_of_fewer_images_are_not_compared():
    few = asked_for(size="l", limit=2_000)
    row = paper._row("a", (0.9, 0.8, 1.0), "fraction", few.published("linear probe"), few.not_compared)
    assert row["verdict"] == "not compared: at most 2,000 images of a split" and row["published"] == 0.963
    assert asked_for().not_compared == ""


def test_images_that_only_have_the_name_of_a_published_set_are_not_compared(tiny_images, tmp_path):
    folder = tmp_path / "cifar10"
    shutil.copytree(tiny_images, folder)
    own = asked_for(images=str(folder))
    assert own.not_compared == "not compared: 60 and 40 images are not those of the published set"
    assert not own.has_published_images and own.has_recipe
    rates = paper_cost.Rates(1e12, 1e12)
    own, published = (paper_cost.estimate(one, rates).set_index("stage") for one in (own, asked_for()))
    assert own.gigabytes["features"] == pytest.approx(100 / 180_000 * published.gigabytes["features"])  # one alignment


def test_results_of_other_images_or_another_version_are_refused(tiny_images, tmp_path, monkeypatch):
    folder = tmp_path / "shades"
    shutil.copytree(tiny_images, folder)
    asked_for(images=str(folder), out=tmp_path).begin()
    asked_for(images=str(folder), out=tmp_path).begin()
    (folder / "train/dark/000.png").write_bytes((folder / "train/dark/001.png").read_bytes())
    with pytest.raises(ValueError, match="has results of fingerprints .*choose another folder with --out"):
        asked_for(images=str(folder), out=tmp_path).begin()
    asked_for(out=tmp_path / "other").begin()
    monkeypatch.setattr(lab, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"has results of version \d"):
        asked_for(out=tmp_path / "other").begin()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "\xff"])
def test_a_damaged_note_is_named(text, tmp_path):
    (tmp_path / "paper.json").write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, OSError), match="paper.json"):
        asked_for(out=tmp_path).begin()


def test_a_damaged_stage_is_named(tmp_path):
    table = pd.DataFrame({"layer": [0, 1, 2], "test_accuracy": [0.5, 0.75, 0.625]})
    pd.testing.assert_frame_equal(paper_files.kept_table(tmp_path, "probe", lambda: table), table)
    pd.testing.assert_frame_equal(paper_files.kept_table(tmp_path, "probe", stopped), table)
    whole = (tmp_path / "probe.csv").read_text()
    for cut in ("", "layer\n", whole[:-8]):
        (tmp_path / "probe.csv").write_text(cut)
        with pytest.raises(ValueError, match="probe.csv is not as it was written; delete it to measure it again"):
            paper_files.kept_table(tmp_path, "probe", stopped)
    (tmp_path / "probe.csv").unlink()
    assert len(paper_files.kept_table(tmp_path, "probe", lambda: table[:1])) == 1
    file, losses = tmp_path / "loss/000000.npy", np.array([1.0, 2.0, 3.0])
    assert paper_files.kept_losses(file, 3, lambda: losses).tolist() == [1.0, 2.0, 3.0]
    for wrong in (b"", npy(losses[:2]), npy(losses)[:-3], npy(np.array([1.0, 2.0, np.nan])), npy(np.array([1, 2, 3]))):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="000000.npy .*delete it to measure it again"):
            paper_files.kept_losses(file, 3, stopped)
