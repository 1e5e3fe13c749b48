"""Running it as a service: who gets in, what a signal does, what a crowd meets. The engine is scripted."""

import json
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_engine import wait_until
from serving_process import GLM, SCRIPTED

from entrypoints.api.auth import digest

CHAT = "/v1/chat/completions"


def question(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def said(body):
    """The text of a stream's events, and whether it ended whole."""
    lines = body.decode().strip().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", []))
    return text, lines[-1] == "data: [DONE]"


def refused(*flags, script=SCRIPTED, env=None):
    """Run the command, which must refuse; its one line of error."""
    done = subprocess.run([*map(str, script), *map(str, flags)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("glm: ")]
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example"])
def test_beyond_loopback_nobody_is_served_without_keys(host, toy_native):
    """L2."""
    line = refused("--model", toy_native, "--host", host)
    assert f"--host {host} would let everyone on the network in" in line
    assert "--insecure-no-auth" in line


def test_beyond_loopback_keys_or_the_word_that_none_are_wanted_let_it_start(scripted, tmp_path):
    (tmp_path / "keys").write_text(f"anna {digest('glm-a')}\n")
    keyed = scripted("--host", "0.0.0.0", "--api-keys-file", tmp_path / "keys").wait_ready()
    assert keyed.request("GET", "/v1/models")[0] == 401
    assert keyed.request("GET", "/v1/models", headers=bearer("glm-a"))[0] == 200
    assert scripted("--host", "0.0.0.0", "--insecure-no-auth").wait_ready().request("GET", "/v1/models")[0] == 200
    single = scripted("--host", "0.0.0.0", env={"API_KEY": "glm-one"}).wait_ready()
    assert single.request("GET", "/v1/models", headers=bearer("glm-one"))[0] == 200
    assert "glm-one" not in single.log


def test_a_refusal_says_the_same_whatever_was_wrong(scripted):
    server = scripted(env={"API_KEY": "glm-one"}).wait_ready()
    replies = [
        server.request("POST", CHAT, question("say x"), headers)
        for headers in ({}, bearer("wrong"), bearer("glm-on"), {"authorization": "Basic glm-one"}, bearer("x" * 5000))
    ]
    assert {status for status, _, _ in replies} == {401}
    assert {headers["www-authenticate"] for _, headers, _ in replies} == {"Bearer"}
    assert len({body for _, _, body in replies}) == 1


def test_keys_change_without_a_restart(scripted, tmp_path):
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
    assert server.log.count("is no key") == 1
    assert "key ben, request" in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end_whole(scripted, number):
    server = scripted("--slots", "2").wait_ready()
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(server.request, "POST", CHAT, question("count 40 0.08", stream=stream))
            for stream in (True, True, False)
        ]
        wait_until(lambda: server.metric("glm_running") == 2 and server.metric("glm_queue_length"))
        server.signal(number)
        first, second, whole = (one.result() for one in asked)
    assert said(first[2]) == said(second[2]) == ("0123456789" * 4, True)
    assert json.loads(whole[2])["choices"][0]["message"]["content"] == "0123456789" * 4, "also one that waited"
    assert server.wait() == 0
    assert "Traceback" not in server.log


def test_while_it_drains_nobody_new_is_let_in(scripted):
    server = scripted().wait_ready()
    with server.stream(CHAT, question("count 40 0.08", stream=True)) as running:
        running.readline()
        server.signal()
        server.wait_for("no new requests; 1 answers go on")
        deadline = time.monotonic() + 60
        with pytest.raises(OSError):  # it stops listening: a balancer sees that at once
            while time.monotonic() < deadline:
                assert server.request("GET", "/readyz")[0] == 503
        assert said(running.read())[1]
    assert server.wait() == 0


def test_the_drain_has_an_end_and_tells_those_it_cuts(scripted):
    server = scripted("--drain-seconds", "1", "--slots", "1").wait_ready()
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(server.request, "POST", CHAT, question("count 1000 0.05", stream=stream))
            for stream in (True, False)
        ]
        wait_until(lambda: server.metric("glm_running") and server.metric("glm_queue_length"))
        start = time.monotonic()
        server.signal()
        streamed, whole = (one.result() for one in asked)
    assert server.wait() == 0
    assert 0.9 < time.monotonic() - start < 40  # the answers would take 50
    last = streamed[2].removesuffix(b"\n\n").split(b"\n\n")[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["code"] == "shutting_down"
    assert (whole[0], json.loads(whole[2])["error"]["code"]) == (503, "shutting_down")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("env", [{}, {"SCRIPTED_STUBBORN": "1"}], ids=["between tokens", "inside a long step"])
def test_a_second_signal_ends_at_once(scripted, env):
    server = scripted(env=env).wait_ready()
    with server.stream(CHAT, question("count 100 200", stream=True)) as running:
        running.readline()
        wait_until(lambda: server.metric("glm_running"))
        server.signal()
        server.wait_for("no new requests")
        server.signal()
        assert server.wait() == 128 + signal.SIGTERM  # a token takes longer than it waits


def test_a_port_in_use_is_a_users_mistake(toy_native):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("--model", toy_native, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots", "0", "--queue", "-1"], "--slots 0, --queue -1"),
        (["--drain-seconds", "-1"], "--drain-seconds is 0 to"),
        (["--max-body-bytes", "0"], "--max-body-bytes is 1 to"),
        (["--port", "-1"], "--port is 0 to 65535"),
        (["--port", "70000"], "--port is 0 to 65535"),
        (["--adapter", "ads"], "--adapter ads is not understood"),
        (["--adapter", "a=x", "--adapter", "a=y"], "takes a name that is taken"),
        (["--adapter", "toy=x", "--served-model-name", "toy"], "takes a name that is taken"),
        (["--api-keys-file", "/nowhere"], "cannot read the key file /nowhere"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words, toy_native):
    assert words in refused("--model", toy_native, *flags)


def test_a_model_that_is_none_is_refused_before_anything_is_loaded(tmp_path):
    assert "config.json" in refused("serve", "--model", tmp_path, script=GLM)
    assert "is no folder" in refused("serve", "--model", tmp_path / "none", script=GLM)


def test_without_a_model_it_says_how_to_name_one(tmp_path):
    assert "set MODEL_PATH" in refused("serve", script=GLM, env={"PATH": "/usr/bin"})


@pytest.mark.parametrize("kind", ["user", "defect"])
def test_a_failed_load_ends_the_process(scripted, kind, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "gate"), "SCRIPTED_LOAD_ERROR": kind})
    assert server.request("GET", "/healthz")[0] == 200
    (tmp_path / "gate").touch()
    assert server.wait() == 1
    if kind == "user":
        assert "glm: the weights are damaged; fetch them again" in server.log
        assert "Traceback" not in server.log
    else:
        assert "ValueError: a defect" in server.log


def test_a_load_that_fails_at_once_ends_the_process_too(scripted):
    server = scripted(env={"SCRIPTED_LOAD_ERROR": "user"})
    assert server.wait() == 1
    assert "glm: the weights are damaged; fetch them again" in server.log


def test_it_is_alive_while_it_loads_and_ready_afterwards(scripted, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "gate")})
    assert server.request("GET", "/healthz")[0] == 200
    status, headers, body = server.request("POST", CHAT, question("say x"))
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    assert headers["retry-after"]
    assert server.request("GET", "/readyz")[0] == 503
    (tmp_path / "gate").touch()
    assert server.wait_ready().request("POST", CHAT, question("say x"))[0] == 200


def test_a_signal_while_it_loads_ends_it(scripted, tmp_path):
    server = scripted(env={"SCRIPTED_GATE": str(tmp_path / "never")})
    server.wait_for("Started server process")
    server.signal()
    assert server.wait() == 0


def test_a_full_queue_is_told_and_when_to_come_back(scripted):
    server = scripted("--slots", "1", "--queue", "2").wait_ready()
    with ThreadPoolExecutor(12) as pool:
        replies = [*pool.map(lambda _: server.request("POST", CHAT, question("count 10 0.05")), range(12))]
    statuses = [status for status, _, _ in replies]
    assert statuses.count(200) >= 3
    assert set(statuses) == {200, 429}
    for status, headers, body in replies:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["error"]["code"] == "queue_full"


def test_a_failure_midway_is_told_and_the_server_goes_on(scripted):
    """D8: exception at token 10, streamed and not, and a chunk that nobody reads."""
    server = scripted("--slots", "1").wait_ready()
    for _ in range(3):
        status, headers, body = server.request("POST", CHAT, question("fail 10"))
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_error")
        server.wait_for(headers["x-request-id"])
        status, _, body = server.request("POST", CHAT, question("fail 10", stream=True))
        *pieces, last = body.removesuffix(b"\n\n").split(b"\n\n")
        assert (status, json.loads(last.removeprefix(b"data: "))["error"]["code"]) == (200, "engine_error")
        assert len(pieces) == 11
    assert server.request("POST", CHAT, question("say x"))[0] == 200
    assert server.request("GET", "/healthz")[0] == 200


def test_logs_are_json_if_asked_and_hold_no_prompt_answer_or_key(scripted):
    server = scripted("--log-format", "json", "--log-level", "debug", env={"API_KEY": "glm-one"}).wait_ready()
    _, headers, _ = server.request("POST", CHAT, question("say 机密问题"), bearer("glm-one"))
    server.request("POST", CHAT, question("fail 2"), bearer("glm-one"))
    server.signal()
    assert server.wait() == 0
    records = [json.loads(line) for line in server.log.splitlines()]
    assert len(records) >= 6
    (line,) = [record["message"] for record in records if headers["x-request-id"] in record["message"]]
    assert "POST /v1/chat/completions 200" in line
    assert "key default" in line
    assert not [word for word in ("机密", "glm-one", "\\u673a") if word in server.log]


def test_prompts_are_logged_on_demand(scripted):
    server = scripted("--log-prompts").wait_ready()
    server.request("POST", CHAT, question("say 机密问题"))
    assert "\\\\u673a" in server.log or "机密" in server.log


def test_a_client_that_never_ends_its_request_holds_no_slot_and_no_health(scripted):
    server = scripted("--slots", "1").wait_ready()
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for one in slow:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert server.request("POST", CHAT, question("say x"))[0] == 200
    assert server.request("GET", "/healthz")[0] == 200
    for one in slow:
        one.close()
