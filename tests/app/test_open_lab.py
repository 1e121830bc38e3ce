"""A folder of the user's own: what is copied into it, what is left alone, and how JupyterLab is opened on it."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest

from igpt_lab.app import cli, runs
from igpt_lab.app import notebooks as workbench

ROOT = Path(__file__).resolve().parents[2]


def test_edits_are_never_overwritten(tmp_path):
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.mkdir()
    for name in ("a.ipynb", "b.ipynb", "notes.txt"):
        (source / name).write_text(json.dumps(f"theirs {name}"))
    copied, there = workbench.copy_notebooks(source, mine)
    assert [path.name for path in copied] == ["a.ipynb", "b.ipynb"] and there == []
    (mine / "a.ipynb").write_text('"edited"')
    (mine / "b.ipynb").unlink()
    (source / "c.ipynb").write_text("new")
    copied, there = workbench.copy_notebooks(source, mine)
    assert [path.name for path in copied] == ["b.ipynb", "c.ipynb"] and [path.name for path in there] == ["a.ipynb"]
    assert (mine / "a.ipynb").read_text() == '"edited"' and (mine / "b.ipynb").read_text() == '"theirs b.ipynb"'


@pytest.mark.parametrize("damaged", [b"", b'{"cells": [', b'{"cells": []}<<<<<<<', b"\0" * 9])
def test_a_notebook_that_is_cut_does_not_count_as_the_user_s_and_is_kept(tmp_path, capsys, damaged):
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.mkdir(), mine.mkdir()
    for name in ("a.ipynb", "._a.ipynb"):
        (source / name).write_text('{"cells": []}')
    for i in range(2):
        (mine / "a.ipynb").write_bytes(damaged)
        copied, there = workbench.copy_notebooks(source, mine)
        assert copied == [mine / "a.ipynb"] and not there
        assert capsys.readouterr().err.startswith(f"igpt-lab: {mine / 'a.ipynb'} is no whole notebook; it is now")
        assert (mine / "a.ipynb").read_text() == '{"cells": []}'
        assert (mine / f"a.ipynb.damaged{i}").read_bytes() == damaged


def test_a_copy_is_whole_or_absent(tmp_path, monkeypatch):
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.mkdir()
    (source / "a.ipynb").write_text("{}")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        workbench.copy_notebooks(source, mine)
    assert list(mine.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are files")
def test_what_is_no_regular_file_is_left_alone(tmp_path):
    source, mine = tmp_path / "source", tmp_path / "mine"
    source.mkdir(), mine.mkdir()
    for name in "abc":
        (source / f"{name}.ipynb").write_text("{}")
    (mine / "a.ipynb").symlink_to(tmp_path / "nowhere")
    os.mkfifo(mine / "b.ipynb")
    (mine / "c.ipynb").mkdir()
    assert [len(files) for files in workbench.copy_notebooks(source, mine)] == [0, 3]


def test_loopback_and_a_token_of_its_own(tmp_path):
    first, second = (workbench.arguments(tmp_path, first="notebooks/a.ipynb", port=1, browser=False) for _ in range(2))
    tokens = [re.search(r"IdentityProvider\.token=(\w+)", " ".join(arguments))[1] for arguments in (first, second)]
    assert len(tokens[0]) == 48 and tokens[0] != tokens[1]
    assert "--ServerApp.ip=127.0.0.1" in first and "--PasswordIdentityProvider.hashed_password=" in first
    assert "--ServerApp.open_browser=False" in first
    assert "--ServerApp.open_browser=False" not in workbench.arguments(tmp_path, first="a", port=1, browser=True)


def test_the_command_copies_and_opens(tmp_path, monkeypatch, capsys):
    opened = {}
    monkeypatch.setattr(workbench, "open_lab", lambda folder, **options: opened.update(options, folder=folder))
    assert cli.main(["lab", str(tmp_path / "mine"), "--no-browser", "--port", "8123"]) == 0
    names = sorted(path.name for path in (tmp_path / "mine/notebooks").iterdir())
    assert names == sorted(path.name for path in workbench.notebooks().glob("*.ipynb"))
    assert opened.pop("folder") == tmp_path / "mine"
    assert opened == {"first": f"notebooks/{workbench.NOTEBOOKS[0]}.ipynb", "port": 8123, "browser": False}
    assert list((tmp_path / "mine/photos").iterdir()) == [] and not capsys.readouterr().out
    readme = tmp_path / "mine/README.md"
    assert all(f"`{place}" in readme.read_text() for place in ("notebooks/", "photos/", "results/mine/"))
    readme.write_text("mine")
    assert cli.main(["lab", str(tmp_path / "mine"), "--no-browser"]) == 0 and readme.read_text() == "mine"


@pytest.mark.slow
def test_jupyterlab_says_its_address_in_one_line_and_nothing_else(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "igpt_lab", "lab", "mine", "--no-browser", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, env=os.environ | own | {"PYTHONPATH": paths}
        )
    try:
        address = None
        while server.poll() is None and not address:
            time.sleep(0.1)
            address = re.match(
                rf"(http://127.0.0.1:{port}/lab/tree/\S+\?token=\w{{48}}) is ", (tmp_path / "log").read_text()
            )
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(address[1]) as page:
                assert page.status == 200
                break
            time.sleep(0.1)
        (line,) = (tmp_path / "log").read_text().splitlines()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert line.endswith("is JupyterLab on mine; Ctrl-C stops it")


def git(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_each_model_and_image_set_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/photos", "b/photos", "cifar10"):
        (tmp_path / name).mkdir(parents=True)
    names = [runs.run_name(model, images) for model in ("fashion-xs", "openai/imagegpt-small")
             for images in ("fashion-mini", "uoft-cs/cifar10", "a/photos", "../odd: name")]  # fmt: skip
    assert names[:3] == ["fashion-xs-fashion-mini", "fashion-xs-cifar10", "fashion-xs-photos"]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    folder = runs.results_folder("fashion-xs", "a/photos", under="results/mine")
    assert folder == "results/mine/fashion-xs-photos" and Path(folder).is_dir()
    assert folder == runs.results_folder("fashion-xs", str(tmp_path / "a/photos"), under="results/mine")
    (tmp_path / folder / "run.json").write_text('{"images": ')
    with pytest.raises(ValueError, match="run.json does not say whose results these are"):
        runs.results_folder("fashion-xs", "a/photos", under="results/mine")
    (tmp_path / folder / "run.json").unlink()
    runs.results_folder("fashion-xs", "a/photos", under="results/mine")
    assert runs.results_folder("fashion-xs", "a/photos", "~/out") == str(Path("~/out").expanduser())
    with pytest.raises(ValueError, match="is of fashion-xs on .*a/photos, not of fashion-xs on .*b/photos"):
        runs.results_folder("fashion-xs", "b/photos", under="results/mine")
    assert runs.results_folder("fashion-xs", "b/photos", "b/out") == "b/out"
    quick = runs.results_folder("fashion-xs", "a/photos", quick=True, under="results/mine")
    assert quick == f"{folder}-quick"


def test_what_a_run_writes_is_ignored_by_git_and_what_is_shipped_is_not(monkeypatch):
    if git("rev-parse", "--show-toplevel").stdout.strip() != str(ROOT):
        pytest.skip("not a git checkout")
    mine = ROOT / runs.MINE
    assert not git("ls-files", "--", runs.MINE).stdout
    written = ["fashion-xs-fashion-mini/layer_curve.csv", "fashion-xs-fashion-mini/notebooks/00_tour.ipynb",
               "fashion-xs-photos-quick/summary.json", "benchmarks/extract.csv", "studies/regime.png"]  # fmt: skip
    for file in [*(mine / name for name in written), "workbench/results/mine/a/b.csv", "build/benchmarks/a.csv"]:
        assert git("check-ignore", "--quiet", str(file)).returncode == 0, file
    shipped = runs.shipped("fashion-xs", "fashion-mini")
    assert shipped == ROOT / "results/fashion-xs-fashion-mini" and not shipped.is_relative_to(mine)
    assert runs.shipped("cifar10-xs", "../shared/cifar10") == ROOT / "results/cifar10-xs-cifar10"
    for folder in (shipped, ROOT / "results/studies", ROOT / "results/benchmarks", workbench.notebooks()):
        files = [str(file.relative_to(ROOT)) for file in folder.rglob("*") if file.suffix in (".csv", ".png", ".ipynb")]
        assert files and set(files) <= set(git("ls-files").stdout.splitlines())


def test_a_run_by_default_goes_where_the_notebooks_themselves_write(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "notebooks", lambda: tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    folder = runs.begin_run("fashion-xs", "fashion-mini", None, quick=False, renewal=False)
    assert folder == (tmp_path / "results/mine/fashion-xs-fashion-mini").resolve()
    values = runs.values_of_run("fashion-xs", "fashion-mini", folder, quick=False)
    assert values == {"model": "fashion-xs", "images": "fashion-mini"}  # so that no parameter is written into them
    quick = runs.begin_run("fashion-xs", "fashion-mini", None, quick=True, renewal=False)
    values = runs.values_of_run("fashion-xs", "fashion-mini", quick, quick=True)
    assert values == {"model": "fashion-xs", "images": "fashion-mini", "out": str(quick), **workbench.QUICK}


def test_long_notebooks_run_on_demand(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(workbench, "run_notebook", lambda name, *_: ran.append(name))
    monkeypatch.setattr(runs, "conclude", lambda *_: "")
    for options in ([], ["--all"], ["--only", "07_training_dynamics", "--only", "00_tour"]):
        assert cli.main(["reproduce", "--out", str(tmp_path), *options]) == 0
    main = [name for name in workbench.NOTEBOOKS if name[:2] in ("00", "01", "02", "03", "04", "06")]
    assert ran == [*main, *workbench.NOTEBOOKS, "00_tour", "07_training_dynamics"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one notebook and one shipped run, under git."""
    root = tmp_path / "checkout"
    (root / "notebooks").mkdir(parents=True)
    (root / "results/fashion-xs-fashion-mini").mkdir(parents=True)
    for file in ("notebooks/00_tour.ipynb", "results/fashion-xs-fashion-mini/layer_curve.csv"):
        (root / file).write_text("shipped")
    (root / ".gitignore").write_text("results/mine/\n")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(workbench, "notebooks", lambda: root / "notebooks")
    return root


def test_a_user_s_run_never_writes_where_git_keeps_files(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    for out in ("results/fashion-xs-fashion-mini", "results", "."):
        with pytest.raises(ValueError, match="git keeps files in"):
            runs.begin_run("fashion-xs", "fashion-mini", out, quick=False, renewal=False)


def test_a_reference_is_renewed_in_a_clone_only_and_whole(checkout):
    for out, quick in (("elsewhere", False), (None, True)):
        with pytest.raises(ValueError, match="leave out --out and --quick"):
            runs.begin_run("fashion-xs", "fashion-mini", out, quick=quick, renewal=True)
    shutil.rmtree(checkout / ".git")
    with pytest.raises(ValueError, match="renewed in a clone"):
        runs.begin_run("fashion-xs", "fashion-mini", None, quick=False, renewal=True)
    assert cli.main(["reproduce", "--renew-reference"]) == 1


def test_renewing_replaces_the_shipped_run_and_the_notebooks(checkout):
    stale = checkout / "results/mine/fashion-xs-fashion-mini/old.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    run = runs.begin_run("fashion-xs", "fashion-mini", None, quick=False, renewal=True)
    shipped = runs.shipped("fashion-xs", "fashion-mini")
    assert run == stale.parent.resolve() and not stale.exists()
    (run / "notebooks").mkdir()
    (run / "notebooks/00_tour.ipynb").write_text("executed")
    (run / "notebooks/01_features.ipynb").write_text('{"tags": ["injected-parameters"]}')
    for name in ("layer_curve.csv", "cka.png", "reference.csv", "summary.txt"):
        (run / name).write_text("renewed")
    (run / "summary.json").write_text('{"chosen_layer": 1, "reference": {}}')
    runs.renew(run, shipped)
    assert sorted(file.name for file in shipped.iterdir()) == ["cka.png", "layer_curve.csv", "summary.json"]
    assert (shipped / "layer_curve.csv").read_text() == "renewed"
    assert json.loads((shipped / "summary.json").read_text()) == {"chosen_layer": 1}
    assert [file.name for file in (checkout / "notebooks").iterdir()] == ["00_tour.ipynb"]
    assert (checkout / "notebooks/00_tour.ipynb").read_text() == "executed"


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
    for folder in (tmp_path / "notebooks", tmp_path / "site-packages/notebooks"):  # a stranger's, where one works
        folder.mkdir(parents=True)
        (folder / f"{workbench.NOTEBOOKS[0]}.ipynb").write_text("{}")
    with pytest.raises(FileNotFoundError, match="clone of the repository"):
        workbench.notebooks()
    (installed / f"{workbench.NOTEBOOKS[0]}.ipynb").write_text("{}")
    assert workbench.notebooks() == installed
