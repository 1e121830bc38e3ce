"""docs/studies.md: its commands are ones that the program takes, and its tables have the columns that it names."""

import re
import shlex
from pathlib import Path

import pytest

from igpt_lab.app.cli import build_parser
from igpt_lab.core.seeds import summarise_runs, summarise_seeds
from igpt_lab.images.corruptions import CORRUPTIONS
from igpt_lab.training.shift import LEVELS, POINTS
from tables import seed_table

PAGE = (Path(__file__).parents[1] / "docs/studies.md").read_text(encoding="utf-8")
SHELL = re.compile(r"\$\(\([^)]*\)\)|\$\w+")  # what the shell puts a number for


def commands() -> list[list[str]]:
    """Arguments of each command igpt-lab of the page, functions of the shell unfolded."""
    code = "\n".join(re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    bodies = dict(re.findall(r"^(\w+)\(\) \{ (.*?) \"\$@\"; \}$", code, re.MULTILINE))
    code = re.sub(r"^\w+\(\) \{.*$", "", code, flags=re.MULTILINE)
    for name, body in bodies.items():
        code = re.sub(rf"^ +{name} ", f"{body} ", code, flags=re.MULTILINE)
    lines = re.findall(r"\bigpt-lab (.*?)(?:\n|;|$)", code)
    return [shlex.split(SHELL.sub("1", line)) for line in lines]


def test_the_page_has_its_commands():
    names = [line[0] for line in commands()]
    assert (names.count("dynamics"), names.count("shift"), len(names)) == (4, 1, 17)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_of_the_page_is_one_that_the_program_takes(arguments):
    options = vars(build_parser(arguments[0]).parse_args(arguments))
    assert options["command"].__name__ == arguments[0]
    if options.get("steps", 1) > 1:  # 1: a variable of the shell
        assert options["cooldown"] + options["warmup"] <= options["steps"]


def test_every_column_of_the_page_is_one_of_the_tables():
    runs = summarise_runs(seed_table())
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `NAME")}
    assert set(re.findall(r"`(\w+)`", rows["NAME_runs.csv"])) <= set(runs)
    named = re.findall(r"`(\w+)`", rows["NAME_summary.csv"])
    measures, endings = [name for name in named if name[0] != "_"], [name for name in named if name[0] == "_"]
    assert {a + b for a in measures for b in endings} <= set(summarise_seeds(runs)) and len(measures) == 3


def test_every_point_and_level_of_the_page_is_one_of_the_study():
    section = PAGE.partition("## Objective and shift")[2].partition("\n## ")[0]
    named = section.partition("averaged over positions: ")[2].partition(". ")[0].partition("\n`qkv`")[0]
    assert tuple(re.findall(r"`(\w+)`", named)) == POINTS
    for corruption, levels in LEVELS.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| {corruption} |"))
        numbers = [float(number) for number in re.findall(r"[\d.]+", row.split("|")[2])]
        assert numbers == [CORRUPTIONS[corruption].clean, *levels]
