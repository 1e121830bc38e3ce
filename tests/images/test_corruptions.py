"""Corruptions against cases solved by hand: what changes nothing, what leaves one grey, and where they are applied."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter1d

import igpt_lab as lab
from igpt_lab.images.corruptions import corrupt

SQUARE = np.zeros((32, 32, 3), np.uint8)


def image_set(tmp_path, pixels):
    """The only image of a folder: `pixels`, uint8 (H, W, 3)."""
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    return lab.load_images(tmp_path, "test")


def test_contrast_moves_every_pixel_towards_the_mean_grey(tmp_path):
    pixels = SQUARE.copy()
    pixels[:, 16:] = 200  # half 0, half 200: mean 100
    images = image_set(tmp_path, pixels)
    assert np.unique(corrupt(images, "contrast", 0.4)[0]).tolist() == [60, 140]
    assert np.unique(corrupt(images, "contrast", 0.0)[0]).tolist() == [100]
    pixels[:, :16] = 255, 0, 0  # red has the grey 0.299 * 255 = 76.2: mean (76 + 200) / 2
    (tmp_path / "red").mkdir()
    assert np.unique(corrupt(image_set(tmp_path / "red", pixels), "contrast", 0.0)[0]).tolist() == [138]


def test_blur_spreads_an_edge_as_a_gaussian_of_that_deviation(tmp_path):
    pixels = SQUARE.copy()
    pixels[:, 16:] = 200
    blurred = np.asarray(corrupt(image_set(tmp_path, pixels), "blur", 2.0)[0])
    assert np.abs(blurred - gaussian_filter1d(pixels * 1.0, 2.0, axis=1)).max() < 5  # box blurs are near it
    (tmp_path / "grey").mkdir()
    assert np.unique(corrupt(image_set(tmp_path / "grey", SQUARE + 70), "blur", 3.0)[0]).tolist() == [70]


@pytest.mark.parametrize(("corruption", "clean"), [("contrast", 1.0), ("blur", 0.0)])
def test_the_first_level_changes_no_pixel(test, corruption, clean):
    same = corrupt(test, corruption, clean)
    assert [image.tobytes() for image in same] == [image.tobytes() for image in test]


def test_tokens_are_made_of_the_corrupted_images(tiny, test):
    palette = tiny.processor
    tokens = lab.tokenize(corrupt(test, "contrast", 0.0), palette, progress=False)
    assert (tokens == tokens[:, :1]).all()  # one grey, one token
    grey = palette.encode([Image.new("RGB", (4, 4), (round(np.mean(test[3].convert("L"))),) * 3)])
    assert tokens[3].tolist() == grey[0].tolist()
    assert (lab.tokenize(test, palette, progress=False) != tokens).any()


def test_a_corrupted_set_is_another_set(tiny, test, tmp_path):
    weak, strong = (corrupt(test, "contrast", share) for share in (0.8, 0.2))
    again = corrupt(corrupt(test, "contrast", 0.8), "blur", 1.0)
    assert (weak.name, again.name) == ("shades contrast 0.8", "shades contrast 0.8 blur 1")
    assert len({images.fingerprint for images in (test, weak, strong, again)}) == 4
    assert weak.fingerprint == corrupt(test, "contrast", 0.8).fingerprint != weak.select([0, 1]).fingerprint
    chosen = weak.select([5, 3])
    assert chosen.labels.tolist() == test.labels[[5, 3]].tolist() and chosen[1].tobytes() == weak[3].tobytes()
    stores = [lab.extract(tiny, images, store=tmp_path, progress=False) for images in (test, weak, strong)]
    assert len({store.path for store in stores}) == 3
    assert not np.array_equal(stores[1].layer("ln_1", 1, "test"), stores[2].layer("ln_1", 1, "test"))


def test_what_cannot_be_corrupted_is_refused(test, tmp_path):
    np.save(tmp_path / "few_teX.npy", np.zeros((3, 16), int))
    with pytest.raises(ValueError, match="holds tokens, and a corruption changes images before"):
        corrupt(lab.load_tokens(tmp_path / "few"), "blur", 1.0)
    with pytest.raises(ValueError, match="'noise'; expected one of contrast, blur"):
        corrupt(test, "noise", 1.0)
    for corruption, level in (("contrast", 1.5), ("contrast", -0.1), ("blur", -1.0), ("blur", math.inf)):
        with pytest.raises(ValueError, match=f"{corruption} at level .*; expected a finite number from 0 to"):
            corrupt(test, corruption, level)
