"""Places on this disk, however they are spelt."""

from pathlib import Path

import pytest

import igpt_lab as lab
from igpt_lab.core.storage import Lock, lock_of, place


def test_a_place_on_this_disk_in_each_of_its_spellings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for spelling in ("~/a b", f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a b", tmp_path / "a b"):
        assert place(spelling) == tmp_path / "a b"
    with pytest.raises(ValueError, match="elsewhere"):
        place("file://elsewhere/a")
    with pytest.raises(ValueError, match="no user of this name; write ./~nosuchuser/x"):
        place("~nosuchuser/x")


def test_a_store_at_a_file_address_is_whole_and_locked_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = lab.load_images("fashion-mini", "test", limit=4)
    options = {"layers": 1, "device": "cpu", "progress": False}
    at_address = lab.extract("fashion-xs", images, store=f"file://{tmp_path}/s", **options)
    assert lab.extract("fashion-xs", images, store="~/s", **options).path == at_address.path
    assert isinstance(at_address.path, Path) and at_address.path.parent == tmp_path / "s"
    assert isinstance(lock_of(place(f"file://{tmp_path}/s/x")), Lock)
