"""What takes images takes all that `load_images` takes: equal features, tokens, samples, classes and explorer."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import igpt_lab as lab
from igpt_lab.app.explorer.opening import explore


def hub_of(images) -> datasets.Dataset:
    """The images with their labels as a Dataset."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(images.label_names))}
    cells = [{"bytes": images._encoded(n)[0], "path": f"{n}.png"} for n in range(len(images))]
    columns = {"image": cells, "label": images.labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def shades(tiny_images) -> dict[str, lab.ImageSet]:
    return {split: lab.load_images(tiny_images, split) for split in ("train", "test")}


def test_extract_takes_what_load_images_takes(tiny_images, tiny_folder, tmp_path):
    """A name gives its splits train and test, a dict all, a list of Datasets one each: equal features of each."""
    options = {"store": tmp_path, "progress": False}
    sets = shades(tiny_images)
    expected = lab.extract(tiny_folder, list(sets.values()), **options)
    whole = {split: images.images() for split, images in sets.items()}
    pairs = {
        split: [(np.asarray(image), sets[split].label_names[label]) for image, label in zip(*both, strict=True)]
        for split, both in {split: (whole[split], sets[split].labels) for split in sets}.items()
    }
    named = datasets.DatasetDict({split: hub_of(images) for split, images in sets.items()})
    parts = [datasets.Dataset(data.data, split=datasets.NamedSplit(split)) for split, data in named.items()]
    for images in (tiny_images, str(tiny_images), sets, pairs, named, parts, whole):
        store = lab.extract(tiny_folder, images, **options)
        for split in sets:
            np.testing.assert_array_equal(store.layer("ln_1", 2, split), expected.layer("ln_1", 2, split))
    assert lab.extract(tiny_folder, whole["train"], **options).splits == ["test"]  # a list of pictures is one split
    with pytest.raises(ValueError, match="images is empty"):
        lab.extract(tiny_folder, [], **options)
    train = lab.load_images(pairs["train"], "train")
    odd = lab.load_images([(train[0], "ant"), (train[1], "dark")], "test")
    with pytest.raises(ValueError, match="number their classes in different ways.*or give both the same label_names="):
        lab.extract(tiny_folder, [train, odd], **options)


KNOWN = {
    "name": lambda images: images.source["name"],
    "dataset": hub_of,
    "list of paths": lambda images: [Path(images.source["name"]) / file for file in images.files],
    "list of pictures": lambda images: images.images(),
    "array": lambda images: np.stack([np.asarray(image) for image in images]),
    "array of greys": lambda images: np.stack([np.asarray(image)[..., 0] for image in images]),
    "array of floats": lambda images: np.stack([np.asarray(image) / 255 for image in images]),
    "tensor": lambda images: tensor(np.stack([np.asarray(image) for image in images])),
    "tensor of floats": lambda images: tensor(np.stack([np.asarray(image) for image in images])) / 255,
}


class Holder:
    """As a set of torchvision."""

    classes = ("dark", "light")

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.images.labels[index])


KNOWN["set of torchvision"] = Holder


@pytest.mark.parametrize("kind", KNOWN)
def test_tokenize_complete_and_classify_take_what_load_images_takes(kind, tiny, tiny_images):
    images = shades(tiny_images)["test"]
    held = KNOWN[kind](images)
    tokens = tiny.processor.encode(images.images())
    made = lab.tokenize(lab.load_images(held, "test"), tiny.processor, progress=False)
    np.testing.assert_array_equal(made, tokens)
    np.testing.assert_array_equal(lab.tokenize(held, tiny.processor, progress=False), tokens)
    drawn = lab.complete(tiny, held, keep=0.75, completions=1, progress=False)
    np.testing.assert_array_equal(drawn.tokens[:, 0, :12], tokens[:, :12])
    torch.manual_seed(0)
    classifier = lab.ImageGPTForImageClassification(replace(tiny.config, id2label={0: "dark", 1: "light"}))
    torch.nn.init.normal_(classifier.score.weight)
    classifier.name, classifier.processor = "tiny", tiny.processor
    expected = lab.classify(classifier, images, progress=False)
    classified = lab.classify(classifier, held, progress=False)
    np.testing.assert_array_equal(classified.probabilities, expected.probabilities)
    assert ("file" in classified.table()) == (kind in ("name", "list of paths", "dataset"))
    assert (classified.labels is None) == (kind not in ("name", "dataset", "set of torchvision"))


def test_one_picture_stays_one_picture(tiny):
    one = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    for image in (one, Image.fromarray(one), torch.from_numpy(one), iter([one])):
        assert lab.complete(tiny, image, completions=1, progress=False).tokens.shape == (1, 1, 16)


@pytest.fixture
def stores(tiny_images, tiny_folder, tmp_path):
    """One of a folder, and one of the same pictures in memory."""
    sets = shades(tiny_images)
    held = {split: hub_of(images) for split, images in sets.items()}
    extracted = [lab.extract(tiny_folder, images, store=tmp_path, progress=False) for images in (tiny_images, held)]
    return *extracted, held


def test_the_explorer_takes_what_load_images_takes(stores, tmp_path):
    of_folder, of_memory, held = stores
    there = explore(of_folder, out=tmp_path, progress=False)
    blind = explore(of_memory, out=tmp_path, progress=False)
    assert blind.pictures == b"" and "were in memory; explore(store, images=...)" in blind.facts["no_pictures"]
    seen = explore(of_memory, out=tmp_path, progress=False, images=held)
    assert seen.pictures == there.pictures != b"" and seen.facts["classes"] == ["dark", "light"]
    other = explore(of_memory, out=tmp_path, progress=False, images={"test": held["train"]})
    assert other.pictures == b"" and "no longer those of the store" in other.facts["no_pictures"]


def test_the_explorer_shows_file_names_and_writes_them(stores, tmp_path):
    seen = explore(stores[0], out=tmp_path, progress=False)
    files = lab.load_images(stores[0].manifest["source"]["images"]["test"]["name"], "test").files
    assert seen.facts["files"] == list(files) and files[0] == "test/dark/000.png"
    tables = {file.stem: pd.read_csv(file) for file in seen.save() if file.suffix == ".csv"}
    for name in ("features", "neighbours"):
        assert tables[name].file.tolist() == [files[row] for row in tables[name].row]
    nameless = {split: lab.load_images(data, split).images() for split, data in stores[2].items()}
    labelled = [lab.load_images(nameless[split], split, labels=data["label"]) for split, data in stores[2].items()]
    store = lab.extract(stores[0].manifest["source"]["model"]["name"], labelled, store=tmp_path, progress=False)
    seen = explore(store, out=tmp_path, progress=False, images=labelled)
    assert seen.facts["files"] == [] and seen.pictures
    assert "file" not in pd.read_csv(next(file for file in seen.save() if file.name == "features.csv"))
