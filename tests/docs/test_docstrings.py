"""Docstrings of public functions: those with more than four arguments have all sections, and every example is true."""

import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import igpt_lab as lab

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lab.__file__).parent
PAGE = ROOT / "docs/api/index.md"  # says what is there before an example
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FEW = 4  # arguments that a signature and a sentence explain
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+(?:, \w+)*): +\S", re.MULTILINE)


def public() -> dict[str, Callable]:
    """Every function that `dir` shows of the package and of its figures, and every method of their classes."""
    functions = {}
    for place in (lab, lab.figures):
        for name in dir(place):
            value = getattr(place, name)
            if inspect.isclass(value):
                functions |= {method.__qualname__: method for method in methods(value) if method.__name__ != "__init__"}
                public_bases = [base for base in value.__mro__[1:] if hasattr(lab, base.__name__)]
                if is_ours(value.__init__) and value.__init__ not in [base.__init__ for base in public_bases]:
                    functions[f"{value.__name__}.__init__"] = value.__init__
            elif inspect.isfunction(value):
                functions[f"{place.__name__.replace('igpt_lab', 'lab')}.{name}"] = value
    return functions


def methods(kind: type) -> list[Callable]:
    """What this package wrote of a class and of its bases, `__init__` too; a dataclass's own is its fields."""
    names = [name for name in dir(kind) if name == "__init__" or not name.startswith("_")]
    members = [inspect.getattr_static(kind, name) for name in names]
    return [getattr(kind, name) for name, value in zip(names, members, strict=True) if is_ours(value)]


def is_ours(value: object) -> bool:
    """Whether it is a function, or a class method, that is written in this package."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    return inspect.isfunction(function) and Path(function.__code__.co_filename).is_relative_to(PACKAGE)


def arguments(function: Callable) -> list[str]:
    """Names as a docstring writes them: `**options` with its stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return [stars.get(one.kind, "") + one.name for one in parameters if one.name != "self"]


def documentation(name: str, function: Callable) -> str:
    """A docstring; that of a class is also its `__init__`'s."""
    owner = name.removesuffix(".__init__")
    return inspect.getdoc(function if owner == name else getattr(lab, owner, function)) or ""


def sections(text: str) -> dict[str, str]:
    """Title -> text of every section of a docstring in Google's style."""
    parts = re.split(r"^(Args|Returns|Yields|Raises|Example):\n", text, flags=re.MULTILINE)
    return {
        title: re.split(r"^\S", body, flags=re.MULTILINE)[0]
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def missing(name: str, function: Callable) -> list[str]:
    """What a docstring lacks: sections, arguments, and arguments that the function does not have."""
    bodies = sections(documentation(name, function))
    wanted = ["Args", "Raises", "Example"]
    if not name.endswith("__init__") and inspect.signature(function).return_annotation not in (None, "None"):
        wanted.append("Yields" if "Yields" in bodies else "Returns")
    lacks = [title for title in wanted if not bodies.get(title, "").strip()]
    explained = [one for names in ENTRY.findall(bodies.get("Args", "")) for one in names.split(", ")]
    expected = arguments(function)
    lacks += [one for one in expected if one not in explained]
    lacks += [f"{one}, which is no argument" for one in explained if one not in expected]
    return lacks + ["what it raises by name" for _ in [0] if not ENTRY.search(bodies.get("Raises", ""))]


PUBLIC = public()
LONG = {name: function for name, function in PUBLIC.items() if len(arguments(function)) > FEW}
WITH_EXAMPLE = [name for name, function in PUBLIC.items() if ">>>" in documentation(name, function)]


def test_what_is_missing_is_seen():
    def f(a, b, *, c=0, **rest) -> int:
        """Sum.

        Args:
            a, b: Numbers.
            c: Another.
                d: in its text.
            e: What is not there.

        Raises:
            ValueError: Never.
        """

    assert missing("f", f) == ["Example", "Returns", "**rest", "e, which is no argument"]
    assert {
        "lab.extract",
        "ImageGPTPreTrainedModel.from_pretrained",
        "Explorer.__init__",
        "lab.figures.layer_curve",
    } <= set(LONG)


def test_every_public_function_has_a_docstring():
    assert not [name for name, function in PUBLIC.items() if not documentation(name, function)]


@pytest.mark.parametrize("name", LONG)
def test_a_long_signature_is_explained(name):
    assert not missing(name, LONG[name])


@pytest.fixture(scope="session")
def names(tmp_path_factory) -> tuple[Path, dict]:
    """A folder, and the names that the page of the API makes there."""
    folder, names = tmp_path_factory.mktemp("examples"), {}
    (folder / "openai-ar").symlink_to(ROOT / "tests/data/openai-ar")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        exec(compile(code, PAGE, "exec"), names)
    return folder, names


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_an_example_shows_what_it_gives(name, names, monkeypatch):
    folder, known = names
    monkeypatch.chdir(folder)
    text, said = documentation(name, PUBLIC[name]), []
    example = doctest.DocTestParser().get_doctest(text, dict(known), name, None, 0)
    failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    plt.close("all")
    assert not failed, "".join(said)
