"""Connections: limits of their number, of the time to the end of the headers and of their size; offers of HTTP/2."""

import asyncio
import resource
from collections import Counter
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_SECONDS = 10.0  # from the connection, or the first byte of a later request, to the end of the headers
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10
MAX_CONNECTIONS = 4096
BACKLOG = 128  # connections that the event loop accepts at once
RESERVED_FILES = BACKLOG + 64  # file descriptors for what is not a counted connection
CONNECTION_HEADERS = (b"connection", b"upgrade", b"http2-settings")
FRAMING_FACTOR = 8  # chunked encoding: a chunk of one byte has five more bytes

_connections: Counter[str] = Counter()  # open connections by peer address
_idle: dict["LimitedProtocol", None] = {}  # connections between two requests, the longest idle one first


def max_connections() -> int:
    """Connections that this process may hold, at least 8; one peer may hold three quarters of them."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else files - RESERVED_FILES
    return max(8, min(MAX_CONNECTIONS, available))


class LimitedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol, with these limits. A connection that exceeds one is closed.

    An offer to upgrade to another protocol (h2c: Java's HttpClient, `curl --http2`) is ignored, as HTTP allows. The
    parser ends at such a request before its body, so the request is parsed again without the offer. WebSockets are for
    servers whose configuration has them (the pages).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._peer: str | None = None  # None: not counted
        self._header_timeout: asyncio.TimerHandle | None = None
        self._header_count = self._header_bytes = 0
        self._received_bytes = self._body_bytes = 0  # of one request, from the second block of data on

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Count the connection; if there are too many, close an idle one in its place, or itself."""
        super().connection_made(transport)
        peer = self.client[0] if self.client else ""
        limit = max_connections()
        peer_limit_reached = _connections[peer] >= limit - limit // 4
        if (peer_limit_reached or _connections.total() >= limit) and not _close_idle(
            peer if peer_limit_reached else None
        ):
            transport.abort()
            return
        self._peer = peer
        _connections[peer] += 1
        self._start_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._stop_timeout()
        self.stop_counting()
        super().connection_lost(exc)

    def stop_counting(self) -> None:
        """Free the place of this connection."""
        _idle.pop(self, None)
        if self._peer is not None:
            _connections[self._peer] -= 1
            if not _connections[self._peer]:
                del _connections[self._peer]
            self._peer = None

    def is_from(self, peer: str | None) -> bool:
        """Does the connection come from this address? None: any."""
        return self._peer is not None and peer in (None, self._peer)

    def data_received(self, data: bytes) -> None:
        """Parse the data; close the connection if it has more than a request may have besides its body."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._start_timeout()
        _idle.pop(self, None)
        self._received_bytes += len(data)
        self._parse(data)
        overhead = self._received_bytes - self._body_bytes
        if overhead > MAX_HEADER_BYTES + FRAMING_FACTOR * self._body_bytes and not self.transport.is_closing():
            self._reject("431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Count from zero for each request."""
        self._header_count = self._header_bytes = self._received_bytes = self._body_bytes = 0
        self._start_timeout()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer of a chunked body."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        if self._header_count > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            raise httptools.HttpParserError("too many headers")  # uvicorn responds with 400 and closes
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request has arrived up to its body."""
        if self.parser.should_upgrade() and not self._should_upgrade():
            return  # `_parse` continues
        self._stop_timeout()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count bytes of the body, which the application limits."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has arrived."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The connection waits for the next request."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            _idle[self] = None

    def handle_websocket_upgrade(self) -> None:
        """Hand over to the protocol of WebSockets; the connection counts until it is closed."""
        super().handle_websocket_upgrade()
        websocket = self.transport.get_protocol()
        lost = websocket.connection_lost

        def connection_lost(exc: Exception | None) -> None:
            self.stop_counting()
            lost(exc)

        websocket.connection_lost = connection_lost  # type: ignore[method-assign]

    def _parse(self, data: bytes) -> None:
        """As uvicorn's `data_received`, which drops a body that follows an offer to upgrade."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
                return
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                self.send_400_response("CONNECT is not supported.")
                return
            head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, self._headers_without_upgrade())
            self.parser = httptools.HttpRequestParser(self)
            self._parse(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _headers_without_upgrade(self) -> bytes:
        options = b",".join(value for name, value in self.headers if name == b"connection").lower().split(b",")
        kept = [option.strip() for option in options if option.strip() not in CONNECTION_HEADERS]
        headers = [(name, value) for name, value in self.headers if name not in CONNECTION_HEADERS]
        headers += [(b"connection", b", ".join(kept))] if kept else []
        return b"".join(b"%s: %s\r\n" % header for header in headers)

    def _start_timeout(self) -> None:
        if self._header_timeout is None:
            self._header_timeout = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self._reject, "408 Request Timeout")

    def _stop_timeout(self) -> None:
        if self._header_timeout is not None:
            self._header_timeout.cancel()
            self._header_timeout = None

    def _reject(self, status: str) -> None:
        """Close the connection, with a response unless another one is being sent."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
            self.transport.close()
        else:
            self.transport.abort()


def _close_idle(peer: str | None) -> bool:
    """Close the connection of this peer, or of any, that has been idle for the longest time; False if there is none."""
    longest = next((connection for connection in _idle if connection.is_from(peer)), None)
    if longest is None:
        return False
    longest.stop_counting()
    longest.transport.close()
    return True
