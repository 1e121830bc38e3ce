"""The explorer for JupyterLab: what each layer's probe says of the images, where they lie, and which are alike.

All that a step of the slider shows is computed once, goes to the browser as bytes and is drawn there by explorer.js and
the panels. Pictures, places and neighbours go first. Then the browser asks for the probes, which take longer. Only
another point, split or number of labels comes back to the kernel, and what the panel of the network asks while it is
open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import traitlets
from anywidget import AnyWidget
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes

from igpt_lab import figures
from igpt_lab.app.explorer.layers import Answers, Spaces
from igpt_lab.app.explorer.network import Network
from igpt_lab.app.explorer.offline import offline_page
from igpt_lab.app.explorer.opened import Computed, computed_of
from igpt_lab.app.explorer.pictures import Pictures, open_source, show_original
from igpt_lab.app.explorer.rows import HELD, Rows
from igpt_lab.app.explorer.still import first_page, page, summarise
from igpt_lab.app.explorer.views import NOTE, View, folder_name, layer_curve, views
from igpt_lab.core.arguments import local
from igpt_lab.core.provenance import RunRecord, atomic_write
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.probing.results import ProbeResult

SENT = ("places", "near", "pixel_near", "predicted", "labels", "rows", "pictures")  # as bytes
WIDGET = "application/vnd.jupyter.widget-view+json"
IN_CHOICE = "on all training images, these among them, so that this accuracy is no test of the choice"
NOT_FITTED: dict = {"chosen": None, "curve": [], "peak": [], "doubts": []}
CHOICES = ("point", "split", "count", "layer", "other", "image", "alone")


def front_end() -> str:
    """The ES module that draws the explorer: panels/*.js in the order of their names, then explorer.js.

    anywidget takes one module as text. The files import nothing from each other, so that joining them is all there is.
    """
    panels = sorted(Path(__file__).with_name("panels").glob("*.js"))
    files = [*panels, Path(__file__).with_name("explorer.js")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


class Explorer(Rows, AnyWidget):
    """Point, split, labels per class and layer of a store, and what there is to see; `explore` makes it.

    `point`, `split`, `count` (labels per class, 0 for all), `layer`, `other` (the layer it is compared with), `image`
    (a position among the images shown) and `alone` (what is seen alone on the plane: `label`, and `predicted` too, or
    nothing) can be set here as well as in the browser. `save()` and `export()` are its buttons. The layer is one in
    the middle until probes are fitted, by the browser or by `fit()`, and then the chosen one.

    Args:
        store: With a split `train` and labels.
        out: Folder of what is saved.
        limit: Images of a split that are shown, at most; None: all.
        progress: Show a bar while probes are fitted for Python.
        remote: Read images from an address that the store names.
        network: The store's model, by default the one that it names.
        images: Splits whose images were in memory, by name.
        result: Of the point and split that open.

    Raises:
        ValueError: A store without labels, or a result of other layers, images or features.
        KeyError: A store without a split `train`.

    Example:
        >>> explorer = lab.explore(store, limit=50)
        >>> explorer.layer = 2
        >>> explorer.layer, explorer.other
        (2, 3)
    """

    _esm = front_end()
    _arrays = SENT  # `close` is called when the interpreter ends, too, which may have taken names of the module away
    _css = Path(__file__).with_name("explorer.css").read_text(encoding="utf-8")  # a Path would be watched for ever
    point = traitlets.Unicode().tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)
    count = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    other = traitlets.Int().tag(sync=True)
    image = traitlets.Int(0).tag(sync=True)
    alone = traitlets.Dict().tag(sync=True)
    facts = traitlets.Dict().tag(sync=True)
    busy = traitlets.Unicode().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    places = traitlets.Bytes().tag(sync=True)  # float32 (L, N, 2)
    near = traitlets.Bytes().tag(sync=True)  # int32 (L, N, k)
    pixel_near = traitlets.Bytes().tag(sync=True)  # int32 (N, k)
    predicted = traitlets.Bytes().tag(sync=True)  # uint16 (L, N)
    labels = traitlets.Bytes().tag(sync=True)  # uint16 (N,)
    rows = traitlets.Bytes().tag(sync=True)  # int32 (N,), in the source
    pictures = traitlets.Bytes().tag(sync=True)  # uint8 (N, H, W, C)

    def __init__(
        self, store: FeatureStore, *, out: Path, limit: int | None, progress: bool, remote: bool = False,
        network: Network | None = None, images: Mapping[str, ImageSet | TokenSet] = MappingProxyType({}),
        result: ProbeResult | None = None,
    ):  # fmt: skip
        self.store = store
        self.out = out
        self.limit = limit
        self._computed: Computed | None = computed_of(store)
        self.network = network or Network(store)
        self._sources = {
            split: open_source(store, split, remote, self.network.processor, images.get(split))
            for split in store.splits
        }
        self._stills: list[DisplayHandle] = []  # pages that lie before the widget
        super().__init__()
        self._progress = progress
        try:
            self._begin(result)
        except BaseException:
            self.close()
            raise
        self.observe(self._on_choice, ["point", "split", "count"])
        self.observe(self._on_place, ["layer", "other", "image", "alone"])
        self.on_msg(self._on_message)

    def _begin(self, result: ProbeResult | None) -> None:
        """Choose point and split, and show them; what their probes say, where that is at hand."""
        store = self.store
        self.point = "ln_1" if "ln_1" in store.layers else next(iter(store.layers))
        self.split = "test" if "test" in store.splits else self.splits[0]
        if result is not None:
            self._take(result)
        self._send_view(self.answers_at_hand)

    def fit(self) -> None:
        """Fit the probes of what is looked at, where they are not fitted yet, and show what they say."""
        if not self.facts["curve"]:
            self._send_view(self.answers)

    def close(self) -> None:
        """Take it off the screen, and let go of features, pictures and answers. Another explorer may still use them."""
        if self.comm is not None:
            self.layout.close()
        super().close()
        vars(self).pop("_repr_mimebundle_", None)  # of ipywidgets, which puts None there
        self.unobserve_all()
        self.on_msg(self._on_message, remove=True)
        for name in self._arrays:
            setattr(self, name, b"")  # sent to nobody any more
        self._computed, self.network = None, None
        self._sources, self._stills = {}, []

    @property
    def is_closed(self) -> bool:
        return self._computed is None

    @property
    def view(self) -> View:
        """What is looked at now, as the figures take it."""
        return View(
            title=self.facts["title"], of=self.facts["of"], point=self.point, layer=self.layer, other=self.other,
            image=self.image, names=self.classes, called=self._named(list(self.shown.layers)), shown=self.shown,
            answers=self.answers, spaces=self.spaces, pictures=self.seen, alone=self.alone,
        )  # fmt: skip

    def _on_choice(self, change) -> None:
        self.problem = ""
        choices = {"point": list(self.store.layers), "split": self.splits, "count": self.counts}[change.name]
        if change.new not in choices:
            setattr(self, change.name, change.old)
            raise ValueError(f"{change.name} {change.new!r}; expected one of {', '.join(map(str, choices))}")
        self.busy = self._busy_fitting()
        try:
            self._send_view(self.answers)
        except BaseException as error:
            setattr(self, change.name, change.old)  # computed before, so that it is shown again at once
            if not isinstance(error, ValueError | OSError | MemoryError):  # such as an interrupt of the kernel
                raise
            self.problem = str(error) or type(error).__name__
        finally:
            self.busy = ""

    def _on_place(self, change) -> None:
        try:
            self.check(change.name, change.new)
        except ValueError:
            setattr(self, change.name, change.old)
            raise

    def _send_view(self, answers: Answers | None) -> None:
        """Compute the view of what is chosen, and send it in one message; without answers while they are None."""
        shown, spaces = self.shown, self.spaces
        pictures = self.seen
        predicted = None if answers is None else answers.predicted
        with self.hold_sync():
            self._move_to(list(shown.layers), answers)
            self.image = min(self.image, len(shown.labels) - 1)
            self.alone = {}
            for name, (array, dtype) in {
                "places": (spaces.places, "<f4"), "near": (spaces.near, "<i4"), "labels": (shown.labels, "<u2"),
                "predicted": (predicted, "<u2"), "rows": (shown.index, "<i4"),
                "pixel_near": (pictures.near, "<i4"), "pictures": (pictures.pixels, "u1"),
            }.items():  # fmt: skip
                setattr(self, name, self._bytes(array, dtype))
            self.facts = self._facts(list(shown.layers), answers, spaces, pictures)
        for still in self._stills:
            still.update(self._page(), raw=True)

    def _move_to(self, layers: list[int], answers: Answers | None) -> None:
        """Layers in view that there are; the chosen one once it is known, where nobody has moved before."""
        middle = layers[len(layers) // 2]
        is_first = not self.facts
        waited = not is_first and not self.facts["curve"] and self.layer == middle
        self.other = layers[-1] if is_first else _closest(layers, self.other)
        if is_first or waited:
            self.layer = middle if answers is None else answers.chosen
        else:
            self.layer = _closest(layers, self.layer)

    def _bytes(self, array: np.ndarray | None, dtype: str) -> bytes:
        """An array as the browser gets it, the same bytes for all explorers that send this array."""
        if array is None:
            return b""
        return self._once(("bytes", id(array)), lambda: (array, np.ascontiguousarray(array, dtype).tobytes()))[1]

    def _facts(self, layers: list[int], answers: Answers | None, spaces: Spaces, pictures: Pictures) -> dict:
        """What is sent beside the arrays."""
        key = self.store.key
        n_train = self.count * len(np.unique(self.train.labels)) if self.count else len(self.train.labels)
        return {
            "title": f"{key['model']} on {key['images']}",
            "told": key["pool"] if self.store.names else f"{key['pool']}, {key['alignment']}",
            "layers": layers, "called": self._named(layers), **(_about(answers) if answers else NOT_FITTED),
            "classes": self.classes, "n": len(self.shown.labels), "n_train": n_train,
            "near": [spaces.near.shape[2], pictures.near.shape[1]],
            "shape": [] if pictures.pixels is None else list(pictures.pixels.shape[1:]), "no_pictures": pictures.why,
            "files": list(pictures.files),
            "explained": spaces.explained.tolist(), "note": NOTE, "of": self._images_shown(),
            "at": {"point": self.point, "split": self.split, "count": self.count},
            "choice": IN_CHOICE if self.split == HELD else "on validation",
            "choices": {"point": list(self.store.layers), "split": self.splits, "count": self.counts},
        }  # fmt: skip

    def _images_shown(self) -> str:
        """The images shown, in words."""
        shown = len(self.shown.labels)
        total = self.store.key["splits"][self._store_split][1]
        images = "image" if total == 1 else "images"
        if self.split == HELD:
            return f"{shown:,} of the {total:,} training {images}, held out"
        return f"{shown:,}{'' if shown == total else f' of {total:,}'} {self.split} {images}"

    def _on_message(self, _, message: dict, __) -> None:
        if self.is_closed:  # the browser asked before it knew
            return
        todo = message.get("do")
        source = self._sources[self._store_split]
        if todo == "look":
            self.send(*self.network.answer(message, self.split, source, self.shown.index))
        elif todo == "original":
            self.send(*show_original(message.get("image"), self.split, source, self.shown.index))
        elif todo == "fit":
            self._fit_as_asked()
        elif todo in ("save", "export"):
            self._write(self.save if todo == "save" else lambda: [self.export()])

    def _write(self, write: Callable[[], list[Path]]) -> None:
        """Write files, and tell the browser which, or why not."""
        try:
            files = write()
            self.send({"saved": str(files[0].parent), "files": [file.name for file in files]})
        except (ValueError, OSError) as error:
            self.send({"failed": str(error)})

    def _fit_as_asked(self) -> None:
        """Fit for the browser, which is told where that fails."""
        self.problem, self.busy = "", self._busy_fitting()
        try:
            self.fit()
        except BaseException as error:
            self.problem = f"The probes are not fitted: {error or type(error).__name__}"
            if not isinstance(error, ValueError | OSError | MemoryError):  # such as an interrupt of the kernel
                raise
        finally:
            self.busy = ""

    def _busy_fitting(self) -> str:
        return f"{len(self.store.layers[self.point])} probes are being fitted ..."

    def save(self) -> list[Path]:
        """Write what is in view as figures: png, pdf, svg, csv and json each, in a folder that names the choice."""
        folder = self._folder()
        settings = {"store": self.store.key, "view": {name: getattr(self, name) for name in CHOICES}}
        settings["view"] |= {"row": int(self.shown.index[self.image]), "chosen": self.answers.chosen}
        files = []
        for name, (figure, data) in views(self.view).items():
            record = RunRecord(f"explorer {name}", settings, seed=0)
            files += figures.save_figure(figure, folder / name, data=data, record=record)
        return files

    def export(self, path: str | Path | None = None) -> Path:
        """Write the explorer of this point, split and number of labels as one HTML file, which works offline.

        All steps of the sliders work in it, and no other choice and no look into the network. By default it lies beside
        what `save()` writes.
        """
        self.fit()
        path = self._folder() / "explorer.html" if path is None else local(path)
        values = {name: getattr(self, name) for name in (*CHOICES, "facts", "busy", "problem")}
        arrays = {name: getattr(self, name) for name in SENT}
        return atomic_write(path, offline_page(self.facts["title"], values, arrays, script=self._esm, css=self._css))

    def _folder(self) -> Path:
        """Where the view is saved: its name says all that was chosen."""
        labels = f"{self.count}-a-class" if self.count else "all-labels"
        parts = [self.point, self.split.replace(" ", "-"), labels, f"layer{self.layer:02d}", f"other{self.other:02d}"]
        parts.append(f"row{self.shown.index[self.image]}")
        parts += [f"{name}-{self.classes[label]}" for name, label in self.alone.items()]
        return (local(self.out) / folder_name(self.store.path.name) / folder_name("-".join(parts))[:100]).resolve()

    def curve(self) -> tuple[Axes, pd.DataFrame]:
        """The layer curve of what is shown, with the layer in view as a line, and its table."""
        return layer_curve(self.view)

    def describe(self) -> str:
        """What there is to see, in a line of text."""
        if self.is_closed:
            return f"<Explorer {self.facts.get('title', '')}: closed>"
        if not self.facts["curve"]:
            return f"<Explorer {self.facts['title']}: {self.facts['of']}, point {self.point}; probes not fitted yet>"
        return summarise(self.view)

    __repr__ = describe

    def _page(self) -> dict[str, str]:
        """What there is to see where no widget is shown, as text and as HTML."""
        if self.is_closed:
            return {"text/plain": self.describe()}
        html = page(self.view) if self.facts["curve"] else first_page(self.facts, self.seen, self.shown.labels)
        return {"text/plain": self.describe(), "text/html": html}

    def _ipython_display_(self, **options) -> None:
        """A page that stays in the notebook, and the widget, which covers it as long as there is a kernel."""
        data, metadata = self._repr_mimebundle_(**options)
        if WIDGET not in data or not hasattr(get_ipython(), "kernel"):
            display(data, metadata=metadata, raw=True)
            return
        self._stills.append(display(self._page(), raw=True, display_id=True))
        display({name: data[name] for name in ("text/plain", WIDGET)}, metadata=metadata, raw=True)

    def _repr_mimebundle_(self, **options) -> tuple[dict, dict]:
        """The widget, and where none can be shown a page and a line of text."""
        if self.is_closed:
            return self._page(), {}
        data, metadata = super()._repr_mimebundle_(**options)
        return data | self._page(), metadata


def _about(answers: Answers) -> dict:
    """What is sent of the answers beside the predictions."""
    return {"chosen": answers.chosen, "curve": answers.curve, "peak": answers.peak, "doubts": answers.doubts}


def _closest(layers: list[int], layer: int) -> int:
    return min(layers, key=lambda other: abs(other - layer))
