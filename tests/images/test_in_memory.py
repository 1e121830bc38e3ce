"""Images in memory: the same pictures are the same set, whatever holds them; what is no image is said in a line."""

import hashlib
import io
import sys
import tracemalloc
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import igpt_lab as lab
from igpt_lab.core.display import say_once

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
LABELS = [1, 0, 2, 1, 0, 2]
NAMES = ["cat", "dog", "eel"]
COARSE = [0, 1, 1, 0, 1, 1]


def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in PIXELS]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class CIFAR10:
    """As torchvision's: `[i]` is a Pillow image and a number, both through a transform."""

    classes = NAMES

    def __init__(self, transform=None, target_transform=None):
        self.targets, self.transform, self.target_transform = LABELS, transform, target_transform

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        image, target = Image.fromarray(PIXELS[index]), self.targets[index]
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(target) if self.target_transform else target


class NoTargets(CIFAR10):
    def __init__(self):
        super().__init__()
        self.hidden = self.__dict__.pop("targets")

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), self.hidden[index]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor: float32 (C, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def cifar100(pixels=PIXELS, fine=LABELS, coarse=COARSE) -> datasets.Dataset:
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES)}
    kinds["coarse_label"] = datasets.ClassLabel(names=["fish", "people"])
    columns = {"img": [{"bytes": png(image), "path": f"{n}.png"} for n, image in enumerate(pixels)]}
    return datasets.Dataset.from_dict(
        columns | {"fine_label": fine, "coarse_label": coarse}, features=datasets.Features(kinds)
    )


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    files = [tmp_path / f"{n}.png" for n in range(len(PIXELS))]
    for file, image in zip(files, pictures(), strict=True):
        image.save(file)
    return files


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


HELD = {
    "array": lambda: PIXELS,
    "array of floats": lambda: PIXELS / 255,
    "array of float16": lambda: (PIXELS / 255).astype(np.float16),
    "array of 16 bits": lambda: PIXELS.astype(np.uint16) * 257,
    "array with alpha": lambda: np.concatenate([PIXELS, np.full_like(PIXELS[..., :1], 255)], -1),
    "tensor": lambda: tensor(PIXELS),
    "tensor of floats": lambda: (tensor(PIXELS).float() / 255).requires_grad_(True),
    "list of Pillow images": pictures,
    "list of arrays": lambda: list(PIXELS),
    "list of tensors": lambda: list(tensor(PIXELS)),
    "set of torchvision": CIFAR10,
    "set of tensors": lambda: torch.utils.data.TensorDataset(tensor(PIXELS), torch.tensor(LABELS)),
}


@pytest.mark.parametrize("kind", HELD)
def test_the_same_pictures_are_the_same_set_whatever_holds_them(kind):
    """The expected fingerprint is by hand: each picture as PPM behind its length, the labels, the row numbers."""
    images = lab.load_images(HELD[kind](), "train", labels=LABELS, label_names=NAMES)
    for position, pixels in enumerate(PIXELS):
        np.testing.assert_array_equal(np.asarray(images[position]), pixels)
    cells = [b"P6 7 5 255\n" + pixels.tobytes() for pixels in PIXELS]
    content = b"".join(len(cell).to_bytes(8, "little") + cell for cell in cells)
    content += np.array(LABELS, "<i8").tobytes() + np.arange(6).astype("<i8").tobytes()
    assert images.fingerprint == hashlib.sha256(content).hexdigest()
    assert (images.split, images.labels.tolist(), images.label_names) == ("train", LABELS, tuple(NAMES))
    assert images.source is None and images.files == ("",) * 6


@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 5, 7, 1)])
def test_greys(shape):
    greys = PIXELS[..., 0].reshape(shape)
    for held in (greys, tensor(greys) if len(shape) == 4 else torch.from_numpy(greys)):
        images = lab.load_images(held)
        np.testing.assert_array_equal(np.asarray(images[2])[..., 1], PIXELS[2, ..., 0])
        assert images.fingerprint == lab.load_images([Image.fromarray(grey) for grey in PIXELS[..., 0]]).fingerprint


def test_paths_are_as_the_same_files_in_a_folder(paths, tmp_path):
    for file, label in zip(paths, LABELS, strict=True):
        (tmp_path / "set" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / NAMES[label] / file.name).write_bytes(file.read_bytes())
    folder = lab.load_images(tmp_path / "set")
    in_order = sorted(paths, key=lambda file: (LABELS[paths.index(file)], file.name))
    labels = [NAMES[LABELS[paths.index(file)]] for file in in_order]
    for held in (in_order, list(map(str, in_order)), np.array(list(map(str, in_order))), pd.Series(map(str, in_order))):
        images = lab.load_images(held, labels=labels)
        assert images.fingerprint == folder.fingerprint and images.label_names == folder.label_names
        assert images.files == tuple(map(str, in_order)) and images.name == "images"
    assert folder.files == tuple(f"{label}/{file.name}" for label, file in zip(labels, in_order, strict=True))


def test_images_of_a_list_may_differ_in_size():
    images = lab.load_images([Image.new("L", (3, 2), 7), Image.new("RGBA", (5, 5), (9, 9, 9, 255))], labels=["a", "b"])
    assert [image.size for image in images] == [(3, 2), (5, 5)] and images[1].getpixel((0, 0)) == (9, 9, 9)


# Sets of torchvision.


@pytest.mark.parametrize("transform", [None, to_tensor, np.asarray])
@pytest.mark.parametrize("make", [CIFAR10, lambda transform=None: NoTargets()])
def test_labels_and_names_of_a_set_of_torchvision(make, transform):
    images = lab.load_images(make(transform), "train")
    assert (images.name in ("cifar10", "notargets"), images.labels.tolist()) == (True, LABELS)
    assert images.label_names == tuple(NAMES)
    np.testing.assert_array_equal(np.asarray(images[3]), PIXELS[3])


def test_a_subset_has_the_name_and_the_classes_of_its_set():
    images = lab.load_images(torch.utils.data.Subset(CIFAR10(), [4, 3]), "test")
    assert (images.name, images.label_names, images.labels.tolist()) == ("cifar10", tuple(NAMES), [0, 1])
    np.testing.assert_array_equal(np.asarray(images[0]), PIXELS[4])


def test_labels_are_those_that_come_with_the_images():
    """`targets` saves a pass over the images, and is not believed where the items say otherwise."""
    turned = lab.load_images(CIFAR10(target_transform=lambda target: 2 - target), label_names=NAMES)
    assert turned.labels.tolist() == [2 - label for label in LABELS]
    source = CIFAR10()
    images = lab.load_images(source)
    source.targets = [*LABELS[:4], 2, 2]
    with pytest.raises(ValueError, match=r"cifar10 test row 4 has the label 2, and 0 in its list of labels"):
        images.fingerprint  # noqa: B018
    odd = CIFAR10()
    odd.labels, odd.targets = odd.targets, [7] * 6
    assert lab.load_images(odd, labels=LABELS).labels.tolist() == LABELS


def test_one_item_is_asked_for_at_a_time(tmp_path, tiny_folder):
    """Many sets seek in one open file: threads that decode must not meet there."""
    busy = []

    class Counts(CIFAR10):
        def __getitem__(self, index):
            assert not busy
            busy.append(index)
            item = super().__getitem__(index)
            busy.clear()
            return item

    lab.extract(tiny_folder, lab.load_images(Counts()), store=tmp_path, workers=4, progress=False)


def test_a_transform_that_draws_at_random_is_noticed(tmp_path, tiny_folder):
    generator = np.random.default_rng(0)
    noisy = CIFAR10(lambda image: Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)))
    with pytest.raises(ValueError, match="row 0 has changed since it was first read.*without transforms that draw at"):
        lab.extract(tiny_folder, lab.load_images(noisy), store=tmp_path, progress=False)


def test_an_image_folder_of_torchvision_names_its_files(paths):
    class ImageFolder(CIFAR10):
        samples: ClassVar = [(str(path), label) for path, label in zip(paths, LABELS, strict=True)]

    assert lab.load_images(ImageFolder()).files == tuple(map(str, paths))


# Objects of `datasets`.


@pytest.fixture
def hub() -> datasets.DatasetDict:
    return datasets.DatasetDict({"train": cifar100(), "test": cifar100().shuffle(seed=1).select(range(3))})


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [None, "coarse_label"])
def test_a_dataset_is_as_its_files(hub, split, label, tmp_path, capsys):
    images = lab.load_images(hub, split, label=label, name="set")
    for name, data in hub.items():
        data.to_parquet(tmp_path / "set" / f"{name}.parquet")
    files = lab.load_images(tmp_path / "set", split, label=label)
    assert images.fingerprint == files.fingerprint and (images.name, images.split) == ("set", split)
    assert (images.label_names, images.labels.tolist()) == (files.label_names, files.labels.tolist())
    assert images.notes == files.notes and images.files == files.files
    assert [np.asarray(image).tolist() for image in images] == [np.asarray(row["img"]).tolist() for row in hub[split]]


def test_which_column_of_labels_was_taken_is_said_and_can_be_chosen(hub, capsys):
    say_once.cache_clear()
    fine = lab.load_images(hub, "train")
    assert "coarse_label may be meant: label='coarse_label' takes it" in capsys.readouterr().err
    coarse = lab.load_images(hub, "train", label="coarse_label")
    assert (
        capsys.readouterr().err == ""
        and "labels are those of the column coarse_label; others may be fine_label"
        in (coarse._repr_html_().replace("&#x27;", "'"))
    )
    assert (fine.label_names, coarse.label_names) == (tuple(NAMES), ("fish", "people"))
    assert coarse.labels.tolist() == COARSE
    with pytest.raises(ValueError, match="no column 'coarse' for the labels; did you mean 'coarse_label'"):
        lab.load_images(hub, "train", label="coarse")


def test_words_are_numbered_over_all_splits_of_a_dict():
    words = {"train": ["eel", "cat", "dog"], "test": ["eel", "dog", "dog"]}
    hub = datasets.DatasetDict()
    for split, labels in words.items():
        columns = {"image": [{"bytes": png(image), "path": None} for image in PIXELS[:3]], "label": labels}
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        hub[split] = datasets.Dataset.from_dict(columns, features=kinds)
    images = lab.load_images(hub, "test")
    assert images.label_names == ("cat", "dog", "eel") and images.labels.tolist() == [2, 1, 1]


def test_the_split_of_a_dataset_is_its_own_where_it_has_one():
    assert lab.load_images(cifar100()).split == "test"
    one = datasets.Dataset(cifar100().data, split=datasets.NamedSplit("train"))
    assert lab.load_images(one).split == "train" and lab.load_images(one, "test").split == "test"
    part = datasets.Dataset(cifar100().data, split=datasets.NamedSplit("train[:50%]"))
    assert lab.load_images(part).split == "test"


@pytest.mark.parametrize("has_features", [True, False])
def test_the_first_rows_of_a_stream(has_features):
    stream = cifar100().to_iterable_dataset()
    if not has_features:
        rows = [{"image": Image.fromarray(image), "label": label} for image, label in zip(PIXELS, LABELS, strict=True)]
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    images = lab.load_images(stream, "train", limit=4)
    assert len(images) == 4 and images.labels.tolist() == LABELS[:4]
    np.testing.assert_array_equal(np.asarray(images[3]), PIXELS[3])
    assert "the first 4 rows of a stream" in images.notes
    with pytest.raises(ValueError, match="is an IterableDataset, whose end is not known; give limit="):
        lab.load_images(stream)


def test_streams_of_a_dict_have_the_classes_of_all():
    hub = {"train": cifar100().to_iterable_dataset(), "test": cifar100().select([1]).to_iterable_dataset()}
    for make in (dict, datasets.IterableDatasetDict):
        images = lab.load_images(make(hub), "test", limit=3)
        assert images.label_names == tuple(NAMES) and images.labels.tolist() == [LABELS[1]]


def test_files_that_a_dataset_lists_are_read_as_pictures_alone(paths, tmp_path):
    kinds = datasets.Features({"image": datasets.Image()})
    (tmp_path / "words.png").write_text("no picture")
    data = datasets.Dataset.from_dict({"image": [str(paths[0]), str(tmp_path / "words.png")]}, features=kinds)
    images = lab.load_images(data)
    np.testing.assert_array_equal(np.asarray(images[0]), PIXELS[0])
    assert images.files == (str(paths[0]), str(tmp_path / "words.png"))
    with pytest.raises(ValueError, match=r"row 1 \(.*words.png\) is not a readable image"):
        images[1]


def test_loading_by_name_imports_no_datasets():
    import subprocess

    code = "import sys, igpt_lab as lab; lab.load_images('fashion-mini', limit=3); print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Labels and names that are given.


@pytest.mark.parametrize(
    "labels, names, numbers, classes",
    [
        (np.array(LABELS, np.uint8), None, LABELS, ("0", "1", "2")),
        (torch.tensor(LABELS), NAMES, LABELS, tuple(NAMES)),
        (pd.Series(LABELS, index=range(10, 16)), NAMES, LABELS, tuple(NAMES)),
        ([NAMES[label] for label in LABELS], None, LABELS, tuple(NAMES)),
        ([NAMES[label] for label in LABELS], ["eel", "dog", "cat", "fox"], [2 - n for n in LABELS], None),
        ([3 if label == 2 else label for label in LABELS], ["a", "b", "c", "d"], [1, 0, 3, 1, 0, 3], None),
        ([True, False] * 3, None, [1, 0] * 3, ("False", "True")),
        ([-1] * 6, None, None, ()),
    ],
)
def test_labels_that_are_given(labels, names, numbers, classes):
    images = lab.load_images(PIXELS, "train", labels=labels, label_names=names)
    assert numbers == (None if images.labels is None else images.labels.tolist())
    assert images.label_names == (classes if classes is not None else tuple(names))


def test_labels_can_be_put_onto_any_source(tiny_images):
    before = lab.load_images(tiny_images, "test")
    for source in (tiny_images, before, hub_of(before)):
        images = lab.load_images(source, "test", labels=np.arange(40) % 4, name="mine", limit=20)
        assert (images.name, len(images), images.source) == ("mine", 20, None)
        np.testing.assert_array_equal(images.labels, images.index % 4)
    assert lab.load_images(before) is before


def hub_of(images) -> datasets.DatasetDict:
    cells = [{"bytes": images._encoded(n)[0], "path": None} for n in range(len(images))]
    data = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    return datasets.DatasetDict({"test": data})


def test_a_name_of_ones_own_loads_again(tiny_images):
    from igpt_lab.images.loading import load_again

    images = lab.load_images(tiny_images, "test", name="mine", limit=7)
    again = load_again(images.source, "test")
    assert (again.name, again.fingerprint, len(again)) == ("mine", images.fingerprint, 7)


def test_the_limit_is_the_same_draw_as_of_files(tiny_images):
    files = lab.load_images(tiny_images, "train", limit=11, seed=3)
    whole = lab.load_images(tiny_images, "train")
    held = lab.load_images(whole.images(), labels=whole.labels, limit=11, seed=3)
    np.testing.assert_array_equal(held.index, files.index)


# Slices and lists of positions.


def test_slices_lists_and_masks_index_a_set(tiny_images):
    images = lab.load_images(tiny_images, "train")
    mask = images.labels == 1
    cases = [(slice(3, 40, 5), list(range(3, 40, 5))), (slice(-2, None), [58, 59]), ([5, 1], [5, 1])]
    cases += [(np.array([7]), [7]), (mask, np.flatnonzero(mask).tolist()), ([], [])]
    for positions, rows in cases:
        part = images[positions]
        assert type(part) is type(images) and part.index.tolist() == rows
        np.testing.assert_array_equal(part.labels, images.labels[rows])
    np.testing.assert_array_equal(np.asarray(images[5:][np.int64(1)]), np.asarray(images[6]))
    blurred = lab.corrupt(images, "contrast", 0.0)[:4]
    assert isinstance(blurred, lab.CorruptedImages) and len(set(np.asarray(blurred[0]).ravel().tolist())) == 1
    with pytest.raises(IndexError):
        images[60]
    with pytest.raises(TypeError):
        images["a"]


# What is refused.

LIST = "list of length 1: item 0"
REFUSED = [
    (np.zeros((6, 192), np.uint8), r"\(6, 192\); expected an array \(N, H, W\) or .*reshape\(-1, height, width\)"),
    (np.zeros((6, 3, 8, 8), np.uint8), r"channels come last: images.transpose\(0, 2, 3, 1\)"),
    (torch.zeros((6, 8, 8, 3)), r"expected a tensor .*channels come second: images.permute\(0, 3, 1, 2\)"),
    (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\) may be one image, or 8 of 8 x 3; give images\[None\]"),
    (np.zeros((2, 8, 8, 5), np.uint8), r"shape \(2, 8, 8, 5\); expected"),
    (np.zeros((0, 8, 8, 3), np.uint8), "there are none; expected one or more"),
    (np.zeros((2, 8, 8), bool), "images test: bool pixels; expected uint8, uint16, or floats"),
    (np.full((2, 8, 8), 255.0), "float64 pixels from 255 to 255; .*: divide by 255"),
    (np.full((2, 8, 8), -0.5), "pixels from -0.5 to -0.5; .*without normalisation"),
    (np.full((2, 8, 8), np.nan), "pixels from nan to nan; expected uint8"),
    (np.full((2, 8, 8), 1e9), r"pixels from 1e\+09 to 1e\+09; expected"),
    (np.full((2, 8, 8), 9), r"int64 pixels from 9 to 9; .*astype\('uint8'\)"),
    (np.full((2, 8, 8), 9, np.uint16), r"uint16 pixels from 9 to 9; .*astype\('uint8'\)"),
    (np.array([np.zeros((2, 2)), np.zeros((3, 3))], object), "an array of objects"),
    ([], "list of length 0 has no images"),
    ([3], f"{LIST} is of type int; expected Pillow images, paths"),
    (["absent.png"], rf"{LIST} \(absent.png\) is no image that can be read: No such file"),
    ([np.zeros((4, 4), np.int64)], rf"{LIST} is no image that can be read: int64 pixels"),
    ([(np.zeros((4, 4), np.uint8), {"boxes": []})], "has a label of type dict"),
    ([(np.zeros((4, 4), np.uint8), 1, 2)], "has 3 parts; expected an image, or an image and its label"),
    ([(PIXELS[0], 1), PIXELS[1]], "item 1 has no label, and others have"),
    ({"train": PIXELS}, "a dict without the split 'test'; it has train"),
]


@pytest.mark.parametrize("source, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_no_set_of_images_is_said_in_a_line(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        lab.load_images(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_kinds_of_objects_that_are_no_sets():
    for source, message in (
        (5, "of type int; expected a name, a path"),
        ((image for image in PIXELS), r"generator.*list\(itertools.islice\(it, 1000\)\)"),
        (torch.utils.data.DataLoader(CIFAR10()), "expected its set: loader.dataset"),
        (pd.DataFrame({"path": ["a.png"]}), "expected its column of paths"),
    ):
        with pytest.raises(TypeError, match=message):
            lab.load_images(source)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": [1, 2]}, "2 labels came for 6 images"),
        ({"labels": np.eye(6)}, r"labels of shape \(6, 6\).*argmax"),
        ({"labels": [0, 1, 2, 0, 1, "a"]}, "of several types, numbers and words"),
        ({"labels": [0, 1, 2, 0, 1, None]}, "row 5 has no label among its 3 classes"),
        ({"labels": [0.5] * 6}, "'label' is double; expected integers or words"),
        ({"labels": [[0]] * 6}, "has a label of type list"),
        ({"labels": 3}, "labels are of type int"),
        ({"labels": LABELS, "label_names": ["a", "b"]}, "has 2 names and lacks the class '2'"),
        ({"labels": LABELS, "label_names": ["a", "b", "a"]}, "has 'a' twice"),
        ({"label": "coarse"}, "has no columns and no configurations; give labels="),
        ({"config": "main"}, "has no columns and no configurations"),
    ],
)
def test_labels_that_do_not_fit_are_said_in_a_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        lab.load_images(PIXELS, **options)
    assert "\n" not in str(caught.value)


def test_a_program_that_pillow_would_run_is_refused():
    """Pillow gives an EPS picture to Ghostscript when its pixels are asked for; here they are never asked for."""
    program = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with pytest.raises(ValueError, match="is of the format EPS; expected PNG, JPEG"):
        lab.load_images([Image.open(program)])


def test_an_item_that_the_users_set_fails_on_is_left_out_where_that_is_asked_for(tiny, tmp_path):
    class Breaks:
        def __len__(self):
            return 6

        def __getitem__(self, row):
            if row == 3:
                raise RuntimeError("broken image 3")
            return Image.fromarray(np.full((4, 4), 40 * row, np.uint8)), row % 2

    with pytest.raises(ValueError, match="broken image 3; without it there is no label; give labels="):
        lab.load_images(Breaks(), "train")
    images = lab.load_images(Breaks(), "train", labels=[0, 1] * 3)
    options = {"store": tmp_path, "progress": False}
    with pytest.raises(ValueError, match=r"train row 3 cannot be read: RuntimeError: broken image 3 \(on_bad_image"):
        lab.extract(tiny, images, **options)
    store = lab.extract(tiny, images, on_bad_image="skip", **options)
    assert store.index("train").tolist() == [0, 1, 2, 4, 5]


def test_a_label_of_more_than_64_bits_is_refused():
    picture = Image.fromarray(np.zeros((4, 4), np.uint8))
    for label in (10**30, -(10**30), 2**64):
        with pytest.raises(ValueError, match=r"images train: .*label"):
            lab.load_images([(picture, label)] * 6, "train")


def test_an_error_of_the_users_set_names_the_row():
    class Breaks(CIFAR10):
        def __getitem__(self, index):
            return super().__getitem__(index if index < 4 else 1 // 0)

    with pytest.raises(ValueError, match="breaks test row 4 cannot be read: ZeroDivisionError"):
        lab.load_images(Breaks()).images()


# Saved, and in stores.


@pytest.mark.parametrize("with_labels", [True, False])
def test_what_is_saved_is_the_same_set(with_labels, tmp_path):
    images = lab.load_images(PIXELS, "train", labels=LABELS if with_labels else None, name="set")
    assert images.save(tmp_path / "set/train.parquet") == tmp_path / "set/train.parquet"
    again = lab.load_images(tmp_path / "set", "train")
    assert (again.fingerprint, again.name, again.label_names) == (images.fingerprint, "set", images.label_names)
    theirs = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "set/train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    np.testing.assert_array_equal(np.stack([np.asarray(row["image"]) for row in theirs]), PIXELS)


def test_corrupted_images_are_saved_as_they_are_seen(tmp_path):
    images = lab.corrupt(lab.load_images(PIXELS), "contrast", 0.5)
    images.save(tmp_path / "test.parquet")
    again = lab.load_images(tmp_path / "test.parquet")
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]


def test_a_store_is_there_again_for_equal_pictures(tiny_folder, tmp_path):
    first = lab.extract(tiny_folder, lab.load_images(PIXELS, labels=LABELS), store=tmp_path, progress=False)
    part = first.part("test", 0)
    written = part.stat().st_mtime_ns
    again = lab.extract(tiny_folder, lab.load_images(pictures(), labels=LABELS), store=tmp_path, progress=False)
    assert again.path == first.path and part.stat().st_mtime_ns == written
    changed = PIXELS.copy()
    changed[0, 0, 0, 0] ^= 1
    other = lab.extract(tiny_folder, lab.load_images(changed, labels=LABELS), store=tmp_path, progress=False)
    assert other.path != first.path


def test_an_array_that_changes_is_refused():
    pixels = PIXELS.copy()
    images = lab.load_images(pixels)
    images.fingerprint  # noqa: B018
    pixels[2] = 0
    with pytest.raises(ValueError, match="images test row 2 has changed since it was first read"):
        images[2]


def test_no_copy_of_an_array_is_made():
    """20,000 images of 32 x 32: 61 MB, of which loading, fingerprint and reading may add a tenth, for bookkeeping."""
    pixels = np.zeros((20_000, 32, 32, 3), np.uint8)
    tracemalloc.start()
    images = lab.load_images(pixels, labels=np.arange(20_000) % 10)
    images.fingerprint  # noqa: B018
    for batch in images.batches(256):
        del batch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * pixels.nbytes
