"""`explore`: a store, or what one is made of, opened in the explorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from igpt_lab.app.explorer.held import store_of
from igpt_lab.app.explorer.network import Network
from igpt_lab.app.explorer.opened import replace_earlier
from igpt_lab.app.explorer.widget import Explorer
from igpt_lab.core.arguments import checked
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.loading import splits_of
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.probing.results import ProbeResult


@checked
def explore(
    store: FeatureStore | str | Path | Mapping,
    *,
    out: str | Path | None = None,
    limit: int | None = 4000,
    progress: bool = True,
    remote: bool = False,
    model: ImageGPTForCausalImageModeling | str | Path | None = None,
    images=None,
    result: ProbeResult | None = None,
) -> Explorer:
    """The explorer of a feature store: end a notebook's cell with it.

    It opens with the pictures, and probes are fitted then, when the kernel has time. What they say is kept in a file
    beside the store, so that another time nothing is fitted. Its buttons write the view under the folder `out`: as
    figures, and as one HTML file that works without a kernel and a network.
    A store may be a stranger's: images at an address that it names, such as s3://bucket/set, are asked for with
    `remote` alone. Explorers of one store share what they compute; `close()` lets go of it, and running a notebook's
    cell again closes the one that it opened before.

    Args:
        store: A store with a split `train` and labels, or its folder; or features of splits, {"train": train, "test":
            test}.
        out: Folder of what is saved; by default `explorer` in the folder of the run that the store lies in, else here.
        limit: Images of a split that are shown, at most, a seeded draw; every number is of these. None: all.
        progress: Show a bar while probes are fitted for Python, as by `fit()`; the browser has a line of its own.
        remote: Read images from an address that the store names.
        model: The one that the features are of, for what it expects of an image and where its heads look; by default it
            is loaded when that is first asked, from the package or from the folder that the store names.
        images: Those of the store, as `extract` took them, where they were in memory.
        result: What `probe_layers` returned for the features of train and test at the point that opens, so that nothing
            is fitted for them.

    Returns:
        `Explorer`, a widget.

    Raises:
        ValueError: A limit below 1, a store without labels or without training images, another model, or a result of
            other layers, images or features.

    Example:
        >>> explorer = lab.explore(store, limit=50)
        >>> explorer.point, explorer.split, explorer.splits
        ('ln_1', 'test', ['test', 'held out'])
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; expected at least 1 image, or None for all")
    store = store_of(store) if isinstance(store, Mapping) else store
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    if "train" not in store.splits:
        raise ValueError(f"{store.path.name} has the splits {', '.join(store.splits)}; a probe needs one named train")
    held = {} if images is None else {of_split.split: of_split for of_split in splits_of(images)}
    network = Network(store, model)
    out = folder_of_run(store) / "explorer" if out is None else Path(out).expanduser()
    options = {"limit": limit, "progress": progress, "remote": remote, "network": network, "images": held}
    explorer = Explorer(store, out=out, result=result, **options)
    replace_earlier(explorer)  # only now, so that what it computed is shared
    return explorer


def folder_of_run(store: FeatureStore) -> Path:
    """The folder of a run whose stores are in its folder `stores`; this one for any other store."""
    if hasattr(store.path, "put") or store.path.parent.name != "stores":
        return Path()
    return store.path.parent.parent
