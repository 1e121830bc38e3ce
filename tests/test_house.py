"""The house: what a folder of the package imports, an instant `import igpt_lab`, and names that say what they hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "igpt_lab"
LEFT = {"core": set(), "images": {"core"}, "figures": {"core"}}
LEFT["models"] = {"core", "images"}
LEFT["features"] = LEFT["models"] | {"models"}
LEFT["probing"] = LEFT["sampling"] = LEFT["features"] | {"features", "figures"}  # what they return can be plotted
LEFT["explaining"] = LEFT["probing"] | {"probing", "sampling"}
LEFT["training"] = LEFT["explaining"] | {"explaining"}
LEFT["app"] = LEFT["training"] | {"training", "figures", ""}  # "": the package itself, which offers every name
OTHERS = {"bundled", "__pycache__"}  # data, and what Python writes
FILES = sorted(path for room in LEFT for path in (PACKAGE / room).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Folders of this package that a module's source imports, at any depth; '' for the package itself."""
    paths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "expected absolute imports"
            paths += [f"{node.module}.{alias.name}" for alias in node.names]
    names = [path.split(".") + [""] for path in paths]
    return {parts[1] for parts in names if parts[0] == "igpt_lab"}


def test_imports_are_seen():
    source = "import igpt_lab.a.x\nfrom igpt_lab import b, c\nfrom igpt_lab.d import x\n"
    source += "def f():\n from igpt_lab.e.y import z\nimport torch.f, numpy\nfrom igpt_labs import z"
    assert imports(source) == set("abcde")
    assert imports("import igpt_lab") == {""}


def test_the_package_is_its_folders():
    names = {path.name for path in PACKAGE.iterdir()} - OTHERS
    assert names == {*LEFT, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_folder_imports_only_folders_to_its_left(file):
    room = file.relative_to(PACKAGE).parts[0]
    wrong = imports(file.read_text(encoding="utf-8")) - LEFT[room] - {room}
    assert not wrong, f"{file} imports {sorted(wrong)}; it may import {sorted(LEFT[room])}"


def vague_names(source: str) -> list[str]:
    """Variables and arguments of a source that are named after no thing."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return [name for name in names if name in {"each", "found", "given", "how"}]


def test_vague_names_are_seen():
    assert vague_names("def f(how): given, x = [each for each in how]; found(x)") == ["given", "each", "how"]


def test_names_say_what_they_hold():
    root = PACKAGE.parent
    files = [path for folder in ("igpt_lab", "tests", "benchmarks", "docs") for path in (root / folder).rglob("*.py")]
    assert not {path: names for path in files if (names := vague_names(path.read_text(encoding="utf-8")))}


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


def test_dir_shows_what_is_public_and_nothing_else():
    import igpt_lab as lab

    assert dir(lab) == sorted(["__version__", *lab.__all__])
    assert dir(lab.figures) == sorted(lab.figures.__all__)


def test_what_public_functions_return_can_be_imported_from_the_package():
    import typing

    import igpt_lab as lab

    missing = set()
    for function in (getattr(lab, name) for name in lab.__all__):
        if not isinstance(function, type) and callable(function):
            try:
                returned = typing.get_type_hints(function).get("return")
            except NameError:  # a name that only a type checker imports
                continue
            missing |= {kind.__name__ for kind in (returned, *typing.get_args(returned)) if is_of_the_package(kind)}
    assert missing <= set(lab.__all__)


def is_of_the_package(kind: object) -> bool:
    return isinstance(kind, type) and kind.__module__.startswith("igpt_lab.")


def test_figures_need_no_torch():
    code = "import sys, igpt_lab.figures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
