"""The wheel, installed outside the clone: the command and the library do what they do in the clone."""

import os
import shutil
import subprocess
import sys
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
    """A folder with the installed wheel; it is built from a copy, so that no build leaves files in the clone."""
    pytest.importorskip("pip")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("igpt_lab", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True)
    return target


@pytest.mark.slow
def test_the_wheel_runs_outside_the_clone(installed, tiny_folder, tiny_images, tmp_path):
    def run(*arguments: str | Path) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert run("-m", "igpt_lab", "--version") == f"igpt-lab {lab.__version__}\n"
    assert "chosen layer" in run("-m", "igpt_lab", "probe", tiny_folder, tiny_images, "--out", "results")
    assert (tmp_path / "results/probe.png").is_file() and (tmp_path / "results/probe.csv").is_file()
    place, layers = run("-c", LINES, tiny_folder, tiny_images, tmp_path / "stores").splitlines()
    assert Path(place).is_relative_to(installed) and int(layers) == 4
    assert (installed / "share/igpt-lab/notebooks/00_tour.ipynb").is_file()
