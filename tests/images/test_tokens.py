"""Tokens of image sets, and token sets, which have nothing else."""

import errno
import hashlib
import os
import shutil
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from igpt_lab.core import provenance
from igpt_lab.images import image_sets, tokens
from igpt_lab.images.image_sets import TokenSet
from igpt_lab.images.loading import load_images
from igpt_lab.images.tokens import _read, cached_tokens, parts_of, tokenize


def test_tokenize(train, tiny, capsys):
    tokens = tokenize(train, tiny.processor, batch_size=7, progress=False)
    assert tokens.dtype == np.uint16 and capsys.readouterr().err == ""
    pixels = np.stack([np.asarray(image) for image in train.images()])
    np.testing.assert_array_equal(tokens, tiny.processor.encode(pixels))
    tokenize(train, tiny.processor)
    assert "60/60" in capsys.readouterr().err


@pytest.fixture
def token_set() -> TokenSet:
    tokens = np.arange(24, dtype=np.uint8).reshape(6, 4)
    return TokenSet("counted", "train", np.arange(6), np.array([0, 0, 1, 1, 1, 1]), ("a", "b"), tokens)


def test_a_selection_of_a_token_set_has_its_tokens(token_set):
    some = token_set.select([4, 1])
    assert type(some) is TokenSet and len(some) == 2
    assert some.index.tolist() == [4, 1] and some.require_labels().tolist() == [1, 0]
    assert tokenize(some, None).tolist() == [[16, 17, 18, 19], [4, 5, 6, 7]]
    assert tokenize(some, None).dtype == np.uint16
    assert repr(some) == "<TokenSet counted train: 2 images, 2 classes: a, b>"


def test_the_fingerprint_of_a_token_set_by_hand(token_set):
    content = b"tokens 4" + np.arange(24, dtype="<i8").tobytes()
    content += np.array([0, 0, 1, 1, 1, 1], "<i8").tobytes() + np.arange(6, dtype="<i8").tobytes()
    assert token_set.fingerprint == hashlib.sha256(content).hexdigest()


def test_tokens_that_change_after_their_fingerprint_are_refused(tmp_path):
    np.save(tmp_path / "x_trX.npy", np.zeros((5, 4), np.uint8))
    images = load_images(tmp_path, "train")
    some = images.select([4, 3])
    assert images.fingerprint
    file = np.load(tmp_path / "x_trX.npy", mmap_mode="r+")
    file[3, 2] = 1
    file.flush()
    for use in (lambda: images.encoded(4, 8), lambda: some.encoded(4, 8), lambda: some.fingerprint):
        with pytest.raises(ValueError, match="x train row 3 has changed since it was first read"):
            use()
    assert images.select([4]).encoded(4, 8).tolist() == [[0, 0, 0, 0]]
    assert load_images(tmp_path, "train").encoded(4, 8)[3].tolist() == [0, 0, 1, 0]


def test_a_token_set_has_no_pixels(token_set):
    for use in (token_set.images, lambda: token_set.batches(2), lambda: token_set[0]):
        with pytest.raises(ValueError, match="counted train holds tokens, and this needs the images"):
            use()


# Kept tokens


def kept(images, processor, root, **options) -> list:
    """The tokens of all parts, of 16 images each, as an extraction asks for them."""
    made = cached_tokens(parts_of(images, 16), processor, root=root, fits=(16, 8), workers=1, **options)
    return [part_tokens for _, part_tokens in made]


@pytest.fixture
def folder(tiny_images, tmp_path):
    return shutil.copytree(tiny_images / "test", tmp_path / "images")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied")])
def test_a_read_error_that_passes_leaves_no_image_out(error, folder, tiny, tmp_path, monkeypatch):
    images, read = load_images(folder), image_sets.read_inside
    (folder / "dark/007.png").write_bytes(b"damaged")
    assert images.fingerprint

    def fail(root, path, **options):
        if path == "dark/004.png":
            raise error
        return read(root, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "read_inside", fail)
        with pytest.raises(ValueError, match=rf"row 4 \(dark/004.png\) cannot be read: {error.strerror}"):
            kept(images, tiny.processor, tmp_path, skip_bad=True)
    parts = kept(images, tiny.processor, tmp_path, skip_bad=True)
    assert np.concatenate([part.positions for part in parts]).tolist() == [row for row in range(40) if row != 7]


def test_too_little_memory_leaves_no_image_out(folder, tiny, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", full)
        with pytest.raises(MemoryError):
            kept(load_images(folder), tiny.processor, tmp_path, skip_bad=True)
    assert sum(len(part.tokens) for part in kept(load_images(folder), tiny.processor, tmp_path)) == 40


def test_a_part_of_damaged_images_alone_is_empty(folder, tiny, tmp_path):
    for path in sorted(folder.glob("dark/*.png"))[:16]:
        path.write_bytes(b"damaged")
    first = kept(load_images(folder), tiny.processor, tmp_path, skip_bad=True)[0]
    assert first.tokens.shape == (0, 16) and len(first.skipped) == 16 and first.positions.tolist() == []


def test_images_that_change_after_their_fingerprint_are_not_kept_under_it(folder, tiny, tmp_path):
    images = load_images(folder)
    assert images.fingerprint
    shutil.copy(folder / "light/003.png", folder / "dark/004.png")
    with pytest.raises(ValueError, match=r"row 4 \(dark/004.png\) has changed since it was first read"):
        kept(images, tiny.processor, tmp_path, skip_bad=True)
    assert not list(tmp_path.glob("tokens/*/part-00000*"))


def test_kept_tokens_are_of_this_pillow_and_this_code(folder, tiny, tmp_path, monkeypatch):
    images, real = load_images(folder), provenance.made_by("images/tokens")
    names = {tokens._name(images, tiny.processor)}
    for name in provenance.STORED:
        monkeypatch.setattr(tokens, "made_by", lambda _, name=name: real | {name: "another"})
        names.add(tokens._name(images, tiny.processor))
    assert len(names) == 1 + len(provenance.STORED)
    monkeypatch.setattr(tokens, "made_by", lambda _: real | {"matplotlib": "another"})
    assert tokens._name(images, tiny.processor) in names


@pytest.mark.parametrize("use", ["tokenize", "kept", "card"])
def test_images_are_resized_one_after_another(use, folder, tiny, tmp_path, monkeypatch):
    """No decoded image of a thread is alive while another one is decoded, however many a batch has."""
    made, alive, decode = [], [], image_sets.decode

    def counted(data, name):
        alive.append(sum(image() is not None for image in made))
        image = decode(data, name)
        made.append(weakref.ref(image))
        return image

    for path in folder.glob("*/*.png"):
        Image.new("RGB", (90, 80), "red").save(path)
    monkeypatch.setattr(image_sets, "decode", counted)
    monkeypatch.setattr(tokens, "CHUNK", 4)
    images = load_images(folder)
    if use == "tokenize":
        tokenize(images, tiny.processor, progress=False)
    elif use == "kept":
        kept(images, tiny.processor, tmp_path)
    else:
        images._repr_html_()
    assert len(alive) == (12 if use == "card" else 40) and max(alive) == 0


def test_a_pipe_in_the_place_of_kept_tokens_is_not_waited_for(tmp_path, monkeypatch):
    images, pipe = load_images("fashion-mini", "test", limit=3), tmp_path / "part-00000-of-00001.parquet"
    os.mkfifo(pipe)
    monkeypatch.setattr(pq, "ParquetFile", lambda *_, **__: pytest.fail("would wait"))
    assert _read(pipe, images, np.arange(3)) is None
