"""Server-sent events, and cancellation: the engine stops when the client disconnects, before and during the stream."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from entrypoints.api import errors
from entrypoints.api.admission import RequestRejected
from entrypoints.api.errors import ErrorReply

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 15.0  # of silence: proxies and load balancers close a connection without data after 60 s
HEARTBEAT = b": waiting\n\n"  # a comment, which clients ignore
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx must not buffer the stream
Result = TypeVar("Result")


class EventFormat(Protocol):
    """How the events of a stream are written."""

    end: str  # what follows the last event, unless it is an error

    def event(self, event: dict[str, Any], /) -> str:
        """One event."""

    def error(self, reply: ErrorReply, /) -> str:
        """The error that ends a stream."""


class DataEvents:
    """The format of completions: each event is one `data:` line."""

    end = "data: [DONE]\n\n"

    def event(self, event: dict[str, Any]) -> str:
        """One event."""
        return f"data: {json.dumps(event)}\n\n"

    def error(self, reply: ErrorReply) -> str:
        """The error that ends a stream."""
        return self.event(reply.body())


class EventStream(Response):
    """Sends each item as one event; an error becomes an event and ends the stream.

    While nothing is sent (queue, prefill, a tool call that is not complete), it sends comments. `resources` are closed
    at the end in every case; `drain_expired` ends the stream early.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        resources: ExitStack,
        drain_expired: asyncio.Event,
        event_format: EventFormat,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.events = events
        self.resources = resources
        self.drain_expired = drain_expired
        self.format = event_format
        self.last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events end or the client disconnects."""
        try:
            await run_until_disconnect(self._send_all(scope, send), receive, self.drain_expired)
        except RequestRejected as rejected:
            reply = ErrorReply(rejected.status, str(rejected), code=rejected.code)
            await _send_text(send, self.format.error(reply))
            await _send_end(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.events.aclose()
                self.resources.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        loop = asyncio.get_running_loop()
        self.last_sent = loop.time()
        heartbeat = loop.create_task(self._send_heartbeats(send))
        try:
            async for event in self.events:
                await _send_text(send, self.format.event(event))
                self.last_sent = loop.time()
        except Exception as error:
            reply = errors.from_exception(error)
            if reply.status >= 500:
                logger.exception("request %s failed while streaming", scope["state"]["request_id"])
            await _send_text(send, self.format.error(reply))
        else:
            await _send_text(send, self.format.end)
        finally:
            heartbeat.cancel()
        await _send_end(send)

    async def _send_heartbeats(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.last_sent + HEARTBEAT_SECONDS - loop.time())
            if loop.time() >= self.last_sent + HEARTBEAT_SECONDS:
                await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
                self.last_sent = loop.time()


async def run_until_disconnect(
    work: Awaitable[Result], receive: Receive, drain_expired: asyncio.Event
) -> Result | None:
    """The result of `work`; it is cancelled when the client disconnects (returns None) or the drain time ends.

    Raises RequestRejected (503) when the drain time ends.
    """
    result: Result | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def watch_drain() -> None:
            nonlocal failure
            await drain_expired.wait()
            failure = RequestRejected(503, "shutting_down", "the server shut down before the response was complete", 5)
            group.cancel_scope.cancel()

        group.start_soon(watch_client)
        group.start_soon(watch_drain)
        try:
            result = await work
        except Exception as error:  # noqa: BLE001 - raised below, outside the group, which would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def _send_text(send: Send, text: str) -> None:
    """Send an event. `text` is ASCII, because some clients also split lines at U+2028 and U+0085."""
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _send_end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
