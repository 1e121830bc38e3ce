"""Every instrument of `explaining`: seconds, images a second, and peak memory above the model and its images.

Each runs once, in a process of its own, after one image has gone through the model: on the bundled models with their
own images (random ones for cifar10-xs where ../shared/cifar10 is not there), and at size S (24 x 512, T = 1024) with
random weights and images. Peak memory is the largest of the process during the call, less what it had just before.
"50 + 50 images" are of training and test. Where a case names blocks, layers or steps, there are more by default.

The peer of the logit lens and of `attention_maps` is transformers' model with `output_hidden_states` or
`output_attentions`, and the same numbers made of them (`explaining_peers`), at the batch size that is fastest for it.
It has no fused attention. The last rows are the explorer's answers about an image: a layer's lens and attention.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import igpt_lab as lab
from benchmarks import explaining_peers as peers
from benchmarks.extract import QUICK, S, peer_name
from benchmarks.harness import peak_memory, race, row
from igpt_lab.app.explorer.network import Network
from igpt_lab.app.explorer.pictures import open_source
from igpt_lab.core.hub import resolve
from igpt_lab.explaining.tuned_lens import digest_of_model
from igpt_lab.images.image_sets import TokenSet
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import align

CIFAR = Path(__file__).resolve().parents[2] / "shared/cifar10"
SOURCES = {"fashion-xs": "fashion-mini", "cifar10-xs": CIFAR}
CLEAR = Path("/proc/self/clear_refs")  # on Linux, 5 written here makes the present memory the largest so far
RELATIVE = "of max(1, |value|)"  # distances are of many pixels
AGREE = {
    "nats": 1e-5,
    RELATIVE: 5e-5,
}  # at T = 144 the peer, which sums in float32, is 1.1e-5 from float64, ours 1.4e-7
FEW, MANY, BOTH = "1 image", "{n} images", "{n} + {n} images"
EDITED, REFITTED = "{n} images, blocks: {few}", "{n} + {n} images, blocks: {few}"
LAYERS, STEPS = "{n} + {n} images, layers: {few}", "{n} + 0 images, {steps} steps"


@dataclass(frozen=True)
class Setting:
    """What is measured on; `blocks` are those that are left out or fitted to where that takes long, all when None."""

    name: str
    model: str  # a bundled one or a folder
    count: int
    stores: str  # a folder
    blocks: tuple[int, ...] | None = None
    steps: int = 50  # of a tuned lens
    runs: int = 3  # against a peer


@dataclass(frozen=True)
class Case:
    """A setting in the process that measures it."""

    model: lab.ImageGPTForCausalImageModeling
    train: TokenSet
    test: TokenSet
    lens: lab.TunedLens  # as it is before its first step
    setting: Setting

    @classmethod
    def opened(cls, setting: Setting) -> "Case":
        model = lab.load_model(setting.model)
        train, test = (images_of(model, setting, split) for split in ("train", "test"))
        with torch.inference_mode():
            model(align(torch.as_tensor(test.tokens[:1].astype(np.int64)), "sos", model.config), use_cache=False)
        blocks, width = model.config.n_layer, model.config.n_embd
        zeros = torch.zeros(blocks, width, width), torch.zeros(blocks, width)
        return cls(model, train, test, lab.TunedLens(*zeros, digest_of_model(model)), setting)

    def read(self, function: Callable, *rest, **options) -> None:
        """Call an instrument of test images."""
        function(self.model, self.test.tokens, *rest, progress=False, **options)

    def leave_out(self, part: str, kind: str = "skip") -> None:
        train = self.train.tokens if kind == "mean" else None
        self.read(lab.leave_out, parts=[part], kind=kind, layers=self.setting.blocks, train_tokens=train)

    def windows(self) -> None:
        blocks = self.model.config.n_layer
        self.read(lab.windows, [3], [(0, blocks // 2 - 1), (blocks // 2, blocks - 1)])

    def fit(self, function: Callable, **options) -> None:
        """Call an instrument of training and test images with their labels."""
        splits = [(images.tokens, images.labels) for images in (self.train, self.test)]
        function(self.model, *splits[0], *splits[1], progress=False, **options)

    def bits(self) -> None:
        labels = {"train_labels": self.train.labels, "test_labels": self.test.labels}
        options = labels | {"layers": self.setting.blocks, "progress": False}
        lab.bits_by_layer(self.model, self.train.tokens, self.test.tokens, **options)

    def probe(self, function: Callable) -> None:
        function(self.model, self.train, self.test, store=self.setting.stores, progress=False)


# An instrument -> what it is called with, in words, and its call.
INSTRUMENTS: dict[str, tuple[str, Callable[[Case], object]]] = {
    "logit_lens": (MANY, lambda case: case.read(lab.logit_lens)),
    "lens_strip": (FEW, lambda case: lab.lens_strip(case.model, case.test.tokens[0])),
    "pixel_baselines": (
        BOTH, lambda case: lab.pixel_baselines(case.train.tokens, case.test.tokens, case.model.config.n_colours),
    ),
    "fit_tuned_lens": (
        STEPS,
        lambda case: lab.fit_tuned_lens(case.model, case.train.tokens, steps=case.setting.steps, progress=False),
    ),
    "tuned_lens": (MANY, lambda case: case.read(lab.tuned_lens, case.lens)),
    "bits_by_layer": (LAYERS, Case.bits),
    "attribute": (MANY, lambda case: case.read(lab.attribute)),
    "attribute, heads": (MANY, lambda case: case.read(lab.attribute, heads=True)),
    "attribute_logits": (MANY, lambda case: lab.attribute_logits(case.model, case.test.tokens, 1)),
    "leave_out, block": (EDITED, lambda case: case.leave_out("block")),
    "leave_out, attention": (EDITED, lambda case: case.leave_out("attention")),
    "leave_out, mlp": (EDITED, lambda case: case.leave_out("mlp")),
    "leave_out, head": (EDITED, lambda case: case.leave_out("head")),
    "leave_out, block, mean": (EDITED, lambda case: case.leave_out("block", "mean")),
    "leave_out, block, resample": (EDITED, lambda case: case.leave_out("block", "resample")),
    "windows": (MANY, Case.windows),
    "refit_after": (REFITTED, lambda case: case.fit(lab.refit_after, layers=case.setting.blocks)),
    "attention_maps": (MANY, lambda case: case.read(lab.attention_maps)),
    "attention_maps, values": (MANY, lambda case: case.read(lab.attention_maps, weighting="values")),
    "attention_from": (
        FEW, lambda case: lab.attention_from(case.model, case.test.tokens[0], case.model.config.n_positions // 2),
    ),
    "probe_positions": (BOTH, lambda case: case.probe(lab.probe_positions)),
    "probe_prefixes": (BOTH, lambda case: case.probe(lab.probe_prefixes)),
    "probe_attentive": (BOTH, lambda case: case.fit(lab.probe_attentive)),
}  # fmt: skip


def rows(quick: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        random, stores = write_random(QUICK if quick else S, Path(folder) / "random"), str(Path(folder) / "stores")
        if quick:
            settings = [Setting("4 x 16", random, 10, stores, (2, 3), steps=2, runs=1)]
        else:
            settings = [
                Setting("fashion-xs", "fashion-xs", 100, stores),
                Setting("cifar10-xs", "cifar10-xs", 50, stores),
                Setting("24 x 512 (S)", random, 10, stores, (12, 23), steps=2, runs=1),
            ]
        for setting in settings:
            for name in INSTRUMENTS:
                yield from instrument(name, setting)
        for setting in settings:
            yield from against_lens(setting)
            yield from against_attention(setting)
        for name, source in SOURCES.items():
            if name == "fashion-xs" or (CIFAR.is_dir() and not quick):
                yield from explorer(name, source, stores, 3 if quick else 20)


def instrument(name: str, setting: Setting) -> Iterator[dict]:
    """Seconds, images a second and memory of one."""
    result = race({name: partial(measured, name, setting)}, 1, warm=0)[name]
    few = "all" if setting.blocks is None else " and ".join(map(str, setting.blocks))
    words = INSTRUMENTS[name][0].format(n=setting.count, steps=setting.steps, few=few)
    case, count = f"{name}, {setting.name}, {words}", int(words.partition(" ")[0])
    yield row(case, "time", "s", result.seconds, runs=1)
    yield row(case, "speed", "images/s", count / result.seconds, runs=1)
    yield row(case, "peak memory above the model", "MB", result.value, runs=1)


def measured(name: str, setting: Setting) -> Callable:
    """Maker of a call that returns the largest memory during it, less that before, in MB."""
    case, (_, call) = Case.opened(setting), INSTRUMENTS[name]

    def above() -> float:
        if CLEAR.exists():
            CLEAR.write_text("5")
        before = peak_memory()
        call(case)
        return peak_memory() - before

    return above


def against_lens(setting: Setting) -> Iterator[dict]:
    """The lens with all its columns, two passes of ours, and without what needs the last layer, in one."""
    port = port_of(setting)
    for what, whole in (("all columns", True), ("nats alone", False)):
        make = partial(peers.lens_of_port, port, whole)
        yield from compared(f"logit_lens, {what}", setting, partial(lens_of_ours, setting, whole), make, "nats")


def against_attention(setting: Setting) -> Iterator[dict]:
    """All measures and offsets."""
    make = partial(peers.attention_of_port, port_of(setting))
    yield from compared("attention_maps", setting, partial(attention_of_ours, setting), make, RELATIVE)


def compared(name: str, setting: Setting, ours: Callable, port: Callable, unit: str) -> Iterator[dict]:
    """Speed, memory, and the largest difference of the arrays that both return; SystemExit where AGREE is less."""
    best = race({"port": partial(peers.fastest, port, setting.count)}, 1, warm=0)["port"].value
    own, theirs = race({"ours": ours, "port": partial(port, best)}, setting.runs, warm=0).values()
    case, peer = f"{name}, {setting.name}, {setting.count} images", f"{peer_name()}, batch {best}"
    speeds = [setting.count / result.seconds for result in (own, theirs)]
    yield row(case, "speed", "images/s", *speeds, peer, runs=setting.runs)
    yield row(case, "peak memory", "MB", own.peak, theirs.peak, peer, runs=setting.runs, less=True)
    size = np.maximum(1, np.abs(theirs.value)) if unit == RELATIVE else 1
    largest = float((np.abs(own.value - theirs.value) / size).max())
    yield row(case, f"largest difference to {peer_name()}", unit, largest, runs=1)
    if not largest <= AGREE[unit]:
        raise SystemExit(f"{case}: they differ by {largest:.2g}, more than {AGREE[unit]:g}")


def lens_of_ours(setting: Setting, whole: bool) -> Callable:
    """Maker: the lens' columns (layers, columns), as `lens_of_port` has them."""
    case, columns = Case.opened(setting), peers.LENS_COLUMNS if whole else peers.LENS_COLUMNS[:1]

    def call() -> np.ndarray:
        return lab.logit_lens(case.model, case.test.tokens, final=whole, progress=False)[list(columns)].to_numpy()

    return call


def attention_of_ours(setting: Setting) -> Callable:
    """Maker: measures and shares of offsets, one behind the other, as `attention_of_port` has them."""
    case = Case.opened(setting)

    def call() -> np.ndarray:
        maps = lab.attention_maps(case.model, case.test.tokens, progress=False)
        measures, shares = maps.table[list(peers.ATTENTION_COLUMNS)].to_numpy(), maps.offsets.share.to_numpy()
        return np.concatenate([measures.ravel(), shares])

    return call


def explorer(name: str, source: str | Path, stores: str, asked: int) -> Iterator[dict]:
    """Milliseconds of an answer: the first, which loads the model, and the medians of later ones."""
    taken = race({"ours": partial(answers, name, source, stores, asked)}, 1, warm=0)["ours"].value
    for what, times in taken.items():
        case = f"explorer, {name}, {'first' if what == 'first' else f'another {what}'}"
        yield row(case, "answer", "ms", 1000 * statistics.median(times), runs=len(times))
        if len(times) > 1:
            yield row(case, "slowest answer", "ms", 1000 * max(times), runs=len(times))


def answers(name: str, source: str | Path, stores: str, asked: int) -> Callable:
    """Maker: seconds of the answers to a browser that asks for images, layers and pixels."""
    images = lab.load_images(source, "test", limit=50)
    store = lab.extract(name, images, layers=[0], store=stores, progress=False)

    def call() -> dict[str, list[float]]:
        network, pictures = Network(store), open_source(store, "test")
        taken: dict[str, list[float]] = {}
        place = {"image": 0, "layer": 0, "pixel": 10}
        for what in ["first", *["image", "layer", "pixel"] * asked]:
            if what != "first":
                place[what] = (place[what] + 7) % {"image": len(images), "layer": 20, "pixel": 100}[what]
            begun = time.perf_counter()
            facts, _ = network.answer(place, "test", pictures, images.index)
            taken.setdefault(what, []).append(time.perf_counter() - begun)
            if problem := facts["look"].get("problem"):
                raise RuntimeError(problem)
        return taken

    return call


def write_random(config: lab.ImageGPTConfig, folder: Path) -> str:
    """Random weights at the port's scales, as at the original's the head is zero, and a random palette."""
    generator = torch.Generator().manual_seed(0)
    lab.ImageGPTForCausalImageModeling(config, init="transformers", generator=generator).save_pretrained(folder)
    palette = np.random.default_rng(0).uniform(-1, 1, (config.n_colours, 3))
    lab.ImageGPTImageProcessorPil(palette, round(config.n_positions**0.5)).save_pretrained(folder)
    return str(folder)


def images_of(model: lab.ImageGPTForCausalImageModeling, setting: Setting, split: str) -> TokenSet:
    """Tokens of the setting's images, or random ones of two classes."""
    source, rows = SOURCES.get(setting.name), np.arange(setting.count)
    if source is None or (source is CIFAR and not CIFAR.is_dir()):
        shape = setting.count, model.config.n_positions
        drawn = np.random.default_rng(split == "test").integers(model.config.n_colours, size=shape)
        return TokenSet("random", split, rows, rows % 2, ("even", "odd"), drawn)
    images = lab.load_images(source, split, limit=setting.count)
    return TokenSet(setting.name, split, rows, images.labels, images.label_names, tokens_of(model, images))


def port_of(setting: Setting) -> peers.Port:
    model = lab.load_model(setting.model)
    images = images_of(model, setting, "test")
    return peers.Port(str(resolve(setting.model)), images.tokens.astype(np.int64), model.processor.clusters)
