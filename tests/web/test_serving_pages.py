"""Pages as processes: what they serve, what they start, how they end. No browser."""

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from asgi import ask
from processes import Process, free_port, glm
from scripted_engine import wait_until

from entrypoints.web.serving import HEADERS, Guard


def get(url: str, data: bytes | None = None) -> tuple[int, str, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as response:
            return response.status, response.read().decode(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        "/file=/tmp/gradio/../../etc/passwd",
        "/file/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/tmp/gradio/../../etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "//gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/monitoring",
        "/gradio_api/monitoring",
        "/media/../../../etc/passwd",
        "/app/static/../../etc/passwd",
        "/component/x/../../../etc/passwd",
    ],
)
def test_no_file_of_the_machine_can_be_read(path, ui, chat_pages):
    """L3."""
    status, body, _ = get(chat_pages(ui).host + path)
    assert "root:" not in body
    assert status in (400, 403, 404) or "<title>" in body  # Streamlit answers unknown paths with its page


def test_nothing_can_be_uploaded_to_the_gradio_page(chat_pages):
    status, _, _ = get(f"{chat_pages('gradio').host}/gradio_api/upload", b"x" * 100)
    assert status == 404


def test_the_gradio_page_offers_no_api_and_no_share_link(chat_pages):
    _, info, _ = get(f"{chat_pages('gradio').host}/gradio_api/info")
    assert json.loads(info)["named_endpoints"] == {}
    assert ".gradio.live" not in chat_pages("gradio").process.output()


def test_every_answer_of_a_page_keeps_the_browser_on_this_host(ui, chat_pages):
    status, _, headers = get(chat_pages(ui).address)
    assert status == 200
    sent = {name.lower(): value for name, value in headers.items()}
    assert HEADERS.items() <= sent.items()
    assert "http" not in HEADERS["content-security-policy"]


async def _page(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


def test_a_page_with_a_password_lets_nobody_else_in():
    guard = Guard(_page, "geheim")
    refused = ask(guard, "GET", "/")
    assert (refused.status, "basic" in refused.headers["www-authenticate"].lower()) == (401, True)
    for wrong in ("Basic eDp4", "Basic !", "Basic", "Bearer geheim", ""):
        assert ask(guard, "GET", "/", headers={"authorization": wrong}).status == 401
    right = ask(guard, "GET", "/", headers={"authorization": "Basic YW55Om1pY2s6Z2VoZWlt"})
    assert right.status == 401  # the user's name has no colon, the rest is the password
    right = ask(guard, "GET", "/", headers={"authorization": "Basic YW55OmdlaGVpbQ=="})
    assert (right.status, right.body) == (200, b"page")
    cookie = right.headers["set-cookie"].split(";")[0]
    assert "geheim" not in cookie
    assert ask(guard, "GET", "/", headers={"cookie": f"a=b; {cookie}"}).status == 200
    assert ask(guard, "GET", "/", headers={"cookie": "page="}).status == 401
    assert ask(guard, "GET", "/healthz").status == 200


def test_another_sites_script_cannot_open_a_websocket():
    """Streamlit would let none in either, but ask the internet for our address first."""
    sent: list[dict] = []

    async def connect(origin: bytes) -> None:
        async def send(message: dict) -> None:
            sent.append(message)

        async def app(scope, receive, send) -> None:
            await send({"type": "websocket.accept"})

        headers = [(b"host", b"here:1"), (b"origin", origin)]
        await Guard(app)({"type": "websocket", "path": "/", "headers": headers}, None, send)

    asyncio.run(connect(b"http://evil.example"))
    asyncio.run(connect(b"http://here:1"))
    assert [message["type"] for message in sent] == ["websocket.close", "websocket.accept"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_with_a_model_the_command_starts_a_server_and_ends_it(how, toy_native, tmp_path):
    """E2: however many visitors come, the model is loaded once."""
    port = free_port()
    page = Process(glm("web", "--model", toy_native, "--port", port), tmp_path / "log")
    try:
        page.wait_for(f"http://127.0.0.1:{port}/healthz")
        (server,) = psutil.Process(page.popen.pid).children()
        assert "serve" in server.cmdline()
        for _ in range(3):
            assert get(f"http://127.0.0.1:{port}/")[0] == 200
        assert page.output().count("ready: ") == 1
        assert page.end(how) == 0
        wait_until(lambda: not server.is_running())
    finally:
        page.end()
    assert f"open http://127.0.0.1:{port}/" in page.output()


def test_a_model_that_cannot_be_served_is_said_and_ends_the_command(tmp_path):
    found = subprocess.run(
        [sys.executable, *glm("web", "--model", tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 1
    assert str(tmp_path) in found.stderr
    assert "glm serve ended with code 1" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ui", "training"], "add --output-dir"),
        (["--ui", "gradio"], "add --api URL, or --model DIR"),
        (["--api", "http://127.0.0.1:1", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_what_is_missing_is_said_in_one_line(words, expected, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, *glm("web", *words)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert found.returncode == 1
    assert expected in found.stderr.splitlines()[-1]


def test_a_port_in_use_is_said_in_one_line(chat_pages, scripted_api):
    found = subprocess.run(
        [sys.executable, *map(str, glm("web", "--api", scripted_api.url, "--port", scripted_api.port))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert f"cannot listen on 127.0.0.1:{scripted_api.port}" in found.stderr.splitlines()[-1]


def test_a_key_never_reaches_the_log_of_a_page(ui, chat_pages):
    get(chat_pages(ui).address)
    assert "sk-page" not in chat_pages(ui).process.output()


def test_no_page_file_is_named_like_its_library():
    """`streamlit run` puts the page's own folder first on sys.path."""
    folder = Path(__file__).resolve().parents[2] / "entrypoints" / "web"
    names = {path.stem for path in folder.glob("*.py")}
    assert {"gradio_page", "streamlit_page", "training_page"} <= names
    assert not names & {"gradio", "streamlit", "openai", "starlette", "uvicorn"}
