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


def test_what_no_folder_of_stores_can_be_is_one_line(tmp_path):
    images, file = lab.load_images("fashion-mini", "test", limit=2), tmp_path / "file"
    file.write_text("")
    for store, message in (
        ("", "store is empty; expected a folder"), (str(file), f"{file} is a file; expected a folder"),
        (file / "below", f"{file} is a file"), (f"{tmp_path}/a\0b", "a name in it has a NUL character"),
        ("x" * 5000, "'xxx.*xxx'... is not a path: a name in it has a NUL character, or more than 255"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as raised:
            lab.extract("fashion-xs", images, store=store, layers=1, device="cpu", progress=False)
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)
    for name in ("a\0b", "x" * 5000):
        for load in (lab.load_images, lab.load_model):
            with pytest.raises(ValueError, match="is not a path"):
                load(name)
    with pytest.raises(ValueError, match="split is empty"):
        lab.load_images("fashion-mini", "")


def test_a_store_at_a_file_address_is_whole_and_locked_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = lab.load_images("fashion-mini", "test", limit=4)
    options = {"layers": 1, "device": "cpu", "progress": False}
    at_address = lab.extract("fashion-xs", images, store=f"file://{tmp_path}/s", **options)
    assert lab.extract("fashion-xs", images, store="~/s", **options).path == at_address.path
    assert isinstance(at_address.path, Path) and at_address.path.parent == tmp_path / "s"
    assert isinstance(lock_of(place(f"file://{tmp_path}/s/x")), Lock)
