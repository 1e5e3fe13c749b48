"""Calls an ASGI application without a socket: fast, and a client can disconnect at an exact byte."""

import asyncio
import atexit
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message

JSON = {"content-type": "application/json"}


@dataclass
class Reply:
    """A response; `chunks` are the parts of the body as they were sent."""

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
        """Data of all events except the last, which must be [DONE]."""
        *events, last = data_lines(self.body)
        assert last == "[DONE]"
        return [json.loads(event) for event in events]


def data_lines(body: bytes) -> list[str]:
    """The data of an event stream; asserts that each event is one `data:` line and a blank line."""
    assert body.endswith(b"\n\n"), body[-80:]
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and len(event.splitlines()) == 1 for event in events), events
    return [event.removeprefix("data: ") for event in events]


@dataclass
class Client:
    """The client side of one request: sends chunks, records the reply, disconnects when `disconnect_when` holds."""

    chunks: list[bytes]
    disconnect_when: Callable[[Reply], object] | None
    reply: Reply = field(default_factory=Reply)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Message:
        if self.chunks:
            return {"type": "http.request", "body": self.chunks.pop(0), "more_body": bool(self.chunks)}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.reply.status = message["status"]
            self.reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.reply.chunks.append(message.get("body", b""))
            self.reply.finished = not message.get("more_body", False)
        await asyncio.sleep(0)
        if self.reply.finished:
            self.disconnected.set()

    async def watch(self) -> None:
        while not self.disconnect_when(self.reply):
            await asyncio.sleep(0.002)
        self.disconnected.set()


async def send_async(
    app: ASGIApp,
    method: str,
    path: str,
    content: dict | list | bytes | tuple[bytes, ...] | None = None,
    headers: dict[str, str] | None = None,
    disconnect_when: Callable[[Reply], object] | None = None,
) -> Reply:
    """One request. `content` is JSON, bytes, or a tuple of chunks, which are sent without a Content-Length."""
    given = {name.lower(): value for name, value in {**JSON, **(headers or {})}.items()}
    if isinstance(content, tuple):
        chunks = list(content)
    else:
        chunks = [content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()]
        given.setdefault("content-length", str(len(chunks[0])))
    client = Client(chunks, disconnect_when)
    watcher = asyncio.create_task(client.watch()) if disconnect_when else None
    try:
        await app(_scope(method, path, given), client.receive, client.send)
    finally:
        if watcher:
            watcher.cancel()
    return client.reply


def _scope(method: str, path: str, headers: dict[str, str]) -> dict:
    path, _, query = path.partition("?")
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip


_runner = asyncio.Runner()  # one event loop for all tests, because a server belongs to one loop
atexit.register(_runner.close)


def run(work: Coroutine) -> object:
    """The result of a coroutine, on the loop that `send` uses too."""
    return _runner.run(work)


def send(app: ASGIApp, method: str, path: str, content: object = None, **more: object) -> Reply:
    """`send_async` for a test that is not asynchronous."""
    return run(send_async(app, method, path, content, **more))
