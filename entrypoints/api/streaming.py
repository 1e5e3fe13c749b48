"""Server-sent events that stop the model when the caller leaves, whether text is flowing or not."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from entrypoints.api import errors
from entrypoints.api.limits import Refused

logger = logging.getLogger(__name__)
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx must not collect the pieces


class EventStream(Response):
    """Sends each item as one `data:` line, then `[DONE]`; an error becomes an event and ends the stream.

    `held` is closed at the end, whatever the end was; `over` ends it early.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict], held: ExitStack, over: asyncio.Event) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.events = events
        self.held = held
        self.over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events end or nobody wants them any more."""
        try:
            await while_wanted(self._send_all(scope, send), receive, self.over)
        except Refused as refused:
            await _send_text(send, json.dumps(errors.body(refused.status, str(refused), code=refused.code)))
            await _send_end(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.events.aclose()
                self.held.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await _send_text(send, json.dumps(event))
        except Exception as error:
            status, body = errors.of_failure(error)
            if status >= 500:
                logger.exception("request %s failed while streaming", scope["state"]["request_id"])
            await _send_text(send, json.dumps(body))
        else:
            await _send_text(send, "[DONE]")
        await _send_end(send)


async def while_wanted(work: Awaitable[Any], receive: Receive, over: asyncio.Event) -> Any:
    """The result of `work`, which is cancelled when the caller leaves (None then) or the server's time is over.

    Raises Refused in the second case.
    """
    result, failure = None, None
    async with anyio.create_task_group() as group:

        async def watch_caller() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def watch_time() -> None:
            nonlocal failure
            await over.wait()
            failure = Refused(503, "shutting_down", "the server shut down before the answer was whole", 5)
            group.cancel_scope.cancel()

        group.start_soon(watch_caller)
        group.start_soon(watch_time)
        try:
            result = await work
        except Exception as error:  # noqa: BLE001 - raised below, outside the group, which would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def _send_text(send: Send, text: str) -> None:
    """`text` is ASCII: some clients break lines at U+2028 and U+0085 too, which would end a JSON text halfway."""
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


async def _send_end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
