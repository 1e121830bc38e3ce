"""ImageGPT (Chen et al., Generative Pretraining from Pixels, ICML 2020), readable alone.

A GPT over palette indices: n = norm(h); a = h + attention(n); h' = a + mlp(norm(a)), then `ln_f` and an untied head.
Three things differ from GPT-2: the norm keeps the mean and has a gain only, the activation is x * sigmoid(1.702 x), and
a learned start token (SOS, the last row of `wte`) takes the place of the last pixel, so that position i holds pixel
i - 1 and predicts pixel i.

Classes, arguments, outputs, and the names and shapes of the weights are those of Hugging Face's ImageGPT,
so its code runs and its checkpoints load: linear maps are stored (in, out), and have biases, which are zero in the
released weights because the original has none.

Letters: N images, T positions, V colours, L blocks, D width, K classes.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_lab.core.devices import widened
from igpt_lab.models import checkpoints, fast
from igpt_lab.models.config import ACTIVATIONS, PROBLEMS, ImageGPTConfig, config_of
from igpt_lab.models.cost import check_room
from igpt_lab.models.losses import cross_entropy

if TYPE_CHECKING:
    from igpt_lab.images.processor import ImageGPTImageProcessorPil

FIELDS = "loss last_hidden_state logits past_key_values hidden_states attentions cross_attentions".split()


class Output(dict):
    """What a forward pass gives: fields by attribute, key or index, as the outputs of transformers.

    A field that was not asked for is None as an attribute, and absent as a key and in `to_tuple()`; setting one to
    None takes it away.
    """

    def __getattr__(self, name: str):
        if name in FIELDS:
            return self.get(name)
        raise AttributeError(f"an output has no {name!r}; it has {', '.join(self)}")

    def __setattr__(self, name: str, value) -> None:
        if name not in FIELDS:
            raise AttributeError(f"an output has no {name!r}; its fields are {', '.join(FIELDS)}")
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: str | int | slice):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The fields that are there, in order."""
        return tuple(self.values())


def _output(values: dict, return_dict: bool) -> Output | tuple:
    """`values` without those that are None, as `Output` or as a tuple."""
    given = Output({name: value for name, value in values.items() if value is not None})
    return given if return_dict else given.to_tuple()


class Linear(nn.Module):
    """x @ weight + bias with weight (in, out), the layout of Hugging Face's checkpoints."""

    biased = True  # where not, training leaves out the bias: see `prepare_training`

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if fast.applies(x):
            return fast.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.t(), self.bias if self.biased or not self.training else None)


class Norm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * gain, in float32 or wider: in float16 the square overflows for |x| > 255."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        gain = self.weight.to(wide.dtype)
        if fast.applies(x):
            return fast.rms_norm(wide, gain, self.eps).to(x.dtype)
        return F.rms_norm(wide, self.weight.shape, gain, self.eps).to(x.dtype)


class KeyValueCache:
    """Keys and values of every block's self-attention, each (N, heads, t, D / heads), for decoding.

    `KeyValueCache()` grows with every forward pass and keeps gradients. `KeyValueCache.of(config, ...)` has room for
    `length` positions from the start and is written in place: faster, without gradients.
    """

    def __init__(self):
        self.filled = 0
        self.room: Tensor | None = None
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, config: ImageGPTConfig, batch: int, length: int, *, device, dtype) -> KeyValueCache:
        """A cache for `batch` images of up to `length` positions."""
        cache = cls()
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        cache.room = torch.zeros(shape, device=device, dtype=dtype)
        return cache

    def get_seq_length(self) -> int:
        """Positions that it holds; the name is transformers'."""
        return self.filled

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless `tokens` more positions of `batch` images fit behind what is filled."""
        held = self.room.shape[2] if self.room is not None else self.states[0][0].shape[0] if self.states else batch
        if batch != held:
            raise ValueError(f"a batch of {batch} for a cache of {held}; make the cache with batch={batch}")
        if self.room is not None and self.filled + tokens > self.room.shape[4]:
            length = self.room.shape[4]
            raise ValueError(f"{tokens} more tokens for a cache that holds {self.filled} of {length}; make it longer")

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (N, heads, t, D / heads) behind what is filled; returns all keys and values so far."""
        if self.room is None:
            if layer in self.states:
                old = self.states[layer]
                key, value = torch.cat([old[0], key], dim=2), torch.cat([old[1], value], dim=2)
            self.states[layer] = key, value
            return key, value
        end = self.filled + key.shape[2]
        self.room[layer, 0, :, :, self.filled : end] = key
        self.room[layer, 1, :, :, self.filled : end] = value
        return self.room[layer, 0, :, :, :end], self.room[layer, 1, :, :, :end]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, dropout: float, upcast: bool
) -> tuple[Tensor, Tensor]:
    """Attention written out, for its weights (N, heads, T, S) or for scores in float32 whatever the model's dtype."""
    kind = query.device.type
    full = torch.autocast(kind, enabled=False) if upcast and torch.amp.is_autocast_available(kind) else nullcontext()
    with full:
        scores = (widened(query) @ widened(key).mT if upcast else query @ key.mT) * scale
    weights = (scores if bias is None else scores + bias).softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


class Attention(nn.Module):
    """Dense attention, scale 1 / sqrt(D / heads): of a sequence to itself, or (`cross`) to an encoder's states."""

    chunks = 0  # above 0, training writes attention out, a causal one in so many chunks: see `prepare_training`

    def __init__(self, config: ImageGPTConfig, layer: int, *, cross: bool = False):
        super().__init__()
        self.heads, self.layer, self.cross, self.dropout = config.n_head, layer, cross, config.attn_pdrop
        self.upcast = config.reorder_and_upcast_attn
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Linear(config.n_embd, (2 if cross else 3) * config.n_embd)
        if cross:
            self.q_attn = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, *, encoder: Tensor | None = None, bias: Tensor | None = None, causal: bool = False,
        cache: KeyValueCache | None = None, explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(N, T, D) -> (N, T, D), and with `explicit` the weights (N, heads, T, S). `bias` is added to the scores."""
        parts = (self.q_attn(x), *self.c_attn(encoder).chunk(2, -1)) if self.cross else self.c_attn(x).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if explicit or self.upcast:
            mixed, weights = _attend(query, key, value, bias, scale=self.scale, dropout=dropout, upcast=self.upcast)
        elif self.chunks and self.training and bias is None and not dropout:
            mixed = fast.attention(query, key, value, scale=self.scale, causal=causal, chunks=self.chunks)
        else:
            if cache is None:
                key, value = fast.contiguous(key), fast.contiguous(value)
            mixed = F.scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale=self.scale)
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).flatten(2))), weights


class MLP(nn.Module):
    """Width D -> n_inner (4 D) -> D."""

    def __init__(self, config: ImageGPTConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner)
        self.c_proj = Linear(inner, config.n_embd)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.c_fc(x)
        return self.dropout(self.c_proj(fast.activation(self.act, inner, self.c_fc, Linear)))


class Block(nn.Module):
    """One pre-norm block: (N, T, D) -> (N, T, D), and its attention weights where they are asked for."""

    def __init__(self, config: ImageGPTConfig, layer: int):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config.n_embd, config.layer_norm_epsilon)
        if config.add_cross_attention:
            self.crossattention = Attention(config, layer, cross=True)
            self.ln_cross_attn = Norm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, *, encoder: Tensor | None = None, encoder_bias: Tensor | None = None, explicit: bool = False,
        **how,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        mixed, weights = self.attn(self.ln_1(x), explicit=explicit, **how)
        x, cross_weights = x + mixed, None
        if encoder is not None:
            mixed, cross_weights = self.crossattention(
                self.ln_cross_attn(x), encoder=encoder, bias=encoder_bias, explicit=explicit
            )
            x = x + mixed
        return x + self.mlp(self.ln_2(x)), weights, cross_weights


class Pretrained(nn.Module):
    """Initialisation, loading and saving, shared by the three classes."""

    transformer: ImageGPTModel
    lm_head: nn.Linear
    name: str  # these three where `load_model` made it
    source: dict
    processor: ImageGPTImageProcessorPil | None

    def __init__(self, config: ImageGPTConfig):
        check_room(config)
        super().__init__()
        self.config = config

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
    def trunk(self) -> ImageGPTModel:
        """The earlier name of `backbone`."""
        warnings.warn("`trunk` is now called `backbone`", DeprecationWarning, stacklevel=2)
        return self.backbone

    def get_input_embeddings(self) -> nn.Embedding:
        """`wte`, the embedding of tokens; the name is transformers'."""
        return self.backbone.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        """Replace `wte`; the name is transformers'."""
        self.backbone.wte = embeddings

    def num_parameters(self) -> int:
        """Number of parameters, biases too."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        lines = "<br/>".join(html.escape(fact) for fact in facts)
        return {"text/plain": plain, "text/html": f"<b>{html.escape(name)}</b><br/>{lines}"}

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only every block's input and compute the rest again in the backward pass."""
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep every activation of the forward pass, as is the default."""
        self.backbone.gradient_checkpointing = False

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
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: ImageGPTConfig | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes,
    ) -> Self:
        """A model in eval mode on the CPU, from a bundled name, a folder in transformers' layout or a Hub name.

        A head that the checkpoint has not starts at zero, with a warning.

        Args:
            source: Bundled name, folder, or name on the Hub.
            config: Takes the place of `config.json`.
            revision: Branch, tag or commit on the Hub.
            dtype: Of the weights: a floating-point type, its name, or "auto", that of the checkpoint.
            torch_dtype: The older name of `dtype`.
            ignore_mismatched_sizes: A head of another shape than the checkpoint's starts at zero too.
            **changes: Fields of the configuration, such as `num_labels=10`.

        Returns:
            The model, of the class that this is called on.

        Raises:
            CheckpointError: Missing, misshapen or unknown tensors, which are named; no such source; a broken file.
            ValueError: A dtype that is not of floating point.
            TypeError: A change that is no field of the configuration.

        Example:
            >>> backbone = lab.ImageGPTModel.from_pretrained("tiny")
            >>> backbone.config.n_layer, backbone.dtype, backbone.training
            (3, torch.float32, False)
        """
        found, state, where = checkpoints.read(source, revision=revision)
        dtype = _dtype(torch_dtype or dtype, found, state)
        config = config_of(found if config is None else config.to_dict(), changes, where.parent / "config.json")
        checkpoints.check_layers(config, state, where)
        with torch.device("meta"):
            model = cls(config, init=None)  # type: ignore[call-arg]  # which all three take
        expected = {n: p for n, p in model.state_dict().items() if not (config.tie_word_embeddings and n == TIED)}
        state = checkpoints.match(
            state, expected, base=cls is ImageGPTModel, where=where, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
        return model.tie_weights().eval()

    def tie_weights(self) -> Self:
        """With `tie_word_embeddings`, make the causal head's weight that of `wte`."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.transformer.wte.weight
        return self

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write `config.json` and `model.safetensors` (in `dtype`, default as they are) in transformers' layout."""
        config = self.config.to_dict() | {"architectures": [type(self).__name__]}
        tied = {TIED} if self.config.tie_word_embeddings else set()
        state = {n: tensor.to(dtype or tensor.dtype) for n, tensor in self.state_dict().items() if n not in tied}
        return checkpoints.write(folder, config, state)


TIED = "lm_head.weight"


def _dtype(given: torch.dtype | str, config: dict, state: dict[str, Tensor]) -> torch.dtype:
    """A dtype by itself or by name; "auto" is that of `config.json`, or else of the file."""
    if given == "auto":
        floating = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        given = config.get("dtype") or config.get("torch_dtype") or next(floating, torch.float32)
    found = given if isinstance(given, torch.dtype) else getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {given!r}; expected a floating-point type as torch.float32, its name, or 'auto'")
    return found


class ImageGPTModel(Pretrained):
    """The backbone: tokens (N, T) int64 -> states (N, T, D).

    `init`: "original" or "transformers", see `initialise`; None leaves the weights unset, for whoever sets them all.
    """

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        if init:
            self.initialise(init, generator)

    @property
    def backbone(self) -> ImageGPTModel:
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        masked: Tensor | None = None,
    ) -> Output | tuple:
        """Tokens, or their embeddings, -> states after `ln_f`.

        Ids of other axes, (T,) or (N, 1, T), are taken as (N, T); the last state has their axes, as in transformers.

        Args:
            input_ids: int64 (N, T), each below `vocab_size`.
            past_key_values: A `KeyValueCache`: the tokens stand behind those that it holds. It is changed in place.
            attention_mask: (N, all T so far), 0 where nobody may look; or what is itself added to the scores, (N or 1,
                heads or 1, T, S).
            token_type_ids: int64 (N, T), whose rows of `wte` are added.
            position_ids: int64 (1 or N, T); by default T in a row.
            inputs_embeds: (N, T, D), in place of `input_ids`.
            encoder_hidden_states: (N, S, D), what a model with `add_cross_attention` looks at.
            encoder_attention_mask: (N, S), 0 where nobody may look.
            use_cache: Return the keys and values; by default as the configuration says.
            output_attentions: Return `attentions`; by default as the configuration says.
            output_hidden_states: Return `hidden_states`; by default as the configuration says.
            return_dict: Return an `Output` and not a tuple; by default as the configuration says.
            masked: bool (N, T), of a bidirectional model: these tokens are hidden.

        Returns:
            An `Output` with `last_hidden_state` (N, T, D), and what else is asked for: `past_key_values`;
            `hidden_states`, L + 1 of (N, T, D), as transformers counts them: [l] is the UN-normed input of block l for
            l < L, and the normed last state for l = L; `attentions` and `cross_attentions`, L of (N, heads, T, S).

        Raises:
            ValueError: Both or none of `input_ids` and `inputs_embeds`, more positions than the model has, a cache of
                other images, `masked` or a cache of the wrong kind of model, or encoder states without cross-attention.
            TypeError: `past_key_values` that are no `KeyValueCache`.

        Example:
            >>> out = model.transformer(ids, output_hidden_states=True)
            >>> out.last_hidden_state.shape, len(out.hidden_states)
            (torch.Size([2, 16, 8]), 4)
        """
        config = self.config
        weighed = config.output_attentions if output_attentions is None else output_attentions
        keep = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.wte(input_ids.view(-1, input_ids.shape[-1]))
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("expected either input_ids or inputs_embeds; got both or none")
        if encoder_hidden_states is not None and not config.add_cross_attention:
            raise ValueError("encoder_hidden_states need a model with cross-attention: set add_cross_attention=True")
        n, t = inputs_embeds.shape[:2]
        if not isinstance(past_key_values, KeyValueCache | None):
            kind = type(past_key_values).__name__
            raise TypeError(f"past_key_values is a {kind}; expected a KeyValueCache, as this model's outputs have it")
        checkpointing = self.gradient_checkpointing and self.training and past_key_values is None
        cached = (config.use_cache if use_cache is None else use_cache) and not (config.bidirectional or checkpointing)
        cache = KeyValueCache() if cached and past_key_values is None else past_key_values
        start = self._start(cache, n, t)

        x = self._masked(inputs_embeds, masked)
        x = x + (self.wpe.weight[start : start + t] if position_ids is None else self.wpe(position_ids))
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids.view(-1, t))
        x = self.drop(x)

        explicit = weighed or config.reorder_and_upcast_attn
        bias, causal = self._bias(x, start, attention_mask, explicit)
        options: dict[str, Any] = {
            "bias": bias, "causal": causal, "cache": cache, "explicit": explicit, "encoder": encoder_hidden_states,
            "encoder_bias": _hide(encoder_attention_mask, x),
        }  # fmt: skip
        states, attentions, crossed = [], [], []
        for block in self.h:
            states.append(x if keep else None)
            x, *weights = checkpoint(block, x, use_reentrant=False, **options) if checkpointing else block(x, **options)
            attentions.append(weights[0])
            crossed.append(weights[1])
        if cache is not None:
            cache.filled = start + t
        x = self.ln_f(x)
        x = x if input_ids is None else x.view(*input_ids.shape, -1)
        values = {
            "last_hidden_state": x,
            "past_key_values": cache,
            "hidden_states": (*states, x) if keep else None,
            "attentions": tuple(attentions) if weighed else None,
            "cross_attentions": tuple(crossed) if weighed and encoder_hidden_states is not None else None,
        }
        return _output(values, config.return_dict if return_dict is None else return_dict)

    def _start(self, cache: KeyValueCache | None, n: int, t: int) -> int:
        """The position of the first of `t` tokens of `n` images, after checks that they fit."""
        if cache is None:
            start = 0
        elif self.config.bidirectional:
            raise ValueError("a bidirectional model has no past: every position sees all others")
        else:
            start = cache.filled
            cache.check(n, t)
        if start + t > self.config.n_positions:
            raise ValueError(f"{start + t} positions, but the model has {self.config.n_positions}; shorten the input")
        return start

    def _masked(self, embedded: Tensor, masked: Tensor | None) -> Tensor:
        """Token embeddings (N, T, D), zero where `masked` (N, T)."""
        if masked is None:
            return embedded
        if not self.config.bidirectional:
            raise ValueError("masked tokens are for a bidirectional model; this one predicts the next pixel")
        return embedded.masked_fill(masked.view(embedded.shape[:2])[..., None].bool(), 0)

    def _bias(self, x: Tensor, start: int, attention_mask: Tensor | None, explicit: bool) -> tuple[Tensor | None, bool]:
        """What is added to the scores, if anything, and whether SDPA makes the causal mask by itself."""
        t, causal = x.shape[1], not self.config.bidirectional and x.shape[1] > 1
        if attention_mask is None and causal and start == 0 and not explicit:
            return None, True
        bias, dtype = _hide(attention_mask, x), dtype_of_products(x)
        if causal:
            later = torch.full((t, start + t), torch.finfo(dtype).min, device=x.device, dtype=dtype).triu(start + 1)
            bias = later if bias is None else later + bias
        return bias, False


def _hide(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """(N, S), 0 where nobody may look -> what is added to scores (N, heads, T, S); four axes are taken as they are.

    The lowest finite number hides, as in transformers: minus infinity would make a row that sees nothing NaN.
    """
    if mask is None or mask.ndim == 4:
        return mask
    dtype, shown = dtype_of_products(x), mask.reshape(-1, 1, 1, mask.shape[-1]).bool()
    return torch.zeros(shown.shape, device=mask.device, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`: autocast's, where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


class ImageGPTForCausalImageModeling(Pretrained):
    """The backbone and an untied head over V colours (V + 1 rows with `tie_word_embeddings`, as in transformers)."""

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        self.transformer = ImageGPTModel(config, init=None)
        self.lm_head = nn.Linear(config.n_embd, config.n_colours, bias=False)
        self.tie_weights()
        if init:
            self.initialise(init, generator)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        masked: Tensor | None = None,
    ) -> Output | tuple:
        """Logits of the next pixel, and the loss where there are labels.

        Args:
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids: As of `ImageGPTModel`.
            inputs_embeds, encoder_hidden_states, encoder_attention_mask: As of `ImageGPTModel`.
            labels: int64 (N, T), shifted inside as in transformers: logits at i score label i + 1; -100 is left out.
                That leaves the first pixel unscored: for the paper's loss over all T pixels use `next_pixel_loss`.
                Those of a bidirectional model are not shifted, and scored where `masked` only.
            use_cache, output_attentions, output_hidden_states, return_dict, masked: As of `ImageGPTModel`.

        Returns:
            An `Output` with `loss`, mean nats per label, where there are labels; `logits` (N, T, V); and what
            `ImageGPTModel` gives but the last state.

        Raises:
            ValueError: As of `ImageGPTModel`, or labels of a bidirectional model without `masked`.
            TypeError: As of `ImageGPTModel`.

        Example:
            >>> out = model(ids, labels=ids)
            >>> out.logits.shape, round(out.loss.item(), 3)  # ln 8: the head of new weights is zero
            (torch.Size([2, 16, 8]), 2.079)
        """
        out = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            encoder_hidden_states, encoder_attention_mask, use_cache, output_attentions, output_hidden_states,
            return_dict=True, masked=masked,
        )  # fmt: skip
        logits, loss = self.lm_head(out.pop("last_hidden_state")), None
        if labels is not None and self.config.bidirectional:
            if masked is None:
                raise ValueError("a bidirectional model is scored on masked pixels: pass `masked` with `labels`")
            loss = cross_entropy(logits, labels.masked_fill(~masked.view(labels.shape).bool(), -100))
        elif labels is not None:
            loss = cross_entropy(logits[..., :-1, :], labels[..., 1:])
        values = {"loss": loss, "logits": logits, **out}
        return _output(values, self.config.return_dict if return_dict is None else return_dict)

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue int64 (N, t), the given tokens in front; arguments are transformers'.

        The most probable token each time, or one drawn with `do_sample`. By default nothing is left out, as in the
        paper. An image is SOS and T pixels: max_length = n_positions + 1.

        Args:
            input_ids: int64 (N, t).
            inputs: Another name of `input_ids`.
            max_length: Tokens in the end.
            max_new_tokens: Tokens that are added; in place of `max_length`.
            do_sample: Draw each token.
            temperature: Logits are divided by it before a draw, above 0.
            top_k: Only the k largest logits may be drawn; None for all.
            top_p: Of these only the most probable that together reach this fraction; None for all.
            eos_token_id: A row that reached it, or one of several, is at its end; by default the configuration's.
            pad_token_id: Fills such rows until all are at their end; by default the first of `eos_token_id`.
            use_cache: Keep keys and values. Without, each step passes over all tokens again.
            generator: Of the draws; by default torch's own.

        Returns:
            int64 (N, max_length), or fewer columns where all rows reached their end.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs`, or of `max_length` and `max_new_tokens`; a length that
                adds nothing or is above n_positions + 1; a temperature, `top_k` or `top_p` out of range; a
                bidirectional model.

        Example:
            >>> begun = torch.full_like(ids[:, :1], model.config.sos_token_id)
            >>> drawn = model.generate(begun, max_length=17, do_sample=True)
            >>> drawn.shape, drawn[:, 0].tolist()
            (torch.Size([2, 17]), [8, 8])
        """
        begun = inputs if input_ids is None else input_ids
        if begun is None or (input_ids is not None and inputs is not None):
            raise ValueError("expected either input_ids or inputs; got both or none")
        if (max_length is None) == (max_new_tokens is None):
            raise ValueError("expected either max_length or max_new_tokens; got both or none")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}; expected a number above 0")
        given = begun.shape[1]
        length = given + (max_new_tokens or 0) if max_length is None else max_length
        longest = self.config.n_positions + 1
        if not given < length <= longest:
            raise ValueError(f"{length} tokens from {given} given; expected more than those and at most {longest}")

        def pick(logits: Tensor, _: int) -> Tensor:
            if not do_sample:
                return logits.argmax(-1, keepdim=True)
            weights = cut(logits.float() / temperature, top_k, top_p).softmax(-1)
            return torch.multinomial(weights, 1, generator=generator)

        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        # Made outside of inference mode, so that what is returned may be trained on.
        tokens = F.pad(begun, (0, length - given), value=self.config.sos_token_id)
        ending = _until(pick, ends, ends[0] if pad is None else pad) if ends else pick
        return self.continue_(tokens, given, ending, use_cache=use_cache)

    @torch.inference_mode()
    def continue_(
        self, tokens: Tensor, given: int, pick: Callable[[Tensor, int], Tensor | None], progress=range, *,
        use_cache: bool = True,
    ) -> Tensor:  # fmt: skip
        """Fill columns from `given` on, in place: one pass over what is given, then a token a step.

        Args:
            tokens: int64 (N, length), whose columns before `given` hold what is given.
            given: Number of those columns, 1 or more.
            pick: `pick(logits (N, V), column)` gives the column's tokens (N, 1), or None to end.
            progress: Wraps the range of columns, such as `tqdm.trange`.
            use_cache: Keep keys and values. Without, each step passes over all tokens again.

        Returns:
            `tokens`; where `pick` gave None, the columns before that.

        Raises:
            ValueError: A bidirectional model, or more tokens than positions.

        Example:
            >>> begun = torch.full_like(ids[:, :4], model.config.sos_token_id)
            >>> model.continue_(begun, 1, lambda logits, column: torch.full_like(begun[:, :1], column)).tolist()
            [[8, 1, 2, 3], [8, 1, 2, 3]]
        """
        if self.config.bidirectional:
            raise ValueError("a bidirectional model predicts masked pixels, and continues no image")
        count, length = tokens.shape
        was_training = self.training
        cache: KeyValueCache | None = None
        if use_cache:
            cache = KeyValueCache.of(self.config, count, length - 1, device=tokens.device, dtype=self.dtype)
        self.eval()
        try:
            for column in progress(given, length):
                fed = tokens[:, (0 if cache is None else cache.filled) : column]
                states = self.transformer(fed, cache, use_cache=use_cache, return_dict=True).last_hidden_state[:, -1]
                picked = pick(self.lm_head(states)[:, : self.config.n_colours], column)
                if picked is None:
                    return tokens[:, :column]
                tokens[:, column, None] = picked
        finally:
            self.train(was_training)
        return tokens


class ImageGPTForImageClassification(Pretrained):
    """The backbone and a linear head over the mean of its T normed last states."""

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ImageGPTModel(config, init=None)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        if init:
            self.initialise(init, generator)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output | tuple:
        """Logits of the classes, from the mean state, and the loss where there are labels.

        Args:
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds: As of
                `ImageGPTModel`.
            labels: int64 (N,), or floating point: (N,) for regression (K = 1), (N, K) of 0 and 1 for several labels an
                image. `problem_type` of the configuration decides where K and the labels' dtype do not say it.
            use_cache, output_attentions, output_hidden_states, return_dict: As of `ImageGPTModel`.

        Returns:
            An `Output` with `loss` where there are labels (nats, or a squared error for regression), `logits` (N, K),
            and what `ImageGPTModel` gives but the last state.

        Raises:
            ValueError: As of `ImageGPTModel`.
            TypeError: As of `ImageGPTModel`.

        Example:
            >>> classifier = lab.ImageGPTForImageClassification.from_pretrained("tiny", num_labels=10)
            >>> classifier(torch.zeros(2, 16, dtype=torch.long)).logits.shape
            torch.Size([2, 10])
        """
        out = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            use_cache=use_cache, output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=True,
        )  # fmt: skip
        logits = self.score(out.pop("last_hidden_state").mean(dim=-2))
        loss = None if labels is None else self._loss(widened(logits), labels)
        values = {"loss": loss, "logits": logits, **out}
        return _output(values, self.config.return_dict if return_dict is None else return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Squared error for regression, cross-entropy for one label an image, binary cross-entropy for several."""
        kind = self.config.problem_type
        if kind is None:
            whole = not labels.is_floating_point()
            kind = PROBLEMS[0] if self.config.num_labels == 1 else PROBLEMS[1] if whole else PROBLEMS[2]
        if kind == "regression":
            return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _until(pick: Callable[[Tensor, int], Tensor], ends: list[int], pad: int) -> Callable[[Tensor, int], Tensor | None]:
    """`pick` that gives `pad` in the rows that had one of `ends`, and None when all have."""
    over = None

    def ending(logits: Tensor, column: int) -> Tensor | None:
        nonlocal over
        if over is not None and over.all():
            return None
        picked = pick(logits, column)
        over = torch.zeros_like(picked, dtype=torch.bool) if over is None else over
        picked = picked.masked_fill(over, pad)
        over |= torch.isin(picked, torch.tensor(ends, device=picked.device))
        return picked

    return ending


def cut(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (N, V) with minus infinity outside the `top_k` largest, then outside the nucleus of `top_p`.

    Ties with the k-th stay. The nucleus is the smallest set of the most probable tokens whose sum reaches `top_p`
    (Holtzman et al., 2020); the most probable one always stays.
    """
    if top_k:  # 0 leaves nothing out, as in transformers
        if top_k < 0:
            raise ValueError(f"top_k={top_k}; expected a whole number above 0, or None to leave nothing out")
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a fraction above 0 and at most 1, or None to leave nothing out")
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -math.inf)
    return logits
