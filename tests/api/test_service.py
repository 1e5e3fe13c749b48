"""Operation as a service: authentication, signals, overload, logs. The engine is scripted."""

import json
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_engine import wait_until
from serving_process import GLM, SCRIPTED, serving

from entrypoints.api.auth import digest

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared_server(toy_native, tmp_path_factory):
    """One slot and two places in the queue, for tests that do not stop the server."""
    log = tmp_path_factory.mktemp("shared") / "log"
    with serving([*SCRIPTED, "--model", toy_native, "--slots", "1", "--queue", "2"], log) as server:
        yield server.wait_ready()


def chat_body(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def is_listening(server):
    """Whether the draining server still accepts connections; if so, it is not ready."""
    try:
        assert server.request("GET", "/readyz")[0] == 503
    except OSError:
        return False
    return True


def streamed_text(body):
    """The text of a stream's events, and whether it ended with [DONE]."""
    lines = body.decode().strip().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", []))
    return text, lines[-1] == "data: [DONE]"


@pytest.mark.slow
def test_keys_or_insecure_no_auth_allow_other_addresses(scripted, tmp_path):
    (tmp_path / "keys").write_text(f"anna {digest('glm-a')}\n")
    keyed = scripted("--host", "0.0.0.0", "--api-keys-file", tmp_path / "keys")
    unprotected = scripted("--host", "0.0.0.0", "--insecure-no-auth")
    single = scripted("--host", "0.0.0.0", env={"API_KEY": "glm-one"})
    for server in (keyed, unprotected, single):
        server.wait_ready()
    assert keyed.request("GET", "/v1/models")[0] == 401
    assert keyed.request("GET", "/v1/models", headers=bearer("glm-a"))[0] == 200
    assert unprotected.request("GET", "/v1/models")[0] == 200
    assert single.request("GET", "/v1/models", headers=bearer("glm-one"))[0] == 200
    assert "glm-one" not in single.log


@pytest.mark.slow
def test_every_invalid_key_gets_the_same_response(scripted):
    server = scripted(env={"API_KEY": "glm-one"}).wait_ready()
    replies = [
        server.request("POST", CHAT, chat_body("say x"), headers)
        for headers in ({}, bearer("wrong"), bearer("glm-on"), {"authorization": "Basic glm-one"}, bearer("x" * 5000))
    ]
    assert {status for status, _, _ in replies} == {401}
    assert {headers["www-authenticate"] for _, headers, _ in replies} == {"Bearer"}
    assert len({body for _, _, body in replies}) == 1


@pytest.mark.slow
def test_keys_are_reloaded_without_a_restart(scripted, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"anna {digest('glm-a')}\n")
    server = scripted("--api-keys-file", keys).wait_ready()

    def status(key):
        return server.request("GET", "/v1/models", headers=bearer(key))[0]

    assert (status("glm-a"), status("glm-b")) == (200, 401)
    subprocess.run([*GLM, "key", str(keys), "ben"], check=True, capture_output=True)
    new = subprocess.run([*GLM, "key", str(keys), "eve"], check=True, capture_output=True, text=True).stdout.strip()
    assert (status(new), status("glm-a")) == (200, 200)
    keys.write_text(f"ben {digest('glm-b')}\n")
    assert (status("glm-a"), status("glm-b")) == (401, 200)
    keys.write_text("half a li")
    assert (status("glm-b"), status("glm-a")) == (200, 401)
    assert server.log.count("is not a valid key entry") == 1
    assert "key ben, request" in server.log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_running_and_queued_requests(scripted, number):
    server = scripted("--slots", "2").wait_ready()
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(server.request, "POST", CHAT, chat_body("count 40 0.05", stream=stream))
            for stream in (True, True, False)  # two run, one waits in the queue
        ]
        wait_until(lambda: server.metric("glm_running") == 2 and server.metric("glm_queue_length"))
        server.signal(number)
        first, second, complete = (one.result() for one in asked)
    assert streamed_text(first[2]) == streamed_text(second[2]) == ("0123456789" * 4, True)
    assert json.loads(complete[2])["choices"][0]["message"]["content"] == "0123456789" * 4, (
        "one of the three waited in the queue"
    )
    assert server.wait() == 0
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_draining_server_stops_listening(scripted):
    server = scripted().wait_ready()
    with server.stream(CHAT, chat_body("count 40 0.05", stream=True)) as running:
        running.readline()
        server.signal()
        server.wait_for("no new requests are accepted; 1 still running")
        wait_until(lambda: not is_listening(server))  # a load balancer notices a closed port at once
        assert streamed_text(running.read())[1]
    assert server.wait() == 0


def test_the_drain_time_is_limited_and_cancelled_requests_receive_an_error(scripted):
    server = scripted("--drain-seconds", "1", "--slots", "1").wait_ready()
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(server.request, "POST", CHAT, chat_body("count 1000 0.05", stream=stream))
            for stream in (True, False)
        ]
        wait_until(lambda: server.metric("glm_running") and server.metric("glm_queue_length"))
        start = time.monotonic()
        server.signal()
        streamed, complete = (one.result() for one in asked)
    assert server.wait() == 0
    assert 0.9 < time.monotonic() - start < 40  # the responses would take 50 s
    last = streamed[2].removesuffix(b"\n\n").split(b"\n\n")[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["code"] == "shutting_down"
    assert (complete[0], json.loads(complete[2])["error"]["code"]) == (503, "shutting_down")
    assert "Traceback" not in server.log


@pytest.mark.slow
@pytest.mark.parametrize(
    "env", [{}, {"SCRIPTED_UNINTERRUPTIBLE": "1"}], ids=["between tokens", "inside a long forward pass"]
)
def test_a_second_signal_exits_at_once(scripted, env):
    server = scripted(env=env).wait_ready()
    with server.stream(CHAT, chat_body("count 100 200", stream=True)) as running:
        running.readline()
        wait_until(lambda: server.metric("glm_running"))
        server.signal()
        server.wait_for("no new requests")
        server.signal()
        assert server.wait() == 128 + signal.SIGTERM  # the next token would take longer than this wait


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_server_with_0(scripted, number, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "gate")})
    assert server.request("GET", "/readyz")[0] == 503
    server.signal(number)
    assert (server.wait(), server.log.count("exiting before the model is loaded")) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["user", "defect"])
def test_a_failed_load_stops_the_process(scripted, kind, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "gate"), "SCRIPTED_LOAD_ERROR": kind})
    assert server.request("GET", "/healthz")[0] == 200
    (tmp_path / "gate").touch()
    assert server.wait() == 1
    if kind == "user":
        assert "glm: the weights are damaged; fetch them again" in server.log
        assert "Traceback" not in server.log
    else:
        assert "ValueError: a defect" in server.log


@pytest.mark.slow
def test_a_load_that_fails_at_once_stops_the_process(scripted):
    server = scripted(env={"SCRIPTED_LOAD_ERROR": "user"})
    assert server.wait() == 1
    assert "glm: the weights are damaged; fetch them again" in server.log


@pytest.mark.slow
def test_the_server_is_alive_while_loading_and_ready_afterwards(scripted, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "gate")})
    assert server.request("GET", "/healthz")[0] == 200
    status, headers, body = server.request("POST", CHAT, chat_body("say x"))
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    assert headers["retry-after"]
    assert server.request("GET", "/readyz")[0] == 503
    (tmp_path / "gate").touch()
    assert server.wait_ready().request("POST", CHAT, chat_body("say x"))[0] == 200


@pytest.mark.slow
def test_a_signal_while_loading_stops_the_server(scripted, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "never")})
    server.wait_for("Started server process")
    server.signal()
    assert server.wait() == 0


def test_a_full_queue_returns_429_with_retry_after(shared_server):
    server = shared_server
    with ThreadPoolExecutor(12) as pool:
        replies = [*pool.map(lambda _: server.request("POST", CHAT, chat_body("count 10 0.05")), range(12))]
    statuses = [status for status, _, _ in replies]
    assert statuses.count(200) >= 3
    assert set(statuses) == {200, 429}
    for status, headers, body in replies:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["error"]["code"] == "queue_full"


def test_a_failed_request_is_reported_and_the_server_continues(shared_server):
    """An exception at token 10, streamed and not."""
    server = shared_server
    for _ in range(3):
        status, headers, body = server.request("POST", CHAT, chat_body("fail 10"))
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_error")
        server.wait_for(headers["x-request-id"])
        status, _, body = server.request("POST", CHAT, chat_body("fail 10", stream=True))
        *deltas, last = body.removesuffix(b"\n\n").split(b"\n\n")
        assert (status, json.loads(last.removeprefix(b"data: "))["error"]["code"]) == (200, "engine_error")
        assert len(deltas) == 11
    assert server.request("POST", CHAT, chat_body("say x"))[0] == 200
    assert server.request("GET", "/healthz")[0] == 200


@pytest.mark.slow
def test_json_logs_contain_no_prompt_answer_or_key(scripted):
    server = scripted("--log-format", "json", "--log-level", "debug", env={"API_KEY": "glm-one"}).wait_ready()
    _, headers, _ = server.request("POST", CHAT, chat_body("say 机密问题"), bearer("glm-one"))
    server.request("POST", CHAT, chat_body("fail 2"), bearer("glm-one"))
    server.signal()
    assert server.wait() == 0
    records = [json.loads(line) for line in server.log.splitlines()]
    assert len(records) >= 6
    (line,) = [record["message"] for record in records if headers["x-request-id"] in record["message"]]
    assert "POST /v1/chat/completions 200" in line
    assert "key default" in line
    assert not [word for word in ("机密", "glm-one", "\\u673a") if word in server.log]


@pytest.mark.slow
def test_log_prompts_logs_prompts(scripted):
    server = scripted("--log-prompts").wait_ready()
    server.request("POST", CHAT, chat_body("say 机密问题"))
    assert "\\\\u673a" in server.log or "机密" in server.log


def test_incomplete_requests_block_neither_slots_nor_health(shared_server):
    server = shared_server
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for one in slow:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert server.request("POST", CHAT, chat_body("say x"))[0] == 200
    assert server.request("GET", "/healthz")[0] == 200
    for one in slow:
        one.close()
