"""A second view: moved as it says, the same for a row whatever else is there, and a set of its own."""

import numpy as np
import pytest

import igpt_lab as lab
from igpt_lab.images.views import _shifted, second_view


def test_pixels_move_and_edges_are_continued():
    image = np.arange(12).reshape(3, 4, 1).repeat(3, axis=2)
    moved = _shifted(image, 1, -2)[..., 0]
    assert moved.tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]
    np.testing.assert_array_equal(_shifted(image, 0, 0), image)


def test_a_view_is_one_of_the_moves_by_one_or_two_pixels(test):
    seen = set()
    for before, after in zip(test, second_view(test), strict=True):
        image, moved = np.asarray(before), np.asarray(after)
        moves = [(flip, y, x) for flip in (False, True) for y in (-2, -1, 1, 2) for x in (-2, -1, 1, 2)]
        matches = [m for m in moves if (_shifted(image[:, ::-1] if m[0] else image, *m[1:]) == moved).all()]
        assert len(matches) == 1
        seen |= {("flip", matches[0][0]), ("down", matches[0][1]), ("right", matches[0][2])}
    assert len(seen) == 2 + 4 + 4


def test_a_view_depends_on_the_row_and_the_seed_alone(test):
    whole, part = second_view(test), second_view(test[[5, 3]])
    np.testing.assert_array_equal(part[0], whole[5])
    other = second_view(test, seed=1)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(whole, other, strict=True))
    prints = {images.fingerprint for images in (test, whole, other, second_view(test, shift=1))}
    assert len(prints) == 4 and whole.fingerprint == second_view(test).fingerprint
    assert whole.labels is test.labels and whole.source is None and "view 0" in whole.name


def test_without_a_shift_images_are_mirrored_or_not(test):
    kinds = {
        (np.asarray(after) == np.asarray(before)).all() or (np.asarray(after) == np.asarray(before)[:, ::-1]).all()
        for before, after in zip(test, second_view(test, shift=0), strict=True)
    }
    assert kinds == {True}


def test_a_view_is_saved_as_it_is_seen(test, tmp_path):
    viewed = second_view(test)
    again = lab.load_images(viewed.save(tmp_path / "set.parquet"))
    np.testing.assert_array_equal(again[4], viewed[4])


def test_what_cannot_be_moved(test, tmp_path):
    with pytest.raises(ValueError, match="shift=-1; expected a number of pixels"):
        second_view(test, shift=-1)
    with pytest.raises(ValueError, match="is changed already"):
        second_view(lab.corrupt(test, "blur", 1.0))
    np.save(tmp_path / "few_teX.npy", np.zeros((3, 16), int))
    with pytest.raises(ValueError, match="holds tokens, and a view changes images"):
        second_view(lab.load_tokens(tmp_path / "few"))
