"""The rows of a store that the explorer looks at, and what is computed of them, each when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from igpt_lab.app.explorer.kept import answers_of, keep, kept
from igpt_lab.app.explorer.layers import Answers, Spaces, ask_few, ask_held, by_number, survey, take_rows
from igpt_lab.app.explorer.opened import CLOSED, Computed
from igpt_lab.app.explorer.pictures import Pictures, Source, load_pictures
from igpt_lab.features.store import FeatureStore
from igpt_lab.images.splits import stratified_split
from igpt_lab.probing.features import Features
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult

HELD = "held out"  # a tenth of train, by probes that saw the other nine
COUNTS = (1, 4, 25, 100, 400)  # labels per class, where train has them


class Rows:
    """What is computed of `point`, `split` and `count`; explorers of one store share it."""

    store: FeatureStore
    limit: int | None
    point: str
    split: str
    count: int
    _computed: Computed | None
    _sources: Mapping[str, Source | str]
    _progress: bool
    busy: str  # what the browser is told meanwhile

    @property
    def splits(self) -> list[str]:
        """Splits on offer: those of the store but train, and the held-out tenth of train."""
        return [*(split for split in self.store.splits if split != "train"), HELD]

    @property
    def counts(self) -> list[int]:
        """Labels per class on offer; 0 stands for all."""
        smallest_class = np.unique(self.train.labels, return_counts=True)[1].min()
        return [0, *(count for count in COUNTS if count <= smallest_class)]

    @property
    def train(self) -> Features:
        """The rows that the probes learn from: all of train, or nine tenths where the last tenth is shown."""
        train = self._once(("train", self.point), lambda: self._stored("train"))
        return train if self.split != HELD else take_rows(train, stratified_split(train.labels, 0.1, seed=0)[0])

    @property
    def shown(self) -> Features:
        """The rows that are looked at."""
        return self._once(("shown", self.point, self.split, self.limit), self._draw_rows)

    @property
    def answers(self) -> Answers:
        """What the probes of all layers predict for the rows shown; they are fitted when this is first asked."""
        return self._once(self._asked, self._fit_probes)

    @property
    def answers_at_hand(self) -> Answers | None:
        """The same where the probes were fitted before, in an earlier explorer too; else None."""
        if self._computed is None or self._asked in self._computed:
            return self.answers
        answers = kept(self.store, self._asked, self.shown, self.train)
        return answers and self._once(self._asked, lambda: answers)

    @property
    def seen(self) -> Pictures:
        """The images of the rows shown."""
        source = self._sources[self._store_split]
        why = source if isinstance(source, str) else ""
        return self._once(("pictures", self.split, why, self.limit), lambda: load_pictures(source, self.shown.index))

    @property
    def spaces(self) -> Spaces:
        """Places float32 (L, N, 2), shares of the variance (L, 2) and neighbours int (L, N, k) of the rows shown."""
        return self._once(("spaces", self.point, self.split, self.limit), lambda: survey(self.shown.layers))

    @property
    def classes(self) -> list[str]:
        """Names of the classes, from the image set where it is at hand, else from the store."""
        highest = int(max(self.train.labels.max(), self.shown.labels.max()))
        sources = [source for source in self._sources.values() if isinstance(source, Source)]
        names = sources[0].images.label_names if sources else self.store.classes
        return [names[i] if i < len(names) else str(i) for i in range(highest + 1)]

    def check(self, name: str, value) -> None:
        """ValueError where `value` is no layer (`layer`, `other`), image or classes (`alone`) of what is shown."""
        layers, count = list(self.shown.layers), len(self.shown.labels)
        classes = range(len(self.classes))
        if name in ("layer", "other") and value not in layers:
            raise ValueError(f"{name} {value}; expected one of {', '.join(map(str, layers))}")
        if name == "image" and not 0 <= value < count:
            raise ValueError(f"image {value}; expected a position among those shown, 0 to {count - 1}")
        is_pair = name == "alone" and set(value) in ({"label"}, {"label", "predicted"})
        if name == "alone" and value and not (is_pair and all(label in classes for label in value.values())):
            raise ValueError(f"alone {value}; expected a label, or a label and predicted, from 0 to {classes[-1]}")

    @property
    def _asked(self) -> tuple:
        return ("answers", self.point, self.split, self.count, self.limit)

    @property
    def _store_split(self) -> str:
        """The split of the store that the rows shown are of."""
        return "train" if self.split == HELD else self.split

    def _take(self, result: ProbeResult) -> None:
        """Let a result of the point and split that are chosen answer for them."""
        if self.split == HELD:
            raise ValueError(f"{self.store.path.name} has no split but train, so that no result answers for it")
        answers = answers_of(result, self._stored("train"), self._stored(self.split), self.shown)
        if self._computed is not None:
            self._computed[self._asked] = answers

    def _stored(self, split: str) -> Features:
        """A split's features, layers by their numbers."""
        return by_number(Features.from_store(self.store, split, self.point))

    def _named(self, layers: Sequence[int]) -> list[str]:
        """What these layers are called."""
        return [self.store.names[layer] if self.store.names else str(layer) for layer in layers]

    def _once(self, key: tuple, compute: Callable):
        if self._computed is None:
            raise ValueError(CLOSED)
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def _draw_rows(self) -> Features:
        features = self._stored(self._store_split)
        if self.split == HELD:
            features = take_rows(features, stratified_split(features.labels, 0.1, seed=0)[1])
        n = len(features.labels)
        if self.limit is not None and self.limit < n:
            features = take_rows(features, np.sort(np.random.default_rng(0).permutation(n)[: self.limit]))
        return replace(features, layers=dict(features.layers))

    def _fit_probes(self) -> Answers:
        if (answers := kept(self.store, self._asked, self.shown, self.train)) is not None:
            return answers
        answers = self._fitted()
        keep(self.store, self._asked, answers)
        return answers

    def _fitted(self) -> Answers:
        if self.count:
            return ask_few(self.train, self.shown, self.count)
        if self.split == HELD:
            return ask_held(self.train, self.shown, self._once(("whole", self.point), self._probe_held).table)
        result = probe_layers(self.train, self.shown, progress=self._progress and not self.busy)
        self._once(("whole", self.point), lambda: result)
        return Answers(result.table, result.chosen, np.stack(list(result.predicted.values())))

    def _probe_held(self) -> ProbeResult:
        """C of every layer, and the layer, as all of train chooses them; nothing else is used of the result."""
        train = self._stored("train")
        held = take_rows(train, stratified_split(train.labels, 0.1, seed=0)[1])
        return probe_layers(train, held, progress=self._progress and not self.busy)
