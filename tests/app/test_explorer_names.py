"""The explorer of layers that have names: of another network's store, and of features in memory."""

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
    given = {split: lab.Features(held.layers, words[held.labels], held.index) for split, held in features.items()}
    seen, of_store = lab.explore(given, out=tmp_path, **QUIET), lab.explore(store, out=tmp_path, **QUIET)
    seen.fit()
    of_store.fit()
    assert seen.facts["called"] == NAMES and seen.classes == ["dark", "light"]
    assert [row["accuracy"] for row in seen.facts["curve"]] == [row["accuracy"] for row in of_store.facts["curve"]]
    np.testing.assert_array_equal(np.frombuffer(seen.labels, "<u2"), 1 - np.frombuffer(of_store.labels, "<u2"))
    assert seen.pictures == b"" and "explore(store, images=...) takes them" in seen.facts["no_pictures"]
    with_pictures = lab.explore(given, images=[train, test], out=tmp_path, **QUIET)
    assert with_pictures.pictures == of_store.pictures
    few = lab.explore(given, images=[train, test[:10]], out=tmp_path, **QUIET)
    assert few.facts["no_pictures"] == "the features have rows that the images have not"
    folder = seen.store.path
    assert folder.exists()
    with pytest.raises(TypeError, match="'train' is a int; expected features by split"):
        lab.explore({"train": 3})
    with pytest.raises(ValueError, match="layers of train"):
        lab.explore({"train": given["train"], "test": lab.Features({"1": np.eye(2)}, [0, 1])})
