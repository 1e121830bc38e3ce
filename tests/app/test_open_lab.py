"""A folder of the user's own: what is copied into it, what is left alone, and how JupyterLab is opened on it."""

import re
import tomllib
from pathlib import Path

import pytest

from igpt_lab.app import cli
from igpt_lab.app import notebooks as workbench

ROOT = Path(__file__).resolve().parents[2]


def test_edits_are_never_overwritten(tmp_path):
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.mkdir()
    for name in ("a.ipynb", "b.ipynb", "notes.txt"):
        (source / name).write_text(f"theirs {name}")
    copied, there = workbench.copy_notebooks(source, mine)
    assert [each.name for each in copied] == ["a.ipynb", "b.ipynb"] and there == []
    (mine / "a.ipynb").write_text("edited")
    (mine / "b.ipynb").unlink()
    (source / "c.ipynb").write_text("new")
    copied, there = workbench.copy_notebooks(source, mine)
    assert [each.name for each in copied] == ["b.ipynb", "c.ipynb"] and [each.name for each in there] == ["a.ipynb"]
    assert (mine / "a.ipynb").read_text() == "edited" and (mine / "b.ipynb").read_text() == "theirs b.ipynb"


def test_loopback_and_a_token_of_its_own(tmp_path):
    first, second = (workbench.arguments(tmp_path, first="notebooks/a.ipynb", port=1, browser=False) for _ in range(2))
    tokens = [re.search(r"IdentityProvider\.token=(\w+)", " ".join(each))[1] for each in (first, second)]
    assert len(tokens[0]) == 48 and tokens[0] != tokens[1]
    assert "--ServerApp.ip=127.0.0.1" in first and "--PasswordIdentityProvider.hashed_password=" in first
    assert "--ServerApp.open_browser=False" in first
    assert "--ServerApp.open_browser=False" not in workbench.arguments(tmp_path, first="a", port=1, browser=True)


def test_the_command_copies_and_opens(tmp_path, monkeypatch, capsys):
    opened = {}
    monkeypatch.setattr(workbench, "open_lab", lambda folder, **how: opened.update(how, folder=folder))
    assert cli.main(["lab", str(tmp_path / "mine"), "--no-browser", "--port", "8123"]) == 0
    names = sorted(path.name for path in (tmp_path / "mine/notebooks").iterdir())
    assert names == sorted(path.name for path in workbench.notebooks().glob("*.ipynb"))
    assert opened.pop("folder") == tmp_path / "mine"
    assert opened == {"first": f"notebooks/{workbench.NOTEBOOKS[0]}.ipynb", "port": 8123, "browser": False}
    assert f"{len(names)} notebooks copied, 0 left" in capsys.readouterr().out


def test_a_wheel_has_the_notebooks_and_the_front_end(tmp_path, monkeypatch):
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["data-files"] == {"share/igpt-lab/notebooks": ["notebooks/*.ipynb"]}
    for file in map(
        (ROOT / "igpt_lab").joinpath,
        ("app/explorer/explorer.js", "app/explorer/explorer.css", "app/report.css", "py.typed"),
    ):
        assert any(file in (ROOT / "igpt_lab").glob(pattern) for pattern in setup["package-data"]["igpt_lab"])
    installed = tmp_path / "share/igpt-lab/notebooks"
    installed.mkdir(parents=True)
    monkeypatch.setattr(workbench, "__file__", str(tmp_path / "site-packages/igpt_lab/app/notebooks.py"))
    monkeypatch.setattr(workbench.sys, "prefix", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone of the repository"):
        workbench.notebooks()
    (installed / f"{workbench.NOTEBOOKS[0]}.ipynb").write_text("{}")
    assert workbench.notebooks() == installed
