"""The explorer's view as figures with their tables, which its Save button writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from igpt_lab import figures
from igpt_lab.app.explorer.layers import Answers, Spaces, changes
from igpt_lab.app.explorer.pictures import Pictures
from igpt_lab.core.display import MODEL
from igpt_lab.figures.names import as_label
from igpt_lab.probing.features import Features

NOTE = (
    "For looking, not for choosing: layer and C were chosen by cross-validation on the training images. A layer picked "
    "here by its accuracy on test images needs other test images."
)
IN_A_ROW = 12  # images of a group of changes


@dataclass(frozen=True, eq=False)
class View:
    """What is looked at: the rows `shown`, what was computed of them, and the layers and the image that are chosen.

    `title` names model and images, `of` says which images are shown, `layer` is compared with `other`, `image` is a
    position among the rows, `alone` says what is seen alone on the plane, `names` are those of the classes, `called`
    what the layers are called, in their order.
    """

    title: str
    of: str
    point: str
    layer: int
    other: int
    image: int
    names: Sequence[str]
    called: Sequence[str]
    shown: Features
    answers: Answers
    spaces: Spaces
    pictures: Pictures
    alone: Mapping[str, int]

    @property
    def kept(self) -> np.ndarray:
        """Which images are seen on the plane: all, or those of a class, or of a class and a prediction; bool (N,)."""
        kept = np.ones(len(self.shown.labels), bool)
        if "label" in self.alone:
            kept &= self.shown.labels == self.alone["label"]
        if "predicted" in self.alone:
            kept &= self.predicted[0] == self.alone["predicted"]
        return kept

    @property
    def kept_in_words(self) -> str:
        """The images that are seen on the plane."""
        if "label" not in self.alone:
            return self.of
        taken = f" taken for {self.names[self.alone['predicted']]}" if "predicted" in self.alone else ""
        return f"{self.kept.sum():,} of {self.of}, {self.names[self.alone['label']]}{taken}"

    @property
    def positions(self) -> tuple[int, int]:
        """Positions of `layer` and `other` among the layers."""
        layers = list(self.shown.layers)
        return layers.index(self.layer), layers.index(self.other)

    @property
    def layer_names(self) -> tuple[str, str]:
        """What `layer` and `other` are called."""
        layer, other = self.positions
        return self.called[layer], self.called[other]

    @property
    def predicted(self) -> np.ndarray:
        """What the probes of `layer` and `other` predict: labels, int (2, N)."""
        return self.answers.predicted[list(self.positions)]

    def with_files(self, table: pd.DataFrame, positions: Sequence[int]) -> pd.DataFrame:
        """A table of the images at these positions with their file names, where there are any."""
        files = self.pictures.files
        return table.assign(file=[files[position] for position in positions]) if files else table

    def named(self, labels: np.ndarray) -> np.ndarray:
        """The classes' names of labels."""
        return np.array(self.names)[labels]


def folder_name(name: str) -> str:
    """A name as that of one folder, whatever a store calls its points and splits: what is no letter, digit, space, `.`,
    `_` or `-` becomes its number after a %, and so does a leading dot."""
    return re.sub(r"^\.|[^\w .-]", lambda letter: f"%{ord(letter[0]):02X}", name)


def views(view: View) -> dict[str, tuple[Axes | Figure, pd.DataFrame]]:
    """name -> (figure, what is drawn in it as a table)."""
    drawn = {"accuracy": layer_curve(view), "confusion": _confusion(view)}
    if view.kept.any():
        drawn["features"] = _feature_map(view)
    if view.pictures.pixels is None:
        return drawn
    drawn["neighbours"] = _neighbours(view)
    groups = changes(view.shown.labels, *view.predicted)
    if any(map(len, groups.values())):
        drawn["changes"] = _changes(view, groups)
    return drawn


def layer_curve(view: View) -> tuple[Axes, pd.DataFrame]:
    """The layer curve with the layer in view as a line, and its table."""
    table = view.answers.table
    n_test = len(view.shown.labels)
    table = table.assign(control=MODEL, chosen=table.layer == view.answers.chosen, n_test=n_test)
    place = view.layer
    if list(view.called) != [str(layer) for layer in table.layer]:
        table, place = table.assign(layer=list(view.called)), view.positions[0]
    ax = figures.layer_curve(table, title=view.title)
    ax.axvline(place, color="black", linewidth=0.6, zorder=0.5)
    ax.set_xlabel(f"{ax.get_xlabel()} (thin line: the one in view)")
    ax.set_ylabel(as_label(f"accuracy on {view.of} (%)", room=60))
    return ax, table


def _confusion(view: View) -> tuple[Axes, pd.DataFrame]:
    labels = view.shown.labels
    predicted = view.predicted[0]
    counts = confusion_matrix(labels, predicted, labels=np.arange(len(view.names)))
    table = pd.DataFrame(counts, pd.Index(view.names, name="true"), view.names)
    note = f"{view.point}, layer {view.layer_names[0]}: {(predicted == labels).mean():.1%} of {view.of} right"
    return figures.confusion_matrix(table, title=view.title, note=note), table


def _feature_map(view: View) -> tuple[Axes, pd.DataFrame]:
    position = view.positions[0]
    table = pd.DataFrame(view.spaces.places[position], columns=["x", "y"])
    table["row"] = view.shown.index
    table["label"] = view.named(view.shown.labels)
    table["predicted"] = view.named(view.predicted[0])
    table = view.with_files(table, range(len(table)))
    table = table[view.kept]
    note = f"{view.point}, layer {view.layer_names[0]}: {view.kept_in_words}"
    explained = view.spaces.explained[position]
    return figures.feature_map(table, names=view.names, explained=explained, title=view.title, note=note), table


def _neighbours(view: View) -> tuple[Figure, pd.DataFrame]:
    """The image and those nearest to it, in the layer above and in pixels below."""
    rows = {
        f"layer {view.layer_names[0]}": [view.image, *view.spaces.near[view.positions[0], view.image]],
        "pixels": [view.image, *view.pictures.near[view.image]],
    }
    shown = view.pictures.gallery[np.array(list(rows.values()))]
    figure = figures.row_gallery(shown, labels=list(rows), title=view.title)
    return figure, _listed(view, rows)


def _changes(view: View, groups: dict[str, np.ndarray]) -> tuple[Figure, pd.DataFrame]:
    """The first images of each group of `changes`."""
    layer, other = view.layer_names
    names = [f"only layer {layer} right", f"only layer {other} right", "both wrong, differently"]
    groups = dict(zip(names, groups.values(), strict=True))
    pixels = view.pictures.gallery
    shown = np.full((len(groups), IN_A_ROW, *pixels.shape[1:]), 255, np.uint8)
    for row, positions in zip(shown, groups.values(), strict=True):
        first = positions[:IN_A_ROW]
        row[: len(first)] = pixels[first]
    labels = [f"{name} ({len(positions):,})" for name, positions in groups.items()]
    return figures.row_gallery(shown, labels=labels, title=view.title), _listed(view, groups)


def _listed(view: View, groups: dict[str, Sequence[int]]) -> pd.DataFrame:
    """The images of each group by their rows in the source, with their classes and what the two layers predict."""
    tables = []
    for name, positions in groups.items():
        predicted = view.named(view.predicted[:, positions])
        table = pd.DataFrame({
            "group": name, "row": view.shown.index[positions], "label": view.named(view.shown.labels[positions]),
            f"layer_{view.layer_names[0]}": predicted[0], f"compared_layer_{view.layer_names[1]}": predicted[1],
        })  # fmt: skip
        tables.append(view.with_files(table, positions))
    return pd.concat(tables)
