"""The house of the design: a module imports only modules above it, and `import igpt_lab` is instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "igpt_lab"
ORDER = (
    "cards cells provenance storage downloads checkpoints tensorflow_bundle palette pixels model openai sources "
    "data token_cache hooks locks manifest store row_reader cluster extraction planning upkeep checks "
    "significance logistic probes streaming parallel training finetuning decoding sampling likeness geometry "
    "ablation dynamics looks curves galleries figures explorer results report workbench cli"
).split()
ONLY = {"cards": set(), "cells": set(), "palette": set(), "looks": set(), "model": {"checkpoints"}}
ONLY |= {"pixels": {"checkpoints", "palette"}}
ONLY |= {"curves": {"looks"}, "galleries": {"looks"}, "figures": {"provenance", "looks", "curves", "galleries"}}
OUTSIDE = {"__init__", "__main__"}  # they open the house, and are no room of it
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in OUTSIDE)


def imports(source: str) -> set[str]:
    """Names of this package that a module's source imports, at any depth; '' for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["igpt_lab" if node.level else "", node.module]))
            paths = [f"{base}.{alias.name}" for alias in node.names] if base == "igpt_lab" else [base]
        else:
            continue
        found |= {path.partition(".")[2].partition(".")[0] for path in paths if path.split(".")[0] == "igpt_lab"}
    return found


def test_imports_are_seen():
    source = "import igpt_lab.a\nfrom igpt_lab import b, c\nfrom igpt_lab.d import x\ndef f():\n from .e import y"
    assert imports(source + "\n from . import g\nimport torch.f, numpy\nfrom igpt_labs import z") == set("abcdeg")
    assert imports("import igpt_lab") == {""}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_above_it(module):
    assert module in ORDER, f"igpt_lab/{module}.py is not in the design's list; add it there and here"
    allowed = ONLY.get(module, set(ORDER[: ORDER.index(module)]))
    if module == ORDER[-1]:
        allowed.add("")  # the package itself offers every module, so only the last one may import it
    wrong = imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) - allowed
    assert not wrong, f"igpt_lab/{module}.py imports {sorted(wrong)}; it may import {sorted(allowed)}"


@pytest.mark.skipif(not (PACKAGE / "__init__.py").is_file(), reason="igpt_lab/__init__.py is not written yet")
def test_import_alone_is_instant():
    heavy = ["torch", "sklearn", "datasets", "pandas", "matplotlib", "transformers"]
    code = f"import sys, igpt_lab; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_offered_is_there():
    import igpt_lab as lab

    assert all(getattr(lab, name) is not None for name in lab.__all__)
    wanted = {"convert_openai", "download_openai", "load_tokens", "next_pixel_loss", "masked_pixel_loss"}
    wanted |= {"compare", "peak_set", "layer_table", "spread"}
    assert wanted <= set(lab.__all__)


@pytest.mark.skipif(not (PACKAGE / "figures.py").is_file(), reason="igpt_lab/figures.py is not written yet")
def test_figures_need_no_torch():
    code = "import sys, igpt_lab.figures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
