"""What pyproject.toml asks for is what environment.yml and the Makefile install; each check is also shown to fail."""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/requirements.lock"
FILES = ["pyproject.toml", "environment.yml", "requirements.lock", DOCS, "Makefile", ".ci/run"]


def wanted(root: Path) -> list[Requirement]:
    """What pyproject.toml needs to build, to run and to be tested."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    lines = project["build-system"]["requires"] + project["project"]["dependencies"]
    return [Requirement(line) for line in lines + project["project"]["optional-dependencies"]["test"]]


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]


def installed(root: Path) -> dict[str, Requirement]:
    """What the pip part of environment.yml installs, by name; `-r` is followed, the project itself left out."""
    parts = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    lines = [line for part in parts if isinstance(part, dict) for line in part["pip"]]
    lines += [line for name in lines if name.startswith("-r ") for line in lines_of(root / name[3:])]
    requirements = [Requirement(line) for line in lines if not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pin(requirement: Requirement) -> Version | None:
    """The one version a requirement admits, or None."""
    exact = [clause.version for clause in requirement.specifier if clause.operator == "=="]
    return Version(exact[0]) if len(requirement.specifier) == len(exact) == 1 and "*" not in exact[0] else None


def faults_of_dependencies(root: Path) -> list[str]:
    faults, have = [], installed(root)
    for need in wanted(root):
        requirement = have.get(canonicalize_name(need.name))
        if requirement is None or (requirement.marker and not requirement.marker.evaluate()):
            faults.append(f"{need.name} is missing")
        elif pin(requirement) is None or pin(requirement) not in need.specifier:
            faults.append(f"{need} differs: {requirement}")
    return faults


def faults_of_environment(root: Path) -> list[str]:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pips = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    conda = {re.match(r"[\w-]+", part)[0]: part for part in environment["dependencies"] if isinstance(part, str)}
    lowest = Requirement(f"python{tomllib.loads((root / 'pyproject.toml').read_text())['project']['requires-python']}")
    faults = [] if set(conda) == {"python", "pip"} else [f"conda installs {sorted(conda)}, not python and pip alone"]
    if (python := conda.get("python", "").removeprefix("python=")) not in lowest.specifier:
        faults.append(f"python {python!r} is not {lowest.specifier}")
    return faults if pips == [["-r requirements.lock", "-e ."]] else [*faults, f"pip installs {pips}"]


def faults_of_lock(root: Path) -> list[str]:
    lines = lines_of(root / "requirements.lock")
    requirements = [Requirement(line) for line in lines]
    faults = [f"{line} is not pinned" for line, entry in zip(lines, requirements, strict=True) if pin(entry) is None]
    faults += [f"{entry.name} is one machine's build" for entry in requirements if "+" in str(entry.specifier)]
    faults += [f"{entry.name} is for CUDA only" for entry in requirements if re.match("nvidia|cuda|triton", entry.name)]
    faults += [] if "torch==2.13.0" in lines else ["torch==2.13.0 is missing"]
    names = [entry.name for entry in requirements]
    return faults + [f"{name} is listed twice" for name in sorted(set(names)) if names.count(name) > 1]


def faults_of_docs(root: Path) -> list[str]:
    """docs/requirements.lock pins what the extra `docs` needs, and nothing that requirements.lock pins otherwise."""
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    pinned = {canonicalize_name(entry.name): entry for entry in map(Requirement, lines_of(root / DOCS))}
    faults = [f"{entry} is not pinned" for entry in pinned.values() if pin(entry) is None]
    faults += [f"{need} is missing" for need in map(Requirement, needs) if canonicalize_name(need.name) not in pinned]
    for line in lines_of(root / "requirements.lock"):
        entry = Requirement(line)
        other = pinned.get(canonicalize_name(entry.name), entry)
        faults += [f"{other} is not {entry}"] if other.specifier != entry.specifier else []
    return faults


def faults_of_commands(root: Path) -> list[str]:
    """Every target says what it would run; `.ci/run` ends in the tests, so that their summary is its last line."""
    runs = {
        "help": "make reproduce",
        "reproduce": ".venv/bin/igpt-lab reproduce",
        "reference": ".venv/bin/igpt-lab reproduce --all --renew-reference",
        "test": ".venv/bin/python -m pytest",
        "coverage": ".venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --cov",
        "lowest": "--resolution lowest-direct",
        "lab": ".venv/bin/igpt-lab lab",
        "bench": ".venv/bin/python -m benchmarks",
        "lint": ".venv/bin/ruff check",
        "docs": "--fail-on-warning",
    }
    faults = [f"make {target} does not run {part}" for target, part in runs.items() if part not in plan(root, target)]
    script = root / ".ci/run"
    faults += [] if script.stat().st_mode & stat.S_IXUSR else [".ci/run is not executable"]
    faults += [] if lines_of(script)[-2:] == ["make lint", "make test"] else [".ci/run does not end in lint and test"]
    setting = "PYTHONDONTWRITEBYTECODE"
    return faults + [
        f"{name} keeps {setting}"
        for name, line in ((".ci/run", f"unset {setting}"), ("Makefile", f"unexport {setting}"))
        if line not in lines_of(root / name)
    ]


def plan(root: Path, target: str) -> str:
    """What `make target` would run; nothing is run."""
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--dry-run", "--directory", str(root), target]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def faults_of_privacy(root: Path) -> list[str]:
    """Hosts and folders of one machine have no place in files that every machine reads."""
    machine = re.compile(
        r"https?://|file:|--(extra-)?index-url|--find-links|(?<![\w./])/(tmp|home|root|opt|work|Users)/"
    )
    return [f"{name}: {match[0]}" for name in FILES if (match := machine.search((root / name).read_text()))]


def test_the_version_stands_in_one_place_and_the_changelog_has_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    source = (ROOT / "igpt_lab/__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "igpt_lab.__version__"}
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # that the format requires


CHECKS = [
    faults_of_dependencies,
    faults_of_environment,
    faults_of_lock,
    faults_of_docs,
    faults_of_commands,
    faults_of_privacy,
]


@pytest.mark.parametrize("check", CHECKS)
def test_setup_is_sound(check):
    assert check(ROOT) == []


DOCTORED = [
    (faults_of_dependencies, "requirements.lock", r"(?m)^seaborn==.*\n", "", "seaborn is missing"),
    (faults_of_dependencies, "requirements.lock", r"(?m)^numpy==.*", "numpy==1.26.4", "numpy>=2.0 differs"),
    (faults_of_dependencies, "requirements.lock", r"(?m)^pytest==.*", "pytest>=8.3", "pytest>=8.3 differs"),
    (faults_of_dependencies, "requirements.lock", r"(?m)^(tqdm==.*)", r"\1 ; python_version < '3'", "tqdm is missing"),
    (faults_of_dependencies, "pyproject.toml", r'"tqdm>=', '"not-in-the-lock", "tqdm>=', "not-in-the-lock is missing"),
    (faults_of_dependencies, "pyproject.toml", r'"ruff>=[\d.]+"', '"ruff<0.1"', "ruff<0.1 differs"),
    (faults_of_dependencies, "environment.yml", r"- -r requirements.lock\n", "- torch==2.13.0\n", "pandas is missing"),
    (faults_of_environment, "environment.yml", r"- -e \.", "- seaborn", "pip installs"),
    (faults_of_environment, "environment.yml", r"python=3.11", "python=3.10", "python '3.10' is not"),
    (faults_of_environment, "environment.yml", r"  - pip\n", "  - pip\n  - numpy\n", "conda installs"),
    (faults_of_lock, "requirements.lock", r"(?m)^scipy==.*", "scipy>=1.14", "scipy>=1.14 is not pinned"),
    (faults_of_lock, "requirements.lock", r"(?m)^scipy==.*", "scipy==1.*", r"scipy==1.* is not pinned"),
    (faults_of_lock, "requirements.lock", r"torch==2.13.0", "torch==2.13.0+cpu", "torch is one machine's build"),
    (faults_of_lock, "requirements.lock", r"torch==2.13.0", "torch==2.12.0", "torch==2.13.0 is missing"),
    (faults_of_lock, "requirements.lock", r"\Z", "nvidia-nccl-cu13==2.30.7\n", "nvidia-nccl-cu13 is for CUDA only"),
    (faults_of_lock, "requirements.lock", r"\Z", "scipy==1.16.0\n", "scipy is listed twice"),
    (faults_of_docs, DOCS, r"(?m)^myst-nb==.*\n", "", "myst-nb>=1.3 is missing"),
    (faults_of_docs, DOCS, r"(?m)^sphinx==.*", "sphinx>=8.2", "sphinx>=8.2 is not pinned"),
    (faults_of_docs, DOCS, r"\Z", "numpy==1.26.4\n", "numpy==1.26.4 is not numpy=="),
    (faults_of_commands, "Makefile", r"(?m)^lab:", "laboratory:", "make lab does not run"),
    (faults_of_commands, "Makefile", r"(?m)^lint: .*", "lint: nowhere", "make lint does not run"),
    (faults_of_commands, "Makefile", r"unexport ", "export ", "Makefile keeps"),
    (faults_of_commands, ".ci/run", r"make lint\n", "", ".ci/run does not end"),
    (faults_of_commands, ".ci/run", r"\Z", "echo done\n", ".ci/run does not end"),
    (faults_of_privacy, "requirements.lock", r"\A", "--index-url https://pypi.example/simple\n", "requirements.lock: "),
    (faults_of_privacy, "Makefile", r"\Z", "WHEELS := /opt/wheels\n", "Makefile: /opt/"),
]


@pytest.mark.parametrize(("check", "name", "old", "new", "fault"), DOCTORED)
def test_a_doctored_setup_is_caught(tmp_path, check, name, old, new, fault):
    for folder in (".ci", "docs"):
        (tmp_path / folder).mkdir()
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    text, count = re.subn(old, new, (tmp_path / name).read_text(), count=1)
    (tmp_path / name).write_text(text)
    assert count == 1
    assert any(fault in message for message in check(tmp_path)), check(tmp_path)
