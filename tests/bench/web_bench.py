"""Web pages: seconds until a page is served, painted and usable, and bytes that a browser loads.

Each page runs as a user starts it, connected to a scripted server; a headless Chromium opens it with an empty cache and
again with a filled cache. First paint is the first-contentful-paint of the browser. A chat page is usable when its
input field is visible, the training page when its notice is. Bytes are those of the network, as the DevTools protocol
counts them.

    python tests/bench/web_bench.py                 a few minutes
    python tests/bench/web_bench.py --rounds 5      more rounds; the medians are reported
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

from chat_drivers import DRIVERS  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402
from processes import SUPPORT, Process, free_port, glm  # noqa: E402

from entrypoints.chat_format.prompt import PromptFormat  # noqa: E402
from entrypoints.checkpoint.conversion import convert_to_native  # noqa: E402
from entrypoints.demo.model import write_demo_model  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
UIS = ("gradio", "streamlit", "training")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def main(argv: list[str] | None = None) -> int:
    """Measure each page and print one line per page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts per page (default: 3)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        server, url = _server(folder)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            for ui in UIS:
                rounds = [_round(ui, url, folder, browser) for _ in range(args.rounds)]
                median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                print(
                    f"{ui:10} start {median['start']:.1f} s   first paint {median['paint']:.2f} s"
                    f"   usable {median['usable']:.2f} s   loaded {median['bytes'] / 1e6:.2f} MB in"
                    f" {median['requests']:.0f} requests, again {median['again'] / 1e6:.2f} MB",
                    flush=True,
                )
        finally:
            browser.close()
            server.end()
    return 0


def _server(folder: Path) -> tuple[Process, str]:
    text = resources.files("entrypoints.demo").joinpath("ad_copy.jsonl").read_text(encoding="utf-8")
    write_demo_model(folder / "original", text.splitlines())
    convert_to_native(folder / "original", folder / "native", PromptFormat())
    (folder / "keys").write_text("")
    port = free_port()
    command = [SUPPORT / "recording_server.py", folder / "native", port, folder / "record", folder / "keys"]
    server = Process(command, folder / "server.log", PYTHONPATH=str(SUPPORT))
    server.wait_for(f"http://127.0.0.1:{port}/healthz")
    return server, f"http://127.0.0.1:{port}"


def _round(ui: str, url: str, folder: Path, browser: Browser) -> dict[str, float]:
    """One start of the page, one visit with an empty cache, one with a full one."""
    port = free_port()
    source = ["--output-dir", folder] if ui == "training" else ["--api", url]
    begin = time.monotonic()
    page = Process(glm("web", "--ui", ui, "--port", port, *source), folder / "page.log")
    try:
        page.wait_for(f"http://127.0.0.1:{port}/healthz")
        numbers = {"start": time.monotonic() - begin}
        context = browser.new_context(locale="zh-CN")
        numbers |= _visit(context.new_page(), ui, f"http://127.0.0.1:{port}/")
        numbers["again"] = _visit(context.new_page(), ui, f"http://127.0.0.1:{port}/")["bytes"]
        context.close()
        return numbers
    finally:
        page.end()


def _visit(page: Page, ui: str, address: str) -> dict[str, float]:
    counted = {"bytes": 0.0, "requests": 0.0}
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")

    def loaded(event: dict) -> None:
        counted["bytes"] += event["encodedDataLength"]
        counted["requests"] += 1

    network.on("Network.loadingFinished", loaded)
    begin = time.monotonic()
    page.goto(address)
    page.locator(DRIVERS[ui].input_selector if ui in DRIVERS else '[data-testid="stAlert"]').wait_for(timeout=60_000)
    usable = time.monotonic() - begin
    page.wait_for_timeout(1500)  # includes resources that are loaded late
    return {"paint": page.evaluate(PAINT) / 1000, "usable": usable, **counted}


if __name__ == "__main__":
    sys.exit(main())
