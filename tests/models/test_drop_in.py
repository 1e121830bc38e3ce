"""What other people's code does with a model counts here as it does with transformers': hooks, adapters, tracers."""

import dataclasses
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map
from transformers_peer import CLASSES, Case, same, same_output, twin

import igpt_lab as lab
from igpt_lab.features.settings import digest_of_weights
from igpt_lab.models.fast import is_plain
from igpt_lab.sampling.decoding import Decoder

CONFIG = lab.ImageGPTConfig(
    vocab_size=17, n_positions=16, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
CASE = Case(CONFIG, n=2, t=16, seed=0)
Causal = lab.ImageGPTForCausalImageModeling


def pair(cls=Causal) -> tuple:
    model = CASE.model(cls)
    return model, twin(model)


@pytest.fixture
def one_process():
    """A group of one process, in which DistributedDataParallel does all that it does in more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Outputs


@torch.no_grad()
def test_tensors_in_an_output_are_found_as_in_theirs():
    tokens = CASE.tokens()
    ours, theirs = (it(tokens, labels=tokens, output_hidden_states=True, use_cache=False) for it in pair())
    (leaves, spec), (wanted, _) = tree_flatten(ours), tree_flatten(theirs)
    assert len(leaves) == len(wanted) == 2 + 3
    for leaf, want in zip(leaves, wanted, strict=True):
        same(leaf, want)
    doubled = tree_map(lambda x: 2 * x, ours)
    assert type(doubled) is type(ours) and list(doubled) == list(ours)
    same(doubled.logits, 2 * theirs.logits)
    assert spec == tree_flatten(tree_map(lambda x: x, ours))[1]


@torch.no_grad()
def test_a_cache_in_an_output_survives_being_taken_apart():
    tokens, (model, theirs) = CASE.tokens(), pair()
    out = tree_map(lambda x: x.clone(), model(tokens[:, :8]))
    assert out.past_key_values.get_seq_length() == 8
    later = model(tokens[:, 8:], past_key_values=out.past_key_values).logits
    same(later, theirs(tokens).logits[:, 8:])


def test_ddp_with_a_static_graph_averages_the_gradients_of_both(one_process):
    """It looks for tensors in what the model gives; where it finds none it never starts to average."""
    tokens, averaged = CASE.tokens(), []
    for model in pair():
        shell = DistributedDataParallel(model.train(), static_graph=True)
        seen = []
        shell.register_comm_hook(seen, _noting)
        for _ in range(2):
            shell(tokens, labels=tokens, use_cache=False).loss.backward()
        averaged.append((sum(seen), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    (ours, gradients), (theirs, wanted) = averaged
    assert ours == theirs > 0
    for name, gradient in gradients.items():
        same(gradient, wanted[name])


def _noting(seen: list, bucket):
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("cached", [False, True])
def test_an_exported_model_gives_what_theirs_gives(cached):
    tokens, (model, theirs) = CASE.tokens(), pair()
    exported = torch.export.export(model, (tokens,), {"use_cache": cached}, strict=False).module()
    with torch.no_grad():
        out, want = exported(tokens, use_cache=cached), theirs(tokens, use_cache=cached)
    assert type(out) is type(model(tokens))
    same_output(out, want)


class Logits(nn.Module):
    """A model that gives a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_has_the_biases_that_were_zero_when_it_was_traced():
    tokens, traced = CASE.tokens(), []
    for model in pair():
        biases = [weight for name, weight in model.named_parameters() if name.endswith(".bias")]
        with torch.no_grad():
            for bias in biases:
                bias.zero_()
            traced_model = torch.jit.trace(Logits(model), tokens)
            for i, bias in enumerate(biases):
                bias.copy_(torch.linspace(-1, 1, len(bias)) + i)
            same(traced_model(tokens), model(tokens).logits)
            traced.append(traced_model(tokens))
    same(*traced)


# Modules


def test_a_hook_on_every_module_is_called_as_often_as_in_theirs():
    tokens, counts = CASE.tokens(), []
    for model in pair():
        called: list[str] = []
        for name, part in model.named_modules():
            part.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
        with torch.no_grad():
            model(tokens)
        counts.append(Counter(name for name in called if not name.endswith(("dropout", ".act"))))
    assert counts[0] == counts[1]
    assert counts[0]["transformer.wpe"] == counts[0]["transformer.wte"] == 1


@torch.no_grad()
@pytest.mark.parametrize("place", ["transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn", "lm_head"])
def test_what_a_hook_changes_is_changed_in_both(place):
    tokens, outputs = CASE.tokens(), []
    for model in pair():
        plain = model(tokens).logits
        model.get_submodule(place).register_forward_hook(lambda _, __, output: 2 * output)
        outputs.append(model(tokens).logits)
        assert (outputs[-1] - plain).abs().max() > 0.1
    same(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("place", ["transformer.wte", "transformer.wpe", "transformer.h.1.mlp.c_fc", "lm_head", ""])
def test_a_hook_counts_in_every_pass_of_sample_complete_and_generate(place):
    """As in transformers' `generate`: a pass for what is given, then one for every token but the last."""
    ours, theirs = pair()
    counts = {}
    for name, model in {"sample": ours, "complete": ours, "ours": ours, "theirs": theirs}.items():
        passes = []
        handle = model.get_submodule(place).register_forward_hook(lambda *_, passes=passes: passes.append(1))
        start = torch.full((2, 1), CONFIG.sos_token_id)
        if name == "sample":
            lab.sample(model, 2, temperature=0.0, progress=False)
        elif name == "complete":
            lab.complete(model, CASE.tokens().numpy(), keep=0.5, completions=1, temperature=0.0, progress=False)
        else:
            model.generate(start, max_length=17, do_sample=False)
        handle.remove()
        counts[name] = len(passes)
    assert counts == {"sample": 16, "complete": 8, "ours": 16, "theirs": 16}


@torch.no_grad()
def test_what_a_hook_changes_is_in_samples_as_in_theirs():
    drawn = []
    for model in pair():
        model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, __, output: -3 * output)
        start = torch.full((2, 1), CONFIG.sos_token_id)
        drawn.append(model.generate(start, max_length=17, do_sample=False)[:, 1:].numpy())
    model.transformer = None
    ours = CASE.model(Causal)
    unhooked = lab.sample(ours, 2, temperature=0.0, progress=False).tokens
    ours.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, __, output: -3 * output)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(lab.sample(ours, 2, temperature=0.0, progress=False).tokens, drawn[1])
    assert (unhooked != drawn[1]).any()


@torch.no_grad()
def test_a_model_with_parts_of_others_steps_as_it_passes_and_our_own_the_fast_way():
    model = CASE.model(Causal)
    assert is_plain(model) and Decoder(model, 2).plain

    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Other(24, 16, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert not is_plain(model)
    drawn = lab.sample(model, 1, temperature=0.0, progress=False).tokens
    start, theirs = torch.full((1, 1), CONFIG.sos_token_id), twin(CASE.model(Causal))
    np.testing.assert_array_equal(drawn, theirs.generate(start, max_length=17, do_sample=False)[:, 1:])


def test_linear_maps_are_of_the_class_that_theirs_are_of_also_in_models_made_before():
    """transformers' `Conv1D` is what peft adapts; it is joined when somebody asks for a model's modules."""
    ours, theirs = pair()
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    kinds = [{name for name, part in it.named_modules() if isinstance(part, conv)} for it in (ours, theirs)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 4 * CONFIG.n_layer
    for name in kinds[0]:
        one, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert (one.nx, one.nf) == (other.nx, other.nf) == tuple(one.weight.shape)
        x = CASE.normal(3, one.nx)
        same(one(x), other(x))


def test_peft_adapts_every_linear_map_of_both_and_merges_to_the_same_numbers():
    peft = pytest.importorskip("peft", reason="peft, which adapts models, is not installed")
    tokens, adapted = CASE.tokens(), []
    for model in pair():
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, lora_alpha=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                if "lora_" in name and "lm_head" not in name:
                    weight.normal_(0, 0.3, generator=generator)
        names = {name for name, _ in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            logits = model(tokens).logits
            merged = model.merge_and_unload()
            same(merged(tokens).logits, logits)
        adapted.append(({name for name in names if "lm_head" not in name}, logits))
    assert adapted[0][0] == adapted[1][0] and len(adapted[0][0]) == 2 * 4 * CONFIG.n_layer
    same(adapted[0][1], adapted[1][1])


def test_peft_adapts_the_embedding_of_positions_in_both():
    peft = pytest.importorskip("peft", reason="peft, which adapts models, is not installed")
    tokens, logits = CASE.tokens(), []
    for model in pair():
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["wpe"], r=2))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
            logits.append(model(tokens).logits)
    same(*logits)
    with torch.no_grad():
        assert (logits[0] - CASE.model(Causal)(tokens).logits).abs().max() > 0.1


# What stays protected


def test_the_key_of_a_store_has_the_shape_that_computes_whatever_is_set_later():
    """Two models that differ in their heads alone: a configuration that is changed makes neither into the other."""
    model = Case(dataclasses.replace(CONFIG), n=2, t=16, seed=0).model(Causal)
    other = Causal(dataclasses.replace(CONFIG, n_head=2))
    other.load_state_dict(model.state_dict())
    mine, others = digest_of_weights(model), digest_of_weights(other)
    assert mine != others
    model.config.update({"n_head": 2, "layer_norm_epsilon": 0.5, "note": "a", "use_cache": False})
    assert digest_of_weights(model) == mine


@torch.no_grad()
def test_who_changes_a_configuration_changes_no_other_model():
    first, second = (lab.load_model("fashion-xs") for _ in range(2))
    first.config.output_hidden_states = True
    assert not second.config.output_hidden_states and lab.SIZES["S"] is not lab.SIZES["S"]


def test_transformers_is_imported_for_nobody():
    lines = ["import sys, igpt_lab as lab, torch", "model = lab.load_model('fashion-xs')",
             "model(torch.zeros(1, 4).long())",
             "lab.ImageGPTImageProcessor.from_pretrained('fashion-xs')", "lab.ImageGPTModel(model.config)",
             "print('transformers' in sys.modules, type(model).__mro__[-2].__name__)"]  # fmt: skip
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Module"]


# What transformers' own tests ask for


def test_a_configuration_lists_its_attributes_and_has_no_plan_for_several_devices_as_theirs():
    ours, theirs = CONFIG, twin(CASE.model(Causal)).config
    assert {"n_embd", "initializer_range", "id2label"} <= set(ours) & set(theirs)
    assert ours.base_model_tp_plan is theirs.base_model_tp_plan is None
    assert ours.base_model_pp_plan is theirs.base_model_pp_plan is None


def test_a_configuration_may_ask_for_gradient_checkpointing_as_theirs():
    model, theirs = pair()
    model.config.gradient_checkpointing = theirs.config.gradient_checkpointing = True
    assert type(model)(model.config).is_gradient_checkpointing
    assert type(theirs)(theirs.config).is_gradient_checkpointing
    assert not model.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_blocks_checkpoint_themselves_and_their_hooks_run_once_as_theirs():
    from transformers.modeling_layers import GradientCheckpointingLayer

    tokens, counts, gradients = CASE.tokens(), [], []
    for model in pair():
        model.train().gradient_checkpointing_enable()
        calls = Counter()
        for name, part in model.named_modules():
            assert getattr(part, "gradient_checkpointing", True), name
            if isinstance(part, GradientCheckpointingLayer):
                part.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["block"]))
                part.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["inside"]))
        model(tokens, labels=tokens).loss.backward()
        counts.append(calls)
        gradients.append(model.transformer.wte.weight.grad)
        model.gradient_checkpointing_disable()
        assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    assert counts[0] == counts[1] == {"block": CONFIG.n_layer, "inside": 2 * CONFIG.n_layer}
    same(*gradients)


def test_a_block_of_another_class_is_computed_twice_and_no_more_as_theirs():
    """FSDP2 makes such a class of every block."""
    tokens, counts = CASE.tokens(), []
    for model in pair():
        block, calls = model.transformer.h[0], Counter()
        block.__class__ = type("Sharded", (type(block),), {})
        block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["inside"]))
        model.train().activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        counts.append(calls)
    assert counts[0] == counts[1] == {"inside": 2}


def test_a_head_once_made_is_not_drawn_again_by_post_init_as_theirs():
    for model in pair():
        before = model.lm_head.weight.clone()
        model.post_init()
        assert torch.equal(model.lm_head.weight, before)


def test_a_layer_that_a_class_adds_is_drawn_once():
    class Mine(lab.ImageGPTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.transformer = lab.ImageGPTModel(config)
            self.lm_head = nn.Linear(config.n_embd, 5)
            nn.init.zeros_(self.lm_head.weight)
            self.post_init()

    model = Mine(CONFIG)
    before = model.lm_head.weight.clone()
    assert before.std() > 0
    model.post_init()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(("rows", "multiple"), [(20, 8), (None, 64), (16, 8), (17, 1)])
def test_rows_are_padded_to_a_multiple_as_theirs(rows, multiple):
    ours, theirs = (it.resize_token_embeddings(rows, pad_to_multiple_of=multiple).weight.shape for it in pair())
    assert ours == theirs
    assert ours[0] % multiple == 0


def test_rows_are_padded_to_a_whole_number_alone_as_theirs():
    for model in pair():
        with pytest.raises(ValueError, match="Asking to pad the embedding matrix to a multiple of `1.3`"):
            model.resize_token_embeddings(20, pad_to_multiple_of=1.3)


def test_only_a_model_with_a_tied_head_names_it():
    assert CASE.model(lab.ImageGPTModel)._tied_weights_keys is None
    ours, theirs = (it._tied_weights_keys for it in pair())
    assert ours == theirs


@pytest.mark.parametrize("saver", [0, 1])
def test_what_generate_is_asked_for_by_default_survives_in_files_of_either(tmp_path, saver):
    both = pair()
    both[saver].generation_config.top_k, both[saver].generation_config.do_sample = 3, True
    both[saver].save_pretrained(tmp_path)
    for cls in map(type, both):
        asked = cls.from_pretrained(tmp_path).generation_config
        assert (asked.top_k, asked.do_sample, asked.temperature) == (3, True, None)


def test_what_generate_is_asked_for_in_a_file_is_checked(tmp_path):
    CASE.model(Causal).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(ValueError, match="generation_config.json: top_k is 'many'; expected a whole number"):
        Causal.from_pretrained(tmp_path)


def test_no_model_is_loaded_under_the_meta_device_as_theirs(tmp_path):
    both = pair()
    both[0].save_pretrained(tmp_path)
    for cls in map(type, both):
        with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
            cls.from_pretrained(tmp_path)


def test_a_model_that_is_not_there_is_an_os_error_as_theirs(tmp_path):
    for cls in map(type, pair()):
        with pytest.raises(OSError):
            cls.from_pretrained(str(tmp_path / "none"))


def test_what_generate_was_asked_for_by_an_earlier_model_goes_when_another_is_saved_there(tmp_path):
    model = CASE.model(Causal)
    model.generation_config.top_k = 3
    model.save_pretrained(tmp_path)
    model.generation_config.top_k = None
    model.save_pretrained(tmp_path)
    assert Causal.from_pretrained(tmp_path).generation_config.top_k is None
    CASE.model(lab.ImageGPTModel).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("cls", CLASSES)
def test_files_of_a_model_that_can_generate_say_so_as_theirs(tmp_path, cls):
    names = []
    for model, folder in zip(pair(cls), ("ours", "theirs"), strict=True):
        model.save_pretrained(tmp_path / folder)
        names.append({path.name for path in (tmp_path / folder).iterdir()})
        assert type(twin(CASE.model(cls))).from_pretrained(tmp_path / folder).can_generate() == model.can_generate()
    assert names[0] == names[1]
