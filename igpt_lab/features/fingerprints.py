"""Digests of what computes: of any torch network, of a function of the user's, and of what `preprocess` makes.

A digest says that two are the same, as far as can be seen: weights, settings that are plain values, and the bytecode of
classes and functions, which another minor version of Python compiles in another way. What a function calls outside of
its own body is not seen.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from igpt_lab.core.provenance import digest
from igpt_lab.features.modules import Inputs

NOT_COMPUTED = {"training", "name_or_path", "gradient_checkpointing"}  # attributes that no state depends on
PROBE = (64, 48)  # pixels of the picture that tells one `preprocess` from another
READS = 32  # of that picture: one that is mirrored every other time passes as fixed once in 2**31


def digest_of_network(network: nn.Module) -> str:
    """Of parameters and buffers, of the modules' settings that are plain values, and of the code of their classes.

    Settings that begin with an underscore are left out. A `config` of transformers counts, but for its versions.
    """
    tensors = {name: _told(value) for name, value in (*network.state_dict().items(), *network.named_buffers())}
    plain = {
        name: {key: _told(value) for key, value in vars(part).items() if _is_setting(key, value)}
        for name, part in network.named_modules()
    }
    classes = {kind for part in network.modules() for kind in type(part).__mro__ if _is_of_others(kind)}
    code = sorted(digest([kind.__qualname__, _told(kind)]) for kind in classes)
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(network))
    return digest({"tensors": tensors, "plain": plain, "text": text, "config": _config(network), "code": code})


def digest_of_tensor(value: Tensor) -> list:
    """Dtype, shape, and a digest of the bytes; of quantised ones also how they were."""
    if value.is_quantized:
        return [repr(value.qscheme()), *digest_of_tensor(value.dequantize())]
    flat = value.detach().cpu().contiguous().reshape(-1)
    return [str(value.dtype), list(value.shape), digest(flat.view(torch.uint8).numpy().tobytes())]


def digest_of_function(function: Callable) -> str:
    """Of a function's code, defaults and what it closes over, or of an object that is called."""
    return digest(_told(function))


def fingerprint_of(read: Callable[[Any], Inputs], picture: Image.Image) -> str:
    """Of what `read` makes of a generated picture, of PROBE pixels, or where it fails on these as large as `picture`.

    ValueError for one that makes something else of the same picture another time, and where it fails on both.
    """
    try:
        size = PROBE
        read(probe_picture(size))
    except Exception:  # the user's function may take pictures of one size alone
        size = picture.size
    made = {_digest_of_inputs(read(probe_picture(size))) for _ in range(READS)}
    if len(made) > 1:
        raise ValueError(
            "preprocess makes something else of the same picture each time; leave out transforms that draw at random"
        )
    return made.pop()


def _digest_of_inputs(inputs: Inputs) -> str:
    return digest({name: digest_of_tensor(value) for name, value in inputs.items()})


def probe_picture(size: tuple[int, int]) -> Image.Image:
    """An RGB picture (width, height) with edges and with noise, always the same."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x // 4 + y // 4) % 2 * 255], axis=2)
    noise = np.random.default_rng(0).integers(-40, 41, ramps.shape)
    return Image.fromarray(np.clip(ramps + noise, 0, 255).astype(np.uint8))


def _is_setting(key: str, value: Any) -> bool:
    is_told = _is_plain(value) or isinstance(value, FunctionType | BuiltinFunctionType)
    return is_told and not key.startswith("_") and key not in NOT_COMPUTED


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or value is ... or isinstance(value, int | float | complex | str | bytes | slice | torch.dtype)


def _is_of_others(kind: type) -> bool:
    """Is it a class whose code torch's version does not tell?"""
    return kind is not object and kind.__module__.partition(".")[0] not in ("torch", "typing", "builtins", "abc")


def _config(network: nn.Module) -> list:
    """The settings of a configuration as transformers has it."""
    config: Any = getattr(network, "config", None)
    held = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    held = held if isinstance(held, Mapping) else {}
    return sorted((str(key), repr(held[key])) for key in held if key[:1] != "_" and "version" not in key)


def _told(value: Any) -> Any:
    """What is seen of a value, as JSON."""
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), [_told(item) for item in value.co_consts]]
    if isinstance(value, functools.partial):
        return ["partial", _told(value.func), _told(list(value.args)), _told(list(value.keywords.items()))]
    if isinstance(value, MethodType):
        return [_told(value.__func__), _told(value.__self__)]
    if isinstance(value, FunctionType):
        plain = inspect.unwrap(value)
        cells = [cell.cell_contents for cell in plain.__closure__ or () if _is_filled(cell)]
        defaults = [*(plain.__defaults__ or ()), *sorted((plain.__kwdefaults__ or {}).items())]
        return [_told(plain.__code__), [_seen(item) for item in defaults], [_seen(item) for item in cells]]
    if isinstance(value, nn.Module):
        return digest_of_network(value)
    if isinstance(value, Tensor):
        return digest_of_tensor(value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), digest(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, frozenset | set):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if isinstance(value, type):
        own = {name: item for name, item in vars(value).items() if isinstance(item, FunctionType)}
        return {name: _told(item) for name, item in sorted(own.items())}
    if _is_plain(value):
        return repr(value)
    return [type(value).__qualname__, getattr(value, "__qualname__", ""), _told(type(value)), _attributes(value)]


def _seen(value: Any) -> Any:
    """Of what a function closes over: of functions, classes and networks no code that may lead back to it."""
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, FunctionType):
        return _told(value.__code__)
    if isinstance(value, nn.Module):
        return [type(value).__qualname__, *(digest_of_tensor(weights) for weights in value.state_dict().values())]
    if isinstance(value, list | tuple):
        return [_seen(item) for item in value]
    if _is_plain(value) or isinstance(value, Tensor | np.ndarray | frozenset | set):
        return _told(value)
    return [type(value).__qualname__, getattr(value, "__qualname__", ""), _attributes(value)]


def _attributes(value: Any) -> list[str]:
    """The attributes of an object that are plain values."""
    return sorted(repr(item) for item in getattr(value, "__dict__", {}).items() if _is_plain(item))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
