"""The API client of the pages against a fake server, which produces any response on demand."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from scripted_engine import wait_until

from entrypoints.errors import UserError
from entrypoints.web import client
from entrypoints.web.client import AnswerTask, ApiClient, CompletionRequest, TokenCount, base_url
from entrypoints.web.request_errors import ErrorMessage

REQUEST = CompletionRequest("m", 16, 0.8, 0.8)


@pytest.fixture
def server() -> Iterator[Callable]:
    """Start a server that answers every request with `reply(handler)`; returns its URL."""
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
    for instance in running:
        instance.shutdown()
        instance.server_close()


def error(status: int, code: str | None = None, text: str = "", **headers: str) -> Callable:
    def reply(handler) -> None:
        body = json.dumps(
            {"error": {"message": text or f"message {status}", "code": code, "type": "x", "param": None}}
        ).encode()
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


def answer(url: str, messages: list[dict] | None = None) -> AnswerTask:
    task = AnswerTask(ApiClient(url, "sk-x"), messages or [{"role": "user", "content": "q"}], REQUEST)
    assert task.done.wait(60)
    return task


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (error(401), ErrorMessage("wrong_key")),
        (error(403), ErrorMessage("wrong_key")),
        (error(429, retry_after="7"), ErrorMessage("busy", {"seconds": "7"})),
        (error(503, "loading", retry_after="9"), ErrorMessage("loading", {"seconds": "9"})),
        (error(503, "draining"), ErrorMessage("failed", {"detail": "message 503"})),
        (error(400, "context_length_exceeded"), ErrorMessage("too_long", {"detail": "message 400"})),
        (
            error(400, "context_length_exceeded", text="the prompt has 9 or more tokens, the context length is 8"),
            ErrorMessage("too_long_by", {"tokens": "9 or more", "limit": "8"}),
        ),
        (error(404, "model_not_found"), ErrorMessage("unknown_model")),
        (error(404), ErrorMessage("rejected", {"detail": "message 404"})),
        (error(500), ErrorMessage("failed", {"detail": "message 500"})),
    ],
)
def test_each_error_response_has_its_own_message(reply, expected, server):
    url = server(reply)
    assert answer(url).answer.error == expected
    assert ApiClient(url, "sk-x").list_models() == expected


def test_a_missing_key_and_a_wrong_key_have_different_messages(server):
    url = server(error(401))
    assert ApiClient(url).list_models() == ErrorMessage("needs_key")
    assert ApiClient(url, "sk-x").list_models() == ErrorMessage("wrong_key")


@pytest.mark.parametrize(
    ("status", "body", "count"),
    [
        (200, {"count": 3, "max_model_len": 8}, TokenCount(3, 8)),
        (200, {"count": 3}, TokenCount(3, None)),
        (200, {"tokens": []}, None),
        (404, {}, None),
    ],
)
def test_tokens_are_counted_if_the_server_can(status, body, count, server):
    def reply(handler) -> None:
        assert handler.path == "/tokenize"
        text = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    assert ApiClient(server(reply)).count_tokens("x", "m") == count


def test_a_server_that_does_not_listen_is_unreachable():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert answer(url).answer.error == ErrorMessage("unreachable", {"url": url})
        assert ApiClient(url).list_models() == ErrorMessage("unreachable", {"url": url})


def test_a_server_that_accepts_and_says_nothing_is_unreachable_before_long(server, monkeypatch):
    monkeypatch.setattr(client, "LIST_TIMEOUT_SECONDS", 0.3)
    release = threading.Event()
    url = server(lambda handler: release.wait(30))
    assert ApiClient(url).list_models() == ErrorMessage("unreachable", {"url": url})
    release.set()


def test_an_error_within_a_stream_keeps_the_text_before_it(server):
    url = server(lambda handler: events(handler, "你", "好", end=b'data: {"error": {"message": "broke"}}\n\n'))
    streamed = answer(url).answer
    assert (streamed.text, streamed.num_deltas, streamed.error.key) == ("你好", 2, "failed")


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(server, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert answer(server(lambda handler: events(handler, "好"))).answer.text == "好"


def test_the_oldest_rounds_are_omitted_until_the_prompt_fits(server):
    seen: list[list[str]] = []

    def reply(handler) -> None:
        seen.append([message["content"] for message in handler.body["messages"]])
        if len(seen) < 3:
            error(400, "context_length_exceeded")(handler)
        else:
            events(handler, "好")

    messages = [("system", "s"), ("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b"), ("user", "3")]
    streamed = answer(server(reply), [{"role": role, "content": text} for role, text in messages]).answer
    assert seen[-1] == ["s", "3"]
    assert (streamed.text, streamed.dropped_rounds, streamed.error) == ("好", 2, None)


def test_stopping_closes_the_connection_between_two_tokens(server):
    closed = threading.Event()

    def reply(handler) -> None:
        events(handler, "好", end=b"")
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":
            closed.set()

    task = AnswerTask(ApiClient(server(reply)), [{"role": "user", "content": "q"}], REQUEST)
    wait_until(lambda: task.answer.text == "好")
    task.stop()
    assert closed.wait(60)
    assert task.done.wait(60)
    assert (task.stopped, task.answer.text, task.answer.error) == (True, "好", None)
    task.stop()  # no effect


def test_a_complete_answer_is_not_marked_as_stopped(server):
    task = answer(server(lambda handler: events(handler, "好")))
    task.stop()
    assert not task.stopped


def test_a_key_is_never_in_a_repr():
    assert "sk-" not in repr(ApiClient("http://x/v1", "sk-secret"))
    assert ApiClient("u", "sk-a").with_key(" ").key == "sk-a"
    assert ApiClient("u", "sk-a").with_key(" sk-b ").key == "sk-b"


def pieces(*calls: dict) -> Callable:
    """A stream with one event for each piece of a tool call."""

    def reply(handler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b": waiting\n\n")
        for delta in [*({"tool_calls": [call]} for call in calls), None]:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "tool_calls"}
            handler.wfile.write(f"data: {json.dumps({'id': '1', 'choices': [choice]})}\n\n".encode())
        handler.wfile.write(b"data: [DONE]\n\n")

    return reply


@pytest.mark.parametrize(
    "calls",
    [
        [  # OpenAI and vLLM: the arguments in pieces, by index
            {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"index": 0, "function": {"arguments": '{"x"'}},
            {"index": 1, "id": "b", "function": {"name": "g", "arguments": ""}},
            {"index": 0, "function": {"arguments": ": 1}"}},
            {"index": 1, "id": None, "function": {"name": None, "arguments": "{}"}},
        ],
        [  # as a whole, all with one index
            {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"index": 0, "id": "b", "function": {"name": "g", "arguments": "{}"}},
        ],
    ],
)
def test_pieces_of_a_tool_call_are_joined(calls, server):
    streamed = answer(server(pieces(*calls))).answer
    assert streamed.error is None
    assert streamed.finish_reason == "tool_calls"
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in streamed.tool_calls] == [
        ("a", "f", '{"x": 1}'), ("b", "g", "{}")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [(400, None, "This model's maximum context length is 10 tokens"), (400, "exceed_context_size_error", "too many")],
)
def test_other_servers_messages_of_a_long_prompt_are_understood(status, code, text, server):
    def reply(handler) -> None:
        body = json.dumps({"error": {"message": text, "code": code, "type": code}}).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    assert answer(server(reply)).answer.error == ErrorMessage("too_long", {"detail": text})


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:8000", "http://h:8000/v1"), ("http://h:8000/", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"), ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/v1beta", "https://h/v1beta"), ("http://h/v1/chat/completions", "http://h/v1"),
    ],
)  # fmt: skip
def test_the_base_url_is_found(given, used):
    assert base_url(given) == used


@pytest.mark.parametrize("folder", ["", "/v1"])
def test_below_another_path_the_server_is_asked(folder, server):
    def reply(handler) -> None:
        found = handler.path == f"/proxy{folder}/models"
        body = json.dumps({"data": []} if found else {}).encode()
        handler.send_response(200 if found else 404)
        handler.send_header("content-length", str(len(body)))
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(body)

    url = server(reply).removesuffix("/v1") + "/proxy"
    assert base_url(url) == url + folder
    assert answer(f"{url}/wrong").answer.error is not None


def test_an_unknown_path_is_named(server):
    def reply(handler) -> None:
        handler.send_response(404)
        handler.send_header("content-length", "0")
        handler.end_headers()

    url = server(reply)
    assert ApiClient(url).list_models() == ErrorMessage("rejected", {"detail": f"HTTP 404, {url}/models"})


@pytest.mark.parametrize("url", ["host:8000", "127.0.0.1", "ftp://h/v1", "http://", "v1"])
def test_what_is_not_a_url_is_rejected(url):
    with pytest.raises(UserError, match="is not an HTTP URL"):
        base_url(url)
