"""A real browser for the tests of pages; fixtures that a conftest takes by import."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# no sandbox for root, and nothing fetched in the background
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

SECONDS = 60  # a busy machine may take its time: only a test that fails waits so long

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for each module: while it runs, playwright holds an event loop that asyncio.run in other tests would meet."""
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no browser at {CHROMIUM} (apt-get install chromium fonts-noto-cjk)")
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """A visitor: a browser window of its own. At the end no page has met an error or asked another host."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def make(width: int = 1400, height: int = 900, locale: str = "zh-CN", **options: object) -> Page:
        context = browser.new_context(locale=locale, viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: problems.extend(_outside(request.url)))
        page.on("websocket", lambda websocket: problems.extend(_outside(websocket.url)))
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def _outside(url: str) -> list[str]:
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0].partition(":")[0]
    return (
        [] if scheme in ("data", "blob") or host in ("127.0.0.1", "localhost") or "://" not in url else [f"asked {url}"]
    )
