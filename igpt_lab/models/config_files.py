"""A configuration as a dict and in files, and what transformers' configurations have besides fields."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from igpt_lab.core import hub
from igpt_lab.core.joining import also_called
from igpt_lab.core.values import check, closest

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Attributes of every configuration of transformers, and their other names. Here they change nothing, and are kept.
COMMON = {
    "architectures", "dtype", "transformers_version", "chunk_size_feed_forward", "is_encoder_decoder",
    "_name_or_path", "_attn_implementation", "keys_to_ignore_at_inference",
}  # fmt: skip
OTHER_NAMES = {"torch_dtype": "dtype", "attn_implementation": "_attn_implementation", "name_or_path": "_name_or_path"}


def own_names(values: dict) -> dict:
    """Fields by their names: without aliases, which win as in transformers, and `label2id` as the `id2label` it is."""
    aliased = {ALIASES[name]: value for name, value in values.items() if name in ALIASES}
    values = {name: value for name, value in values.items() if name not in ALIASES} | aliased
    numbers = values.pop("label2id", None)
    if isinstance(numbers, dict):  # files have had numbers as strings
        numbers = {k: int(n) if isinstance(n, str) and n.isdecimal() else n for k, n in numbers.items()}
    check("label2id", numbers, "dict[str, int] | None")
    if numbers is not None and not values.get("id2label"):
        values["id2label"] = {k: name for name, k in numbers.items()}
        if len(values["id2label"]) < len(numbers):
            raise ValueError(
                f"label2id gives {len(numbers)} classes {len(values['id2label'])} different numbers; "
                "expected one for each class"
            )
    return values


class ConfigFiles:
    """What reads and writes a dataclass of fields, and its other attributes, as `config.json` of transformers."""

    model_type = "imagegpt"
    base_config_key = ""
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    sub_configs: ClassVar[dict] = {}
    attribute_map = ALIASES
    architectures = dtype = transformers_version = None
    chunk_size_feed_forward, is_encoder_decoder = 0, False
    base_model_tp_plan = base_model_pp_plan = None
    _name_or_path, _attn_implementation = "", "sdpa"

    label2id: Any  # of the class that inherits
    return_dict: Any

    name_or_path = property(lambda self: self._name_or_path, doc="Where it was read from.")
    torch_dtype = property(lambda self: self.dtype, doc="Another name of `dtype`.")
    use_return_dict = property(lambda self: self.return_dict, doc="Another name of `return_dict`.")

    def _keep(self, name: str, value: Any) -> None:
        """Set an attribute that is no field; TypeError for what is a field's name misspelt, or a name of the class."""
        name = OTHER_NAMES.get(name, name)
        if name not in COMMON and not self.keeps(name):
            self.refuse([name])
        if name == "dtype" and isinstance(value, str):
            dtype = getattr(torch, value.removeprefix("torch."), None)
            value = dtype if isinstance(dtype, torch.dtype) else value
        object.__setattr__(self, name, value)

    @classmethod
    def keeps(cls, name: str) -> bool:
        """Whether an attribute may have this name: no word of the class, and not so close to a field's."""
        return not (hasattr(cls, name) or _closest(cls, name, 0.85))

    @classmethod
    def refuse(cls, names: Iterable[str]) -> None:
        """TypeError for names of no field, with the closest one there is."""
        for name in sorted(names):
            close = _closest(cls, name, 0.6)
            raise TypeError(f"{cls.__name__} has no field {name!r}" + (f"; did you mean {close!r}?" if close else ""))

    def __iter__(self) -> Iterator[str]:
        """Names of its attributes, as of a configuration of transformers."""
        return iter(vars(self))

    def get_text_config(self, **_) -> Self:
        """Itself; transformers asks for the part of a configuration that has a vocabulary."""
        return self

    def update(self, values: dict) -> None:
        """Set attributes, one after the other."""
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict:
        """As `config.json` of transformers: fields, `label2id`, and attributes that were added."""
        known = asdict(self)  # type: ignore[call-overload]
        added = {name: value for name, value in vars(self).items() if name not in known and not name.startswith("_")}
        if isinstance(added.get("dtype"), torch.dtype):
            added["dtype"] = str(added["dtype"]).removeprefix("torch.")
        return {"model_type": self.model_type, **known, "label2id": self.label2id, **added}

    def to_diff_dict(self) -> dict:
        """`to_dict` without what is as in a new configuration."""
        usual = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "model_type" or k not in usual or v != usual[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON of `to_diff_dict`, or without `use_diff` of `to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    @also_called(folder="save_directory")
    def save_pretrained(self, folder: str | Path, **_) -> Path:
        """Write `config.json` as transformers reads it; returns the folder. What else it is given changes nothing."""
        hub.write_json(Path(folder) / "config.json", self.to_dict())
        return Path(folder)

    @classmethod
    def from_dict(cls, values: dict, *, return_unused_kwargs: bool = False, **changes) -> Any:
        """From a `config.json` dict with `changes` of it. Keys that are no fields are kept as attributes.

        With `return_unused_kwargs` a tuple, with the changes of what is not there; else these raise TypeError.
        """
        if values.get("model_type", cls.model_type) != cls.model_type:
            kind = reprlib.repr(values["model_type"])
            raise ValueError(f"model_type {kind} in config.json; expected {cls.model_type!r}")
        values, changes = own_names(values), own_names(changes)
        known = {f.name for f in fields(cls)} | COMMON | set(OTHER_NAMES)  # type: ignore[arg-type]
        unused = {name: changes.pop(name) for name in set(changes) - known - set(values)}
        if unused and not return_unused_kwargs:
            cls.refuse(unused)
        if {"num_labels", "id2label"} & set(changes):
            values = {name: value for name, value in values.items() if name not in ("id2label", "num_labels")}
        values = {
            name: value
            for name, value in values.items()
            if name in known or not (name[:1] == "_" or hasattr(cls, name))
        }
        close = {name: values.pop(name) for name in set(values) - known if not cls.keeps(name)}
        config = cls(**values | changes)
        vars(config).update(close)  # a file has what it has
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """From a file such as `config.json`."""
        return cls.from_dict(hub.read_json(Path(json_file)))

    @classmethod
    def get_config_dict(cls, source: str | Path, *, revision: str | None = None, **options) -> tuple[dict, dict]:
        """The `config.json` dict of a name or folder, and what of `options` says nothing of where it lies."""
        where, rest = hub.options(options)
        return hub.read_json(hub.resolve(source, revision=revision, weights=False, **where) / "config.json"), rest

    @classmethod
    @also_called(source="pretrained_model_name_or_path")
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, return_unused_kwargs: bool = False, **changes
    ) -> Any:
        """From the `config.json` of a bundled name, a folder or a Hub name; `changes` as of `from_dict`.

        The keywords by which transformers finds files work: `cache_dir`, `force_download`, `local_files_only`,
        `subfolder`, `token`. Raises CheckpointError, which names the file, for one that does not fit.
        """
        where, changes = hub.options(changes)
        file = hub.resolve(source, revision=revision, weights=False, **where) / "config.json"
        config = cls.of_file(hub.read_json(file), changes, file, return_unused_kwargs)
        vars(config[0] if return_unused_kwargs else config)["_name_or_path"] = str(source)
        return config

    @classmethod
    def of_file(cls, values: dict, changes: dict, file: Path, return_unused_kwargs: bool = False) -> Any:
        """As `from_dict`, from what is read from `file`: an error in it is a CheckpointError that names the file."""
        changes = own_names(changes)
        try:
            return cls.from_dict(values, return_unused_kwargs=return_unused_kwargs, **changes)
        except ValueError as error:
            raise hub.CheckpointError(f"{file}: {error}") from error


def _closest(cls: type, name: str, cutoff: float) -> str:
    """The closest field, by any of its names, of a configuration's class."""
    known = [*(f.name for f in fields(cls)), *ALIASES, "label2id"]  # type: ignore[arg-type]
    return closest(name, known, cutoff)
