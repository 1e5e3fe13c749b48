"""HTTP as clients and proxies really speak it: offers of HTTP/2, long-lived connections, HEAD, odd paths, silence."""

import json
import shutil
import socket
import subprocess
import time

import httpx
import openai
import pytest
from serving_process import SCRIPTED, serving

from entrypoints.flags import KEEP_ALIVE_SECONDS

BODY = {"messages": [{"role": "user", "content": "say 你好"}]}
CHAT = "/v1/chat/completions"
UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAA\r\n"


@pytest.fixture(scope="module")
def server(toy_native, tmp_path_factory):
    with serving([*SCRIPTED, "--model", toy_native], tmp_path_factory.mktemp("serve") / "log") as server:
        yield server.wait_ready()


def request_bytes(body, headers=UPGRADE, chunked=False):
    content = json.dumps(body).encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(content)}"
    lines = f"Host: localhost\r\nContent-Type: application/json\r\n{headers}{length}"
    head = f"POST {CHAT} HTTP/1.1\r\n{lines}\r\n\r\n".encode()
    return head + (b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if chunked else content)


def responses(connection, count):
    """Status and JSON of so many responses."""
    stream = connection.makefile("rb")
    for _ in range(count):
        status = int(stream.readline().split()[1])
        headers = dict(line.decode().lower().strip().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
        yield status, json.loads(stream.read(int(headers["content-length"])))


@pytest.mark.parametrize("headers", [UPGRADE, UPGRADE.replace("h2c", "websocket"), ""])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_to_upgrade_does_not_lose_the_body(server, headers, chunked):
    """Java's HttpClient and `curl --http2` send the offer with every request."""
    content = request_bytes(BODY, headers, chunked)
    bytewise = [content[place : place + 1] for place in range(len(content))]
    for parts in ([content * 3], [content[:40], content[40:-20], content[-20:]], bytewise):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for part in parts:
                connection.sendall(part)
            for status, reply in responses(connection, 3 if len(parts) == 1 else 1):
                assert (status, reply["choices"][0]["message"]["content"]) == (200, "你好")


def test_an_upgraded_request_can_be_followed_by_another(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n".encode() + request_bytes(BODY, "")
        )
        assert [status for status, _ in responses(connection, 2)] == [200, 200]


@pytest.mark.parametrize("start", [b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_what_is_not_http_1_is_answered_with_400(server, start):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(start)
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 400 ")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_with_http2_gets_an_answer(server):
    argv = ["curl", "-sS", "--noproxy", "*", "--http2", "-H", "content-type: application/json", "-d", json.dumps(BODY)]
    done = subprocess.run([*argv, server.url + CHAT], capture_output=True, timeout=60, check=False)
    if b"does not support this" in done.stderr:
        pytest.skip("this curl has no HTTP/2")
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "你好"


@pytest.mark.slow
def test_idle_connections_stay_open_longer_than_in_the_pools_of_proxies(scripted):
    """60 s in nginx and AWS, 600 s in Google's load balancers: a shorter time here makes them send 502."""
    assert KEEP_ALIVE_SECONDS > 600
    server = scripted("--keep-alive-seconds", "1").wait_ready()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request_bytes(BODY, ""))
        assert [status for status, _ in responses(connection, 1)] == [200]
        start = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - start < 15


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v1/models"])
def test_head_returns_what_get_would_without_its_body(server, path):
    with httpx.Client(base_url=server.url) as client:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content, get.status_code) == (200, b"", 200)
        assert head.headers["content-type"] == get.headers["content-type"]
        assert client.head(CHAT).status_code == 405


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1//chat/completions/", "/v1/chat/completions/"])
def test_slashes_too_many_change_nothing(server, path):
    reply = httpx.post(server.url + path, json=BODY)
    assert (reply.status_code, reply.history) == (200, [])
    assert httpx.get(f"{server.url}//healthz/").status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
def test_openais_client_works_with_either_form_of_the_base_url(server, path):
    with openai.OpenAI(base_url=server.url + path, api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="native", **BODY).choices[0].message.content == "你好"


def test_an_unknown_path_names_the_endpoints(server):
    reply = httpx.post(f"{server.url}/chat/completions", json=BODY)
    assert (reply.status_code, "/v1/chat/completions" in reply.json()["error"]["message"]) == (404, True)
