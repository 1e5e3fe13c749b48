"""Around every request: id, body size limit, host name, log line, metric. Pure ASGI: streams are not buffered."""

import logging
import re
import time
import uuid
from collections.abc import Iterable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrypoints.api import errors
from entrypoints.api.allowed_hosts import AllowedHosts
from entrypoints.api.errors import ApiError, ErrorReply
from entrypoints.api.state import ServerState

logger = logging.getLogger(__name__)
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
REPEATED_SLASHES = re.compile("/{2,}")
METRIC_PATHS = (  # any other path is counted as "other", so that the number of label values stays bounded
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
    "/healthz",
    "/readyz",
    "/metrics",
)
HEALTH_PATHS = ("/healthz", "/readyz")
PROBE_PATHS = (*HEALTH_PATHS, "/metrics")  # logged at level debug
STATUS_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnects before the response starts


class RequestContextMiddleware:
    """Sets the request id (the client's X-Request-ID if it is valid), limits the body, logs and counts the request."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _normalized(scope)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = self._start(scope, headers.get(b"x-request-id", ""))
        start, status = time.monotonic(), None

        async def send_with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            body = BodySizeLimit(receive, self.state.options.max_body_bytes)
            if headers.get(b"content-length", "").isdigit():
                body.check(int(headers[b"content-length"]))
            await self.app(scope, body, send_with_request_id)
        except Exception as error:
            if status:
                raise  # the server closes the connection, which shows the client that the response is incomplete
            reply = errors.from_exception(error)
            if reply.status >= 500:
                logger.exception("request %s failed", request_id)
            await reply.response()(scope, receive, send_with_request_id)
        finally:
            self._record(scope, status or STATUS_CLIENT_CLOSED_REQUEST, time.monotonic() - start)

    def _start(self, scope: Scope, given_id: str) -> str:
        """Set up the scope; the request id."""
        if self.state.options.root_path:  # routes match with and without it: some proxies strip it, others do not
            scope["root_path"] = self.state.options.root_path
        request_id = given_id if REQUEST_ID_PATTERN.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        return request_id

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log a finished request."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.state.metrics.requests.labels(path if path in METRIC_PATHS else "other", str(status)).inc()
        state = scope["state"]
        logger.log(
            logging.DEBUG if path in PROBE_PATHS else logging.INFO,
            "%s %s %d in %.3f s, key %s, request %s",
            scope["method"], quote(path), status, seconds, state.get("key", "-"), state["request_id"],
        )  # fmt: skip


def _normalized(scope: Scope) -> Scope:
    """The scope with one slash where a client sent several, none at the end, and GET for HEAD.

    Clients join base URLs and paths with too many slashes. HEAD is what some load balancers probe with: the response is
    that of GET, and uvicorn omits its body.
    """
    path = REPEATED_SLASHES.sub("/", scope["path"])
    path = path.rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": quote(path).encode(), "method": method}


class BodySizeLimit:
    """A `receive` that counts bytes: a body without Content-Length is limited too."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.receive = receive
        self.max_bytes = max_bytes
        self.received_bytes = 0

    async def __call__(self) -> Message:
        """The next message; raises ApiError 413 above the limit."""
        message = await self.receive()
        if message["type"] == "http.request":
            self.received_bytes += len(message.get("body", b""))
            self.check(self.received_bytes)
        return message

    def check(self, size: int) -> None:
        """Raises ApiError 413 above the limit."""
        if size > self.max_bytes:
            raise ApiError(413, f"the request body exceeds {self.max_bytes} bytes", code="body_too_large")


class AllowedHostsMiddleware:
    """Rejects requests with a foreign name in the Host header, except health probes."""

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app = app
        self.hosts = AllowedHosts(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] not in HEALTH_PATHS:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if not self.hosts.accept(host):
                message = f"the host {host[:100]!r} is not allowed; add it with --allowed-host"
                await ErrorReply(403, message, code="host_not_allowed").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
