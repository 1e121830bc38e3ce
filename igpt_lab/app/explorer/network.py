"""What a store's model says of one image: the colours that a layer expects, and where its heads look from a pixel.

T pixels, H heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
import torch

from igpt_lab.app.explorer.pictures import Source
from igpt_lab.core.devices import best_device
from igpt_lab.explaining.attention import attention_from
from igpt_lab.explaining.lenses import lens_strip
from igpt_lab.features.origins import sources_of
from igpt_lab.features.settings import digest_of_weights, images_as_read
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.processor import ImageGPTImageProcessorPil
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model, tokens_of

ASKED = ("image", "layer", "pixel")
COLOURS = ["true_red", "true_green", "true_blue"], ["red", "green", "blue"]
NO_LENS = "what a layer expects is read by the head of an ImageGPT, and this store is of another network"
WAY_OUT = "explore(store, model=lab.load_model('FOLDER')) takes it from a folder"
_loaded: WeakValueDictionary[str, ImageGPTForCausalImageModeling] = WeakValueDictionary()  # by the digest of weights


class Look(NamedTuple):
    """What is seen of one image at one layer from one pixel.

    `true` and `expected` are uint8 (T, 3), the image as the model reads it and the mean colours of the logit lens, and
    `nats` float32 (T,), -log p of the true pixels. `weights`, float32 (H, T), NaN from the pixel on, are those of the
    block that reads the layer, and `sos`, float32 (H,), those on the start token; after the last block without rows.
    """

    true: np.ndarray
    expected: np.ndarray
    nats: np.ndarray
    weights: np.ndarray
    sos: np.ndarray


class Network:
    """The model of a store, given or else loaded when it is first asked, and what its lens saw in the last image."""

    def __init__(self, store: FeatureStore, model: ImageGPTForCausalImageModeling | str | Path | None = None):
        self.store = store
        if model is not None and store.names:
            raise ValueError(f"model= is of a store of ImageGPT: {NO_LENS}")
        self._model = load_model(model) if isinstance(model, str | Path) else model
        if self._model is not None:
            check_model(store, self._model)
            if self._model is not model:
                self._model = _shared(store, self._model)
        self._problem = NO_LENS if store.names else ""  # why there is no model
        self._strip: tuple[tuple[str, int], pd.DataFrame] | None = None

    @property
    def processor(self) -> ImageGPTImageProcessorPil | None:
        """That of the model, once there is one."""
        return None if self._model is None else self._model.processor

    @property
    def model(self) -> ImageGPTForCausalImageModeling:
        """The model; ValueError says why there is none, and what to do."""
        if self._problem:
            raise ValueError(self._problem)
        if self._model is None:
            try:
                self._model = load_origin(self.store)
            except ValueError as error:
                self._problem = str(error)
                raise
        return self._model

    def answer(
        self, asked: dict, split: str, source: Source | str, rows: np.ndarray
    ) -> tuple[dict[str, dict], list[bytes]]:
        """The message for the browser, which asked for a layer and a pixel of an image, a position among `rows`.

        The pixel may be None, for the one in the middle. To what was asked it adds `problem`, a line, or else `side`,
        that of the image in pixels, and `heads`, with the arrays of a `Look` as bytes.
        """
        facts: dict[str, Any] = {"split": split} | {name: asked.get(name) for name in ASKED}
        try:
            look = self.look(split, source, rows, facts)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            line = str(error).partition("\n")[0] or type(error).__name__
            return {"look": facts | {"problem": line}}, []
        facts |= {"side": round(len(look.nats) ** 0.5), "heads": len(look.sos)}
        return {"look": facts}, [array.tobytes() for array in look]

    def look(self, split: str, source: Source | str, rows: np.ndarray, asked: dict) -> Look:
        """What there is to see of an image of a split; the middle becomes the pixel in `asked` where that is None."""
        model = self.model
        if isinstance(source, str):
            raise ValueError(source)
        if not 0 <= asked["image"] < len(rows):
            raise ValueError(f"image {asked['image']}; expected one of the {len(rows)} that are shown")
        position = int(np.searchsorted(source.images.index, rows[asked["image"]]))
        tokens = tokens_of(model, source.images.select([position]))
        if self._strip is None or self._strip[0] != (split, position):
            self._strip = (split, position), lens_strip(model, tokens)
        strip = self._strip[1]
        strip = strip[strip.layer == asked["layer"]]
        if asked["pixel"] is None:
            asked["pixel"] = int(len(strip) + len(strip) ** 0.5) // 2
        weights, sos = _looks_from(model, tokens, asked["pixel"], asked["layer"])
        true, expected = (strip[columns].to_numpy(np.uint8) for columns in COLOURS)
        return Look(true, expected, strip.nats.to_numpy("<f4"), weights, sos)


def _looks_from(model: Any, tokens: np.ndarray, pixel: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (H, T) and the start token's (H,) of a block; after the last without rows."""
    if layer == model.config.n_layer:
        return np.zeros((0, tokens.shape[1]), "<f4"), np.zeros(0, "<f4")
    table = attention_from(model, tokens, pixel, layers=[layer])
    by_head = table[["weight", "sos"]].to_numpy("<f4").reshape(-1, tokens.shape[1], 2)
    return by_head[..., 0], by_head[:, 0, 1]


def load_origin(store: FeatureStore) -> ImageGPTForCausalImageModeling:
    """The model that a store names, from the package or a folder here; ValueError where it is not there, or another.

    All explorers that are open have the same one.
    """
    if store.key["weights"] in _loaded:
        return _loaded[store.key["weights"]]
    try:
        sources = sources_of(store, [])
        if sources.remote:
            raise ValueError(f"{sources.remote[0]} is not on this disk")
        about = dict(sources.model)
        model = load_model(about.pop("name"), **about)
    except (ValueError, OSError) as error:
        raise ValueError(f"the store's model is not available: {error}. {WAY_OUT}") from error
    check_model(store, model)
    return _shared(store, model)


def _shared(store: FeatureStore, model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """A store's model just loaded, or the one that another explorer has loaded before."""
    return _loaded.setdefault(store.key["weights"], model.to(best_device()))


def check_model(store: FeatureStore, model: ImageGPTForCausalImageModeling) -> None:
    """ValueError where the features of a store are not of this model, or not of images as it reads them."""
    if model.dtype != torch.float32 or not hasattr(model, "processor"):
        raise ValueError(f"a model of {model.dtype}; expected one of torch.float32, as lab.load_model gives it")
    key, weights = store.key, digest_of_weights(model)
    if weights != key["weights"]:
        expected = f"expected those of {key['model']}, {key['weights'][:8]}"
        raise ValueError(f"the store is of another model: {model.name} has the weights {weights[:8]}; {expected}")
    for name, value in images_as_read(model).items():
        if value != key[name]:
            wrong = f"{name} {str(value)[:8]}, not {str(key[name])[:8]}"
            raise ValueError(f"{model.name} reads images differently than the model of the store: {wrong}")
