"""Run a model over image sets once and keep every layer's pooled states in a feature store."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from igpt_lab.core.arguments import checked
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import brief
from igpt_lab.core.progress import tqdm
from igpt_lab.core.storage import Place, Remote, place
from igpt_lab.features.hooks import evaluating
from igpt_lab.features.manifest import FeatureKey, cut_at, explain_miss
from igpt_lab.features.runner import Features, Runner, Stats
from igpt_lab.features.settings import ExtractionSettings, check_names, extraction_key, setting_names, settings_of
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.loading import splits_of
from igpt_lab.images.tokens import Part, Tokens, cached_tokens, check_palette, parts_of
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model

Model = ImageGPTForCausalImageModeling | str | Path
Images = Any  # what `splits_of` takes
ROWS = 2000  # rows of a part
OLD_OPTIONS = ("engine", "scheduler", "deadline", "part")  # of `extract`, for one more release


@checked
def extract(
    model: Model | nn.Module,
    images: Images,
    *,
    store: str | Path = "stores",
    points: Sequence[str] = ("ln_1",),
    layers: Sequence[int] | None = None,
    pool: str | Callable = "mean",
    alignment: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    on_bad_image: str = "error",
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: bool = True,
    modules: str | Sequence[str] | None = None,
    preprocess: Callable | None = None,
    **old,
) -> FeatureStore:
    """Pooled states of every layer, for the splits of one image set, kept in a feature store.

    One forward pass a batch gives every layer; blocks above the deepest one do not run. What is in the store and whole
    is not computed again, so an interrupted extraction goes on where it stopped. Several processes may fill one store;
    `extract_share` and `extract_on_cluster` spread the work over machines.

    The layers of any other torch network are its `modules`, and go by their names, in the order in which they run. It
    is in eval mode meanwhile. The store's key has its weights, plain settings and code, the pooling, and what
    `preprocess` makes of a generated picture. `igpt_lab.features.modules` has the rule for its blocks and the poolings.

    Args:
        model: A model, or what `load_model` takes; or any torch network.
        images: One split, or several of one image set in a list or a dict; or what `load_images` takes: of a name its
            splits train and test, of a DatasetDict all.
        store: Folder of the stores, or an address such as s3://bucket/stores.
        points: Places in a block, see `record`.
        layers: Layers at each point, all by default; negative ones count from the end.
        pool: Pooling over positions, see `record`. Of modules "mean" over tokens (N, T, D) or over space (N, C, H, W),
            "first" (also "cls") or "last" token, or a function from what a module gives to (N, D).
        alignment: "sos" by default, and "raw" for a bidirectional model, which has no SOS.
        dtype: Of the matrix products, "float32" or "bfloat16"; by default bfloat16 on CUDA alone, and for any other
            network that of its weights. Weights are float32. A `torch.autocast` around the call changes nothing.
        batch_size: Images at a time, on a CPU for each core; by default what suits the device. It is halved where
            memory runs out.
        on_bad_image: "skip" leaves out images that cannot be read, and the store lists them; "error" raises ValueError.
        device: Where the model runs, by default the accelerator where there is one.
        workers: Threads that decode images ahead of the device, once for all models of one palette.
        progress: Show a bar, and an estimate of time and memory.
        modules: Names of modules of any network, each of which runs once in a forward pass; by default "blocks", the
            members of its longest list of modules of one class.
        preprocess: From a Pillow image, mode RGB, to what the network takes of one image: a tensor or array, or a dict
            of these by argument, with a first axis of 1, as an image processor of transformers gives it. By default
            floats (3, H, W) in [0, 1]. It runs in threads.
        **old: Options of an older release, which warn.

    Returns:
        The store, complete.

    Raises:
        ValueError: An unknown point, layer, pooling, alignment, dtype or module, a module that does not run once,
            weights of another dtype, or images that do not fit the model; nothing is computed then.
        StoreError: Other versions of code or packages began this store.

    Example:
        >>> images = lab.load_images("fashion-mini", "test", limit=20)
        >>> store = lab.extract("fashion-xs", images, store="stores", layers=[8])
        >>> store.layer("ln_1", 8, "test").shape  # images, width of the network
        (20, 96)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2352, 16), torch.nn.ReLU())
        >>> store = lab.extract(network, images, modules=["1", "2"])
        >>> store.names, store.layer("modules", "2", "test").shape
        (('1', '2'), (20, 16))
    """
    from igpt_lab.features import networks  # which is built upon this file

    check_names(
        old, [*setting_names(), "modules", "preprocess", "store", "device", "workers", "progress", *OLD_OPTIONS]
    )
    if networks.is_other(model) or modules is not None or preprocess is not None:
        networks.refuse({"points": tuple(points) != ("ln_1",), "layers": layers, "alignment": alignment} | old)
        asked = networks.NetworkSettings(modules, pool, preprocess, dtype, batch_size, on_bad_image)
        others = networks.prepare_network(model, images, asked, store=store, device=device)
        return others.run(lambda writer, todo: others.here(writer, todo, workers, progress))
    settings = ExtractionSettings(points, layers, typing.cast(str, pool), alignment, dtype, batch_size, on_bad_image)
    model = typing.cast(Model, model)
    if old:
        return _as_before(model, images, old, settings, store, device, workers, progress)
    extraction = prepare(model, images, settings, store=store, device=device)
    return extraction.run(lambda writer, todo: extraction.here(writer, todo, workers, progress))


@checked
def extract_share(
    model: Model | nn.Module,
    images: Images,
    *,
    share: tuple[int, int],
    store: str | Path = "stores",
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: bool = True,
    **settings,
) -> FeatureStore:
    """The parts of an extraction that are one job's of a job array; jobs may run at once and in any order.

    Args:
        model: A model, or what `load_model` takes.
        images: One split, or several of one image set.
        share: (i, n), 1 <= i <= n: every n-th part from the i-th on.
        store: Folder of the stores, on a disk with locks that all jobs share.
        device: Where the model runs, by default the accelerator where there is one.
        workers: Threads that decode images ahead of the device.
        progress: Show a bar and an estimate of time and memory.
        **settings: Fields of `ExtractionSettings`, as `extract` takes them.

    Returns:
        The store; it is complete when every share is there.

    Raises:
        ValueError: As `extract`, and for a share out of range or a store on an object store, which has no locks.
        TypeError: A network that is no ImageGPT.

    Example:
        >>> for job in (1, 2):  # two jobs, of one part each
        ...     shared = lab.extract_share(model, [train_images, test_images], share=(job, 2), store="shared")
        >>> shared.layer("ln_1", 3, "test").shape
        (100, 8)
    """
    extraction = prepare(imagegpt(model), images, settings_of(settings), store=store, device=device, share=share)
    return extraction.run(lambda writer, todo: extraction.here(writer, todo, workers, progress))


def imagegpt(model: Any) -> Model:
    """The model; TypeError for a network that is no ImageGPT."""
    from igpt_lab.features import networks

    if networks.is_other(model):
        kind = type(model).__name__
        raise TypeError(f"a {kind} is no ImageGPT; lab.extract takes other networks, shares and a cluster do not")
    return model


def prepare(
    model: Model,
    images: Images,
    settings: ExtractionSettings,
    *,
    store: str | Path,
    device: str | torch.device | None = None,
    share: tuple[int, int] | None = None,
    here: bool = True,
) -> Extraction:
    """An extraction, checked; ValueError for what cannot be, before any work is done. `here`: on this machine."""
    model = load_model(model) if isinstance(model, str | Path) else model
    device = best_device(device, here=here)
    settings = settings.settled(model.config, device)
    splits, root = by_split(images), root_of(store)
    if share is not None:
        _check_share(share, root)
    for split_images in splits.values():
        check_palette(split_images, model.processor)
    key = extraction_key(model, list(splits.values()), settings)
    return Extraction(model, splits, settings, root, device, key, share, cut_at(root / key.folder(), key, ROWS))


def by_split(images: Images) -> dict[str, ImageSet | TokenSet]:
    """The splits of what is given for images, by their names; ValueError for two of one name, or of other classes."""
    images = splits_of(images)
    splits = {split_images.split: split_images for split_images in images}
    if len(splits) < len(images):
        names = ", ".join(f"{split_images.name} {split_images.split}" for split_images in images)
        raise ValueError(f"two image sets have the same split: {names}; load each with a split of its own")
    _check_classes(splits.values())
    return splits


def root_of(store: str | Path | Remote) -> Place:
    """The folder of stores; ValueError where the path is empty, or a file or below one."""
    if store == "":
        raise ValueError("store is empty; expected a folder, which may be new")
    root = place(store)
    for above in (root, *root.parents) if isinstance(root, Path) else ():
        if above.exists() and not above.is_dir():
            raise ValueError(f"store={str(store)!r}: {above} is a file; expected a folder, which may be new")
    return root


def _check_classes(splits: Iterable[ImageSet | TokenSet]) -> None:
    """ValueError where a number means one class here and another there."""
    named = {images.split: images.label_names for images in splits if images.labels is not None and images.label_names}
    if len(set(named.values())) > 1:
        classes = "; ".join(f"{split}: {', '.join(names[:5])}" for split, names in named.items())
        raise ValueError(
            f"the splits number their classes in different ways ({classes}); load them from one source, "
            "or give both the same label_names="
        )


def _check_share(share: tuple[int, int], root: Place) -> None:
    """ValueError for a share out of range, or of a store without locks."""
    if not 1 <= share[0] <= share[1]:
        raise ValueError(f"share={share}; expected (i, n) with 1 <= i <= n")
    if isinstance(root, Remote):
        raise ValueError(
            f"share={share} needs locks, and {root} is on an object store; extract_on_cluster (--engine dask) fills it"
        )


class Read(NamedTuple):
    """Of a part the positions of the images that could be read, int64 (n,), and (row, reason) of those left out."""

    positions: np.ndarray
    skipped: list[tuple[int, str]]


Computed = Generator[tuple[Part, Read, Features, Stats], None, None]


@dataclass(frozen=True)
class Extraction:
    """One extraction with nothing left to choose, and the ways to run it. `share` (i, n) is of its parts, None all."""

    model: Any  # ImageGPTForCausalImageModeling
    splits: dict[str, ImageSet | TokenSet]
    settings: Any  # ExtractionSettings
    root: Place
    device: torch.device
    key: FeatureKey
    share: tuple[int, int] | None = None
    rows: int = ROWS  # of a part

    @property
    def parts(self) -> list[Part]:
        """Every part of the store, split after split."""
        return [part for images in self.splits.values() for part in parts_of(images, self.rows)]

    @property
    def counts(self) -> dict[str, int]:
        """Number of parts of each split."""
        return {split: len(parts_of(images, self.rows)) for split, images in self.splits.items()}

    @property
    def source(self) -> dict:
        """What a repair needs to run this again, as the manifest keeps it; None for what no name loads."""
        return {
            "model": getattr(self.model, "source", None),
            "images": {split: images.source for split, images in self.splits.items()},
            "options": self.settings.options(),
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers, () without labels."""
        return next((images.label_names for images in self.splits.values() if images.labels is not None), ())

    def run(
        self,
        compute: Callable[[StoreWriter, list[Part]], None],
        doubted: Mapping[tuple[str, int], object] = MappingProxyType({}),
    ) -> FeatureStore:
        """The store, after `compute` has written what is missing of this share; complete where no other share lacks.

        Parts in `doubted` are written anew, but those that are no longer in this `state` when it is their turn.
        """
        beside = explain_miss(self.root, self.key)
        created = StoreWriter.create(self.root, self.key, self.counts, source=self.source, classes=self.classes)
        with closing(created) as writer:
            writer.doubted = dict(doubted)
            if writer.counts != self.counts:  # it is whole, and cut in a way of its own
                return writer.reader()
            parts = self.parts
            chosen = parts if self.share is None else parts[self.share[0] - 1 :: self.share[1]]
            todo = [part for part in chosen if not writer.whole(part.split, part.number)]
            if todo:
                writer.check_cut({(part.split, part.number): len(part) for part in set(chosen) - set(todo)})
                writer.refuse_other_versions()
                compute(writer, todo)
            if self.share and not all(writer.has(part.split, part.number, verify=False) for part in parts):
                return writer.reader()
        store = FeatureStore.open(writer.path, verify=False)  # each part was verified before, or written just now
        store.beside = beside
        _warn_of_bad_states(store)
        return store

    def here(self, writer: StoreWriter, todo: list[Part], workers: int | None, progress: bool) -> None:
        """Compute `todo` in this process: `workers` threads decode ahead of the device, one writes behind it."""
        rows = sum(len(part) for part in todo)
        pending: Future | None = None
        with (
            closing(writer),
            evaluating(self.model.to(self.device)),
            tqdm(total=rows, desc=f"features, {brief(self.key.model)}", unit="image", disable=not progress) as bar,
            ThreadPoolExecutor(1) as behind,
            closing(claimed(writer, todo)) as parts,
            closing(self.computed(parts, workers, bar)) as computed,
        ):
            for part, read, features, stats in computed:
                if pending is not None:
                    pending.result()
                pending = behind.submit(write, writer, part, read, features, stats)
            if pending is not None:
                pending.result()

    def computed(self, parts: Iterable[Part | None], workers: int | None, bar: tqdm) -> Computed:
        """Each of `parts`, where None stands for none as yet, with what was read of it, its features and statistics."""
        runner = Runner(self.model, self.settings)
        with closing(tokens_ahead(parts, self.model, self.settings, root=self.root, workers=workers)) as made:
            self.tell(bar, lambda: runner.estimate(bar.total, self.rows))
            for part, tokens in made:
                features, stats = runner.over(tokens.tokens, bar)
                bar.update(len(tokens.skipped))
                yield part, Read(tokens.positions, tokens.skipped), features, stats

    def tell(self, bar: tqdm, estimate: Callable[[], str]) -> None:
        """Beside the bar, if it is shown: what this store will take."""
        if not bar.disable:
            bar.set_postfix_str(estimate())


def tokens_ahead(
    parts: Iterable[Part | None], model: ImageGPTForCausalImageModeling, settings: ExtractionSettings, *, root: Place,
    workers: int | None,
) -> Generator[tuple[Part, Tokens], None, None]:  # fmt: skip
    """Each of `parts`, where None stands for none as yet, with its tokens, see `cached_tokens`."""
    fits = (model.config.n_positions, model.config.n_colours)
    skip = settings.on_bad_image == "skip"
    return cached_tokens(parts, model.processor, root=root, fits=fits, skip_bad=skip, workers=workers)


def claimed(writer: StoreWriter, todo: list[Part]) -> Generator[Part | None, None, None]:
    """Those parts of `todo` that are this process's to compute, see `StoreWriter.claims`."""
    by_name = {(part.split, part.number): part for part in todo}
    with closing(writer.claims(by_name)) as claims:
        for claim in claims:
            yield None if claim is None else by_name[claim]


def write(
    writer: StoreWriter, part: Part, read: Read, features: Features, stats: Stats, *, listed: bool = True
) -> dict:
    """Write a part with the labels of the images that could be read; returns what the manifest lists of it."""
    chosen = part.images.select(read.positions)
    return writer.write_part(
        part.split, part.number, chosen.index, chosen.labels, features, stats, read.skipped, listed=listed
    )


def _warn_of_bad_states(store: FeatureStore) -> None:
    """Name the layers whose states are not finite, or so large that float16 could not hold them."""
    stats = store.stats()
    bad, large = stats[stats.non_finite > 0], stats[(stats.non_finite == 0) & (stats.max_abs > 65_504)]
    for rows, what in ((bad, "are not finite"), (large, "overflow in float16 (above 65,504)")):
        for point, of_point in rows.groupby("point", sort=False):
            layers = ", ".join(map(str, sorted(of_point.layer.unique())))
            warnings.warn(f"{store.path.name}, {point}: layers {layers} have states that {what}", stacklevel=5)


def _as_before(
    model: Model, images: Images, old: dict, settings: ExtractionSettings, store: str | Path,
    device: str | torch.device | None, workers: int | None, progress: bool,
) -> FeatureStore:  # fmt: skip
    """`extract` with the options that have calls of their own by now, for one more release."""
    from igpt_lab.features.on_cluster import extract_on_cluster  # which is built upon this file

    engine, scheduler = old.get("engine", "local"), old.get("scheduler")
    share = old.get("part")
    if engine not in ("local", "dask") or (engine == "local" and scheduler):
        raise ValueError(f"engine={engine!r}, scheduler={scheduler!r}; expected 'local', or 'dask' with its scheduler")
    advice = "leave that out" if share is None else "use lab.extract_share(share=...)"
    if engine == "dask":
        advice = "use lab.extract_on_cluster"
    names = ", ".join(f"{name}=" for name in old)
    warnings.warn(f"extract({names}) is removed in the next release; {advice}", DeprecationWarning, stacklevel=4)
    common = {"store": store, "device": device, "workers": workers, "progress": progress, **settings.options()}
    if engine == "dask":
        deadline = old.get("deadline")
        return extract_on_cluster(model, images, scheduler=scheduler, deadline=deadline, share=share, **common)
    if share is None:
        return extract(model, images, **common)
    return extract_share(model, images, share=share, **common)
