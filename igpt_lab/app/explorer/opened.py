"""What the explorers that are open share, and which of them a notebook's cell replaces when it runs again."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from igpt_lab.core.provenance import digest
from igpt_lab.features.store import FeatureStore

CLOSED = "this explorer is closed; lab.explore(store) opens another"


class Computed(dict):
    """What was computed of a store, by what it is; unlike a dict it can be gone when nobody holds it."""


_computed: weakref.WeakValueDictionary[tuple, Computed] = weakref.WeakValueDictionary()
_opened: list[tuple[weakref.ref, str, str]] = []  # an explorer, the cell that opened it, and the run of that cell


def computed_of(store: FeatureStore) -> Computed:
    """One for all explorers of a store, gone with the last of them; another once the store is another."""
    return _computed.setdefault((str(store.path), digest(store.manifest)), Computed())


def replace_earlier(explorer: Any) -> None:
    """Close the explorers of the same store that an earlier run of this notebook's cell opened."""
    cell, run = cell_at_hand()
    for reference, its_cell, its_run in list(_opened):
        earlier = reference()
        if earlier is None or earlier.is_closed:
            _opened.remove((reference, its_cell, its_run))
        elif cell and cell == its_cell and run != its_run and earlier.store.path == explorer.store.path:
            earlier.close()
    _opened.append((weakref.ref(explorer), cell, run))


def cell_at_hand() -> tuple[str, str]:
    """The cell that runs and its run, as a notebook's front end names them; "" and "" outside of notebooks."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    message = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return message.get("metadata", {}).get("cellId", ""), message.get("header", {}).get("msg_id", "")
