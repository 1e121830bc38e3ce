"""ImageGPT (Chen et al., Generative Pretraining from Pixels, ICML 2020), readable alone.

A GPT over palette indices: n = norm(h); a = h + attention(n); h' = a + mlp(norm(a)), then `ln_f` and an untied head.
Three things differ from GPT-2: the norm keeps the mean and has a gain only, the activation is x * sigmoid(1.702 x), and
a learned start token (SOS, the last row of `wte`) takes the place of the last pixel, so that position i holds pixel
i - 1 and predicts pixel i.

Names and shapes of the weights are those of the port in Hugging Face transformers, so its checkpoints load: linear maps
are stored (in, out), and have biases, which are zero in the released weights because the original has none.

Letters: N images, T positions, V colours, L blocks, D width, K classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_lab import checkpoints


@dataclass(frozen=True)
class ImageGPTConfig:
    """Shape of a model; field names and defaults are those of transformers' `ImageGPTConfig` (size S).

    `vocab_size` is V + 1: the palette's colours and SOS, whose index is V.
    """

    vocab_size: int = 513
    n_positions: int = 1024
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None
    activation_function: str = "quick_gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    num_labels: int = 2

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; choose one that is")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation_function!r}; expected one of {sorted(ACTIVATIONS)}")

    @property
    def n_colours(self) -> int:
        """V, the palette's size: every token is below it."""
        return self.vocab_size - 1

    @property
    def sos_token_id(self) -> int:
        """Index of SOS in `wte`: V."""
        return self.vocab_size - 1

    @classmethod
    def from_dict(cls, values: dict) -> ImageGPTConfig:
        """From a `config.json` dict; fields of the port that change no number here are passed over."""
        values = dict(values)
        if "num_labels" not in values and isinstance(values.get("id2label"), dict):
            values["num_labels"] = len(values["id2label"])
        if values.get("model_type", "imagegpt") != "imagegpt":
            raise ValueError(f"model_type {values['model_type']!r} in config.json; expected 'imagegpt'")
        for name in ("reorder_and_upcast_attn", "add_cross_attention"):
            if values.get(name):
                raise ValueError(f"{name}=true in config.json is not supported; ImageGPT's checkpoints have false")
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict:
        """As `config.json` of the port."""
        return {"model_type": "imagegpt", **asdict(self)}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the original's activation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
               "relu": F.relu}  # fmt: skip

SIZES = {
    "S": ImageGPTConfig(n_layer=24, n_embd=512, n_head=8),
    "M": ImageGPTConfig(n_layer=36, n_embd=1024, n_head=8),
    "L": ImageGPTConfig(n_layer=48, n_embd=1536, n_head=16),
}
"""The published sizes at 32 x 32 pixels (76M, 455M and 1362M parameters without biases)."""


class Linear(nn.Module):
    """x @ weight + bias with weight (in, out), the layout of the port's checkpoints."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(0, 0.02))  # `initialise` sets the original's scales
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class Norm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * gain, in float32 or wider: in float16 the square overflows for |x| > 255."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class KeyValueCache:
    """Keys and values of every block for up to `length` positions, each (N, heads, length, D / heads), sized once.

    For decoding without gradients: one forward with the first tokens, then one token at a time.
    """

    def __init__(self, config: ImageGPTConfig, batch: int, length: int, *, device, dtype):
        shape = (config.n_layer, 2, batch, config.n_head, length, config.n_embd // config.n_head)
        self.states = torch.zeros(shape, device=device, dtype=dtype)
        self.filled = 0

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless `tokens` more positions of `batch` images fit behind what is filled."""
        _, _, n, _, length, _ = self.states.shape
        if batch != n:
            raise ValueError(f"a batch of {batch} for a cache of {n}; make the cache with batch={batch}")
        if self.filled + tokens > length:
            raise ValueError(f"{tokens} more tokens for a cache that holds {self.filled} of {length}; make it longer")
        if self.filled and tokens > 1:
            raise ValueError(f"{tokens} tokens for a cache that holds {self.filled}; prefill once, then one at a time")

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (N, heads, t, D / heads) behind what is filled; returns all keys and values so far."""
        end = self.filled + key.shape[2]
        self.states[layer, 0, :, :, self.filled : end] = key
        self.states[layer, 1, :, :, self.filled : end] = value
        return self.states[layer, 0, :, :, :end], self.states[layer, 1, :, :, :end]


class Attention(nn.Module):
    """Dense causal self-attention, scale 1 / sqrt(D / heads)."""

    def __init__(self, config: ImageGPTConfig, layer: int):
        super().__init__()
        self.heads, self.layer, self.dropout = config.n_head, layer, config.attn_pdrop
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        n, t, d = x.shape
        query, key, value = self.c_attn(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=t > 1, dropout_p=dropout, scale=self.scale)
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).reshape(n, t, d)))


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
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """One pre-norm block: (N, T, D) -> (N, T, D)."""

    def __init__(self, config: ImageGPTConfig, layer: int):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class ModelOutput(NamedTuple):
    """`last_hidden_state` (N, T, D) after `ln_f`; `hidden_states` as the port counts them, or None.

    The port's `hidden_states[l]` is the UN-normed input of block l for l < L, and the normed last state for l = L.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class HeadOutput(NamedTuple):
    """`logits`: (N, T, V) of the causal head, (N, K) of the class head; `loss` in nats when labels were given."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class _Pretrained(nn.Module):
    """Initialisation, loading and saving, shared by the three classes."""

    def __init__(self, config: ImageGPTConfig):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> Self:
        """The original's initialisation: positions 0.01; tokens, SOS and MLP 0.02; q, k, v 1 / sqrt(D); attention
        output 1 / sqrt(D L); norms 1; biases and both heads exactly zero, so the first loss is exactly ln V."""
        d, blocks = self.config.n_embd, self.config.n_layer
        scales = {"wpe": 0.01, "c_attn": d**-0.5, "attn.c_proj": (d * blocks) ** -0.5}
        for name, weight in self.named_parameters():
            if name.endswith("bias") or name.startswith(("lm_head", "score")):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1)
            else:
                scale = next((s for part, s in scales.items() if part in name), self.config.initializer_range)
                weight.normal_(0, scale, generator=generator)
        return self

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """A model in eval mode on the CPU, float32, from a bundled name, a folder in the port's layout or a Hub name.

        Raises `checkpoints.CheckpointError` naming the missing, misshapen or unknown tensor.
        """
        config, state, where = checkpoints.read(source)
        try:
            config = ImageGPTConfig.from_dict(config)
        except ValueError as error:
            raise checkpoints.CheckpointError(f"{where.parent / 'config.json'}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        state = checkpoints.match(state, model.state_dict(), base=cls is ImageGPTModel, where=where)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write `config.json` and `model.safetensors` (in `dtype`, default as they are) in the port's layout."""
        config = self.config.to_dict() | {"architectures": [type(self).__name__]}
        state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        return checkpoints.write(folder, config, state)


class ImageGPTModel(_Pretrained):
    """The trunk: tokens (N, T) int64 -> states (N, T, D)."""

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)

    def forward(
        self, input_ids: Tensor, *, cache: KeyValueCache | None = None, output_hidden_states: bool = False
    ) -> ModelOutput:
        """`input_ids` int64 (N, T), each below `vocab_size`; with a cache, the tokens behind those it holds."""
        start = cache.filled if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.config.n_positions:
            raise ValueError(f"{end} positions, but the model has {self.config.n_positions}; shorten the input")
        if cache is not None:
            cache.check(*input_ids.shape)
        x = self.drop(self.wte(input_ids) + self.wpe.weight[start:end])
        states = []
        for block in self.h:
            if output_hidden_states:
                states.append(x)
            x = block(x, cache)
        if cache is not None:
            cache.filled = end
        x = self.ln_f(x)
        return ModelOutput(x, (*states, x) if output_hidden_states else None)


class ImageGPTForCausalImageModeling(_Pretrained):
    """The trunk and an untied head over the V colours."""

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=true: ImageGPT's head has V rows and its embedding V + 1; set false")
        self.transformer = ImageGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.n_colours, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cache: KeyValueCache | None = None,
        output_hidden_states: bool = False,
    ) -> HeadOutput:
        """Logits (N, T, V). `labels` int64 (N, T) are shifted inside as in the port: logits at i score label i + 1.

        For the paper's loss over all T pixels use `next_pixel_loss`.
        """
        out = self.transformer(input_ids, cache=cache, output_hidden_states=output_hidden_states)
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return HeadOutput(loss, logits, out.hidden_states)


class ImageGPTForImageClassification(_Pretrained):
    """The trunk and a linear head over the mean of its T normed last states."""

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        self.transformer = ImageGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, output_hidden_states: bool = False
    ) -> HeadOutput:
        """Logits (N, K); `labels` int64 (N,)."""
        out = self.transformer(input_ids, output_hidden_states=output_hidden_states)
        logits = self.score(out.last_hidden_state.mean(dim=1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return HeadOutput(loss, logits, out.hidden_states)


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS, ...), or the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def align(tokens: Tensor, alignment: str, config: ImageGPTConfig) -> Tensor:
    """Pixels (N, T) -> the model's input (N, T): `sos` prepends SOS and drops the last pixel, `raw` changes nothing."""
    if alignment == "raw":
        return tokens
    if alignment != "sos":
        raise ValueError(f"alignment {alignment!r}; expected 'sos' or 'raw'")
    return torch.cat([torch.full_like(tokens[:, :1], config.sos_token_id), tokens[:, :-1]], dim=1)


def next_pixel_loss(model: ImageGPTForCausalImageModeling, tokens: Tensor) -> Tensor:
    """Mean over N and all T pixels of -log p(pixel | pixels before it), in nats, for pixels int64 (N, T)."""
    logits = model(align(tokens, "sos", model.config)).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
