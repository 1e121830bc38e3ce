"""What training with labels adds to a probe of the same network, on the same images: several ways to fine-tune it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from igpt_lab.core.arguments import checked
from igpt_lab.core.significance import accuracy, compare
from igpt_lab.features.extraction import extract
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.models.imagegpt import ImageGPTForCausalImageModeling
from igpt_lab.models.loading import load_model
from igpt_lab.probing.few_labels import FewLabelResult, probe_few_labels
from igpt_lab.probing.probes import Features, ProbeResult, probe_layers
from igpt_lab.training.classifier import Classified, classify
from igpt_lab.training.finetuning import finetune
from igpt_lab.training.settings import FinetuneConfig

BOTH, ALONE = "L_gen + L_clf", "L_clf alone"  # what also meets few labels, and whose layers are probed afterwards
SCRATCH, HEAD = "from scratch", "head alone"


@dataclass(frozen=True, eq=False)
class FineTuningComparison:
    """`table`: a row for each (method, labels, draw), two probes first, with the accuracy on test and its interval.

    `pairs`: a row for each way to fine-tune with all labels, compared with the best layer's probe on the same test
    images (`significance.compare`). `before`: the probe of all layers of the network as it was. `curves`: a row for
    each layer, of that probe and of those after L_gen + L_clf and after L_clf alone. `classified`: method -> what the
    network that was fine-tuned with all labels says of the test images. `settings`: what all runs have in common.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    before: ProbeResult
    curves: pd.DataFrame
    classified: Mapping[str, Classified]
    settings: FinetuneConfig

    @property
    def mistakes(self) -> pd.DataFrame:
        """What the network fine-tuned with both losses gets wrong, the most confident first, by position in test."""
        classified = self.classified[BOTH]
        return classified.table().iloc[classified.mistakes(len(classified.index))]

    def to_dict(self) -> dict:
        """What a figure's record needs."""
        return {
            "settings": asdict(self.settings),
            "pairs": self.pairs.to_dict("index"),
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
    progress: bool = True,
) -> FineTuningComparison:
    """Fine-tune `model` in five ways with all labels, and in two with `per_class` labels; probe it before and after.

    The ways: L_gen + L_clf; L_clf alone; both losses with the head on the layer that the probe chose; both from
    scratch, with weights drawn anew (seed 0); the head alone. The first two also meet `draws` subsets of `per_class`
    labels of each class. `settings` are those of every run, but for what sets the ways apart. The probes are those of
    the chosen layer and of the last, with the same labels. Features of the network as it was go to `store`; runs are
    not kept.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    train, test = _features(model, train_images, test_images, store, progress)
    before = probe_layers(train, test, progress=progress)
    last = model.config.n_layer
    few = probe_few_labels(train, test, ks=[per_class], draws=draws, layers=[last], progress=progress)
    rows, curves = _probe_rows(before, few, last), [before.table]
    pairs: dict[str, dict] = {}
    classified: dict[str, Classified] = {}
    runs = _runs(settings, max(1, before.chosen), per_class, draws)
    for method, tuning in tqdm(runs, desc="fine-tuning", unit="run", disable=not progress):
        with tempfile.TemporaryDirectory() as folder:
            start = _from_scratch(model) if method == SCRATCH else model
            finetune(start, train_images, tuning, folder, progress=False)
            result = classify(folder, test_images, progress=False)
            labels = "all" if tuning.per_class is None else str(per_class)
            rows.append({"method": method, "labels": labels, "draw": tuning.draw, **result.accuracy()})
            if tuning.per_class is not None:
                continue
            classified[method] = result
            pairs[method] = compare(result.correct, before.correct[before.chosen]).to_dict()
            if method in (BOTH, ALONE):
                tuned = load_model(f"{folder}/causal")
                train, test = _features(tuned, train_images, test_images, f"{folder}/stores", progress=False)
                curves.append(probe_layers(train, test, control=f"after {method}", progress=False).table)
    table, paired = pd.DataFrame(rows), pd.DataFrame.from_dict(pairs, orient="index")
    return FineTuningComparison(table, paired, before, pd.concat(curves, ignore_index=True), classified, settings)


def _features(
    model: ImageGPTForCausalImageModeling, train_images: ImageSet | TokenSet, test_images: ImageSet | TokenSet,
    store: str | Path, progress: bool,
) -> tuple[Features, Features]:  # fmt: skip
    """Of the training and of the test images."""
    features = extract(model, [train_images, test_images], store=store, progress=progress)
    return Features.from_store(features, train_images.split), Features.from_store(features, test_images.split)


def _runs(settings: FinetuneConfig, middle: int, per_class: int, draws: int) -> list[tuple[str, FinetuneConfig]]:
    """The method and the settings of each run: all ways with all labels, then two of them with few."""
    methods = {
        BOTH: settings,
        ALONE: replace(settings, generative=0.0),
        f"{BOTH}, head on layer {middle}": replace(settings, layer=middle),
        SCRATCH: settings,
        HEAD: replace(settings, head_only=True),
    }
    runs = list(methods.items())
    for method in (BOTH, ALONE):
        few = replace(methods[method], per_class=per_class, draws=draws)
        runs += [(method, replace(few, draw=draw)) for draw in range(draws)]
    return runs


def _from_scratch(model: ImageGPTForCausalImageModeling) -> ImageGPTForCausalImageModeling:
    """A network of the same shape with weights drawn anew."""
    scratch = ImageGPTForCausalImageModeling(model.config, generator=torch.Generator().manual_seed(0))
    scratch.name, scratch.processor = f"{model.name}-random", model.processor
    scratch.source = {**model.source, "random": True, "seed": 0}
    return scratch


def _probe_rows(before: ProbeResult, few: FewLabelResult, last: int) -> list[dict]:
    """Rows of the two probes, with all labels and with few."""
    rows = []
    for method, layer, rule in (("probe, best layer", before.chosen, "chosen"), ("probe, last layer", last, "fixed")):
        rows.append({"method": method, "labels": "all", "draw": 0, **accuracy(before.correct[layer])})
        for row, correct in zip(few.table.itertuples(), few.correct, strict=True):
            if row.layer_rule == rule:
                rows.append({"method": method, "labels": str(row.k), "draw": row.draw, **accuracy(correct)})
    return rows
