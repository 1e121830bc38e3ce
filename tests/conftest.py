"""A tiny model and tiny images: 4 x 4 pixels, 8 greys, 3 blocks of width 8."""

import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import igpt_lab as lab
from igpt_lab.explaining.measurement import UNCHANGED
from igpt_lab.features import settings
from igpt_lab.features.hooks import POINTS, record
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = ImageGPTConfig(
    vocab_size=9, n_positions=16, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)


TOKENS = torch.randint(0, 8, (5, 16), generator=torch.Generator().manual_seed(0))


def recorded(model, **options):
    """What `record` keeps of TOKENS at every point."""
    with torch.no_grad(), record(model, POINTS, **options) as pooled:
        model(TOKENS)
    return {point: pooled[point] for point in POINTS}


def assert_means(measurement, column):
    """Each row's `column` is the mean of its images' values, and there are no keys but those of rows and UNCHANGED."""
    table, keys = measurement.table, list(measurement.keys)
    of_rows = [tuple(None if pd.isna(value) else value for value in row) for row in table[keys].itertuples(index=False)]
    for key, mean in zip(of_rows, table[column], strict=True):
        values = measurement.of_images[key]
        assert values.dtype == np.float64 and values.ndim == 1
        np.testing.assert_allclose(values.mean(), mean, rtol=1e-6, atol=1e-9)
    assert {key[: len(keys)] for key in measurement.of_images} <= {*of_rows, UNCHANGED}


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts():
    """Also where the tests were started in the background, which a script's shell does with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """On any processor: tests compare features to rounding, and name bfloat16 where they mean it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "gains_by_bfloat16", lambda kind: kind == "cuda")
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint in the port's layout with every tensor, biases too, moved off its initial value."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = ImageGPTForCausalImageModeling(TINY)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        offset = 1 if "ln_" in name else 0
        parameter.data.normal_(offset, 0.3, generator=generator)
    model.save_pretrained(folder)
    greys = np.linspace(-1, 1, 8)
    ImageGPTImageProcessorPil(np.stack([greys] * 3, axis=1), 4).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> ImageGPTForCausalImageModeling:
    return lab.load_model(tiny_folder)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """train (60) and test (40) images of two classes, `dark` and `light`, as folders of PNG files."""
    root = tmp_path_factory.mktemp("images") / "shades"
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 20)):
        for name, low in (("dark", 0), ("light", 100)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 156, (4, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


@pytest.fixture
def train(tiny_images):
    return lab.load_images(tiny_images, "train")


@pytest.fixture
def test(tiny_images):
    return lab.load_images(tiny_images, "test")
