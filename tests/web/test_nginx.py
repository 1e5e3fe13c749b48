"""Both chat pages below a sub-path, proxied by Debian's nginx with the configuration of compose/nginx."""

import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_drivers import DRIVERS
from processes import PAGE_KEY, free_port
from scripted_engine import wait_until

pytestmark = pytest.mark.slow

CONFIGURATION = Path(__file__).resolve().parents[2] / "compose" / "nginx" / "glm.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")


@pytest.fixture
def proxied(ui: str, scripted_api, serve_page: Callable, tmp_path: Path) -> Iterator[str]:
    """URL of the page at /chat, served through nginx."""
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
    text = CONFIGURATION.read_text(encoding="utf-8")
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
        wait_until(lambda: _is_served(f"http://127.0.0.1:{port}/chat/"))
        yield f"http://127.0.0.1:{port}/chat"
    finally:
        nginx.terminate()
        nginx.wait(60)


def _is_served(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status == 200
    except OSError:
        return False


def test_a_page_proxied_by_nginx_streams_its_answers(proxied, ui, new_page):
    failed: list[str] = []
    page = new_page()
    page.on("response", lambda reply: reply.status >= 400 and failed.append(f"{reply.status} {reply.url}"))
    chat = DRIVERS[ui](page, proxied).open()  # without the trailing slash
    assert page.url == f"{proxied}/"
    chat.send("count 2000 0.05")  # a proxy that buffers would show nothing for minutes
    chat.wait_for(lambda: "0123" in chat.answer())
    for _ in range(3):
        length = len(chat.answer())
        chat.wait_for(lambda: len(chat.answer()) > length)  # noqa: B023 - called at once
    chat.stop_button().click()
    chat.wait_for_answer()
    chat.ask("say 好")
    assert failed == []
