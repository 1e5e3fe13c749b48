"""Bodies that are large and invalid cost little time and memory, and /healthz responds meanwhile.

Times are seconds of computing in this process, which does all the work, so that other processes do not count.
"""

import asyncio
import json
import threading
import time
import tracemalloc

import pytest
from asgi import run, send, send_async

from entrypoints.api import request_body
from entrypoints.api.auth import KeyRing

HELLO = {"role": "user", "content": "say x"}
BODIES = {
    "token ids": ("/v1/completions", {"prompt": [-1] * 249_000}),
    "lists of token ids": ("/v1/completions", {"prompt": [[-1] * 10] * 22_000}),
    "texts": ("/v1/completions", {"prompt": [""] + [1] * 249_000}),
    "unknown fields": ("/v1/completions", {"prompt": "x", **{f"f{number}": 1 for number in range(99_000)}}),
    "messages": ("/v1/chat/completions", {"messages": [{"role": 1}] * 49_000}),
    "parts": ("/v1/chat/completions", {"messages": [{**HELLO, "content": [{"a": 1}] * 49_000}]}),
    "tool calls": ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{}] * 99_000}]}),
    "tools": ("/v1/chat/completions", {"messages": [HELLO], "tools": [{}] * 99_000}),
    "stop strings": ("/v1/chat/completions", {"messages": [HELLO], "stop": [""] * 249_000}),
    "texts to embed": ("/v1/embeddings", {"input": [""] + [1] * 249_000}),
    "items": ("/v1/responses", {"input": [{}] * 99_000}),
    "functions": ("/v1/responses", {"input": "x", "tools": [{}] * 99_000}),
    "messages to tokenize": ("/tokenize", {"messages": [{}] * 99_000}),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_large_invalid_body_is_rejected_at_its_first_error(name, app):
    """A list of all errors took 24 s and 2.2 GB for a prompt of 1.5 MB."""
    path, body = BODIES[name]
    content = json.dumps(body).encode()
    assert len(content) < 4 << 20
    tracemalloc.start()
    try:
        (reply, longest), (_, peak) = run(_send_while_probing(app, path, content)), tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (reply.status, len(reply.body) < 2000) == (400, True)
    assert longest < 2
    assert peak < 30 * len(content) + (50 << 20)


async def _send_while_probing(app, path, content):
    """The reply, and the longest computing time in seconds that /healthz took meanwhile."""
    attack = asyncio.create_task(send_async(app, "POST", path, content))
    longest = 0.0
    while not attack.done():
        start = time.process_time()
        assert (await send_async(app, "GET", "/healthz")).status == 200
        await asyncio.sleep(0.005)
        longest = max(longest, time.process_time() - start)
    return await attack, longest


TOO_MANY = {
    "numbers": "1," * 250_000 + "1",
    "arrays": "[]," * 100_000 + "1",
    "fields": '{"a":1},' * 50_000 + "1",
    "with escaped quotes": r'"\\","[\"",' * 50_000 + "[]," * 100_000 + "1",
    "strings": '"",' * 500_000 + "1",
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_body_of_too_many_values_is_rejected_before_it_is_parsed(name, app, monkeypatch):
    """1.4 million empty arrays stopped all threads of the server for 0.4 s, a million decimals for 0.2 s."""
    with monkeypatch.context() as patch:
        patch.setattr(request_body.json, "loads", None)
        reply = send(app, "POST", "/v1/completions", f'{{"prompt": [{TOO_MANY[name]}]}}'.encode())
    assert reply.status == 400
    assert "the body has more than 250,000 values, or 100,000 objects, arrays and fields" in reply.error()["message"]


@pytest.mark.parametrize(
    "text", ["[{:," * 250_000, r"\"[\\" * 200_000, "," * 1_000_000], ids=["marks", "escapes", "commas"]
)
def test_marks_within_a_text_are_not_counted(text, app):
    reply = send(app, "POST", "/tokenize", {"prompt": text})
    assert "the body has more than" not in reply.body.decode()


def test_bodies_are_parsed_one_after_another(app, monkeypatch):
    """Two that are parsed at once keep the event loop waiting for both."""
    running, most, guard, loads = 0, 0, threading.Lock(), json.loads

    def slow_loads(text):
        nonlocal running, most
        with guard:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.05)
        with guard:
            running -= 1
        return loads(text)

    async def send_four():
        bodies = [send_async(app, "POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 1}') for _ in range(4)]
        return [reply.status for reply in await asyncio.gather(*bodies)]

    monkeypatch.setattr(request_body.json, "loads", slow_loads)
    assert run(send_four()) == [200] * 4
    assert most == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_the_body_of_a_client_without_a_key_is_not_read(path, make_app):
    chunks = tuple(b"x" for _ in range(10))
    received = []

    async def attempt():
        async def receive():
            received.append(1)
            return {"type": "http.request", "body": chunks[0], "more_body": True}

        async def ignore(message):
            statuses.append(message.get("status"))

        statuses = []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        await make_app(keys=KeyRing(single="glm-secret"))(scope, receive, ignore)
        return statuses[0]

    assert run(attempt()) == 401
    assert not received


def test_valid_prompts_of_each_kind_are_still_accepted(app):
    for prompt in ("x", ["x", "y"], [5, 6], [[5], [6, 7]]):
        assert send(app, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1}).status == 200
    for prompt in ({"a": 1}, 5, None, ["x", 5], [5, "x"], [[5], 6], []):
        reply = send(app, "POST", "/v1/completions", {"prompt": prompt})
        assert (reply.status, reply.error()["param"].split(".")[0]) == (400, "prompt")
