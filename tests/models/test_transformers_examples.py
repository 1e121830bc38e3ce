"""The code in the documentation of transformers' ImageGPT runs on this package with only its import line changed."""

import doctest
import io
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from transformers_peer import transformers

import igpt_lab as lab

SIDE, COLOURS = 4, 8
HUB_NAME = "openai/imagegpt-small"
doctest.register_optionflag("IGNORE_RESULT")  # transformers' documentation uses one that Python has not


def example(documented) -> str:
    """The example in a docstring of transformers, as source, importing from this package instead."""
    lines = [one.source for one in doctest.DocTestParser().get_examples(documented.__doc__)]
    (place,) = (i for i, line in enumerate(lines) if line.startswith("from transformers import"))
    line = lines[place].replace("from transformers import", "from igpt_lab import")
    lines[place] = line.replace("AutoImageProcessor", "ImageGPTImageProcessor as AutoImageProcessor")
    return "".join(lines)


def run(documented) -> dict:
    """The variables that the example leaves."""
    source, variables = example(documented), {}
    exec(compile(source, documented.__qualname__, "exec"), variables)
    return variables


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """No network: the Hub gives a tiny checkpoint, any address a photograph of 60 x 40 pixels."""
    config = lab.ImageGPTConfig(vocab_size=COLOURS + 1, n_positions=SIDE**2, n_embd=8, n_layer=2, n_head=2)
    lab.ImageGPTForCausalImageModeling(config).save_pretrained(tmp_path)
    palette = np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3))
    lab.ImageGPTImageProcessor(clusters=palette, size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    photograph = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photograph, "JPEG")

    def download(name, **_):
        assert name == HUB_NAME
        return str(tmp_path)

    @contextmanager
    def stream(method, url):
        assert (method, url[:7]) == ("GET", "http://")
        yield type("Response", (), {"read": staticmethod(photograph.getvalue)})

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.utils").httpx, "stream", stream)
    return tmp_path


@pytest.fixture
def without_screen():
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def test_the_example_of_the_configuration():
    left = run(transformers().ImageGPTConfig)
    assert left["configuration"] == lab.ImageGPTConfig() == left["model"].config
    assert type(left["model"]) is lab.ImageGPTModel
    assert len(left["model"].h) == 24


def test_the_example_of_the_trunk(hub):
    left = run(transformers().ImageGPTModel.forward)
    assert left["inputs"]["input_ids"].shape == (1, SIDE**2)
    assert 0 <= left["inputs"]["input_ids"].min() and left["inputs"]["input_ids"].max() < COLOURS
    assert left["last_hidden_states"].shape == (1, SIDE**2, 8)
    assert left["last_hidden_states"].isfinite().all()


def test_the_example_of_the_classifier(hub):
    with pytest.warns(UserWarning, match="score.weight"):  # the checkpoint has no such head, as that on the Hub
        left = run(transformers().ImageGPTForImageClassification.forward)
    assert type(left["model"]) is lab.ImageGPTForImageClassification
    assert left["logits"] is left["outputs"]["logits"]
    assert left["logits"].shape == (1, 2)
    assert left["logits"].isfinite().all()


def test_the_example_of_next_pixel_prediction_draws_images(hub, without_screen):
    left = run(transformers().ImageGPTForCausalImageModeling.forward)
    output, images = left["output"].cpu(), left["samples_img"]
    assert output.shape == (4, SIDE**2 + 1)
    assert (output[:, 0] == COLOURS).all()
    assert 0 <= output[:, 1:].min() and output[:, 1:].max() < COLOURS
    assert len(torch.unique(output[:, 1:])) > 1
    assert [(image.shape, image.dtype) for image in images] == [((SIDE, SIDE, 3), np.uint8)] * 4
    palette = lab.ImageGPTImageProcessor.from_pretrained(hub).decode(output[:, 1:].numpy())
    np.testing.assert_array_equal(images, palette)
    drawn = [ax.images[0].get_array() for ax in left["axes"]]
    np.testing.assert_array_equal(drawn, images)
