"""The shipped proxy snippet, in Debian's nginx, in front of both chat pages under a sub-path (E3)."""

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_drivers import DRIVERS
from playwright.sync_api import expect
from processes import PAGE_KEY, free_port
from scripted_engine import wait_until

SNIPPET = Path(__file__).resolve().parents[2] / "compose" / "nginx" / "glm.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")


@pytest.fixture
def proxied(ui: str, scripted_api, serve_page: Callable, tmp_path: Path) -> Iterator[str]:
    """Address of nginx with the page behind it at /chat/."""
    if not NGINX:
        pytest.skip("no nginx (apt-get install nginx-light)")
    page = serve_page(
        ui,
        "--api",
        scripted_api.url,
        "--api-key-env",
        "PAGE_KEY",
        "--root-path",
        "/chat/",
        path="/chat",
        PAGE_KEY=PAGE_KEY,
    )
    text = SNIPPET.read_text(encoding="utf-8")
    assert text.count("http://web:7860") == 1
    (tmp_path / "glm.conf").write_text(text.replace("http://web:7860", page.host), encoding="utf-8")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; user root;\n"
        "events {}\nhttp { access_log off; "
        f"client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;\n"
        f"server {{ listen 127.0.0.1:{port}; include {tmp_path}/glm.conf; }} }}\n",
        encoding="utf-8",
    )
    nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", f"{tmp_path}/nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/chat/"))
        yield f"http://127.0.0.1:{port}/chat"
    finally:
        nginx.terminate()
        nginx.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


def test_a_page_behind_the_shipped_nginx_snippet_streams_in_pieces(proxied, ui, new_page):
    failed: list[str] = []
    page = new_page()
    page.on("response", lambda reply: reply.status >= 400 and failed.append(f"{reply.status} {reply.url}"))
    chat = DRIVERS[ui](page, proxied).open()  # without the last slash
    assert page.url == f"{proxied}/"
    chat.send("count 40 0.1")
    lengths = set()
    while chat.stop_button().count():
        lengths.add(len(chat.answer()) if chat.of("assistant").count() else 0)
        page.wait_for_timeout(100)
    assert len(lengths) >= 4, lengths
    expect(chat.of("assistant").last).to_contain_text(re.compile(r"9\b"))
    assert chat.ask("say 好") == "好"
    assert failed == []
