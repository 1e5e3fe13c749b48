"""Calls an ASGI application without a socket: fast, and the caller's leaving can be timed to the byte."""

import asyncio
import atexit
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message

JSON = {"content-type": "application/json"}


@dataclass
class Reply:
    """What came back; `chunks` are the pieces of the body as they were sent."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    finished: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> dict:
        return json.loads(self.body)

    def error(self) -> dict:
        """The error object; asserts OpenAI's shape."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error

    def events(self) -> list[dict]:
        """Data of all events but the last, which must be [DONE]."""
        *events, last = data_lines(self.body)
        assert last == "[DONE]"
        return [json.loads(event) for event in events]


def data_lines(body: bytes) -> list[str]:
    """The data of a stream of events; asserts that each event is one `data:` line and a blank line."""
    assert body.endswith(b"\n\n"), body[-80:]
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and len(event.splitlines()) == 1 for event in events), events
    return [event.removeprefix("data: ") for event in events]


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    content: dict | list | bytes | Sequence[bytes] | None = None,
    headers: dict[str, str] | None = None,
    leave: Callable[[Reply], bool] | None = None,
) -> Reply:
    """One request. `content`: JSON, bytes, or a tuple of chunks without a length. `leave`: hang up once it holds."""
    given = {name.lower(): value for name, value in {**JSON, **(headers or {})}.items()}
    if isinstance(content, tuple):
        chunks = list(content)
    else:
        chunks = [content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()]
        given.setdefault("content-length", str(len(chunks[0])))
    reply, left = Reply(), asyncio.Event()

    async def receive() -> Message:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.chunks.append(message.get("body", b""))
            reply.finished = not message.get("more_body", False)
        await asyncio.sleep(0)
        if reply.finished or (leave and leave(reply)):
            left.set()

    async def watch() -> None:
        while not leave(reply):
            await asyncio.sleep(0.002)
        left.set()

    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    watcher = asyncio.create_task(watch()) if leave else None
    try:
        await app(scope, receive, send)
    finally:
        if watcher:
            watcher.cancel()
    return reply


_runner = asyncio.Runner()  # one event loop for all: a server belongs to its own
atexit.register(_runner.close)


def run(work: Coroutine) -> object:
    """The result of a coroutine, on the loop that `ask` uses too."""
    return _runner.run(work)


def ask(app: ASGIApp, method: str, path: str, content: object = None, **more: object) -> Reply:
    """`call` from a test that is not asynchronous."""
    return run(call(app, method, path, content, **more))
