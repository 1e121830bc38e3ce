"""Where a store's manifest, which may be a stranger's, says that its model and images are; nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_lab.core import hub
from igpt_lab.core.arguments import OF_THIS_DISK
from igpt_lab.core.storage import ADDRESS, place
from igpt_lab.features import form
from igpt_lab.features.manifest import StoreError, StoreFolder, read_manifest
from igpt_lab.features.settings import ExtractionSettings
from igpt_lab.images.sources import bundled

# An address whose server is that of its kind; a region is part of the server's name.
OWN_SERVER = re.compile(r"(s3|gs|gcs|hf)://[^/?#@:\\\s]+(/[^?#\s]*)?(\?region=[a-z0-9-]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Sources:
    """Where a store's manifest, which may be a stranger's, says that its model and images are, and what was asked.

    `model` is {} for a network that is no ImageGPT, which no name loads.
    """

    model: dict
    images: dict[str, dict]
    settings: ExtractionSettings

    @property
    def places(self) -> dict[str, str]:
        """What is read -> where."""
        model = {"model": self.model["name"]} if self.model else {}
        return model | {f"images {name}": at["name"] for name, at in self.images.items()}

    @property
    def addresses(self) -> list[str]:
        """Those places that name a server: the user's keys would sign what is asked of it."""
        return [f"{what} {name!r}" for what, name in self.places.items() if _is_address(name)]

    @property
    def remote(self) -> list[str]:
        """Those places that are not on this disk: addresses, and names on the Hub."""
        known = {"model": hub.bundled()}
        places = self.places.items()
        return [
            f"{what} {name!r}" for what, name in places if name not in known.get(what, bundled()) and not _is_here(name)
        ]


def _is_address(name: str) -> bool:
    """Also a share that Windows would ask for over the network."""
    is_share = name.replace("\\", "/").startswith("//")
    return is_share or bool(ADDRESS.match(name) and not OF_THIS_DISK.fullmatch(name))


def _is_here(name: str) -> bool:
    """Is it on this disk, or nowhere?"""
    if _is_address(name):
        return False
    try:
        path = place(name)
        return isinstance(path, Path) and (path.exists() or path.is_absolute())
    except (ValueError, OSError):
        return False


def sources_of(store: str | Path | StoreFolder, splits: Sequence[str] | None = None) -> Sources:
    """What a repair of these splits, by default all, would use; nothing is opened.

    Raises StoreError where the manifest does not say, or names a server's host or user of its own.
    """
    if not isinstance(store, StoreFolder):
        store = StoreFolder(store, read_manifest(place(store)))
    splits = store.splits if splits is None else splits
    source = store.manifest.get("source") or {}
    try:
        form.expect(source, dict, "an object", "source")
        images = form.expect(source.get("images") or {}, dict, "an object", "source.images")
        model = {} if store.names else source.get("model")
        if not ((model or store.names) and source.get("options") and all(images.get(split) for split in splits)):
            raise StoreError(f"{store.path} does not say where its model and images are; run the same extraction again")
        expected = {name: item for name, item in form.SOURCE.items() if model or name != "model"}
        form.check(source | {"images": {split: images[split] for split in splits}}, expected, "source")
        about = {split: form.only(images[split], form.IMAGES) for split in splits}
        settings = ExtractionSettings.from_options(source["options"])
        sources = Sources(form.only(model or {}, form.MODEL), about, settings)
        for name in sources.places.values():
            _check_address(name)
    except StoreError:
        raise
    except (ValueError, TypeError) as error:
        raise StoreError(f"{store.path} cannot be repaired: its options are wrong, {error}") from error
    return sources


def _check_address(name: str) -> None:
    """ValueError where an address chooses the server, its user or a proxy: a signed request would go there.

    Of pyarrow's kinds of address others have a host in them (hdfs), or any library that fsspec knows (fsspec+...).
    """
    if ADDRESS.match(name) and not OF_THIS_DISK.fullmatch(name) and not OWN_SERVER.fullmatch(name):
        expected = "expected s3://bucket/path or gs://bucket/path, with ?region= at most"
        raise ValueError(f"{name!r} names a server or a user of its own; {expected}")
