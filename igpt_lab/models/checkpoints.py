"""A name or a folder <-> a config dict and a state dict. Never executes what a file contains.

Three kinds of source: a model bundled with the package (`fashion-xs`), a folder in transformers' layout (`config.json`
and `model.safetensors`, or the older `pytorch_model.bin`, read with `weights_only=True`; either may be in shards,
listed in an index beside them), and a name on the Hub.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from igpt_lab.core.devices import best_device
from igpt_lab.core.hub import INDEX, WEIGHTS, CheckpointError, read_json, resolve, write_json
from igpt_lab.core.provenance import atomic_write
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.generation_config import GENERATION

HEADS = ("lm_head.weight", "score.weight")
# Causal masks, which older versions of transformers saved with the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".crossattention.bias", ".crossattention.masked_bias")


def read(source: str | Path, *, revision: str | None = None, **finding) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """(config dict, state dict on the CPU in the file's dtypes, the weights' file or their index) of a source."""
    folder = resolve(source, revision=revision, **finding)
    config = read_json(folder / "config.json")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return config, _shards(folder / name) if name.endswith(INDEX) else _tensors(folder / name), folder / name
    raise CheckpointError(f"{folder} is not a checkpoint: it has none of {', '.join(WEIGHTS)}")


def _shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index names; each must be there, beside it, and hold what the index says."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no `weight_map` from tensors to files")
    files = sorted(set(where.values()))
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    plain = {name: Path(name).name == name and name.isprintable() and name.endswith(suffix) for name in files}
    strange = [name for name in files if not plain[name]]
    if strange:
        raise CheckpointError(f"{index} names {strange[0]!r}; expected {suffix} files beside it")
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    absent = [name for name in files if name not in beside]
    if absent:
        raise CheckpointError(f"{index.parent} lacks {len(absent)} of {len(files)} shards: {', '.join(absent)}")
    state: dict[str, torch.Tensor] = {}
    lacking: list[str] = []
    for file in files:
        shard = _tensors(index.parent / file)
        lacking += [f"{name!r} in {file}" for name, at in where.items() if at == file and name not in shard]
        state |= shard
    if lacking:
        raise CheckpointError(f"{index} names tensors that its shards lack: {', '.join(lacking)}")
    return state


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, by name."""
    try:
        if path.suffix == ".safetensors":
            state = _safetensors(path)
        else:
            if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
                raise ValueError("compressed, as torch saves no file")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, is it cut short? {error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} asks for more memory than there is") from error
    except Exception as error:  # torch raises many kinds, in texts over ten lines that tell how to execute the file
        raise CheckpointError(f"{path} holds more than tensors, or is not a torch file; it is not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is no state dict: expected tensors by name, as `model.state_dict()` gives")
    unfolded, size = sum(tensor.nbytes for tensor in state.values() if _is_plain(tensor)), path.stat().st_size
    if unfolded > 2 * size:  # twice, as two tensors may be one: views that repeat their values have no such limit
        raise CheckpointError(f"{path} has {size:,} bytes, and its tensors {unfolded:,}; it is not loaded")
    if strange := [name for name, tensor in state.items() if not isinstance(name, str) or not _is_plain(tensor)]:
        raise CheckpointError(f"{path} is no state dict: {strange[0]!r} is no name, or of no dense tensor with values")
    return state


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in safetensors' format, read into memory of their own.

    Mapped ones change when the file is written over, and end the process when it is cut.
    """
    state = {}
    with safe_open(path, "pt") as mapped, path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))  # the length of the header, the header, then the values
        for name in mapped.offset_keys():
            state[name] = tensor = torch.empty_like(mapped.get_tensor(name))
            values = tensor.reshape(-1).view(torch.uint8).numpy()
            if file.readinto(values.data) != values.size:
                raise EOFError(f"the values of {name!r} end too early")
    return state


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is dense, of real numbers, and has them."""
    special = tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.is_complex()
    return tensor.layout == torch.strided and not special


def check_layers(config: ImageGPTConfig, state: dict[str, torch.Tensor], where: Path) -> None:
    """CheckpointError for no model, or one of more blocks than the file has tensors, before any block is made."""
    try:
        config.check()
    except ValueError as error:
        raise CheckpointError(f"{where.parent / 'config.json'}: {error}") from error
    if config.n_layer > max(100, len(state)):
        raise CheckpointError(
            f"{where.parent / 'config.json'}: n_layer is {config.n_layer:,}, and {where.name} has {len(state)} tensors"
        )


def match(
    state: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    is_own: Callable[[str], bool],
    *,
    base: bool,
    where: Path,
    ignore_mismatched_sizes: bool = False,
) -> tuple[dict[str, torch.Tensor], dict]:
    """`state` with exactly the names and shapes of `expected`, or an error that names all that does not fit.

    A checkpoint with a head loads into the backbone (`base`) and the other way round. A head that is absent, or with
    `ignore_mismatched_sizes` one of another shape, starts at zero, with a UserWarning. What is not ImageGPT's own is
    left out where it is absent, with a UserWarning too. Beside it, what was so, by transformers' names.
    """
    state = _renamed(state, base, where)
    info: dict = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set(), "error_msgs": []}
    loaded: dict[str, torch.Tensor] = {}
    wrong = []
    for name, like in expected.items():
        tensor, own = state.get(name), is_own(name)
        problem = _misfit(name, tensor, like)
        if (name in HEADS or not own) and (tensor is None or (tensor.shape != like.shape and ignore_mismatched_sizes)):
            other = None if tensor is None else (name, tuple(tensor.shape), tuple(like.shape))
            info["missing_keys" if other is None else "mismatched_keys"].add(other or name)
            what = "absent" if other is None else f"{other[1]}, not {other[2]}"
            starts = "this head starts at zero" if own else "it starts as its class draws it"
            warnings.warn(f"{where}: {name!r} is {what}: {starts}; train it first", stacklevel=3)
            loaded |= {name: torch.zeros(like.shape)} if own else {}
        elif tensor is None or problem:
            wrong.append(problem)
        else:
            loaded[name] = tensor.contiguous()
    unknown = sorted(set(state) - set(expected))
    info["unexpected_keys"] |= {name for name in unknown if name in HEADS}
    wrong += [f"a tensor {name!r} that no part of the model takes" for name in unknown if name not in HEADS]
    if wrong:
        raise CheckpointError(f"{where} does not fit ({len(wrong)}): {'; '.join(wrong)}")
    return loaded, info


def _misfit(name: str, tensor: torch.Tensor | None, like: torch.Tensor) -> str:
    """What is wrong with the tensor of a file for one of the model; nothing where it fits."""
    if tensor is None:
        return f"no tensor {name!r}, which config.json asks for"
    if not tensor.is_floating_point() and like.is_floating_point():
        return f"{name!r} is {tensor.dtype}; expected a floating-point type"
    if tensor.shape != like.shape:
        return f"{name!r} is {tuple(tensor.shape)}; config.json asks for {tuple(like.shape)}"
    return ""


def _renamed(state: dict[str, torch.Tensor], base: bool, where: Path) -> dict[str, torch.Tensor]:
    """Without buffers of old, and with or without `transformer.` in front, as the model has it."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    if twice := [name for name in state if f"transformer.{name}" in state]:
        raise CheckpointError(f"{where} has {', '.join(map(repr, twice))} with and without `transformer.` in front")
    if base:
        return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    if not any(name.startswith("transformer.") for name in state):
        return {name if name in HEADS else f"transformer.{name}": tensor for name, tensor in state.items()}
    return state


def write(
    folder: str | Path, config: dict, state: dict[str, torch.Tensor], max_shard_size: int | str | None = None,
    asked: dict | None = None,
) -> Path:  # fmt: skip
    """Write `config.json` and `model.safetensors`, or its shards and their index, each whole or absent.

    What is not None of `asked` goes into `generation_config.json`, for a model that has it. Returns the folder.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    shards, index = {"model.safetensors": list(tensors)}, None
    if max_shard_size is not None:
        from huggingface_hub import split_torch_state_dict_into_shards

        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        shards = split.filename_to_tensors
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    for file, names in shards.items():
        atomic_write(folder / file, save({name: tensors[name] for name in names}, metadata={"format": "pt"}))
    if index is not None:
        write_json(folder / ("model.safetensors" + INDEX), index)
        (folder / "model.safetensors").unlink(missing_ok=True)  # of an earlier run, which would be read in their place
    if asked is not None:
        write_json(folder / GENERATION, {name: value for name, value in asked.items() if value is not None})
    else:
        (folder / GENERATION).unlink(missing_ok=True)  # of an earlier model
    write_json(folder / "config.json", config)
    return folder


def dtype_of(asked: torch.dtype | str, config: dict, state: dict[str, torch.Tensor]) -> torch.dtype:
    """A dtype by itself or by name; "auto" is that of `config.json`, or else of the file."""
    if asked == "auto":
        floating = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        asked = config.get("dtype") or config.get("torch_dtype") or next(floating, torch.float32)
    dtype = asked if isinstance(asked, torch.dtype) else getattr(torch, str(asked).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {asked!r}; expected a floating-point type as torch.float32, its name, or 'auto'")
    return dtype


def check_attention(name: str | None) -> None:
    """ValueError for a kind of attention that there is not."""
    if name not in (None, "sdpa", "eager"):
        raise ValueError(f"attn_implementation={name!r}; expected 'sdpa' or 'eager', which are the same numbers here")


def device_of(asked: Any) -> torch.device:
    """Of a `device_map`: a device, "auto", or a dict that has all of the model on one."""
    if isinstance(asked, dict):
        if len(set(asked.values())) != 1:
            raise ValueError(f"device_map={asked}; expected one device, as a model is on one here")
        asked = next(iter(asked.values()))
    if asked is None:
        return torch.device("cpu")
    return torch.device(best_device(None) if asked in ("auto", "balanced", "sequential") else asked)
