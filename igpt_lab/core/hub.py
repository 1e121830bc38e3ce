"""A name or a folder -> a model's files on this disk; and files over HTTP, resumed where they were cut short.

A model is bundled with the package (`fashion-xs`), a folder in the layout of Hugging Face's ImageGPT, or a name on the
Hub.

A file that is fetched arrives as `FILE.part` beside its place and is renamed when it is whole, so a file that exists is
whole. Beside it, `FILE.version` notes which version of the server's file it is a part of: the rest is asked for with
`Range` and `If-Range` (RFC 9110), so that no file is ever put together from two versions. This is our own, as
OpenAI's files lie at plain https addresses: the Hub's downloader takes repositories of the Hub alone, and requests
resumes nothing.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import time
from pathlib import Path

import requests
from tqdm.auto import tqdm

from igpt_lab.core.arguments import local
from igpt_lab.core.provenance import atomic_write

BUNDLED = Path(__file__).parents[1] / "bundled"
INDEX = ".index.json"  # behind a weights file's name: the index of its shards
WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX)


class CheckpointError(ValueError):
    """A source that is not a checkpoint, or one whose content does not fit; the message names the culprit."""


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def resolve(source: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a bundled name, a folder, or (by download) a Hub name `owner/name`.

    `revision` is a branch, a tag or a commit on the Hub; what is local has none. Without `weights` only the Hub's JSON
    files are fetched.
    """
    if not str(source).strip():
        raise CheckpointError(f"the model's name is empty; bundled are {bundled()}; or give a folder or owner/name")
    folder = local(source)
    if str(source) in bundled():
        return BUNDLED / str(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; expected a folder with config.json and model.safetensors")
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        return _download(str(source), revision, ("model*.safetensors", "pytorch_model*.bin") if weights else ())
    close = difflib.get_close_matches(str(source), bundled(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(f"no model {str(source)!r}: {hint}bundled are {bundled()}; or give a folder or owner/name")


def _download(name: str, revision: str | None, kinds: tuple[str, ...]) -> Path:
    """The folder with the JSON files, and the weights of the first of `kinds` that there is."""
    try:
        for kind in kinds or ("",):
            folder = snapshot(name, revision=revision, allow_patterns=["*.json", *filter(None, [kind])])
            if kind and any(folder.glob(kind)):
                break
    except Exception as error:  # the Hub client raises a different class for each way to have no network
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"no model {name!r}{at}: not bundled ({bundled()}), no such folder, and the Hub did not give it "
            f"({type(error).__name__}). Without a network, put config.json, preprocessor_config.json and "
            f"model.safetensors (or pytorch_model.bin) of {name} into a folder and give its path"
        ) from error
    return folder


def snapshot(name: str, **options) -> Path:
    """The folder of a repository's files from the Hub, or from its cache: `huggingface_hub.snapshot_download`.

    `options` are its own. It raises a different class for each way to have no network, so a caller catches all.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, **options))


def read_json(path: Path) -> dict:
    """A JSON object from a file; errors name the file."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: dict) -> None:
    """A JSON object to a file, whole or absent."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


ATTEMPTS = 5  # in a row without a new byte
PATIENCE = 30  # seconds to wait for the server
PAUSE = 1  # seconds before the second attempt in a row; doubled for each after it
CHUNK = 1 << 14  # bytes; what came of a chunk is lost when the connection drops
PLAIN = {"Accept-Encoding": "identity"}  # compressed bytes could not be counted


def fetch(files: dict[str, Path], *, progress: bool = True) -> None:
    """Each address to its file; what is there in full is not fetched again.

    All sizes are asked for first, and nothing is begun that the disk cannot hold. Raises OSError, which names the
    address, when a file is not there, and what to fetch by hand when the server does not answer.
    """
    with requests.Session() as session:
        try:
            sizes = {url: _size(session, url) for url in files}
        except requests.RequestException as error:
            if all(path.is_file() for path in files.values()):
                return
            why = error if error.response is not None else f"no answer ({type(error).__name__})"
            raise OSError(f"{why}; without a network, {_by_hand(files)}") from error
        whole = {url: path.is_file() and path.stat().st_size == sizes[url] for url, path in files.items()}
        held = {url: sizes[url] if whole[url] else _held(path) for url, path in files.items()}
        folder, needed = next(iter(files.values())).parent, sum(sizes[url] - held[url] for url in files)
        folder.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(f"{needed / 1e9:,.1f} GB are to be fetched, and {folder} has {free / 1e9:,.1f} GB free")
        what = {"desc": f"{len(files)} files", "unit": "B", "unit_scale": True}
        with tqdm(total=sum(sizes.values()), disable=not progress, **what) as bar:
            for url, path in files.items():
                if whole[url]:
                    bar.update(sizes[url])
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _fetch(session, url, path, bar)


def _by_hand(files: dict[str, Path]) -> str:
    """What to do where nothing can be fetched: the first and last address of each of the server's folders."""
    groups: dict[tuple[str, Path], list[str]] = {}
    for url, path in files.items():
        groups.setdefault((url.rpartition("/")[0], path.parent), []).append(url.rpartition("/")[2])
    return "; ".join(
        f"put {names[0]}{f' to {names[-1]} ({len(names)} files)' if len(names) > 1 else ''} of {url}/ into {folder}"
        for (url, folder), names in groups.items()
    )


def _size(session: requests.Session, url: str) -> int:
    """Bytes of the file at an address. A passing fault is tried again; without any answer there is no network."""
    for attempt in range(ATTEMPTS):
        answer = session.head(url, headers=PLAIN, timeout=PATIENCE, allow_redirects=True)
        try:
            _check(answer, url)
            break
        except requests.RequestException:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
    return int(answer.headers.get("Content-Length", 0))


def _held(path: Path) -> int:
    """Bytes of `FILE.part`."""
    return _part(path).stat().st_size if _part(path).is_file() else 0


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _check(answer: requests.Response, url: str) -> None:
    """A passing fault of the server is an error to try again on, any other is final."""
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        raise requests.ConnectionError(f"{url}: the server answers {answer.status_code}", response=answer)
    if answer.status_code >= 400:
        raise FileNotFoundError(f"{url}: the server answers {answer.status_code} {answer.reason}")


def _fetch(session: requests.Session, url: str, path: Path, bar: tqdm) -> None:
    """One address to one file, through `FILE.part`, which an interruption leaves to go on from."""
    failures, best, before = 0, 0, bar.n
    while True:
        try:
            _stream(session, url, path, bar, before)
            break
        except requests.RequestException as error:
            failures, best = (0, _held(path)) if _held(path) > best else (failures + 1, best)
            if failures == ATTEMPTS:
                why = str(error).removeprefix(f"{url}: ")
                raise OSError(f"{url}: {why}; {best:,} bytes are kept, call again to go on") from error
            time.sleep(PAUSE * 2 ** max(0, failures - 1))
    os.replace(_part(path), path)
    _mark(path).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    """Where the version of the file that `FILE.part` is a part of is noted, as its server names it."""
    return path.with_name(f"{path.name}.version")


def _stream(session: requests.Session, url: str, path: Path, bar: tqdm, before: int) -> None:
    """Add to `FILE.part` what it lacks; from its beginning where the server's file is another, or knows no ranges."""
    part, mark = _part(path), _mark(path)
    version = mark.read_text() if mark.is_file() else ""
    held = part.stat().st_size if part.is_file() and version else 0
    asked = {"Range": f"bytes={held}-", "If-Range": version} if held else {}
    with session.get(url, headers=PLAIN | asked, stream=True, timeout=PATIENCE) as answer:
        begins, _, total = answer.headers.get("Content-Range", "").partition("/")
        if answer.status_code == 416 or (answer.status_code == 206 and not begins.startswith(f"bytes {held}-")):
            part.unlink()
            raise requests.ConnectionError("the server does not go on where this file ends")
        _check(answer, url)
        if answer.status_code != 206:
            held, total = 0, answer.headers.get("Content-Length", "")
            part.write_bytes(b"")
            mark.write_text(_version(answer))
        with part.open("ab") as file:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                held += len(chunk)
                bar.update(before + held - bar.n)
    if total.isdigit() and held != int(total):
        raise requests.ConnectionError(f"{held:,} of {total} bytes came")


def _version(answer: requests.Response) -> str:
    """What names the version of a file to `If-Range`: a strong ETag, or its date."""
    tag = answer.headers.get("ETag", "")
    return answer.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
