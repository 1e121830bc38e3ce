"""Pages of docs/, and the tables of README and the model cards, from the files in results/ and templates.

No measured number there is typed by hand.

python docs/make_results.py        write them again, as `make reference` does at its end
python docs/make_results.py --check    fail where one of them is not what the files give
"""

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from igpt_lab.core.display import MODEL, span
from igpt_lab.core.provenance import atomic_write
from igpt_lab.core.significance import compare, holm
from igpt_lab.explaining.predictions import PREDICTIONS
from igpt_lab.probing.effects import AT
from igpt_lab.probing.results import Comparison

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: ROOT / f"docs/{name}.md" for name in ("results", "why_the_middle", "benchmarks")}
README = ROOT / "README.md"
CARDS = {name: ROOT / f"igpt_lab/bundled/{name}/README.md" for name in ("fashion-xs", "cifar10-xs")}
README_ROWS = ("chosen", "first", "last", "raw pixels, linear", "raw pixels, SVM", "three random")
SEED_STUDIES = ("seeds", "equal_loss", "fashion_seeds")
MEASURES = {"depth": ".0f", "height": ".1f", "drop": "+.1f"}  # of seeds, in % or points
SHIFT_MEASURES = {"height": ".1f", "drop": "+.1f", "best_depth": ".0f", "drop_change": "+.1f"}


@lru_cache
def table(name: str) -> pd.DataFrame:
    """results/NAME.csv."""
    return pd.read_csv(ROOT / "results" / f"{name}.csv", keep_default_na=False, na_values=["", "nan"])


@lru_cache
def config(name: str) -> dict[str, Any]:
    """What results/NAME.json keeps of how the figure was made."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))["config"]


class Run:
    """A folder of results/: its layer curve, and its other tables by name."""

    def __init__(self, folder: str):
        self.folder = folder

    def table(self, name: str) -> pd.DataFrame:
        return table(f"{self.folder}/{name}")

    def config(self, name: str) -> dict[str, Any]:
        return config(f"{self.folder}/{name}")

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The model's own curve, a row a layer."""
        curve = self.table("layer_curve")
        return curve[curve.control == MODEL].set_index("layer")

    @cached_property
    def chosen(self) -> pd.Series:
        return self.layers[self.layers.chosen.astype(bool)].iloc[0]

    @cached_property
    def last(self) -> pd.Series:
        return self.layers.loc[self.layers.index.max()]

    @property
    def comparison(self) -> dict[str, Any]:
        return self.config("layer_curve")["comparison"]

    @property
    def drops(self) -> dict[str, Any]:
        return self.config("layer_curve")["drop less that of random networks"]

    @property
    def selectivity_lost(self) -> dict[str, Any]:
        return self.config("selectivity")["drop of selectivity"]

    @cached_property
    def neighbours(self) -> pd.Series:
        rows = self.control("nearest neighbours", "companions")
        return rows[rows.chosen.astype(bool)].iloc[0]

    @property
    def likeness(self) -> pd.Series:
        return self.table("likeness").set_index("measure").loc["classifier"]

    def geometry(self, column: str, control: str = MODEL) -> pd.Series:
        rows = self.control(control, "geometry").set_index("layer")
        return rows[column]

    def range_of(self, column: str, digits: int) -> str:
        """The least and the largest value over layers, with the layer of the largest."""
        values = self.geometry(column)
        return f"{values.min():.{digits}f} to {values.max():.{digits}f} (layer {values.idxmax()})"

    def effects(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Averages, the recipe and interactions of the protocol: words, and a cell for each of `AT`."""
        rows = pd.DataFrame(self.config("protocol")["effects"])
        rows = rows[rows.others.isin(["average", ""])]
        lines = []
        for (factor, a, b), cells in rows.groupby(["factor", "a", "b"], sort=False):
            words = f"interaction of {a} and {b}" if factor == "interaction" else f"`{a}` less `{b}`"
            lines.append((words, cells.set_index("at").loc[list(AT)].to_dict("records")))
        return lines

    def stopped(self) -> list[dict[str, Any]]:
        """What a stopped fit and a converged one give over repeats that should all be the same."""
        rows = pd.DataFrame(self.config("protocol")["stopped"])
        setting = rows.alignment + ", " + rows.point + ", " + rows.scaling
        stopped = [reach(ends) for ends in zip(rows["min"], rows["max"], strict=True)]
        converged = [reach(ends) for ends in zip(rows.converged_min, rows.converged_max, strict=True)]
        return rows.assign(setting=setting, stopped=stopped, converged=converged).to_dict("records")

    def ks(self) -> list[int]:
        return sorted(set(self.table("few_label_curve").k))

    def few(self, k: int, control: str = MODEL) -> dict[str, float]:
        """Accuracy with k labels of each class over draws, the layer chosen inside them."""
        rows = self.control(control, "few_label_curve")
        rows = rows[(rows.k == k) & (rows.layer_rule == "chosen")]
        facts = rows[["low_all", "high_all", "overlap"]].iloc[0].to_dict()
        return {"mean": rows.test_accuracy.mean(), "sd": rows.test_accuracy.std()} | facts

    @property
    def is_explained(self) -> bool:
        """Whether notebook 9 has run."""
        return (ROOT / "results" / self.folder / "answers.csv").exists()

    def answers(self) -> list[dict[str, Any]]:
        """Rows of the answers to the predictions, with the number of each in `place`; what one is made of has none."""
        places = {prediction.number: place for place, prediction in enumerate(PREDICTIONS, 1)}
        rows = self.table("answers")
        is_first = rows.number.isin(places)
        words = rows.prediction.where(is_first, "- " + rows.number)
        place = rows.number.map(places).astype("Int64").astype(str).where(is_first, "")
        return rows.assign(place=place, words=words).to_dict("records")

    def attentive(self, layer: int) -> float:
        """Accuracy of the attentive probe at a layer, the mean over seeds."""
        rows = self.table("attentive")
        return rows[(rows.probe == "attentive") & (rows.layer == layer)].test_accuracy.mean()

    def control(self, name: str, among: str = "layer_curve") -> pd.DataFrame:
        rows = self.table(among)
        return rows[rows.control == name]

    def where(self, column: str) -> str:
        """The layers of the model's curve for which a column is true, in words."""
        return span(self.layers.index[self.layers[column].astype(bool)])


def regime() -> list[dict[str, Any]]:
    """The chosen layer of each setting of the search, with its drop, p corrected for all of them, and raw pixels."""
    rows = table("studies/regime")
    own, pixels = rows[rows.control == MODEL], rows[rows.control == "raw pixels"].set_index("model").test_accuracy
    chosen = own[own.chosen.astype(bool)].assign(last=own.groupby("model").layer.transform("max"))
    corrected = holm(dict(zip(chosen.model, chosen.drop_p, strict=True)))
    chosen = chosen.assign(p_holm=chosen.model.map(corrected), pixels=chosen.model.map(pixels))
    return chosen.assign(verdict=verdicts(chosen.p_holm)).to_dict("records")


def dynamics(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The chosen layer of every checkpoint, p of its drop corrected for all of them."""
    rows = pd.concat([run.table("training_dynamics") for run in runs], ignore_index=True)
    rows = rows[rows.chosen.astype(bool)].reset_index(drop=True)
    corrected = pd.Series(holm(rows.drop_p.to_dict()))
    return rows.assign(p_holm=corrected, verdict=verdicts(corrected)).to_dict("records")


def seed_studies() -> dict[str, dict[str, Any]]:
    """The studies of seeds of pretraining that results/studies/ has, by name."""
    return {name: seed_study(name) for name in SEED_STUDIES if (ROOT / f"results/studies/{name}.csv").exists()}


def seed_study(name: str) -> dict[str, Any]:
    """Families, their differences and runs as rows, the numbers of images, and raw pixels as networks see them."""
    rows = table(f"studies/{name}")
    families, differences, runs = (table(f"studies/{name}_{part}") for part in ("summary", "differences", "runs"))
    pixels = rows[rows.control == "raw pixels"].to_dict("records")
    return {
        "families": families.to_dict("records"),
        "differences": differences.assign(verdict=verdicts(differences.p_holm)).to_dict("records"),
        "runs": runs.assign(verdict=verdicts(runs.drop_p_holm)).to_dict("records"),
        "n_train": rows.n_train.iloc[0],
        "n_test": rows.n_test.iloc[0],
        "layers": int((rows.control == MODEL).sum()),
        "weak": int((rows.C[rows.control == MODEL] >= 1000).sum()),
        "pixels": " or ".join(dict.fromkeys(map(with_interval, pixels))),
    }


def shift() -> dict[str, list[dict[str, Any]]]:
    """The study of a shift, where it is there: each version of the test images at `ln_1`, clean ones at each point."""
    if not (ROOT / "results/studies/shift.csv").exists():
        return {}
    rows = table("studies/shift")
    is_clean = rows.level == rows.corruption.map({"contrast": 1, "blur": 0})
    cells = [over_seeds(row, SHIFT_MEASURES) for row in rows.to_dict("records")]
    cells = [[*of_row[:-2], "", ""] if clean else of_row for of_row, clean in zip(cells, is_clean, strict=True)]
    rows = rows.assign(cells=cells)
    clean = rows[is_clean & (rows.corruption == "contrast")]
    return {"levels": rows[rows.point == "ln_1"].to_dict("records"), "points": clean.to_dict("records")}


def long_fine_tuning() -> dict[str, Any]:
    """The longer run, against the probes that its table pairs it with."""
    images, facts = table("fashion-xs-fashion-mini/fine_tuned"), config("fashion-xs-fashion-mini/fine_tuned")
    right = (images.label == images.predicted).to_numpy()
    ends = f"[{100 * facts['low']:.1f}, {100 * facts['high']:.1f}]"
    columns = {"probe": "probe_correct", "pixels": "pixels_correct"}
    pairs = {name: compare(right, images[column].to_numpy()).to_dict() for name, column in columns.items()}
    corrected = holm({name: pair["p_value"] for name, pair in pairs.items()})
    pairs = {name: pair | {"p_holm": corrected[name]} for name, pair in pairs.items()}
    return {"accuracy": f"{percent(right.mean())} {ends}", **pairs}


def transfer() -> list[dict[str, Any]]:
    """The chosen layer of each network on each set of images, beside raw pixels as that network is shown them."""
    rows = table("studies/transfer")
    own, pixels = rows[rows.control == MODEL], rows[rows.control == "raw pixels"].set_index("model").test_accuracy
    chosen = own[own.chosen.astype(bool)]
    return chosen.assign(pixels=chosen.model.map(pixels)).to_dict("records")


def dtypes() -> dict[str, list[dict[str, Any]]]:
    """What bfloat16 costs each layer, by model."""
    return {f"{name}-xs": table(f"studies/dtypes_{name}").to_dict("records") for name in ("fashion", "cifar10")}


def without_labels() -> dict[str, list[dict[str, Any]]]:
    """What is lost where a score without labels picks the layer: a row for each score, by model."""
    models = {}
    for name in ("fashion", "cifar10"):
        rows = table(f"studies/scores_{name}_regret")
        corrected = pd.Series(holm(rows.p_value[rows.picked_layer != rows.chosen_layer].to_dict()), dtype=float)
        rows = rows.assign(better=rows.better.fillna(""), p_holm=corrected)
        models[rows.model[0]] = rows.to_dict("records")
    return models


def benchmarks() -> dict[str, dict[str, str]]:
    """What `make bench` wrote, by processor and name: a table, and in its last line on which machine it was made."""
    tables: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "results/benchmarks").glob("*/*.md")):
        tables.setdefault(file.parent.name, {})[file.stem] = file.read_text(encoding="utf-8").strip()
    return tables


def goals() -> dict[str, list[dict[str, Any]]]:
    """By processor: what docs/goals.csv asks of a row of a benchmark, and whether it is reached, or by how much not."""
    asked = pd.read_csv(ROOT / "docs/goals.csv", keep_default_na=False)
    lists: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((ROOT / "results/benchmarks").glob("*")):
        for goal in asked.to_dict("records"):
            if not (folder / f"{goal['file']}.csv").is_file():
                continue
            rows = table(f"benchmarks/{folder.name}/{goal['file']}")
            rows = rows[(rows.metric == goal["metric"]) & (rows.case == (goal["case"] or rows.case))]
            if rows.empty:
                lists.setdefault(folder.name, []).append(goal | {"value": "", "verdict": "not measured"})
                continue
            row = rows.iloc[0]
            value = row.ours if goal["metric"].startswith("share of") else row.ratio
            share = value / goal["goal"]
            if math.isnan(value):  # no peer: seconds, of which less is better
                value, share = row.ours, goal["goal"] / row.ours
            tried = f"; tried: {goal['tried']}" if goal["tried"] else ""
            missed = f"{1 - share:.0%}" if share < 0.99 else "less than 1%"
            shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            verdict = "reached" if share >= 1 else f"missed by {missed}{tried}"
            lists.setdefault(folder.name, []).append(goal | {"value": shown, "verdict": verdict})
    return lists


def times() -> str:
    """How long README's lines of Python and `make reproduce` take, by processor."""
    words = []
    for folder in sorted((ROOT / "results/benchmarks").glob("*")):
        if (folder / "home.csv").is_file() and (folder / "reproduce.csv").is_file():
            lines = table(f"benchmarks/{folder.name}/home").set_index("metric").ours["time of README's lines of Python"]
            whole = table(f"benchmarks/{folder.name}/reproduce").set_index("case").ours["make reproduce"]
            cores, processor, *_ = (folder / "home.md").read_text(encoding="utf-8").splitlines()[-1].split(", ")
            words.append(f"{lines:.0f} s and {whole / 60:.0f} minutes on {cores} of an {processor}")
    return f"These lines and `make reproduce` take {'; '.join(words)}."


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def with_interval(row: Any) -> str:
    """Accuracy of a row with its interval over test images, in %."""
    return f"{percent(row['test_accuracy'])} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def points(row: Any, name: str = "difference", low: str = "low", high: str = "high") -> str:
    """A difference with its interval, where it has one, in points of accuracy."""
    value, ends = row[name], (row[low], row[high])
    if math.isnan(ends[0]):
        return signed(value)
    return f"{100 * value:+.1f} [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"


def verdict(row: dict[str, Any]) -> str:
    """Whether the interval of a difference leaves zero out."""
    return "holds" if row["low"] > 0 or row["high"] < 0 else "not resolved"


def verdicts(p_holm: pd.Series) -> pd.Series:
    return (p_holm <= 0.05).map({True: "holds", False: "not resolved"})


def over_seeds(row: dict[str, Any], measures: dict[str, str] = MEASURES) -> list[str]:
    """Of each measure of a family: the mean with its interval over seeds, and the interval over images."""
    cells = []
    for measure, digits in measures.items():
        ends = ("mean", "low", "high", "images_low", "images_high")
        mean, low, high, *images = (format(100 * row[f"{measure}_{end}"], digits) for end in ends)
        cells += [f"{mean} [{low}, {high}]" if row["n_seeds"] > 1 else mean, " to ".join(images)]
    return cells


def together(row: dict[str, float]) -> str:
    """A mean over draws with its interval over draws and images, in %."""
    return f"{percent(row['mean'])} [{100 * row['low_all']:.1f}, {100 * row['high_all']:.1f}]"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def measured(value: float) -> str:
    return f"{value:+.3g}"


def reach(values: Sequence[float] | pd.Series) -> str:
    """The least and the largest of some shares, in %."""
    return f"{100 * min(values):.1f} to {percent(max(values))}"


def nats(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def probability(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.001 else f"{value:.3f}"


def rendered(page: str) -> str:
    """One of PAGES."""
    loader = jinja2.FileSystemLoader(ROOT / "docs")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    filters = {"percent": percent, "accuracy": with_interval, "points": points, "reach": reach, "p": probability}
    environment.filters |= filters | {"signed": signed, "together": together, "verdict": verdict}
    environment.filters |= {"over_seeds": over_seeds, "nats": nats, "measured": measured}
    runs = {"fashion": Run("fashion-xs-fashion-mini"), "cifar10": Run("cifar10-xs-cifar10")}
    tables = {
        "regime": regime(),
        "seeds": seed_studies(),
        "dynamics": dynamics(list(runs.values())),
        "tuned": long_fine_tuning(),
        "transfer": transfer(),
        "dtypes": dtypes(),
        "shift": shift(),
        "without_labels": without_labels(),
        "benchmarks": benchmarks(),
        "goals": goals(),
    }
    return environment.get_template(f"{page}.md.j2").render(**tables, **runs)


def between(text: str, first: str, last: str, block: str) -> str:
    """A text with the block between its two marks."""
    before, mark, rest = text.partition(first)
    return f"{before}{mark}{block}{last}{rest.partition(last)[2]}"


def with_results(
    text: str, results: str, model: str = "fashion-xs", more: str = "", rows: Sequence[str] = ("",)
) -> str:
    """A page with the first table of the page of `results` about the model between its marks, those `rows` alone."""
    table = results.partition(f"\n| `{model}` |")[2].partition("\n\n")[0].splitlines()
    chosen = [line for line in table[2:] if line.startswith(tuple(f"| {row}" for row in rows))]
    block = "".join(line + "\n" for line in [f"| `{model}` |{table[0]}", table[1], *chosen])
    return between(text, "<!-- results: written by docs/make_results.py -->\n", "<!-- end -->", block + more)


def for_readme(text: str, results: str) -> str:
    """README with six rows of the results, and with what its ten lines of Python print."""
    facts = Run("fashion-xs-fashion-mini").comparison
    printed = "\n".join(textwrap.wrap(repr(Comparison(**facts)), 110))
    block = f"```text\n{printed}\n```\n\n{times()}\n"
    text = between(text, "<!-- output: written by docs/make_results.py -->\n", "<!-- end of output -->", block)
    return with_results(text, results, rows=README_ROWS)


def with_evaluation(card: str, results: str, model: str) -> str:
    """A model card with its probes, and the loss and the number of images that its log ends in."""
    log = pd.read_csv(ROOT / f"igpt_lab/bundled/{model}/log.csv").iloc[-1]
    loss = f"{log.validation_loss:.3f} nats per token, {log.validation_bits_per_pixel:.3f} bits per pixel"
    positions = json.loads((ROOT / f"igpt_lab/bundled/{model}/config.json").read_text(encoding="utf-8"))["n_positions"]
    rows = {"loss on held-out images": loss, "images seen in training": f"{log.tokens / positions:,.0f}"}
    return with_results(card, results, model, "".join(f"| {name} | | {value} |\n" for name, value in rows.items()))


def main(arguments: list[str]) -> int:
    """Write the pages and README, or with --check name those that are not what the files give."""
    texts = {page: rendered(name) for name, page in PAGES.items()}
    results = texts[PAGES["results"]]
    texts[README] = for_readme(README.read_text(encoding="utf-8"), results)
    for model, card in CARDS.items():
        texts[card] = with_evaluation(card.read_text(encoding="utf-8"), results, model)
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for path in stale:
            print(f"{path} is not what results/ gives; run python docs/make_results.py")
        return bool(stale)
    for path in stale:
        atomic_write(path, texts[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
