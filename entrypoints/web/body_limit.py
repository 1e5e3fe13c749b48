"""Limits the body of a request to a page: its library reads a body into memory before it looks at it."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 32 << 20  # a document of 4 MB as JSON, and the conversations that a browser keeps, fit


class LimitedBody:
    """One request whose body is counted while it arrives, because it need not have a Content-Length.

    Above the limit the application sees a client that has disconnected, and the client gets 413.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._size = 0
        self._response_started = False

    async def pass_to(self, app: ASGIApp, scope: Scope) -> None:
        """Let the application handle the request."""
        try:
            await app(scope, self._counted, self._unless_too_large)
        except Exception:
            if not self._is_too_large:
                raise  # otherwise it is about the client that seems to have disconnected
        if self._is_too_large and not self._response_started:
            await PlainTextResponse("the request body is too large\n", 413)(scope, self._receive, self._send)

    @property
    def _is_too_large(self) -> bool:
        return self._size > MAX_BODY_BYTES

    async def _counted(self) -> Message:
        if self._is_too_large:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._size += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self._is_too_large else message

    async def _unless_too_large(self, message: Message) -> None:
        if not self._is_too_large:
            self._response_started = True
            await self._send(message)
