"""A real service with a real worker, and a real browser that must not complain."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, sync_playwright

from server.app import create_app
from server.settings import Settings
from tests.server.runs import working

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_MS = 90_000  # a busy machine trains and tunes slowly


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, as it is installed on this machine."""
    installed = next(filter(None, map(shutil.which, _NAMES)), None)
    path = os.environ.get("ACCUTUNE_CHROMIUM", installed)
    if path is None:
        pytest.skip(f"no {', '.join(_NAMES)} on the PATH, and ACCUTUNE_CHROMIUM is not set")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Server:
    """A service at an address that can go away and come back."""

    settings: Settings
    url: str = ""
    app: FastAPI = field(default_factory=FastAPI)
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, at the port of the last time if there was one."""
        app = create_app(self.settings)
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        config = uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.app = app
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Be gone."""
        assert self._server is not None
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with an empty queue."""
    folder = tmp_path_factory.mktemp("service")
    server = Server(Settings(data_dir=folder, requests_per_minute=1_000_000, poll_s=0.1))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def worker(server: Server) -> Iterator[None]:
    """A worker that takes the service's jobs."""
    with working(server.settings):
        yield


@dataclass
class Complaints:
    """What a browser complained about while a page was open."""

    found: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Listen to a page; its console tells of the content security policy, too."""
        page.on("console", lambda m: self._add(m.type, m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: self._add("pageerror", str(error)))
        page.on("requestfailed", lambda r: self._failed(r.url, r.failure or ""))
        page.on("response", lambda r: self._add("status", r.url) if r.status >= 400 else None)

    def _failed(self, url: str, why: str) -> None:
        # a page that is left gives up its stream of events and what it was asking for
        if "ERR_ABORTED" not in why:
            self._add("failed", f"{url}: {why}")

    def _add(self, kind: str, text: str) -> None:
        self.found.append(f"{kind}: {text}")


Open = Callable[..., Page]


@pytest.fixture
def complaints() -> Complaints:
    """What the pages of a test complained about; none at its end, unless the test empties it."""
    return Complaints()


@pytest.fixture
def open_page(browser: Browser, server: Server, complaints: Complaints) -> Iterator[Open]:
    """Open a page of the service in a browser of its own."""
    contexts = []

    def opened(path: str, width: int = 1280, scheme: str = "light", js: bool = True) -> Page:
        context = browser.new_context(
            base_url=server.url,
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
            java_script_enabled=js,
        )
        contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        page = context.new_page()
        complaints.watch(page)
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints.found == []


@pytest.fixture
def shots(tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a picture of a page, and check that nothing sticks out of it.

    Pictures go to ACCUTUNE_SCREENSHOTS, if that is set, to be looked at.
    """
    folder = Path(os.environ.get("ACCUTUNE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def shot(page: Page, name: str) -> None:
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), name
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return shot
