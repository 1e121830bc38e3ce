"""JupyterLab as `igpt-lab lab` starts it on the `folder` of a test file, and a page of a Chromium on it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt_lab.app.printing import FLAGS, chromium

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "build/browser"
SECOND = 1000  # Playwright counts milliseconds


@pytest.fixture(scope="module")
def address(folder):
    """Step 1: `igpt-lab lab`, which prints its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder / f".{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(folder / f".{name.lower()}") for name in ("SETTINGS", "WORKSPACES")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | own | {"IPYTHONDIR": str(folder / ".ipython"), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "igpt_lab", "lab", str(folder), "--no-browser", "--port", str(port)]
    with (folder / ".log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield _address(folder / ".log", server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _address(log: Path, server: subprocess.Popen) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        address = re.search(r"http://127\.0\.0\.1:\d+/lab\S*token=\w{40,}", log.read_text())
        if address:
            return address[0]
        time.sleep(0.1)
    raise AssertionError(f"no address in what igpt-lab lab printed:\n{log.read_text()}")


@pytest.fixture(scope="module")
def page(address, folder, request):
    """A page of a fresh browser on JupyterLab; `page.elsewhere` are the addresses outside this machine it asked for."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(folder / ".profile"), executable_path=chromium(), args=FLAGS, headless=True,
            viewport={"width": 1280, "height": 1500},
        )  # fmt: skip
        page = browser.new_page()
        page.set_default_timeout(60 * SECOND)
        asked = page.locator(".jp-Dialog", has_text="Select Kernel")  # where a cell runs before its kernel has started
        page.add_locator_handler(asked, lambda: asked.locator(".jp-mod-accept").click())
        page.elsewhere, page.errors = [], []
        page.on("request", lambda it: None if _local(it.url) else page.elsewhere.append(it.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.address = address
        yield page
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"last-{request.module.__name__}.png")
        browser.close()


def _local(url: str) -> bool:
    return bool(re.match(r"(https?|wss?)://127\.0\.0\.1:|blob:|data:|about:|file:", url))
