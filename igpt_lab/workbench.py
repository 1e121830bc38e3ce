"""The notebooks in a folder of the user's own, and JupyterLab on it: this machine alone, and by a token."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def copy_notebooks(source: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks in `source` to `folder`, those that are not there; returns (copied, there already).

    A file that is there is never touched: it may hold the user's edits. Deleted, it is copied anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copied, there = [], []
    for file in sorted(source.glob("*.ipynb")):
        target = folder / file.name
        try:
            with target.open("xb") as written:  # fails where it is there, whoever put it there a moment ago
                written.write(file.read_bytes())
        except FileExistsError:
            there.append(target)
        else:
            copied.append(target)
    return copied, there


def arguments(folder: Path, *, first: str, port: int, browser: bool) -> list[str]:
    """JupyterLab's options: loopback only, a token of its own whatever the user's settings say, and no password."""
    options = [
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.allow_remote_access=False",
        f"--IdentityProvider.token={secrets.token_hex(24)}", "--PasswordIdentityProvider.hashed_password=",
        "--PasswordIdentityProvider.password_required=False", f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{first}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--ServerApp.allow_root=True")  # a container's user; without it Jupyter refuses to start
    return options if browser else [*options, "--ServerApp.open_browser=False"]


def open_lab(folder: Path, *, first: str, port: int = 8888, browser: bool = True) -> None:
    """Run JupyterLab on `folder` until it is stopped, with the notebook `first` open; prints its address.

    In this process, so that the token is on no command line, where other users could read it.
    """
    from jupyterlab.labapp import LabApp

    server = LabApp.initialize_server(arguments(folder.resolve(), first=first, port=port, browser=browser))
    server.identity_provider.token_generated = True  # as this one was: only then does Jupyter print it
    server.start()
