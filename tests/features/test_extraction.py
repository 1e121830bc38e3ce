"""Stored features against a plain forward pass, and extractions that were stopped."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from igpt_lab.features import prepared
from igpt_lab.features.extraction import extract, extract_share
from igpt_lab.features.hooks import Pooled
from igpt_lab.features.manifest import StoreError
from igpt_lab.features.runner import Runner
from igpt_lab.features.settings import ExtractionSettings
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.upkeep import verify
from igpt_lab.images.image_sets import ImageSet
from igpt_lab.images.loading import load_images, load_tokens
from igpt_lab.images.tokens import tokenize
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.features import Features


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
            features = store.layer("resid_pre", layer, images.split)
            np.testing.assert_allclose(features, expected[:, layer], atol=1e-5)
        np.testing.assert_allclose(store.layer("ln_1", 3, images.split), expected[:, 3], atol=1e-5)
        np.testing.assert_array_equal(store.labels(images.split), images.labels)
        np.testing.assert_array_equal(store.index(images.split), images.index)


def test_points_of_two_widths_in_one_store(tiny, test, tmp_path):
    """Between the block's equations: what the heads gave, through `c_proj`, is what attention adds."""
    points = ["head_out", "attn_out", "mlp_act", "mlp_out"]
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    store = extract(tiny, test, points=points, batch_size=7, **options)
    assert store.layers == dict.fromkeys(points, [0, 1, 2])
    assert not verify(store.path)
    for before, after, part in (("head_out", "attn_out", "attn"), ("mlp_act", "mlp_out", "mlp")):
        product = tiny.transformer.h[1].get_submodule(part).c_proj
        values = store.layer(before, 1, "test")
        assert values.shape == (40, product.weight.shape[0])
        with torch.no_grad():
            want = product(torch.as_tensor(values))
        np.testing.assert_allclose(store.layer(after, 1, "test"), want, atol=1e-5)
    tiny.transformer.h[1].mlp.c_fc.weight.data[:, :8] = 0
    tiny.transformer.h[1].mlp.c_fc.bias.data[:8] = 0
    zeros = extract(tiny, test, points=["mlp_act"], **options).stats()
    assert zeros[zeros.layer == 1].zeros.tolist() == [8 / 32]


@pytest.mark.parametrize("pool", ["mean", "grid:2"])
def test_of_no_image_features_are_as_wide_as_of_some(tiny, pool):
    settings = ExtractionSettings(points=("head_out", "mlp_act"), pool=pool).settled(tiny.config, tiny.device)
    some, none = (Runner(tiny, settings).over(np.zeros((n, 16), np.uint16))[0] for n in (2, 0))
    assert {name: values.shape[1:] for name, values in some.items()} == {
        name: values.shape[1:] for name, values in none.items()
    }
    assert none["mlp_act.0"].shape == (0, 32 * (4 if pool == "grid:2" else 1))


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
    assert len({feature_store.path for feature_store in (store, *others)}) == 6
    other = ImageGPTForCausalImageModeling(replace(tiny.config, activation_function="gelu")).eval()
    other.load_state_dict(tiny.state_dict())
    other.name, other.processor, other.source = tiny.name, tiny.processor, tiny.source
    assert extract(other, test, **options).path not in {feature_store.path for feature_store in (store, *others)}
    monkeypatch.setattr(Runner, "over", lambda *_, **__: pytest.fail("computed again"))
    tiny.config = replace(load_model(tiny_folder).config, resid_pdrop=0.5, id2label={0: "cat", 1: "dog"})
    tiny.config.activation_function = "gelu"  # which changes nothing in a model that is built
    assert extract(tiny, test, **options).path == store.path


def test_a_stopped_extraction_goes_on(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)
    options = {"device": "cpu", "progress": False}
    whole = extract(tiny, train, store=tmp_path / "whole", **options)
    over, calls = Runner.over, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return over(self, *arguments)

    monkeypatch.setattr(Runner, "over", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny, train, store=tmp_path / "stopped", **options)
    again = extract(tiny, train, store=tmp_path / "stopped", **options)
    assert len(calls) == 1 + 1 + 2  # 3 parts; the one that was finished is not computed again
    for split, number in (("train", 0), ("train", 1), ("train", 2)):
        assert again.part(split, number).read_bytes() == whole.part(split, number).read_bytes()


def test_the_estimate_of_bytes_is_within_five_percent(tiny, train, tmp_path, capsys):
    store = extract(tiny, train, store=tmp_path, pool="grid:4", device="cpu")
    said = float(capsys.readouterr().err.split(" MB, ")[0].split()[-1])
    assert said == pytest.approx(sum(path.stat().st_size for path in store.path.rglob("*.parquet")) / 1e6, rel=0.05)


def test_states_at_chosen_positions_are_kept(tiny, test, tmp_path):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    store, other = (extract(tiny, test, pool=pool, **options) for pool in ("at:7,0", "at:0,7"))
    tokens = torch.as_tensor(tokenize(test, tiny.processor, progress=False).astype(np.int64))
    tokens = torch.cat([torch.full((len(tokens), 1), 8), tokens[:, :-1]], 1)
    with torch.no_grad():
        states = tiny(tokens, output_hidden_states=True).hidden_states[3].numpy()
    kept = store.layer("ln_1", 3, "test")
    np.testing.assert_allclose(kept, np.concatenate([states[:, 7], states[:, 0]], axis=1), atol=1e-5)
    assert store.path != other.path
    np.testing.assert_array_equal(other.layer("ln_1", 3, "test"), np.concatenate([kept[:, 8:], kept[:, :8]], axis=1))


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
        ({"pool": "at:0,16"}, "at:0,16: no position 16; expected positions from 0 to 15"),
        ({"pool": "grid:3"}, "multiple of 3"),
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
    options = {"store": tmp_path / "stores", "device": "cpu", "progress": False}
    store = extract(bert, tokens, **options)
    assert store.manifest["key"]["alignment"] == "raw"
    assert extract(tiny, tokens, **options).manifest["key"]["alignment"] == "sos"
    with torch.no_grad():
        want = bert(torch.tensor(tokens.tokens), output_hidden_states=True).hidden_states[-1].mean(1)
    np.testing.assert_allclose(store.layer("ln_1", 3, "test"), want, atol=1e-5)
    with pytest.raises(ValueError, match="alignment 'sos': a bidirectional model has no SOS"):
        extract(bert, tokens, alignment="sos", **options)


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
    options = {"store": tmp_path / "stores", "device": "cpu", "progress": False}
    store = extract(bare, tokens, **options)
    np.testing.assert_array_equal(
        store.layer("ln_1", 2, "test"), extract(tiny, tokens, **options).layer("ln_1", 2, "test")
    )
    assert {store.manifest["key"][name] for name in ("palette", "resample", "crop")} == {"none"}
    np.testing.assert_array_equal(tokenize(tokens, None), tokens.tokens)
    for use in (lambda: extract(bare, test, **options), lambda: tokenize(test, None)):
        with pytest.raises(ValueError, match="shades test holds images, and they need a palette") as told:
            use()
        assert "\n" not in str(told.value)
    np.save(tmp_path / "set_teX.npy", np.full((10, 16), 8))
    with pytest.raises(ValueError, match="has the token 8; the palette has 8 colours"):
        extract(bare, load_tokens(tmp_path / "set"), **options)
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


# Settings


def test_settings_check_themselves():
    assert ExtractionSettings().options() == {
        "points": ["ln_1"], "layers": None, "pool": "mean", "alignment": None, "dtype": None, "batch_size": None,
        "on_bad_image": "error",
    }  # fmt: skip
    for values, message in (
        ({"points": []}, "points is empty"),
        ({"pool": "median"}, "expected one of"),
        ({"alignment": "shift"}, "expected 'sos' or 'raw'"),
        ({"dtype": "float16"}, "overflows"),
        ({"batch_size": 0}, "expected at least 1"),
        ({"on_bad_image": "drop"}, "expected 'error' or 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            ExtractionSettings(**values)


def test_settings_are_settled_by_model_and_device_and_come_back_from_a_manifest(tiny):
    asked = ExtractionSettings(["mlp_out"], layers=np.array([2, 0]), batch_size=3)
    cpu, cuda = (asked.settled(tiny.config, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert (cpu.alignment, cpu.dtype, cuda.dtype, cpu.batch_size) == ("sos", "float32", "bfloat16", 3)
    assert cpu.settled(replace(tiny.config, n_layer=9), torch.device("cuda")) == cpu
    kept = json.loads(json.dumps(cpu.options()))
    assert kept["layers"] == [2, 0] and ExtractionSettings.from_options(kept | {"engine": "dask"}) == cpu
    del kept["on_bad_image"]  # as older stores
    assert ExtractionSettings.from_options(kept) == cpu


def test_a_misspelt_option_gets_the_closest_right_name(tiny, test, tmp_path):
    for call in (extract, lambda *where, **named: extract_share(*where, share=(1, 2), **named)):
        with pytest.raises(TypeError, match="no option 'poolling'; .*did you mean 'pool'?"):
            call(tiny, test, store=tmp_path, poolling="max")


def test_the_options_that_have_calls_of_their_own_warn_and_still_work(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    with pytest.warns(DeprecationWarning, match=r"extract\(part=\) is removed .* use lab.extract_share") as told:
        some = extract(tiny, train, part=(2, 3), **options)
    assert told[0].filename == __file__
    assert [some.has("train", number) for number in range(3)] == [False, True, False]
    with pytest.warns(DeprecationWarning, match=r"extract\(engine=\) is removed .* leave that out"):
        assert extract(tiny, train, engine="local", **options).problems() == []
    with pytest.raises(ValueError, match="expected 'local', or 'dask' with its scheduler"):
        extract(tiny, train, scheduler="tcp://nowhere:1", **options)


def test_a_store_with_parts_to_come_is_read_when_they_are_there(tiny, train, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)
    store = extract_share(tiny, train, share=(1, 3), store=tmp_path, device="cpu", progress=False)
    assert len(store.problems()) == 2 and "rows {'train': 25}" in repr(store)
    for read in (lambda: store.layer("ln_1", 0, "train"), lambda: store.labels("train")):
        with pytest.raises(StoreError, match="part-00001-of-00003.parquet is not finished; run the same extraction"):
            read()


# Only what is asked


@pytest.mark.parametrize("points, layers", [(["ln_1"], [0, 1]), (["resid_pre"], [2]), (["mlp_out", "ln_1"], [1, 0])])
def test_layers_below_are_those_of_a_full_pass_and_the_blocks_above_do_not_run(tiny, test, tmp_path, points, layers):
    options = {"points": points, "device": "cpu", "progress": False}
    whole = extract(tiny, test, store=tmp_path / "whole", **options)
    for block in tiny.transformer.h[max(layers) + 1 :]:
        block.forward = None
    tiny.transformer.ln_f.forward = tiny.lm_head.forward = None
    some = extract(tiny, test, store=tmp_path / "some", layers=layers, **options)
    for point in points:
        for layer in layers:
            np.testing.assert_array_equal(some.layer(point, layer, "test"), whole.layer(point, layer, "test"))


def test_a_model_in_training_mode_is_measured_in_eval_mode_and_left_as_it_was(tiny, test, tmp_path):
    options = {"device": "cpu", "progress": False}
    expected = extract(tiny, test, store=tmp_path / "of eval", **options).layer("ln_1", 2, "test")
    tiny.train()
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    runner = Runner(tiny, ExtractionSettings(alignment="sos", dtype="float32", batch_size=8))
    with pytest.raises(RuntimeError, match="training mode"):
        runner.over(np.zeros((2, 16), np.uint16))
    store = extract(tiny, test, store=tmp_path / "of training", **options)
    np.testing.assert_array_equal(store.layer("ln_1", 2, "test"), expected)
    assert tiny.training and all(module.training for module in tiny.modules())


def test_a_bidirectional_model_is_raw(tiny, test, tmp_path):
    tiny.config = tiny.transformer.config = replace(tiny.config, bidirectional=True)
    assert extract(tiny, test, store=tmp_path, device="cpu", progress=False).key["alignment"] == "raw"
    with pytest.raises(ValueError, match="has no SOS"):
        extract(tiny, test, store=tmp_path, alignment="sos", device="cpu", progress=False)


# Memory


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_where_memory_runs_out_batches_are_halved(tiny, test, tmp_path, monkeypatch, error, capsys):
    options = {"device": "cpu", "progress": False}
    small = extract(tiny, test, store=tmp_path / "small", batch_size=2, **options)
    run, sizes = Pooled.run, []

    def runs_out(self, tokens, **named):
        sizes.append(len(tokens))
        if len(tokens) > most:
            raise error
        run(self, tokens, **named)

    monkeypatch.setattr(Pooled, "run", runs_out)
    most = 3
    store = extract(tiny, test, store=tmp_path / "halved", batch_size=16, **options)
    assert sizes[:4] == [16, 8, 4, 2] and set(sizes[3:]) == {2}
    assert store.part("test", 0).read_bytes() == small.part("test", 0).read_bytes()
    most = 0
    with pytest.raises(MemoryError, match="no memory for a single image of 16 positions"):
        extract(tiny, test, store=tmp_path / "none", **options)
    monkeypatch.setattr(Pooled, "run", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # an error of another kind is what it is
        extract(tiny, test, store=tmp_path / "none", **options)


@pytest.mark.parametrize(
    ("pool", "vectors"),
    [("mean", 1), ("last", 1), ("mean+max", 2), ("grid:2", 4), ("prefix:5", 5), ("at:9,0,9", 3)],
)
def test_a_pass_runs_on_the_meta_device(tiny, pool, vectors, monkeypatch):
    settings = ExtractionSettings(["ln_1", "mlp_out"], pool=pool, alignment="sos", dtype="float32", batch_size=8)
    runner = Runner(tiny.to("meta"), settings)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros_like(self, device="cpu"))  # the one way out
    features, _ = runner.over(np.zeros((20, 16), np.uint16))
    assert features["ln_1.3"].shape == (20, 8 * vectors) and len(features) == 7
    nothing, _ = runner.over(np.zeros((0, 16), np.uint16))  # of a part without an image that can be read
    assert {values.shape for values in nothing.values()} == {(0, 8 * vectors)}


# Images


def count_decoding(monkeypatch):
    decoded, of = [], ImageSet.__getitem__

    def counted(self, position):
        decoded.append(int(self.index[position]))
        return of(self, position)

    monkeypatch.setattr(ImageSet, "__getitem__", counted)
    return decoded


def test_images_are_decoded_once_for_all_models_of_a_palette(tiny, tiny_folder, train, test, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 25)
    decoded, options = count_decoding(monkeypatch), {"store": tmp_path, "device": "cpu", "progress": False}
    extract(tiny, [train, test], **options)
    assert sorted(decoded) == sorted([*range(60), *range(40)])
    decoded.clear()
    random = load_model(tiny_folder, random=True)
    once = extract(random, [train, test], **options)
    assert decoded == []
    fresh = extract(random, [train, test], **options | {"store": tmp_path / "fresh"})
    assert [path.read_bytes() for path in sorted(once.path.rglob("*.parquet"))] == [
        path.read_bytes() for path in sorted(fresh.path.rglob("*.parquet"))
    ]
    decoded.clear()
    random.processor = type(random.processor)(random.processor.clusters[::-1], 4)
    extract(random, test, **options)
    assert len(decoded) == 40


@pytest.mark.parametrize("damage", ["flip", "cut", "other rows", "no Parquet"])
def test_damaged_tokens_are_made_again(tiny, test, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(prepared, "ROWS", 25)
    whole = extract(tiny, test, store=tmp_path / "a", device="cpu", progress=False)
    parts = sorted((tmp_path / "a" / "tokens").rglob("*.parquet"))
    assert len(parts) == 2
    data = bytearray(parts[0].read_bytes())
    if damage == "flip":
        column = pq.ParquetFile(parts[0]).metadata.row_group(0).column(1)
        data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 9] ^= 1
    parts[0].write_bytes(
        {"flip": data, "cut": data[:-9], "other rows": parts[1].read_bytes(), "no Parquet": b"tokens"}[damage]
    )
    decoded = count_decoding(monkeypatch)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokens").rename(tmp_path / "b" / "tokens")
    again = extract(tiny, test, store=tmp_path / "b", device="cpu", progress=False)
    assert sorted(decoded) == list(range(25))
    assert again.part("test", 0).read_bytes() == whole.part("test", 0).read_bytes()


def test_a_corrupt_image_is_named_or_left_out(tiny, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS", 15)
    shutil.copytree(tiny_images / "test", tmp_path / "images")
    for path in [tmp_path / "images/dark/004.png", *(tmp_path / "images/light").glob("01*.png")]:
        path.write_bytes(path.read_bytes()[:40])
    images, options = load_images(tmp_path / "images"), {"device": "cpu", "progress": False}
    with pytest.raises(ValueError, match=r"row 4 \(dark/004.png\) is not a readable image.*on_bad_image='skip'"):
        extract(tiny, images, store=tmp_path / "a", **options)
    store = extract(tiny, images, store=tmp_path / "a", on_bad_image="skip", **options)
    left = [row for row in range(40) if row not in (4, *range(30, 40))]
    assert store.index("test").tolist() == left and store.labels("test").tolist() == images.labels[left].tolist()
    good = extract(tiny, images.select(left), store=tmp_path / "b", **options)
    np.testing.assert_allclose(store.layer("ln_1", 2, "test"), good.layer("ln_1", 2, "test"), atol=1e-6)
    assert store.skipped("test").row.tolist() == [4, *range(30, 40)]
    assert "dark/004.png" in store.skipped("test").reason[0]
    with pytest.raises(ValueError, match="on_bad_image='drop'; expected 'error' or 'skip'"):
        extract(tiny, images, store=tmp_path / "c", on_bad_image="drop", **options)


def test_bad_activations_are_named_by_layer(tiny, test, tmp_path):
    with torch.no_grad():
        tiny.transformer.h[1].mlp.c_proj.bias[3] = float("inf")
    with pytest.warns(UserWarning, match="resid_pre: layers 2, 3 have states that are not finite"):
        store = extract(tiny, test, store=tmp_path, points=["resid_pre"], device="cpu", progress=False)
    assert store.stats().set_index("layer").non_finite.tolist() == [0, 0, 640, 5120]


def test_two_sets_of_one_split_are_refused(tiny, tiny_images, tmp_path):
    named = [load_images(tiny_images / split) for split in ("train", "test")]
    assert [images.split for images in named] == ["train", "test"]
    other = replace(named[1], name="other")
    with pytest.raises(ValueError, match="one store holds the splits of one image set; got .*: extract each alone"):
        extract(tiny, [named[0], other], store=tmp_path, device="cpu", progress=False)
    name = tiny_images.name
    both = [load_images(tiny_images / split, "test") for split in ("train", "test")]
    with pytest.raises(ValueError, match=f"two image sets have the same split: {name} test, {name} test; load"):
        extract(tiny, both, store=tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.iterdir())


def test_splits_with_other_numbers_are_refused(tiny, train, test, tmp_path):
    swapped = replace(test, label_names=test.label_names[::-1])
    with pytest.raises(ValueError, match=r"\(train: dark, light; test: light, dark\); load them from one source"):
        extract(tiny, [train, swapped], store=tmp_path, device="cpu", progress=False)


def test_a_store_names_its_classes_and_its_key_does_not(tiny, train, tmp_path):
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    store = extract(tiny, train, **options)
    assert store.classes == ("dark", "light") and "classes" not in store.key
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["classes"]
    file.write_text(json.dumps(manifest))  # as an older version wrote it
    old = extract(tiny, train, **options)
    assert old.path == store.path and old.classes == ()
    assert Features.from_store(old, "train").names == () and Features.from_store(store, "train").names == store.classes
    file.write_text(json.dumps(manifest | {"classes": [1]}))
    with pytest.raises(StoreError, match="is not a manifest"):
        FeatureStore.open(store.path)


def test_features_do_not_depend_on_the_user_s_autocast(tiny, test, tmp_path):
    stores = []
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            stores.append(extract(tiny, test, store=tmp_path / str(on), device="cpu", progress=False))
    assert stores[0].part("test", 0).read_bytes() == stores[1].part("test", 0).read_bytes()


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_weights_that_are_not_float32_are_refused(weights, asked, tiny, test, tmp_path):
    own = str(weights).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"weights are {own}, and dtype='{asked or 'float32'}' is of float32 weights; model"
    ):
        extract(tiny.to(weights), test, store=tmp_path, device="cpu", dtype=asked, progress=False)
    assert not list(tmp_path.iterdir())
