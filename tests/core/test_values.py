"""The end of an error about a misspelt name, and what is refused, against words written by hand."""

import pytest

from igpt_lab.core.values import MANY, check, closest, did_you_mean


def test_a_misspelt_name_gets_the_closest_and_a_short_list():
    assert did_you_mean("ln1", ["ln_1", "mlp_out"]) == "expected one of ln_1, mlp_out; did you mean 'ln_1'?"
    assert did_you_mean("zzz", ["ln_1", "mlp_out"]) == "expected one of ln_1, mlp_out"
    assert did_you_mean("moodel", ["model"], "expected a folder") == "expected a folder; did you mean 'model'?"
    assert closest("zzz", ["ln_1"]) == "" and closest("ln1", {"ln_1": 0}) == "ln_1"


def test_a_long_list_is_told_only_where_no_name_is_like_it():
    known = [f"--option-{letter}" for letter in "abcdefghijklmnop"]
    assert len(known) > MANY
    assert did_you_mean("--option-x", known).startswith("did you mean '--option-")
    assert did_you_mean("zzz", known) == f"expected one of {', '.join(known)}"


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (True, "int", "n is True; expected a whole number"),
        (float("nan"), "float | None", "n is nan; expected a finite number or None"),
        ([1, "a"], "list[int]", "n is [1, 'a']; expected list[int]"),
    ],
)
def test_what_is_refused_is_one_line(value, kind, words):
    with pytest.raises(ValueError) as caught:
        check("n", value, kind)
    assert str(caught.value) == words
