"""What is asked of an extraction, and the key of the store that answers it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from igpt_lab.core.arguments import check_fields
from igpt_lab.core.devices import gains_by_bfloat16
from igpt_lab.core.provenance import digest
from igpt_lab.core.values import did_you_mean
from igpt_lab.features.hooks import layers_of
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.poolings import pooling
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.cost import inner_width
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import check_alignment

DTYPES = ("float32", "bfloat16")
ON_BAD_IMAGE = ("error", "skip")
# Fields of a configuration that no hidden state of a model in eval mode depends on: they are not in the store's key.
NOT_SEEN = (
    "resid_pdrop embd_pdrop attn_pdrop initializer_range use_cache tie_word_embeddings pad_token_id bos_token_id "
    "eos_token_id num_labels id2label label2id problem_type output_attentions output_hidden_states return_dict"
).split()


@dataclass(frozen=True)
class ExtractionSettings:
    """What is asked of an extraction, as a store's manifest keeps it for a repair.

    Attributes:
        points: Places in a block, see `record`.
        layers: Layers at each point, or None for all; negative ones count from the end.
        pool: Pooling over positions, see `record`.
        alignment: "sos", "raw", or None for what the model was trained with.
        dtype: Of the matrix products, "float32", "bfloat16", or None for what suits the device.
        batch_size: Images at a time, or None for what suits the device.
        on_bad_image: "error", or "skip" to leave out images that cannot be read.

    Raises:
        ValueError: A setting that there is not.
    """

    points: Sequence[str] = ("ln_1",)
    layers: Sequence[int] | None = None
    pool: str = "mean"
    alignment: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "points", tuple(self.points))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        pooling(self.pool)  # ValueError for one that there is not
        if self.alignment is not None:
            check_alignment(self.alignment)
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {self.dtype!r}; expected 'float32' or 'bfloat16' (float16 overflows in ImageGPT)")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected at least 1, or None for what suits the device")
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={self.on_bad_image!r}; expected 'error' or 'skip'")

    def settled(self, config: ImageGPTConfig, device: torch.device) -> ExtractionSettings:
        """With the alignment and the dtype chosen that are None: by the model, which may refuse, and the device.

        The size of a batch stays open: it suits the device, and a repair may run on another.
        """
        pooling(self.pool).check(config.n_positions)
        alignment = self.alignment or ("raw" if config.bidirectional else "sos")
        check_alignment(alignment, config)
        dtype = self.dtype or ("bfloat16" if gains_by_bfloat16(device.type) else "float32")
        return replace(self, alignment=alignment, dtype=dtype)

    def layers_at(self, config: ImageGPTConfig) -> dict[str, list[int]]:
        """The layers at each point of a model; ValueError for a point or a layer that it has not."""
        return {point: layers_of(point, config.n_layer, self.layers) for point in self.points}

    def options(self) -> dict:
        """The settings as a manifest keeps them: plain JSON."""
        layers = None if self.layers is None else list(self.layers)
        return asdict(self) | {"points": list(self.points), "layers": layers}

    @classmethod
    def from_options(cls, options: dict) -> ExtractionSettings:
        """Settings from those of a manifest. Unknown names are ignored: a manifest may be older, or a stranger's."""
        return cls(**{name: options[name] for name in setting_names() if name in options})


def setting_names() -> list[str]:
    """Names of the settings."""
    return [setting.name for setting in fields(ExtractionSettings)]


def settings_of(values: dict) -> ExtractionSettings:
    """Settings given by keyword; TypeError with the closest right name for one that is misspelt."""
    check_names(values, setting_names())
    return ExtractionSettings(**values)


def check_names(names: Sequence[str] | dict, known: Sequence[str], what: str = "an extraction") -> None:
    """TypeError for a keyword that is not known, with the closest that is."""
    for name in names:
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}; {did_you_mean(name, known)}")


def default_batch(config: ImageGPTConfig, device: torch.device) -> int:
    """Images at a time: on a CPU as many as stay near its caches, elsewhere what fills a large accelerator.

    A function of the shapes alone, since another batch size may round in another way.
    """
    return max(1, (3_200 if device.type == "cpu" else 131_072) // config.n_positions)


def width_at(point: str, config: ImageGPTConfig) -> int:
    """D of the states at a point."""
    return {"mlp_act": inner_width(config), "qkv": 3 * config.n_embd}.get(point, config.n_embd)


def extraction_key(
    model: ImageGPTForCausalImageModeling, splits: Sequence[ImageSet | TokenSet], settings: ExtractionSettings
) -> FeatureKey:
    """The key of an extraction with settled settings, weights and palette by their content.

    Raises ValueError for a point or layer that the model has not, for splits of several image sets or of equal images,
    for weights that are not float32, and inside an `edit` of the model.
    """
    if getattr(model.transformer, "edits", 0):
        raise ValueError("a model inside an `edit` block has other features than its key says; use `record` there")
    if odd := {weights.dtype for weights in model.transformer.parameters()} - {torch.float32}:
        own = str(odd.pop()).removeprefix("torch.")
        raise ValueError(
            f"the model's weights are {own}, and dtype={settings.dtype!r} is of float32 weights; model.float() makes "
            "them so"
        )
    layers, images_of = settings.layers_at(model.config), images_in_key(splits)
    if settings.alignment is None or settings.dtype is None:
        raise ValueError(f"{settings} leaves alignment or dtype open; expected what `settled` returns")
    return FeatureKey(
        model=str(model.name),
        weights=digest_of_weights(model),
        **images_as_read(model),
        **images_of,
        layers=layers,
        pool=settings.pool,
        alignment=settings.alignment,
        dtype=settings.dtype,
    )


def images_in_key(splits: Sequence[ImageSet | TokenSet]) -> dict[str, Any]:
    """Fields of the key that say which images: ValueError for splits of several image sets, or of equal images."""
    names = {images.name for images in splits}
    if len(names) != 1:
        raise ValueError(f"one store holds the splits of one image set; got {sorted(names)}: extract each alone")
    if len({images.fingerprint for images in splits}) < len(splits):
        same = " and ".join(images.split for images in splits)
        raise ValueError(
            f"{names.pop()} gives the same images for {same}; expected different images; "
            "put each split into a folder of its own"
        )
    return {
        "images": names.pop(),
        "splits": {images.split: (images.fingerprint, len(images)) for images in splits},
    }


def images_as_read(model: ImageGPTForCausalImageModeling) -> dict:
    """Fields of the key that say how an image becomes tokens; "none" where a model takes tokens alone."""
    processor: Any = model.processor
    if processor is None:
        side = math.isqrt(model.config.n_positions)
        return {"palette": "none", "size": side, "resample": "none", "crop": "none"}
    return {
        "palette": digest(processor.clusters.tobytes()),
        "size": processor.side,
        "resample": processor.resampling,
        "crop": processor.crop,
    }


def digest_of_weights(model: ImageGPTForCausalImageModeling) -> str:
    """Digest of the backbone's weights, and of what in the configuration a hidden state depends on."""
    weights = {name: digest(tensor.cpu().numpy().tobytes()) for name, tensor in model.transformer.state_dict().items()}
    built = {"model_type": model.config.model_type} | asdict(model.built)  # what computes, whatever was set since
    built["bidirectional"] = model.config.bidirectional  # but for this, which every pass reads anew
    config = {name: value for name, value in built.items() if name not in NOT_SEEN}
    return digest({"config": config, "weights": weights})
