"""Arguments as people pass them in a notebook: numpy's numbers, one value for a list, and what cannot be meant."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import igpt_lab as lab
from igpt_lab.core.arguments import check_fields, checked, plain

IMAGES = lab.load_images("fashion-mini", "test", limit=8)
TAKEN = [
    (np.int64(3), int | None, 3),
    (None, int | None, None),
    (np.float32(0.5), float, 0.5),
    (2, float, 2),
    (np.True_, bool, True),
    (np.str_("a"), str, "a"),
    (Path("a"), str | Path, Path("a")),
    (8, Sequence[int] | None, [8]),
    (np.int32(8), Sequence[int], [8]),
    (np.arange(3), Sequence[int], [0, 1, 2]),
    (range(2), Sequence[int], [0, 1]),
    ((-1, np.int8(2)), Sequence[int], [-1, 2]),
    ("ln_1", Sequence[str], ["ln_1"]),
    (np.array(["a", "b"]), Sequence[str], ["a", "b"]),
    (np.float64(1), Sequence[float], [1.0]),
    ([], Collection[int] | None, []),
    (np.arange(2), np.ndarray | int, ...),  # arrays are the function's own to judge
    ({1: 2}, Mapping[int, int], ...),
    (print, Callable[..., int], ...),
    (object(), Any, ...),
]


@pytest.mark.parametrize(("value", "annotation", "result"), TAKEN)
def test_a_value_is_taken_as_plain_python(value, annotation, result):
    taken = plain(value, annotation, "x")
    if result is ...:
        assert taken is value
    else:
        assert taken == result and type(taken) is type(result)
        assert not isinstance(taken, list) or all(type(one) in (int, float, str) for one in taken)


REFUSED = [
    (5.0, int | None, "x=5.0 is of type float; expected a whole number or None"),
    ("5", int, "x='5' is of type str; expected a whole number"),
    (True, int, "x=True is of type bool; expected a whole number"),
    (np.True_, float, "expected a number"),
    (1, bool, "x=1 is of type int; expected True or False"),
    ("3", int | None, "x='3' is of type str; expected a whole number or None"),
    ("3", int | Sequence[int], "x='3' is of type str; expected a whole number or a list of these"),
    ("3", Sequence[int] | None, "x='3' is of type str; expected None or a list, each a whole number"),
    ([3.5], Sequence[int], r"x\[0\]=3.5 is of type float; expected a whole number"),
    ([], Sequence[int] | None, "x is empty; expected at least one, or leave it out"),
    (np.zeros(0, int), Sequence[int], "x is empty"),
    ({3: 1}, Sequence[int], "x={3: 1} is of type dict"),
    (np.zeros((2, 2), int), Sequence[int], r"x\[0\]=array\(\[0, 0\]\) is of type ndarray"),
    (None, str | Path, "x=None is of type NoneType; expected a string or a path"),
    (b"a", Sequence[str], "x=b'a' is of type bytes"),
]


@pytest.mark.parametrize(("value", "annotation", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(value, annotation, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        plain(value, annotation, "x")
    assert "\n" not in str(caught.value)


def test_a_class_of_the_same_name_is_told_by_its_module():
    theirs = type("Path", (), {"__module__": "of.others"})()
    with pytest.raises(TypeError, match=r"is of type of\.others\.Path; expected a path"):
        plain(theirs, Path, "x")


def test_a_checked_function_keeps_its_face_and_its_own_errors():
    @checked
    def area(width: int, height: int = 2, *more: int, **others: int) -> int:
        """Product."""
        return width * height

    assert area(np.int8(100), height=np.int8(100)) == 10_000  # which int8 would not hold
    assert area.__doc__ == "Product." and list(inspect.signature(area).parameters) == [
        "width",
        "height",
        "more",
        "others",
    ]
    with pytest.raises(TypeError, match=r"area\(\) missing 1 required positional argument: 'width'"):
        area()
    with pytest.raises(TypeError, match="height='2' is of type str"):
        area(1, "2")


def test_fields_of_a_dataclass_are_held_to_their_annotations():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: int = 1
        layers: Sequence[int] | None = None

        def __post_init__(self):
            check_fields(self)

    assert Settings(np.int64(4), np.arange(2)) == Settings(4, [0, 1])
    with pytest.raises(TypeError, match="steps=1.5"):
        Settings(1.5)


def test_every_public_function_checks_its_arguments():
    """By the source: a name that the package offers is a class, or a function below `@checked`."""
    unchecked = {"surprise", "next_pixel_loss", "masked_pixel_loss"}  # an alias; tensors in a training step
    for name, module in lab._HOME.items():
        source = Path(inspect.getsourcefile(__import__(f"igpt_lab.{module}", fromlist=["x"])))
        nodes = [node for node in ast.parse(source.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        for node in nodes:
            if node.name == name and name not in unchecked:
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                assert "checked" in decorators, f"{source}: {name}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lab.extract("fashion-xs", 5), "source is of type int; expected a name, a path, an array"),
        (lambda: lab.extract("fashion-xs", []), "images is empty"),
        (lambda: lab.load_images("fashion-mini", "test", limit=5.5), "limit=5.5 is of type float"),
        (lambda: lab.probe_layers("a store", "a store"), "train='a store' is of type str.*Features.from_store"),
        (lambda: lab.extract("fashion-xs", IMAGES, workers=-3), "workers=-3; expected at least 1"),
        (lambda: lab.sample(lab.load_model("fashion-xs"), -1), "count=-1; expected at least 0"),
        (lambda: lab.sample(lab.load_model("fashion-xs"), 1, seed=np.int64(-1)), "seed=-1; expected at least 0"),
        (lambda: lab.ExtractionSettings(layers=[]), "layers is empty"),
        (lambda: lab.PretrainConfig(steps=1.5), "steps=1.5; expected int"),
        (lambda: lab.FinetuneConfig(patience="3"), "patience='3'; expected int"),
    ],
)  # fmt: skip
def test_a_wrong_argument_names_the_way(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_numpy_numbers_and_single_values_are_as_good_as_plain_ones(tmp_path):
    images = lab.load_images("fashion-mini", "test", limit=np.int64(8), seed=np.int64(0))
    assert images.fingerprint == IMAGES.fingerprint
    options = {"store": tmp_path, "device": "cpu", "progress": False}
    store = lab.extract("fashion-xs", images, layers=np.int64(2), points="ln_1", batch_size=np.int64(4), **options)
    assert lab.extract("fashion-xs", [images], layers=[2], points=["ln_1"], **options).path == store.path
    assert store.layer("ln_1", np.int64(2), "test").shape == (8, 96)
