"""What lets a number be trusted later: digests, whole-file-or-nothing writes, and a record of how a result was made."""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "igpt-lab",
    "torch",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "datasets",
    "pyarrow",
    "pillow",
    "matplotlib",
)
MAKER = "features/on_cluster"  # the module that makes stored numbers, with what it imports
# What it imports without a stored number depending on it, and why.
NOT_NUMBERS = {
    "core/cluster": "where and when a part is computed",
    "core/display": "what a notebook shows",
    "core/hub": "finds files: what is in them is in a store's key",
    "core/provenance": "names of stores, and how a file comes to be whole",
    "core/storage": "where files lie, and who may write them",
    "features/form": "what a manifest must look like",
    "features/manifest": "what a store notes of its parts",
    "features/store": "reads what is stored",
}
STORED = ("code", "torch", "numpy", "pillow", "pyarrow")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> Path:
    """Write `data` to `path` so that the file is whole or absent, also after a crash; returns the path.

    Text is UTF-8. The parent folder is created. The bytes go to a temporary file beside the target, with the
    permissions that the umask leaves, are flushed to the disk and renamed over it.
    """
    if hasattr(path, "put"):  # an object is whole or absent by itself
        return path.put(data.encode() if isinstance(data, str) else data)
    return write_together({Path(path): data})[0]


def write_together(contents: Mapping[Path, bytes | str]) -> list[Path]:
    """`atomic_write` of files that belong together; returns their paths.

    All are on the disk under temporary names before the first is renamed, and a Ctrl-C waits until the last one is:
    a program that is stopped leaves all as they were, or all new.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            with temporary[path].open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        with _uninterrupted():
            for path, written in temporary.items():
                os.replace(written, path)
    except BaseException:
        for written in temporary.values():
            written.unlink(missing_ok=True)
        raise
    return list(contents)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A block for whose end Ctrl-C and SIGTERM wait; they reach the main thread alone."""
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if here}
    ours = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not of Python
    for number in ours:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():  # Ctrl-C last: it may end this block
            signal.signal(number, handler)
    for arrived in came:
        signal.raise_signal(arrived)


def digest(value: bytes | Path | object) -> str:
    """SHA-256 (64 hex digits) of bytes, of a file's content (a `Path`), or of anything JSON can hold (sorted keys)."""
    if isinstance(value, Path):
        with value.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if hasattr(value, "put") and hasattr(value, "read_bytes"):  # an object of a store
        value = value.read_bytes()
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return hashlib.sha256(value).hexdigest()


def named(*names: str, key: object) -> str:
    """`<name>-<name>-<first 8 digits of the key's digest>`, safe as a folder's name."""
    safe = (re.sub(r"[^\w.]+", "-", Path(name).name).strip("-") for name in names)
    return "-".join([*safe, digest(key)[:8]])


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a number."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


@functools.cache
def made_by(maker: str = MAKER) -> dict[str, str]:
    """`versions`, and a digest of the code that a number depends on which the module `maker` makes."""
    return versions() | {"code": digest_of_code(Path(__file__).parents[1], maker)[:16]}


def digest_of_code(package: Path, maker: str = MAKER) -> str:
    """SHA-256 of what computes in a module and what it imports: no comment, no docstring, no formatting."""
    computing: dict[str, list[str]] = {}
    todo = [maker]
    while todo:
        name = todo.pop()
        if (package / name / "__init__.py").is_file():
            name = f"{name}/__init__"
        file = package / f"{name}.py"
        if name not in computing and name not in NOT_NUMBERS and file.is_file():
            computing[name] = []
            _flatten(ast.parse(file.read_bytes()), computing[name], todo)
    return digest(computing)


def _flatten(node: object, words: list[str], imports: list[str]) -> None:
    """Append a syntax tree without positions and docstrings to `words`, and the package's modules it may import.

    In place of `ast.dump`, which writes empty fields or not by the version of Python.
    """
    if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "igpt_lab":
        inside = node.module.split(".")[1:]
        imports += ["/".join(inside), *("/".join([*inside, alias.name]) for alias in node.names)]
    elif isinstance(node, ast.Import):
        imports += ["/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("igpt_lab.")]
    if isinstance(node, ast.AST):
        words.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != []:
                words.append(name)
                _flatten(value, words, imports)
        words.append(")")
    elif isinstance(node, list):
        words.append("[")
        for child in node:
            if not _is_docstring(child):
                _flatten(child, words, imports)
        words.append("]")
    else:
        words.append(repr(node))


def _is_docstring(node: object) -> bool:
    """A string that is a statement: it computes nothing, wherever it stands."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def unlike(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """`torch is 2.13.0, there 2.12.1; ...` where what both name differs and can change a stored number, else ''."""
    names = [name for name in STORED if {name} <= ours.keys() & theirs.keys() and ours[name] != theirs[name]]
    return "; ".join(f"{name} is {ours[name]}, there {theirs[name]}" for name in names)


def commit() -> str:
    """The git commit of the package's checkout, with `+changes` when files differ from it; '' outside a checkout."""
    package = Path(__file__).parents[1]
    commands = (
        ["ls-files", "--error-unmatch", "__init__.py"],  # fails where the package is installed inside another checkout
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "--", "."],
    )
    try:
        tracked, head, status = (
            subprocess.run(["git", *command], cwd=package, capture_output=True, text=True, timeout=10)
            for command in commands
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if tracked.returncode or head.returncode or status.returncode:
        return ""
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def plain(value: object) -> object:
    """A value in JSON's types: NaN is null, infinities are "inf" and "-inf", arrays, tensors and sets become lists.

    Dataclasses become objects, and what else JSON does not know becomes its `str`, paths among them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif not isinstance(value, (str, type)) and hasattr(value, "tolist"):  # numpy, torch and pandas
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain_name(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else str(value) if math.isinf(value) else float(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()  # a path's name may be no text


def _plain_name(key: object) -> str:
    """The name of a JSON object's entry, as `json` has it: `true`, `null`, `3`."""
    name = plain(key)
    return name if isinstance(name, str) else json.dumps(name)


@dataclass(frozen=True)
class RunRecord:
    """How a result was made: what ran, with which configuration and seed, from which commit and versions."""

    what: str
    config: dict = field(default_factory=dict)
    seed: int | None = None
    commit: str = field(default_factory=commit)
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict:
        """The record as `plain` JSON types."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
