"""An extraction on the workers of a Dask cluster: each loads model and images by name, and writes whole parts."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from igpt_lab.core import cluster
from igpt_lab.core.arguments import checked
from igpt_lab.core.display import brief
from igpt_lab.core.progress import tqdm
from igpt_lab.core.storage import Place
from igpt_lab.features.manifest import FeatureKey
from igpt_lab.features.networks import imagegpt
from igpt_lab.features.prepared import Extraction, Images, Model, Read, claimed, prepare, tokens_ahead, write
from igpt_lab.features.runner import Runner
from igpt_lab.features.settings import ExtractionSettings, digest_of_weights, settings_of
from igpt_lab.features.store import FeatureStore
from igpt_lab.features.writing import StoreWriter
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.loading import load_again
from igpt_lab.images.tokens import Part
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model


@checked
def extract_on_cluster(
    model: Model | nn.Module,
    images: Images,
    *,
    store: str | Path = "stores",
    scheduler: str | None = None,
    workers: int | None = None,
    deadline: float | None = None,
    share: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings,
) -> FeatureStore:
    """Pooled states of every layer as `extract` gives them, computed by the workers of a Dask cluster.

    Model and images are loaded by name on every worker, and checked to be the same. The bytes are those of `extract` on
    the same kind of device. Workers may die, hang or run out of room: their parts go to others.

    Args:
        model: A model that `load_model` gave, or what it takes.
        images: One split, or several of one image set, as `load_images` gives them.
        store: Folder of the stores that all workers share, or an address such as s3://bucket/stores.
        scheduler: Address of the cluster, such as tcp://host:8786; None starts processes on this machine.
        workers: Number of those processes, by default one for each CUDA device, else one.
        deadline: Seconds that a part may take; by default 20 times the usual, and 10 minutes at least.
        share: (i, n) computes every n-th part from the i-th on alone.
        device: Kind of device on the workers, by default this machine's.
        progress: Show a bar.
        **settings: Fields of `ExtractionSettings`, as `extract` takes them.

    Returns:
        The store, complete but where `share` leaves out parts.

    Raises:
        ValueError: As `extract`, and for a model or images that no name loads.
        ClusterError: Parts that failed for a reason of their own, after all others are finished.
        OSError: No worker is left.
        ImportError: The package `distributed` is not installed.

    Example:
        >>> from distributed import LocalCluster
        >>> with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        ...     address = cluster.scheduler_address
        ...     stored = lab.extract_on_cluster("tiny", test_images, store="on_cluster", scheduler=address)
        >>> stored.layer("ln_1", 3, "test").shape
        (100, 8)
    """
    here = scheduler is None
    asked = settings_of(settings)
    extraction = prepare(imagegpt(model), images, asked, store=store, device=device, share=share, here=here)
    count = workers or max(1, torch.cuda.device_count() * (extraction.device.type == "cuda"))
    run = partial(_run, extraction, scheduler=scheduler, workers=count, deadline=deadline, progress=progress)
    return extraction.run(run)


def _run(
    extraction: Extraction, writer: StoreWriter, todo: list[Part], *, scheduler: str | None, workers: int,
    deadline: float | None, progress: bool,
) -> None:  # fmt: skip
    """Compute `todo` on the workers, and list each part when it is there."""
    threads = 0 if scheduler else max(1, torch.get_num_threads() // workers)
    work = Work.of(extraction, threads)
    slots = 1 + (extraction.device.type == "cuda")
    parts = {f"{part.split} part {part.number}": part for part in todo}
    rows = sum(len(part) for part in todo)
    with (
        closing(writer),
        tqdm(total=rows, desc=f"features, {brief(extraction.key.model)}", unit="image", disable=not progress) as bar,
        closing(_tasks(writer, todo)) as tasks,
        closing(
            cluster.run(work, tasks, scheduler=scheduler, slots=slots, deadline=deadline, workers=workers)
        ) as results,
    ):  # fmt: skip
        for name, entry in results:
            part = parts[name]
            writer.list_part(part.split, part.number, entry)
            bar.update(len(part))


def _tasks(writer: StoreWriter, todo: list[Part]) -> Generator[tuple[str, tuple] | None, None, None]:
    """(name, arguments of `Opened`) of each part that could be claimed, None where there is none as yet."""
    with closing(claimed(writer, todo)) as parts:
        for part in parts:
            if part is None:
                yield None
            else:
                about = part.split, part.number, part.count, part.span, part.selected.fingerprint
                yield f"{part.split} part {part.number}", about


@dataclass(frozen=True)
class Work:
    """All that a worker of a cluster needs to compute any part of a store; `open` loads it."""

    source: dict[str, Any]
    key: FeatureKey
    settings: ExtractionSettings
    root: Place
    counts: dict[str, int]  # of the parts of each split
    device: str
    threads: int  # of each worker on this machine; 0 leaves them as they are

    @classmethod
    def of(cls, extraction: Extraction, threads: int) -> Work:
        """ValueError where no name loads the model or the images."""
        source = extraction.source
        if held := [split for split, about in source["images"].items() if about is None]:
            raise ValueError(
                f"workers load images by their name, and {extraction.key.images} {held[0]} has none: write its splits "
                f"with images.save('FOLDER/{held[0]}.parquet') and give lab.load_images('FOLDER', {held[0]!r})"
            )
        if not source["model"]:
            raise ValueError("workers load the model by its name, and it has none: give what lab.load_model gives")
        root, kind = extraction.root.absolute(), extraction.device.type
        return cls(source, extraction.key, extraction.settings, root, extraction.counts, kind, threads)

    def open(self) -> Opened:
        """ValueError where this worker's model is another one."""
        if self.threads:
            torch.set_num_threads(self.threads)
        source = dict(self.source["model"])
        model = load_model(source.pop("name"), **source)
        weights = digest_of_weights(model)
        if weights != self.key.weights:
            raise ValueError(
                f"{model.name} has other weights on this worker: {weights[:8]}, not {self.key.weights[:8]}"
            )
        splits = {split: load_again(source, split) for split, source in self.source["images"].items()}
        model.to(cluster.device_of_worker(self.device)).eval()
        writer = StoreWriter.create(self.root, self.key, self.counts, source=self.source)
        writer.close()  # who gives out the parts shows that all are at this store
        return Opened(self, model, splits, writer)


@dataclass(frozen=True)
class Opened:
    """A worker's model, images and writer; called with a part, it computes and writes that."""

    work: Work
    model: ImageGPTForCausalImageModeling
    splits: dict[str, ImageSet | TokenSet]
    writer: StoreWriter
    device_free: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, split: str, number: int, count: int, span: range, fingerprint: str) -> dict:
        """What the manifest is to list of a part; ValueError where its images are not those of the fingerprint."""
        images, settings = self.splits[split], self.work.settings
        part = Part(split, number, count, range(span.start, min(span.stop, len(images))), images)
        selected = part.selected
        if selected.fingerprint != fingerprint:
            raise ValueError(f"{images.name} {split}, rows {selected.index[:1]} and on, is not the same on this worker")
        [(_, tokens)] = tokens_ahead([part], self.model, settings, root=self.work.root, workers=1)
        with self.device_free:  # what is decoded and written beside it does not keep the device waiting
            features, stats = Runner(self.model, settings).over(tokens.tokens)
        return write(self.writer, part, Read(tokens.positions, tokens.skipped), features, stats, listed=False)
