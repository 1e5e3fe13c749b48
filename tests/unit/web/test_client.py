"""The client, against a server that answers as told: what no real one can be made to do at will."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from scripted_engine import wait_until

from entrypoints.web.client import Answering, Api, Problem


@pytest.fixture
def server() -> Iterator[Callable]:
    """Start a server that answers every request with `reply(handler)`; gives its address."""
    running: list[http.server.ThreadingHTTPServer] = []

    def start(reply: Callable) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reply(self)

            def do_GET(self) -> None:
                reply(self)

            def log_message(self, *args: object) -> None:
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/v1"

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def error(status: int, code: str | None = None, **headers: str) -> Callable:
    def reply(handler) -> None:
        body = json.dumps({"error": {"message": f"says {status}", "code": code, "type": "x", "param": None}}).encode()
        handler.send_response(status)
        for name, value in {"content-length": str(len(body)), "content-type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def events(handler, *contents: str, end: bytes = b"data: [DONE]\n\n") -> None:
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.end_headers()
    for content in contents:
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        handler.wfile.flush()
    handler.wfile.write(end)


def answer(url: str, messages: list[dict] | None = None) -> Answering:
    answering = Answering(Api(url, "sk-x"), messages or [{"role": "user", "content": "q"}], {"model": "m"})
    assert answering.done.wait(60)
    return answering


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (error(401), Problem("needs_key")),
        (error(403), Problem("needs_key")),
        (error(429, retry_after="7"), Problem("busy", {"seconds": "7"})),
        (error(503, "loading", retry_after="9"), Problem("loading", {"seconds": "9"})),
        (error(503, "draining"), Problem("failed", {"detail": "says 503"})),
        (error(400, "context_length_exceeded"), Problem("too_long", {"detail": "says 400"})),
        (error(404), Problem("refused", {"detail": "says 404"})),
        (error(500), Problem("failed", {"detail": "says 500"})),
    ],
)
def test_each_refusal_is_a_problem_of_its_own(reply, expected, server):
    url = server(reply)
    assert answer(url).growth.problem == expected
    assert Api(url).models() == expected


def test_a_server_that_is_not_there_is_down():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert answer(url).growth.problem == Problem("down", {"detail": url})
        assert Api(url).models() == Problem("down", {"detail": url})


def test_an_error_within_a_stream_keeps_what_was_said(server):
    url = server(lambda handler: events(handler, "你", "好", end=b'data: {"error": {"message": "broke"}}\n\n'))
    growth = answer(url).growth
    assert (growth.text, growth.pieces, growth.problem.key) == ("你好", 2, "failed")


def test_a_proxy_in_the_environment_is_not_asked_about_this_machine(server, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert answer(server(lambda handler: events(handler, "好"))).growth.text == "好"


def test_oldest_rounds_are_left_out_until_the_prompt_fits(server):
    seen: list[list[str]] = []

    def reply(handler) -> None:
        seen.append([message["content"] for message in handler.body["messages"]])
        if len(seen) < 3:
            error(400, "context_length_exceeded")(handler)
        else:
            events(handler, "好")

    turns = [("system", "s"), ("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b"), ("user", "3")]
    growth = answer(server(reply), [{"role": role, "content": text} for role, text in turns]).growth
    assert seen[-1] == ["s", "3"]
    assert (growth.text, growth.dropped, growth.problem) == ("好", 2, None)


def test_stopping_drops_the_connection_while_nothing_comes(server):
    gone = threading.Event()

    def reply(handler) -> None:
        events(handler, "好", end=b"")
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":
            gone.set()

    answering = Answering(Api(server(reply)), [{"role": "user", "content": "q"}], {"model": "m"})
    wait_until(lambda: answering.growth.text == "好")
    answering.stop()
    assert gone.wait(60)
    assert answering.done.wait(60)
    assert (answering.stopped, answering.growth.text, answering.growth.problem) == (True, "好", None)
    answering.stop()  # again: nothing happens


def test_an_answer_that_has_ended_is_not_stopped(server):
    answering = answer(server(lambda handler: events(handler, "好")))
    answering.stop()
    assert not answering.stopped


def test_a_key_is_never_in_a_repr():
    assert "sk-" not in repr(Api("http://x/v1", "sk-secret"))
    assert Api("u", "sk-a").with_key(" ").key == "sk-a"
    assert Api("u", "sk-a").with_key(" sk-b ").key == "sk-b"
