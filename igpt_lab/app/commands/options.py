"""How a command is declared: a function with its arguments beside it, each default once; and arguments of several."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

import igpt_lab as lab
from igpt_lab.app import runs

COLUMNS = 80  # of a terminal
FIELD_TYPES = {"int": int, "float": float, "str": str}
HEADINGS = dict.fromkeys("--out --store --name --style --no-pdf".split(), "output") | dict.fromkeys(
    "--device --dtype --workers --engine --scheduler --deadline --part --compile --recompute --shard".split(),
    "speed and hardware",
)  # of the groups that several commands have


@dataclass(frozen=True)
class Argument:
    """A positional argument or an option; `settings` are those of `argparse.ArgumentParser.add_argument`."""

    names: tuple[str, ...]
    help: str
    settings: dict[str, Any]

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add it to a parser or a group; its help ends with its default, where it has one."""
        action = parser.add_argument(*self.names, **self.settings)
        default = self.settings.get("default")
        ending = "" if default is None else f"(default: {default})"
        if self.settings.get("required"):
            ending = "(required)"
        # Set afterwards, because Python 3.11 adds the default to the help that BooleanOptionalAction is created with.
        action.help = f"{self.help} {ending}".strip().replace("%", "%%")


@dataclass(frozen=True)
class Command:
    """A function `run` that is called with the parsed arguments by keyword and returns an exit code, None for 0.

    `examples` are arguments as one types them behind `igpt-lab NAME`.
    """

    run: Callable[..., int | None]
    name: str
    arguments: tuple[Argument, ...]
    examples: tuple[str, ...]
    config: str | None

    @property
    def description(self) -> str:
        return inspect.getdoc(self.run) or ""

    @property
    def epilog(self) -> str:
        return "\n".join(["examples:", *(f"    igpt-lab {self.name} {example}".rstrip() for example in self.examples)])

    def add_to(self, parser: argparse.ArgumentParser, *, with_config: bool) -> None:
        """Add the arguments and, if `with_config`, an option for every field of the configuration."""
        parser.set_defaults(command=self.run)
        fields = config_arguments(getattr(lab, self.config)) if self.config and with_config else []
        groups: dict[str, argparse._ActionsContainer] = {"": parser}
        for item in (*self.arguments, *fields):
            heading = HEADINGS.get(item.names[0], "training" if item in fields else "")
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            item.add_to(groups[heading])


def argument(*names: str, help: str, **settings: Any) -> Argument:
    """One argument of a command. A `default` among `settings` is added to `help`; what None means, `help` says."""
    return Argument(names, help, settings)


def command(
    *arguments: Argument, examples: tuple[str, ...], name: str = "", config: str | None = None
) -> Callable[[Callable[..., int | None]], Command]:
    """Make a function a command: its name is the function's or `name`, its description the docstring.

    `config` names a dataclass of `igpt_lab` whose fields are options too. It is read only where the command is chosen,
    because that imports torch.
    """

    def declare(run: Callable[..., int | None]) -> Command:
        return Command(run, name or run.__name__.replace("_", "-"), arguments, examples, config)

    return declare


def config_arguments(config: type) -> list[Argument]:
    """An option for every field of a dataclass that is a bool, a number or a string; its help is in the metadata."""
    arguments = []
    for field in fields(config):
        kind = str(field.type).removesuffix(" | None")
        settings: dict[str, Any] = {"required": True} if field.default is MISSING else {"default": field.default}
        if kind == "bool":
            settings["action"] = argparse.BooleanOptionalAction
        elif kind in FIELD_TYPES:
            settings["type"] = FIELD_TYPES[kind]
        else:
            continue
        arguments.append(argument(f"--{field.name.replace('_', '-')}", help=field.metadata.get("help", ""), **settings))
    return arguments


# Lists are spelt --layers 0 6 12 everywhere; "extend" takes --layers 0 --layers 6 too.
LIST: dict[str, Any] = {"nargs": "+", "action": "extend"}
STEP: dict[str, Any] = {"type": int, "default": 1_000_000, "choices": [131_000, 262_000, 524_000, 1_000_000]}

MODEL = argument("model", help="bundled name, folder or Hub name of a model")
IMAGES = argument("images", help="bundled name, folder, Parquet file or Hub name of images")
LIMIT = argument(
    "--limit",
    type=int,
    help="largest number of images of a split, by a stratified draw with a fixed seed (default: all)",
)
LABEL = argument("--label", help="column of a table that has the labels, such as coarse_label (default: the usual)")
CONFIG = argument("--config", help="configuration of a set of the Hub that has several")
SPLIT = argument("--split", default="test", help="split of the images, such as train or test")
POOL = argument(
    "--pool",
    default="mean",
    help="pooling over positions: mean, last, max, grid:g, prefix:g, at:p,..., or several with +",
)
LAYERS = argument("--layers", type=int, **LIST, help="layers to use, from 0; -1 is the last, L (default: all, 0 to L)")
STORE = argument("--store", default="stores", help="folder in which the feature stores are kept")
OUT = argument("--out", help=f"folder for the figure and its table (default: {runs.MINE}/MODEL-IMAGES)")
ON_BAD_IMAGE = argument(
    "--on-bad-image",
    choices=["error", "skip"],
    default="error",
    help="stop at an image that cannot be read, or skip it",
)
DEVICE = argument(
    "--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator where there is one, else cpu)"
)
REVISION = argument("--revision", help="branch, tag or commit of a model on the Hub (default: its main branch)")


def train_and_test(images: str, *, on_bad_image: str = "error", **options: Any) -> list:
    """The two splits of an image set, loaded as `load_images` is told."""
    return [loaded(images, split, on_bad_image, **options) for split in ("train", "test")]


def loaded(images: str, split: str, on_bad_image: str, **options: Any) -> Any:
    """A split, with "skip" without the images that cannot be read, which stderr counts."""
    whole = lab.load_images(images, split, **options)
    if on_bad_image != "skip" or not hasattr(whole, "column"):  # tokens can all be read
        return whole
    good, problems = readable(whole)
    if not problems:
        return whole
    if not good:
        raise ValueError(f"{images} {split} has no image that can be read; the first: {problems[0]}")
    rest = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
    print(f"igpt-lab: left out {problems[0]}{rest}", file=sys.stderr)
    return whole.select(good)


def readable(images: Any) -> tuple[list[int], list[str]]:
    """Positions of the images that can be read, and what is wrong with each other one."""
    from igpt_lab.core.progress import tqdm
    from igpt_lab.images.opening import BadImage

    good, problems = [], []
    for position in tqdm(range(len(images)), desc="images", unit="image", delay=2, leave=False):
        try:
            images[position]
        except BadImage as error:
            problems.append(str(error))
        else:
            good.append(position)
    return good, problems


def in_lines(text: str) -> str:
    """Text for a terminal: lines of at most 80 columns, those that go on indented; a word stays whole."""
    whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "    "}
    return "\n".join(
        line if len(line) <= COLUMNS else textwrap.fill(line, COLUMNS, **whole) for line in text.split("\n")
    )


def set_of(images: str, label: str | None) -> str:
    """The name of the images for a folder of results, with the column of the labels where one was asked for."""
    return f"{images}-{label}" if label else images
