"""The original's checkpoints: files that TensorFlow wrote, its graph in NumPy, damage, and a server on this machine.

`data/openai-*` were written by TensorFlow (`data/make_openai_checkpoints.py`). Where TensorFlow is installed, it reads
them again here, and so it does the reference in `shared`, which the original graph has run on.
"""

import base64
import gzip
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from original import AR, BERT, DATA, original_graph, serving

import igpt_lab as lab
from conftest import SHARED
from igpt_lab.app import cli
from igpt_lab.core import downloads
from igpt_lab.core.hub import CheckpointError
from igpt_lab.images import loading as data
from igpt_lab.models import openai
from igpt_lab.models.config import SIZES
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
from igpt_lab.models.losses import align
from igpt_lab.models.losses import next_pixel_loss as next_pixel_loss_of
from igpt_lab.models.tensorflow_bundle import Bundle

ORACLE = SHARED / "openai-oracle"
oracle_here = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"the original graph's answers are not at {ORACLE}")


@pytest.fixture
def ar(tmp_path) -> Path:
    """A copy of the autoregressive checkpoint's folder, with a palette."""
    folder = shutil.copytree(AR.parent, tmp_path / "ar")
    np.save(folder / "kmeans_centers.npy", np.linspace(-1, 1, 18).reshape(6, 3))
    return folder


# The reader


@pytest.mark.parametrize("prefix", [AR, BERT])
def test_values_are_those_given_to_tensorflow(prefix):
    bundle, count = Bundle(prefix), 0
    with np.load(f"{prefix.parent}.npz") as wanted:
        for name in wanted.files:
            rounded = {"model/wte": torch.bfloat16, "model/ln_f/g": torch.float16} if prefix == BERT else {}
            value = torch.from_numpy(wanted[name]).to(rounded.get(name, torch.float32)).float().numpy()
            assert bundle.read(name).dtype == np.float32
            np.testing.assert_array_equal(bundle.read(name), value)
            count += 1
    others = {"global_step": 7, "model/beta1_power": 0.5} if prefix == AR else {}
    for name, value in others.items():
        assert bundle.read(name) == value and bundle.read(name).shape == ()
    assert count + len(others) + (2 if prefix == AR else 3) == len(bundle.entries)
    assert len(bundle.shards) == (3 if prefix == AR else 1)


def test_what_is_not_read_says_so():
    bundle = Bundle(BERT)
    assert bundle.read("empty").shape == (0, 4)
    with pytest.raises(CheckpointError, match="sliced is partitioned into slices"):
        bundle.read("sliced")
    with pytest.raises(CheckpointError, match="words is of TensorFlow's data type 7"):
        bundle.read("words")


@pytest.mark.parametrize("prefix", [AR, BERT, pytest.param(ORACLE / "model.ckpt-1000000", marks=oracle_here)])
def test_tensorflow_reads_the_same(prefix):
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow, the independent reader, is not installed")
    theirs, ours = tensorflow.train.load_checkpoint(str(prefix)), Bundle(prefix)
    shapes = {name: tuple(shape) for name, shape in theirs.get_variable_to_shape_map().items()}
    assert {name: entry.shape for name, entry in ours.entries.items()} == shapes
    for name in set(shapes) - {"sliced", "words"}:
        np.testing.assert_array_equal(ours.read(name), theirs.get_tensor(name).astype(ours.read(name).dtype))


def bitwise_crc(data: bytes) -> int:
    """CRC-32C by its definition, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_checksum():
    assert bitwise_crc(b"123456789") == 0xE3069283  # RFC 3720's check value


# Checkpoints that are damaged


def opens(folder: Path, name: str = "model.ckpt-7") -> Bundle | None:
    """The bundle, or None after an error of the right kind on one line; any other error fails the test."""
    try:
        bundle = Bundle(folder / name)
        for entry in bundle.entries:
            bundle.read(entry)
        return bundle
    except CheckpointError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return None


def test_an_index_that_is_cut_short(ar):
    index = ar / "model.ckpt-7.index"
    whole = index.read_bytes()
    for length in range(0, len(whole), 3):
        index.write_bytes(whole[:length])
        assert opens(ar) is None, length


def test_a_flipped_bit_is_never_taken_for_a_value(ar):
    whole = {path: path.read_bytes() for path in ar.glob("model.ckpt-7.*")}
    wanted = dict(Bundle(AR).entries)
    generator = np.random.default_rng(0)
    for path, content in whole.items():
        for at in generator.choice(len(content), 60, replace=False):
            damaged = bytearray(content)
            damaged[at] ^= 1 << generator.integers(8)
            path.write_bytes(damaged)
            bundle = opens(ar)
            assert bundle is None or bundle.entries == wanted, (path.name, at)  # in the padding of the footer
        path.write_bytes(content)
    assert opens(ar).entries == wanted


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_an_index_made_up_to_mislead(tmp_path_factory, changes):
    """Changed bytes under a checksum that is right again: values may differ, but nothing else goes wrong."""
    folder = tmp_path_factory.mktemp("made") / "ar"
    shutil.copytree(AR.parent, folder)
    index = bytearray((folder / "model.ckpt-7.index").read_bytes())
    size = first_block(index)
    for at, value in changes:
        index[at % size] = value
    index[size + 1 : size + 5] = struct.pack("<I", masked(index[: size + 1]))
    (folder / "model.ckpt-7.index").write_bytes(index)
    try:
        bundle = Bundle(folder / "model.ckpt-7")
        for name in bundle.entries:
            bundle.read(name)
        openai.openai_config(bundle)
    except CheckpointError as error:
        assert str(folder) in str(error)


def first_block(index: bytes) -> int:
    """Length of the first block: the one whose checksum is right."""
    fits = (n for n in range(8, len(index) - 5) if index[n] == 0 and index[n + 1 : n + 5] == masked_bytes(index, n))
    return next(fits)


def masked_bytes(index: bytes, n: int) -> bytes:
    return struct.pack("<I", masked(index[: n + 1]))


def masked(data: bytes) -> int:
    crc = bitwise_crc(bytes(data))
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 100, b"\xff" * 5000, bytes(range(256)) * 9])
def test_garbage_is_no_index(ar, content):
    for tail in (b"", struct.pack("<Q", 0xDB4775248B80FB57)):
        (ar / "model.ckpt-7.index").write_bytes(content + tail)
        assert opens(ar) is None


def test_a_missing_data_file_is_named(ar, tmp_path):
    (ar / "model.ckpt-7.data-00001-of-00003").unlink()
    with pytest.raises(CheckpointError, match=r"ar lacks model.ckpt-7.data-00001-of-00003; the checkpoint has 3 data"):
        openai.convert_openai(ar, tmp_path / "out")
    (ar / "model.ckpt-7.data-00002-of-00003").unlink()
    with pytest.raises(CheckpointError, match="00001-of-00003 and 1 more"):
        openai.convert_openai(ar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_short_or_damaged_data_file_is_named(ar, tmp_path):
    path = ar / "model.ckpt-7.data-00002-of-00003"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"00002-of-00003 is cut short: 3,455 bytes of at least {len(whole):,}"):
        openai.convert_openai(ar, tmp_path / "out")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="00002-of-00003 is damaged: the checksum of model/.* differs"):
        openai.convert_openai(ar, tmp_path / "out", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ar"]


# Which checkpoint


def test_the_checkpoint_of_a_folder(ar, tmp_path):
    assert openai.find_openai(AR).prefix == openai.find_openai(f"{AR}.index").prefix == AR
    for path in list(ar.glob("model.ckpt-7.*")):
        shutil.copy(path, ar / path.name.replace("-7", "-12"))
    assert openai.find_openai(ar).prefix.name == "model.ckpt-7"  # which its file `checkpoint` calls the latest
    assert openai.find_openai(ar, step=12).prefix.name == "model.ckpt-12"
    with pytest.raises(CheckpointError, match="no checkpoint of step 9: model.ckpt-12, model.ckpt-7;"):
        openai.find_openai(ar, step=9)
    (ar / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match="has 2 checkpoints: model.ckpt-12, model.ckpt-7; choose"):
        openai.find_openai(ar)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no TensorFlow checkpoint: expected model.ckpt-STEP.index"):
            openai.find_openai(folder)


# What is found in it


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def write_index(prefix: Path, shapes: dict[str, tuple[int, ...]], shards: int, dtype: int = 1) -> None:
    """An index of float32 variables dealt out to data files in turn, and data files full of holes."""
    ends, entries = [0] * shards, {b"": field(1, shards)}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        size, shard = 4 * math.prod(shape), i % shards
        dims = b"".join(field(2, field(1, n)) for n in shape)
        entry = field(1, dtype) + field(2, dims) + field(3, shard) + field(4, ends[shard]) + field(5, size)
        entries[name.encode()] = entry + bytes([6 << 3 | 5]) + struct.pack("<I", 0)
        ends[shard] += size
    for shard, end in enumerate(ends):
        with Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").open("wb") as file:
            file.truncate(end)
    table, root = b"", {}
    keys = sorted(entries)
    for start in range(0, len(keys), 20):
        some = {key: entries[key] for key in keys[start : start + 20]}
        root[keys[start : start + 20][-1]] = add_block(table, some)[1]
        table = add_block(table, some)[0]
    table, meta = add_block(table, {})
    table, top = add_block(table, root)
    Path(f"{prefix}.index").write_bytes(table + (meta + top).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))


def add_block(table: bytes, entries: dict[bytes, bytes]) -> tuple[bytes, bytes]:
    """(`table` with one more block, the block's handle)."""
    block = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in entries.items())
    block += struct.pack("<II", 0, 1)
    return table + block + b"\0" + struct.pack("<I", masked(block + b"\0")), varint(len(table)) + varint(len(block))


def shapes_of(config, classes: int = 0) -> dict[str, tuple[int, ...]]:
    d, head = config.n_embd, (config.n_head, config.n_embd // config.n_head, config.n_embd)
    shapes = {"wpe": (config.n_positions, d), "wte": (512, d), "wtet": (512, d), "sos": (d,), "ln_f/g": (d,)}
    for i in range(config.n_layer):
        shapes |= {f"h{i}/attn/{part}_proj": head for part in "qkvc"} | {f"h{i}/ln_{n}/g": (d,) for n in (1, 2)}
        shapes |= {f"h{i}/mlp/c_fc/w": (d, 4 * d), f"h{i}/mlp/c_proj/w": (4 * d, d)}
    shapes |= {"clf/wclf": (classes, d)} if classes else {}
    return {f"model/{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("size", "shards"), [("S", 32), ("M", 32), ("L", 64)])
def test_the_published_sizes_are_read_off_the_shapes(size, shards, tmp_path):
    shapes = shapes_of(SIZES[size])
    shapes |= {f"{name}/Adam": shape for name, shape in shapes.items()} | {"global_step": ()}
    write_index(tmp_path / "model.ckpt-131000", shapes, shards)
    bundle = openai.find_openai(tmp_path)
    config, wanted = openai.openai_config(bundle), SIZES[size].to_dict()
    assert config.to_dict() == wanted | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    text = openai.describe(bundle)
    assert text.startswith(f"size {size}, step 131,000, autoregressive: {config.n_layer} blocks of width")
    assert text.endswith(f"512 colours, 1024 positions (32 pixels a side), no class head, {shards} data files")
    bundle.shards[17].unlink()
    with pytest.raises(CheckpointError, match=f"lacks model.ckpt-131000.data-00017-of-000{shards}"):
        openai.find_openai(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model/wtet": None, "model/h1/ln_2/g": None}, "it lacks model/wtet, model/h1/ln_2/g$"),
        ({"model/h1/mlp/c_proj/w": (8, 24)}, r"in another shape model/h1/mlp/c_proj/w \(8, 24\), not \(24, 8\)"),
        ({"model/h0/attn/c_attn/b": (24,)}, "it has besides model/h0/attn/c_attn/b$"),
        ({"model/wpe": None}, "is not a checkpoint of ImageGPT: it has no model/wpe with 2 axes"),
        (
            {"model/h0/mlp/c_fc/w": (1, 8, 24)},
            "is not a checkpoint of ImageGPT: it has no model/h0/mlp/c_fc/w with 2 axes",
        ),
        ({"model/h99999999999/ln_1/g": (8,)}, "lacks model/h2/attn/q_proj, .*, ...; it has besides model/h99999999999"),
        ({"model/h0/attn/q_proj": (0, 4, 8)}, "another shape model/h0/attn/q_proj"),
    ],
)
def test_another_model_is_refused_by_name(change, words, tmp_path):
    shapes = shapes_of(lab.ImageGPTConfig(n_positions=9, n_embd=8, n_layer=2, n_head=2))
    shapes = {name: (8, 24)[:: (-1) ** ("c_proj/w" in name)] if "mlp" in name else s for name, s in shapes.items()}
    write_index(tmp_path / "m", shapes, 1)
    assert openai.openai_config(Bundle(tmp_path / "m")).n_inner == 24
    write_index(tmp_path / "m", {n: s for n, s in (shapes | change).items() if s is not None}, 1)
    with pytest.raises(CheckpointError, match=words):
        openai.openai_config(Bundle(tmp_path / "m"))


def test_whole_numbers_are_no_weights(tmp_path):
    write_index(tmp_path / "m", shapes_of(lab.ImageGPTConfig(n_positions=9, n_embd=8, n_layer=1, n_head=2)), 1, dtype=3)
    with pytest.raises(CheckpointError, match="no floating-point numbers in model/wpe, "):
        openai.openai_config(Bundle(tmp_path / "m"))


# Conversion


TOKENS = np.random.default_rng(3).integers(0, 6, (4, 9))


@torch.no_grad()
def test_the_converted_model_gives_the_original_numbers(ar, tmp_path):
    out = openai.convert_openai(ar, tmp_path / "out", progress=False)
    with np.load(DATA / "openai-ar.npz") as file:
        variables = dict(file)
    logits, states = original_graph(variables, TOKENS, 2)
    model = lab.load_model(out)
    inputs = align(torch.from_numpy(TOKENS), "sos", model.config)
    np.testing.assert_allclose(model(inputs).logits, logits, atol=1e-5)
    classifier = ImageGPTForImageClassification.from_pretrained(out)
    np.testing.assert_allclose(classifier(inputs).logits, states.mean(1) @ variables["model/clf/wclf"].T, atol=1e-5)
    assert (model.config.num_labels, model.config.bidirectional, model.config.n_inner) == (3, False, None)
    assert not any(tensor.any() for name, tensor in model.named_parameters() if name.endswith("bias"))
    np.testing.assert_array_equal(model.transformer.wte.weight[-1], variables["model/sos"])
    np.testing.assert_allclose(model.processor.clusters, np.load(ar / "kmeans_centers.npy"), rtol=1e-7)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


@torch.no_grad()
def test_a_converted_bert_model_gives_the_original_numbers(tmp_path):
    with pytest.warns(UserWarning, match="no palette: .*kmeans_centers.npy is not there.*convert again"):
        out = openai.convert_openai(BERT.parent, tmp_path / "out", bert=True, progress=False)
    bundle = Bundle(BERT)
    logits, _ = original_graph({name: bundle.read(name) for name in np.load(DATA / "openai-bert.npz")}, TOKENS, 2)
    model = ImageGPTForCausalImageModeling.from_pretrained(out)
    np.testing.assert_allclose(model(torch.from_numpy(TOKENS)).logits, logits, atol=1e-5)
    assert model.config.bidirectional and not model.transformer.wte.weight[-1].any()
    assert not (out / "preprocessor_config.json").exists()


def test_the_expected_kind_is_checked(ar, tmp_path):
    with pytest.raises(CheckpointError, match="a variable model/sos: it is an autoregressive model"):
        openai.convert_openai(ar, tmp_path / "out", bert=True)
    with pytest.raises(CheckpointError, match="no model/sos: it is a BERT model"):
        openai.convert_openai(BERT, tmp_path / "out", bert=False)


def test_the_port_loads_a_converted_folder(ar, tmp_path):
    port = pytest.importorskip("transformers", reason="transformers, the independent answer, is not installed")
    out = openai.convert_openai(ar, tmp_path / "out", progress=False)
    theirs, info = port.ImageGPTForCausalImageModeling.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and set(info["unexpected_keys"]) == {"score.weight"}
    with torch.no_grad():
        inputs = align(torch.from_numpy(TOKENS), "sos", lab.load_model(out).config)
        got, want = lab.load_model(out)(inputs).logits, theirs.eval()(inputs).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


PALETTES = {
    "of another model": (np.zeros((512, 3)), r"float64 \(512, 3\); this model needs floats \(6, 3\)"),
    "in 0 to 255": (np.full((6, 3), 255.0), r"values outside \[-1, 1\]"),
    "not a number": (np.full((6, 3), np.nan), r"values outside \[-1, 1\]"),
    "whole numbers": (np.zeros((6, 3), int), "int64"),
    "objects": (np.array([{}], object), "or no .npy file of numbers"),
}


@pytest.mark.parametrize("name", PALETTES)
def test_palettes_that_do_not_fit(name, ar, tmp_path):
    values, words = PALETTES[name]
    np.save(tmp_path / "p.npy", values)
    with pytest.raises(CheckpointError, match=words):
        openai.convert_openai(ar, tmp_path / "out", palette=tmp_path / "p.npy")
    with pytest.raises(CheckpointError, match="absent.npy is not there"):
        openai.convert_openai(ar, tmp_path / "out", palette=tmp_path / "absent.npy")
    assert not (tmp_path / "out").exists()


def test_converted_again_with_a_palette(ar, tmp_path):
    palette = shutil.move(ar / "kmeans_centers.npy", tmp_path / "p.npy")
    with pytest.warns(UserWarning, match="no palette"):
        out = openai.convert_openai(ar, tmp_path / "out", progress=False)
    openai.convert_openai(ar, out, palette=palette, progress=False)
    assert lab.load_model(out).processor.clusters.shape == (6, 3)
    with pytest.warns(UserWarning, match="no palette"):
        openai.convert_openai(ar, out, progress=False)
    assert not (out / "preprocessor_config.json").exists(), "a palette of another conversion stayed"


@oracle_here
@torch.no_grad()
def test_the_original_graph_ran_on_the_same_weights(tmp_path):
    expected = {name: torch.from_numpy(value) for name, value in np.load(ORACLE / "expected.npz").items()}
    with pytest.raises(CheckpointError, match=r"palette-512.npy is float32 \(512, 3\); this model needs .*\(32, 3"):
        openai.convert_openai(ORACLE, tmp_path / "out", palette=ORACLE / "palette-512.npy")
    np.save(tmp_path / "p.npy", np.load(ORACLE / "palette-512.npy")[:32])
    out = openai.convert_openai(ORACLE, tmp_path / "out", palette=tmp_path / "p.npy", progress=False)
    model, tokens = lab.load_model(out), expected["tokens"].long()
    inputs = align(tokens, "sos", model.config)

    def close(got, want):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    close(model(inputs).logits, expected["logits"])
    close(next_pixel_loss_of(model, tokens), expected["gen_loss"])
    classifier = ImageGPTForImageClassification.from_pretrained(out)
    close(classifier(inputs, labels=expected["labels"].long()).loss, expected["clf_loss"])
    with lab.record(model, ["ln_1", "ln_2", "resid_pre", "resid_post"], pool="mean") as pooled:
        model(inputs)
    for layer in range(4):
        wanted = {"ln_1": "ln_1", "ln_2": "ln_2", "resid_pre": "in", "resid_post": "out"}
        for point, name in wanted.items():
            close(pooled[point][:, layer].cpu(), expected[f"pooled/h{layer}/{name}"])
    close(pooled["ln_1"][:, 4].cpu(), expected["pooled/ln_f"])


# Download, from a server on this machine


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with serving() as server:
        yield server


CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def one(server, tmp_path):
    """Fetches one file of 300,000 random bytes; returns its path."""
    server.files["/f"] = CONTENT
    return lambda: downloads.fetch({f"{server.address}/f": tmp_path / "f"}, progress=False) or tmp_path / "f"


def gets(server) -> list[str | None]:
    """The ranges that were asked for, of each GET."""
    return [asked for method, _, asked in server.log if method == "GET"]


def test_a_dropped_connection_goes_on(server, one, tmp_path):
    server.drops = [6 * 16_384, 3 * 16_384]
    assert one().read_bytes() == CONTENT
    assert gets(server) == [None, "bytes=98304-", "bytes=147456-"]
    one()
    assert len(gets(server)) == 3, "a whole file was fetched again"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_interrupted_download_goes_on_in_the_next_call(server, one, tmp_path, monkeypatch):
    server.drops = [5 * 16_384]

    def stopped(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads.time, "sleep", stopped)
        with pytest.raises(KeyboardInterrupt):
            one()
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:81_920] and not (tmp_path / "f").exists()
    assert one().read_bytes() == CONTENT
    assert gets(server) == [None, "bytes=81920-"]


@pytest.mark.parametrize("change", ["no ranges", "another version", "no version", "weak version"])
def test_begins_again_where_it_cannot_go_on(change, server, one, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    (tmp_path / "f.version").write_text("" if change == "no version" else '"1"')
    server.ranges = change != "no ranges"
    server.tag = {"another version": '"2"', "weak version": 'W/"1"'}.get(change, '"1"')
    server.drops = [163_840]
    assert one().read_bytes() == CONTENT
    again = {"no ranges": "bytes=163840-", "weak version": None}.get(change, "bytes=163840-")
    assert gets(server) == [None if change == "no version" else "bytes=1000-", again]


def test_a_part_that_is_too_long_begins_again(server, one, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT + b"x")
    (tmp_path / "f.version").write_text('"1"')
    assert one().read_bytes() == CONTENT
    assert gets(server) == ["bytes=300001-", None]


def test_passing_faults_are_tried_again_and_others_are_final(server, one, tmp_path):
    server.broken = [503, 500, 429]
    assert one().read_bytes() == CONTENT
    (tmp_path / "f").unlink()
    server.broken = [403]
    with pytest.raises(FileNotFoundError, match=r"/f: the server answers 403 Forbidden"):
        one()
    server.broken = [503] * 20
    with pytest.raises(OSError, match="/f: the server answers 503; 0 bytes are kept; call again to continue"):
        one()
    assert len(server.broken) == 20 - downloads.ATTEMPTS


def test_a_passing_fault_at_the_first_question_is_tried_again(server, one, tmp_path):
    server.broken_heads = [503, 500]
    assert one().read_bytes() == CONTENT
    (tmp_path / "f").unlink()
    server.broken_heads = [503] * 20
    with pytest.raises(OSError, match="/f: the server answers 503; without a network, put f of "):
        one()
    assert len(server.broken_heads) == 20 - downloads.ATTEMPTS


def test_a_file_that_was_stopped_while_it_was_checked_is_not_fetched_again(server, one, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(downloads, "_finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            one()
    assert (tmp_path / "f.part").read_bytes() == CONTENT and len(gets(server)) == 1
    server.extra = {"Content-MD5": base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}
    assert one().read_bytes() == CONTENT and len(gets(server)) == 1
    (tmp_path / "f").rename(tmp_path / "f.part")
    (tmp_path / "f.version").write_text('"of another version"')
    assert one().read_bytes() == CONTENT and len(gets(server)) > 1


def test_what_comes_in_place_of_an_older_file_counts_as_new(server, one, tmp_path):
    (tmp_path / "f").write_bytes(b"an older version" * 20_000)
    server.drops = [16_384] * 10  # more than the attempts without a new byte
    assert one().read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


LIES = [
    (200, {"Content-Length": "9"}, b"too short"),
    (200, {"Content-Length": "300000"}, b"cut off"),
    (200, {"Content-Length": "9", "Content-Type": "text/html; charset=utf-8"}, b"<p>log in"),
    (200, {"Content-Length": "0"}, b""),
    (200, {}, CONTENT[:9]),
    (200, {}, CONTENT + b"x"),
    (200, {"Content-Encoding": "gzip"}, gzip.compress(CONTENT)),
    (200, {"Content-Encoding": "gzip", "Content-Length": str(len(CONTENT))}, gzip.compress(bytes(10**8))),
    (203, {"Content-Length": str(len(CONTENT))}, CONTENT),
    (204, {}, b""),
    (206, {"Content-Range": "bytes 9-17/300000", "Content-Length": "9"}, CONTENT[9:18]),
    (206, {"Content-Range": "bytes 0-8/9", "Content-Length": "9"}, CONTENT[:9]),
    (302, {"Content-Length": "0"}, b""),
    (304, {}, b""),
    (103, {"Content-Length": "0"}, b""),
    (502, {"Content-Length": "9"}, b"no answer"),
]


@pytest.mark.parametrize(("method", "lie"), [*(("GET", lie) for lie in LIES), *(("HEAD", lie) for lie in LIES[2:])])
def test_an_answer_that_is_not_the_file_never_counts_as_it(method, lie, server, one, tmp_path):
    server.lies[method] = lie
    with pytest.raises(OSError, match=f"{server.address}/f: ") as told:
        one()
    assert "\n" not in str(told.value) and not (tmp_path / "f").exists()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(CONTENT)
    server.lies.clear()
    assert one().read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("when", ["during a call", "between calls"])
def test_the_rest_of_another_version_is_noticed(when, server, one, tmp_path):
    server.trusting = True
    if when == "between calls":
        (tmp_path / "f.part").write_bytes(CONTENT[:163_840][::-1])
        (tmp_path / "f.version").write_text('"0"')
    else:
        server.drops, server.files["/f"] = [163_840], CONTENT
        tags = iter(['"0"', '"1"', '"1"'])
        server.gate = lambda: setattr(server, "tag", next(tags))
    assert one().read_bytes() == CONTENT
    assert gets(server)[-2:] == ["bytes=163840-", None]


def test_a_file_that_changes_its_length_is_not_fetched_for_what_was_announced(server, one, tmp_path):
    server.gate = lambda: server.files.update({"/f": CONTENT + b"x"})
    with pytest.raises(OSError, match="/f: the server sends 300001 bytes; it announced 300000"):
        one()
    assert one().read_bytes() == CONTENT + b"x"


def test_two_that_fetch_at_once_do_not_mix(server, one, tmp_path):
    def gate():
        while sum(method == "HEAD" for method, *_ in server.log) < 2:
            time.sleep(0.01)

    server.gate = gate
    with ThreadPoolExecutor(2) as pool:
        assert [path.read_bytes() for path in pool.map(lambda _: one(), range(2))] == [CONTENT] * 2
    assert gets(server) == [None] and [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("header", ["Content-MD5", "x-ms-blob-content-md5", "x-goog-hash", "both"])
def test_digests_that_the_server_names_are_compared(header, server, one, tmp_path):
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    crc = base64.b64encode(bitwise_crc(CONTENT).to_bytes(4)).decode()
    server.extra = {"x-goog-hash" if header == "both" else header: md5}
    if header in ("x-goog-hash", "both"):
        server.extra = {"x-goog-hash": f"crc32c={crc}" + f", md5={md5}" * (header == "both")}
    server.files["/f"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(
        OSError, match="/f: the file does not have the (md5|crc32c) digest that the server names; 0 bytes"
    ):
        one()
    assert len(gets(server)) == downloads.ATTEMPTS and not (tmp_path / "f").exists()
    server.files["/f"] = CONTENT
    assert one().read_bytes() == CONTENT


def test_pauses_grow_while_nothing_comes(server, one, monkeypatch):
    pauses = []
    monkeypatch.setattr(downloads, "PAUSE", 1)
    monkeypatch.setattr(downloads.time, "sleep", pauses.append)
    server.drops = [16_384]
    server.broken = [503, 503]
    assert one().read_bytes() == CONTENT
    assert pauses == [1, 2, 1]


def test_a_disk_that_is_too_small(one, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 200_000))
    with pytest.raises(OSError, match="0.0 GB must be downloaded, and .* has 0.0 GB free"):
        one()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def published(server, ar):
    """The server with igpt-s-bert at step 131000, named as published but tiny, and cifar10's tokens."""
    shapes = shapes_of(lab.ImageGPTConfig(n_positions=4, n_embd=8, n_layer=1, n_head=2))
    del shapes["model/sos"]
    write_index(ar / "model.ckpt-131000", shapes, 32)
    for path in ar.glob("model.ckpt-131000.*"):
        server.files[f"/checkpoints/igpt-s-bert/131000/{path.name}"] = path.read_bytes()
    server.files["/color-clusters/kmeans_centers.npy"] = (ar / "kmeans_centers.npy").read_bytes()
    for part in ("tr", "va", "te"):
        for letter in "XY":
            server.files[f"/datasets/cifar10_{part}{letter}.npy"] = b"x"
    return server


def test_what_is_published_is_fetched(published, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"bert": True, "datasets": ["cifar10"], "address": published.address, "progress": False}
    folder = openai.download_openai("s", 131_000, **options)
    assert folder == tmp_path / "cache/igpt-lab/openai/igpt-s-bert/131000"
    assert len(list(folder.iterdir())) == 34 and len(list((folder.parents[1] / "datasets").iterdir())) == 6
    assert openai.openai_config(openai.find_openai(folder)).bidirectional
    assert {path for _, path, _ in published.log} == set(published.files)
    published.shutdown(), published.server_close()
    assert openai.download_openai("s", 131_000, **options) == folder, "all is there, yet the server was needed"
    (folder / "kmeans_centers.npy").unlink()
    with pytest.raises(OSError) as told:
        openai.download_openai("s", 131_000, **options)
    assert str(told.value) == (
        "no answer (ConnectionError); without a network, put model.ckpt-131000.index to "
        f"model.ckpt-131000.data-00031-of-00032 (33 files) of {published.address}/checkpoints/igpt-s-bert/131000/ into "
        f"{folder}; put kmeans_centers.npy of {published.address}/color-clusters/ into {folder}; put cifar10_trX.npy "
        f"to cifar10_teY.npy (6 files) of {published.address}/datasets/ into {folder.parents[1] / 'datasets'}"
    )


def test_a_file_that_is_not_published_is_named(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="igpt-m/524000/model.ckpt-524000.index: the server answers 404"):
        openai.download_openai("m", 524_000, address=published.address, cache=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "xl"}, r"size 'xl' at step 1000000 is not published: sizes s, m, l, steps \(131000, 262000"),
        ({"size": "s", "step": 100}, "size 's' at step 100 is not published"),
        ({"datasets": ["stl10"]}, "no token set 'stl10' is published; there are cifar10, imagenet"),
        ({"datasets": ["cifar10"], "splits": ["val"]}, "token sets have no split 'val'; they have train, validation"),
        ({"datasets": ["cifar10"], "splits": []}, "nothing to download"),
        ({}, "nothing to download"),
    ],
)
def test_what_is_not_published_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        openai.download_openai(**arguments)


def test_addresses_are_those_of_the_original(monkeypatch):
    asked = {}
    monkeypatch.setattr(openai, "fetch", lambda files, progress: asked.update(files))
    openai.download_openai("l", 1_000_000, datasets=["imagenet"])
    base = "https://openaipublic.blob.core.windows.net/image-gpt"
    assert len(asked) == 64 + 2 + 6
    assert {
        f"{base}/checkpoints/igpt-l/1000000/model.ckpt-1000000.index",
        f"{base}/checkpoints/igpt-l/1000000/model.ckpt-1000000.data-00063-of-00064",
        f"{base}/color-clusters/kmeans_centers.npy",
        f"{base}/datasets/imagenet_vaY.npy",
    } <= set(asked)
    asked.clear()
    openai.download_openai(datasets=["imagenet"], splits=["test"])
    assert set(asked) == {f"{base}/datasets/imagenet_teX.npy", f"{base}/datasets/imagenet_teY.npy"}


# Token sets


@pytest.fixture
def tokens(tmp_path) -> Path:
    """FOLDER/shades: train and test of 16 tokens an image out of 8, labels as one column a class."""
    generator, folder = np.random.default_rng(0), tmp_path / "sets"
    folder.mkdir()
    for part, count in (("tr", 30), ("te", 20)):
        np.save(folder / f"shades_{part}X.npy", generator.integers(0, 8, (count, 16)))
        np.save(folder / f"shades_{part}Y.npy", np.eye(3, dtype=np.float32)[np.arange(count) % 3])
    return folder / "shades"


def test_a_token_set_goes_where_images_go(tokens, tiny, tmp_path):
    for name in (tokens, tokens.parent, tokens.with_name("shades_trX.npy")):
        train = lab.load_images(name, "train")
        assert repr(train) == "<TokenSet shades train: 30 images, 3 classes: 0, 1, 2>"
    assert train.labels.tolist() == [0, 1, 2] * 10
    expected = np.load(tokens.with_name("shades_trX.npy"))
    ids = lab.tokenize(train, tiny.processor)
    assert ids.dtype == np.uint16 and (ids == expected).all()
    some = lab.load_images(tokens, "train", limit=6)
    assert (
        np.bincount(some.labels).tolist() == [2, 2, 2]
        and (lab.tokenize(some, tiny.processor) == expected[some.index]).all()
    )
    assert some.fingerprint != train.fingerprint == data.load_tokens(tokens, "train").fingerprint
    test = lab.load_images(tokens, "test")
    store = lab.extract(tiny, [train, test], store=tmp_path / "stores", device="cpu", progress=False)
    with torch.no_grad():
        inputs = align(torch.from_numpy(np.load(tokens.with_name("shades_teX.npy"))), "sos", tiny.config)
        wanted = tiny(inputs, output_hidden_states=True).hidden_states[-1].mean(1)
    np.testing.assert_allclose(store.layer("ln_1", 3, "test"), wanted, atol=1e-5)
    assert store.labels("test").tolist() == test.labels.tolist()
    assert lab.extract(tiny, test, store=tmp_path / "stores", device="cpu", progress=False).splits == ["test"]


def test_tokens_that_do_not_fit_the_model(tokens, tiny):
    path = tokens.with_name("shades_teX.npy")
    whole = np.load(path)
    for value in (8, -1):
        whole[3, 5] = value
        np.save(path, whole)
        with pytest.raises(ValueError, match=f"shades test row 3 has the token {value}; the palette has 8 colours"):
            lab.tokenize(lab.load_images(tokens, "test"), tiny.processor)
    np.save(path, whole[:, :9])
    with pytest.raises(ValueError, match="shades test has 9 tokens per image; the model has 16 positions"):
        lab.tokenize(lab.load_images(tokens, "test"), tiny.processor)
    with pytest.raises(ValueError, match="shades test holds tokens, and this needs the images"):
        next(lab.load_images(tokens, "test").batches(4))


def test_labels_of_a_token_set(tokens):
    path = tokens.with_name("shades_teY.npy")
    path.unlink()
    assert lab.load_images(tokens, "test").labels is None
    np.save(path, np.arange(20) % 5)
    assert lab.load_images(tokens, "test").label_names == ("0", "1", "2", "3", "4")
    two = np.eye(3)[np.arange(20) % 3]
    two[7, 0] = 1
    for wrong, words in [
        (two, r"row 7 names no class: \[1. 1. 0.\]"),
        (np.zeros((20, 3)), "row 0 names no class"),
        (np.arange(20) - 1, "row 0 names no class: -1"),
        (np.full(20, 0.5), "row 0 names no class: 0.5"),
        (np.full(20, np.nan), "row 0 names no class: nan"),
        (np.full(20, 2**40), "has the class 1099511627776"),
        (np.arange(19), r"is int64 \(19,\); expected classes of 20 images"),
        (np.array(["a"] * 20), "expected classes of 20 images"),
    ]:
        np.save(path, wrong)
        with pytest.raises(ValueError, match=f"shades_teY.npy .*{words}"):
            lab.load_images(tokens, "test")


def test_token_sets_that_are_damaged(tokens):
    path = tokens.with_name("shades_teX.npy")
    whole = path.read_bytes()
    for content in [whole[:-1], b"", b"x" * 99]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="shades_teX.npy cannot be read as a .npy file of numbers"):
            lab.load_images(tokens, "test")
    for array in (np.zeros((2, 3)), np.zeros(4, int), np.array([[{}]], object)):
        np.save(path, array)
        with pytest.raises(ValueError, match="shades_teX.npy"):
            lab.load_images(tokens, "test")
    path.unlink()
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        lab.load_images(tokens, "test")
    shutil.copy(tokens.with_name("shades_trX.npy"), tokens.with_name("other_trX.npy"))
    with pytest.raises(ValueError, match="several token sets: .*other, .*shades; give one"):
        lab.load_images(tokens.parent, "train")
    with pytest.raises(ValueError, match="has no token files; expected NAME_trX.npy"):
        data.load_tokens(tokens.parent.parent)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["'<i8'", "'|V0'", "'<U0'", "'O'", "[('a', '<i8')]", "[]", "'x'", "'<f2'", "(" * 4000]),
    st.sampled_from([0, 1, 3, -1, 2**62, 2**63, 10**30, True, 2.0, "a", None]) | st.integers(),
    st.sampled_from([16, 1, 2**61, 10**30]),
)
@example("'|V0'", 10**30, 1)  # which ends NumPy's own reader, and the process
def test_any_header_of_a_token_set(tokens, dtype, rows, length):
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': ({rows!r}, {length}), }}\n".encode()
    path = tokens.with_name("shades_teX.npy")
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(3 * 16 * 8))
    try:
        assert lab.load_tokens(tokens, "test").tokens.shape == (rows, length)
    except ValueError as error:
        assert "shades_te" in str(error) and "\n" not in str(error)


def test_a_token_set_that_is_cut_while_it_is_in_use_is_an_error(tokens, tiny):
    train, path = lab.load_images(tokens, "train"), tokens.with_name("shades_trX.npy")
    before = train.fingerprint, lab.tokenize(train, tiny.processor)
    path.rename(path.with_name("elsewhere"))  # a file that is replaced stays what it was
    assert (lab.tokenize(train, tiny.processor) == before[1]).all()
    os.truncate(path.with_name("elsewhere"), 200)  # a plain mapping would end the process
    for read in (lambda: lab.tokenize(train, tiny.processor), lambda: train.select(np.arange(3)).fingerprint):
        with pytest.raises(ValueError, match="shades_trX.npy was cut to 200 bytes while it is in use"):
            read()


# The commands


def test_the_commands(ar, published, tmp_path, monkeypatch, capsys):
    assert cli.main(["convert-openai", str(ar), str(tmp_path / "out"), "--step", "7"]) == 0
    told = capsys.readouterr().out
    assert told == (
        "size of its own, step 7, autoregressive: 2 blocks of width 8, 2 heads, 6 colours, 9 positions (3 pixels a "
        f"side), class head of 3, 3 data files\n{tmp_path / 'out'}\n"
    )
    (ar / "kmeans_centers.npy").unlink()
    assert cli.main(["convert-openai", str(AR), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("igpt-lab: no palette: ")
    assert cli.main(["convert-openai", str(AR), str(tmp_path / "out"), "--bert"]) == 1
    assert "it is an autoregressive model" in capsys.readouterr().err
    monkeypatch.setattr(openai, "ADDRESS", published.address)
    monkeypatch.setitem(openai.download_openai.__wrapped__.__kwdefaults__, "address", published.address)
    arguments = "download-openai --size s --step 131000 --bert --datasets cifar10 --cache".split()
    assert cli.main([*arguments, str(tmp_path / "c c")]) == 0
    assert capsys.readouterr().out == (
        f"igpt-lab convert-openai '{tmp_path}/c c/igpt-s-bert/131000' OUT\n"
        f"igpt-lab extract OUT '{tmp_path}/c c/datasets/cifar10'\n"
    )
    assert cli.main(["download-openai"]) == 1
    assert capsys.readouterr().err == "igpt-lab: nothing to download: give a size, token sets, or both\n"
    assert json.loads((tmp_path / "out/config.json").read_text())["n_layer"] == 2


def test_what_a_killed_conversion_left_is_removed_at_the_next(tmp_path):
    out = tmp_path / "imagegpt-s"
    code = (
        "import os, sys; from igpt_lab.models import openai\n"
        "openai._tensor = lambda *_: os.kill(os.getpid(), 9)\n"
        "openai.convert_openai(sys.argv[1], sys.argv[2], progress=False)"
    )
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(AR), str(out)], check=False)
    assert killed.returncode == -9 and len(list(tmp_path.glob(".imagegpt-s.????????"))) == 1
    kept = [tmp_path / name for name in (".imagegpt-s.old", ".imagegpt-sm.abcdefgh", ".imagegpt-s.UPPER_42")]
    for folder in kept:
        folder.mkdir()
    openai.convert_openai(AR, out, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"imagegpt-s", *(folder.name for folder in kept)}
