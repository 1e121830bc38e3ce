"""A processor's arguments and the files that keep them."""

from __future__ import annotations

import json
import reprlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image

from igpt_lab.core import hub
from igpt_lab.core.display import card, line
from igpt_lab.core.joining import Plain, also_called, join, peer
from igpt_lab.core.values import check

CONFIG = "preprocessor_config.json"
LARGEST_SIDE = 4096  # pixels of an image that a file may ask for
DEFAULTS: dict[str, Any] = {
    "do_resize": True, "size": 256, "resample": Image.Resampling.BILINEAR, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5, "do_color_quantize": True,
    "crop": "squash", "do_convert_rgb": True,
}  # fmt: skip
KINDS = {  # of arguments in a file
    "clusters": "list[list[float]]", "resample": "int", "rescale_factor": "float", "crop": "str",
    "image_mean": "float | list[float]", "image_std": "float | list[float]",
}  # fmt: skip
QUANTISERS = {"clusters", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}


@peer("image_processing_utils", "BaseImageProcessor")
class Settings(Plain):
    """What a processor was told, checked, in its attributes and in files; the classes that process inherit it."""

    size: dict[str, int]
    resample: Image.Resampling
    do_resize: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    do_color_quantize: bool
    crop: str
    do_convert_rgb: bool
    _centres: np.ndarray | None
    model_input_names: ClassVar = ["input_ids"]

    def __init__(
        self, clusters=None, size: int | dict | tuple | None = None, *, do_resize: bool | None = None,
        resample: int | None = None, do_rescale: bool | None = None, rescale_factor: float | None = None,
        do_normalize: bool | None = None, image_mean=None, image_std=None, do_color_quantize: bool | None = None,
        crop: str | None = None, do_convert_rgb: bool | None = None,
    ):  # fmt: skip
        arguments = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
        join()
        arguments = DEFAULTS | arguments
        arguments["size"] = size_of(arguments["size"])
        arguments["resample"] = Image.Resampling(arguments["resample"])
        arguments["rescale_factor"] = float(arguments["rescale_factor"])
        for name in ("image_mean", "image_std"):
            arguments[name] = _three(arguments[name], name)
        vars(self).update(arguments, _centres=None if clusters is None else palette_of(clusters))
        if self.do_normalize and 0 in self.image_std:
            raise ValueError(f"image_std is {self.image_std}; it divides, so expected no 0")
        if self.crop not in ("squash", "center"):
            raise ValueError(f"crop={self.crop!r}; expected 'squash' (as transformers) or 'center' (as the paper)")
        if self._centres is not None and self.do_rescale:  # without, pixels may have any range
            self._check_range(self._centres)

    def __repr__(self) -> str:
        return line(type(self).__name__, self._facts())

    def _repr_html_(self) -> str:
        return card(type(self).__name__, self._facts())

    def _facts(self) -> dict[str, str]:
        height, width = self.size.values()
        resizing = f"{self.resample.name.lower()}, {self.crop}" if self.do_resize else "not resized"
        palette = (
            "none: token sets are all that can be fed" if self._centres is None else f"{len(self._centres)} colours"
        )
        gives = "palette indices" if self.do_color_quantize else "pixel values"
        return {"images": f"{height} x {width} pixels, {resizing}", "palette": palette, "gives": gives}

    def __setattr__(self, name: str, value: Any) -> None:
        """An argument set anew is checked as in a new processor, and counts from the next call on."""
        if name in ("clusters", *DEFAULTS):
            vars(self).update(vars(type(self)(**self.arguments() | {name: value})))
            if name in QUANTISERS:
                vars(self).pop("_table", None)
        else:
            super().__setattr__(name, value)

    def _check_range(self, centres: np.ndarray) -> None:
        """ValueError for a palette of another range than that of scaled pixels: one colour would be nearest to all."""
        ends = np.multiply([[0], [255]], self.rescale_factor)
        if self.do_normalize:
            ends = (ends - self.image_mean) / self.image_std
        low, high = min(-1, ends.min()), max(1, ends.max())
        check_within(centres, low, high)

    @property
    def clusters(self) -> np.ndarray | None:
        """The palette, float32 (V, 3), not to be written to: set another in its place."""
        if self._centres is None:
            return None
        centres = self._centres.astype(np.float32)
        centres.flags.writeable = False  # it is a copy, in which a change would be lost
        return centres

    @property
    def side(self) -> int:
        """Height and width of the model's image; ValueError where they differ."""
        height, width = self.size.values()
        if height != width:
            raise ValueError(f"images of {height} x {width} pixels are not square")
        return height

    @property
    def resampling(self) -> str:
        """The resize that made the tokens, for records of it."""
        return self.resample.name.lower()

    def arguments(self) -> dict:
        """The arguments that make an equal processor: `type(it)(**it.arguments())`.

        `do_convert_rgb` is among them where it is False, so that digests of older processors stay.
        """
        names = [name for name in DEFAULTS if name != "do_convert_rgb" or not self.do_convert_rgb]
        return {"clusters": self._centres} | {name: getattr(self, name) for name in names}

    def __reduce__(self):  # without the table of colours
        return partial(type(self), **self.arguments()), ()

    @classmethod
    @also_called(source="pretrained_model_name_or_path")
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **changes) -> Self:
        """From a bundled name, a folder with `preprocessor_config.json` or a Hub name; `changes` are arguments.

        `cache_dir`, `force_download`, `local_files_only`, `subfolder` and `token` say where the file lies. Old files
        and new ones, of either class. Raises CheckpointError, which names the file, for one that is broken.
        """
        where, changes = hub.options(changes)
        file = hub.resolve(source, revision=revision, weights=False, **where) / CONFIG
        saved = hub.read_json(file)
        try:
            for name in {"clusters", *DEFAULTS} - {"size"}:  # of which `size_of` tells more
                check(name, saved.get(name), f"{KINDS.get(name, 'bool')} | None", -1e6, 1e6)
            if len({len(row) for row in saved.get("clusters") or ()}) > 1:
                raise ValueError("clusters has rows of several lengths; expected 3 numbers each")
            processor = cls.from_dict(saved, **changes)
            for side, pixels in processor.size.items():
                check(f"size, the {side},", pixels, "int", 1, LARGEST_SIDE)
        except ValueError as error:
            raise hub.CheckpointError(f"{file}: {error}") from error
        if processor._centres is None and processor.do_color_quantize:
            raise hub.CheckpointError(f"{file} needs `clusters`, the palette (colours, 3)")
        return processor

    @classmethod
    def from_dict(cls, values: dict, **changes) -> Self:
        """From what `to_dict` gives, or `preprocessor_config.json` holds; what is no argument is passed over."""
        changes = {
            name: value for name, value in hub.options(changes)[1].items() if name not in ("dtype", "torch_dtype")
        }
        return cls(**{name: values.get(name) for name in ("clusters", *DEFAULTS)} | changes)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """From a file such as `preprocessor_config.json`."""
        return cls.from_dict(hub.read_json(Path(json_file)))

    def to_dict(self) -> dict:
        """What `preprocessor_config.json` of transformers holds, and `crop`, which transformers ignores."""
        values = self.arguments() | {"image_processor_type": "ImageGPTImageProcessor", "resample": int(self.resample)}
        return values | {"clusters": None if self._centres is None else self._centres.astype(float).tolist()}

    def to_json_string(self) -> str:
        """JSON of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write `to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    @also_called(folder="save_directory")
    def save_pretrained(self, folder: str | Path, **_) -> list[str]:
        """Write `preprocessor_config.json`; returns what it wrote. Other keywords of transformers' change nothing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        hub.write_json(Path(folder) / CONFIG, self.to_dict())
        return [str(Path(folder) / CONFIG)]


def size_of(size: Any) -> dict[str, int]:
    """An int, {"height", "width"} or (height, width) -> {"height", "width"}."""
    if isinstance(size, dict) or hasattr(size, "height"):  # the latter: transformers' SizeDict
        pair = (size.get("height"), size.get("width"))
    else:
        pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = [n for n in pair if isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"size={reprlib.repr(size)}; expected pixels as an int, or as {{'height': ..., 'width': ...}}")
    return {"height": int(pair[0]), "width": int(pair[1])}


def _three(value: Any, name: str) -> tuple[float, float, float]:
    """One number for all channels, or one each."""
    if np.size(value) in (1, 3):
        red, green, blue = np.broadcast_to(np.asarray(value, float), 3).tolist()
        if np.isfinite([red, green, blue]).all():
            return red, green, blue
    raise ValueError(f"{name}={value!r}; expected a number, or one for each of 3 channels")


def check_within(centres: np.ndarray, low: float, high: float) -> None:
    """ValueError for a palette that lies out of a range by more than rounding."""
    slack = (high - low) / 100
    if centres.min() < low - slack or centres.max() > high + slack:
        raise ValueError(
            f"a palette from {centres.min():g} to {centres.max():g}; expected {low:g} to {high:g}, "
            "where a level of 0 to 255 is level / 127.5 - 1"
        )


def palette_of(clusters: Any) -> np.ndarray:
    """(V, 3) in float32 if it came so, else float64: the rounding in transformers depends on it."""
    array = np.array(clusters.numpy(force=True) if isinstance(clusters, torch.Tensor) else clusters)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a palette is (colours, 3), finite, in [-1, 1]; this one has shape {array.shape}")
    return array
