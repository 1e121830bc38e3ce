"""`checkpoints`: what fits is loaded, what does not is named, and nothing in a file is executed."""

import json
import os
import pickle

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt_lab.core import hub
from igpt_lab.core.hub import CheckpointError
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

TINY = ImageGPTConfig(vocab_size=5, n_positions=4, n_embd=8, n_layer=2, n_head=2, num_labels=3)
TOKENS = torch.tensor([[4, 0, 1, 2], [4, 3, 3, 0]])


@pytest.fixture
def model():
    model = ImageGPTForCausalImageModeling(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    return model.save_pretrained(tmp_path / "model")


@pytest.fixture
def no_hub(monkeypatch):
    def fail(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def load(folder, cls=ImageGPTForCausalImageModeling):
    return cls.from_pretrained(folder)


def change(folder, **tensors):
    """Replace tensors of the folder's weights file (`__` for `.`); None takes one away."""
    state = load_file(folder / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")


# Sources


def test_bundled_names(folder, monkeypatch, no_hub):
    monkeypatch.setattr(hub, "BUNDLED", folder.parent)
    assert hub.bundled() == ["model"]
    assert hub.resolve("model") == folder
    with pytest.raises(CheckpointError, match=r"no model 'modle'; expected a bundled name .*; did you mean 'model'\?"):
        load("modle")
    with pytest.raises(CheckpointError, match=r"no model 'zzz'; expected a bundled name \(model\), a folder"):
        load("zzz")


def test_every_bundled_model_loads():
    for name in hub.bundled():
        assert load(name).config.n_layer > 0


def test_a_hub_name_without_a_network_says_what_was_tried(no_hub):
    words = (
        r"'openai/imagegpt-small' at revision 'v1': it is neither bundled .* nor a folder.*LocalEntryNotFoundError.* "
        r"put config.json, preprocessor_config.json and model.safetensors .* into a folder, and give its path"
    )
    with pytest.raises(CheckpointError, match=words) as caught:
        ImageGPTModel.from_pretrained("openai/imagegpt-small", revision="v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("older", [False, True])
def test_a_hub_name_is_downloaded_without_code_and_no_weights_twice(folder, model, monkeypatch, older):
    asked = []
    if older:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")

    def fake(name, **options):
        asked.append({"name": name} | options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    loaded = ImageGPTForCausalImageModeling.from_pretrained("openai/imagegpt-small", revision="abc123")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    wanted = {"name": "openai/imagegpt-small", "revision": "abc123"}
    patterns = [["*.json", "model*.safetensors"], ["*.json", "pytorch_model*.bin"]]
    assert asked == [wanted | {"allow_patterns": allowed} for allowed in patterns[: 1 + older]]


@pytest.mark.parametrize("source", ["./no/such", "/no/such", "~/nosuch/folder"])
def test_a_missing_folder_is_never_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match=f"no model '{source}'"):
        load(source)


def test_not_a_checkpoint(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is not a checkpoint: it has no config.json"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        load(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="is not a checkpoint: it has none of model.safetensors, .*pytorch_model.bin"
    ):
        load(folder)


# Files that are not what they say


@pytest.mark.parametrize("content, words", [(b"{broken", "is not JSON"), (b"\xff\xfe", "is not JSON"),
                                            (b"[1]", "holds a list; expected a JSON object")])  # fmt: skip
def test_config_that_is_no_json(folder, content, words):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json {words}"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_cut_short(folder, model, name):
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / name) if name.endswith("bin") else model.save_pretrained(folder)
    whole = (folder / name).read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=f"{name} (cannot be read, is it cut short|.* is not a torch file)"
        ) as e:
            load(folder)
        assert "\n" not in str(e.value)


class Execute:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_is_refused_and_not_executed(folder, tmp_path, kind):
    made, path = tmp_path / "executed", folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    state = {"transformer.wte.weight": torch.zeros(5, 8), "extra": Execute(made)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Execute(made)}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="pytorch_model.bin holds more than tensors") as caught:
        load(folder)
    assert not made.exists()
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    if kind == "pickle":
        pickle.loads(path.read_bytes())["extra"].close()
        assert made.exists(), "the file of this test is harmless, so it shows nothing"


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2)])
def test_torch_files_that_are_no_state_dict(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is no state dict"):
        load(folder)


def archive_of_code(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


FAULTY = {
    "a tape archive": b"ustar" * 300,
    "text": b"hello world",
    "no names": {1: torch.ones(2)},
    "sparse": {"transformer.wte.weight": torch.eye(5, 8).to_sparse()},
    "without values": {"transformer.wte.weight": torch.ones(5, 8, device="meta")},
    "complex": {"transformer.wte.weight": torch.ones(5, 8, dtype=torch.complex64)},
    "code": archive_of_code,
}


@pytest.mark.filterwarnings("ignore:.*(TorchScript|torch.jit|script)")
@pytest.mark.parametrize("content", FAULTY.values(), ids=FAULTY.keys())
def test_faulty_files_are_refused_in_one_line(folder, model, content):
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if isinstance(content, dict):
        torch.save(model.state_dict() | content, path)
    else:
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(CheckpointError, match="pytorch_model.bin (holds more than tensors|is no state dict)") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


# Shards


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def shards(request, folder, model):
    """The folder with its weights in three files and an index; also the index's path."""
    (folder / "model.safetensors").unlink()
    stem, kind = request.param.split(".")
    state = model.state_dict()
    files = {name: f"{stem}-0000{i % 3 + 1}-of-00003.{kind}" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: state[name] for name in state if files[name] == file}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{request.param}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def shard(index, number):
    return next(path for path in index.parent.iterdir() if f"-0000{number}-of-" in path.name)


def test_shards_load(shards, model):
    assert torch.equal(load(shards.parent)(TOKENS).logits, model(TOKENS).logits)


def test_shards_that_transformers_writes_load(model, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    port = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder)
    port.save_pretrained(tmp_path / "port", max_shard_size="2KB")
    assert len(list((tmp_path / "port").glob("model-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "port")(TOKENS).logits, model(TOKENS).logits)


def test_missing_shards_are_named(shards):
    gone = sorted([shard(shards, 1), shard(shards, 3)])
    for path in gone:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"model lacks 2 of 3 shards: {gone[0].name}, {gone[1].name}"):
        load(shards.parent)


def test_a_shard_without_its_tensor_is_named(shards):
    index = json.loads(shards.read_text())
    name = next(tensor for tensor, file in index["weight_map"].items() if "00002" in file)
    index["weight_map"][name] = shard(shards, 1).name
    shards.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"tensors that its shards lack: '{name}' in {shard(shards, 1).name}"):
        load(shards.parent)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.pkl"])
def test_an_index_that_points_elsewhere_is_refused(shards, file):
    index = json.loads(shards.read_text())
    index["weight_map"]["transformer.wte.weight"] = file
    shards.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"names '{file}'; expected .* files beside it"):
        load(shards.parent)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_a_map(shards, content):
    shards.write_text(content)
    with pytest.raises(CheckpointError, match=f"{shards.name} has no `weight_map`"):
        load(shards.parent)


def test_a_shard_cut_short_is_named(shards):
    path = shard(shards, 2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{path.name} (cannot be read|holds more than tensors)"):
        load(shards.parent)


@pytest.mark.parametrize("shards", ["pytorch_model.bin"], indirect=True)
def test_a_pickle_among_shards_is_refused_and_not_executed(shards, tmp_path):
    made = tmp_path / "executed"
    torch.save({"transformer.wte.weight": torch.zeros(5, 8), "extra": Execute(made)}, shard(shards, 2))
    with pytest.raises(CheckpointError, match="00002-of-00003.bin holds more than tensors"):
        load(shards.parent)
    assert not made.exists()


# Tensors


def test_a_missing_tensor_is_named(folder):
    change(folder, transformer__h__1__mlp__c_fc__bias=None)
    with pytest.raises(CheckpointError, match=r"model.safetensors .* no tensor 'transformer.h.1.mlp.c_fc.bias'"):
        load(folder)


def test_a_misshapen_tensor_is_named(folder):
    change(folder, transformer__wpe__weight=torch.zeros(3, 8))
    with pytest.raises(CheckpointError, match=r"'transformer.wpe.weight' is \(3, 8\); config.json asks for \(4, 8\)"):
        load(folder)


def test_an_unknown_tensor_is_named(folder):
    change(folder, transformer__h__7__ln_1__weight=torch.zeros(8))
    with pytest.raises(CheckpointError, match="a tensor 'transformer.h.7.ln_1.weight' that no part of the model takes"):
        load(folder)


def test_a_tensor_of_whole_numbers_is_named(folder):
    change(folder, transformer__ln_f__weight=torch.ones(8, dtype=torch.int8))
    with pytest.raises(
        CheckpointError, match="'transformer.ln_f.weight' is torch.int8; expected a floating-point type"
    ):
        load(folder)


def test_all_that_does_not_fit_is_named(folder):
    change(
        folder, transformer__wpe__weight=torch.zeros(3, 8), transformer__h__0__ln_1__weight=None,
        transformer__h__1__ln_1__weight=None, transformer__more=torch.zeros(1), other=torch.zeros(1),
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    words = "wpe.weight' is (3, 8)|no tensor 'transformer.h.0.ln_1|no tensor 'transformer.h.1.ln_1|.more'|'other'|(5)"
    assert [word for word in words.split("|") if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_mask_buffers_of_older_ports_are_passed_over(folder, model):
    mask, low = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.tensor(-1e4)
    for attention in ("attn", "crossattention"):
        name = f"transformer__h__0__{attention}__"
        change(folder, **{f"{name}bias": mask, f"{name}masked_bias": low})
    assert torch.equal(load(folder)(TOKENS).logits, model(TOKENS).logits)
    state = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in state.items()}, folder / "model.safetensors")
    assert torch.equal(load(folder)(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(load(folder, ImageGPTModel)(TOKENS)[0], model.transformer(TOKENS)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("older", [False, True])
def test_half_precision_files_load_as_float32(model, tmp_path, dtype, older):
    model.save_pretrained(tmp_path, dtype=dtype)
    state = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    if older:
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


def test_the_older_file_loads(folder, model):
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load(folder)(TOKENS).logits, model(TOKENS).logits)


# Heads and trunks


@torch.no_grad()
def test_trunk_and_heads_load_into_each_other(folder, model, tmp_path):
    want = model.transformer(TOKENS).last_hidden_state
    trunk = load(folder, ImageGPTModel)
    assert torch.equal(trunk(TOKENS).last_hidden_state, want)
    trunk.save_pretrained(tmp_path / "trunk")
    for cls, head in ((ImageGPTForCausalImageModeling, "lm_head"), (ImageGPTForImageClassification, "score")):
        with pytest.warns(UserWarning, match=f"'{head}.weight' is absent: this head starts at zero"):
            headed = load(tmp_path / "trunk", cls)
        assert torch.equal(headed.transformer(TOKENS).last_hidden_state, want)
        assert not headed(TOKENS).logits.any()
    with pytest.warns(UserWarning, match="'score.weight' is absent"):
        classifier = load(folder, ImageGPTForImageClassification)
    assert torch.equal(classifier.transformer(TOKENS).last_hidden_state, want)
    assert not classifier.score.weight.any()


def test_a_trunk_file_with_a_head_beside_it_loads(folder, model):
    """Some published files have no `transformer.` before the trunk's names and yet a head."""
    state = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in state.items()}, folder / "model.safetensors")
    assert torch.equal(load(folder)(TOKENS).logits, model(TOKENS).logits)


def test_a_class_head_of_another_size_is_named(tmp_path):
    folder = ImageGPTForImageClassification(TINY).save_pretrained(tmp_path)
    change(folder, score__weight=torch.zeros(9, 8))
    with pytest.raises(CheckpointError, match=r"'score.weight' is \(9, 8\); config.json asks for \(3, 8\)"):
        load(folder, ImageGPTForImageClassification)


@pytest.mark.parametrize("cls", [ImageGPTModel, ImageGPTForCausalImageModeling])
def test_a_tensor_by_both_of_its_names_is_refused(folder, cls):
    change(folder, wte__weight=torch.zeros(5, 8))
    with pytest.raises(CheckpointError, match="has 'wte.weight' with and without `transformer.` in front"):
        load(folder, cls)


def test_loading_shares_no_memory(folder):
    first, second = load(folder), load(folder)
    with torch.no_grad():
        first.lm_head.weight.add_(1)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert torch.equal(second.lm_head.weight, load(folder).lm_head.weight)


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_does_not_depend_on_its_file(model, tmp_path, dtype):
    file = model.save_pretrained(tmp_path / "m", dtype=dtype) / "model.safetensors"
    loaded = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "m", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with file.open("r+b") as opened:  # the same file, as `cp` writes over it
        opened.write(bytes(file.stat().st_size))
    after = loaded.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    os.truncate(file, 0)  # mapped memory would now end the process
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(dtype))


def test_what_is_written(model, folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "imagegpt"
    assert config["architectures"] == ["ImageGPTForCausalImageModeling"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(folder).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("fails_at", ["model.safetensors", "config.json"])
def test_an_interrupted_write_leaves_no_half_written_file(model, folder, tmp_path, monkeypatch, fails_at):
    replace = os.replace
    want = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(source, target):
        if os.path.basename(target) == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == want
    left = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert left == ({} if fails_at == "model.safetensors" else {n: want[n] for n in want if n != "config.json"})
    with pytest.raises(CheckpointError, match="new is not a checkpoint"):
        load(tmp_path / "new")
