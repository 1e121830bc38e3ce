"""The explorer of layers that have names: of another network's store, and of features in memory."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from ipywidgets import Widget
from torch import nn

import igpt_lab as lab
from igpt_lab.app.explorer.rows import HELD

QUIET = {"progress": False}
NAMES = ["1", "2", "4"]


@pytest.fixture(autouse=True)
def closed():
    yield
    Widget.close_all()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 4))


@pytest.fixture
def store(network, train, test, tmp_path):
    return lab.extract(network, [train, test], modules=NAMES, store=tmp_path / "stores", **QUIET)


def test_a_store_of_another_network_shows_its_names(store, train, test, tmp_path):
    seen = lab.explore(store, out=tmp_path, **QUIET)
    seen.fit()
    plain = lab.probe_layers(*(lab.Features.from_store(store, split) for split in ("train", "test")), **QUIET)
    assert seen.facts["called"] == NAMES and seen.facts["layers"] == [0, 1, 2]
    assert NAMES[seen.facts["chosen"]] == plain.chosen
    predicted = np.frombuffer(seen.predicted, "<u2").reshape(3, -1)
    np.testing.assert_array_equal(predicted, np.stack(list(plain.predicted.values())))
    assert seen.facts["shape"] == [32, 32, 1]  # the pictures, as no processor is known
    seen.split = HELD
    seen.count = 4
    seen.layer = 1
    files = seen.save()
    accuracy = next(file for file in files if file.name == "accuracy.csv")
    assert [str(layer) for layer in pd.read_csv(accuracy).layer] == NAMES
    assert "layers 1..4" in seen.describe() and "<td>4" in seen._repr_mimebundle_()[0]["text/html"]


def test_what_needs_an_imagegpt_says_why_not(store, network, tiny):
    seen = lab.explore(store, **QUIET)
    told = []
    seen.send = lambda message, buffers=None: told.append(message)
    seen._handle_custom_msg({"do": "look", "image": 0, "layer": 0, "pixel": None}, [])
    assert "is read by the head of an ImageGPT, and this store is of another network" in told[0]["look"]["problem"]
    with pytest.raises(ValueError, match="model= is of a store of ImageGPT"):
        lab.explore(store, model=tiny, **QUIET)


def test_features_in_memory_are_explored_as_those_of_a_store(store, train, test, tmp_path):
    features = store.features()
    words = np.array(["light", "dark"])
    with_words = {split: lab.Features(held.layers, words[held.labels], held.index) for split, held in features.items()}
    seen, of_store = lab.explore(with_words, out=tmp_path, **QUIET), lab.explore(store, out=tmp_path, **QUIET)
    seen.fit()
    of_store.fit()
    assert seen.facts["called"] == NAMES and seen.classes == ["dark", "light"]
    assert [row["accuracy"] for row in seen.facts["curve"]] == [row["accuracy"] for row in of_store.facts["curve"]]
    np.testing.assert_array_equal(np.frombuffer(seen.labels, "<u2"), 1 - np.frombuffer(of_store.labels, "<u2"))
    assert seen.pictures == b"" and "explore(store, images=...) takes them" in seen.facts["no_pictures"]
    with_pictures = lab.explore(with_words, images=[train, test], out=tmp_path, **QUIET)
    assert with_pictures.pictures == of_store.pictures
    few = lab.explore(with_words, images=[train, test[:10]], out=tmp_path, **QUIET)
    assert few.facts["no_pictures"] == "the features have rows that the images have not"
    folder = seen.store.path
    assert folder.exists()
    with pytest.raises(TypeError, match="'train' is a int; expected features by split"):
        lab.explore({"train": 3})
    with pytest.raises(ValueError, match="layers of train"):
        lab.explore({"train": with_words["train"], "test": lab.Features({"1": np.eye(2)}, [0, 1])})


def in_memory(n: int = 9, depth: int = 3) -> lab.Features:
    draws, labels = np.random.default_rng(n), np.arange(n) % 2
    return lab.Features({layer: draws.normal(size=(n, 4)) + labels[:, None] for layer in range(depth)}, labels)


def test_a_layer_that_is_constant_is_a_page_too(tmp_path):
    test = in_memory()
    constant = replace(test, layers=test.layers | {0: np.ones((9, 4), np.float32)})
    seen = lab.explore({"train": in_memory(40), "test": constant}, out=tmp_path, **QUIET)
    text = seen.export().read_text(encoding="utf-8")
    sent = json.loads(re.search(r'id="sent">(.*?)</script>', text, re.DOTALL)[1], parse_constant=pytest.fail)
    assert sent["values"]["facts"]["explained"][0] == [0, 0]
    seen.facts = seen.facts | {"explained": [float("nan")]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        seen.export()


def test_of_few_images_all_others_are_neighbours(tmp_path):
    seen = lab.explore({"train": in_memory(40), "test": in_memory(9)}, out=tmp_path, **QUIET)
    near = np.frombuffer(seen.near, "<i4").reshape(3, 9, 8)
    for layer, x in seen.shown.layers.items():
        x = (x - x.mean(0)) / x.std(0)
        for image in range(9):
            ranked = np.linalg.norm(x - x[image], axis=1).argsort()
            assert ranked[0] == image and near[layer, image].tolist() == ranked[1:].tolist()
    alone = lab.explore({"train": in_memory(40), "test": in_memory(9)}, limit=1, out=tmp_path, **QUIET)
    alone.fit()
    assert alone.near == b"" and len(alone.facts["curve"]) == 3 and alone.facts["explained"] == [[0, 0]] * 3
    assert alone.facts["of"] == "1 of 9 test images"


def test_what_is_not_there_cannot_be_looked_at(tmp_path):
    seen = lab.explore({"train": in_memory(40), "test": in_memory(9)}, out=tmp_path, **QUIET)
    before = seen.layer, seen.other, seen.image, seen.alone
    wrong = {
        "layer": (77, -1),
        "other": (3,),
        "image": (9, -1, 10**6),
        "alone": ({"label": 2}, {"x": 1}, {"predicted": 1}),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} .*; expected"):
                setattr(seen, name, value)
    assert (seen.layer, seen.other, seen.image, seen.alone) == before
    seen.alone = {"label": 1, "predicted": 0}
    for limit in (0, -1):
        with pytest.raises(ValueError, match="expected at least 1 image, or None for all"):
            lab.explore({"train": in_memory(40)}, limit=limit)


def test_features_that_cannot_be_written_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for features, words in (({}, "there are no features"), ({"../x": in_memory()}, "a name without slashes")):
        with pytest.raises(ValueError, match=words):
            lab.explore(features)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_explorer_is_shown_as_a_line(tmp_path, capsys):
    seen = lab.explore({"train": in_memory(40), "test": in_memory()}, out=tmp_path, **QUIET)
    seen.close()
    assert seen._repr_mimebundle_() == ({"text/plain": "<Explorer features on memory: closed>"}, {})
    seen._ipython_display_()
    assert repr(seen) in capsys.readouterr().out


END = """
import numpy as np, igpt_lab as lab
labels = np.arange(12) % 2
split = lab.Features({0: np.random.default_rng(0).normal(size=(12, 3))}, labels)
explorer = lab.explore({"train": split, "test": split}, progress=False)
explorer.itself = explorer
"""


def test_the_end_of_a_program_is_quiet():
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Exception ignored" not in done.stderr
