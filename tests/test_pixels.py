"""Tokens against the port's own processor, the palette against cases solved by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from igpt_lab.checkpoints import CheckpointError
from igpt_lab.pixels import ImageGPTImageProcessorPil, fit_palette

GENERATOR = np.random.default_rng(0)
PALETTE = GENERATOR.uniform(-1, 1, (40, 3)).astype(np.float32)


def test_same_ids_as_the_port(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = [(7, 7), (32, 32), (50, 20), (5, 9)]
    images = [Image.fromarray(GENERATOR.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    ours = ImageGPTImageProcessorPil(PALETTE, 7)
    port = transformers.ImageGPTImageProcessorPil.from_pretrained(ours.save_pretrained(tmp_path))
    np.testing.assert_array_equal(ours.encode(images), np.stack(port(images)["input_ids"]))
    again = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.encode(images), ours.encode(images))
    port.save_pretrained(tmp_path / "port")
    np.testing.assert_array_equal(ImageGPTImageProcessorPil.from_pretrained(tmp_path / "port").clusters, PALETTE)


def test_nearest_by_distance_matrix():
    images = GENERATOR.integers(0, 256, (3, 7, 7, 3), dtype=np.uint8)
    points = images.reshape(3, 49, 1, 3) / 127.5 - 1
    expected = ((points - PALETTE.astype(float)) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(ImageGPTImageProcessorPil(PALETTE, 7).encode(images), expected)


def test_decode_by_hand():
    processor = ImageGPTImageProcessorPil([[-1, 0, 1], [0.5, -0.5, 0]], 2)
    image = processor.decode(np.array([[0, 1, 1, 0]]))
    assert image.shape == (1, 2, 2, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [[0, 128, 255], [191, 64, 128]]
    with pytest.raises(ValueError, match="token 2"):
        processor.decode(np.array([[0, 1, 2, 0]]))


def test_palette_of_separate_greys():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2], images[1, 0] = 254, 100
    images[1, 1] = 102  # 101 lies between the two
    greys = np.rint(127.5 * (fit_palette(images, 3, seed=1) + 1))
    np.testing.assert_array_equal(greys, [[0] * 3, [101] * 3, [254] * 3])
    with pytest.raises(ValueError, match="4 distinct colours"):
        fit_palette(images, 5)


def test_grey_and_alpha_become_rgb():
    grey = Image.fromarray(np.full((2, 2), 200, np.uint8))
    processor = ImageGPTImageProcessorPil([[-1] * 3, [1] * 3], 2)
    for mode in ("L", "RGB", "RGBA", "P", "LA"):
        assert processor.encode([grey.convert(mode)]).tolist() == [[1, 1, 1, 1]]


def test_old_and_bad_configs(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    old = {"feature_extractor_type": "ImageGPTFeatureExtractor", "clusters": PALETTE.tolist(), "size": 7, "resample": 2}
    file.write_text(json.dumps(old))
    assert ImageGPTImageProcessorPil.from_pretrained(tmp_path).size == 7
    for broken in ({"size": 7}, old | {"size": {"height": 7, "width": 8}}):
        file.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="preprocessor_config.json needs"):
            ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\)"):
        ImageGPTImageProcessorPil(PALETTE, 7).encode(np.zeros((1, 7, 7, 3)))
