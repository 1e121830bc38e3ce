"""The explorer for JupyterLab: what each layer's probe says of the images, where they lie, and which are their like.

All that a step of the slider shows is computed here once, goes to the browser as bytes and is drawn there by
explorer.js and the panels. Only another point, split or number of labels comes back to the kernel. The explorer is for
looking, not for choosing: layer and C were chosen on a tenth of the training images, and whoever picks a layer by what
it does to test images needs other test images.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import traitlets
from anywidget import AnyWidget
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

from igpt_lab import figures
from igpt_lab.data import ImageSet, TokenSet, load_images, stratified_split
from igpt_lab.extraction import processor_of
from igpt_lab.geometry import nearest_others
from igpt_lab.probes import Features, LinearProbe, probe_few_labels, probe_layers
from igpt_lab.provenance import RunRecord
from igpt_lab.significance import accuracy
from igpt_lab.store import FeatureStore

HELD = "held out"  # the tenth of train on which layers and C are chosen, by probes that saw the other nine
COUNTS = (1, 4, 25, 100, 400)  # labels a class, where train has them
NEAR = 8  # neighbours that are shown
SIDE = 32  # pixels of a picture's longer side, at most
NOTE = (
    "For looking, not for choosing: layer and C were chosen on a tenth of the training images. A layer picked here by "
    "its accuracy on test images needs other test images."
)


def front_end() -> str:
    """The ES module that draws the explorer: panels/*.js in the order of their names, then explorer.js.

    anywidget takes one module as text. The files import nothing from each other, so that joining them is all there is.
    """
    panels = sorted(Path(__file__).with_name("panels").glob("*.js"))
    files = [*panels, Path(__file__).with_name("explorer.js")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def explore(
    store: FeatureStore | str | Path, *, out: str | Path = "explorer", limit: int | None = 4000, progress: bool = True
) -> Explorer:
    """The explorer of a feature store with a split `train`: end a notebook's cell with it.

    Shows at most `limit` images of a split, a seeded draw (None: all); every number in it is of these. Its Save button
    writes the view under the folder `out`. Raises ValueError for a store without labels or without training images.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    if "train" not in store.splits:
        raise ValueError(f"{store.path.name} has the splits {', '.join(store.splits)}; a probe needs one named train")
    return Explorer(store, out=Path(out), limit=limit, progress=progress)


@dataclass(frozen=True, eq=False)
class Answers:
    """What the probes of all layers say. `table`: a row a layer; `chosen`: on validation; `predicted`: (L, N)."""

    table: pd.DataFrame
    chosen: int
    predicted: np.ndarray


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images as the network gets them: `pixels` uint8 (N, H, W, 1 or 3), or None and `why`; `near` in pixels."""

    pixels: np.ndarray | None
    near: np.ndarray
    why: str = ""


class Explorer(AnyWidget):
    """Point, split, labels a class and layer of a store, and what there is to see; see `explore`.

    `point`, `split`, `count` (labels a class, 0 for all), `layer`, `other` (the layer it is compared with) and `image`
    (a position among the images shown) can be set here as well as in the browser. `save()` is the Save button.
    """

    _esm = front_end()
    _css = Path(__file__).with_name("explorer.css")
    point = traitlets.Unicode().tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)
    count = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    other = traitlets.Int().tag(sync=True)
    image = traitlets.Int(0).tag(sync=True)
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

    def __init__(self, store: FeatureStore, *, out: Path, limit: int | None, progress: bool):
        self.store, self.out, self.limit, self._known = store, out, limit, {}
        self._sources = {split: _images_of(store, split) for split in store.splits}
        point = "ln_1" if "ln_1" in store.layers else next(iter(store.layers))
        split = next((split for split in ("test", *store.splits) if split in store.splits and split != "train"), HELD)
        super().__init__()
        self._progress = progress
        self.set_trait("point", point), self.set_trait("split", split)
        self._show()
        self._progress = False  # from now on the browser tells
        self.observe(self._choose, ["point", "split", "count"])
        self.on_msg(self._hear)

    @property
    def splits(self) -> list[str]:
        """Splits on offer: those of the store but train, and the held-out tenth of train."""
        return [*(split for split in self.store.splits if split != "train"), HELD]

    @property
    def counts(self) -> list[int]:
        """Labels a class on offer; 0 stands for all."""
        labels = self.train.labels
        least = np.unique(labels, return_counts=True)[1].min()
        return [0, *(k for k in COUNTS if k <= least)]

    @property
    def train(self) -> Features:
        """The rows that the probes learn from: all of train, or nine tenths where the last tenth is shown."""
        train = self._once(("train", self.point), lambda: Features.from_store(self.store, "train", self.point))
        return train if self.split != HELD else _some(train, stratified_split(train.labels, 0.1, seed=0)[0])

    @property
    def shown(self) -> Features:
        """The rows that are looked at."""
        return self._once(("shown", self.point, self.split), self._choose_rows)

    @property
    def answers(self) -> Answers:
        return self._once(("answers", self.point, self.split, self.count), self._ask)

    @property
    def seen(self) -> Pictures:
        return self._once(("pictures", self.split), self._look)

    @property
    def spaces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places float32 (L, N, 2), shares of the variance (L, 2) and neighbours int (L, N, k) of the rows shown."""
        return self._once(("spaces", self.point, self.split), lambda: survey(self.shown.layers))

    def _once(self, key: tuple, make):
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _choose_rows(self) -> Features:
        if self.split == HELD:
            every = Features.from_store(self.store, "train", self.point)
            every = _some(every, stratified_split(every.labels, 0.1, seed=0)[1])
        else:
            every = Features.from_store(self.store, self.split, self.point)
        few = len(every.labels) if self.limit is None else min(self.limit, len(every.labels))
        rows = np.sort(np.random.default_rng(0).permutation(len(every.labels))[:few])
        every = every if few == len(every.labels) else _some(every, rows)
        return replace(every, layers=dict(every.layers))

    def _ask(self) -> Answers:
        if self.count:
            return ask_few(self.train, self.shown, self.count)
        if self.split == HELD:
            whole = self._once(("whole", self.point), self._probe_all)
            return ask_held(self.train, self.shown, whole.table)
        found = probe_layers(self.train, self.shown, progress=self._progress)
        self._known.setdefault(("whole", self.point), found)
        return Answers(found.table, found.chosen, np.stack(list(found.predicted.values())))

    def _probe_all(self):
        """C of every layer, chosen on the held-out tenth, which is all that is wanted of it here."""
        train = Features.from_store(self.store, "train", self.point)
        held = _some(train, stratified_split(train.labels, 0.1, seed=0)[1])
        return probe_layers(train, held, progress=self._progress)

    def _look(self) -> Pictures:
        split = "train" if self.split == HELD else self.split
        source, index = self._sources[split], self.shown.index
        if isinstance(source, str):
            return Pictures(None, np.zeros((len(index), 0), np.int64), source)
        images, processor = source
        positions = np.searchsorted(images.index, index)  # a store's rows are in the order of its images
        if isinstance(images, TokenSet):
            pixels = processor.decode(images.tokens[images.index[positions]])
        else:
            some = np.array_split(positions, len(positions) // 256 + 1)
            pixels = np.concatenate([processor.resize(images.images(each)) for each in some])
        pixels = pixels[..., :1] if (pixels[..., :1] == pixels).all() else pixels
        near = nearest(pixels.reshape(len(pixels), -1).astype(np.float32))
        return Pictures(pixels[:, :: (step := -(-pixels.shape[1] // SIDE)), ::step], near)

    def _choose(self, change) -> None:
        self.problem = ""
        offered = {"point": list(self.store.layers), "split": self.splits, "count": self.counts}[change.name]
        if change.new not in offered:
            setattr(self, change.name, change.old)
            raise ValueError(f"{change.name} {change.new!r}; expected one of {', '.join(map(str, offered))}")
        self.busy = f"{len(self.store.layers[self.point])} probes are being fitted, neighbours searched ..."
        try:
            self._show()
        except (ValueError, OSError, MemoryError) as error:
            setattr(self, change.name, change.old)  # shows again what was shown, and has it still
            self.problem = str(error) or type(error).__name__
        finally:
            self.busy = ""

    def _show(self) -> None:
        """Compute the view of what is chosen, and send it in one message."""
        shown, answers, (places, explained, near), seen = self.shown, self.answers, self.spaces, self.seen
        layers = list(shown.layers)
        with self.hold_sync():
            before = bool(self.facts)
            self.layer = _nearest(layers, self.layer) if before else answers.chosen
            self.other = _nearest(layers, self.other) if before else layers[-1]
            self.image = min(self.image, len(shown.labels) - 1)
            self.places, self.near = _bytes(places, "<f4"), _bytes(near, "<i4")
            self.pixel_near, self.predicted = _bytes(seen.near, "<i4"), _bytes(answers.predicted, "<u2")
            self.labels, self.rows = _bytes(shown.labels, "<u2"), _bytes(shown.index, "<i4")
            self.pictures = b"" if seen.pixels is None else seen.pixels.tobytes()
            self.facts = self._facts(layers, answers, explained, near, seen)

    def _facts(self, layers, answers, explained, near, seen) -> dict:
        key, columns = self.store.key, ["test_accuracy", "low", "high", "converged"]
        rows = answers.table[columns].rename(columns={"test_accuracy": "accuracy"}).to_dict("records")
        peak = answers.table.layer[answers.table.in_peak_set].tolist() if "in_peak_set" in answers.table else []
        return {
            "title": f"{key['model']} on {key['images']}", "told": f"{key['pool']}, {key['alignment']}",
            "layers": layers, "chosen": answers.chosen, "curve": rows, "peak": peak, "classes": self.classes,
            "n": len(self.shown.labels), "n_train": self._n_train(), "near": [near.shape[2], seen.near.shape[1]],
            "shape": [] if seen.pixels is None else list(seen.pixels.shape[1:]), "no_pictures": seen.why,
            "explained": explained.tolist(), "note": NOTE, "of": self._of(),
            "at": {"point": self.point, "split": self.split, "count": self.count},
            "choices": {"point": list(self.store.layers), "split": self.splits, "count": self.counts},
        }  # fmt: skip

    def _of(self) -> str:
        """The images shown, in words."""
        shown, split = len(self.shown.labels), "train" if self.split == HELD else self.split
        every = self.store.key["splits"][split][1]
        if self.split == HELD:
            return f"{shown:,} of the {every:,} training images, held out"
        return f"{shown:,} {split} images" if shown == every else f"{shown:,} of {every:,} {split} images"

    def _n_train(self) -> int:
        return self.count * len(np.unique(self.train.labels)) if self.count else len(self.train.labels)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, from the image set where it is at hand."""
        highest = int(max(self.train.labels.max(), self.shown.labels.max()))
        found = [each[0].label_names for each in self._sources.values() if not isinstance(each, str)]
        names = found[0] if found else ()
        return [names[i] if i < len(names) else str(i) for i in range(highest + 1)]

    def _hear(self, _, message: dict, __) -> None:
        if message.get("do") == "save":
            try:
                files = self.save()
                self.send({"saved": str(files[0].parent), "files": [file.name for file in files]})
            except (ValueError, OSError) as error:
                self.send({"failed": str(error)})

    def save(self) -> list[Path]:
        """Write what is in view as figures: png, pdf, svg, csv and json each, in a folder that names the choice."""
        labels = f"{self.count}-a-class" if self.count else "all-labels"
        view = "-".join([self.point, self.split.replace(" ", "-"), labels, f"layer{self.layer:02d}"])
        folder = (self.out / self.store.path.name / view).resolve()
        settings = {"store": self.store.key, "view": {name: getattr(self, name) for name in VIEW}}
        settings["view"] |= {"row": int(self.shown.index[self.image]), "chosen": self.answers.chosen}
        files = []
        for name, (figure, data) in views(self).items():
            record = RunRecord(f"explorer {name}", settings, seed=0)
            files += figures.save_figure(figure, folder / name, data=data, record=record)
        return files

    def curve(self) -> tuple:
        """The layer curve of what is shown, with the layer in view as a line, and its table."""
        answers = self.answers
        table = answers.table.assign(control="", chosen=answers.table.layer == answers.chosen, n_test=self.facts["n"])
        ax = figures.layer_curve(table, title=self.facts["title"])
        ax.axvline(self.layer, color="black", linewidth=0.6, zorder=0.5)
        ax.set_ylabel(f"accuracy on {self.facts['of']} (%)")
        return ax, table

    def describe(self) -> str:
        """What there is to see, in a line of text."""
        row = self.answers.table.set_index("layer").loc[self.answers.chosen]
        return (
            f"<Explorer {self.facts['title']}: {self.facts['of']}, point {self.point}, layers "
            f"{self.facts['layers'][0]}..{self.facts['layers'][-1]}; layer {self.answers.chosen} chosen on validation, "
            f"{row.test_accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]>"
        )

    __repr__ = describe

    def _repr_mimebundle_(self, **how) -> tuple[dict, dict]:
        """The widget, and where none can be shown a page and a line of text."""
        data, about = super()._repr_mimebundle_(**how)
        return data | {"text/plain": self.describe(), "text/html": page(self)}, about


VIEW = ("point", "split", "count", "layer", "other", "image")


def survey(layers: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of layers (N, D): places float32 (L, N, 2), shares of the variance (L, 2), neighbours int (L, N, k).

    Features are standardised over these rows, as a probe's are. Places are the two leading principal components at a
    common size; each layer's are turned and mirrored to lie on those of the layer before it as well as they can
    (orthogonal Procrustes, Schonemann 1966), which changes no distance, and lets the eye follow an image. Neighbours
    are by Euclidean distance, nearest first.
    """
    places, explained, near = [], [], []
    for x in layers.values():
        x = _standard(x)
        pca = PCA(min(2, *x.shape), random_state=0)
        at = pca.fit_transform(x)
        at = np.pad(at, ((0, 0), (0, 2 - at.shape[1])))
        at /= max(np.sqrt((at**2).sum(1).mean()), 1e-12)
        turn = orthogonal_procrustes(at, places[-1])[0] if places else np.eye(2)
        places.append((at @ turn).astype(np.float32))
        share = np.pad(pca.explained_variance_ratio_, (0, 2 - pca.n_components_))
        explained.append(turn.T**2 @ share)  # of the turned axes
        near.append(nearest(x))
    return np.stack(places), np.stack(explained), np.stack(near)


def nearest(x: np.ndarray) -> np.ndarray:
    """The NEAR nearest other rows of each row of x (N, D), nearest first: int64 (N, k), k less for few rows."""
    return nearest_others(x, min(NEAR, max(len(x) - 2, 0)), device=None, progress=False)[0]


def ask_few(train: Features, shown: Features, count: int) -> Answers:
    """Probes that see `count` labels a class, the first draw of `probe_few_labels`: C and layer chosen inside them."""
    found = probe_few_labels(train, shown, ks=[count], draws=1, layers=list(train.layers), progress=False)
    table = found.table.reset_index(drop=True)
    rows = table.index[table.layer_rule == "fixed"]
    bounds = pd.DataFrame([accuracy(found.correct[row]) for row in rows], index=rows)[["low", "high"]]
    chosen = int(table.layer[table.layer_rule == "chosen"].iloc[0])
    return Answers(table.loc[rows].join(bounds), chosen, np.stack([found.predicted[row] for row in rows]))


def ask_held(rest: Features, held: Features, table: pd.DataFrame) -> Answers:
    """The held-out tenth, by probes of the other nine tenths with each layer's C: what layer and C were chosen on."""
    said = []
    for layer, C in zip(table.layer, table.C, strict=True):
        said.append(LinearProbe(C).fit(rest.layers[layer], rest.labels).predict(held.layers[layer]))
    found = pd.DataFrame([accuracy(each == held.labels) for each in said])
    found = found.assign(layer=table.layer, C=table.C, converged=table.converged)
    return Answers(found, int(table.layer[table.chosen].iloc[0]), np.stack(said))


def changes(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of the images of which two layers, predicting a and b (N,), say different things, in three groups."""
    right_a, right_b = a == labels, b == labels
    groups = {"only this layer is right": right_a & ~right_b, "only the other is right": ~right_a & right_b}
    groups["both wrong, differently"] = ~right_a & ~right_b & (a != b)
    return {name: np.flatnonzero(group) for name, group in groups.items()}


def views(explorer: Explorer) -> dict[str, tuple]:
    """name -> (figure, what is drawn in it as a table) of what the explorer shows now."""
    e, answers, (places, explained, near) = explorer, explorer.answers, explorer.spaces
    at, other = (list(e.shown.layers).index(layer) for layer in (e.layer, e.other))
    labels, names, said = e.shown.labels, e.classes, answers.predicted[at]
    title, where, of = e.facts["title"], f"{e.point}, layer {e.layer}", e.facts["of"]
    curve = e.curve()
    counts = np.bincount(labels * len(names) + said, minlength=len(names) ** 2).reshape(len(names), -1)
    confusion = pd.DataFrame(counts, pd.Index(names, name="true"), names)
    points = pd.DataFrame(places[at], columns=["x", "y"])
    points = points.assign(row=e.shown.index, label=[names[label] for label in labels])
    points = points.assign(predicted=[names[each] for each in said])
    right = f"{where}: {(said == labels).mean():.1%} of {of} right"
    found = {
        "accuracy": curve,
        "confusion": (figures.confusion_matrix(confusion, title=title, note=right), confusion),
        "features": (
            figures.feature_map(points, names=names, explained=explained[at], title=title, note=f"{where}: {of}"),
            points,
        ),
    }
    if e.seen.pixels is None:
        return found
    found["neighbours"] = _like(e, near[at, e.image])
    moved = changes(labels, said, answers.predicted[other])
    return found | ({"changes": _moved(e, moved)} if any(map(len, moved.values())) else {})


def _like(e: Explorer, near: np.ndarray) -> tuple:
    """The image and those nearest to it, in the layer above and in pixels below."""
    picked = {f"layer {e.layer}": [e.image, *near], "pixels": [e.image, *e.seen.near[e.image]]}
    figure = figures.row_gallery(_pixels(e)[np.array(list(picked.values()))], labels=list(picked))
    return figure, pd.concat([_listed(e, name, rows) for name, rows in picked.items()])


def _moved(e: Explorer, groups: dict[str, np.ndarray]) -> tuple:
    """The first 12 images of each group of `changes`."""
    names = f"only layer {e.layer} right", f"only layer {e.other} right", "both wrong, differently"
    groups = dict(zip(names, groups.values(), strict=True))
    pixels = _pixels(e)
    shown = np.full((len(groups), 12, *pixels.shape[1:]), 255, np.uint8)
    for row, positions in zip(shown, groups.values(), strict=True):
        row[: len(positions[:12])] = pixels[positions[:12]]
    figure = figures.row_gallery(shown, labels=[f"{name} ({len(rows):,})" for name, rows in groups.items()])
    return figure, pd.concat([_listed(e, name, rows) for name, rows in groups.items()])


def _listed(e: Explorer, group: str, positions) -> pd.DataFrame:
    """Images by their rows in the source, with their classes and what the two layers say."""
    at, other = (list(e.shown.layers).index(layer) for layer in (e.layer, e.other))
    said = np.array(e.classes)[e.answers.predicted[[at, other]][:, positions]]
    return pd.DataFrame({
        "group": group, "row": e.shown.index[positions], "label": np.array(e.classes)[e.shown.labels[positions]],
        f"layer_{e.layer}": said[0], f"compared_layer_{e.other}": said[1],
    })  # fmt: skip


def _pixels(e: Explorer) -> np.ndarray:
    """uint8 (N, H, W, 3), or (N, H, W) of grey images, as the galleries take them."""
    return e.seen.pixels[..., 0] if e.seen.pixels.shape[-1] == 1 else e.seen.pixels


def page(explorer: Explorer) -> str:
    """What there is to see without a widget: the curve and its numbers, as HTML without scripts."""
    png = explorer.curve()[0].get_figure(root=True)._repr_mimebundle_()["image/png"]
    rows = "".join(
        f"<tr><td>{row.layer}{' (chosen)' if row.layer == explorer.answers.chosen else ''}</td>"
        f"<td>{row.test_accuracy:.1%}</td><td>[{row.low:.1%}, {row.high:.1%}]</td></tr>"
        for row in explorer.answers.table.itertuples()
    )
    said = f"{explorer.facts['of']}, {explorer.point}. Run this cell in JupyterLab to explore. {NOTE}"
    return (
        f"<div><strong>{html.escape(explorer.facts['title'])}</strong><br>{html.escape(said)}<br>"
        f'<img alt="accuracy over depth" width="700" src="data:image/png;base64,{png}">'
        f"<details><summary>accuracy of every layer</summary><table><tr><th>layer</th><th>accuracy</th>"
        f"<th>95%</th></tr>{rows}</table></details></div>"
    )


def _images_of(store: FeatureStore, split: str) -> tuple[ImageSet | TokenSet, object] | str:
    """The images of a split and the model's processor, from where the store says they are; or why not, in words."""
    source = store.manifest.get("source") or {}
    images, model = (source.get("images") or {}).get(split), source.get("model")
    if not images or not model:
        return "the store does not say where its images are"
    try:
        found, processor = load_images(**images, split=split), processor_of(model["name"], model.get("revision"))
    except (ValueError, OSError) as error:
        return f"the images are not where the store says: {error}"
    if found.fingerprint != store.key["splits"][split][0] or processor is None:
        return "the images are no longer those of the store" if processor else "the model has no palette"
    return found, processor


class _Rows(Mapping):
    """Some rows of layers, each read when it is asked for."""

    def __init__(self, layers: Mapping[int, np.ndarray], rows: np.ndarray):
        self.layers, self.rows = layers, rows

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.layers[layer][self.rows]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _some(features: Features, rows: np.ndarray) -> Features:
    return Features(_Rows(features.layers, rows), features.labels[rows], features.index[rows])


def _standard(x: np.ndarray) -> np.ndarray:
    deviation = x.std(0, dtype=np.float64)
    return ((x - x.mean(0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def _nearest(layers: list[int], layer: int) -> int:
    return min(layers, key=lambda each: abs(each - layer))


def _bytes(array: np.ndarray, kind: str) -> bytes:
    return np.ascontiguousarray(array, dtype=kind).tobytes()
