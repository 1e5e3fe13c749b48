"""Pages as processes, without a browser: what they serve, which server they start, how they stop."""

import base64
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path

import psutil
import pytest
from processes import Process, free_port, glm
from scripted_engine import wait_until

from entrypoints.web.access import SECURITY_HEADERS

pytestmark = pytest.mark.slow


def get(url: str, data: bytes | None = None, headers: dict | None = None) -> tuple[int, str, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as response:
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
    status, body, _ = get(chat_pages(ui).host + path)
    assert "root:" not in body
    assert status in (400, 403, 404) or "<title>" in body  # Streamlit serves its page for unknown paths


def test_the_gradio_page_offers_no_api_and_no_share_link(chat_pages):
    _, info, _ = get(f"{chat_pages('gradio').host}/gradio_api/info")
    assert json.loads(info)["named_endpoints"] == {}
    assert ".gradio.live" not in chat_pages("gradio").process.output()


def test_the_security_headers_keep_the_browser_on_this_host(ui, chat_pages):
    status, _, headers = get(chat_pages(ui).address)
    assert status == 200
    sent = {name.lower(): value for name, value in headers.items()}
    assert SECURITY_HEADERS.items() <= sent.items()
    assert "http" not in SECURITY_HEADERS["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_a_web_page_under_a_foreign_name_reaches_only_the_health_check(path, ui, chat_pages):
    """DNS rebinding: its requests arrive with the Host and Origin of that page."""
    page = chat_pages(ui)
    assert get(page.host + path, headers={"Host": "evil.example"})[0] == (200 if path == "/healthz" else 403)


@pytest.mark.parametrize("kind", ["gradio", "streamlit", "training"])
def test_each_page_with_a_password_signs_visitors_in(kind, serve_page, tmp_path):
    source = ("--output-dir", tmp_path) if kind == "training" else ("--api", "http://127.0.0.1:1")
    page = serve_page(kind, *source, PAGE_PASSWORD="密码")
    assert get(page.address)[0] == 401
    credentials = base64.b64encode("any:密码".encode()).decode()
    status, _, headers = get(page.address, headers={"Authorization": f"Basic {credentials}", "Host": "llm.example"})
    assert status == 200
    cookie = headers["set-cookie"].split(";")[0]
    assert get(page.address, headers={"Cookie": cookie})[0] == 200
    assert [get(page.address, headers=wrong(number))[0] for number in range(6)] == [401] * 5 + [429]
    assert get(page.address, headers={"Cookie": cookie})[0] == 200


def wrong(number: int, **headers: str) -> dict[str, str]:
    """Headers with a wrong password."""
    return {"Authorization": f"Basic {base64.b64encode(b'any:%d' % number).decode()}", **headers}


@pytest.mark.parametrize(("proxy", "is_known"), [("127.0.0.1", True), ("192.0.2.77", False)])
def test_guesses_are_counted_per_visitor_behind_a_known_proxy_only(proxy, is_known, serve_page, tmp_path):
    page = serve_page("training", "--output-dir", tmp_path, PAGE_PASSWORD="geheim", FORWARDED_ALLOW_IPS=proxy)
    visitors = [wrong(number, **{"X-Forwarded-For": f"203.0.113.{number}"}) for number in range(6)]
    assert [get(page.address, headers=visitor)[0] for visitor in visitors] == [401] * 5 + [401 if is_known else 429]


def test_with_a_model_the_command_starts_one_server_and_stops_it(toy_native, tmp_path):
    """However many visitors come, the model is loaded once. The browser test of a tuned model stops it with Ctrl-C."""
    port = free_port()
    page = Process(glm("web", "--model", toy_native, "--port", port), tmp_path / "log")
    try:
        page.wait_for(f"http://127.0.0.1:{port}/healthz")
        (server,) = psutil.Process(page.popen.pid).children()
        assert "serve" in server.cmdline()
        for _ in range(3):
            assert get(f"http://127.0.0.1:{port}/")[0] == 200
        assert page.output().count("ready: ") == 1
        assert page.end(signal.SIGTERM) == 0
        wait_until(lambda: not server.is_running())
    finally:
        page.end()
    assert f"open http://127.0.0.1:{port}/" in page.output()


def test_a_model_that_cannot_be_served_stops_the_command_with_its_error(tmp_path):
    found = subprocess.run(
        [sys.executable, *glm("web", "--model", tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 1
    assert str(tmp_path) in found.stderr
    assert "glm serve exited with code 1" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ui", "training"], "add --output-dir"),
        (["--ui", "gradio"], "add --api URL, or --model DIR"),
        (["--api", "http://127.0.0.1:1", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_a_missing_setting_is_reported_in_one_line(arguments, expected, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, *glm("web", *arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert found.returncode == 1
    assert expected in found.stderr.splitlines()[-1]


def test_a_port_in_use_is_reported_in_one_line(chat_pages, scripted_api):
    found = subprocess.run(
        [sys.executable, *map(str, glm("web", "--api", scripted_api.url, "--port", scripted_api.port))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert f"cannot listen on 127.0.0.1:{scripted_api.port}" in found.stderr.splitlines()[-1]


def test_the_api_key_is_not_in_the_log_of_a_page(ui, chat_pages):
    get(chat_pages(ui).address)
    assert "sk-page" not in chat_pages(ui).process.output()


def test_no_module_of_the_pages_has_the_name_of_a_library():
    """`streamlit run` puts the folder of the page first on sys.path."""
    folder = Path(__file__).resolve().parents[2] / "entrypoints" / "web"
    names = {path.stem for path in folder.glob("*.py")}
    assert {"gradio_page", "streamlit_page", "training_page"} <= names
    assert names & set(packages_distributions()) == set()
