"""The command igpt-lab: extract, check, probe, ablate, pretrain, finetune, reproduce and others (`commands/`)."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from itertools import takewhile
from typing import Any

import igpt_lab as lab
from igpt_lab.app.commands import (
    explaining,
    features,
    models,
    probing,
    released,
    results,
    sampling,
    training,
    unlabelled,
)
from igpt_lab.core.values import did_you_mean

COMMANDS = (  # in the order of the help
    features.extract,
    features.check,
    probing.probe,
    unlabelled.properties,
    unlabelled.scores,
    probing.ablate,
    probing.dynamics,
    probing.shift,
    explaining.explain,
    models.evaluate,
    training.pretrain,
    training.finetune,
    training.classify,
    sampling.sample,
    sampling.complete,
    models.convert_openai,
    models.download_openai,
    released.paper,
    results.figures,
    results.report,
    features.plan,
    features.stores,
    features.verify,
    features.prune,
    results.reproduce,
    results.open_lab,
)


# What moves a terminal's cursor, writes to its clipboard or turns the order of a line; a progress bar goes up a line.
CONTROLS = re.compile(
    r"\x1b(?!\[A)|[\0-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class Help(argparse.HelpFormatter):
    """Fills the paragraphs of a description; the lines of examples stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return "\n\n".join(super(Help, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: a misspelt option gets the closest one, before anything is missed or in excess."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = [option for action in self._actions for option in action.option_strings]
        for word in takewhile(lambda word: word != "--", args or []):
            name = word.partition("=")[0]
            if re.match("--?[a-zA-Z]", name) and not any(option.startswith(name) for option in known):
                hint = did_you_mean(name, known, f"{self.prog} --help lists its options")
                self.exit(2, f"{self.prog}: no option {name!r}; {hint}\n")
        return super().parse_known_args(args, namespace)


class Shown:
    """A stream that shows control characters as escapes: names in what is printed may be a stranger's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 1, a closed pipe in exit code 141."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8, and is printed as it is
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        with redirect_stdout(Shown(sys.stdout)), redirect_stderr(Shown(sys.stderr)):
            code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `igpt-lab ... | head`; Python would say so once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell says that SIGPIPE ended a program
    return code


def _run(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = "".join(arguments[:1])
    parser = build_parser(chosen)
    if not arguments:
        parser.print_help()
        return 0
    _check_name(parser, chosen)
    options = vars(parser.parse_args(arguments))
    run = options.pop("command")
    try:
        return run(**options) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, TypeError, LookupError, FloatingPointError, MemoryError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"igpt-lab: {' '.join(str(message).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"igpt-lab: {str(stopped) or 'stopped'}; finished work is kept", file=sys.stderr)
        return 130


def _check_name(parser: argparse.ArgumentParser, name: str) -> None:
    """End with exit code 2 and the closest command where there is no command `name`."""
    names = [command.name for command in COMMANDS]
    if not name.startswith("-") and name not in names:
        parser.exit(2, f"igpt-lab: no command {name!r}; {did_you_mean(name, names, 'igpt-lab --help lists them')}\n")


def build_parser(chosen: str = "") -> argparse.ArgumentParser:
    """All commands; the fields of a configuration are options only where their command is the chosen one."""
    parser = argparse.ArgumentParser(
        prog="igpt-lab",
        description=(lab.__doc__ or "").splitlines()[0],
        epilog="igpt-lab COMMAND --help shows a command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"igpt-lab {lab.__version__}", help="print the version")
    added = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for command in COMMANDS:
        summary = command.description.splitlines()[0]
        command_parser = added.add_parser(
            command.name, help=summary, description=command.description, epilog=command.epilog, formatter_class=Help
        )
        command.add_to(command_parser, with_config=command.name == chosen)
    return parser


if __name__ == "__main__":
    sys.exit(main())
