"""Files over HTTP, resumed where they were cut short, whole or absent.

A file that is fetched arrives as `FILE.part` beside its place and is renamed when it is whole, so a file that exists is
whole: as long as the server announced, and with the digests that it named. Beside it, `FILE.version` notes which
version of the server's file it is a part of: the rest is asked for with `Range` and `If-Range` (RFC 9110), so that no
file is ever put together from two versions. Who fetches a file holds its lock. This is our own, as OpenAI's files lie
at plain https addresses: the Hub's downloader takes repositories of the Hub alone, and requests resumes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import requests

from igpt_lab.core.progress import tqdm
from igpt_lab.core.storage import lock_of, unlink

ATTEMPTS = 5  # in a row without a new byte
PATIENCE = 30  # seconds to wait for the server
PAUSE = 1  # seconds before the second attempt in a row; doubled for each after it
CHUNK = 1 << 14  # bytes; what came of a chunk is lost when the connection drops
PLAIN = {"Accept-Encoding": "identity"}  # compressed bytes could not be counted
DIGESTS: dict[str, Callable[[], Any]] = {
    "md5": partial(hashlib.md5, usedforsecurity=False),
    "crc32c": google_crc32c.Checksum,
}


@dataclass(frozen=True)
class Announced:
    """What a server says of a whole file: its bytes, its version, and its digests in base64 by name."""

    size: int
    version: str
    digests: dict[str, str]


def fetch(files: dict[str, Path], *, progress: bool = True) -> None:
    """Each address to its file; what is there in full is not fetched again.

    All sizes are asked for first, and nothing is begun that the disk cannot hold. Raises OSError, which names the
    address, when a file is not there or not as its server announced it, and what to fetch by hand when the server does
    not answer.
    """
    with requests.Session() as session:
        try:
            announced = {url: _announced(session, url) for url in files}
        except requests.RequestException as error:
            if all(path.is_file() for path in files.values()):
                return
            why = error if error.response is not None else f"no answer ({type(error).__name__})"
            raise OSError(f"{why}; without a network, {_by_hand(files)}") from error
        sizes = {url: about.size for url, about in announced.items()}
        held = {url: sizes[url] if _is_whole(path, sizes[url]) else _held(path) for url, path in files.items()}
        folder, needed = next(iter(files.values())).parent, sum(sizes[url] - held[url] for url in files)
        folder.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(f"{needed / 1e9:,.1f} GB must be downloaded, and {folder} has {free / 1e9:,.1f} GB free")
        what = {"desc": f"{len(files)} files", "unit": "B", "unit_scale": True}
        with tqdm(total=sum(sizes.values()), disable=not progress, **what) as bar:
            for url, path in files.items():
                if _is_whole(path, sizes[url]):
                    bar.update(sizes[url])
                    continue
                with lock_of(path) as lock:
                    try:
                        _fetch(session, url, path, announced[url], bar)
                    finally:
                        unlink(lock)


def _by_hand(files: dict[str, Path]) -> str:
    """What to do where nothing can be fetched: the first and last address of each of the server's folders."""
    groups: dict[tuple[str, Path], list[str]] = {}
    for url, path in files.items():
        groups.setdefault((url.rpartition("/")[0], path.parent), []).append(url.rpartition("/")[2])
    return "; ".join(
        f"put {names[0]}{f' to {names[-1]} ({len(names)} files)' if len(names) > 1 else ''} of {url}/ into {folder}"
        for (url, folder), names in groups.items()
    )


def _announced(session: requests.Session, url: str) -> Announced:
    """Of the file at an address. A passing fault is tried again; without any answer there is no network."""
    attempt = 0
    while True:
        answer = session.head(url, headers=PLAIN, timeout=PATIENCE, allow_redirects=True)
        try:
            _check(answer, url)
            size, version = answer.headers.get("Content-Length", ""), _version(answer)
            if not re.fullmatch("[0-9]{1,18}", size) or (int(size) == 0 and not version):  # as a proxy's empty answer
                raise requests.ConnectionError(f"{url}: the server announces {size!r} bytes", response=answer)
            return Announced(int(size), version, _digests(answer))
        except requests.RequestException:
            attempt += 1
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _held(path: Path) -> int:
    """Bytes of `FILE.part`."""
    return _part(path).stat().st_size if _part(path).is_file() else 0


def _is_there(path: Path, about: Announced) -> bool:
    """Whether `FILE.part` has all bytes of this version, and was stopped while it was checked."""
    mark = _mark(path)
    version = mark.read_text("latin-1") if mark.is_file() else ""
    return bool(version) and version == about.version and _part(path).is_file() and _held(path) == about.size


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _check(answer: requests.Response, url: str, expected: int = 200) -> None:
    """An answer 4xx is final; any other that is not the file is an error to try again on."""
    code, kind = answer.status_code, answer.headers.get("Content-Type", "")
    if 400 <= code < 500 and code not in (408, 429):
        raise FileNotFoundError(f"{url}: the server answers {code} {answer.reason}")
    encoding, fault = answer.headers.get("Content-Encoding") or "identity", ""
    if code != expected:
        fault = f"the server answers {code}"
    elif encoding != "identity":
        fault = f"the server sends {encoding[:20]!r}, not the file's own bytes"
    elif kind.startswith("text/html"):
        fault = "the server sends a web page in place of the file, as proxies and login pages do"
    if fault:
        raise requests.ConnectionError(f"{url}: {fault}", response=answer)


def _fetch(session: requests.Session, url: str, path: Path, about: Announced, bar: tqdm) -> None:
    """One address to one file, through `FILE.part`, which an interruption leaves to go on from."""
    failures, best = 0, 0
    before = bar.n
    bar.update(_held(path))
    while not _is_whole(path, about.size):  # it may be by now: another process held the lock
        try:
            if not _is_there(path, about):
                _stream(session, url, path, about, bar)
            _finish(path, about)
        except requests.RequestException as error:
            failures, best = (0, _held(path)) if _held(path) > best else (failures + 1, best)
            if failures == ATTEMPTS:
                why = str(error).removeprefix(f"{url}: ")
                raise OSError(f"{url}: {why}; {_held(path):,} bytes are kept; call again to continue") from error
            time.sleep(PAUSE * 2 ** max(0, failures - 1))
            bar.update(before + _held(path) - bar.n)
    bar.update(before + about.size - bar.n)


def _finish(path: Path, about: Announced) -> None:
    """Rename `FILE.part`, if it has the digests that the server named; else it is removed, to begin again."""
    digests: dict[str, Any] = {name: DIGESTS[name]() for name in about.digests}
    with _part(path).open("rb+") as file:
        while digests and (chunk := file.read(1 << 20)):
            for digest in digests.values():
                digest.update(chunk)
        os.fsync(file.fileno())
    for name, digest in digests.items():
        if base64.b64encode(digest.digest()).decode() != about.digests[name]:
            _part(path).unlink()
            raise requests.ConnectionError(f"the file does not have the {name} digest that the server names")
    os.replace(_part(path), path)
    _mark(path).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    """Where the version of the file that `FILE.part` is a part of is noted, as its server names it."""
    return path.with_name(f"{path.name}.version")


def _stream(session: requests.Session, url: str, path: Path, about: Announced, bar: tqdm) -> None:
    """Add to `FILE.part` what it lacks; from its beginning where the server's file is another, or knows no ranges."""
    part, mark = _part(path), _mark(path)
    version = mark.read_text("latin-1") if mark.is_file() else ""
    held = _held(path) if version else 0
    asked = {"Range": f"bytes={held}-", "If-Range": version} if held else {}
    with session.get(url, headers=PLAIN | asked, stream=True, timeout=PATIENCE) as answer:
        begins, _, total = answer.headers.get("Content-Range", "").partition("/")
        same = (_version(answer) or about.version) == version and total in ("*", str(about.size))
        goes_on = answer.status_code == 206 and held and same and begins.startswith(f"bytes {held}-")
        if answer.status_code in (206, 416) and not goes_on:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server cannot continue where this file ends", response=answer)
        _check(answer, url, 206 if goes_on else 200)
        if not goes_on:
            length = answer.headers.get("Content-Length", "")
            if length not in ("", str(about.size)):
                raise requests.ConnectionError(f"the server sends {length} bytes; it announced {about.size}")
            held = 0
            part.write_bytes(b"")
            mark.write_text(_version(answer), "latin-1")
        with part.open("ab") as file:
            for chunk in answer.iter_content(CHUNK):
                held += len(chunk)
                if held > about.size:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    if held > about.size:
        part.unlink()
    if held != about.size:
        raise requests.ConnectionError(f"only {held:,} of {about.size:,} bytes arrived")


def _version(answer: requests.Response) -> str:
    """What names the version of a file to `If-Range`: a strong ETag, or its date."""
    tag = answer.headers.get("ETag", "")
    return answer.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag


def _digests(answer: requests.Response) -> dict[str, str]:
    """Of the whole file, by name, from the headers of HTTP, Azure and Google."""
    headers = answer.headers
    named = [f"md5={headers[name]}" for name in ("Content-MD5", "x-ms-blob-content-md5") if name in headers]
    pairs = [item.strip().partition("=") for item in [*headers.get("x-goog-hash", "").split(","), *named]]
    return {name: digest for name, _, digest in pairs if name in DIGESTS}
