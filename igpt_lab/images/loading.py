"""What a user has -> an image set: a name, a path, an object of `datasets`, a set of torchvision, a list, an array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from igpt_lab.core.arguments import checked, local
from igpt_lab.core.display import say_once
from igpt_lab.images import dataset_objects, in_memory
from igpt_lab.images.columns import BadItem, Fact, NoPicture, Opened, fixed
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.sources import Source, bundled, number_labels, read, title_of
from igpt_lab.images.token_files import read_tokens, token_sets

SPLITS = ("train", "test")  # of a name, where none is asked for


@checked
def load_images(
    source,
    split: str | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    labels=None,
    label_names: Sequence[str] | None = None,
    name: str | None = None,
    label: str | None = None,
    config: str | None = None,
) -> ImageSet | TokenSet:
    """One split of an image set, from wherever its images are.

    Classes are numbered over all splits of a source together, by name. What was chosen and left out is said on stderr,
    and in the card. Images in memory are copied one at a time, when they are asked for, and may be of any size.

    Args:
        source: A bundled name; a folder of class folders, with or without `train/` and `test/` above them; a Parquet
            file or a folder of them, as the Hub has; a folder saved by `datasets`; a Hub name `owner/name`; what
            `load_tokens` takes. Or, in memory, a Dataset, DatasetDict or IterableDataset of `datasets`; what has a
            length and gives an image, or an image and its label, such as a set of torchvision or a list of Pillow
            images, paths or arrays; an array (N, H, W) or (N, H, W, C); a torch tensor (N, C, H, W); an image set.
        split: By default "test", or what a folder of classes is named after, or the split that a Dataset says. A
            source without splits is served whole under any split's name; a dict has a source for each.
        limit: At most so many images, a seeded draw that is stratified over labels; of an IterableDataset its first.
        seed: Of that draw.
        labels: Whole numbers or words (N,), in the order of the rows, in place of the source's own.
        label_names: Names of the classes: of labels that are numbers, in their order; of words, the order.
        name: Of the set, in stores and figures; the splits of one store have one name.
        label: The column of a table that holds the labels, such as "coarse_label".
        config: The configuration of a set of the Hub that has several, or a folder of Parquet files in a folder.

    Returns:
        The images, or the tokens of a token set.

    Raises:
        ValueError: What is no image, labels of another length, no such split or column; it names the culprit.
        TypeError: A source of another kind.

    Example:
        >>> lab.load_images(np.zeros((3, 8, 8), "uint8"), "train", labels=["cat", "dog", "cat"], name="pets")
        <ImageSet pets train: 3 images, 2 classes: cat, dog>
    """
    if split == "":
        raise ValueError("split is empty; expected a name such as 'train' or 'test', or none")
    if isinstance(source, Mapping):
        return _of_dict(source, split, dict(
            limit=limit, seed=seed, labels=labels, label_names=label_names, name=name, label=label, config=config,
        ))  # fmt: skip
    again: dict | None = None
    if isinstance(source, str | Path):
        images, again = _of_name(source, split, label, config), _source(str(source), limit, seed)
        again |= {key: value for key, value in (("label", label), ("config", config), ("title", name)) if value}
    elif (label is not None and not dataset_objects.is_dataset(source)) or config is not None:
        raise ValueError(f"a {type(source).__name__} has no columns and no configurations; give labels=")
    elif isinstance(source, ImageSet | TokenSet):
        images = source if split in (None, source.split) else replace(source, split=split, source=None)
        again = None if limit else images.source
    else:
        images = _in_memory(source, split, label=label, limit=limit, has_labels=labels is not None, others={})
    return _finished(images, limit, seed, labels, label_names, name, again)


def _finished(
    images: ImageSet | TokenSet, limit: int | None, seed: int, labels: Any, label_names: Sequence[str] | None,
    name: str | None, again: dict | None,
) -> ImageSet | TokenSet:  # fmt: skip
    """With the name, the labels and the limit that were asked for; `again` loads them but where labels were given."""
    if name not in (None, images.name):
        images = replace(images, name=name)
    if labels is not None:
        images = _labelled(images, labels)
    if label_names is not None:
        images = _named(images, label_names)
    is_told = labels is None and label_names is None and (not name or again is None or "title" in again)
    again = again if is_told else None
    images = images if images.source == again else replace(images, source=again)
    return images._limited(limit, seed)


def _of_dict(sources: Mapping, split: str | None, options: dict[str, Any]) -> ImageSet | TokenSet:
    """One split of a DatasetDict, or of a dict that has a source for each split."""
    split = split or "test"
    if split not in sources:
        raise ValueError(
            f"a {type(sources).__name__} without the split {split!r}; it has {', '.join(map(str, sources))}"
        )
    source = sources[split]
    if not dataset_objects.is_dataset(source):
        return load_images(source, split, **options)
    asked = {option: options.pop(option) for option in ("label", "config")}
    if asked["config"] is not None:
        raise ValueError("config= is of sets of the Hub by their name; load_dataset(name, config) has one of its own")
    others = {str(other): data for other, data in sources.items() if other != split}
    has_labels, limit = options["labels"] is not None, options["limit"]
    images = _in_memory(source, split, label=asked["label"], limit=limit, has_labels=has_labels, others=others)
    return _finished(images, again=None, **options)


def _of_name(source: str | Path, split: str | None, label: str | None, config: str | None) -> ImageSet | TokenSet:
    """A split, whole, of a file, a folder, a bundled set or one of the Hub."""
    if token_sets(local(source)):
        if label or config:
            raise ValueError(f"{source} is a token set, which has no columns and no configurations; give labels=")
        return load_tokens(source, split or "test")
    return _image_set(read(str(source), split, label=label, config=config), title_of(str(source)), str(source))


def _image_set(read_split: Source, title: str, source: str) -> ImageSet:
    """The image set of a split that was read; what was chosen and left out is said."""
    if told := [note for note in read_split.notes if not isinstance(note, Fact)]:
        say_once(f"{source}: {'; '.join(told)}")
    index = fixed(np.arange(len(read_split.column)))
    return ImageSet(
        title, read_split.split, index, read_split.labels, read_split.label_names, read_split.column, read_split.root,
        None, read_split.notes, read_split.listed,
    )  # fmt: skip


def _in_memory(
    source: Any, split: str | None, *, label: str | None, limit: int | None, has_labels: bool, others: Mapping[str, Any]
) -> ImageSet | TokenSet:
    """A split, whole, of what is in memory, with the labels of its own unless it `has_labels` to come."""
    if dataset_objects.is_dataset(source):
        title, split = dataset_objects.name_of(source), split or dataset_objects.split_of(source) or "test"
        column, opened, word = dataset_objects.open_dataset(
            source, split, title, label=label, limit=limit, others=others
        )
        numbers, names = number_labels(opened, None if has_labels else word, title)
        return _image_set(Source(split, column, Path(), numbers, names, opened.notes, False), title, title)
    title, split = in_memory.name_of(source), split or "test"
    try:
        held = in_memory.hold(source)
        listed = in_memory.listed_labels(held) if isinstance(held, in_memory.Items) and not has_labels else None
    except BadItem as error:
        advice = "without it there is no label; give labels=, and on_bad_image='skip' leaves such images out"
        raise ValueError(f"{title} {split}: an item {error}; {advice}") from error
    except NoPicture as error:
        raise ValueError(f"{title} {split}: {error}") from error
    if isinstance(held, in_memory.Items):
        held.listed = listed
    images: ImageSet | TokenSet = _image_set(Source(split, held, Path(), None, (), (), False), title, title)
    images = images if listed is None else _labelled(images, listed)
    classes = in_memory.names_of_classes(source)
    fits = all(name.isdigit() and int(name) < len(classes) for name in images.label_names)
    return _named(images, classes) if classes and fits and images.labels is not None else images


def _labelled(images: ImageSet | TokenSet, labels: Any) -> ImageSet | TokenSet:
    """The images with these labels, one for each, in their order; ValueError for other labels."""
    title = f"{images.name} {images.split}"
    table = pa.table({"label": in_memory.label_array(labels, len(images), title)})
    numbers, names = number_labels(Opened(table, Path(), images.split), "label", images.name)
    return replace(images, labels=numbers, label_names=names)


def _named(images: ImageSet | TokenSet, label_names: Sequence[str]) -> ImageSet | TokenSet:
    """The images with classes of these names: numbers count them, and words are found among them."""
    title, now = f"{images.name} {images.split}", images.label_names
    names = tuple(map(str, label_names))
    if len(set(names)) < len(names):
        raise ValueError(f"{title}: label_names has {next(n for n in names if names.count(n) > 1)!r} twice")
    place = {name: number for number, name in enumerate(names)}
    if not set(now) <= set(names):
        place = {name: int(name) for name in now if name.isdigit() and int(name) < len(names)}
    if lacking := [name for name in now if name not in place]:
        raise ValueError(f"{title}: label_names has {len(names)} names and lacks the class {lacking[0]!r}; name all")
    numbers = None if images.labels is None else fixed(np.array([place[name] for name in now])[images.labels])
    return replace(images, labels=numbers, label_names=names)


def load_again(about: Mapping[str, Any], split: str) -> ImageSet | TokenSet:
    """A split of the images that a `source` of an image set, or a manifest, tells."""
    options = dict(about)
    return load_images(options.pop("name"), split, name=options.pop("title", None), **options)


def splits_of(images: Any) -> list[ImageSet | TokenSet]:
    """The splits of whatever is given for images: sets as they are, all splits of a dict, train and test of a name.

    A list of image sets, or of Datasets, is one of splits; any other is one of images.
    """
    if isinstance(images, ImageSet | TokenSet):
        return [images]
    if isinstance(images, str | Path):
        return [load_images(images, split) for split in SPLITS]
    if isinstance(images, Mapping):
        return [load_images(images, split) for split in images]
    if isinstance(images, Sequence | Iterator) and not isinstance(images, bytes):
        images = list(images)
        if not images:
            raise ValueError("images is empty; expected at least one image set")
        if all(isinstance(item, ImageSet | TokenSet | Mapping) or dataset_objects.is_dataset(item) for item in images):
            return [load_images(item) for item in images]
    return [load_images(images)]


def images_of(images: Any) -> ImageSet | TokenSet | None:
    """The image set of what `load_images` takes; None for images that a processor takes as they are.

    These are a Pillow image, an array or tensor, a list of these, and an iterator, of which none is held.
    """
    if isinstance(images, ImageSet | TokenSet):
        return images
    first = images[0] if isinstance(images, list | tuple) and images else images
    if isinstance(images, list | tuple) and isinstance(first, str | Path | tuple):
        return load_images(images)
    is_plain = isinstance(images, list | tuple | Iterator | Image.Image)
    if is_plain or (hasattr(images, "ndim") and not _needs_a_set(images)):
        return None
    return load_images(images)


def _needs_a_set(array: Any) -> bool:
    """Is it greys (N, H, W), or floats in [0, 1]? A processor takes the one for one image, the other in [0, 255]."""
    if array.ndim == 3:
        count, height, width = array.shape
        return count not in in_memory.CHANNELS and (width not in in_memory.CHANNELS or height == width)
    return array.ndim == 4 and "float" in str(array.dtype) and 0 <= array.min() <= array.max() <= 1


@checked
def load_tokens(name: str | Path, split: str = "test", *, limit: int | None = None, seed: int = 0) -> TokenSet:
    """One split of a token set as OpenAI publishes them: `cifar10_trX.npy`, `cifar10_trY.npy`, and so with va and te.

    X: integers (N, T); Y, if it is there: classes (N,), or one column per class (N, K) with a 1 in the right one.
    `name` is FOLDER/cifar10, a folder that holds one set, or one of the files. `limit` and `seed` as in `load_images`.
    Raises ValueError, which names the culprit.
    """
    title, tokens, labels, label_names = read_tokens(name, split)
    index = fixed(np.arange(len(tokens)))
    source = _source(str(name), limit, seed)
    return TokenSet(title, split, index, labels, label_names, tokens, source)._limited(limit, seed)


def _source(name: str, limit: int | None, seed: int) -> dict:
    """The arguments that load these images again, from any folder."""
    path = local(name)
    is_here = name not in bundled() and (path.exists() or token_sets(path))
    return {"name": str(path.resolve()) if is_here else name, "limit": limit, "seed": seed}
