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

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_lab.core.devices import widened
from igpt_lab.core.joining import peer
from igpt_lab.models import fast
from igpt_lab.models.config import ACTIVATIONS, PROBLEMS, ImageGPTConfig
from igpt_lab.models.embeddings import TIED
from igpt_lab.models.generation import Generates
from igpt_lab.models.generation_config import GenerationConfig
from igpt_lab.models.losses import cross_entropy
from igpt_lab.models.outputs import KeyValueCache, Output, output_of
from igpt_lab.models.pretrained import ImageGPTPreTrainedModel


@peer("pytorch_utils", "Conv1D")
class Linear(nn.Module):
    """x @ weight + bias with weight (in, out), the layout of Hugging Face's checkpoints: its `Conv1D`."""

    biased = True  # where not, training leaves out the bias: see `prepare_training`

    def __init__(self, n_in: int, n_out: int):
        nn.Module.__init__(self)  # and not that of `Conv1D`, once the two are joined
        self.nx, self.nf = n_in, n_out
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
        self.heads, self.layer = config.n_head, layer
        self.cross, self.dropout = cross, config.attn_pdrop
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
        return self.dropout(self.c_proj(fast.hidden(self.act, x, self.c_fc, Linear)))


@peer("modeling_layers", "GradientCheckpointingLayer")
class Block(nn.Module):
    """One pre-norm block: (N, T, D) -> (N, T, D), and its attention weights where they are asked for."""

    gradient_checkpointing = False  # in training, keep the input alone and compute the rest again
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))  # transformers' name

    def __init_subclass__(cls, **_):
        """Nothing: that of transformers' class, once joined, would checkpoint a second time."""

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
        self, x: Tensor, *, cache: KeyValueCache | None = None, **options
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.gradient_checkpointing and self.training and cache is None:
            return self._gradient_checkpointing_func(partial(self._through, **options), x)
        return self._through(x, cache=cache, **options)

    def _through(
        self, x: Tensor, *, encoder: Tensor | None = None, encoder_bias: Tensor | None = None, explicit: bool = False,
        **options,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        mixed, weights = self.attn(self.ln_1(x), explicit=explicit, **options)
        x, cross_weights = x + mixed, None
        if encoder is not None:
            mixed, cross_weights = self.crossattention(
                self.ln_cross_attn(x), encoder=encoder, bias=encoder_bias, explicit=explicit
            )
            x = x + mixed
        return x + self.mlp(self.ln_2(x)), weights, cross_weights


def _embedding(count: int, width: int) -> nn.Embedding:
    """Drawn by torch, but not on `meta`: there its draw of nothing imports its compiler, which takes seconds."""
    weight = torch.empty(count, width) if torch.get_default_device().type == "meta" else None
    return nn.Embedding(count, width, _weight=weight)


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The backbone: tokens (N, T) int64 -> states (N, T, D).

    `init`: "original" or "transformers", see `initialise`; None leaves the weights unset, for whoever sets them all.
    """

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        config = self.config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        if init:
            self.initialise(init, generator)

    @property
    def backbone(self) -> ImageGPTModel:
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps the input alone of any block."""
        return any(block.gradient_checkpointing for block in self.h)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, asked: bool) -> None:
        for block in self.h:
            block.gradient_checkpointing = asked  # type: ignore[assignment]

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
        if position_ids is None:
            position_ids = torch.arange(start, start + t, device=x.device)[None]
        x = x + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids.view(-1, t))
        x = self.drop(x)

        explicit = weighed or config.reorder_and_upcast_attn
        bias, causal = self._bias(x, start, attention_mask, explicit)
        options: dict[str, Any] = {
            "bias": bias, "causal": causal, "cache": cache, "explicit": explicit, "encoder": encoder_hidden_states,
            "encoder_bias": _hide(encoder_attention_mask, x),
        }  # fmt: skip
        states, attentions = [], []
        crossed = []
        for block in self.h:
            states.append(x if keep else None)
            x, *weights = block(x, **options)
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
        return output_of(values, config.return_dict if return_dict is None else return_dict)

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


class ImageGPTForCausalImageModeling(Generates, ImageGPTPreTrainedModel):
    """The backbone and an untied head over V colours (V + 1 rows with `tie_word_embeddings`, as in transformers)."""

    heads = (TIED,)
    _tied_weights_keys: ClassVar = {TIED: "transformer.wte.weight"}

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        self.generation_config = GenerationConfig()
        self.transformer = ImageGPTModel(self.config, init=None)
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
        return output_of(values, self.config.return_dict if return_dict is None else return_dict)


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """The backbone and a linear head over the mean of its T normed last states."""

    heads = ("score.weight",)

    def __init__(self, config: ImageGPTConfig, *, init: str | None = "original", generator=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ImageGPTModel(self.config, init=None)
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
        return output_of(values, self.config.return_dict if return_dict is None else return_dict)

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
