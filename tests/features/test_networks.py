"""Layers of any torch network: stored states against plain forward hooks, the store's key, and what is refused."""

import functools
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import igpt_lab as lab
from igpt_lab.features import networks
from igpt_lab.features.extraction import extract
from igpt_lab.features.fingerprints import digest_of_function, digest_of_network, probe_picture
from igpt_lab.features.manifest import StoreError
from igpt_lab.features.modules import ModuleStates, blocks_of
from igpt_lab.features.networks import Passes
from igpt_lab.features.upkeep import list_stores, repair, verify

OPTIONS = {"device": "cpu", "progress": False}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.mix(x)))


class Twelve(nn.Module):
    """(N, 3, 4, 4) -> (N, 2), by tokens (N, 16, 8)."""

    def __init__(self, blocks=3):
        super().__init__()
        self.head, self.embed = nn.Linear(8, 2), nn.Linear(3, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture
def twelve():
    torch.manual_seed(0)
    return Twelve()


def pixels(side=32):
    return lambda image: torch.from_numpy(np.asarray(image.resize((side, side)), np.float32) / 255).permute(2, 0, 1)


def ids(image):
    """The 16 greys of a picture of 4 x 4 pixels, 0 to 255."""
    return np.array(image.convert("L").resize((4, 4))).ravel()


def vit():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **shape))


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=12, n_layer=3, n_head=2)
    )


def resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 1], layer_type="basic")
    return transformers.ResNetModel(config)


def timm_vit():
    timm = pytest.importorskip("timm", reason="timm, with torchvision, is not installed", exc_type=ImportError)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=2)


def timm_resnet():
    timm = pytest.importorskip("timm", reason="timm, with torchvision, is not installed", exc_type=ImportError)
    return timm.create_model("resnet18", num_classes=2)


def tokens_mean(x):
    return x.mean(1)


def space_mean(x):
    return x.mean((2, 3))


STAGES = ("0.layers.0", "0.layers.1", "0.layers.2", "1.layers.0")
NETWORKS = {
    "twelve": (Twelve, pixels(4), [f"blocks.{i}" for i in range(3)], tokens_mean),
    "vit": (vit, pixels(), [f"layers.{i}" for i in range(3)], tokens_mean),
    "gpt2": (gpt2, ids, [f"h.{i}" for i in range(3)], tokens_mean),
    "resnet": (resnet, pixels(), [f"encoder.stages.{name}" for name in STAGES], space_mean),
    "timm_vit": (timm_vit, pixels(), [f"blocks.{i}" for i in range(3)], tokens_mean),
    "timm_resnet": (timm_resnet, pixels(), [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)], space_mean),
}  # fmt: skip


def plain(network, names, inputs, reduce):
    """What modules give, by hooks of nothing but torch: name -> (N, D)."""
    outputs, modules = {}, dict(network.named_modules())

    def keep(name, module, args, output):
        outputs[name] = reduce(output if isinstance(output, torch.Tensor) else output[0])

    handles = [modules[name].register_forward_hook(functools.partial(keep, name)) for name in names]
    with torch.no_grad():
        network.eval()(inputs)
    for handle in handles:
        handle.remove()
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_stored_states_are_those_of_plain_hooks(name, train, test, tmp_path):
    make, preprocess, names, reduce = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    store = extract(network, [train, test], preprocess=preprocess, store=tmp_path, batch_size=7, **OPTIONS)
    assert list(store.names) == names and store.layers == {"modules": list(range(len(names)))}
    assert not verify(store.path)
    for images in (train, test):
        inputs = torch.stack([torch.as_tensor(preprocess(image)) for image in images])
        expected = plain(network, names, inputs if inputs.is_floating_point() else inputs.long(), reduce)
        for layer, wanted in expected.items():
            np.testing.assert_allclose(store.layer("modules", layer, images.split), wanted, atol=1e-5)
        np.testing.assert_array_equal(store.labels(images.split), images.labels)
        np.testing.assert_array_equal(store.index(images.split), images.index)


def test_the_passes_end_with_the_deepest_module_and_what_is_there_is_not_computed_again(
    twelve, test, tmp_path, monkeypatch
):
    heads, deepest = [], []
    twelve.head.register_forward_hook(lambda *_: heads.append(1))
    twelve.blocks[2].register_forward_hook(lambda *_: deepest.append(1))
    options = {"modules": ["blocks.1", "embed"], "store": tmp_path, "batch_size": 10, **OPTIONS}
    store = extract(twelve, test, **options)
    assert store.names == ("embed", "blocks.1")  # in the order of depth
    assert len(heads) == len(deepest) == 1  # in the pass that tries the network out
    monkeypatch.setattr(Passes, "over", lambda *_: pytest.fail("computed again"))
    assert extract(twelve, test, **options).path == store.path


def test_a_stopped_extraction_goes_on_to_the_same_bytes(twelve, train, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "ROWS", 25)
    whole = extract(twelve, train, store=tmp_path / "whole", **OPTIONS)
    over, calls = Passes.over, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return over(self, *arguments)

    monkeypatch.setattr(Passes, "over", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(twelve, train, store=tmp_path / "stopped", **OPTIONS)
    assert not any(module._forward_hooks for module in twelve.modules())
    again = extract(twelve, train, store=tmp_path / "stopped", **OPTIONS)
    assert len(calls) == 1 + 1 + 2
    for number in range(3):
        assert again.part("train", number).read_bytes() == whole.part("train", number).read_bytes()


# The key


def half(image):
    return pixels(4)(image) / 2


def test_another_network_pooling_or_preprocess_has_a_store_of_its_own(twelve, test, tmp_path):
    options = {"preprocess": pixels(4), "store": tmp_path, **OPTIONS}
    store = extract(twelve, test, **options)
    others = [
        extract(twelve, test, **options | {"preprocess": half}),
        extract(twelve, test, **options, pool="last"),
        extract(twelve, test, **options, pool=lambda x: x.amax(1)),
        extract(twelve, test, **options, pool=lambda x: x.amin(1)),
        extract(twelve, test, **options, modules=["blocks.0", "blocks.1"]),
        extract(twelve, test, **options, dtype="bfloat16"),
        extract(twelve, test[:30], **options),
    ]
    twelve.train()
    assert extract(twelve, test, **options | {"preprocess": pixels(4)}).path == store.path
    twelve.embed.bias.data += 1
    others.append(extract(twelve, test, **options))
    assert len({feature_store.path for feature_store in (store, *others)}) == 1 + len(others)


def test_a_digest_sees_settings_and_code_but_not_the_mode():
    class Scaled(nn.Linear):
        def __init__(self, scale):
            torch.manual_seed(0)
            super().__init__(2, 2)
            self.scale = scale

        def forward(self, x):
            return self.scale * super().forward(x)

    def other(self, x):
        return self.scale + nn.Linear.forward(self, x)

    first = digest_of_network(Scaled(2))
    assert digest_of_network(Scaled(2).train()) == digest_of_network(Scaled(2).eval()) == first
    assert digest_of_network(Scaled(3)) != first
    Scaled.forward = other
    assert digest_of_network(Scaled(2)) != first
    assert digest_of_network(nn.Sequential(nn.ReLU())) != digest_of_network(nn.Sequential(nn.GELU()))


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and still used
def test_a_digest_sees_quantised_weights():
    plain = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    plain[1][0].load_state_dict({"weight": plain[0][0].weight + 1, "bias": plain[0][0].bias})
    digests = [digest_of_network(torch.ao.quantization.quantize_dynamic(net)) for net in (*plain, plain[0])]
    assert digests[0] == digests[2] != digests[1]


def test_a_script_has_no_hooks(test, tmp_path):
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    with pytest.raises(ValueError, match="ScriptModule runs without hooks; give the network that it was made of"):
        extract(scripted, test, modules=["1"], store=tmp_path, **OPTIONS)


def test_a_digest_sees_what_a_function_is_made_of():
    def at(place, scale=1.0):
        return lambda x: scale * x[:, place]

    functions = [at(0), at(1), at(0, 2.0), tokens_mean, functools.partial(torch.mean, dim=1), torch.mean, torch.sum]
    assert len(set(map(digest_of_function, functions))) == len(functions)
    assert digest_of_function(at(0)) == digest_of_function(at(0))
    network = Twelve()

    class Around(nn.Module):
        def forward(self, x):
            return network(around.other(x))  # which leads back to itself

    around = Around()
    around.other = nn.Linear(2, 2)
    assert digest_of_network(around) == digest_of_network(around) != digest_of_network(Around())


# Which modules


def test_blocks_are_the_longest_list_of_one_class_with_others_of_that_class():
    """By hand: stages of 2 and 1 blocks, a head of two linear layers beside another class, an empty list."""
    stages = nn.ModuleDict({"a": nn.Sequential(Block(), Block()), "b": nn.Sequential(Block())})
    network = nn.ModuleDict(
        {"stages": stages, "head": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "none": nn.ModuleList()}
    )
    assert blocks_of(network) == ["stages.a.0", "stages.a.1", "stages.b.0"]
    assert blocks_of(nn.Sequential(Block(), Block())) == ["0", "1"]
    with pytest.raises(ValueError, match="has no ModuleList or Sequential of modules of one class; name its modules"):
        blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_a_block_that_is_shared_counts_by_its_calls(twelve, test, tmp_path):
    twelve.blocks = nn.ModuleList([twelve.blocks[0]] * 3)
    store = extract(twelve, test, preprocess=pixels(4), store=tmp_path, **OPTIONS)
    x = torch.stack(list(map(pixels(4), test)))
    with torch.no_grad():
        x = twelve.embed(x.flatten(2).mT)
        for layer in range(3):
            x = x + torch.tanh(twelve.blocks[0].mix(x))
            np.testing.assert_allclose(store.layer("modules", f"blocks.{layer}", "test"), x.mean(1), atol=1e-5)
    with pytest.raises(ValueError, match=r"blocks.1 runs 3 times in a forward pass and has 1 of the names"):
        extract(twelve, test, modules=["blocks.1"], store=tmp_path, **OPTIONS)


class Given(nn.Module):
    """Gives what it is made of."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Wrapped(nn.Module):
    """A network whose module `made` gives `function` of the images."""

    def __init__(self, function):
        super().__init__()
        self.made = Given(function)

    def forward(self, x):
        return self.made(x)


@pytest.mark.parametrize(
    ("function", "pool", "words"),
    [
        (lambda x: x.flatten(2), "cls", None),
        (lambda x: (x.flatten(1), 3), "mean", None),
        (lambda x: {"none": None, "state": x.flatten(1)}, "last", None),
        (lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, 48), None),
        (lambda x: x.flatten(0, 1), "mean", r"made gives \(6, 4, 4\) for 2 images; expected the images first"),
        (lambda x: x.sum(), "mean", r"made gives \(\) for 2 images"),
        (lambda x: x, "cls", r"made gives \(2, 3, 4, 4\), and that has no tokens: pool='mean' is over space"),
        (lambda x: x.permute(0, 2, 3, 1), "mean", r"looks like \(N, H, W, C\): give pool="),
        (lambda x: x, lambda x: x.mean(), r"pool gives \(\) for \(2, 3, 4, 4\) of made; expected \(2, D\)"),
        (lambda x: "text", "mean", "made gives a str without a tensor"),
        (lambda x: torch.complex(x, x), "mean", r"made gives torch.complex64, torch.strided; expected real numbers"),
        (lambda x: x.flatten(1).to_sparse(), "mean", r"made gives torch.float32, torch.sparse_coo; expected real"),
        (lambda x: x.flatten(1)[:, :0], "mean", r"made gives float32 \(2, 0\); expected .* that is not empty"),
        (lambda x: x, lambda x: x.flatten(1)[:, :0], r"pool gives \(2, 0\) for \(2, 3, 4, 4\) of made"),
        (lambda x: x, lambda x: 1j * x.flatten(1), r"pool gives \(2, 48\) .* expected \(2, D\), real"),
        (lambda x: x, lambda x: 1 / 0, r"pool fails on \(2, 3, 4, 4\) of made: ZeroDivisionError division by zero"),
        (nn.functional.dropout, "mean", "made gives something else of the same image each time, in eval mode"),
        (lambda x: x - x.mean(0), "mean", "made gives something else of the same image beside another one"),
        (
            lambda x: nn.functional.batch_norm(x, None, None, training=True),
            "mean",
            "batch norm without running",
        ),
        (lambda x: x / 0, "mean", r"made gives values that are not finite for the first image \(float32 \(3, 4, 4\)"),
    ],
)
def test_what_a_module_gives_is_pooled_or_refused_with_its_shape(function, pool, words, test, tmp_path):
    run = functools.partial(extract, Wrapped(function), test, modules="made", pool=pool, store=tmp_path, **OPTIONS)
    if words is None:
        inputs = torch.stack(list(map(pixels(4), test)))
        wanted = {"cls": inputs.flatten(2)[:, 0]}.get(pool, inputs.flatten(1))
        np.testing.assert_array_equal(run().layer("modules", "made", "test"), wanted)
        return
    with pytest.raises(ValueError, match=words):
        run()
    assert not list(tmp_path.iterdir())


def test_true_and_false_are_ones_and_zeros(test, tmp_path):
    store = extract(Wrapped(lambda x: x.flatten(1) > 0.5), test, modules="made", store=tmp_path, **OPTIONS)
    expected = torch.stack(list(map(pixels(4), test))).flatten(1) > 0.5
    np.testing.assert_array_equal(store.layer("modules", "made", "test"), expected)


def at_random(image):
    return pixels(4)(image) + torch.rand(())


def seldom_at_random():
    """Something else in the fifth call, as of a mirror that draws the same four times."""
    calls = itertools.count()
    return lambda image: pixels(4)(image) + float(next(calls) == 4)


def of_any_size(image):
    return torch.ones(3, 4, 4 + (np.asarray(image)[0, 0, 0] % 2 or is_generated(image)))


def of_two_sizes(image):
    return torch.ones(3, 4, 4 + is_generated(image))


def is_generated(image):
    return image.tobytes() == probe_picture(image.size).tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules": ["block.1"]}, r"Twelve has no module 'block.1'; .*did you mean 'blocks.1'\?"),
        ({"modules": ["blocks", "blocks.0"]}, "blocks did not run in a forward pass; a ModuleList is never called"),
        ({"modules": ["blocks.0", "unused"]}, "unused did not run in a forward pass; name one that is called"),
        ({"pool": "maen"}, r"no pooling 'maen' of modules; expected one of mean, .* did you mean 'mean'\?"),
        ({"preprocess": at_random}, "preprocess makes something else of the same picture each time"),
        ({"preprocess": seldom_at_random()}, "preprocess makes something else of the same picture each time"),
        ({"preprocess": lambda image: {}}, "preprocess gives a dict of nothing; expected"),
        ({"preprocess": lambda image: "words"}, "preprocess gives a str; expected a tensor, an array, or a dict"),
        ({"preprocess": lambda image: torch.ones(3, 4, 4, device="meta")}, r"preprocess gives a Tensor; .*meta"),
        ({"preprocess": of_any_size}, r"preprocess gives float32 \(3, 4, .\) for shades test row \d+, and float32"),
        ({"preprocess": of_two_sizes}, r"gives float32 \(3, 4, 5\) for a generated picture, and float32 \(3, 4, 4\)"),
        ({"preprocess": lambda image: image}, "preprocess gives a Image; expected a tensor"),
        ({"preprocess": lambda _: {"x": torch.ones(3, 4, 4)}}, r"gives x \(3, 4, 4\); expected a first axis of 1"),
        ({"preprocess": lambda _: {"y": torch.ones(1, 3, 4, 4)}}, r"fails on what preprocess gives, y float32 \(2"),
        ({"preprocess": lambda image: torch.full((3, 4, 4), torch.nan)}, "preprocess gives values that are not finite"),
        ({"preprocess": lambda image: torch.ones(5)}, r"fails on what preprocess gives, float32 \(2, 5\): "),
        ({"dtype": "float16"}, "dtype 'float16'; expected one of float32, bfloat16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line_before_any_work(options, words, twelve, test, tmp_path):
    twelve.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=words) as error:
        extract(twelve, test, store=tmp_path, **OPTIONS, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.parquet"))
    assert not any(module._forward_hooks for module in twelve.modules())


def test_a_network_that_does_not_take_images_as_they_are_asks_for_a_preprocess(test, tmp_path):
    network = nn.Sequential(nn.Linear(5, 2), nn.ReLU())
    words = r"Sequential fails on images as they are, float32 \(2, 3, .*; give preprocess=, from a picture to what"
    with pytest.raises(ValueError, match=words):
        extract(network, test, modules=["0", "1"], store=tmp_path, **OPTIONS)


def test_options_of_an_imagegpt_are_refused(twelve, test, tmp_path):
    for options in ({"points": ["mlp_out"]}, {"layers": [1]}, {"alignment": "sos"}, {"engine": "dask"}):
        with pytest.raises(TypeError, match=f"{next(iter(options))}= is of an ImageGPT; .* modules="):
            extract(twelve, test, store=tmp_path, **OPTIONS, **options)
    for wrong, right in {"modles": "modules", "preproces": "preprocess", "on_bad_imge": "on_bad_image"}.items():
        with pytest.raises(TypeError, match=f"no option '{wrong}'; did you mean '{right}'"):
            extract(twelve, test, store=tmp_path, **OPTIONS, **{wrong: None})
    for run in (functools.partial(lab.extract_share, share=(1, 2)), lab.extract_on_cluster):
        with pytest.raises(TypeError, match=r"a Twelve is no ImageGPT; lab\.extract takes other networks, shares"):
            run(twelve, test, store=tmp_path)


# How it runs


def test_a_network_in_training_mode_is_read_in_eval_mode_and_left_as_it_was(twelve, test, tmp_path):
    twelve.train()
    twelve.blocks[1].eval()
    modes = [module.training for module in twelve.modules()]
    store = extract(twelve, test, preprocess=pixels(4), store=tmp_path, **OPTIONS)
    assert [module.training for module in twelve.modules()] == modes
    expected = plain(twelve, store.names, torch.stack(list(map(pixels(4), test))), tokens_mean)
    np.testing.assert_allclose(store.layer("modules", 2, "test"), expected["blocks.2"], atol=1e-6)
    x = twelve.blocks[0](torch.ones(2, 8))
    x.sum().backward()  # nothing of it was made in inference mode


@pytest.mark.filterwarnings("ignore:a compiled model is read without its compiler")
@pytest.mark.parametrize("compilation", ["whole", "in place", "a block"])
def test_a_compiled_network_is_read_without_its_compiler(compilation, twelve, test, tmp_path):
    wanted = extract(twelve, test, store=tmp_path / "plain", **OPTIONS)
    if compilation == "whole":
        network = torch.compile(twelve)
    else:
        network = twelve
        network.compile() if compilation == "in place" else network.blocks[1].compile()
    store = extract(network, test, store=tmp_path / "compiled", **OPTIONS)
    assert store.names == wanted.names and store.key["weights"] == wanted.key["weights"]
    assert store.part("test", 0).read_bytes() == wanted.part("test", 0).read_bytes()


def test_weights_of_bfloat16_get_inputs_of_bfloat16(twelve, test, tmp_path):
    options = {"preprocess": pixels(4), "store": tmp_path, **OPTIONS}
    exact = extract(twelve, test, **options).layer("modules", 2, "test")
    cast = extract(twelve, test, dtype="bfloat16", **options)
    store = extract(twelve.bfloat16(), test, **options)
    assert store.key["dtype"] == cast.key["dtype"] == "bfloat16" and store.path != cast.path
    for layer in (store.layer("modules", 2, "test"), cast.layer("modules", 2, "test")):
        assert layer.dtype == np.float32
        assert 0 < np.abs(layer - exact).max() < 0.05
    for weights, asked in (("bfloat16", "float32"), ("float64", "float32"), ("float64", "bfloat16")):
        words = rf"weights are {weights}, and dtype='{asked}' is of float32 weights; network.float\(\) makes them so"
        with pytest.raises(ValueError, match=words):
            extract(twelve.to(getattr(torch, weights)), test, dtype=asked, **options)
    own = extract(twelve, test, **options)
    assert own.key["dtype"] == "float64"


def test_states_do_not_depend_on_the_user_s_autocast(twelve, test, tmp_path):
    stores = []
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            stores.append(extract(twelve, test, store=tmp_path / str(on), **OPTIONS))
    assert stores[0].part("test", 0).read_bytes() == stores[1].part("test", 0).read_bytes()


@pytest.mark.parametrize("first", [0, 128, 255])
def test_what_looks_at_the_batch_is_refused_whatever_the_first_image_is(first, tmp_path):
    """An image of one colour is its own mirror image, and half of black is black."""
    flat = np.full((1, 4, 4, 3), first, np.uint8)
    noise = np.random.default_rng(0).integers(256, size=(20, 4, 4, 3), dtype=np.uint8)
    images = lab.load_images([Image.fromarray(pixels) for pixels in np.concatenate([flat, noise])], "test")
    for preprocess, function in ((pixels(4), lambda x: x - x.mean(0)), (ids, lambda x: (x - x.max(0).values).float())):
        with pytest.raises(ValueError, match="made gives something else of the same image beside another one"):
            extract(
                Wrapped(function), images, modules="made", pool=lambda x: x.flatten(1), preprocess=preprocess,
                store=tmp_path, **OPTIONS,
            )  # fmt: skip


def test_a_dict_is_given_by_its_names(test, tmp_path):
    """As an image processor of transformers gives it; two inputs of a GPT-2, the second of which hides positions."""
    network = gpt2()
    hidden = (np.arange(16) < 10).astype(int)
    store = extract(
        network, test, preprocess=lambda image: {"input_ids": [ids(image)], "attention_mask": hidden[None]},
        pool=lambda x: x[:, :10].mean(1), store=tmp_path, **OPTIONS,
    )  # fmt: skip
    short = torch.stack([torch.as_tensor(ids(image)[:10]) for image in test]).long()
    expected = plain(network, store.names, short, tokens_mean)
    np.testing.assert_allclose(store.layer("modules", "h.1", "test"), expected["h.1"], atol=1e-5)


def test_an_image_processor_of_transformers_is_a_preprocess(test, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(size={"height": 32, "width": 32})
    network = vit()
    store = extract(network, test, preprocess=processor, store=tmp_path, **OPTIONS)
    inputs = processor(test.images(), return_tensors="pt").pixel_values
    expected = plain(network, store.names, inputs, tokens_mean)
    np.testing.assert_allclose(store.layer("modules", -1, "test"), expected["layers.2"], atol=1e-5)


def test_where_memory_runs_out_batches_are_halved(twelve, test, tmp_path, monkeypatch, capsys):
    small = extract(twelve, test, store=tmp_path / "small", batch_size=2, **OPTIONS)
    run, sizes = ModuleStates.run, []

    def runs_out(self, inputs):
        sizes.append(len(inputs[""]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA")
        run(self, inputs)

    monkeypatch.setattr(ModuleStates, "run", runs_out)
    store = extract(twelve, test, store=tmp_path / "halved", batch_size=16, **OPTIONS)
    assert sizes[:6] == [2, 2, 16, 8, 4, 2] and set(sizes[5:]) == {
        2
    }  # the first two are trials of images beside others
    assert store.part("test", 0).read_bytes() == small.part("test", 0).read_bytes()


def test_a_corrupt_image_is_named_or_left_out(twelve, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((4, 4), 10 * i + len(split), np.uint8)).save(tmp_path / f"set/{split}/a/{i}.png")
    (tmp_path / "set/train/a/2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train row 2 .*on_bad_image='skip' leaves such images out"):
        extract(twelve, str(tmp_path / "set"), store=tmp_path / "stores", **OPTIONS)
    store = extract(twelve, str(tmp_path / "set"), on_bad_image="skip", store=tmp_path / "stores", **OPTIONS)
    assert store.index("train").tolist() == [0, 1, 3] and store.skipped("train").row.tolist() == [2]


def test_the_bar_has_the_bytes_of_the_store_and_a_miss_is_explained(twelve, train, tmp_path, capsys):
    store = extract(twelve, train, store=tmp_path, device="cpu", progress=True)
    said = capsys.readouterr().err
    megabytes = float(said.partition(" MB, about")[0].rpartition(", ")[2])
    numbers = 60 * (16 + 4 * 3 * 8) / 1e6
    assert megabytes == pytest.approx(numbers, rel=0.01) and store.layer("modules", 0, "train").shape == (60, 8)
    other = extract(twelve, train, pool="last", store=tmp_path, device="cpu")
    assert f"pool is &quot;last&quot;, there &quot;mean&quot; in {store.path.name}" in other._repr_html_()
    other = extract(twelve, train, modules=["embed", "blocks.0", "blocks.1"], store=tmp_path, device="cpu")
    assert "modules is [&quot;embed&quot;, &quot;blocks.0&quot;, &quot;blocks.1&quot;], there" in other._repr_html_()


def test_a_store_of_an_imagegpt_explains_no_miss(twelve, tiny, train, tmp_path):
    extract(tiny, train, store=tmp_path, **OPTIONS)
    assert extract(twelve, train, store=tmp_path, device="cpu").beside == ""


# What is made of the store


def test_the_store_is_listed_shown_and_read_as_others(twelve, train, test, tmp_path):
    store = extract(twelve, [train, test], store=tmp_path, **OPTIONS)
    row = list_stores(tmp_path).iloc[0]
    assert (row.rows, row.layers, row.state) == ("train 60, test 40", "modules 3", "complete")
    assert "blocks.0, blocks.1, blocks.2" in store._repr_html_()
    opened = lab.FeatureStore.open(store.path)
    np.testing.assert_array_equal(opened.layer("modules", "blocks.2", "test"), opened.layer("modules", -1, "test"))
    assert list(opened.stats().layer) == [*store.names, *store.names]
    with pytest.raises(KeyError, match="no layer 'block.2'; .*did you mean 'blocks.2'"):
        opened.layer("modules", "block.2", "test")
    features = opened.features()
    assert list(features) == ["train", "test"] and list(features["train"].layers) == list(store.names)
    store.part("test", 0).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="is of a network that no name loads; run the same extraction again"):
        repair(store.path, verify(store.path))
    again = extract(twelve, [train, test], store=tmp_path, **OPTIONS)
    assert again.path == store.path and not verify(store.path)


def test_a_store_is_streamed_by_its_names(twelve, train, test, tmp_path):
    """The head of a layer is the same beside others and alone, by its name and by its number."""
    store = extract(twelve, [train, test], modules=["embed", "blocks.0", "head"], store=tmp_path, **OPTIONS)
    options = {"steps": 20, "learning_rates": [0.1], "batch_size": 8, **OPTIONS}
    alone, both = (lab.probe_streaming(store, layers=layers, **options) for layers in (["blocks.0"], ["blocks.0", 0]))
    assert alone.table.layer.tolist() == ["blocks.0"] and both.table.layer.tolist() == ["embed", "blocks.0"]
    np.testing.assert_array_equal(alone.predicted["blocks.0"], both.predicted["blocks.0"])
    with pytest.raises(ValueError, match=r"layers of several widths, \[2, 8\]; stream those of one width"):
        lab.probe_streaming(store, **options)
    with pytest.raises(KeyError, match=r"no layers \['block.0'\] at 'modules'; it has \['embed', "):
        lab.probe_streaming(store, layers=["block.0"], **options)


def test_names_that_are_not_those_of_the_layers_are_refused(twelve, test, tmp_path):
    store = extract(twelve, test, store=tmp_path, **OPTIONS)
    file = store.path / "manifest.json"
    text = file.read_text()
    for names in ('["blocks.0"]', '["a", "a", "b"]'):
        start, end = text.index('"modules": [\n   "'), text.index('"preprocess"')
        file.write_text(text[:start] + f'"modules": {names}, ' + text[end:])
        with pytest.raises(StoreError, match=r"manifest.key.modules is .*; expected a name for each layer"):
            lab.FeatureStore.open(store.path)
