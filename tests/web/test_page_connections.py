"""Many silent connections and WebSockets: a page stays reachable for others, and frees what they held."""

import base64
import http.client
import os
import re
import resource
import socket
import subprocess
import sys
import time

import pytest

FILES = 300  # so the page may hold 108 connections, 81 of one peer
PAGE = """
import logging
from entrypoints.web.server import PageOptions, serve

async def page(scope, receive, send):
    if scope["type"] == "lifespan":
        while (kind := (await receive())["type"]) and await send({"type": f"{kind}.complete"}) is None:
            if kind == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

logging.basicConfig(level="INFO", format="%(message)s")
serve(page, PageOptions("127.0.0.1", 0))
"""


@pytest.fixture(scope="module")
def address():
    """A page, served as all pages are, that may open 300 files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))  # inherited
    try:
        process = subprocess.Popen([sys.executable, "-c", PAGE], stderr=subprocess.PIPE, text=True, env=os.environ)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    try:
        yield "127.0.0.1", int(re.search(r":(\d+)/", process.stderr.readline())[1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def probe(address, source="127.0.0.2"):
    """/healthz responds to another peer."""
    connection = http.client.HTTPConnection(*address, timeout=60, source_address=(source, 0))
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()


def is_closed(connection):
    """Whether the page has closed the connection; what it sent before is read."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def open_websocket(address):
    """A connection with an accepted WebSocket, or one that the page closed."""
    connection = socket.create_connection(address, timeout=60)
    key = base64.b64encode(os.urandom(16)).decode()
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}")
    try:
        connection.sendall("\r\n".join(("GET / HTTP/1.1", "Host: 127.0.0.1", *upgrade, "", "")).encode())
        assert connection.recv(4096).startswith((b"HTTP/1.1 101", b""))
    except ConnectionError:
        pass
    return connection


@pytest.mark.parametrize("connect", [socket.create_connection, open_websocket], ids=["silent", "websocket"])
def test_one_peer_holds_three_quarters_of_the_connections_and_others_are_served(connect, address):
    held = [connect(address) for _ in range(120)]
    try:
        for _ in range(5):
            probe(address)
        assert sum(map(is_closed, held)) >= 120 - 81
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 60
    while True:  # the page needs a moment to see them closed
        try:
            probe(address, "127.0.0.1")
            return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline


def test_a_websocket_works_beside_the_limits(address):
    connection = open_websocket(address)
    connection.sendall(b"\x81\x82\0\0\0\0hi")  # a masked text frame
    assert connection.recv(4096) == b"\x81\x02hi"
    connection.close()
