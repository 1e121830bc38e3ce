"""What training with labels adds to a probe of the same network, on the same images: several ways to fine-tune it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from igpt_lab.core.arguments import checked
from igpt_lab.core.draws import spread
from igpt_lab.core.progress import tqdm
from igpt_lab.core.significance import accuracy
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.effects import average_difference, with_holm
from igpt_lab.probing.features import Features
from igpt_lab.probing.few_labels import FewLabelResult, probe_few_labels
from igpt_lab.probing.probes import probe_layers
from igpt_lab.probing.results import ProbeResult
from igpt_lab.training.classifier import Classified, classify
from igpt_lab.training.finetuning import finetune
from igpt_lab.training.settings import FinetuneConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOTH, ALONE = "L_gen + L_clf", "L_clf alone"  # what also meets few labels, and whose layers are probed afterwards
SCRATCH, HEAD = "from scratch", "head alone"
CHOSEN, LAST = "probe, chosen layer", "probe, last layer"


@dataclass(frozen=True, eq=False)
class FineTuningComparison:
    """`table`: a row for each (method, labels, draw, seed), two probes first, with the accuracy on test, its interval.

    `correct`: bool (N,) for each row of `table`, right or wrong on the test images. `summary`: a row for each (labels,
    method), over its runs. `pairs`: a row for each claim about methods with all labels (see `compare_fine_tuning`).
    `before`: the probe of all layers of the network as it was. `curves`: a row for each layer, of that probe and of
    those after L_gen + L_clf and after L_clf alone, of the first seed. `classified`: method -> what the network that
    was fine-tuned with all labels and the first seed says of the test images. `middle`: the layer of the head that is
    not on the last one. `settings`: what all runs have in common.
    """

    table: pd.DataFrame
    correct: list[np.ndarray]
    pairs: pd.DataFrame
    before: ProbeResult
    curves: pd.DataFrame
    classified: Mapping[str, Classified]
    middle: int
    settings: FinetuneConfig

    @property
    def summary(self) -> pd.DataFrame:
        """Mean, standard deviation over runs (seeds, or draws of few labels), and interval over test images.

        The interval holds the runs as they are (`draws.spread`); the deviation, nan for one run, the images.
        """
        rows = []
        for (labels, method), group in self.table.groupby(["labels", "method"], sort=False):
            over = spread([self.correct[row] for row in group.index])
            numbers = {"mean": over.mean, "sd": over.standard_deviation, "runs": over.n_draws}
            rows.append({"labels": labels, "method": method, **numbers, "low": over.low, "high": over.high})
        return pd.DataFrame(rows)

    def words(self) -> str:
        """Which layer but the last has a head, and whether it stands for the middle of the network."""
        last = max(self.before.correct)
        chosen = "was chosen by cross-validation" if self.middle == self.before.chosen else "was named"
        where = f"Layer {self.middle} of {last}, which {chosen}, has the head that is not on the last layer"
        late = "; it lies in the last quarter of the network, so that it does not stand for the middle"
        return where + (late if self.middle > 0.75 * last else "") + "."

    @property
    def mistakes(self) -> pd.DataFrame:
        """What the network fine-tuned with both losses gets wrong, the most confident first, by position in test."""
        classified = self.classified[BOTH]
        return classified.table().iloc[classified.mistakes(len(classified.index))]

    def plot(self, **options) -> Figure:
        """Methods and layer curves: `options` are arguments of `lab.figures.fine_tuning`."""
        from igpt_lab import figures

        return figures.fine_tuning(self.table, self.curves, **options)

    def to_dict(self) -> dict:
        """What a figure's record needs."""
        return {
            "settings": asdict(self.settings),
            "middle": self.middle,
            "summary": self.summary.astype(object).where(self.summary.notna(), None).to_dict("records"),
            "pairs": self.pairs.astype(object).where(self.pairs.notna(), None).to_dict("index"),
            "curves": self.curves.to_dict("list"),
        }


@checked
def compare_fine_tuning(
    model: ImageGPTForCausalImageModeling | str | Path,
    train_images: ImageSet | TokenSet,
    test_images: ImageSet | TokenSet,
    settings: FinetuneConfig,
    *,
    store: str | Path = "stores",
    per_class: int = 25,
    draws: int = 2,
    seeds: Sequence[int] = (0, 1, 2),
    middle: int | None = None,
    progress: bool = True,
) -> FineTuningComparison:
    """Fine-tune a model in five ways with all labels, and in two with few; probe it before and after.

    The ways: L_gen + L_clf; L_clf alone; both losses with the head on layer `middle`; both from scratch, with weights
    drawn anew by the seed; the head alone. Each runs with all `seeds`, which decide held-out images and batches. The
    first two also meet `draws` subsets of few labels, with the first seed. The probes are those of the chosen layer and
    of the last, with the same labels. Features of the network as it was go to `store`; runs are not kept.

    Args:
        model: One that predicts pixels in their order, or what `load_model` takes.
        train_images, test_images: Two splits with labels.
        settings: Of every run, but for what sets the ways apart.
        store: Folder of the stores.
        per_class: Labels per class where they are few.
        draws: Subsets of as many.
        seeds: Of the runs.
        middle: A layer from 1 to L, by default the one that cross-validation chose.
        progress: Show bars.

    Returns:
        `FineTuningComparison`. Its `table` has a row per run and probe: `method`, `labels`, `draw`, `seed`,
        `test_accuracy` with its exact 95% interval `low`, `high`, as fractions. `pairs` compares each way with the
        chosen layer's probe, the head on `middle` with the head on the last layer, and L_gen + L_clf with L_clf alone,
        on the same test images: `accuracy_a`, `accuracy_b`, `difference` (mean over seeds) with `sd` over seeds, and
        the interval `low`, `high` and `p_value` over the `n_test` test images (`effects.average_difference`); `p_holm`
        corrects for all of these claims. `curves` has the rows of `probe_layers` before and after.

    Raises:
        ValueError: `middle` out of range, images without labels or that do not fit the model, fewer labels of a class
            than `per_class`, and as `finetune`.

    Example:
        >>> two_classes = [images.select(np.flatnonzero(images.labels < 2)) for images in (train_images, test_images)]
        >>> settings = lab.FinetuneConfig(steps=1, batch_size=8, pad=0)
        >>> compared = lab.compare_fine_tuning(
        ...     "tiny", *two_classes, settings, per_class=2, draws=1, seeds=[0], middle=2, progress=False
        ... )
        step 0: ...
        >>> compared.table.groupby("labels", sort=False).method.nunique()
        labels
        all    7
        2      4
        Name: method, dtype: int64
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    last = model.config.n_layer
    if middle is not None and not 1 <= middle <= last:
        raise ValueError(f"middle={middle}; expected a layer from 1 to {last}, on which a head can sit")
    train, test = _features(model, train_images, test_images, store, progress)
    before = probe_layers(train, test, progress=progress)
    few = probe_few_labels(train, test, ks=[per_class], draws=draws, layers=[last], progress=progress)
    (rows, correct), curves = _probe_rows(before, few, last), [before.table]
    middle = max(1, before.chosen) if middle is None else middle
    methods = _methods(settings, middle, before.chosen)
    classified: dict[str, Classified] = {}
    runs = _runs(methods, seeds, per_class, draws)
    for method, tuning in tqdm(runs, desc="fine-tuning", unit="run", disable=not progress):
        with tempfile.TemporaryDirectory() as folder:
            start = _from_scratch(model, tuning.seed) if method == SCRATCH else model
            finetune(start, train_images, tuning, folder, progress=False)
            result = classify(folder, test_images, progress=False)
            labels = "all" if tuning.per_class is None else str(per_class)
            facts = {"method": method, "labels": labels, "draw": tuning.draw, "seed": tuning.seed}
            rows.append({**facts, **result.accuracy()})
            correct.append(result.correct)
            if tuning.per_class is not None or method in classified:
                continue
            classified[method] = result
            if method in (BOTH, ALONE):
                tuned = load_model(f"{folder}/causal")
                train, test = _features(tuned, train_images, test_images, f"{folder}/stores", progress=False)
                curves.append(probe_layers(train, test, control=f"after {method}", progress=False).table)
    table = pd.DataFrame(rows)
    pairs = _pairs(table, correct, list(methods))
    all_curves = pd.concat(curves, ignore_index=True)
    return FineTuningComparison(table, correct, pairs, before, all_curves, classified, middle, settings)


def _features(
    model: ImageGPTForCausalImageModeling, train_images: ImageSet | TokenSet, test_images: ImageSet | TokenSet,
    store: str | Path, progress: bool,
) -> tuple[Features, Features]:  # fmt: skip
    """Of the training and of the test images."""
    features = extract(model, [train_images, test_images], store=store, progress=progress)
    return Features.from_store(features, train_images.split), Features.from_store(features, test_images.split)


def _methods(settings: FinetuneConfig, middle: int, chosen: int) -> dict[str, FinetuneConfig]:
    on_layer = f"head on the chosen layer, {middle}" if middle == chosen else f"head on layer {middle}"
    return {
        BOTH: settings,
        ALONE: replace(settings, generative=0.0),
        on_layer: replace(settings, layer=middle),
        SCRATCH: settings,
        HEAD: replace(settings, head_only=True),
    }


def _runs(
    methods: Mapping[str, FinetuneConfig], seeds: Sequence[int], per_class: int, draws: int
) -> list[tuple[str, FinetuneConfig]]:
    """The method and the settings of each run: all ways and seeds with all labels, then two of them with few."""
    runs = [(method, replace(tuning, seed=seed)) for method, tuning in methods.items() for seed in seeds]
    for method in (BOTH, ALONE):
        few = replace(methods[method], per_class=per_class, draws=draws, seed=seeds[0])
        runs += [(method, replace(few, draw=draw)) for draw in range(draws)]
    return runs


def _pairs(table: pd.DataFrame, correct: Sequence[np.ndarray], methods: Sequence[str]) -> pd.DataFrame:
    """A row for each claim; of two methods the runs of the same seed are compared."""
    claims = [(method, CHOSEN) for method in methods] + [(methods[2], BOTH), (BOTH, ALONE)]
    rows = {}
    for a, b in claims:
        of_a, of_b = (
            np.stack([correct[row] for row in table.index[(table.method == method) & (table.labels == "all")]])
            for method in (a, b)
        )
        differences = of_a.astype(int) - of_b
        over_seeds = float(differences.mean(1).std(ddof=1)) if len(differences) > 1 else float("nan")
        means = {"accuracy_a": float(of_a.mean()), "accuracy_b": float(of_b.mean())}
        rows[f"{a} less {b}"] = means | average_difference(differences) | {"sd": over_seeds, "seeds": len(differences)}
    return with_holm(pd.DataFrame.from_dict(rows, orient="index"))


def _from_scratch(model: ImageGPTForCausalImageModeling, seed: int) -> ImageGPTForCausalImageModeling:
    """A network of the same shape with weights drawn anew."""
    scratch = ImageGPTForCausalImageModeling(model.config, generator=torch.Generator().manual_seed(seed))
    scratch.name, scratch.processor = f"{model.name}-random", model.processor
    scratch.source = {**model.source, "random": True, "seed": seed}
    return scratch


def _probe_rows(before: ProbeResult, few: FewLabelResult, last: int) -> tuple[list[dict], list[np.ndarray]]:
    """Rows of the two probes, with all labels and with few, and which test images each gets right."""
    rows, right = [], []
    for method, layer, rule in ((CHOSEN, before.chosen, "chosen"), (LAST, last, "fixed")):
        runs = [("all", 0, before.correct[layer])]
        for row, correct in zip(few.table.itertuples(), few.correct, strict=True):
            if row.layer_rule == rule:
                runs.append((str(row.k), int(row.draw), correct))
        for labels, draw, correct in runs:
            rows.append({"method": method, "labels": labels, "draw": draw, "seed": 0, **accuracy(correct)})
            right.append(correct)
    return rows, right
