"""Code as users of transformers write it, with only the library changed, leaves here what it leaves there.

`user_code` has the pieces, and which of them differ on purpose. The counts stand in docs/differences.md.
"""

import copy
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers_peer import Case, same, transformers, twin
from user_code import DIFFERS, PIECES

import igpt_lab as lab

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
SHAPE = {"vocab_size": 17, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "num_labels": 3}
NEEDS = {"Trainer, with accelerate": "accelerate", "peft": "peft"}
PAGE = Path(__file__).parents[2] / "docs/differences.md"
ALL = [(topic, name) for topic, pieces in PIECES.items() for name in pieces]


def variables(theirs: bool, folder: Path) -> dict:
    """What a piece finds."""
    case = Case(lab.ImageGPTConfig(**SHAPE | NO_DROPOUT), n=2, t=16, seed=0)  # pieces change it
    classes = {"model": lab.ImageGPTForCausalImageModeling, "backbone": lab.ImageGPTModel}
    classes["classifier"] = lab.ImageGPTForImageClassification
    models = {name: case.model(cls) for name, cls in classes.items()}
    models = {name: twin(model) if theirs else model for name, model in models.items()}
    library = transformers() if theirs else lab
    palette = np.random.default_rng(0).uniform(-1, 1, (16, 3))
    processor = library.ImageGPTImageProcessorPil(clusters=palette, size={"height": 4, "width": 4})
    for name in ("saved", "folder"):
        (folder / name).mkdir(parents=True)
    models["model"].save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    noise = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    known = {"lib": library, "config": library.ImageGPTConfig(**SHAPE), "tokens": case.tokens(), "torch": torch,
             "np": np, "nn": nn, "image": Image.fromarray(noise), "processor": processor,
             "folder": folder / "folder", "saved": folder / "saved"}  # fmt: skip
    return known | models


def outcome(source: str, theirs: bool, folder: Path):
    """What a piece leaves as `result`, or the exception that it ends in."""
    known = variables(theirs, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            exec(compile(source, "piece", "exec"), known)
        except Exception as error:
            return error
    return known["result"]


def alike(ours, theirs) -> None:
    """AssertionError unless both are the same: numbers to 1e-5, names, and kinds of containers."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if theirs.is_floating_point():
            same(ours.detach(), theirs.detach())
        else:
            assert torch.equal(ours, theirs)
    elif isinstance(theirs, np.ndarray):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        alike(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, list | tuple) and not isinstance(theirs, torch.Size):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            alike(one, other)
    else:
        assert ours == pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else ours == theirs


def _are_alike(ours, theirs) -> bool:
    try:
        alike(ours, theirs)
    except AssertionError:
        return False
    return True


@pytest.fixture
def auto_classes():
    """The Auto classes as they were, after a piece has registered ours."""
    transformers()
    from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto

    maps = [configuration_auto.CONFIG_MAPPING, image_processing_auto.IMAGE_PROCESSOR_MAPPING]
    maps += [modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING]
    before = [copy.copy(it._extra_content) for it in maps]
    yield
    for it, extra in zip(maps, before, strict=True):
        it._extra_content = extra


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("topic", "name"), ALL, ids=[f"{topic}: {name}" for topic, name in ALL])
def test_a_piece_leaves_what_it_leaves_with_transformers(topic, name, tmp_path, auto_classes):
    if topic in NEEDS and importlib.util.find_spec(NEEDS[topic]) is None:
        pytest.skip(f"{NEEDS[topic]}, which this code uses, is not installed")
    source = PIECES[topic][name]
    theirs = outcome(source, True, tmp_path / "theirs")
    if topic == "pipelines and Auto classes":
        lab.register_auto_classes()
    ours = outcome(source, False, tmp_path / "ours")
    assert not isinstance(theirs, Exception), f"with transformers it ends in {theirs!r}"
    if f"{topic}: {name}" in DIFFERS:
        assert isinstance(ours, Exception) or not _are_alike(ours, theirs)
        return
    if isinstance(ours, Exception):
        raise ours
    alike(ours, theirs)


def test_every_piece_is_counted_on_the_page_and_every_difference_has_its_reason():
    assert set(DIFFERS) <= {f"{topic}: {name}" for topic, name in ALL}
    rows = {topic: (int(taken), int(passed), int(failed)) for topic, taken, passed, failed in re.findall(
        r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)}  # fmt: skip
    failed = {topic: sum(one.startswith(f"{topic}: ") for one in DIFFERS) for topic in PIECES}
    counts = {topic: (len(pieces), len(pieces) - failed[topic], failed[topic]) for topic, pieces in PIECES.items()}
    counts["all"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    assert rows == counts
    page = PAGE.read_text(encoding="utf-8")
    for name, reason in DIFFERS.items():
        assert f"| {name} | {reason} |" in page
