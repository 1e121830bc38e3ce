"""One extraction with nothing left to choose: checked before any work, and run part by part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from igpt_lab.core.devices import best_device
from igpt_lab.core.display import brief
from igpt_lab.core.progress import tqdm
from igpt_lab.core.storage import Place, Remote, place
from igpt_lab.features.hooks import evaluating
from igpt_lab.features.manifest import FeatureKey, cut_at, explain_miss
from igpt_lab.features.runner import Features, Runner, Stats
from igpt_lab.features.settings import ExtractionSettings, extraction_key
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
    if not (hasattr(model, "name") and hasattr(model, "processor")):
        raise ValueError(
            "the model was made by hand and has no name and no palette; set model.name, and model.processor to its "
            "image processor or None, or take what lab.load_model gives"
        )
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
