"""Random small models, and their twins in transformers, for the tests against it."""

from dataclasses import asdict, dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings

from igpt_lab.models.config import ACTIVATIONS, ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

CLASSES = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]
few = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def transformers():
    """transformers' package, or the test is skipped."""
    return pytest.importorskip("transformers", reason="transformers, the independent answer, is not installed")


@dataclass(frozen=True)
class Case:
    """A configuration, N, T and the seed of weights and inputs: everything an example is made of."""

    config: ImageGPTConfig
    n: int
    t: int
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def model(self, cls):
        """In eval mode, with every parameter, biases and gains too, away from its initial value."""
        model, generator = cls(self.config), self.generator()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1 if "ln_" in name else 0, 0.2, generator=generator)
        return model.eval()

    def tokens(self, t: int | None = None) -> torch.Tensor:
        return torch.randint(self.config.n_colours, (self.n, t or self.t), generator=self.generator())

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator())


@st.composite
def cases(draw, *, least_t: int = 1, **fixed) -> Case:
    """Small configurations with `fixed` fields, of everything that transformers' have but dropout."""
    heads, positions = draw(st.integers(1, 4)), draw(st.integers(max(2, least_t), 10))
    fields = {
        "vocab_size": draw(st.integers(4, 20)),
        "n_positions": positions,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": heads * draw(st.integers(-(-6 // heads), 8)),  # below 6, noise alone exceeds 1e-5
        "n_inner": draw(st.none() | st.integers(1, 30)),
        "activation_function": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 0.3])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "add_cross_attention": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "num_labels": draw(st.integers(1, 4)),
    }
    config = ImageGPTConfig(**fields | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | fixed)
    return Case(config, draw(st.integers(1, 3)), draw(st.integers(least_t, positions)), draw(st.integers(0, 99)))


def twin(model, *, mend: bool = True):
    """transformers' model of the same class, with the same weights loaded strictly, and its cross-attention mended.

    As it is, the cross-attention (5.23) gets the mask of the self-attention, drops the encoder's own, ends in an
    UnboundLocalError with the cache that transformers makes, and with an `EncoderDecoderCache` doubles the
    encoder's keys at each step. Here it gets its own mask and no cache. `test_differences` shows what happens without.
    """
    port = transformers()
    values = {name: value for name, value in asdict(model.config).items() if name != "bidirectional"}
    theirs = getattr(port, type(model).__name__)(port.ImageGPTConfig(**values))
    theirs.load_state_dict(model.state_dict(), strict=True)
    for block in getattr(theirs, "transformer", theirs).h if mend and model.config.add_cross_attention else ():
        block.crossattention.forward = _mended(block.crossattention.forward)
    return theirs.eval()


def _mended(forward):
    def mended(x, layer_past=None, attention_mask=None, encoder_attention_mask=None, **options):
        return forward(x, attention_mask=encoder_attention_mask, **options)

    return mended


def same(got, want, tolerance: float = 1e-5, floor: float = 1.0):
    """Equal to `tolerance`, times the largest value there is where that is above `floor`."""
    size = max(floor, want.abs().max().item()) if want.numel() and want.isfinite().all() else floor
    torch.testing.assert_close(got, want, atol=tolerance * size, rtol=0, equal_nan=True)


def same_output(ours, theirs, tolerance: float = 1e-5):
    """The same names in the same order, each with the same numbers."""
    assert list(ours) == list(theirs)
    for name in ours:
        same_value(ours[name], theirs[name], tolerance)


def same_value(ours, theirs, tolerance: float = 1e-5):
    """Tensors, tuples of tensors or caches with the same numbers."""
    if isinstance(theirs, torch.Tensor):
        same(ours, theirs, tolerance)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, tolerance)
    else:
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert sorted(ours.states) == list(range(len(theirs.layers)))
        for layer, other in enumerate(theirs.layers):
            same(ours.states[layer][0], other.keys, tolerance)
            same(ours.states[layer][1], other.values, tolerance)
