"""The wheel, installed outside the clone: the command and the library do what they do in the clone."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

import igpt_lab as lab

ROOT = Path(__file__).resolve().parents[1]
LINES = """
import sys
import igpt_lab as lab
model, images, store = sys.argv[1:]
network = lab.load_model(model)
splits = [lab.load_images(images, split) for split in ("train", "test")]
filled = lab.extract(network, splits, store=store, progress=False)
train, test = (lab.Features.from_store(filled, split) for split in ("train", "test"))
result = lab.probe_layers(train, test, progress=False)
print(lab.__file__, len(result.table), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment with the wheel; it is built from a copy, so that no build leaves files in the clone.

    Other packages are those of this environment, as the tests need no network.
    """
    pytest.importorskip("pip")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("igpt_lab", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(target)
    python = target / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--ignore-installed", source], check=True, env=alone())
    return python


def alone() -> dict[str, str]:
    """The environment of a program that finds the wheel, and not the clone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


pytestmark = pytest.mark.slow


def test_the_wheel_runs_outside_the_clone(installed, tiny_folder, tiny_images, tmp_path):
    def run(*arguments: str | Path) -> str:
        command = [installed, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=alone(), check=True, capture_output=True, text=True).stdout

    assert run("-m", "igpt_lab", "--version") == f"igpt-lab {lab.__version__}\n"
    assert "chosen layer" in run("-m", "igpt_lab", "probe", tiny_folder, tiny_images, "--out", "results")
    assert (tmp_path / "results/probe.png").is_file() and (tmp_path / "results/probe.csv").is_file()
    place, layers = run("-c", LINES, tiny_folder, tiny_images, tmp_path / "stores").splitlines()
    assert Path(place).is_relative_to(installed.parents[1]) and int(layers) == 4


def test_the_wheel_opens_a_copy_of_the_notebooks(installed, tmp_path):
    """Settings, runtime files and notebooks stay in a folder of the test; its server is stopped at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / f".{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / f".{name.lower()}") for name in ("SETTINGS", "WORKSPACES")}
    environment = alone() | own | {"IPYTHONDIR": str(tmp_path / ".ipython")}
    command = [installed, "-u", "-m", "igpt_lab", "lab", "mine", "--no-browser", "--port", port]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 120
        while "token=" not in (tmp_path / "log").read_text() and time.monotonic() < until and server.poll() is None:
            time.sleep(0.1)
        assert re.search(r"http://127\.0\.0\.1:\d+/lab\S*token=\w{40,}", (tmp_path / "log").read_text())
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert (tmp_path / "mine/notebooks/00_tour.ipynb").is_file()
