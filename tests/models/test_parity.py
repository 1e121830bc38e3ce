"""`model` against transformers and against plain NumPy, over random small configurations.

Asked of both: the same numbers to 1e-5 in float32, of every output, loss and gradient. Asked of NumPy in float64: that
the distance shrinks with the precision. Noise does that, a bug does not.
"""

from dataclasses import dataclass, fields, replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from transformers_peer import CLASSES, Case, cases, few, same, same_output, same_value, transformers, twin

from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
    KeyValueCache,
)
from igpt_lab.models.losses import masked_pixel_loss, next_pixel_loss
from igpt_lab.models.scores import cut

FLOATING = ("inputs_embeds", "encoder_hidden_states")
each_class = pytest.mark.parametrize("cls", CLASSES)
MASKS = (None, "right", "left", "random")


@dataclass(frozen=True)
class Call(Case):
    """A case and how its model is called."""

    embeds: bool
    mask: str | None
    types: bool
    positions: bool
    attentions: bool
    states: bool
    cache: bool

    def attention_mask(self) -> torch.Tensor | None:
        """int64 (N, T), 0 at the padding: at one end, a length for each image, or anywhere but at the first token."""
        length = torch.randint(1, self.t + 1, (self.n, 1), generator=self.generator())
        shown = torch.arange(self.t) < length
        anywhere = (self.normal(self.n, self.t) < 0.5) | (torch.arange(self.t) == 0)
        kinds = {"right": shown, "left": shown.flip(1), "random": anywhere}
        return None if self.mask is None else kinds[self.mask].long()

    def seeing(self) -> torch.Tensor:
        """bool (N, T): positions that see at least one token, themselves or an earlier one."""
        shown = torch.ones(self.n, self.t) if self.mask is None else self.attention_mask()
        return shown.cumsum(1) > 0

    def arguments(self, cls) -> dict:
        """For both forward passes."""
        config, inputs = self.config, {"attention_mask": self.attention_mask(), "use_cache": self.cache}
        if self.embeds:
            inputs["inputs_embeds"] = self.normal(self.n, self.t, config.n_embd)
        else:
            inputs["input_ids"] = self.tokens()
        if self.types:
            inputs["token_type_ids"] = self.tokens().flip(0, 1)
        if self.positions:
            inputs["position_ids"] = torch.randint(config.n_positions, (self.n, self.t), generator=self.generator())
        if self.encoder(cls):
            inputs["encoder_hidden_states"] = self.normal(self.n, 5, config.n_embd)
            inputs["encoder_attention_mask"] = (torch.arange(5) < 1 + torch.arange(self.n)[:, None]).long()
        # transformers cannot give attentions of a model with cross-attention and without an encoder: IndexError.
        inputs["output_attentions"] = self.attentions and self.encoder(cls) == config.add_cross_attention
        return inputs | {"output_hidden_states": self.states}

    def encoder(self, cls) -> bool:
        return self.config.add_cross_attention and cls is not ImageGPTForImageClassification


@st.composite
def calls(draw, **fixed) -> Call:
    case = draw(cases(**fixed))
    flags = {name: draw(st.booleans()) for name in ("embeds", "types", "positions", "attentions", "states", "cache")}
    return Call(**{f.name: getattr(case, f.name) for f in fields(Case)}, mask=draw(st.sampled_from(MASKS)), **flags)


# Outputs


@each_class
@given(call=calls())
@few
@torch.no_grad()
def test_every_output_is_that_of_the_port(cls, call):
    model = call.model(cls)
    ours, theirs = model(**call.arguments(cls)), twin(model)(**call.arguments(cls))
    same_output(ours, theirs)
    for i, name in enumerate(theirs):
        assert ours[i] is ours[name] is getattr(ours, name)
    names = set(theirs.__dataclass_fields__)
    assert {name for name in names if getattr(ours, name) is None} == names - set(theirs)
    assert all(value.isfinite().all() for value in ours.values() if isinstance(value, torch.Tensor))


@each_class
@given(call=calls())
@few
@torch.no_grad()
def test_tuples_have_the_length_and_order_of_the_port(cls, call):
    model = call.model(cls)
    ours, theirs = (
        model(**call.arguments(cls), return_dict=False),
        twin(model)(**call.arguments(cls), return_dict=False),
    )
    assert type(ours) is type(theirs) is tuple
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        same_value(one, other)


@each_class
@given(call=calls())
@few
@torch.no_grad()
def test_what_a_configuration_asks_for_is_given_as_by_the_port(cls, call):
    asked = {"output_attentions": call.attentions, "output_hidden_states": call.states, "use_cache": call.cache}
    call = replace(call, config=replace(call.config, add_cross_attention=False, return_dict=call.types, **asked))
    model, tokens = call.model(cls), call.tokens()
    ours, theirs = model(tokens), twin(model)(tokens)
    (same_output if call.types else lambda *pair: [*map(same_value, *pair)])(ours, theirs)
    assert len(ours) == len(theirs) == 1 + call.attentions + call.states + call.cache


@pytest.mark.parametrize("cls", CLASSES[:2])
@given(case=cases(least_t=2))
@few
@torch.no_grad()
def test_ids_of_one_and_of_three_axes_give_the_shapes_of_the_port(cls, case):
    model, tokens = case.model(cls), case.tokens()
    for ids in (tokens[0], tokens[:, None]):
        labels = {"labels": ids} if cls is ImageGPTForCausalImageModeling else {}
        ours, theirs = (it(ids, output_hidden_states=True, **labels) for it in (model, twin(model)))
        same_output(ours, theirs)
        mask = torch.ones_like(ids)
        mask[..., -1] = 0
        same(model(ids, attention_mask=mask, **labels)[-2], twin(model)(ids, attention_mask=mask, **labels)[-2])


@given(call=calls())
@few
@torch.no_grad()
def test_written_out_attention_equals_the_fused_one(call):
    model = call.model(ImageGPTModel)
    fused = model(**call.arguments(ImageGPTModel) | {"output_attentions": False})
    written = model(**call.arguments(ImageGPTModel) | {"output_attentions": True})
    same(written.last_hidden_state, fused.last_hidden_state)
    assert fused.attentions is None
    assert len(written.attentions) == call.config.n_layer
    for weights in (*written.attentions, *(written.cross_attentions or ())):
        same(weights.sum(-1), torch.ones(call.n, call.config.n_head, call.t))


@given(call=calls(least_t=2))
@few
@torch.no_grad()
def test_nobody_sees_padding_or_the_future(call):
    call = replace(call, mask=call.mask or "right")
    model, mask = call.model(ImageGPTModel), call.attention_mask().bool()
    attentions = model(**call.arguments(ImageGPTModel) | {"output_attentions": True}).attentions
    seen = mask[:, None, :] & torch.ones(call.t, call.t).tril().bool()
    for weights in attentions:
        for row in range(call.t):
            blind = ~seen[:, row].any(dim=-1)  # a row that sees nothing is spread evenly, and used by nobody
            assert not weights[:, :, row].masked_fill(seen[:, None, row], 0)[~blind].any()


# Losses and gradients


@given(call=calls(), share=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
@few
@torch.no_grad()
def test_the_causal_loss_is_that_of_the_port(call, share):
    cls = ImageGPTForCausalImageModeling
    model, labels = call.model(cls), call.tokens()
    labels[torch.rand(labels.shape, generator=call.generator()) < share] = -100  # all of them: nan, as in transformers
    ours, theirs = model(**call.arguments(cls), labels=labels), twin(model)(**call.arguments(cls), labels=labels)
    same_output(ours, theirs)
    same(ours.loss, theirs.loss)
    if call.config.tie_word_embeddings:
        assert ours.logits.shape[-1] == call.config.vocab_size  # a column for SOS too


def labels_of(case: Case, problem: str) -> torch.Tensor:
    """For the classifier: int64 (N,), float (N,) for K = 1, float (N, K) else."""
    if problem == "single_label_classification":
        return torch.arange(case.n) % case.config.num_labels
    if problem == "regression":
        return 3 + case.normal(*((case.n,) if case.config.num_labels == 1 else (case.n, case.config.num_labels)))
    return (case.normal(case.n, case.config.num_labels) > 0).float()


PROBLEMS = [
    ("regression", 1, None),
    ("regression", 1, "regression"),
    ("regression", 3, "regression"),
    ("single_label_classification", 3, None),
    ("single_label_classification", 2, "single_label_classification"),
    ("multi_label_classification", 3, None),
    ("multi_label_classification", 2, "multi_label_classification"),
]


@pytest.mark.parametrize("problem, k, said", PROBLEMS)
@given(call=calls())
@few
def test_the_classification_loss_and_its_gradients_are_those_of_the_port(problem, k, said, call):
    cls = ImageGPTForImageClassification
    call = replace(sighted(call), config=replace(call.config, id2label=None, num_labels=k, problem_type=said))
    model, labels = call.model(cls), labels_of(call, problem)
    theirs = twin(model)
    ours, other = model(**call.arguments(cls), labels=labels), theirs(**call.arguments(cls), labels=labels)
    same_output(ours, other)
    ours.loss.backward(), other.loss.backward()
    same_gradients(model, theirs)


@pytest.mark.parametrize("cls", CLASSES[1:])
@given(case=cases(reorder_and_upcast_attn=False, add_cross_attention=False, least_t=2))
@few
@torch.no_grad()
def test_in_float64_the_losses_are_those_of_the_port_to_1e_12(cls, case):
    model, tokens = case.model(cls), case.tokens()
    theirs, model = twin(model).double(), model.double()
    labels = tokens if cls is ImageGPTForCausalImageModeling else 3 + case.normal(case.n).double()
    if cls is ImageGPTForImageClassification and case.config.num_labels > 1:
        labels = torch.arange(case.n) % case.config.num_labels
    same(model(tokens, labels=labels).loss, theirs(tokens, labels=labels).loss, 1e-12)


def same_gradients(ours, theirs):
    """Of every parameter, to 1e-5 of its size or a tenth of the largest's; that of one without influence is None."""
    ours, theirs = (dict(model.named_parameters()) for model in (ours, theirs))
    assert set(ours) == set(theirs)
    largest = max(weight.grad.abs().max().item() for weight in theirs.values() if weight.grad is not None)
    for name, weight in ours.items():
        assert (weight.grad is None) == (theirs[name].grad is None), name
        if weight.grad is not None:
            same(weight.grad, theirs[name].grad, floor=max(0.01, largest / 10))


def sighted(call: Call) -> Call:
    """The same call without padding on the left, whose positions see nothing.

    All their scores are the lowest number, whatever they are made of: what is the gradient of that? transformers says
    nothing for a pixel in the future and one for the others; ours says one for all. Their states are the same.
    """
    return replace(call, mask="random" if call.mask == "left" else call.mask)


def score(call: Call, out) -> torch.Tensor:
    """A number that depends on all of an output."""
    return (out[0] ** 2).sum() + sum((value * call.normal(*value.shape)).sum() for value in out.hidden_states)


@each_class
@given(call=calls())
@few
def test_every_gradient_is_that_of_the_port(cls, call):
    call = replace(sighted(call), states=True, cache=False)
    model = call.model(cls).train()
    theirs = twin(model).train()
    given_, inputs = call.arguments(cls), []
    for one in (model, theirs):
        leaves = {k: v.clone().requires_grad_() for k, v in given_.items() if k in FLOATING}
        score(call, one(**given_ | leaves)).backward()
        inputs.append(leaves)
    same_gradients(model, theirs)
    for name in inputs[0]:
        same(inputs[0][name].grad, inputs[1][name].grad, floor=0.1)


@given(call=calls(least_t=2))
@few
def test_with_padding_on_the_left_the_gradients_of_the_loss_are_those_of_the_port(call):
    """Padding is no label, and what stands at it must not be trained on what comes behind."""
    cls, call = ImageGPTForCausalImageModeling, replace(call, mask="left", cache=False)
    model, labels = call.model(cls), call.tokens()
    labels[:, 1:][~call.seeing()[:, :-1]] = -100
    theirs = twin(model)
    for one in (model, theirs):
        F.cross_entropy(one(**call.arguments(cls)).logits[:, :-1].mT, labels[:, 1:], reduction="sum").backward()
    same_gradients(model, theirs)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_class
@given(call=calls())
@few
def test_gradient_checkpointing_changes_no_gradient(cls, call):
    call = replace(sighted(call), states=True)
    plain, saving = call.model(cls).train(), call.model(cls).train()
    saving.gradient_checkpointing_enable()
    theirs = twin(plain).train()
    theirs.gradient_checkpointing_enable()
    for model in (plain, saving, theirs):
        # `use_cache` is what checkpointing has to refuse by itself.
        out = model(**call.arguments(cls) | {"use_cache": call.cache and model is not plain})
        assert out.past_key_values is None
        score(call, out).backward()
    same_gradients(saving, plain)
    same_gradients(saving, theirs)


# Decoding


@st.composite
def decodings(draw, **fixed) -> tuple[Call, list[int]]:
    """A call and the lengths of the parts that it is fed in."""
    call = draw(calls(least_t=2, **fixed))
    cuts = sorted(draw(st.sets(st.integers(1, call.t - 1))))
    return call, [b - a for a, b in zip([0, *cuts], [*cuts, call.t], strict=True)]


def decoded(model, cls, call: Call, lengths: list[int], cache):
    """The outputs of all parts, one behind the other."""
    given_, outs, start = call.arguments(cls) | {"use_cache": True}, [], 0
    by_position = [name for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids") if name in given_]
    for length in lengths:
        part = given_ | {name: given_[name][:, start : start + length] for name in by_position}
        if call.mask:
            part["attention_mask"] = given_["attention_mask"][:, : start + length]
        outs.append(model(**part, past_key_values=cache))
        start += length
    return outs


@each_class
@given(decoding=decodings())
@few
@torch.no_grad()
def test_decoding_in_parts_gives_what_one_pass_gives_and_what_the_port_gives(cls, decoding):
    call, lengths = decoding
    model = call.model(cls)
    theirs = twin(model)
    wanted = decoded(theirs, cls, call, lengths, transformers().DynamicCache(config=theirs.config))
    growing = decoded(model, cls, call, lengths, KeyValueCache())
    room = KeyValueCache.of(call.config, call.n, call.t + 2, device="cpu", dtype=torch.float32)
    in_place = decoded(model, cls, call, lengths, room)
    assert room.get_seq_length() == call.t
    for ours, others, theirs in zip(growing, in_place, wanted, strict=True):
        same(others[0], ours[0])
        same_value(ours.to_tuple()[:1], theirs.to_tuple()[:1])
        for name in ("hidden_states", "attentions", "cross_attentions"):
            assert (getattr(ours, name) is None) == (getattr(theirs, name, None) is None)
            same_value(getattr(ours, name) or (), getattr(theirs, name, None) or ())
    same_value(growing[-1].past_key_values, wanted[-1].past_key_values)
    # A position that sees nothing is spread over what there is, which in one pass is the future too.
    if cls is ImageGPTForImageClassification:  # its answer is to the latest part
        return
    seen, whole = call.seeing(), model(**call.arguments(cls))[0]
    same(torch.cat([out[0] for out in growing], dim=1)[seen], whole[seen])


@given(decoding=decodings())
@few
def test_a_growing_cache_keeps_gradients(decoding):
    call, lengths = replace(decoding[0], embeds=True, mask=None), decoding[1]
    cls, gradients = ImageGPTModel, []
    for parts in (lengths, [call.t]):
        model = call.model(cls)
        outs = decoded(model, cls, call, parts, KeyValueCache())
        (torch.cat([out[0] for out in outs], dim=1) * call.normal(call.n, call.t, call.config.n_embd)).sum().backward()
        gradients.append(model)
    same_gradients(*gradients)


@given(case=cases(tie_word_embeddings=False, add_cross_attention=False), cached=st.booleans())
@few
def test_greedy_generation_is_that_of_the_port_token_for_token(case, cached):
    model = case.model(ImageGPTForCausalImageModeling)
    given_ = torch.cat([torch.full((case.n, 1), case.config.sos_token_id), case.tokens()[:, 1:]], dim=1)
    length = case.config.n_positions + 1
    theirs = twin(model).generate(given_, max_length=length, do_sample=False, use_cache=cached)
    assert torch.equal(model.generate(given_, max_length=length), theirs)
    assert torch.equal(model.generate(given_, max_new_tokens=length - case.t, do_sample=False), theirs)


TOKEN = st.integers(0, 3)


@given(
    case=cases(tie_word_embeddings=False, add_cross_attention=False), ends=TOKEN | st.lists(TOKEN, min_size=1),
    pad=st.none() | TOKEN, told=st.booleans(), cached=st.booleans(),
)  # fmt: skip
@few
def test_generation_ends_where_that_of_the_port_does(case, ends, pad, told, cached):
    options = {"eos_token_id": ends, "pad_token_id": pad}
    case = case if told else replace(case, config=replace(case.config, **options))
    model, start = case.model(ImageGPTForCausalImageModeling), case.tokens(1)
    assume(pad is None or pad not in start)  # transformers hides it then, see `test_differences`
    options = (options if told else {}) | {"max_length": case.config.n_positions + 1, "use_cache": cached}
    theirs = twin(model).generate(inputs=start, do_sample=False, **options)
    assert torch.equal(model.generate(inputs=start, **options), theirs)


@given(
    seed=st.integers(0, 999), colours=st.integers(1, 60), scale=st.sampled_from([0.1, 1.0, 5.0]),
    top_k=st.none() | st.integers(1, 70), top_p=st.none() | st.floats(0.01, 0.99),
)  # fmt: skip
@few
def test_the_cut_before_a_draw_is_that_of_the_port(seed, colours, scale, top_k, top_p):
    port = transformers()
    logits = torch.randn(3, colours, generator=torch.Generator().manual_seed(seed)) * scale
    want = logits
    if top_k is not None:
        want = port.TopKLogitsWarper(top_k)(None, want)
    if top_p is not None:
        want = port.TopPLogitsWarper(top_p)(None, want)
    assert torch.equal(cut(logits, top_k, top_p), want)
    assert want.isfinite().any(dim=-1).all()


def test_a_nucleus_of_everything_leaves_nothing_out():
    logits = torch.tensor([[30.0, 0.0, -30.0, -60.0]])
    assert torch.equal(transformers().TopPLogitsWarper(1.0)(None, logits[:, :3]), logits[:, :3])
    assert torch.equal(cut(logits, None, 1.0), logits)


# Files


@each_class
@given(case=cases())
@few
@torch.no_grad()
def test_the_port_loads_strictly_what_we_save_and_we_what_it_saves(cls, case, tmp_path_factory):
    model, theirs, tokens = case.model(cls), getattr(transformers(), cls.__name__), case.tokens()
    ours, others = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(ours)
    loaded, info = theirs.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values()), info
    same_output(model(tokens), loaded(tokens))
    twin(model).save_pretrained(others)
    back = cls.from_pretrained(others)
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for f in fields(ImageGPTConfig):
        if f.name != "bidirectional":
            assert getattr(loaded.config, f.name) == getattr(model.config, f.name), f.name


@pytest.mark.parametrize("saved", CLASSES)
@given(case=cases(tie_word_embeddings=False))
@few
@torch.no_grad()
def test_the_trunk_of_any_checkpoint_loads_in_both(saved, case, tmp_path_factory):
    model, folder, tokens = case.model(saved), tmp_path_factory.mktemp("saved"), case.tokens()
    model.save_pretrained(folder)
    ours, theirs = (cls.from_pretrained(folder) for cls in (ImageGPTModel, transformers().ImageGPTModel))
    same_output(ours(tokens), theirs(tokens))
    same(ours(tokens)[0], model.backbone(tokens)[0])


# NumPy


def by_hand(weights: dict, config: ImageGPTConfig, tokens, masked=None, bias=0.0):
    """Block inputs, normed last state and logits in float64, from the paper's formulas; `bias` is added to scores."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x):
        return x.reshape(*tokens.shape, config.n_head, -1).swapaxes(1, 2)

    t, states = tokens.shape[1], []
    x = weights["wte.weight"][tokens] * (1 if masked is None else 1 - masked[..., None]) + weights["wpe.weight"][:t]
    visible = np.ones((t, t), dtype=bool) if config.bidirectional else np.tri(t, dtype=bool)
    for layer in range(config.n_layer):
        block, scale = f"h.{layer}", (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        scale /= layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        states.append(x)
        query, key, value = map(heads, np.split(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, axis=-1))
        scores = np.where(visible, query @ key.swapaxes(2, 3) * scale + bias, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = attention / attention.sum(-1, keepdims=True) @ value
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{block}.attn.c_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(inner / (1 + np.exp(-1.702 * inner)), f"{block}.mlp.c_proj")
    states.append(norm(x, "ln_f"))
    return [*states, states[-1] @ weights["lm_head.weight"].T]


def loss_by_hand(logits, tokens):
    """-log p of each token, (N, T)."""
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]


PLAIN = {"activation_function": "quick_gelu", "add_cross_attention": False}


def weights_of(model) -> dict:
    return {name.removeprefix("transformer."): value.double().numpy() for name, value in model.state_dict().items()}


def distance(got, want) -> float:
    """The largest |difference|, over the size of what is wanted where that is above 1."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True)]
    return max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs)


def shrinks(answers, want) -> None:
    """`answers(dtype)` come within 1e-5 in float32, within 1e-12 in float64, and at least 1e4 times nearer there."""
    single, double = distance(answers(torch.float32), want), distance(answers(torch.float64), want)
    assert single < 1e-5
    assert double < 1e-12
    assert double * 1e4 < single


@given(case=cases(**PLAIN))
@few
@torch.no_grad()
def test_next_pixel_prediction_by_hand_in_float64(case):
    case = replace(case, t=case.config.n_positions)
    model, tokens = case.model(ImageGPTForCausalImageModeling), case.tokens()
    fed = np.concatenate([np.full((case.n, 1), case.config.vocab_size - 1), tokens[:, :-1].numpy()], axis=1)
    want = by_hand(weights_of(model), case.config, fed)
    want.append(loss_by_hand(want[-1], tokens.numpy()).mean())

    def answers(dtype):
        out = model.to(dtype)(torch.from_numpy(fed), output_hidden_states=True)
        return *out.hidden_states, out.logits, next_pixel_loss(model, tokens)

    shrinks(answers, want)


@given(case=cases(**PLAIN, bidirectional=True), share=st.sampled_from([0.15, 0.5, 1.0]))
@few
@torch.no_grad()
def test_masked_pixel_prediction_by_hand_in_float64(case, share):
    """BERT: all see all, a masked pixel has its position only, and its own logits score it; the others are free."""
    model, tokens = case.model(ImageGPTForCausalImageModeling), case.tokens()
    masked = torch.rand(tokens.shape, generator=case.generator()) < share
    masked[0, -1] = True
    want = by_hand(weights_of(model), case.config, tokens.numpy(), masked.numpy())
    want.append(loss_by_hand(want[-1], tokens.numpy())[masked.numpy()].mean())

    def answers(dtype):
        out = model.to(dtype)(tokens, masked=masked, output_hidden_states=True)
        return *out.hidden_states, out.logits, masked_pixel_loss(model, tokens, masked)

    shrinks(answers, want)


@given(case=cases(**PLAIN), images=st.booleans(), heads=st.booleans(), rows=st.booleans(), written=st.booleans())
@few
@torch.no_grad()
def test_a_mask_of_four_axes_is_added_to_the_scores(case, images, heads, rows, written):
    """By hand, because transformers flattens every mask to two axes and reads it as 0 and 1."""
    shape = (case.n if images else 1, case.config.n_head if heads else 1, case.t if rows else 1, case.t)
    model, tokens, bias = case.model(ImageGPTForCausalImageModeling), case.tokens(), case.normal(*shape) * 3
    want = by_hand(weights_of(model), case.config, tokens.numpy(), bias=bias.double().numpy())

    def answers(dtype):
        options = {"attention_mask": bias.to(dtype), "output_hidden_states": True, "output_attentions": written}
        out = model.to(dtype)(tokens, **options)
        return *out.hidden_states, out.logits

    shrinks(answers, want)


@given(call=calls())
@few
@torch.no_grad()
def test_a_mask_of_four_axes_hides_as_one_of_two(call):
    call = replace(call, mask=call.mask or "left")
    model, given_ = call.model(ImageGPTModel), call.arguments(ImageGPTModel)
    hidden = given_["attention_mask"][:, None, None] == 0
    wide = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    same_output(model(**given_ | {"attention_mask": wide, "use_cache": False}), model(**given_ | {"use_cache": False}))
