"""Attention against transformers' weights summed by plain loops, the closed form of uniform, and heads made by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_peer import Case, twin

import igpt_lab as lab
from igpt_lab.explaining.attention import MEASURES, SHOWN, WEIGHTINGS, _measured, _shares_of, uniform_attention
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.losses import align

SIDE, T = 4, 16
SIZES = {"vocab_size": 9, "n_positions": T, "n_embd": 8, "n_layer": 3, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FLAGS = [
    {}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": True},
    {"reorder_and_upcast_attn": True},
]  # fmt: skip


def random_case(**flags) -> Case:
    return Case(ImageGPTConfig(**SIZES | NO_DROPOUT | flags), 3, T, seed=1)


def maps_of(model, tokens, **options):
    return lab.attention_maps(model, tokens, progress=False, **options)


def measures_by_hand(shares: np.ndarray) -> tuple[dict, dict]:
    """Measures and offsets of shares (T, T) of one head in one image, pair by pair."""
    total = dict.fromkeys(["sos", "wrap", "entropy", "entropy_ratio"], 0.0)
    offsets: dict[tuple[int, int], float] = {}
    for i in range(1, T):
        row = shares[i, : i + 1]
        entropy = -sum(share * np.log(share) for share in row if share)
        total["entropy"] += entropy
        total["entropy_ratio"] += entropy / np.log(i + 1)
        total["sos"] += row[0]
        for pixel in range(i):
            offset = (pixel // SIDE - i // SIDE, pixel % SIDE - i % SIDE)
            if i % SIDE == 0 and pixel == i - 1:
                total["wrap"] += row[1 + pixel]
            else:
                offsets[offset] = offsets.get(offset, 0) + row[1 + pixel] / (T - 1)
    values = {name: value / (T - 1) for name, value in total.items()}
    mass = sum(offsets.values())
    values["distance"] = sum(share * np.hypot(*offset) for offset, share in offsets.items()) / mass
    values |= {"left": offsets[0, -1], "above": offsets[-1, 0]}
    values["same_row"] = sum(share for (dy, _), share in offsets.items() if dy == 0)
    values["same_column"] = sum(share for (_, dx), share in offsets.items() if dx == 0)
    return values, offsets


@torch.no_grad()
def their_shares(theirs, tokens: torch.Tensor, weighting: str) -> np.ndarray:
    """(layers, N, heads, T, T) by transformers' model."""
    out = theirs(align(tokens, "sos", theirs.config), output_attentions=True, output_hidden_states=True)
    weights = [layer.double() for layer in out.attentions]
    if weighting == "values":
        for place, (block, states) in enumerate(zip(theirs.transformer.h, out.hidden_states, strict=False)):
            value = block.attn.c_attn(block.ln_1(states))[..., -8:].double()
            for head in range(2):
                columns = slice(4 * head, 4 * head + 4)
                added = value[..., columns] @ block.attn.c_proj.weight[columns].double()
                weights[place][:, head] *= added.norm(dim=-1)[:, None]
            weights[place] /= weights[place].sum(-1, keepdim=True)
    return torch.stack(weights).numpy()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_measures_are_those_of_transformers_weights_summed_by_hand(flags, weighting):
    case = random_case(**flags)
    model, tokens = case.model(ImageGPTForCausalImageModeling), case.tokens()
    theirs = twin(model)
    shares = their_shares(theirs, tokens, weighting)
    for which in (model, theirs):
        got = maps_of(which, tokens.numpy(), weighting=weighting)
        table, offsets = (part.set_index(["layer", "head"]) for part in (got.table, got.offsets))
        uniform = measures_by_hand(np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None])[0]["distance"]
        assert set(got.table.weighting) == set(got.offsets.weighting) == {weighting} and set(got.table.n) == {3}
        for layer, head in [(0, 0), (2, 1)]:
            by_hand = [measures_by_hand(shares[layer, n, head]) for n in range(3)]
            values = {name: np.array([values[name] for values, _ in by_hand]) for name in MEASURES}
            for name in SHOWN:
                row = table.loc[(layer, head)]
                np.testing.assert_allclose(row[name], values[name].mean(), atol=1e-6)
                ends = stats.t.interval(0.95, 2, values[name].mean(), values[name].std(ddof=1) / np.sqrt(3))
                np.testing.assert_allclose(row[[f"{name}_low", f"{name}_high"]].to_numpy(float), ends, atol=1e-5)
            np.testing.assert_allclose(got.of_images[layer, head], values["distance"] / uniform, atol=1e-6)
            rows = offsets.loc[(layer, head)]
            assert {*zip(rows.dy, rows.dx, strict=True)} == by_hand[0][1].keys()
            for dy, dx, share in zip(rows.dy, rows.dx, rows.share, strict=True):
                np.testing.assert_allclose(share, np.mean([pairs[dy, dx] for _, pairs in by_hand]), atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_from_every_pixel_weights_are_transformers_and_end_before_it(weighting):
    case = random_case()
    model, tokens = case.model(ImageGPTForCausalImageModeling), case.tokens()[:1]
    theirs = twin(model)
    shares = their_shares(theirs, tokens, weighting)[:, 0]
    for position in range(T):
        for which in (model, theirs):
            table = lab.attention_from(which, tokens[0], position, weighting=weighting)
            weight = table.weight.to_numpy().reshape(3, 2, T)
            np.testing.assert_allclose(weight[..., :position], shares[:, :, position, 1 : position + 1], atol=1e-6)
            assert np.isnan(weight[..., position:]).all()  # nothing later is seen
            sos = table.sos.to_numpy().reshape(3, 2, T)
            np.testing.assert_allclose(sos, shares[:, :, position, :1].repeat(T, -1), atol=1e-6)
            np.testing.assert_allclose(np.nansum(weight, -1) + sos[..., 0], 1, atol=1e-6)
    assert table.columns.tolist() == ["layer", "head", "row", "column", "weight", "sos", "weighting"]
    assert table.row.tolist()[:T] == [i // SIDE for i in range(T)] and table.column.tolist()[:5] == [0, 1, 2, 3, 0]


def test_offsets_sum_to_1_without_the_start_token_and_the_wrap(tiny):
    got = maps_of(tiny, np.random.default_rng(0).integers(0, 8, (5, T)), layers=[-1, 0])
    sums = got.offsets.groupby(["layer", "head"], sort=False).share.sum().to_numpy()
    np.testing.assert_allclose(sums + got.table.sos + got.table.wrap, 1, atol=1e-6)
    assert got.table.layer.tolist() == [2, 2, 0, 0] and got.table["head"].tolist() == [0, 1, 0, 1]
    ahead = (got.offsets.dy > 0) | ((got.offsets.dy == 0) & (got.offsets.dx >= 0))
    assert not ahead.any()
    np.testing.assert_allclose(got.offsets.query("dy == 0 and dx == -1").share, got.table.left, atol=1e-7)


def test_zero_queries_give_uniform_attention_and_the_closed_form(tiny):
    for block in tiny.transformer.h:
        block.attn.c_attn.weight.data[:, :8] = 0
        block.attn.c_attn.bias.data[:8] = 0
    got = maps_of(tiny, np.random.default_rng(0).integers(0, 8, (2, T)))
    for name in SHOWN:
        np.testing.assert_allclose(got.table[name], got.table[f"{name}_uniform"], atol=1e-6)
    np.testing.assert_allclose(got.offsets.share, got.offsets.share_uniform, atol=1e-7)


def test_the_closed_form_is_the_sum_over_all_pairs():
    values, offsets = uniform_attention(SIDE)
    want, pairs = measures_by_hand(np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None])
    for name in SHOWN:
        np.testing.assert_allclose(values[name], want[name], rtol=1e-12)
    assert {(-up, right - SIDE + 1) for up, right in np.argwhere(offsets)} == pairs.keys()
    for (dy, dx), share in pairs.items():
        np.testing.assert_allclose(offsets[-dy, dx + SIDE - 1], share, rtol=1e-12)


def made_by_hand(target: list[int]) -> ImageGPTForCausalImageModeling:
    """One block with one head in which state i looks at slot target[i] alone: states are their positions, one hot."""
    config = ImageGPTConfig(vocab_size=9, n_positions=T, n_embd=T, n_layer=1, n_head=1, **NO_DROPOUT)
    model = ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(T))
        weight = model.transformer.h[0].attn.c_attn.weight.zero_()
        weight[range(T), target] = 50
        weight[:, T : 2 * T] = weight[:, 2 * T :] = torch.eye(T)
    return model


TOKENS = np.random.default_rng(0).integers(0, 8, (3, T))


def test_a_head_that_looks_above_has_all_its_mass_there():
    model = made_by_hand([max(0, i - SIDE + 1) if i >= SIDE else 0 for i in range(T)])
    got = maps_of(model, TOKENS)
    want = {"above": 12 / 15, "same_column": 12 / 15, "sos": 3 / 15, "distance": 1, "left": 0, "wrap": 0, "entropy": 0}
    for name, value in want.items():
        np.testing.assert_allclose(got.table[name], value, atol=1e-6)
    seen = got.offsets[got.offsets.share > 1e-9]
    assert seen[["dy", "dx"]].to_numpy().tolist() == [[-1, 0]]
    for position in range(SIDE, T):
        weight = lab.attention_from(model, TOKENS[:1], position).weight
        assert weight.idxmax() == position - SIDE and weight.max() > 1 - 1e-6


def test_a_head_that_looks_at_the_previous_pixel_looks_left_and_at_row_ends_wraps():
    table = maps_of(made_by_hand(list(range(T))), TOKENS).table
    for name, value in {"left": 12 / 15, "same_row": 12 / 15, "wrap": 3 / 15, "distance": 1, "sos": 0}.items():
        np.testing.assert_allclose(table[name], value, atol=1e-6)


def test_values_of_one_length_change_nothing_and_a_slot_that_adds_nothing_has_no_share():
    model = made_by_hand(list(range(T)))
    attention = model.transformer.h[0].attn
    attention.c_attn.weight.data[:, :T] = 0  # uniform attention
    attention.c_proj.weight.data.copy_(torch.linalg.qr(torch.randn(T, T))[0])
    kinds = {kind: maps_of(model, TOKENS, weighting=kind).table for kind in WEIGHTINGS}
    for name in SHOWN:
        np.testing.assert_allclose(kinds["weights"][name], kinds["values"][name], atol=1e-5)
    attention.c_attn.weight.data[0, 2 * T :] = 0  # the start token's value
    without = maps_of(model, TOKENS, weighting="values").table
    np.testing.assert_allclose(without.sos, 0, atol=1e-7)


def test_batches_change_nothing_and_no_hook_is_left(tiny):
    tokens = np.random.default_rng(1).integers(0, 8, (5, T))
    one, *others = (maps_of(tiny, tokens, batch_size=size) for size in (1, 2, None))
    for other in others:
        for name in ("table", "offsets"):
            numbers = [getattr(part, name).drop(columns="weighting").to_numpy(float) for part in (one, other)]
            np.testing.assert_allclose(*numbers, atol=1e-6)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.modules()) == 0


def test_a_bfloat16_model_is_measured_in_float32(tiny):
    table = maps_of(tiny.bfloat16(), TOKENS)
    sums = table.offsets.groupby(["layer", "head"]).share.sum().to_numpy()
    np.testing.assert_allclose(sums + table.table.sos + table.table.wrap, 1, atol=1e-6)


def test_never_more_than_a_row_of_weights_is_held():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    side, model = 8, made_by_hand(list(range(T)))
    with Largest() as largest:
        _measured(_shares_of(model, torch.randn(2, side**2, 3 * T), 0, "weights"), side)
    assert 2 * side * side**2 <= largest.numbers <= 2 * 3 * T * side**2 < 2 * side**4


def test_bad_input_is_refused_in_one_line_before_any_work(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.transformer), "forward", None)
    bert = ImageGPTForCausalImageModeling(ImageGPTConfig(**SIZES | {"bidirectional": True}))
    for measure in (maps_of, lambda *arguments, **options: lab.attention_from(*arguments, 3, **options)):
        one = TOKENS[:1]
        with pytest.raises(ValueError, match="hidden pixels, not the next one; use a causal model"):
            measure(bert, one)
        with pytest.raises(ValueError, match=r"layer 3 at qkv; this model has layers 0..2 there"):
            measure(tiny, one, layers=[3])
        with pytest.raises(ValueError, match="weighting 'norms'; expected one of weights, values"):
            measure(tiny, one, weighting="norms")
        with pytest.raises(ValueError, match=r"tokens \(1, 12\); expected whole square images, \(N, 16\)"):
            measure(tiny, one[:, :12])
        with pytest.raises(ValueError, match=r"expected integers"):
            measure(tiny, one / 2)
        with pytest.raises(ValueError, match="colours are 0 to 7"):
            measure(tiny, one + 8)
    with pytest.raises(ValueError, match=r"tokens \(0, 16\)"):
        maps_of(tiny, TOKENS[:0])
    with pytest.raises(ValueError, match="tokens of 3 images; expected those of one"):
        lab.attention_from(tiny, TOKENS, 3)
    for position in (-1, 16):
        with pytest.raises(ValueError, match=rf"position {position}; expected that of a pixel, 0..15"):
            lab.attention_from(tiny, TOKENS[0], position)
