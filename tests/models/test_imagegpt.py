"""`model` against the original TensorFlow graph, laws, and cases solved by hand; `test_parity` has transformers."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers_peer import Case, same, transformers

from igpt_lab.core.devices import product
from igpt_lab.core.hub import CheckpointError
from igpt_lab.features.hooks import record
from igpt_lab.models.config import SIZES, ImageGPTConfig
from igpt_lab.models.imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
    KeyValueCache,
    Norm,
)
from igpt_lab.models.losses import align, masked_pixel_loss, next_pixel_loss
from igpt_lab.models.tensorflow_bundle import Bundle

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "openai-oracle"
TINY = ImageGPTConfig(vocab_size=17, n_positions=16, n_embd=24, n_layer=3, n_head=4, num_labels=5)
CLASSES = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]
HEADS = CLASSES[1:]
CONFIGS = {
    "plain": TINY,
    "one block, one head": dataclasses.replace(TINY, n_layer=1, n_head=1, vocab_size=5),
    "inner width": dataclasses.replace(TINY, n_inner=20, n_embd=40, n_head=5),
    "inverse layer scale": dataclasses.replace(TINY, scale_attn_by_inverse_layer_idx=True),
    "no scale": dataclasses.replace(TINY, scale_attn_weights=False, n_layer=2),
    "gelu, large eps": dataclasses.replace(TINY, activation_function="gelu", layer_norm_epsilon=0.3),
    "gelu_new": dataclasses.replace(TINY, activation_function="gelu_new", num_labels=2),
    "relu, long": dataclasses.replace(TINY, activation_function="relu", n_positions=50),
}


def shaken(cls, config=TINY, seed=0):
    """A model in eval mode with every parameter, biases and gains too, away from its initial value."""
    return Case(config, 3, config.n_positions, seed).model(cls)


def tokens_of(config=TINY, n=3, seed=0, length=None):
    return Case(config, n, config.n_positions, seed).tokens(length)


# The original TensorFlow graph


@pytest.fixture(scope="module")
def oracle():
    if not (ORACLE / "expected.npz").is_file():
        pytest.skip(f"the original graph's answers are not at {ORACLE}")
    with np.load(ORACLE / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def oracle_state():
    """The original variables under transformers' names: linear maps (in, out), SOS the last row of `wte`."""
    bundle = Bundle(ORACLE / "model.ckpt-1000000")
    variables = {name.removeprefix("model/"): bundle.read(name) for name in bundle.entries}
    state = {"wte.weight": np.concatenate([variables["wte"], variables["sos"][None]]), "wpe.weight": variables["wpe"]}
    width = variables["wpe"].shape[1]
    for layer in range(4):
        block = {name.removeprefix(f"h{layer}/"): value for name, value in variables.items()}
        query, key, value, out = (block[f"attn/{x}_proj"].reshape(width, width) for x in "qkvc")
        state |= {
            f"h.{layer}.ln_1.weight": block["ln_1/g"],
            f"h.{layer}.ln_2.weight": block["ln_2/g"],
            f"h.{layer}.attn.c_attn.weight": np.concatenate([query.T, key.T, value.T], axis=1),
            f"h.{layer}.attn.c_proj.weight": out,
            f"h.{layer}.mlp.c_fc.weight": block["mlp/c_fc/w"],
            f"h.{layer}.mlp.c_proj.weight": block["mlp/c_proj/w"],
        }
    state = {f"transformer.{name}": value for name, value in (state | {"ln_f.weight": variables["ln_f/g"]}).items()}
    state |= {"lm_head.weight": variables["wtet"], "score.weight": variables["clf/wclf"]}
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def oracle_model(cls):
    model = cls(ImageGPTConfig(vocab_size=33, n_positions=64, n_embd=64, n_layer=4, n_head=4, num_labels=7)).eval()
    state = oracle_state()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_() if name.endswith("bias") else weight.copy_(state[name])
    return model


@torch.no_grad()
def test_the_original_graph_gives_the_same_numbers(oracle):
    tokens, causal = oracle["tokens"].long(), oracle_model(ImageGPTForCausalImageModeling)
    inputs = align(tokens, "sos", causal.config)
    same(causal(inputs).logits, oracle["logits"], 1e-4)
    same(next_pixel_loss(causal, tokens), oracle["gen_loss"], 1e-4)
    classifier = oracle_model(ImageGPTForImageClassification)
    same(classifier(inputs, labels=oracle["labels"]).loss, oracle["clf_loss"], 1e-4)


@torch.no_grad()
def test_the_original_graph_gives_the_same_features(oracle):
    model = oracle_model(ImageGPTForCausalImageModeling)
    trunk, pooled = model.transformer, {}

    def keep(name, of):
        return lambda module, args, output: pooled.__setitem__(name, of(args, output).mean(dim=1))

    for layer, block in enumerate(trunk.h):
        block.register_forward_hook(keep(f"h{layer}/in", lambda args, output: args[0]))
        block.register_forward_hook(keep(f"h{layer}/out", lambda args, output: output[0]))
        block.ln_1.register_forward_hook(keep(f"h{layer}/ln_1", lambda args, output: output))
        block.ln_2.register_forward_hook(keep(f"h{layer}/ln_2", lambda args, output: output))
    trunk.ln_f.register_forward_hook(keep("ln_f", lambda args, output: output))
    model(align(oracle["tokens"].long(), "sos", model.config))
    wanted = {name.removeprefix("pooled/"): value for name, value in oracle.items() if name.startswith("pooled/")}
    assert pooled.keys() == wanted.keys()
    for name, value in wanted.items():
        same(pooled[name], value, 1e-4)


# Laws


@torch.no_grad()
def test_a_pixel_changes_nothing_at_or_before_its_own_position():
    model = shaken(ImageGPTForCausalImageModeling).double()
    tokens = tokens_of(n=1)
    before = model(align(tokens, "sos", TINY), output_hidden_states=True)
    for t in range(TINY.n_positions):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % TINY.n_colours
        after = model(align(other, "sos", TINY), output_hidden_states=True)
        pairs = zip((*before.hidden_states, before.logits), (*after.hidden_states, after.logits), strict=True)
        changed = torch.stack([(a != b)[0].any(dim=-1) for a, b in pairs])
        assert not changed[:, : t + 1].any(), f"pixel {t} reaches a position at or before it"
        assert changed[0].sum() == (t + 1 < TINY.n_positions)  # one input, none for the last pixel: it is dropped
        assert changed[1:, t + 1 :].all()


def test_every_earlier_position_reaches_a_later_one():
    model = shaken(ImageGPTModel).double()
    states = []
    model.drop.register_forward_hook(lambda module, args, output: states.append(output.requires_grad_()))
    last = model(tokens_of(n=1)).last_hidden_state
    for position in (0, 7, 15):
        (gradient,) = torch.autograd.grad(last[0, position].sum(), states[0], retain_graph=True)
        reached = gradient[0].abs().sum(dim=-1) > 0
        assert reached.tolist() == [i <= position for i in range(TINY.n_positions)]


def test_alignment():
    tokens = torch.tensor([[3, 1, 4], [0, 2, 5]])
    assert align(tokens, "sos", TINY).tolist() == [[16, 3, 1], [16, 0, 2]]
    assert align(tokens, "raw", TINY) is tokens
    with pytest.raises(ValueError, match="'SOS'; expected 'sos' or 'raw'"):
        align(tokens, "SOS", TINY)


def test_next_pixel_loss_by_hand():
    """The model reads SOS and all pixels but the last; the score of pixel i is at position i."""
    model = shaken(ImageGPTForCausalImageModeling)
    tokens = tokens_of(n=2)
    with torch.no_grad():
        total = 0.0
        for image in tokens:
            for i in range(TINY.n_positions):
                logits = model(torch.cat([torch.tensor([16]), image[:i]])[None]).logits[0, -1]
                total -= torch.log_softmax(logits, dim=0)[image[i]].item()
        assert next_pixel_loss(model, tokens).item() == pytest.approx(total / tokens.numel(), abs=1e-5)


# Norm


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (3, 5, 7), (2, 0, 7)])
def test_a_product_is_numpys_by_either_library(shape, slow, monkeypatch):
    monkeypatch.setattr("igpt_lab.core.devices.mkl_is_slow", lambda: slow and torch.backends.mkldnn.is_available())
    x, weight, bias = torch.randn(*shape[:-1], 14)[..., ::2], torch.randn(7, 20)[:, ::2], torch.randn(10)
    for addend in (None, bias):
        expected = x.double().numpy() @ weight.double().numpy() + (0 if addend is None else addend.double().numpy())
        with torch.no_grad():
            np.testing.assert_allclose(product(x, weight, addend), expected, atol=1e-5)


def test_norm_by_hand():
    norm = Norm(2, eps=11.0)
    norm.weight.data = torch.tensor([2.0, 10.0])
    same(norm(torch.tensor([[1.0, 7.0]])), torch.tensor([[2 / 6, 70 / 6]]))  # mean of squares 25, plus 11: root 6
    same(Norm(3, eps=0.0)(torch.tensor([2.0, 2.0, 2.0])), torch.ones(3))  # the mean is not taken away


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_does_not_overflow_in_half_precision(dtype):
    norm = Norm(4, eps=1e-5).to(dtype)
    for size in (300.0, 60000.0):
        got = norm(torch.tensor([size, -size, size, -size], dtype=dtype))
        assert got.dtype == dtype
        assert got.tolist() == [1, -1, 1, -1]


def test_norm_keeps_float64():
    x = np.random.default_rng(0).normal(size=(5, 8))
    want = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    same(Norm(8, eps=1e-5).double()(torch.from_numpy(x)), torch.from_numpy(want), 1e-14)


def test_the_model_runs_in_bfloat16():
    model = shaken(ImageGPTForCausalImageModeling)
    want = model(tokens_of()).logits
    got = model.to(torch.bfloat16)(tokens_of(), labels=tokens_of())
    assert got.logits.dtype == torch.bfloat16
    assert got.loss.dtype == torch.float32
    assert (got.logits.float() - want).abs().max() < 0.1


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_padding_on_the_left_stays_finite_under_autocast(dtype, explicit):
    model, tokens, mask = shaken(ImageGPTForCausalImageModeling), tokens_of(), torch.ones(3, 16)
    mask[:, :4] = 0
    options = {"attention_mask": mask, "position_ids": torch.arange(16)[None] - 4, "output_attentions": explicit}
    options["position_ids"] = options["position_ids"].clamp(min=0)
    with torch.autocast("cpu", dtype):
        got = model(tokens, **options).logits
    assert got.isfinite().all()
    assert (got[:, 4:] - model(tokens[:, 4:]).logits).abs().max() < 0.1, "what is hidden changed what is not"


# Initialisation and sizes


def test_first_loss_is_ln_v():
    model = ImageGPTForCausalImageModeling(TINY, generator=torch.Generator().manual_seed(0))
    assert next_pixel_loss(model, tokens_of()).item() == pytest.approx(math.log(16), abs=1e-6)
    assert model(tokens_of(), labels=tokens_of()).loss.item() == pytest.approx(math.log(16), abs=1e-6)
    classifier = ImageGPTForImageClassification(TINY, generator=torch.Generator().manual_seed(0))
    assert classifier(tokens_of(), labels=torch.tensor([0, 1, 2])).loss.item() == pytest.approx(math.log(5), abs=1e-6)
    tied = ImageGPTForCausalImageModeling(dataclasses.replace(TINY, tie_word_embeddings=True))
    assert tied.lm_head.weight.std() > 0.01, "a tied head is drawn with the tokens"


def test_initial_scales_are_the_original_ones():
    config = ImageGPTConfig(vocab_size=257, n_positions=256, n_embd=128, n_layer=4, n_head=4)
    model = ImageGPTForCausalImageModeling(config, generator=torch.Generator().manual_seed(0))
    scale = {"wpe": 0.01, "wte": 0.02, "c_attn": 128**-0.5, "attn.c_proj": (128 * 4) ** -0.5, "mlp": 0.02}
    for name, weight in model.named_parameters():
        if name.endswith("bias") or name == "lm_head.weight":
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            (wanted,) = (value for part, value in scale.items() if part in name)
            assert weight.std().item() == pytest.approx(wanted, rel=0.03), name
            assert abs(weight.mean().item()) < 0.03 * wanted, name


def test_initialisation_is_a_function_of_its_generator():
    def drawn(seed):
        model = ImageGPTForImageClassification(TINY, generator=torch.Generator().manual_seed(seed))
        return torch.cat([weight.flatten() for weight in model.parameters()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_a_model_never_holds_memory_that_nobody_set():
    assert all(weight.isfinite().all() for weight in ImageGPTModel(TINY).parameters())
    assert ImageGPTModel(TINY).h[0].mlp.c_fc.weight.std() < 0.1


@pytest.mark.parametrize(
    "size, count", [("S", 76_571_648), ("M", 455_157_760), ("L", 1_362_250_752), ("XL", 6_801_438_720)]
)
def test_published_sizes(size, count):
    with torch.device("meta"):
        model = ImageGPTForCausalImageModeling(SIZES[size])
    assert sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias")) == count


class OnlyMeta(TorchDispatchMode):
    """Fails at the first operation that puts a tensor anywhere but on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(x.is_meta for x in tree_leaves(out) if isinstance(x, torch.Tensor)), func
        return out


WAYS = {
    "plain": {},
    "states": {"output_hidden_states": True, "use_cache": False},
    "attentions": {"output_attentions": True},
    "mask": {"attention_mask": (2, 64)},
    "positions, types": {"position_ids": (1, 64), "token_type_ids": (2, 64)},
    "encoder": {"encoder_hidden_states": (2, 5, 1536), "encoder_attention_mask": (2, 5)},
    "upcast": {"reorder_and_upcast_attn": True},
    "masked": {"bidirectional": True, "masked": (2, 64)},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16 autocast"])
def test_every_way_runs_on_the_meta_device(way, low):
    """A tensor that is made on the wrong device, or looked at by the host, fails here."""
    chosen = {name: way[name] for name in ("reorder_and_upcast_attn", "bidirectional") if name in way}
    config = dataclasses.replace(SIZES["L"], n_layer=2, add_cross_attention="encoder_hidden_states" in way, **chosen)
    arguments = {name: value for name, value in way.items() if name not in chosen}
    dtypes = {"masked": torch.bool, "encoder_hidden_states": torch.float32}
    with torch.device("meta"), OnlyMeta(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        shapes = {name: shape for name, shape in arguments.items() if isinstance(shape, tuple)}
        arguments |= {name: torch.zeros(shape, dtype=dtypes.get(name, torch.long)) for name, shape in shapes.items()}
        tokens = torch.zeros(2, 64, dtype=torch.long)
        for training in (False, True):
            model = ImageGPTForCausalImageModeling(config).train(training)
            model.gradient_checkpointing_enable()
            out = model(tokens, labels=tokens, **arguments)
            assert out.logits.shape == (2, 64, 512)
            out.loss.backward()


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_run_on_the_meta_device(size):
    with torch.device("meta"), OnlyMeta():
        tokens = torch.zeros(2, 1024, dtype=torch.long)
        model = ImageGPTForCausalImageModeling(SIZES[size]).eval()
        assert next_pixel_loss(model, tokens).shape == ()
        assert model.generate(tokens[:, :1023], max_new_tokens=2).shape == (2, 1025)
        classifier = ImageGPTForImageClassification(SIZES[size])
        assert classifier(tokens, labels=tokens[:, 0]).loss.shape == ()
        bert = ImageGPTForCausalImageModeling(dataclasses.replace(SIZES[size], bidirectional=True))
        assert masked_pixel_loss(bert, tokens, tokens.bool()).shape == ()


COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")),
]


@pytest.mark.parametrize("backend", COMPILERS)
@torch.no_grad()
def test_a_compiled_model_gives_the_same_with_hooks_present(backend):
    points = ["ln_1", "resid_mid", "resid_post"]
    model, tokens = shaken(ImageGPTForCausalImageModeling), tokens_of()
    with record(model, points) as want:
        logits = model(tokens).logits
    torch._dynamo.reset()
    with record(model, points) as got:
        out = torch.compile(model, backend=backend, fullgraph=True)(tokens, output_hidden_states=True)
    same(out.logits, logits, 1e-4)
    assert list(out) == ["logits", "past_key_values", "hidden_states"]
    for point in points:
        same(got[point], want[point])


# Key-value cache


@torch.no_grad()
def test_a_cache_that_does_not_fit_says_so():
    model = shaken(ImageGPTForCausalImageModeling)
    cache = KeyValueCache.of(TINY, 2, 4, device="cpu", dtype=torch.float32)
    tokens = tokens_of(n=2)
    with pytest.raises(ValueError, match="5 more tokens for a cache that holds 0 of 4"):
        model(tokens[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="a batch of 1 for a cache of 2"):
        model(tokens[:1, :2], past_key_values=cache)
    model(tokens[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="1 more tokens for a cache that holds 4 of 4"):
        model(tokens[:, 3:4], past_key_values=cache)
        model(tokens[:, 4:5], past_key_values=cache)
    cache = model(tokens[:, :3]).past_key_values
    with pytest.raises(ValueError, match="a batch of 1 for a cache of 2"):
        model(tokens[:1, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="19 positions, but the model has 16"):
        model(tokens_of(n=2, length=16), past_key_values=cache)
    assert cache.get_seq_length() == 3


def test_too_many_positions():
    with pytest.raises(ValueError, match="17 positions, but the model has 16"):
        shaken(ImageGPTModel)(tokens_of(length=17))


# Modes, gradients, configuration


def test_dropout_only_in_training():
    config = dataclasses.replace(TINY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.5)
    model = shaken(ImageGPTForCausalImageModeling, config)
    assert torch.equal(model(tokens_of()).logits, model(tokens_of()).logits)
    model.train()
    assert not torch.equal(model(tokens_of()).logits, model(tokens_of()).logits)


@pytest.mark.parametrize("cls", HEADS)
def test_every_parameter_gets_a_gradient(cls, tmp_path):
    shaken(cls).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    labels = tokens_of() if cls is ImageGPTForCausalImageModeling else torch.tensor([1, 2, 3])
    model(align(tokens_of(), "sos", TINY), labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_config_of_the_port_is_taken(tmp_path):
    port = transformers()
    theirs = port.ImageGPTConfig(n_layer=2, n_embd=8, n_head=2, num_labels=7)
    theirs.save_pretrained(tmp_path)
    ours = ImageGPTConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert ours == ImageGPTConfig(n_layer=2, n_embd=8, n_head=2, num_labels=7)
    defaults = dataclasses.asdict(ImageGPTConfig())
    assert defaults.pop("bidirectional") is False  # ours alone
    assert {name: getattr(port.ImageGPTConfig(), name) for name in defaults} == defaults


def test_other_names_of_fields_are_those_of_the_port():
    port = transformers()
    sizes = {"hidden_size": 12, "max_position_embeddings": 9, "num_attention_heads": 3, "num_hidden_layers": 1}
    ours, theirs = ImageGPTConfig(**sizes), port.ImageGPTConfig(**sizes)
    assert (ours.n_embd, ours.n_positions, ours.n_head, ours.n_layer) == (12, 9, 3, 1)
    assert {name: getattr(ours, name) for name in sizes} == sizes
    assert {name: getattr(theirs, name) for name in defaults_of(ours)} == defaults_of(ours)
    assert dataclasses.replace(ours, n_embd=24).hidden_size == 24
    names = {0: "cat", 1: "dog", 2: "owl"}
    for config in (ImageGPTConfig(id2label=names), ImageGPTConfig(id2label={str(k): v for k, v in names.items()})):
        assert (config.num_labels, config.id2label, config.label2id["owl"]) == (3, names, 2)
    assert ImageGPTConfig(num_labels=3).id2label == port.ImageGPTConfig(num_labels=3).id2label
    assert dataclasses.replace(TINY, num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def defaults_of(config):
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "bidirectional"}


def test_config_round_trip():
    for config in CONFIGS.values():
        assert ImageGPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd 10 is not a multiple of n_head 4"),
        ({"n_head": 0}, "n_head is 0; expected a whole number above 0"),
        ({"n_embd": "64"}, "n_embd is '64'; expected a whole number"),
        ({"activation_function": "swoosh"}, "'swoosh'; expected one of"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"num_labels": 3, "id2label": {"0": "cat", "1": "dog"}}, "num_labels is 3, but id2label names 2 classes"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; expected a number above 0"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; expected a number above 0"),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5; expected a fraction from 0 to 1"),
        ({"embd_pdrop": None}, "embd_pdrop is None; expected a fraction"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'; expected None or one of"),
    ],
)
def test_config_errors(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ImageGPTModel(ImageGPTConfig.from_dict(values))
    shaken(ImageGPTModel).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | values))
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        ImageGPTModel.from_pretrained(tmp_path)


def test_equal_configurations_are_one_key():
    named = dataclasses.replace(TINY, num_labels=2, id2label={0: "cat", 1: "dog"}, eos_token_id=[3])
    copies = [ImageGPTConfig.from_dict(config.to_dict()) for config in (TINY, named)]
    assert {TINY: 1, named: 2} == dict(zip(copies, (1, 2), strict=True))
    assert len({TINY, named, *copies}) == 2


def test_classes_by_name_are_classes_by_number(tmp_path):
    config = ImageGPTConfig(label2id={"cat": 0, "owl": 1, "dog": 2}, hidden_size=16)
    assert (config.num_labels, config.id2label) == (3, {0: "cat", 1: "owl", 2: "dog"})
    config.save_pretrained(tmp_path)
    assert ImageGPTConfig.from_pretrained(tmp_path) == config
    assert transformers().ImageGPTConfig.from_pretrained(tmp_path).label2id == config.label2id
    changed = ImageGPTConfig.from_pretrained(tmp_path, label2id={"no": 0, "yes": 1}, num_hidden_layers=3)
    assert (changed.num_labels, changed.id2label, changed.n_layer) == (2, {0: "no", 1: "yes"}, 3)
    with pytest.raises(TypeError, match="no field 'n_heads'; did you mean 'n_head'"):
        ImageGPTConfig.from_pretrained(tmp_path, n_heads=3)


def test_a_misspelt_field_fails(tmp_path):
    with pytest.raises(TypeError, match="no field 'n_layers'; did you mean 'n_layer'"):
        ImageGPTConfig(n_layers=3)
    with pytest.raises(TypeError, match="no field 'n_layers'; did you mean 'n_layer'"):
        dataclasses.replace(TINY).n_layers = 3
    shaken(ImageGPTModel).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no field 'num_label'; did you mean 'num_labels'"):
        ImageGPTModel.from_pretrained(tmp_path, num_label=3)


def test_fields_are_changed_while_loading(tmp_path):
    shaken(ImageGPTModel).save_pretrained(tmp_path)
    names = {0: "cat", 1: "dog"}
    with pytest.warns(UserWarning, match="score.weight"):
        model = ImageGPTForImageClassification.from_pretrained(tmp_path, id2label=names, dtype=torch.bfloat16)
    assert (model.config.id2label, model.score.weight.shape, model.dtype) == (names, (2, 24), torch.bfloat16)
    shaken(ImageGPTForImageClassification).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'score.weight' is \(5, 24\); .*\(9, 24\)"):
        ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=9)
    with pytest.warns(UserWarning, match="score.weight"):
        model = ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert not model.score.weight.any() and model.score.weight.shape == (9, 24)


def test_a_configuration_and_a_type_are_given_while_loading(tmp_path):
    model = shaken(ImageGPTModel)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    other = dataclasses.replace(TINY, layer_norm_epsilon=0.5)
    loaded = ImageGPTModel.from_pretrained(tmp_path, config=other, n_inner=96)
    assert loaded.config == dataclasses.replace(other, n_inner=96)
    for dtype, want in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16),
                        ("torch.float16", torch.float16), (torch.float64, torch.float64)):  # fmt: skip
        assert ImageGPTModel.from_pretrained(tmp_path, dtype=dtype).dtype == want
        assert ImageGPTModel.from_pretrained(tmp_path, torch_dtype=dtype).dtype == want
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):  # as newer and older versions of transformers write it
        (tmp_path / "config.json").write_text(json.dumps(values | {name: "float16"}))
        assert ImageGPTModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    for dtype in ("float23", "int8", "nn"):
        with pytest.raises(ValueError, match=f"dtype '{dtype}'; expected a floating-point type"):
            ImageGPTModel.from_pretrained(tmp_path, dtype=dtype)


@torch.no_grad()
def test_a_tied_head_is_the_embedding(tmp_path):
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    model = shaken(ImageGPTForCausalImageModeling, config)
    model.save_pretrained(tmp_path)
    for one in (model, ImageGPTForCausalImageModeling.from_pretrained(tmp_path)):
        assert one.lm_head.weight is one.transformer.wte.weight
        assert one(tokens_of()).logits.shape == (3, 16, 17)  # SOS has a column too, as in transformers
        same(one(tokens_of()).logits, model(tokens_of()).logits, 0)
        assert one.generate(tokens_of(n=1, length=1), max_new_tokens=9).max() < 16, "SOS was drawn"


def test_causal_loss_by_hand():
    """`labels` are shifted inside: the logits at i score the label at i + 1."""
    model, tokens = shaken(ImageGPTForCausalImageModeling), tokens_of(n=2)
    with torch.no_grad():
        logits = model(tokens).logits
        want = -torch.stack([F.log_softmax(logits[n, i], 0)[tokens[n, i + 1]] for n in range(2) for i in range(15)])
        same(model(tokens, labels=tokens).loss, want.mean())


# Masked pixels


@torch.no_grad()
def test_masked_loss_by_hand():
    """Only what is masked is scored, by its own logits, whatever kind of mask says so."""
    model, tokens = (
        shaken(ImageGPTForCausalImageModeling, dataclasses.replace(TINY, bidirectional=True)),
        tokens_of(n=2),
    )
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 3] = masked[1, 0] = masked[1, 9] = True
    logits = model(tokens, masked=masked).logits
    want = -torch.stack([F.log_softmax(logits[n, i], 0)[tokens[n, i]] for n, i in masked.nonzero()]).mean()
    for mask in (masked, masked.long(), masked.float()):
        same(masked_pixel_loss(model, tokens, mask), want)
        same(model(tokens, masked=mask, labels=tokens).loss, want)
    with pytest.raises(ValueError, match="no pixel is masked"):
        masked_pixel_loss(model, tokens, masked & False)
    with pytest.raises(ValueError, match="a bidirectional model is scored on masked pixels: pass `masked`"):
        model(tokens, labels=tokens)
    with pytest.raises(ValueError, match="a bidirectional model predicts masked pixels, so its loss needs masks"):
        next_pixel_loss(model, tokens)


# Outputs and generation


def test_an_attribute_of_an_output_is_its_entry():
    out = shaken(ImageGPTForCausalImageModeling)(tokens_of(), labels=tokens_of())
    out.loss = out.loss * 2
    assert out["loss"] is out.loss is out[0] is out.to_tuple()[0]
    out.logits = None
    assert "logits" not in out and out.logits is None
    with pytest.raises(AttributeError, match="no 'lost'; its fields are loss"):
        out.lost = 1


def test_the_usual_way_is_the_fused_attention_without_a_mask(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        calls.append((attn_mask, is_causal))
        return fused(query, key, value, attn_mask, dropout_p, is_causal, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for cls, labels in zip(CLASSES, ({}, {"labels": tokens_of()}, {"labels": torch.tensor([0, 1, 2])}), strict=True):
        calls.clear()
        shaken(cls)(tokens_of(), **labels)
        assert calls == [(None, True)] * TINY.n_layer


@pytest.mark.parametrize("options", [{}, {"eos_token_id": 16}, {"use_cache": False}, {"do_sample": True}])
def test_what_is_generated_may_be_trained_on(options):
    model = shaken(ImageGPTForCausalImageModeling).train()
    with torch.inference_mode():
        prompt = tokens_of(length=4)
    images = model.generate(prompt, max_length=16, **options)
    assert model.training and not images.is_inference()
    model(images, labels=images).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_an_error_leaves_the_mode_as_it_was():
    model = shaken(ImageGPTForCausalImageModeling).train()

    def fails(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.continue_(tokens_of(), 3, fails)
    assert model.training
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature=.*; expected a number above 0"):
            model.generate(tokens_of(length=2), max_length=4, do_sample=True, temperature=temperature)
    for inputs in ({}, {"input_ids": tokens_of(), "inputs": tokens_of()}):
        with pytest.raises(ValueError, match="either input_ids or inputs; got both or none"):
            model.generate(**inputs, max_length=4)


def test_a_bidirectional_model_continues_nothing():
    model = shaken(ImageGPTForCausalImageModeling, dataclasses.replace(TINY, bidirectional=True))
    for cached in (True, False):
        with pytest.raises(ValueError, match="a bidirectional model"):
            model.generate(tokens_of(length=2), max_length=4, use_cache=cached)
