"""OpenAI's released weights beside what was published of them: stages in a row, each kept as files in one folder.

A stage that is finished is found again by its last file, which is whole or absent. No number here is a reference of
this package: nobody has run it with the released weights yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import igpt_lab as lab
from igpt_lab.app import paper_files
from igpt_lab.core.devices import best_device
from igpt_lab.core.display import MODEL
from igpt_lab.core.published import SETS, plain, verdict
from igpt_lab.explaining.predictions import describe
from igpt_lab.images.image_sets import ImageSet, TokenSet
from igpt_lab.images.sources import title_of
from igpt_lab.models import openai
from igpt_lab.models.loading import tokens_of
from igpt_lab.models.losses import losses_of
from igpt_lab.probing.ablation import probe_as_transformers
from igpt_lab.probing.few_labels import PAPER_DRAWS, PAPER_KS

ROWS = 1_000  # images of a part of the loss
PUBLISHED_STEP = 1_000_000  # of the checkpoints whose numbers were published
LOSS_IMAGES = "ImageNet"  # whose test tokens the published losses are of
OURS, PAPER = "ours", "paper"  # protocols
TRANSFORMERS = "transformers"
FOLDS = {PAPER: 1, OURS: 10}  # of the cross-validation; one holds out a tenth
NOT_SETTINGS = ("out", "cache", "device")  # on which no number depends


@dataclass(frozen=True)
class Paper:
    """What is asked for: a published checkpoint, the images of its probes, and where files go.

    `images` None are the published tokens of CIFAR-10; `limit` is the largest number of images of a split.
    """

    size: str
    step: int
    bert: bool
    images: str | None
    limit: int | None
    out: Path
    cache: str | None
    device: str | None

    def begin(self) -> None:
        """Note in the folder what is asked for; ValueError where it is of something else."""
        asked = {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}
        asked["version"] = lab.__version__
        if self.images is not None:  # the published tokens are always the same
            asked["fingerprints"] = [split.fingerprint for split in self.splits]
        paper_files.note_once(self.out, asked)

    @property
    def name(self) -> str:
        """The name of the model, and of its folder."""
        return f"imagegpt-{self.size}{'-bert' if self.bert else ''}"

    @property
    def title(self) -> str:
        """The name of the images."""
        return "CIFAR-10" if self.images is None else title_of(self.images)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Images of train and test, whatever the limit."""
        if self.images is None:
            return SETS["cifar10"]
        train, test = (len(lab.load_images(self.images, split)) for split in ("train", "test"))
        return train, test

    @property
    def has_published_images(self) -> bool:
        """Whether there are as many images as in the set of their name, before the limit."""
        return self.counts == SETS.get(plain(self.title))

    @property
    def not_compared(self) -> str:
        """Why accuracies are not compared with published ones: fewer images, or another set of that name; else ''."""
        if self.limit is not None:
            return f"not compared: at most {self.limit:,} images of a split"
        if self.has_published_images:
            return ""
        return "not compared: {:,} and {:,} images are not those of the published set".format(*self.counts)

    @property
    def has_loss(self) -> bool:
        """Whether it predicts the next pixel: the losses of BERT models were not published."""
        return not self.bert

    def published(self, experiment: str, images: str | None = None) -> pd.DataFrame:
        """What was published of this checkpoint; no rows for a BERT model and for earlier steps."""
        rows = lab.published(self.size, images or self.title, experiment)
        return rows if self.has_loss and self.step == PUBLISHED_STEP else rows[:0]

    @property
    def has_recipe(self) -> bool:
        """Whether there is a published curve by the recipe of transformers' notebook."""
        return bool(self.published("linear probe").layer.notna().any())

    # What the stages start from

    @cached_property
    def model(self) -> Any:
        """The converted model, downloaded where it is not yet in the folder."""
        folder = self.out / self.name
        if not (folder / "config.json").is_file():  # which is written last
            lab.convert_openai(lab.download_openai(self.size, self.step, bert=self.bert, cache=self.cache), folder)
        return lab.load_model(folder)

    def tokens(self, name: str, splits: list[str]) -> Path:
        """A published token set with these splits, downloaded where it is not yet in the cache."""
        folder = Path(self.cache) if self.cache else openai.cache_folder()
        return lab.download_openai(datasets=[name], splits=splits, cache=folder) / name

    @cached_property
    def splits(self) -> list[ImageSet | TokenSet]:
        """Train and test; of the published tokens train has the validation split, as the paper folds it back."""
        if self.images is not None:
            return [lab.load_images(self.images, split, limit=self.limit) for split in ("train", "test")]
        path = self.tokens("cifar10", list(openai.SPLITS))
        train = _joined(*(lab.load_tokens(path, split) for split in ("train", "validation")))
        return [lab.load_images(split, limit=self.limit) for split in (train, lab.load_tokens(path, "test"))]

    def features(self, point: str = "ln_1", **settings: Any) -> tuple[lab.Features, lab.Features]:
        """Of train and test, from a store in the folder, which is filled where it is not."""
        store = lab.extract(self.model, self.splits, store=self.out / "stores", device=self.device, **settings)
        train, test = (lab.Features.from_store(store, split.split, point) for split in self.splits)
        return train, test

    # The stages

    def loss(self) -> pd.DataFrame:
        """One row: the loss over the published test tokens of ImageNet, or a draw of them, in nats per token."""
        path = self.tokens("imagenet", ["test"])
        every = len(lab.load_tokens(path, "test"))
        tokens = lab.load_images(path, "test", limit=self.limit)
        parts = [self._part_of_loss(tokens, start) for start in range(0, len(tokens), ROWS)]
        nats = np.concatenate(parts)
        error = nats.std(ddof=1) / math.sqrt(len(nats)) * math.sqrt(1 - len(nats) / every) if len(nats) > 1 else np.nan
        return pd.DataFrame([{"nats": nats.mean(), "standard_error": error, "n": len(nats), "n_all": every}])

    def _part_of_loss(self, tokens: Any, start: int) -> np.ndarray:
        """Nats of each of ROWS images, from a file of their own where they are done."""
        some = tokens.select(np.arange(start, min(start + ROWS, len(tokens))))

        def measure() -> np.ndarray:
            model = self.model.to(best_device(self.device))
            return losses_of(model, tokens_of(model, some), progress=True)

        return paper_files.kept_losses(self.out / "loss" / f"{start:06d}.npy", len(some), measure)

    def probe(self, protocol: str) -> pd.DataFrame:
        """A row per layer: `ProbeResult.table`, with the difference of each to the chosen layer and to the last."""
        if protocol == TRANSFORMERS:
            points = ("ln_1", "resid_pre")
            normed, unnormed = (self.features(point, points=points, alignment="raw") for point in points)
            result = probe_as_transformers(normed, unnormed, self.model.config.n_layer, device=self.device)
        else:
            result = lab.probe_layers(*self.features(), folds=FOLDS[protocol], device=self.device)
        differences = lab.layer_table(result, chosen=result.chosen).filter(regex="^layer$|^minus_")
        return result.table.merge(differences, on="layer")

    def few_labels(self) -> pd.DataFrame:
        """A row per number of labels a class and rule of the layer: `FewLabelResult.summary`."""
        train, test = self.features()
        ks = [k for k in PAPER_KS if k <= np.bincount(train.labels).min()]
        if not ks:
            return pd.DataFrame(columns=["k", "layer_rule"])
        return lab.probe_few_labels(train, test, ks=ks, draws=PAPER_DRAWS, device=self.device).summary().reset_index()

    def explain(self) -> pd.DataFrame:
        """The answers of `lab.explain`; its figures and tables go to a folder of their own."""
        from igpt_lab.app.commands.explaining import explain_into

        rows = self.kept(f"probe_{OURS}", partial(self.probe, OURS))
        chosen, last = int(rows.layer[rows.chosen.astype(bool)].iloc[0]), int(rows.layer.max())
        options: dict[str, Any] = {"store": self.out / "stores", "seed": 0, "device": self.device}
        options["chosen"] = chosen if 0 < chosen < last else None
        facts = {"images": self.title, "limit": self.limit, "model": self.name}
        train, test = self.splits
        return explain_into(self.out / "explain", self.model, train, test, facts, options)[0]["answers"]

    def kept(self, name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table of a stage, measured where it is not in the folder."""
        return paper_files.kept_table(self.out, name, measure)

    def measured(self) -> dict[str, pd.DataFrame]:
        """Every stage's table by its name."""
        tables: dict[str, pd.DataFrame] = {}
        if self.has_loss:
            tables["loss"] = self.kept("loss", self.loss)
        for protocol in [*FOLDS, *[TRANSFORMERS] * (self.has_recipe and self.has_published_images)]:
            tables[f"probe_{protocol}"] = self.kept(f"probe_{protocol}", partial(self.probe, protocol))
        tables["few_labels"] = self.kept("few_labels", self.few_labels)
        if self.has_loss:  # the predictions are of models that predict the next pixel
            tables["answers"] = self.kept("explain/answers", self.explain)
        return tables

    # The numbers beside the published ones

    def rows(self, tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
        """A row per number that was measured, with the published one where there is one."""
        if "loss" in tables:
            of_loss = tables["loss"].iloc[0]
            reach = 0 if of_loss.n == of_loss.n_all else 1.96 * of_loss.standard_error
            numbers = (of_loss.nats, of_loss.nats - reach, of_loss.nats + reach)
            name = f"loss, {LOSS_IMAGES} test tokens, {of_loss.n:,.0f} of {of_loss.n_all:,.0f} images"
            yield _row(name, numbers, "nats", self.published("loss", LOSS_IMAGES), "")
        for protocol in FOLDS:
            yield from self._of_probe(protocol, tables[f"probe_{protocol}"])
        few = tables["few_labels"]
        for row in few[few.layer_rule == "chosen"].itertuples():
            theirs = self.published("few labels")
            theirs = theirs[theirs.setting == f"{row.k} labels a class"]
            over_draws = pd.notna(row.low_all)  # of draws of the same images there is no such interval
            numbers = (row.mean, *((row.low_all, row.high_all) if over_draws else (row.low, row.high)))
            yield _row(f"{row.k} labels a class, chosen layer", numbers, "fraction", theirs, self.not_compared)
        for row in tables.get(f"probe_{TRANSFORMERS}", pd.DataFrame()).itertuples():
            theirs = self.published("linear probe")
            numbers = (row.test_accuracy, row.low, row.high)
            name = f"linear probe as in transformers' notebook, layer {row.layer}"
            yield _row(name, numbers, "fraction", theirs[theirs.layer == row.layer], self.not_compared)

    def _of_probe(self, protocol: str, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """The chosen layer's accuracy, and what it has more than the last layer."""
        words = {PAPER: "a tenth held out, as in the paper", OURS: "ten folds, as everywhere here"}[protocol]
        chosen = rows[rows.chosen.astype(bool)].iloc[0]
        theirs = self.published("linear probe")
        numbers = (chosen.test_accuracy, chosen.low, chosen.high)
        name = f"linear probe, {words}, chosen layer {chosen.layer}"
        yield _row(name, numbers, "fraction", theirs[theirs.layer.isna()], self.not_compared)
        numbers = (chosen.minus_last, chosen.minus_last_low, chosen.minus_last_high)
        theirs = self.published("best layer less last")
        yield _row(f"chosen layer less last, {words}", numbers, "fraction", theirs, self.not_compared)

    def summary(self, tables: dict[str, pd.DataFrame]) -> tuple[str, pd.DataFrame]:
        """`rows` in words and as a table, and the answers to the predictions."""
        rows = pd.DataFrame(self.rows(tables))
        lines = [f"{self.name}, step {self.step:,}, on {self.title}", *map(_in_words, rows.to_dict("records"))]
        return "\n".join([*lines, *(describe(tables[name]) for name in tables if name == "answers")]), rows

    def curves(self, tables: dict[str, pd.DataFrame]) -> list[Path]:
        """The layer curve of every protocol, with the published accuracies, as files of a figure."""
        names = {OURS: MODEL, PAPER: "a tenth held out", TRANSFORMERS: "as in transformers' notebook"}
        drawn = [tables[f"probe_{p}"].assign(control=name) for p, name in names.items() if f"probe_{p}" in tables]
        data, theirs = pd.concat(drawn, ignore_index=True), self.published("linear probe")
        title = f"{self.name} on {self.title}"
        curve = lab.figures.layer_curve(
            data, title=title, published=theirs if self.has_published_images and len(theirs) else None
        )
        record = lab.RunRecord("paper", json.loads((self.out / "paper.json").read_bytes()), seed=0)
        return lab.figures.save_figure(curve, self.out / "layer_curve", data=data, record=record)


def _in_words(row: dict[str, Any]) -> str:
    """A line: the number with its interval, the published one with its source, the verdict."""
    form = "{:.4f}" if row["unit"] == "nats" else "{:.1%}"
    ours, low, high, theirs = (form.format(row[name]) for name in ("ours", "low", "high", "published"))
    std = "" if pd.isna(row["published_std"]) else f" (sd {form.format(row['published_std'])})"
    beside = f"published {theirs}{std}, {row['source']}: " if row["source"] else ""
    return f"{row['quantity']}: {ours} [{low}, {high}]; {beside}{row['verdict']}"


def _joined(*parts: TokenSet) -> TokenSet:
    """Token sets as one, under the name and the split of the first."""
    tokens = np.concatenate([part.tokens for part in parts])
    labels = np.concatenate([part.require_labels() for part in parts])
    first = parts[0]
    return TokenSet(first.name, first.split, np.arange(len(tokens)), labels, first.label_names, tokens)


def _row(
    quantity: str, numbers: tuple[float, float, float], unit: str, theirs: pd.DataFrame, not_compared: str
) -> dict[str, Any]:
    """A number with its interval beside the published one, the only row of `theirs`, which may have none."""
    ours = dict(zip(("ours", "low", "high"), map(float, numbers), strict=True))
    if theirs.empty:
        beside = {"published": np.nan, "published_std": np.nan, "source": "", "verdict": "nothing published"}
    else:
        row = theirs.iloc[0]
        judged = not_compared or verdict(ours["ours"], ours["low"], ours["high"], row)
        beside = {"published": row.value, "published_std": row["std"], "source": row.source, "verdict": judged}
    return {"quantity": quantity, "unit": unit, **ours, **beside}
