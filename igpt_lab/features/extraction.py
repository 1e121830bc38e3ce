"""Run a model over image sets once and keep every layer's pooled states in a feature store."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from igpt_lab.core.arguments import checked
from igpt_lab.features import networks
from igpt_lab.features.prepared import Images, Model, prepare
from igpt_lab.features.settings import ExtractionSettings, check_names, setting_names, settings_of
from igpt_lab.features.store import FeatureStore

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
        dtype: Of the matrix products, "float32" or "bfloat16"; by default bfloat16 on CUDA and on CPUs with AMX,
            elsewhere float32, and for any other network that of its weights. Weights are float32. A `torch.autocast`
            around the call changes nothing.
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
    extraction = prepare(
        networks.imagegpt(model), images, settings_of(settings), store=store, device=device, share=share
    )
    return extraction.run(lambda writer, todo: extraction.here(writer, todo, workers, progress))


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
