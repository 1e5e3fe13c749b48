"""A real browser for tests of the web pages: fixtures, which a conftest imports."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# no sandbox for root, and no background traffic
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TIMEOUT_SECONDS = 60  # only a failing test waits that long

NewPage = Callable[..., Page]


class Visitors:
    """Independent browser windows; `problems` lists their script errors and requests to other hosts."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.contexts: list[BrowserContext] = []
        self.problems: list[str] = []

    def new_page(self, width: int = 1400, height: int = 900, locale: str = "zh-CN", **options: Any) -> Page:
        """A page of a new visitor."""
        context = self.browser.new_context(locale=locale, viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(TIMEOUT_SECONDS * 1000)
        self.contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self._check_host(request.url))
        page.on("websocket", lambda websocket: self._check_host(websocket.url))
        return page

    def close(self) -> None:
        """Close all windows."""
        for context in self.contexts:
            context.close()

    def _check_host(self, url: str) -> None:
        scheme, has_host, rest = url.partition("://")
        host = rest.partition("/")[0].partition(":")[0]
        if has_host and scheme not in ("data", "blob") and host not in ("127.0.0.1", "localhost"):
            self.problems.append(f"request to {url}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One per module: while it runs, playwright occupies the event loop that asyncio.run of other tests needs."""
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no browser at {CHROMIUM} (apt-get install chromium fonts-noto-cjk)")
    expect.set_options(timeout=TIMEOUT_SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """Open pages of new visitors; afterwards asserts that no page had an error or sent a request to another host."""
    visitors = Visitors(browser)
    yield visitors.new_page
    visitors.close()
    assert visitors.problems == []
