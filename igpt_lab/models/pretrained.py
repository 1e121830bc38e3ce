"""What the three models share: weights drawn, loaded and saved, and what transformers' models have besides."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from igpt_lab.core import hub
from igpt_lab.core.display import card
from igpt_lab.core.joining import also_called, join, peer
from igpt_lab.models import checkpoints, fast
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.cost import check_room
from igpt_lab.models.embeddings import TIED, Embeddings
from igpt_lab.models.generation_config import GENERATION, GenerationConfig

if TYPE_CHECKING:
    from igpt_lab.images.processor import ImageGPTImageProcessorPil
    from igpt_lab.models.imagegpt import ImageGPTModel


@peer("modeling_utils", "PreTrainedModel")
class ImageGPTPreTrainedModel(Embeddings, nn.Module):
    """Initialisation, loading and saving, shared by the three classes, and the base of a user's own.

    A class of one's own takes a configuration, makes its parts, the backbone by the name `transformer`, and ends with
    `post_init()`.
    """

    config_class = ImageGPTConfig
    base_model_prefix, main_input_name = "transformer", "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]
    _tied_weights_keys: ClassVar[dict | None] = None
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ()
    heads: tuple[str, ...] = ()  # tensors that a checkpoint may lack

    transformer: ImageGPTModel
    lm_head: nn.Linear
    generation_config: Any
    name: str  # these three where `load_model` made it
    source: dict
    processor: ImageGPTImageProcessorPil | None

    def __init_subclass__(cls, **_):
        """Nothing: that of transformers' class, once joined, looks up annotations that only a type checker imports."""

    def __init__(self, config: ImageGPTConfig, *_, **__):
        if not isinstance(config, ImageGPTConfig):
            if not hasattr(config, "to_dict"):
                raise TypeError(f"config is a {type(config).__name__}; expected an ImageGPTConfig")
            config = ImageGPTConfig.from_dict(config.to_dict())
        config.check()
        check_room(config)
        join()
        nn.Module.__init__(self)  # and not that of transformers' class, once the two are joined
        self.config, self.built = config, replace(config)  # `built` stays as it is when a user changes `config`
        self.name_or_path = config.name_or_path

    def named_modules(self, *args, **named):
        """As of every module; who asks for them may ask next what class they are."""
        join()
        return super().named_modules(*args, **named)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def backbone(self) -> ImageGPTModel:
        """The model without its head."""
        return self.transformer

    @property
    def base_model(self) -> nn.Module:
        """`backbone`, by transformers' name."""
        return self.backbone

    @property
    def trunk(self) -> ImageGPTModel:
        """The earlier name of `backbone`."""
        warnings.warn("`trunk` is now called `backbone`", DeprecationWarning, stacklevel=2)
        return self.backbone

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`."""
        return hasattr(cls, "continue_")

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        """What a notebook shows: its sizes. `print(model)` has every module."""
        config, name = self.config, f"{type(self).__name__} {getattr(self, 'name', '')}".strip()
        facts = [
            f"{config.n_layer} blocks of width {config.n_embd}, {config.n_head} heads, layers 0..{config.n_layer}",
            f"{config.n_positions:,} positions, {config.n_colours} colours",
            f"{self.num_parameters():,} parameters, {str(self.dtype).removeprefix('torch.')} on {self.device}",
        ]
        if hasattr(self, "processor"):
            facts.append(
                "with its palette" if self.processor is not None else "without a palette: takes token sets only"
            )
        plain = f"<{name}: {'; '.join(facts)}>"
        named = dict(zip(("network", "images", "weights", "palette"), facts, strict=False))
        return {"text/plain": plain, "text/html": card(name, named)}

    def gradient_checkpointing_enable(self, *_, **__) -> None:
        """In training, keep only every block's input and compute the rest again in the backward pass.

        Arguments are taken as transformers' are, and change nothing: it is never reentrant, and of every block.
        """
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep every activation of the forward pass, as is the default."""
        self.backbone.gradient_checkpointing = False

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.backbone.gradient_checkpointing

    is_activation_checkpointing = is_gradient_checkpointing

    def post_init(self) -> None:
        """What a class of one's own calls at the end of its `__init__`: the layers that it adds are drawn, once."""
        for name, child in self.named_children():
            drawn = isinstance(child, ImageGPTPreTrainedModel) or getattr(child, "_is_hf_initialized", False)
            if not drawn and not self.is_own(f"{name}.weight"):
                child.apply(self._init_weights)
                vars(child)["_is_hf_initialized"] = True  # transformers' name for it
        self.tie_weights()

    init_weights = post_init

    def _init_weights(self, module: Any) -> None:
        """Weights of linear maps and embeddings that a user added, with `initializer_range` as in transformers."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def prepare_training(self, *, bfloat16: bool = False) -> set[str]:
        """Let training steps take the fastest path to the same numbers, up to rounding; names of the biases left out.

        Biases that are all zero now, as in the original, are left out while the model is in training mode: do not train
        them. On a CPU attention is written out in chunks where that is faster than the fused kernel; `bfloat16` says
        whether products are of that type.
        """
        return fast.prepare_training(self, bfloat16=bfloat16)

    @torch.no_grad()
    def initialise(self, init: str = "original", generator: torch.Generator | None = None) -> Self:
        """Draw the weights anew; biases become zero, gains one.

        `original`, as the paper's code: positions 0.01; tokens, SOS and MLP 0.02; q, k, v 1 / sqrt(D); attention output
        1 / sqrt(D L); both heads exactly zero, so the first loss is exactly ln V. (Not so a head that is tied to the
        tokens: it is drawn as they are.) `transformers`, as there: all `initializer_range`, but for the outputs of
        attention and MLP, which have it over sqrt(2 L).
        """
        if init == "port":
            warnings.warn("init='port' is now called 'transformers'", DeprecationWarning, stacklevel=3)
            init = "transformers"
        if init not in ("original", "transformers"):
            raise ValueError(f"init {init!r}; expected 'original' or 'transformers'")
        d, blocks = self.config.n_embd, self.config.n_layer
        if init == "original":
            usual = 0.02
            scales = {"lm_head": 0, "score": 0, "wpe": 0.01, "c_attn": d**-0.5, "q_attn": d**-0.5,
                      "attn.c_proj": (d * blocks) ** -0.5, "crossattention.c_proj": (d * blocks) ** -0.5}  # fmt: skip
        else:
            usual = self.config.initializer_range
            scales = {"c_proj": usual / math.sqrt(2 * blocks)}
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1)
            else:
                scale = next((s for part, s in scales.items() if part in name), usual)
                weight.normal_(0, scale, generator=generator) if scale else weight.zero_()
        return self

    @classmethod
    @also_called(source="pretrained_model_name_or_path")
    def from_pretrained(
        cls,
        source: str | Path | None,
        *model_args,
        config: Any = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes,
    ) -> Self:
        """A model in eval mode on the CPU, from a bundled name, a folder in transformers' layout or a Hub name.

        A head that the checkpoint has not starts at zero, with a warning. What a user's own class adds may be absent,
        and stays as the class draws it.

        Args:
            source: Bundled name, folder, or name on the Hub; None with `config` and `state_dict`.
            *model_args: Of a user's own class.
            config: Takes the place of `config.json`; an object, or what one is read from.
            revision: Branch, tag or commit on the Hub.
            dtype: Of the weights: a floating-point type, its name, or "auto", that of the checkpoint.
            torch_dtype: The older name of `dtype`.
            ignore_mismatched_sizes: A head of another shape than the checkpoint's starts at zero too.
            **changes: Fields of the configuration, such as `num_labels=10`. `state_dict`, weights in place of the
                file's. `cache_dir`, `force_download`, `local_files_only`, `subfolder` and `token` say where files lie.
                `device_map`, a device or "auto". `output_loading_info`: also return what was absent.

        Returns:
            The model, of the class that this is called on.

        Raises:
            CheckpointError: Missing, misshapen or unknown tensors, which are named; no such source; a broken file.
            ValueError: A dtype that is not of floating point.
            TypeError: A change that is no field of the configuration.
            RuntimeError: torch's default device is "meta".

        Example:
            >>> backbone = lab.ImageGPTModel.from_pretrained("tiny")
            >>> backbone.config.n_layer, backbone.dtype, backbone.training
            (3, torch.float32, False)
        """
        if torch.get_default_device().type == "meta":
            raise RuntimeError("You are using `from_pretrained` with a meta device context manager; leave it")
        where, changes = hub.options(changes)
        options = {name: changes.pop(name, None) for name in ("device_map", "state_dict", "output_loading_info")}
        checkpoints.check_attention(changes.pop("attn_implementation", None))
        values: dict = {}
        state, file = options["state_dict"], Path("state_dict")
        if source is not None:
            values, held, file = checkpoints.read(source, revision=revision, **where)
            state = held if state is None else state
        dtype = checkpoints.dtype_of(torch_dtype or dtype, values, state)
        if isinstance(config, str | Path):
            config = cls.config_class.from_pretrained(config)
        config = cls.config_class.of_file(
            values if config is None else config.to_dict(), changes, file.parent / "config.json"
        )
        checkpoints.check_layers(config, state, file)
        model = cls._empty(config, model_args, state)
        expected = {n: p for n, p in model.state_dict().items() if not (config.tie_word_embeddings and n == TIED)}
        state, info = checkpoints.match(
            state, expected, model.is_own, base=model.backbone is model, where=file,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )  # fmt: skip
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
        model = model.to(dtype) if info["missing_keys"] else model
        model.name_or_path = vars(config)["_name_or_path"] = str(source)
        if cls.can_generate() and (file.parent / GENERATION).is_file():
            model.generation_config = GenerationConfig.of_file(file.parent / GENERATION)
        model = model.tie_weights().eval().to(checkpoints.device_of(options["device_map"]))
        return (model, info) if options["output_loading_info"] else model  # type: ignore[return-value]

    @classmethod
    def _empty(cls, config: ImageGPTConfig, model_args: tuple, state: dict[str, Tensor]) -> Self:
        """A model that waits for weights: without any, where no user's class needs to make its own parts."""
        if cls.__module__ != "igpt_lab.models.imagegpt":
            return cls(config, *model_args)
        with torch.device("meta"):
            model = cls(config, init=None)
            if hasattr(model, "lm_head") and TIED in state and len(state[TIED]) == config.vocab_size:
                model.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # as it is once resized
        return model

    def is_own(self, name: str) -> bool:
        """Whether a tensor of this name is one of ImageGPT's, and none that a user's class added."""
        inside = name if self.backbone is self else name.removeprefix("transformer.")
        within = self.backbone is self or inside != name
        return name in self.heads or (within and inside.partition(".")[0] in ("wte", "wpe", "h", "ln_f"))

    def tie_weights(self, *_, **__) -> Self:
        """With `tie_word_embeddings`, make the causal head's weight that of `wte`."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.transformer.wte.weight
        return self

    @classmethod
    def _from_config(cls, config: ImageGPTConfig, *, dtype: torch.dtype | str | None = None, **_) -> Self:
        """A new model; this is what `from_config` of transformers' Auto classes calls."""
        return cls(config) if dtype is None else cls(config).to(checkpoints.dtype_of(dtype, {}, {}))

    @also_called(folder="save_directory")
    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True, max_shard_size: int | str | None = None, push_to_hub: bool = False, **_,
    ) -> Path:  # fmt: skip
        """Write `config.json` and `model.safetensors` in transformers' layout.

        Of a model that can generate, what is set in `generation_config` goes into `generation_config.json`.

        Args:
            folder: Where to; it is made.
            dtype: Of the weights in the file; by default as they are.
            state_dict: Takes the place of the model's own.
            is_main_process: One that is not writes nothing.
            max_shard_size: The most of a file, such as "5GB".
            push_to_hub: False alone.
            **_: Other keywords of transformers', which change nothing.

        Returns:
            The folder.

        Raises:
            ValueError: `push_to_hub`.

        Example:
            >>> model.save_pretrained("copy").name
            'copy'
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True; this writes a folder: upload it with huggingface_hub.upload_folder")
        if not is_main_process:
            return Path(folder)
        config = self.config.to_dict() | {"architectures": [type(self).__name__]}
        tied = {TIED} if self.config.tie_word_embeddings else set()
        state = self.state_dict() if state_dict is None else state_dict
        state = {n: tensor.to(dtype or tensor.dtype) for n, tensor in state.items() if n not in tied}
        asked = self.generation_config.to_dict() if self.can_generate() else None
        return checkpoints.write(folder, config, state, max_shard_size, asked)
