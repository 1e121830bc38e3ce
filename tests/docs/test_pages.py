"""The pages of docs/: their Python runs, their commands are ones that the program takes, their links have an end."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import igpt_lab as lab
from igpt_lab.app.cli import build_parser
from igpt_lab.features import poolings
from igpt_lab.figures import style

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CARDS = [ROOT / "igpt_lab/bundled" / name / "README.md" for name in ("fashion-xs", "cifar10-xs", "fashion-mini")]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
HOW_TO = [page for page in PAGES if page.parent.name == "how_to" or page.stem == "development"]
HOW_TO = [page for page in HOW_TO if "```python" in page.read_text("utf-8")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return blocks_of(page.read_text(encoding="utf-8"), language)


def blocks_of(text: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text) if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the pages run: one after the other, so that stores are kept between them."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "results").mkdir()
    (folder / "results/fashion-xs-fashion-mini").symlink_to(ROOT / "results/fashion-xs-fashion-mini")
    return folder


def cifar100(name: str, streaming: bool = False) -> datasets.DatasetDict:
    """Two splits of 24 images each, in the columns of CIFAR-100 on the Hub."""
    assert name == "uoft-cs/cifar100"
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(4)}
    features = datasets.Features(kinds | {"coarse_label": datasets.ClassLabel(names=["fish", "people"])})
    splits = {}
    for seed, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 8, 8, 3), np.uint8)
        columns = {"img": [Image.fromarray(image) for image in pixels], "fine_label": [0, 1, 2, 3] * 6}
        splits[split] = datasets.Dataset.from_dict(columns | {"coarse_label": [0, 0, 1, 1] * 6}, features=features)
        if streaming:
            splits[split] = splits[split].to_iterable_dataset()
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)


class CIFAR10:
    """As torchvision's, which is not installed for the tests."""

    classes = ("cat", "dog", "eel")

    def __init__(self, root: str, train: bool = True, download: bool = False):
        self.data = np.random.default_rng(int(train)).integers(0, 256, (30, 8, 8, 3), np.uint8)
        self.targets = [0, 1, 2] * 10

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, folder, tiny_folder, tiny_images, monkeypatch):
    plt.switch_backend("agg")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets, "load_dataset", cifar100)
    if "import torchvision" in page.read_text("utf-8"):  # transformers, which other pages use, would take it for whole
        monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(CIFAR10=CIFAR10)))
    for module, registry in ((poolings, "POOLINGS"), (style, "FIGURES")):  # to which a page adds
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))
    for name in ("download_openai", "convert_openai", "extract_on_cluster"):  # their arguments alone are checked
        monkeypatch.setitem(vars(lab), name, create_autospec(getattr(lab, name)))
    small = {"fashion-xs": tiny_folder, "cifar10-xs": tiny_folder, "fashion-mini": tiny_images, "photos": tiny_images}
    names = {"__name__": page.stem}
    for code in blocks(page, "python"):
        for missing in re.findall(r"^import (polars|duckdb|timm)$", code, re.MULTILINE):
            pytest.importorskip(missing)
        for name, path in small.items():
            code = code.replace(f'"{name}"', repr(str(path)))
        code = code.replace('"cuda"', '"cpu"')
        exec(compile(code, page, "exec"), names)
    plt.close("all")


def test_a_curve_of_any_images_takes_four_lines():
    text = (ROOT / "docs/how_to/any_images.md").read_text(encoding="utf-8")
    cells = {
        head: blocks_of(section, "python") for head, _, section in (s.partition("\n") for s in text.split("\n## ")[1:])
    }
    curves = {head: sources[0].strip().splitlines() for head, sources in cells.items() if "layer_curve" in sources[0]}
    assert len(curves) == 10  # nine kinds of input, and one more for other labels
    assert all(len(lines) <= 4 and lines[-1] == "lab.figures.layer_curve(result.table)" for lines in curves.values())


def test_a_curve_of_any_network_takes_four_lines():
    text = (ROOT / "docs/how_to/any_network.md").read_text(encoding="utf-8")
    curves = [code.strip().splitlines() for code in blocks_of(text, "python") if "layer_curve" in code]
    assert len(curves) == 4  # three networks, and one beside an ImageGPT
    assert all(len(lines) <= 4 and "layer_curve" in lines[-1] for lines in curves)


def commands() -> list[list[str]]:
    """Arguments of every command igpt-lab on the pages but those of studies.md, which has its own test."""
    texts = [code for page in [README, *CARDS, *PAGES] if page.stem != "studies" for code in blocks(page, "")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("igpt-lab ")]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_is_one_that_the_program_takes(arguments):
    assert vars(build_parser(arguments[0]).parse_args(arguments))["command"]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [README, *CARDS, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_of_a_page_has_an_end(page):
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        end = (page.parent / path).resolve() if path else page
        assert end.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", end.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_five_walks_start_in_readme_and_end_at_a_heading():
    page = (ROOT / "docs/walks.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| [^|]+\? \| "([^|]+)" \| \[[^]]+\]\(([^#)]+)#([^)]+)\) \|$', page, re.MULTILINE)
    assert len(rows) == 5
    links = dict(re.findall(r"\[([^]]+)\]\(docs/([^)]+)\)", " ".join(README.read_text(encoding="utf-8").split())))
    for words, path, anchor in rows:
        assert links[words] == path
        assert anchor in map(slug, re.findall(r"^#+ (.*)$", (ROOT / "docs" / path).read_text("utf-8"), re.MULTILINE))


def test_the_page_of_probe_layers_names_every_column(tiny_folder, train, test, tmp_path):
    store = lab.extract(tiny_folder, [train, test], store=tmp_path, progress=False)
    result = lab.probe_layers(*(lab.Features.from_store(store, split) for split in ("train", "test")), progress=False)
    page = (ROOT / "docs/how_to/probe_table.md").read_text(encoding="utf-8").partition("Columns of")[2]
    rows = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(result.table)
