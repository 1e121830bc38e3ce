"""The arguments of every command as its help shows them, and how they are declared."""

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

import igpt_lab as lab
from igpt_lab.app import cli
from igpt_lab.app.commands.options import argument, command, config_arguments

# Written down by hand: what a command takes, with the default that its help names. A name that is lost breaks scripts.
ARGUMENTS = {
    "extract": "model images --splits --limit --label --config --store=stores --random --points --layers --pool=mean "
    "--alignment --dtype --batch-size --on-bad-image=error --engine=local --scheduler --workers --deadline --part "
    "--device --revision",
    "check": "model --images --split=test --device --revision",
    "probe": "model images --limit --label --config --on-bad-image=error --layers --pool=mean --untrained=3 "
    "--permutations=10 "
    "--store=stores --out --device --revision",
    "properties": "model images --limit --config --on-bad-image=error --layers --store=stores --out --device "
    "--revision",
    "scores": "model images --limit --label --config --on-bad-image=error --scored=1000 --store=stores --out "
    "--name=scores --device "
    "--revision",
    "ablate": "model images --limit --label --config --on-bad-image=error --layers --store=stores --out --device "
    "--revision",
    "dynamics": "MODEL --images --limit --label --config --on-bad-image=error --layers --final --store=stores --out "
    "--name --device "
    "--revision",
    "shift": "RUN --images --limit --label --config --on-bad-image=error --points --store=stores --out --name=shift "
    "--device --revision",
    "explain": "model images --limit --label --config --on-bad-image=error --chosen --store=stores --out --seed=0 "
    "--device --revision",
    "evaluate": "model images --split=test --limit --on-bad-image=error --device --revision",
    "pretrain": "images --out --init --side=20 --colours=32 --layers=16 --width=64 --heads=2 --bert --limit "
    "--on-bad-image=error "
    "--device --revision --steps --batch-size=128 --learning-rate=0.003 --warmup=200 --cooldown=0 --optimizer=adam "
    "--clip --flip=False "
    "--accumulate=1 --holdout=3000 --validate=500 --log-every=100 --save-every=50 --snapshots=6 --spike=1.0 "
    "--masked=0.15 --seed=0 --dtype --compile --recompute=False --shard=False",
    "finetune": "model images --out --limit --label --config --on-bad-image=error --random --device --revision "
    "--class-weights --steps=2000 "
    "--batch-size=128 --learning-rate --cooldown=0 --head-rate=1.0 --generative=1.0 --classifying=1.0 --layer "
    "--freeze-below=0 --head-only=False --per-class --draw=0 --draws=5 --flip=True --pad=4 --augment --holdout=0.1 "
    "--patience=10 --log-every=50 --save-every=50 --optimizer=adam --clip --accumulate=1 --spike=1.0 --seed=0 --dtype "
    "--compile --recompute=False",
    "classify": "folder FILE --top=3 --device --revision",
    "sample": "model --count=64 --columns=16 --scale=4 --temperature=1.0 --top-k --top-p --seed=0 --batch-size "
    "--out=samples --device --revision",
    "complete": "model images --split=test --limit=16 --keep=0.5 --completions=4 --temperature=1.0 --top-k --top-p "
    "--seed=0 --batch-size --out=completions --device --revision",
    "convert-openai": "folder out --palette --step --bert",
    "download-openai": "--size --step=1000000 --bert --datasets --cache",
    "paper": "--size --step=1000000 --bert --images --limit --plan --cache --out --device",
    "figures": "folder --style=paper --out",
    "report": "run --out --no-pdf --paper=A4",
    "plan": "model images --devices=1xH100 --revision",
    "stores": "root=stores",
    "verify": "store --repair --yes",
    "prune": "root=stores --yes",
    "reproduce": "--model=fashion-xs --images=fashion-mini --out --quick --all --only --renew-reference",
    "lab": "folder=workbench --port=8888 --no-browser",
}
LOADS_A_MODEL = [
    "extract", "check", "probe", "properties", "scores", "ablate", "dynamics", "shift", "explain", "evaluate",
    "pretrain", "finetune", "classify", "sample", "complete", "plan",
]  # fmt: skip


def printed_help(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """{name: its help} of the arguments in a printed help."""
    blocks = re.findall(r"^  (\S.*(?:\n {3,}\S.*)*)", text, re.MULTILINE)
    return {re.match(r"[\w-]+", block)[0]: " ".join(block.split()) for block in blocks if "--help" not in block}


def test_the_help_lists_every_command(capsys):
    assert re.findall(r"^    ([a-z][\w-]*)", printed_help(capsys), re.MULTILINE) == list(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_command_has_all_its_arguments_and_names_each_default_once(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = entries(printed_help(capsys, name).partition("\n\n")[2])
    expected = dict(word.partition("=")[::2] for word in ARGUMENTS[name].split())
    assert printed.keys() == expected.keys()
    for argument_name, default in expected.items():
        text = printed[argument_name]
        assert text.count("(default") <= 1
        assert not default or text.endswith(f"(default: {default})"), text


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with the fields of its configuration."""
    commands = next(a for a in cli.build_parser(name)._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


@pytest.mark.parametrize("declared", cli.COMMANDS, ids=lambda declared: declared.name)
def test_every_option_has_help_and_every_command_two_examples_that_parse(declared):
    parser = parser_of(declared.name)
    assert [action.dest for action in parser._actions if not (action.help or "").partition("(")[0].strip()] == []
    examples = [line.strip() for line in parser.format_help().partition("examples:\n")[2].splitlines()]
    assert len(examples) == 2 and all(line.startswith(f"igpt-lab {declared.name}") for line in examples)
    for line in examples:
        assert cli.build_parser(declared.name).parse_args(shlex.split(line)[1:]).command is declared.run


def test_one_option_is_one_kind_of_option_in_every_command():
    """But --layers of pretrain: how many blocks the network has, as published scripts spell it."""
    kinds = {}
    for declared in cli.COMMANDS:
        for action in parser_of(declared.name)._actions:
            for name in (
                set(action.option_strings) - {"--layers"} if declared.name == "pretrain" else action.option_strings
            ):
                kinds.setdefault(name, set()).add((type(action).__name__, str(action.nargs)))
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}
    assert {"--device", "--layers", "--points"} <= kinds.keys()


def test_a_list_may_be_repeated_and_older_spellings_go_on_to_work():
    lists = ["--splits a b --points c d", "--split a --split b --point c --point d"]
    parsed = [vars(cli.build_parser("extract").parse_args(["extract", "m", "i", *text.split()])) for text in lists]
    assert parsed[0] == parsed[1] and parsed[0]["splits"] == ["a", "b"] and parsed[0]["points"] == ["c", "d"]


def test_alone_it_prints_its_help_and_a_misspelt_command_gets_the_closest(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: igpt-lab")
    assert refusal(["exract", "--limit", "3"], capsys) == "igpt-lab: no command 'exract'; did you mean 'extract'?\n"
    assert refusal(["zzz"], capsys) == "igpt-lab: no command 'zzz'; igpt-lab --help lists them\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"igpt-lab {lab.__version__}\n"


def refusal(arguments: list[str], capsys) -> str:
    """What is printed where the program ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("extract fashion-xs fashion-mini --devise cpu", "no option '--devise'; did you mean '--device'?"),
        ("extract --revison=v1", "no option '--revison'; did you mean '--revision'?"),  # before what is missing
        ("pretrain photos --learning-rat 1 --stesp 3", "no option '--stesp'; did you mean '--steps'?"),
        ("finetune m i --out o --no-flop", "no option '--no-flop'; did you mean '--no-flip'?"),
        ("extract m i -device cpu", "no option '-device'; did you mean '--device'?"),
        ("stores --zzz", "no option '--zzz'; igpt-lab stores --help lists its options"),
    ],
)
def test_a_misspelt_option_gets_the_closest(arguments, says, capsys):
    words = arguments.split()
    assert refusal(words, capsys) == f"igpt-lab {words[0]}: {says}\n"


def test_what_only_looks_like_an_option_is_none():
    parse = cli.build_parser("extract").parse_args
    assert parse(["extract", "m", "i", "--layers", "0", "-1", "--pool", "at:-1"]).layers == [0, -1]
    assert parse(["stores", "--", "--zzz"]).root == "--zzz"


@pytest.mark.parametrize("name", LOADS_A_MODEL)
def test_every_command_that_loads_a_model_takes_device_and_revision(name):
    """But `plan`, which computes nothing, and reads the shape alone."""
    options = [option for action in parser_of(name)._actions for option in action.option_strings]
    assert "--revision" in options and ("--device" in options) == (name != "plan")


def test_help_and_a_mistake_are_instant():
    heavy = ["torch", "numpy", "sklearn", "datasets", "pandas", "matplotlib", "PIL", "jupyterlab"]
    code = f"""
import sys
from igpt_lab.app.cli import main
for arguments in (["--help"], ["extract", "--help"], ["lab", "--prot"], ["lb"]):
    try:
        main(arguments)
    except SystemExit as ended:
        print(ended.code)
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.isdigit()] == ["0", "0", "2", "2"] and lines[-1] == "[]"


def test_fields_of_a_configuration_become_options():
    @dataclass
    class Config:
        steps: "int"
        rate: "float | None" = field(default=None, metadata={"help": "10% of the model's (default: by the model)"})
        flip: "bool" = field(default=True, metadata={"help": "mirror"})
        betas: "tuple[float, float]" = (0.9, 0.95)

    parser = argparse.ArgumentParser()
    for item in config_arguments(Config):
        item.add_to(parser)
    assert vars(parser.parse_args(["--steps", "3", "--no-flip"])) == {"steps": 3, "rate": None, "flip": False}
    printed = entries(parser.format_help())
    assert printed["--rate"] == "--rate RATE 10% of the model's (default: by the model)"
    assert printed["--steps"] == "--steps STEPS (required)"
    assert printed["--flip"] == "--flip, --no-flip mirror (default: True)"


def test_a_command_is_named_and_described_by_its_function():
    @command(argument("--top", type=int, default=3, help="labels"), examples=("", "--top 5"))
    def take_top(top: int) -> int:
        """Return it.

        More about it.
        """
        return top

    parser = argparse.ArgumentParser()
    take_top.add_to(parser, with_config=True)
    assert take_top.name == "take-top" and take_top.description == "Return it.\n\nMore about it."
    options = vars(parser.parse_args([]))
    assert options.pop("command")(**options) == 3
