"""A name or a folder <-> a config dict and a state dict. Never executes what a file contains.

Three kinds of source: a model bundled with the package (`fashion-xs`), a folder in the port's layout (`config.json`,
`model.safetensors`, or the older `pytorch_model.bin`, read with `weights_only=True`), and a name on the Hub.
"""

from __future__ import annotations

import difflib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from igpt_lab.provenance import atomic_write

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IGNORED = (".attn.bias", ".attn.masked_bias")  # causal-mask buffers that older versions of the port saved


class CheckpointError(ValueError):
    """A source that is not a checkpoint, or one whose content does not fit; the message names the culprit."""


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def resolve(source: str | Path) -> Path:
    """The local folder of a bundled name, a folder, or (by download) a Hub name `owner/name`."""
    folder = Path(source).expanduser()
    if str(source) in bundled():
        return BUNDLED / str(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; expected a folder with config.json and model.safetensors")
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        return _download(str(source))
    close = difflib.get_close_matches(str(source), bundled(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(f"no model {str(source)!r}: {hint}bundled are {bundled()}; or give a folder or owner/name")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", *WEIGHTS]))
    except Exception as error:  # the Hub client raises a different class for each way to have no network
        raise CheckpointError(
            f"no model {name!r}: not bundled ({bundled()}), no such folder, and the Hub did not answer "
            f"({type(error).__name__}). Without a network, copy the checkpoint's folder here and give its path"
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object from a file; errors name the file."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: dict) -> None:
    """A JSON object to a file, whole or absent."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read(source: str | Path) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """(config dict, state dict with float32 tensors on the CPU, the weights' file) of a source."""
    folder = resolve(source)
    config = read_json(folder / "config.json")
    path = weights_file(folder)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text runs over ten lines and tells how to execute it
        raise CheckpointError(f"{path} holds more than tensors, or is no file of torch; it is not loaded") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, is it cut short? {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is no state dict: expected tensors by name, as `model.state_dict()` gives")
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, path


def weights_file(folder: Path) -> Path:
    """The file with the weights in a checkpoint's folder."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} is not a checkpoint: it has none of {', '.join(WEIGHTS)}")


def match(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, base: bool, where: Path
) -> dict[str, torch.Tensor]:
    """`state` with exactly the names and shapes of `expected`, or an error that names the first that does not fit.

    A checkpoint with a head loads into the trunk and the other way round; a head that is absent starts at zero.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(IGNORED)}
    if base:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    elif not any(name.startswith("transformer.") for name in state):
        state = {name if name.startswith(("lm_head", "score")) else f"transformer.{name}": tensor
                 for name, tensor in state.items()}  # fmt: skip
    found = {}
    for name, like in expected.items():
        if name not in state and name.startswith(("lm_head", "score")):
            found[name] = torch.zeros(like.shape)
            continue
        if name not in state:
            raise CheckpointError(f"{where} has no tensor {name!r}, which config.json asks for")
        if not state[name].is_floating_point():
            raise CheckpointError(f"{where}: tensor {name!r} is {state[name].dtype}; expected a floating-point type")
        if state[name].shape != like.shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {tuple(state[name].shape)}; config.json asks for {tuple(like.shape)}"
            )
        found[name] = state[name].contiguous()
    unknown = sorted(set(state) - set(expected) - {"lm_head.weight", "score.weight"})
    if unknown:
        raise CheckpointError(f"{where} has a tensor {unknown[0]!r} that no part of the model takes")
    return found


def write(folder: str | Path, config: dict, state: dict[str, torch.Tensor]) -> Path:
    """Write `config.json` and `model.safetensors`, each whole or absent; returns the folder."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    return folder
