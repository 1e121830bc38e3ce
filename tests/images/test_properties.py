"""Properties of images against pictures whose properties are known, and other ways to reckon them."""

import numpy as np
import pytest
from PIL import Image, ImageStat

import igpt_lab as lab
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.images.properties import ROWS, image_properties

GREYS = np.linspace(-1, 1, 256)
PROCESSOR = ImageGPTImageProcessorPil(np.stack([GREYS] * 3, axis=1), 16)  # token v is the grey v
SIDE = np.arange(16)


def tokens_of(*images: np.ndarray) -> np.ndarray:
    return np.stack(images).reshape(len(images), -1).astype(np.uint16)


def properties_of(*images: np.ndarray):
    return image_properties(tokens_of(*images), PROCESSOR)


def wave(cycles: int, along: str) -> np.ndarray:
    """A cosine of so many cycles in an image, which varies along its rows, its columns or its diagonal."""
    x, y = np.meshgrid(SIDE, SIDE)
    place = {"rows": x, "columns": y, "diagonal": x + y, "other diagonal": x - y}[along]
    return np.round(127 + 100 * np.cos(2 * np.pi * cycles * place / 16))


def test_means_and_contrast_are_those_of_pillow():
    colours = np.random.default_rng(0).integers(0, 256, (32, 3))
    processor = ImageGPTImageProcessorPil(colours / 127.5 - 1, 4)
    tokens = np.random.default_rng(1).integers(0, 32, (7, 16))
    table = image_properties(tokens, processor)
    for row, image in zip(table.itertuples(), processor.decode(tokens), strict=True):
        picture = Image.fromarray(image)
        np.testing.assert_allclose([row.red, row.green, row.blue], np.array(ImageStat.Stat(picture).mean) / 255)
        grey = ImageStat.Stat(picture.convert("L"))  # rounded to whole greys
        assert row.brightness == pytest.approx(grey.mean[0] / 255, abs=0.005)
        assert row.contrast == pytest.approx(grey.stddev[0] / 255, abs=0.005)


def test_frequencies_of_waves():
    table = properties_of(wave(2, "rows"), wave(6, "columns"), wave(3, "diagonal"), wave(4, "rows"))
    np.testing.assert_allclose(table.high_frequency, [0, 1, 1, 0], atol=1e-3)  # 2, 6, 3 sqrt(2) and 4 of 16 pixels
    noise = np.random.default_rng(0).integers(0, 256, (500, 16, 16))
    share = np.mean([np.hypot(a, b) > 0.25 for a in np.fft.fftfreq(16) for b in np.fft.fftfreq(16)])
    assert properties_of(*noise).high_frequency.mean() == pytest.approx(share * 256 / 255, rel=0.01)  # 255: no mean
    half = image_properties(tokens_of(wave(6, "rows")), PROCESSOR, cutoff=0.4).high_frequency
    assert half[0] == pytest.approx(0, abs=1e-3)


def test_the_orientation_of_edges_and_waves():
    kinds = ("rows", "columns", "diagonal", "other diagonal")
    table = properties_of(*(wave(1, along) for along in kinds))
    np.testing.assert_allclose(table.orientation_cos, [1, -1, 0, 0], atol=0.01)
    np.testing.assert_allclose(table.orientation_sin, [0, 0, 1, -1], atol=0.02)
    both = np.hypot(wave(1, "rows") - 127, 0) + np.hypot(wave(1, "columns") - 127, 0)
    none = properties_of(both)
    assert np.hypot(none.orientation_cos, none.orientation_sin)[0] == pytest.approx(0, abs=1e-4)


def test_turning_an_image_turns_its_orientation():
    image = np.random.default_rng(0).integers(0, 256, (16, 16))
    table = properties_of(image, np.rot90(image), image[:, ::-1], image[::-1, ::-1])
    np.testing.assert_allclose(table.orientation_cos, table.orientation_cos[0] * np.array([1, -1, 1, 1]))
    np.testing.assert_allclose(table.orientation_sin, table.orientation_sin[0] * np.array([1, -1, -1, 1]))


def test_symmetry_is_the_correlation_with_the_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (16, 16))
    folded, odd = image + image[:, ::-1], 255 * (SIDE[None] < 8) + np.zeros((16, 1))
    table = properties_of(image, folded // 2, odd)
    assert table.symmetry[0] == pytest.approx(np.corrcoef(image.ravel(), image[:, ::-1].ravel())[0, 1])
    np.testing.assert_allclose(table.symmetry[1:], [1, -1])


def test_an_image_of_one_colour_has_no_shape():
    table = properties_of(np.full((16, 16), 200))
    assert table.iloc[0].to_dict() == pytest.approx(
        dict.fromkeys(("red", "green", "blue", "brightness"), 200 / 255)
        | dict.fromkeys(("contrast", "high_frequency", "orientation_cos", "orientation_sin"), 0)
        | {"symmetry": 1}
    )


def test_images_and_their_tokens_have_the_same_properties(tiny, tiny_images):
    images = lab.load_images(tiny_images, "test")
    table = image_properties(images, tiny.processor, progress=False)
    assert table.equals(image_properties(lab.tokenize(images, tiny.processor), tiny.processor)) and len(table) == 40


def test_many_images_are_looked_at_in_parts():
    tokens = np.random.default_rng(0).integers(0, 256, (2 * ROWS + 3, 16))
    whole = image_properties(tokens, PROCESSOR)
    assert len(whole) == 2 * ROWS + 3
    np.testing.assert_array_equal(whole.iloc[[0, 1500, -1]], image_properties(tokens[[0, 1500, -1]], PROCESSOR))


def test_bad_input():
    tokens = tokens_of(wave(1, "rows"))
    with pytest.raises(ValueError, match=r"cutoff=0.5; expected cycles per pixel"):
        image_properties(tokens, PROCESSOR, cutoff=0.5)
    with pytest.raises(ValueError, match="processor of type NoneType; expected the model's image processor"):
        image_properties(tokens, None)
    with pytest.raises(ValueError, match="15 tokens per image"):
        image_properties(tokens[:, :15], PROCESSOR)
    with pytest.raises(ValueError, match="token 300 does not lie"):
        image_properties(tokens + 300 - tokens, PROCESSOR)
    with pytest.raises(ValueError, match="expected one image or more"):
        image_properties(tokens[:0], PROCESSOR)
