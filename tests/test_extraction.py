"""Stored features against a plain forward pass, and extractions that were stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_lab import extraction
from igpt_lab.data import load_images, load_tokens, tokenize
from igpt_lab.extraction import extract, load_model
from igpt_lab.model import ImageGPTForCausalImageModeling


def plain(model, images, alignment="sos"):
    """Mean over positions of the port's hidden states, un-normed but the last: float32 (N, L + 1, D)."""
    tokens = torch.as_tensor(tokenize(images, model.processor, progress=False).astype(np.int64))
    if alignment == "sos":
        tokens = torch.cat([torch.full((len(tokens), 1), 8), tokens[:, :-1]], 1)
    with torch.no_grad():
        return torch.stack(model(tokens, output_hidden_states=True).hidden_states, 2).mean(1).numpy()


@pytest.mark.parametrize("alignment", ["sos", "raw"])
def test_equals_a_plain_forward(tiny, train, test, tmp_path, alignment):
    store = extract(
        tiny, [train, test], store=tmp_path, points=["resid_pre", "ln_1"], alignment=alignment, batch_size=7,
        device="cpu", progress=False,
    )  # fmt: skip
    for images in (train, test):
        expected = plain(tiny, images, alignment)
        for layer in range(3):
            found = store.layer("resid_pre", layer, images.split)
            np.testing.assert_allclose(found, expected[:, layer], atol=1e-5)
        np.testing.assert_allclose(store.layer("ln_1", 3, images.split), expected[:, 3], atol=1e-5)
        np.testing.assert_array_equal(store.labels(images.split), images.labels)
        np.testing.assert_array_equal(store.index(images.split), images.index)


def test_found_again_and_kept_apart(tiny, tiny_folder, test, tmp_path, monkeypatch):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    store = extract(tiny_folder, test, **options)
    others = [
        extract(load_model(tiny_folder, random=True), test, **options),
        extract(tiny, test, alignment="raw", **options),
        extract(tiny, test, pool="max", **options),
        extract(tiny, test.select(np.arange(30)), **options),
        extract(tiny, test, dtype="bfloat16", **options),
    ]
    assert len({each.path for each in (store, *others)}) == 6
    tiny.config = replace(tiny.config, activation_function="gelu")
    assert extract(tiny, test, **options).path not in {each.path for each in (store, *others)}
    monkeypatch.setattr(extraction, "_pooled", lambda *_, **__: pytest.fail("computed again"))
    tiny.config = replace(load_model(tiny_folder).config, resid_pdrop=0.5, id2label={0: "cat", 1: "dog"})
    assert extract(tiny, test, **options).path == store.path


def test_a_stopped_extraction_goes_on(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "ROWS", 25)
    options = {"device": "cpu", "progress": False}
    whole = extract(tiny, train, store=tmp_path / "whole", **options)
    pooled, calls = extraction._pooled, []

    def stops(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pooled(*arguments, **named)

    monkeypatch.setattr(extraction, "_pooled", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny, train, store=tmp_path / "stopped", **options)
    again = extract(tiny, train, store=tmp_path / "stopped", **options)
    assert len(calls) == 1 + 1 + 2  # 3 parts; the one that was finished is not computed again
    for split, number in (("train", 0), ("train", 1), ("train", 2)):
        assert again.part(split, number).read_bytes() == whole.part(split, number).read_bytes()


def test_the_estimate_of_bytes_is_within_five_percent(tiny, train, tmp_path, capsys):
    store = extract(tiny, train, store=tmp_path, pool="grid:4", device="cpu")
    said = float(capsys.readouterr().err.split(" MB, about")[0].split()[-1])
    assert said == pytest.approx(sum(path.stat().st_size for path in store.path.rglob("*.parquet")) / 1e6, rel=0.05)


def test_images_without_labels(tiny, tiny_images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((tiny_images / "test/dark").iterdir())):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    images = load_images(flat, "test")
    store = extract(tiny, images, store=tmp_path, device="cpu", progress=False)
    assert store.labels("test") is None and len(store.index("test")) == 20


def test_bad_input_before_any_work(tiny, train, tiny_images, tmp_path):
    for options, message in (
        ({"points": ["ln1"]}, "did you mean 'ln_1'"),
        ({"alignment": "shift"}, "expected 'sos' or 'raw'"),
        ({"pool": "median"}, "expected one of"),
        ({"layers": [9]}, "layers 0..3"),
        ({"dtype": "float16"}, "overflows"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(tiny, train, store=tmp_path, **options)
    with pytest.raises(ValueError, match="unknown-model"):
        extract("unknown-model", train, store=tmp_path)
    twice = [load_images(tiny_images / "test", split) for split in ("train", "test")]
    with pytest.raises(ValueError, match="the same images for train and test"):
        extract(tiny, twice, store=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tokens(tmp_path):
    """A token set of 10 images that fits `tiny`."""
    np.save(tmp_path / "set_teX.npy", np.random.default_rng(0).integers(0, 8, (10, 16)))
    return load_tokens(tmp_path / "set")


def test_a_bidirectional_model_reads_pixels_as_they_are(tiny, tokens, tmp_path):
    bert = ImageGPTForCausalImageModeling(replace(tiny.config, bidirectional=True))
    bert.load_state_dict(tiny.state_dict())
    bert.eval().name, bert.processor = "bert", tiny.processor
    how = {"store": tmp_path / "stores", "device": "cpu", "progress": False}
    store = extract(bert, tokens, **how)
    assert store.manifest["key"]["alignment"] == "raw"
    assert extract(tiny, tokens, **how).manifest["key"]["alignment"] == "sos"
    with torch.no_grad():
        want = bert(torch.tensor(tokens.tokens), output_hidden_states=True).hidden_states[-1].mean(1)
    np.testing.assert_allclose(store.layer("ln_1", 3, "test"), want, atol=1e-5)
    with pytest.raises(ValueError, match="alignment 'sos': a bidirectional model has no SOS"):
        extract(bert, tokens, alignment="sos", **how)


def test_crops_are_kept_apart_and_named(tiny, tiny_folder, tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    (tmp_path / "wide").mkdir()
    for i in range(3):
        Image.fromarray(wide >> i).save(tmp_path / "wide" / f"{i}.png")
    stores = {}
    for crop in ("squash", "center"):
        tiny.processor = type(tiny.processor).from_pretrained(tiny_folder, crop=crop)
        images = load_images(tmp_path / "wide", "test")
        stores[crop] = extract(tiny, images, store=tmp_path / "stores", device="cpu", progress=False)
        assert stores[crop].manifest["key"]["crop"] == crop
    assert stores["squash"].path != stores["center"].path
    squashed, cropped = (store.layer("ln_1", 3, "test") for store in stores.values())
    assert np.abs(squashed - cropped).max() > 1e-3


def test_without_a_palette_tokens_are_what_can_be_fed(tiny, tokens, test, tmp_path, tiny_folder):
    tiny.save_pretrained(tmp_path / "bare")
    bare = load_model(tmp_path / "bare")
    assert bare.processor is None
    how = {"store": tmp_path / "stores", "device": "cpu", "progress": False}
    store = extract(bare, tokens, **how)
    np.testing.assert_array_equal(store.layer("ln_1", 2, "test"), extract(tiny, tokens, **how).layer("ln_1", 2, "test"))
    assert {store.manifest["key"][name] for name in ("palette", "resample", "crop")} == {"none"}
    np.testing.assert_array_equal(tokenize(tokens, None), tokens.tokens)
    for use in (lambda: extract(bare, test, **how), lambda: tokenize(test, None)):
        with pytest.raises(ValueError, match="shades test holds images, and they need a palette") as told:
            use()
        assert "\n" not in str(told.value)
    np.save(tmp_path / "set_teX.npy", np.full((10, 16), 8))
    with pytest.raises(ValueError, match="has the token 8; the palette has 8 colours"):
        extract(bare, load_tokens(tmp_path / "set"), **how)
    broken = tmp_path / "bare" / "preprocessor_config.json"
    broken.write_text('{"size": 4, "do_color_quantize": false}')
    assert load_model(tmp_path / "bare").processor is None


def test_model_and_processor_come_from_one_revision(tiny_folder, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_model("openai/imagegpt-small", revision="abc123")
    assert model.name == "imagegpt-small" and len(model.processor.clusters) == 8
    name = ("openai/imagegpt-small", "abc123")
    assert asked == [(*name, ["*.json", "model*.safetensors"]), (*name, ["*.json"])]
    type(model.processor).from_pretrained("openai/imagegpt-small", revision="v2")
    assert asked[2:] == [("openai/imagegpt-small", "v2", ["*.json"])]


def test_a_palette_of_another_model_is_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    type(tiny.processor)(tiny.processor.clusters[:5], 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="5 colours.*8 colours"):
        load_model(tmp_path)
