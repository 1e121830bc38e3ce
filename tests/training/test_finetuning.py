"""Both losses by plain formulas, heads on any layer against the hooks, augmentation against the encoder, kills."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

import igpt_lab as lab
from conftest import TINY
from igpt_lab.app import cli
from igpt_lab.models.checkpoints import read
from igpt_lab.models.loading import load_classifier
from igpt_lab.models.losses import align
from igpt_lab.training import finetuning
from igpt_lab.training.augmentation import moved
from igpt_lab.training.classifier import Classified, classify
from igpt_lab.training.finetuning import finetune
from igpt_lab.training.heads import copied, trained_weights, with_head
from igpt_lab.training.settings import FinetuneConfig
from igpt_lab.training.trainer import Trainer

TUNING = FinetuneConfig(
    steps=6, batch_size=4, learning_rate=0.01, log_every=2, save_every=2, pad=1, dtype="float32", compile=False
)
PLAIN = {"flip": False, "pad": 0}


def run(model, images, out, **changes):
    return finetune(model, images, replace(TUNING, **changes), out, device="cpu", progress=False)


def parts(model, tuning, names=("dark", "light")):
    """The whole network, its classifier and the trained parameters, as a run has them."""
    whole = copied(model)
    classifier = with_head(whole, names, tuning.layer)
    return whole, classifier, trained_weights(whole, classifier, tuning)


def test_the_losses_are_the_paper_s_by_plain_formulas(tiny):
    pixels, labels = torch.randint(8, (5, 16)), torch.tensor([0, 1, 1, 0, 1])
    for layer in (3, 1):
        tuning = replace(TUNING, layer=layer, generative=0.3, classifying=2.0)
        whole, classifier, _ = parts(tiny, tuning)
        classifier.score.weight.data.normal_(0, 0.3)
        weights = torch.tensor([0.5, 1.5])
        loss = finetuning._loss(whole, classifier, tuning, weights)(pixels, labels)
        ids = torch.cat([torch.full((5, 1), 8), pixels[:, :-1]], 1)
        with lab.record(tiny, points=["ln_1"], pool="mean") as pooled:
            logits = tiny(ids).logits
        drawn = -logits.log_softmax(-1).gather(2, pixels[..., None]).mean()
        classes = (pooled["ln_1"][:, layer] @ classifier.score.weight.T).log_softmax(-1)
        clf = -(weights[labels] * classes[torch.arange(5), labels]).mean()
        torch.testing.assert_close(loss, 0.3 * drawn + 2 * clf, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_folder_gives_equal_logits_here_in_transformers_and_in_its_pipeline(tiny_folder, train, tmp_path, layer):
    out = run(tiny_folder, train, tmp_path, layer=layer)
    ours = load_classifier(out, device="cpu")
    theirs = transformers.ImageGPTForImageClassification.from_pretrained(out).eval()
    ids = align(torch.randint(8, (5, 16)), "sos", ours.config)
    with torch.inference_mode():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
    pipe = transformers.pipeline("image-classification", model=theirs, image_processor=ours.processor, device="cpu")
    torch.testing.assert_close(pipe.forward({"input_ids": ids}).logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.01 and theirs.config.id2label == {0: "dark", 1: "light"}
    causal = lab.load_model(out / "causal")  # the same features, in the whole network
    with lab.record(causal, points=["ln_1"], pool="mean") as pooled:
        causal(ids)
    torch.testing.assert_close(pooled["ln_1"][:, layer] @ ours.score.weight.detach().T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer, generative", [(3, 1.0), (3, 0.0), (2, 1.0), (2, 0.0)])
def test_a_gradient_reaches_every_parameter_and_what_is_out_of_reach_is_left_alone(tiny, layer, generative):
    tuning = replace(TUNING, layer=layer, generative=generative)
    whole, classifier, weights = parts(tiny, tuning)
    classifier.score.weight.data.normal_()
    loss = finetuning._loss(whole, classifier, tuning, torch.ones(2))
    trainer = Trainer(whole, tuning, Path("absent"), loss, weights=weights)
    before = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    trainer.update(np.random.default_rng(0).integers(0, 8, (4, 16)), np.array([0, 1, 1, 0]))
    for name, weight in trainer.weights.items():
        assert weight.grad is not None and weight.grad.any(), name
    assert any("ln_1" in name for name in weights) and any("ln_2" in name for name in weights)
    everything = {*before, "score.weight"}
    if generative:
        assert set(weights) == everything
    else:
        missing = everything - set(weights)
        above = {n for n in before if layer == 2 and ((".h.2." in n and "ln_1" not in n) or "ln_f" in n)}
        assert missing == above | {"lm_head.weight"}
        assert all(torch.equal(before[n], weight) for n, weight in whole.named_parameters() if n in missing)


@pytest.mark.parametrize("layer, generative", [(3, 1.0), (2, 0.0)])
def test_the_losses_run_on_the_meta_device(tiny, layer, generative):
    tuning = replace(TUNING, layer=layer, generative=generative)
    whole = copied(tiny).to("meta")
    classifier = with_head(whole, ("dark", "light"), layer)
    loss = finetuning._loss(whole, classifier, tuning, torch.ones(2, device="meta"))
    total = loss(torch.zeros(4, 16, dtype=torch.long, device="meta"), torch.zeros(4, dtype=torch.long, device="meta"))
    assert total.is_meta and total.shape == ()


def changed(tiny_folder, out):
    """Which tensors of the whole network differ from those it began with."""
    before, after = read(tiny_folder)[1], read(out / "causal")[1]
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_what_is_frozen_does_not_move(tiny_folder, train, tmp_path):
    # without a holdout the last weights are kept
    assert not changed(tiny_folder, run(tiny_folder, train, tmp_path / "a", head_only=True, holdout=0.0))
    moved_names = changed(tiny_folder, run(tiny_folder, train, tmp_path / "b", freeze_below=2, holdout=0.0))
    assert {n.split(".")[2] for n in moved_names if ".h." in n} == {"2"} and "lm_head.weight" in moved_names
    assert not any("wte" in n or "wpe" in n for n in moved_names) and "transformer.ln_f.weight" in moved_names


def test_head_alone_learns_what_a_plain_loop_learns(tiny, train, tmp_path):
    out = run(tiny, train, tmp_path, head_only=True, holdout=0.0, steps=3, batch_size=60, head_rate=2.0, **PLAIN)
    ids = align(torch.as_tensor(lab.tokenize(train, tiny.processor).astype(np.int64)), "sos", TINY)
    with lab.record(tiny, points=["ln_1"], pool="mean") as pooled:
        tiny(ids)
    x, y = pooled["ln_1"][:, 3].clone(), torch.as_tensor(train.labels.copy())
    w = torch.zeros(2, 8, requires_grad=True)
    optimiser = torch.optim.Adam([w], lr=0.02, betas=(0.9, 0.95))
    with torch.enable_grad():
        for _ in range(3):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(x @ w.T, y).backward()
            optimiser.step()
    torch.testing.assert_close(load_classifier(out, device="cpu").score.weight, w, atol=1e-5, rtol=1e-4)


def test_moving_tokens_is_moving_the_image(tiny):
    random = np.random.default_rng(0)
    images, corners = random.integers(0, 256, (6, 4, 4, 3), np.uint8), random.integers(0, 5, (6, 2))
    flipped, encode = random.random(6) < 0.5, tiny.processor.encode
    tokens = encode(list(images)).reshape(6, 4, 4)
    np.testing.assert_array_equal(
        moved(tokens, flipped, corners, 2), encode(list(moved(images, flipped, corners, 2))).reshape(6, 4, 4)
    )
    row = np.array([[[1, 2, 3]]] * 1).repeat(3, 1)  # by hand: reflected 1 around, 2 | 1 2 3 | 2
    no, yes = np.array([False]), np.array([True])
    assert moved(row, no, np.array([[1, 1]]), 1)[0, 0].tolist() == [1, 2, 3]
    assert moved(row, no, np.array([[1, 0]]), 1)[0, 0].tolist() == [2, 1, 2]
    assert moved(row, yes, np.array([[1, 2]]), 1)[0, 0].tolist() == [2, 1, 2]
    assert moved(row, yes, np.array([[1, 1]]), 1)[0, 0].tolist() == [3, 2, 1]


def test_images_of_the_model_s_size_give_the_same_run_in_both_spaces(tiny_folder, train, tmp_path):
    a, b = (run(tiny_folder, train, tmp_path / space, augment=space) for space in ("tokens", "images"))
    assert json.loads((a / "finetuning.json").read_text())["tuning"]["augment"] == "tokens"
    for name, tensor in read(a)[1].items():
        assert torch.equal(tensor, read(b)[1][name]), name


def test_class_weights_by_hand():
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(finetuning._class_weights(labels, 2, "balanced"), [4 / 6, 2])
    np.testing.assert_allclose(finetuning._class_weights(labels, 2, (1.0, 3.0)), [4 / 6, 2])
    np.testing.assert_allclose(finetuning._class_weights(labels, 2, None), [1, 1])
    with pytest.raises(ValueError, match="class_weights=.*2 classes"):
        finetuning._class_weights(labels, 2, (1.0,))


def test_the_learning_rate_stays_or_falls_in_a_straight_line(tiny_folder, train, tmp_path):
    assert [FinetuneConfig(steps=4, learning_rate=1.0).rate(step) for step in range(4)] == [1] * 4
    falling = FinetuneConfig(steps=6, learning_rate=1.0, cooldown=4)
    assert [falling.rate(step) for step in range(6)] == [1, 1, 1, 0.75, 0.5, 0.25]
    run(tiny_folder, train, tmp_path / "a", steps=4)
    longer = run(tiny_folder, train, tmp_path / "a", steps=8, cooldown=2)
    same_run(longer, run(tiny_folder, train, tmp_path / "b", steps=8, cooldown=2))
    with pytest.raises(ValueError, match="whose tuning differs"):
        run(tiny_folder, train, tmp_path / "a", steps=20)


def test_it_stops_early_with_the_best_weights(tiny_folder, train, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.2, 0.3, 0.9, 0.4])
    held = []

    def told(model, tokens, batch_size, progress):
        score = next(scores)
        held.append(model.score.weight.detach().clone())
        right = torch.arange(len(tokens)) < round(score * len(tokens))
        return torch.where(right[:, None] == torch.eye(2)[truth].bool(), 1.0, 0.0)

    labels = train.labels
    truth = torch.as_tensor(labels[finetuning.stratified_split(labels, 0.5, seed=0)[1]])
    monkeypatch.setattr(finetuning, "logits_of", told)
    out = run(tiny_folder, train, tmp_path, steps=40, patience=3, holdout=0.5)
    log = pd.read_csv(out / "log.csv")
    assert log.step.tolist() == [0, 2, 4, 6, 8, 10]  # 0.9 again is no better
    assert torch.equal(load_classifier(out, device="cpu").score.weight, held[2])
    run(tiny_folder, train, tmp_path, steps=40, patience=3, holdout=0.5)  # over: nothing is scored or trained again
    assert len(held) == 6


def test_k_labels_a_class_are_all_that_is_used(tiny_folder, train, tmp_path):
    few = train.select(lab.few_per_class(train.labels, 5, seed=0, draw=1))
    a = run(tiny_folder, train, tmp_path / "a", per_class=5, draw=1)
    b = run(tiny_folder, few, tmp_path / "b")
    for name, tensor in read(a)[1].items():
        assert torch.equal(tensor, read(b)[1][name]), name


HARD = {"accumulate": 2, "dtype": "bfloat16", "steps": 12, "layer": 2, "head_rate": 5.0}


@pytest.mark.parametrize("changes", [{}, HARD], ids=["plain", "hard"])
def test_a_stopped_run_resumes_to_the_same_numbers(tiny_folder, train, tmp_path, monkeypatch, changes):
    whole, stopped, update = (
        run(tiny_folder, train, tmp_path / "whole", **changes),
        tmp_path / "stopped",
        Trainer.update,
    )

    def dies(self, *batch):
        if self.step == 5:
            raise MemoryError
        update(self, *batch)

    monkeypatch.setattr(Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run(tiny_folder, train, stopped, **changes)
    monkeypatch.undo()
    same_run(whole, run(tiny_folder, train, stopped, **changes))


def same_run(a, b):
    for folder in (".", "causal"):
        for name, tensor in read(a / folder)[1].items():
            assert torch.equal(tensor, read(b / folder)[1][name]), name
    logs = [pd.read_csv(out / "log.csv").drop(columns="tokens_per_second") for out in (a, b)]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_numbers(tiny_folder, tiny_images, train, tmp_path):
    changes = {**HARD, "steps": 40, "save_every": 4, "patience": 40}
    whole, killed = run(str(tiny_folder), train, tmp_path / "whole", **changes), tmp_path / "killed"
    code = (
        "from test_finetuning import *; images = lab.load_images("
        f"{str(tiny_images)!r}, 'train'); run({str(tiny_folder)!r}, images, {str(killed)!r}, **{changes!r})"
    )
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    state, deadline = killed / "state.safetensors", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not state.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert (killed / "state.safetensors").exists()
    same_run(whole, run(tiny_folder, train, killed, **changes))


def test_another_run_in_the_folder_and_bad_input_are_refused(tiny_folder, train, tmp_path):
    run(tiny_folder, train, tmp_path / "a")
    with pytest.raises(ValueError, match="whose tuning differs"):
        run(tiny_folder, train, tmp_path / "a", learning_rate=0.02)
    with pytest.raises(ValueError, match="whose images differs"):
        run(tiny_folder, train.select(range(59)), tmp_path / "a")
    with pytest.raises(ValueError, match="layer from 1 to 3"):
        run(tiny_folder, train, tmp_path / "b", layer=4)
    with pytest.raises(ValueError, match="pad=4 of images of 4 x 4"):
        run(tiny_folder, train, tmp_path / "b", pad=4)
    with pytest.raises(ValueError, match="no multiple of accumulate=3"):
        FinetuneConfig(accumulate=3)
    for misspelt in ({"optimizer": "moun"}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=f"{next(iter(misspelt.values()))!r}.*expected 'adam' or 'muon'"):
            FinetuneConfig(**misspelt)
    assert not (tmp_path / "b").exists()


def test_the_learning_rate_is_a_tenth_of_pretraining_s(tiny, train):
    assert finetuning._checked(FinetuneConfig(pad=1), tiny, train).learning_rate == pytest.approx(
        3e-4
    )  # no training.json
    tiny.source["name"] = "fashion-xs"  # at 4e-3
    assert finetuning._checked(FinetuneConfig(pad=1), tiny, train).learning_rate == pytest.approx(4e-4)


def test_confusion_and_mistakes_by_hand():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], np.float32)
    classified = Classified(chances, ("a", "b"), np.array([0, 0, 1, 1]), np.arange(10, 14))
    assert classified.correct.tolist() == [True, False, False, True] and classified.mistakes().tolist() == [1, 2]
    assert classified.confusion().values.tolist() == [[1, 1], [1, 1]] and classified.accuracy()["test_accuracy"] == 0.5
    assert (
        classified.table().predicted.tolist() == ["a", "b", "a", "b"] and classified.table()["index"].tolist()[0] == 10
    )


def test_a_model_without_a_trained_class_head_classifies_nothing(tiny, tiny_folder, train, tmp_path, capsys):
    bare = lab.ImageGPTForImageClassification(TINY)
    with pytest.warns(UserWarning, match="this head starts at zero"):
        loaded = load_classifier(tiny_folder)
    with pytest.raises(TypeError, match="expected a classifier as lab.load_classifier"):
        classify(tiny, train, progress=False)
    for model in (bare, loaded):
        with pytest.raises(ValueError, match="has no class head that was trained; expected what finetune wrote"):
            classify(model, train, progress=False)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert cli.main(["classify", str(tiny_folder), str(tmp_path / "x.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"igpt-lab: {tiny_folder.name} has no class head that was trained")


def test_images_reach_a_classifier_by_one_door(tiny, train, tmp_path, capsys):
    """Grey of 16 bits, transparent and tokens: the command has the library's answers, and refuses what it refuses."""
    torch.manual_seed(0)
    model = lab.ImageGPTForImageClassification(TINY)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    model = load_classifier(tmp_path / "model", device="cpu")
    grey = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    files = [str(tmp_path / name) for name in ("grey.png", "clear.png")]
    for image, file in zip((grey, clear), files, strict=True):
        image.save(file)
    expected = classify(model, [grey, clear], progress=False).probabilities
    assert cli.main(["classify", str(tmp_path / "model"), *files, "--top", "1", "--device", "cpu"]) == 0
    for line, chances in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        assert line.endswith(f"LABEL_{chances.argmax()} {chances.max():.1%}")
    white = classify(model, [Image.new("RGB", (8, 8), "white")], progress=False).probabilities
    np.testing.assert_allclose(expected[1:], white, rtol=1e-5)  # a batch of another size rounds in other places
    grey.save(tmp_path / "moves.gif", save_all=True, append_images=[clear.convert("L")])
    assert cli.main(["classify", str(tmp_path / "model"), str(tmp_path / "moves.gif")]) == 1
    assert "moves.gif: an image of 2 frames; choose one" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"an array \(60, 16\); expected images"):
        classify(model, lab.tokenize(train, tiny.processor, progress=False), progress=False)


def test_the_command_classify_passes_over_what_it_cannot_read(tiny_folder, tmp_path, capsys):
    """A pipe, which nobody writes into, a damaged file and none: each a line on stderr; the pictures are classified."""
    torch.manual_seed(0)
    model = lab.ImageGPTForImageClassification(TINY)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(tiny_folder / "preprocessor_config.json", tmp_path / "model")
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    for picture, name in zip(pictures, ("black.png", "white.png"), strict=True):
        picture.save(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "black.png").read_bytes()[:40])
    files = [str(tmp_path / f"{name}.png") for name in ("pipe", "black", "cut", "white", "none")]
    command = ["classify", str(tmp_path / "model"), "--top", "1", "--device", "cpu"]
    assert cli.main([*command, *files]) == 1
    shown = capsys.readouterr()
    expected = classify(load_classifier(tmp_path / "model", device="cpu"), pictures, progress=False).probabilities
    for line, file, chances in zip(shown.out.splitlines(), files[1::2], expected, strict=True):
        assert line == f"{file}  LABEL_{chances.argmax()} {chances.max():.1%}"
    pipe, cut, none = [line for line in shown.err.splitlines() if line.startswith("igpt-lab: ")]
    assert pipe == f"igpt-lab: {files[0]} cannot be read: it is no regular file"
    assert cut.startswith(f"igpt-lab: {files[2]} is not a readable image") and files[4] in none
    assert cli.main([*command, files[0]]) == 1
    assert capsys.readouterr().out == ""
    assert cli.main(["complete", str(tiny_folder), files[0], "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == pipe


def test_the_commands(tiny_folder, tiny_images, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--pad", "1", "--batch-size", "16", "--learning-rate", "0.03", "--log-every", "10"]
    arguments = [str(tiny_folder), str(tiny_images), "--out", str(out), "--steps", "40", *options]
    assert cli.main(["finetune", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "40 test images" in printed
    counts = pd.read_csv(out / "confusion.csv", index_col=0)
    assert counts.values.sum() == 40
    right = np.trace(counts.values) / 40
    assert f"{right:.1%}" in printed and right > 0.8  # dark against light
    for name in ("dark", "light"):
        Image.new("L", (9, 9), 20 if name == "dark" else 230).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("dark", "light")]
    assert cli.main(["classify", str(out), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(files[0]) and lines[0].split()[1] == "dark"
    assert lines[1].startswith(files[1]) and lines[1].split()[1] == "light"
    assert cli.main(["classify", str(out), str(tmp_path / "none.png")]) == 1
    assert classify(out, lab.load_images(tiny_images, "test"), progress=False).correct.mean() == right


def test_the_command_refuses_to_test_on_its_training_images(tiny_folder, tiny_images, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["finetune", str(tiny_folder), str(tiny_images / "train"), "--out", str(out), "--steps", "1"]) == 1
    assert (
        "gives the same images for train and test; expected images in folders train and test" in capsys.readouterr().err
    )
    assert not out.exists()


def test_the_command_says_which_class_has_no_training_images(tiny_folder, tiny_images, tmp_path, capsys):
    root = shutil.copytree(tiny_images, tmp_path / "images")
    shutil.copytree(root / "test/light", root / "test/pale")
    options = ["--steps", "2", "--pad", "1", "--batch-size", "16"]
    assert cli.main(["finetune", str(tiny_folder), str(root), "--out", str(tmp_path / "out"), *options]) == 0
    told = "classes without rows in train: pale; the 20 of 60 test images of these count as wrong"
    assert told in capsys.readouterr().err


def test_images_without_labels_have_no_confusion_and_a_class_that_is_never_met_has_its_row():
    chances = np.eye(3, dtype=np.float32)[[0, 2]]
    unlabelled = Classified(chances, ("a", "b", "c"), None, np.arange(2))
    with pytest.raises(ValueError, match="no labels"):
        unlabelled.confusion()
    counts = replace(unlabelled, labels=np.array([0, 0])).confusion()
    assert counts.values.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]] and list(counts.index) == ["a", "b", "c"]
