"""Models whose files hold anything: each loads, or ends in one line that names the file before anything is made."""

import json
import struct
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import igpt_lab as lab
from conftest import TINY
from igpt_lab.core.hub import CheckpointError
from igpt_lab.images.processor.settings import DEFAULTS
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.config_files import ALIASES
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 30) | st.floats() | st.text(max_size=9)
    | st.sampled_from([10**9, 10**18, 10**400, 1e308, -1, 8.0, "8", "imagegpt", "__class__", [], {}])
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)
CONFIG_FIELDS = [*(f.name for f in fields(ImageGPTConfig)), *ALIASES, "label2id", "model_type", "dtype", "other"]
PROCESSOR_FIELDS = ["clusters", *DEFAULTS, "other"]
LN_F = "transformer.ln_f.weight"
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model."""
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def loads_or_names(folder, name, content):
    """Load the model with this content of a file, or get one short line that names the folder's file; put it back."""
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        return lab.load_model(folder)
    except CheckpointError as error:
        text = str(error)
        assert str(folder) in text and "\n" not in text and len(text) < 6000, text
        return text
    finally:
        (folder / name).write_bytes(whole)


@quick
@given(st.dictionaries(st.sampled_from(CONFIG_FIELDS), ANYTHING, min_size=1, max_size=2))
@example({"id2label": [1]})
@example({"label2id": {"a": [0]}, "id2label": None})
@example({"label2id": {"a": float("inf")}, "id2label": None})
@example({"n_embd": float("nan")})
@example({"layer_norm_epsilon": True})
@example({"activation_function": ["relu"]})
@example({"problem_type": {}})
@example({"scale_attn_weights": "no"})
@example({"resid_pdrop": 10**400})
def test_any_config(folder, values):
    loads_or_names(folder, "config.json", json.dumps(TINY.to_dict() | values).encode())


@quick
@given(st.dictionaries(st.sampled_from(PROCESSOR_FIELDS), ANYTHING, min_size=1, max_size=2))
@example({"clusters": [[0, 0, 0], [0]]})
@example({"clusters": [[0, 0, "0"]] * 8})
@example({"rescale_factor": 10**400})
@example({"resample": 9})
@example({"do_resize": "no"})
@example({"size": {"height": 10**9, "width": 10**9}})
@example({"size": {"height": 4, "width": 2}})
def test_any_preprocessor_config(folder, values):
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    loads_or_names(folder, "preprocessor_config.json", json.dumps(saved | values).encode())


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"", b"\0", b"nul", b"9" * 10_000, b"\xef\xbb\xbf{}"]
)
def test_json_that_is_none(name, content, folder):
    assert f"{name} is not JSON" in loads_or_names(folder, name, content)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_labels", 10**9), ("n_layer", 10**6), ("n_layer", 9_999), ("n_positions", 10**12), ("n_embd", 10**9),
     ("vocab_size", 10**15), ("n_inner", 10**12), ("n_head", 10**12)],
)  # fmt: skip
def test_a_size_that_no_file_can_back_is_refused_by_name(field, value, folder, monkeypatch):
    values = TINY.to_dict() | {"id2label": None, "label2id": None, field: value}
    monkeypatch.setattr(ImageGPTForCausalImageModeling, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    text = loads_or_names(folder, "config.json", json.dumps(values).encode())
    assert text.startswith(f"{folder / 'config.json'}: {field} is ")


def test_a_model_that_memory_cannot_hold_is_not_begun():
    with pytest.raises(ValueError, match=r"n_layer 9999, n_embd 1048576, .*GB of weights, and this machine has"):
        ImageGPTForCausalImageModeling(ImageGPTConfig(n_layer=9_999, n_embd=2**20, n_head=1))
    with pytest.raises(ValueError, match=r"num_labels is 1000000000; expected a whole number above 0, at most"):
        ImageGPTConfig(num_labels=10**9)


@quick
@given(st.dictionaries(st.sampled_from([LN_F, "__metadata__", "x"]), ANYTHING, min_size=1), st.data())
def test_any_header_of_safetensors(folder, values, data):
    whole = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    if data.draw(st.booleans()):  # odd within an entry
        part = data.draw(st.sampled_from(sorted(header[LN_F])))
        values = {LN_F: header[LN_F] | {part: next(iter(values.values()))}}
    text = json.dumps(header | values).encode()
    loads_or_names(folder, "model.safetensors", struct.pack("<Q", len(text)) + text + whole[8 + size :])


@quick
@given(ANYTHING | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3)}))
@example({"weight_map": {"a": "x" * 300 + ".safetensors"}})
@example({"weight_map": {"a": "\0.safetensors"}})
def test_any_index(folder, content):
    index = folder / "model.safetensors.index.json"
    index.touch()
    weights = folder / "model.safetensors"
    if weights.exists():
        weights.rename(folder / "gone")
    loads_or_names(folder, index.name, json.dumps(content).encode())


def test_an_old_file_that_unfolds_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    huge = torch.zeros(1).expand(2**20, 2**20)  # one number, repeated
    torch.save(state | {"transformer.wte.weight": huge}, folder / "odd.bin")
    text = loads_or_names(folder, "pytorch_model.bin", (folder / "odd.bin").read_bytes())
    assert "pytorch_model.bin has " in text and "its tensors 4,398,046," in text
