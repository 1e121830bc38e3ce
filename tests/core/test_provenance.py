"""`provenance` against hashlib, git, and a disk that fails at the worst moment."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_lab.core import provenance
from igpt_lab.core.provenance import RunRecord, atomic_write, commit, digest, versions, write_together

PACKAGE = Path(provenance.__file__).parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_gives_the_bytes_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    assert atomic_write(path, "Pixel für Pixel\n") == path
    assert path.read_bytes() == "Pixel für Pixel\n".encode()
    atomic_write(str(path), b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    atomic_write(tmp_path / "old", b"before")
    monkeypatch.setattr(os, call, fail)
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            atomic_write(tmp_path / name, b"after" * 1000)
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"before"


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_who_may_read_a_file_the_umask_says_from_the_beginning(tmp_path, monkeypatch, umask):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(os.stat(a).st_mode & 0o777) or replace(a, b))
    before = os.umask(umask)
    try:
        path = atomic_write(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert seen == [path.stat().st_mode & 0o777] == [0o666 & ~umask]


def test_the_file_is_whole_before_it_has_its_name(tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def look(source, target):
        seen.append((open(source, "rb").read(), os.path.exists(target), os.path.dirname(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    atomic_write(tmp_path / "file", b"whole")
    assert seen == [(b"whole", False, str(tmp_path))]


@pytest.mark.parametrize("stopped", range(1, 4))
def test_files_that_belong_together_are_all_old_or_all_new_where_ctrl_c_comes(tmp_path, monkeypatch, stopped):
    paths = [tmp_path / name for name in ("a", "b", "c")]

    def write_and_stop(call, text):
        done, original = [], getattr(os, call)

        def calling(*arguments):
            done.append(original(*arguments))
            if len(done) == stopped:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, call, calling)
            write_together(dict.fromkeys(paths, text))
        assert names(tmp_path) == ["a", "b", "c"]
        return [path.read_text() for path in paths]

    handler = signal.getsignal(signal.SIGINT)
    write_together(dict.fromkeys(paths, "old"))
    assert write_and_stop("fsync", "new") == ["old"] * 3
    assert write_and_stop("replace", "new") == ["new"] * 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_digest_is_sha256(tmp_path):
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    assert digest(data) == digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest({"b": [1, 2.5], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,2.5]}').hexdigest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [{"a": object()}, {1, 2}, float("nan")])
def test_what_json_cannot_hold_has_no_digest(value):
    with pytest.raises((TypeError, ValueError)):
        digest(value)


def test_run_record_round_trip():
    record = RunRecord("probe", config={"betas": (0.9, 0.95), "layers": [0, 1], "name": "ä"}, seed=3)
    plain = record.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["config"] == {"betas": [0.9, 0.95], "layers": [0, 1], "name": "ä"}
    assert RunRecord(**plain).to_dict() == plain
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seed = 4
    with pytest.raises(TypeError):
        RunRecord("probe", sede=3)


@dataclasses.dataclass
class Settings:
    sizes: tuple = (1, np.int8(2))
    folder: Path = Path("a/b")


def test_run_record_takes_what_a_notebook_has():
    config = {
        "integer": np.int64(3), "float": np.float32(0.5), "bool": np.bool_(True), "array": np.array([[1, 2], [3, 4]]),
        "tensor": torch.tensor([1.5, math.nan]), "nan": math.nan, "infinities": [math.inf, -np.float64(math.inf)],
        "path": Path("a/b"), "settings": Settings(), "set": {3, 1, 2}, "tuple": (1, (2,)), "none": None,
        "range": range(2), "series": pd.Series([1.0, math.nan]), 4: "four", None: 0, True: 1, ("a", 1): 2,
        "type": float, "name": os.fsdecode(b"\xff"), "complex": 1j,
    }  # fmt: skip
    plain = RunRecord("probe", config, seed=np.int32(3)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["seed"] == 3 and type(plain["seed"]) is int
    assert plain["config"] == {
        "integer": 3, "float": 0.5, "bool": True, "array": [[1, 2], [3, 4]], "tensor": [1.5, None], "nan": None,
        "infinities": ["inf", "-inf"], "path": "a/b", "settings": {"sizes": [1, 2], "folder": "a/b"}, "set": [1, 2, 3],
        "tuple": [1, [2]], "none": None, "range": [0, 1], "series": [1.0, None], "4": "four", "null": 0, "true": 1,
        '["a", 1]': 2, "type": "<class 'float'>", "name": "\\udcff", "complex": "1j",
    }  # fmt: skip


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(ATOMS, inner) | st.tuples(inner)))
def test_any_run_record_can_be_written_and_what_json_has_stays(value):
    plain = RunRecord("probe", {"value": value}).to_dict()
    text = json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(text) == plain == RunRecord(**plain).to_dict()
    try:
        expected = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError):
        return
    assert plain["config"]["value"] == expected


def test_run_record_is_the_same_at_any_time():
    plain = RunRecord("probe", seed=3).to_dict()
    assert plain == RunRecord("probe", seed=3).to_dict()
    assert set(plain) == {"what", "config", "seed", "commit", "versions"}
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d|\b1[5-9]\d{8}\b", json.dumps(plain))


def test_versions_are_the_installed_ones():
    recorded = versions()
    assert recorded["torch"] == version("torch")
    assert recorded["python"].count(".") == 2
    assert set(recorded) <= {"python", *provenance.PACKAGES}


def loaded_with(module):
    """Modules of the package, as `core/hub`, that Python itself loads with one of them; folders are left out."""
    code = f"import sys, igpt_lab.{module.replace('/', '.')}; print(*(m.__file__ for m in sys.modules.values() if "
    code += "getattr(m, '__name__', '').startswith('igpt_lab.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    files = [Path(file).relative_to(PACKAGE).with_suffix("") for file in done.stdout.split()]
    return {file.as_posix() for file in files if file.name != "__init__"}


def digested(monkeypatch):
    """The modules in the digest of the code."""
    seen = {}
    monkeypatch.setattr(provenance, "digest", lambda modules: seen.update(modules) or "0" * 64)
    provenance.digest_of_code(PACKAGE)
    return set(seen)


def test_every_file_that_makes_stored_numbers_is_in_the_digest(monkeypatch):
    exceptions, loaded = set(provenance.NOT_NUMBERS), loaded_with(provenance.MAKER)
    assert loaded - exceptions <= digested(monkeypatch)
    assert exceptions <= loaded, "an exception that is not imported any more"
    assert {
        "images/palette",
        "models/imagegpt",
        "models/fast",
        "features/hooks",
        "features/poolings",
        "features/runner",
        "features/writing",
    } <= loaded - exceptions


@pytest.fixture
def package(tmp_path):
    """A copy of the package's code."""
    shutil.copytree(PACKAGE, tmp_path / "igpt_lab", ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    return tmp_path / "igpt_lab"


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_comments_docstrings_and_formatting_are_no_code(package):
    before = provenance.digest_of_code(package)
    assert before == provenance.digest_of_code(PACKAGE) and before[:16] == provenance.made_by()["code"]
    network = package / "models/imagegpt.py"
    edit(network, '"""ImageGPT (', '"""Another text (')
    edit(network, "class Linear(nn.Module):", "# A comment.\nclass Linear(  nn.Module ,):")
    edit(network, '"""(N, T, D) -> (N, T, D)', '"""Tokens')
    edit(package / "core/cluster.py", "import ", "import decimal\nimport ")  # makes no number
    assert provenance.digest_of_code(package) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("models/imagegpt.py", "1 / math.sqrt(", "2 / math.sqrt("),
        ("models/fast.py", "1.702", "1.703"),
        ("images/palette.py", "import numpy as np", "import numpy as np\nimport igpt_lab.core.significance"),
        ("features/poolings.py", "dim=1", "dim=-2"),
    ],
)
def test_what_computes_is_code(package, file, old, new):
    before = provenance.digest_of_code(package)
    edit(package / file, old, new)
    assert provenance.digest_of_code(package) != before


def git(folder, *command):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_names_the_checkout_and_its_changes(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "igpt_lab"
    (package / "core").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(package / "core/provenance.py"))
    assert commit() == ""
    git(package.parent, "init", "-q")
    (package.parent / "README.md").write_text("one")
    git(package.parent, "add", "README.md")
    git(package.parent, "commit", "-qm", "first")
    (package / "core/provenance.py").write_text("one")
    assert commit() == "", "a package installed inside somebody else's checkout is not that checkout"
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "second")
    assert commit() == git(package, "rev-parse", "HEAD")
    (package.parent / "README.md").write_text("two")
    assert commit() == git(package, "rev-parse", "HEAD"), "only the package's own files change a number"
    (package / "core/provenance.py").write_text("two")
    assert commit() == git(package, "rev-parse", "HEAD") + "+changes"


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
