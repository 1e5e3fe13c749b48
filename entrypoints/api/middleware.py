"""Around every request: an id, a bounded body, one log line, a count. Plain ASGI, so that streams pass untouched."""

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrypoints.api import errors
from entrypoints.api.server import Serving

logger = logging.getLogger(__name__)
GIVEN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/healthz", "/readyz", "/metrics")
QUIET = ("/healthz", "/readyz", "/metrics")


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
        state = scope.setdefault("state", {})
        state["request_id"] = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        start, status = time.monotonic(), 499  # 499: the caller left before an answer began

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
            await send(message)

        try:
            limit = self.serving.options.max_body_bytes
            if int(headers.get(b"content-length", "0") or 0) > limit:
                await errors.response(413, f"the body is over {limit} bytes", code="body_too_large")(
                    scope, receive, marked
                )
            else:
                await self.app(scope, _Bounded(receive, limit), marked)
        finally:
            self._account(scope, status, time.monotonic() - start)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.serving.metrics.requests.labels(path if path in PATHS else "other", str(status)).inc()
        state = scope["state"]
        logger.log(
            logging.DEBUG if path in QUIET else logging.INFO,
            "%s %s %d in %.3f s, key %s, request %s",
            scope["method"], path, status, seconds, state.get("key", "-"), state["request_id"],
        )  # fmt: skip


class BodyTooLarge(Exception):
    """More bytes came than the limit allows."""


class _Bounded:
    """`receive` that counts bytes: a body without a length header must not fill the memory."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive = receive
        self.left = limit

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                raise BodyTooLarge
        return message
