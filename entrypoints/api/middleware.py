"""Around every request: an id, a bounded body, one log line, a count. Plain ASGI, so that streams pass untouched."""

import logging
import re
import time
import uuid
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrypoints.api import errors
from entrypoints.api.errors import ApiError
from entrypoints.api.server import Serving

logger = logging.getLogger(__name__)
GIVEN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/healthz", "/readyz", "/metrics")
QUIET = ("/healthz", "/readyz", "/metrics")
CALLER_GONE = 499  # counted for a request whose caller left before an answer began


class RequestFrame:
    """Gives each request its id (the caller's X-Request-ID if that is plain), limits its body, logs and counts it."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self.app = app
        self.serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        if self.serving.options.root_path:  # routes are found with and without it: not every proxy takes it away
            scope["root_path"] = self.serving.options.root_path
        state = scope.setdefault("state", {})
        state["request_id"] = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        start, status = time.monotonic(), None

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
            await send(message)

        try:
            bounded = _Bounded(receive, self.serving.options.max_body_bytes)
            if headers.get(b"content-length", "").isdigit():
                bounded.check(int(headers[b"content-length"]))
            await self.app(scope, bounded, marked)
        except Exception as error:
            if status:
                raise  # the server closes the connection: that is how a caller sees that the answer is not whole
            code, body = errors.of_failure(error)
            if code >= 500:
                logger.exception("request %s failed", state["request_id"])
            await JSONResponse(body, code)(scope, receive, marked)
        finally:
            self._account(scope, status or CALLER_GONE, time.monotonic() - start)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.serving.metrics.requests.labels(path if path in PATHS else "other", str(status)).inc()
        state = scope["state"]
        logger.log(
            logging.DEBUG if path in QUIET else logging.INFO,
            "%s %s %d in %.3f s, key %s, request %s",
            scope["method"], quote(path), status, seconds, state.get("key", "-"), state["request_id"],
        )  # fmt: skip


class _Bounded:
    """`receive` that counts bytes: a body without a length header must not fill the memory."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive = receive
        self.limit = limit
        self.seen = 0

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.seen += len(message.get("body", b""))
            self.check(self.seen)
        return message

    def check(self, size: int) -> None:
        """Raise ApiError 413 beyond the limit."""
        if size > self.limit:
            raise ApiError(413, f"the body is over {self.limit} bytes", code="body_too_large")
