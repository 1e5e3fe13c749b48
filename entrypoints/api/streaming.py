"""Server-sent events that stop the model when the caller leaves, whether text is flowing or not."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from entrypoints.api import errors

logger = logging.getLogger(__name__)
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx must not collect the pieces


class EventStream(Response):
    """Sends each item as one `data:` line, then `[DONE]`; an error becomes an event and ends the stream.

    `held` is closed at the end, whatever the end was.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict], held: ExitStack) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.events = events
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events end or the caller leaves."""
        try:
            await _until_gone(self._send_all(scope, send), receive)
        finally:
            with anyio.CancelScope(shield=True):
                await self.events.aclose()
                self.held.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await _send_text(send, json.dumps(event, ensure_ascii=False))
        except Exception:
            logger.exception("request %s failed while streaming", scope["state"]["request_id"])
            await _send_text(send, json.dumps(errors.body(500, "the engine failed", code="engine_error")))
        else:
            await _send_text(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the caller leaves; None then."""
    return await _until_gone(work, request.receive)


async def _until_gone(work: Awaitable[Any], receive: Receive) -> Any:
    result, failure = None, None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result = await work
        except Exception as error:  # noqa: BLE001 - raised below, outside the group, which would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def _send_text(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
