"""What the explorer's panel of the network is sent, compared with the lens and the attention that it is made of."""

import json
import shutil

import numpy as np
import pytest
import torch
from ipywidgets import Widget

import igpt_lab as lab
from igpt_lab.app.explorer import network as module
from igpt_lab.app.explorer.opening import explore
from igpt_lab.app.explorer.rows import HELD
from igpt_lab.app.explorer.widget import CHOICES
from igpt_lab.explaining.attention import attention_from
from igpt_lab.explaining.lenses import lens_strip
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

KINDS = {"true": "u1", "expected": "u1", "nats": "<f4", "weights": "<f4", "sos": "<f4"}
SHAPE = {"vocab_size": 9, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A copy of its own, which a test may take away."""
    return shutil.copytree(tiny_folder, tmp_path_factory.mktemp("copy") / "tiny")


@pytest.fixture(scope="module")
def store(folder, tiny_images, tmp_path_factory):
    sets = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    return lab.extract(lab.load_model(folder), sets, store=tmp_path_factory.mktemp("s"), progress=False)


@pytest.fixture(autouse=True)
def closed():
    """No explorer outlives its test: those of one store share its model."""
    yield
    Widget.close_all()


@pytest.fixture
def seen(store, tmp_path):
    return explore(store, out=tmp_path, progress=False)


def ask(explorer, image=0, layer=1, pixel=6) -> tuple[dict, dict[str, np.ndarray]]:
    """What the browser gets: the facts, and the arrays by name."""
    told = []
    explorer.send = lambda content, buffers=None: told.append((content, buffers))
    explorer._handle_custom_msg({"do": "look", "image": image, "layer": layer, "pixel": pixel}, [])
    (content, buffers), *more = told
    assert not more and json.loads(json.dumps(content)) == content
    kinds = list(KINDS.items())[: len(buffers)]
    arrays = {name: np.frombuffer(data, kind) for (name, kind), data in zip(kinds, buffers, strict=True)}
    return content["look"], arrays


def state_of(explorer) -> dict:
    return {name: getattr(explorer, name) for name in (*CHOICES, "facts", "problem", "busy", "predicted", "near")}


@pytest.mark.parametrize("split", ["test", HELD])
def test_what_is_sent_is_the_strip_and_the_attention(seen, folder, tiny_images, split):
    seen.split = split
    model, images = lab.load_model(folder), lab.load_images(tiny_images, "test" if split == "test" else "train")
    row = seen.shown.index[3]
    tokens = lab.tokenize(images, model.processor, progress=False)[list(images.index).index(row)]
    strip = lens_strip(model, tokens)
    for layer in range(model.config.n_layer):
        facts, sent = ask(seen, image=3, layer=layer, pixel=6)
        assert facts == {"split": split, "image": 3, "layer": layer, "pixel": 6, "side": 4, "heads": 2}
        rows = strip[strip.layer == layer]
        np.testing.assert_array_equal(sent["true"].reshape(16, 3), rows[["true_red", "true_green", "true_blue"]])
        np.testing.assert_array_equal(sent["expected"].reshape(16, 3), rows[["red", "green", "blue"]])
        np.testing.assert_allclose(sent["nats"], rows.nats, rtol=1e-5)
        for head, looks in attention_from(model, tokens, 6, layers=[layer]).groupby("head"):
            weights = sent["weights"].reshape(2, 16)[head]
            np.testing.assert_allclose(weights, looks.weight, atol=1e-6)
            assert np.isnan(weights).tolist() == [False] * 6 + [True] * 10  # the pixel itself is not seen either
            assert sent["sos"][head] == pytest.approx(looks.sos.iloc[0], abs=1e-6)
            assert weights[:6].sum() + sent["sos"][head] == pytest.approx(1, abs=1e-5)


def test_after_the_last_block_there_is_a_lens_and_no_head(seen, folder):
    facts, sent = ask(seen, layer=3, pixel=None)
    assert facts["heads"] == 0 and facts["pixel"] == 10 and not len(sent["weights"])
    model = lab.load_model(folder)
    tokens = module.tokens_of(model, seen._sources["test"].images.select([0]))
    own = np.log(2) * lab.surprisal(model, tokens, progress=False)[0]  # nats
    np.testing.assert_allclose(sent["nats"], own, rtol=1e-4)  # at layer L the lens is the model


def test_the_model_is_loaded_once_when_it_is_first_asked_and_an_image_runs_once(seen, monkeypatch):
    calls = {"load_model": 0, "lens_strip": 0}

    def counted(name):
        function = getattr(module, name)

        def call(*args, **named):
            calls[name] += 1
            return function(*args, **named)

        return call

    for name in calls:
        monkeypatch.setattr(module, name, counted(name))
    seen.layer, seen.image = 2, 5
    assert calls == {"load_model": 0, "lens_strip": 0}
    before = state_of(seen)
    for layer, pixel in [(0, 3), (1, 3), (1, 9)]:
        assert "problem" not in ask(seen, 5, layer, pixel)[0]
    assert calls == {"load_model": 1, "lens_strip": 1} and state_of(seen) == before
    ask(seen, 6)
    assert calls == {"load_model": 1, "lens_strip": 2}


def test_another_model_is_refused(store, folder, tmp_path):
    with pytest.raises(ValueError, match=r"another model: tiny-random has the weights \w{8}; expected those of tiny, "):
        explore(store, model=lab.load_model(folder, random=True))
    turned = lab.load_model(folder)
    turned.processor = ImageGPTImageProcessorPil(turned.processor.clusters[::-1].copy(), 4)
    with pytest.raises(ValueError, match=r"reads images differently than the model of the store: palette \w{8}"):
        explore(store, model=turned)
    with pytest.raises(ValueError, match=r"a model of torch.bfloat16; expected one of torch.float32"):
        explore(store, model=lab.load_model(folder).to(torch.bfloat16))
    with pytest.raises(TypeError, match="model=3 is of type int; expected a model as lab.load_model"):
        explore(store, model=3)


def test_a_model_that_has_changed_since_is_refused_by_the_panel(seen, folder, monkeypatch):
    other = lab.load_model(folder, random=True)
    monkeypatch.setattr(module, "load_model", lambda *_, **__: other)
    before = state_of(seen)
    facts, sent = ask(seen)
    assert facts["problem"].startswith("the store is of another model: tiny-random") and not sent
    assert state_of(seen) == before


def test_without_a_model_the_panel_says_what_to_do_and_one_that_is_given_is_used(store, seen, folder, tmp_path):
    before = state_of(seen)
    model = lab.load_model(folder)
    away = folder.rename(folder.with_name("away"))
    try:
        facts, sent = ask(seen)
        assert facts["problem"].startswith("the store's model is not available: there is no model ") and not sent
        assert facts["problem"].endswith(module.WAY_OUT) and "\n" not in facts["problem"]
        assert state_of(seen) == before
        for source in (model, away):
            own = explore(store, out=tmp_path, progress=False, model=source)
            facts, sent = ask(own)
            assert "problem" not in facts and len(sent["weights"]) == 32
            assert own.pictures == seen.pictures  # by its own palette: that of the folder is gone
        assert explore(store, out=tmp_path, progress=False, model=away).network.model is own.network.model is not model
    finally:
        away.rename(folder)


def test_a_model_that_is_elsewhere_is_not_asked_for(seen, monkeypatch):
    monkeypatch.setitem(seen.store.manifest["source"], "model", {"name": "somebody/igpt"})
    reason = "the store's model is not available: model 'somebody/igpt' is not on this disk"
    assert ask(seen)[0]["problem"] == f"{reason}. {module.WAY_OUT}"


def test_what_is_not_there_is_a_line_and_disturbs_nothing(seen):
    before = state_of(seen)
    for asked, words in [
        ({"pixel": 16}, "position 16; expected that of a pixel, 0..15"),
        ({"image": 40}, "image 40; expected one of the 40 that are shown"),
        ({"image": -1}, "image -1; expected one of the 40 that are shown"),
    ]:
        facts, sent = ask(seen, **asked)
        assert facts["problem"] == words and not sent
    assert state_of(seen) == before and "problem" not in ask(seen)[0]


def test_a_store_whose_images_are_gone(seen):
    seen._sources["test"] = "the images are no longer those of the store"
    assert ask(seen)[0]["problem"] == "the images are no longer those of the store"


def test_a_bidirectional_model_has_nothing_to_show(tiny, tiny_images, tmp_path):
    bert = ImageGPTForCausalImageModeling(ImageGPTConfig(**SHAPE, bidirectional=True))
    bert.save_pretrained(tmp_path / "bert")
    tiny.processor.save_pretrained(tmp_path / "bert")
    sets = [lab.load_images(tiny_images, split) for split in ("train", "test")]
    store = lab.extract(tmp_path / "bert", sets, store=tmp_path / "s", progress=False)
    facts, sent = ask(explore(store, out=tmp_path, progress=False))
    assert facts["problem"].startswith("a bidirectional (BERT) model predicts hidden pixels") and not sent
