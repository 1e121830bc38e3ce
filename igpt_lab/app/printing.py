"""A page of HTML as a pdf, printed by a Chromium in its sandbox, without a window or a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from igpt_lab.core.provenance import atomic_write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
QUIET = "--host-resolver-rules=MAP * ~NOTFOUND"  # no host is found; scripts are off by the page itself
FLAGS = (  # of a Chromium that asks for nothing by itself
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 120  # that a browser may take


def chromium() -> str | None:
    """Path of a browser of Chromium's kind, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def print_page(browser: str, path: Path) -> Path:
    """The page as a pdf beside it; OSError with the browser's last words where it makes none.

    The page has pictures from the folder, which may be a stranger's, so that the browser's sandbox is on. As root, the
    user of most containers, Chromium says that it needs --no-sandbox; only there a second try does without, and warns.
    """
    pdf, words = _headless(browser, [], path)
    if not pdf and "--no-sandbox" in words and hasattr(os, "geteuid") and os.geteuid() == 0:
        warnings.warn(
            f"{Path(browser).name} does not start with its sandbox as root, so {path.name} is printed without it; "
            "give --no-pdf where you do not trust the folder",
            stacklevel=3,
        )
        pdf, words = _headless(browser, ["--no-sandbox"], path)
    if not pdf:
        last = ["it said nothing", *words.strip().splitlines()][-1]
        raise OSError(f"{browser} made no pdf of {path} ({last}); print the page from any browser")
    return atomic_write(path.with_suffix(".pdf"), pdf)


def _headless(browser: str, flags: list[str], path: Path) -> tuple[bytes, str]:
    """The pdf that a browser without a window makes, b"" where it makes none, and what the browser says."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pdf = Path(folder, "page.pdf")
        own = ["--headless", "--no-pdf-header-footer", f"--user-data-dir={folder}/user", f"--print-to-pdf={pdf}"]
        command = [browser, *FLAGS, QUIET, *flags, *own, path.resolve().as_uri()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return b"", f"it took more than {SECONDS} seconds"
        return pdf.read_bytes() if pdf.is_file() else b"", done.stderr
