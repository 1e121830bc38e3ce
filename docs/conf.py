"""The site: pages of docs/, the notebooks as they are committed, and the API from docstrings. `make docs` builds it.

Sphinx reads the repository's root, so that a relative link is the same on the site and beside the files.
"""

import argparse
import importlib
import os
import pprint
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import igpt_lab as lab
from igpt_lab.app.cli import build_parser

BORROWED = "set, set_score_request"  # methods whose docstrings are matplotlib's and scikit-learn's

project = "igpt-lab"
author = "the authors of igpt-lab"
release = lab.__version__
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "igpt_lab/bundled/*/README.md"]
exclude_patterns = [".*", "build", "dist", "results", "runs", "stores", "tests", "workbench", "**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]

nb_execution_mode = "off"  # the notebooks are committed executed
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings put names between single backticks, as Markdown does
add_module_names = False
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
toc_object_entries = False  # each name has a heading already
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"

html_theme = "pydata_sphinx_theme"
html_title = "igpt-lab"
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 5,
    "footer_end": [],
}
html_sidebars = {"docs/*": []}  # a list of sections is of use in how_to/, api/ and the notebooks
html_show_sourcelink = False


def members_of(kind: type) -> str:
    """Options of autodoc: the methods of a class, and those of its bases that are of this package."""
    foreign = [base.__name__ for base in kind.__mro__ if not base.__module__.startswith("igpt_lab")]
    return f"   :members:\n   :inherited-members: {', '.join(foreign)}\n   :exclude-members: {BORROWED}\n"


class PublicNames(SphinxDirective):
    """`{public-names} FOLDER`: the documentation of every public name whose home is in this folder of the package."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        folder = self.arguments[0]
        if folder == "figures":
            names = [f"igpt_lab.figures.{name}" for name in sorted(importlib.import_module("igpt_lab.figures").__all__)]
        else:
            homes = {name: home for name, home in lab._HOME.items() if home.partition(".")[0] == folder}
            names = [f"igpt_lab.{homes[name]}.{name}" for name in sorted(homes)]
        return self.parsed("\n".join(self.entry(name) for name in names))

    def entry(self, path: str) -> str:
        """A section of Markdown for one name: the directive of autodoc, or the value of a constant."""
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        if not callable(value):
            return f"## {name}\n\n```python\n{name} = {pprint.pformat(value, width=110, sort_dicts=False)}\n```\n"
        kind = "autoclass" if isinstance(value, type) else "autofunction"
        options = members_of(value) if kind == "autoclass" else ""
        return f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {path}\n{options}```\n"

    def parsed(self, text: str) -> list[nodes.Node]:
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class CommandHelp(PublicNames):
    """`{command-help}`: what `igpt-lab --help` says, and the help of each command."""

    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "84"  # of a page, for argparse
        parser = build_parser()
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        texts = [self.block("igpt-lab", parser.format_help())]
        for name in commands.choices:
            (chosen,) = (a for a in build_parser(name)._actions if isinstance(a, argparse._SubParsersAction))
            texts.append(self.block(f"igpt-lab {name}", chosen.choices[name].format_help()))
        return self.parsed("\n".join(texts))

    def block(self, title: str, text: str) -> str:
        return f"## {title}\n\n````text\n{textwrap.dedent(text).rstrip()}\n````\n"


def escape_bars(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """|x| is a size in a docstring, and would be a substitution on a page."""
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line) for line in lines]


def keep_returns_together(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes the first line of Returns up to a colon for a type: it gets a first line of one word."""
    for place, line in reversed(list(enumerate(lines))):
        if place and lines[place - 1] in ("Returns:", "Yields:"):
            indent = line[: len(line) - len(line.lstrip())]
            first, _, rest = line.strip().partition(" ")
            lines[place : place + 1] = [indent + first, indent + rest] if rest else [line]


def plain_defaults(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """A function or class as a default is its name: of `<function f>` Sphinx cannot tell where it ends."""
    return signature and re.sub(r"<(?:function|class) '?(\w+)'?>", r"\1", signature), returned


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-docstring", keep_returns_together, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-signature", plain_defaults)
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
