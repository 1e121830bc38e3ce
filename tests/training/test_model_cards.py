"""Model cards: Hugging Face reads them, their numbers are those of the log, and a person's text stays."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

import igpt_lab as lab
from conftest import TINY
from igpt_lab.core.hub import BUNDLED
from igpt_lab.training.cards import MARK
from igpt_lab.training.finetuning import finetune
from igpt_lab.training.pretraining import pretrain
from igpt_lab.training.settings import FinetuneConfig, PretrainConfig

TOKENS = np.random.default_rng(0).integers(0, 8, (30, 16)).astype(np.uint16)
RECIPE = PretrainConfig(steps=2, batch_size=4, holdout=6, validate=5, log_every=1, save_every=1, snapshots=1, warmup=1)
TUNING = FinetuneConfig(steps=2, batch_size=4, log_every=1, save_every=1, pad=1)


def rows_of(card: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines}


def test_a_pretraining_writes_a_card_and_goes_on_beside_it(tmp_path):
    out = tmp_path / "mine"
    recipe = replace(RECIPE, dtype="float32", compile=False)
    for steps in (2, 3):
        pretrain(TOKENS, TINY, replace(recipe, steps=steps, cooldown=1), out, device="cpu", progress=False)
        card, last = ModelCard.load(out / "README.md"), pd.read_csv(out / "log.csv").iloc[-1]
        assert card.data.pipeline_tag == "unconditional-image-generation"
        assert rows_of(card.text)["steps"] == f"{steps} of {steps}"
        assert rows_of(card.text)["nats per token, held out"] == f"{last.validation_loss:.4f}"
        assert "24 images for training, 6 held out" in card.text
    assert lab.load_model(out).config.n_layer == 3  # a folder with a card loads


def test_a_person_s_text_stays(tmp_path):
    recipe = replace(RECIPE, dtype="float32", compile=False)
    (out := tmp_path / "mine").mkdir()
    (out / "README.md").write_text("mine")
    pretrain(TOKENS, TINY, recipe, out, device="cpu", progress=False)
    assert (out / "README.md").read_text() == "mine"


def test_a_fine_tuning_writes_a_card_of_the_weights_that_it_kept(tiny_folder, train, tmp_path):
    tuning = replace(TUNING, dtype="float32", compile=False)
    finetune(lab.load_model(tiny_folder), train, tuning, tmp_path, device="cpu", progress=False)
    card, log = ModelCard.load(tmp_path / "README.md"), pd.read_csv(tmp_path / "log.csv")
    best = log.loc[log.validation_loss.idxmin()]
    assert card.data.pipeline_tag == "image-classification" and MARK in card.text
    assert rows_of(card.text)["nats per image, held out"] == f"{best.validation_loss:.4f}"
    assert rows_of(card.text)["accuracy, held out, a fraction"] == f"{best.validation_accuracy:.4f}"


@pytest.mark.parametrize("name", ["fashion-xs", "cifar10-xs"])
def test_a_bundled_model_has_a_card(name):
    card = ModelCard.load(BUNDLED / name / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "igpt-lab"
    titles = {line[3:] for line in card.text.splitlines() if line.startswith("## ")}
    assert {"Data and licence", "Training", "Evaluation", "Limits"} <= titles
