"""Silent connections and endless headers: `glm serve` stays available, and frees what they hold."""

import http.client
import resource
import socket
import time

import pytest
from serving_process import SCRIPTED, serving

FILES = 300


@pytest.fixture(scope="module")
def server(toy_native, tmp_path_factory):
    """A server that may open 300 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))  # inherited
    try:
        with serving([*SCRIPTED, "--model", toy_native], tmp_path_factory.mktemp("serve") / "log") as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield server.wait_ready()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def address(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def probe(server, source="127.0.0.2"):
    """Seconds until /healthz responds to another peer."""
    start = time.monotonic()
    connection = http.client.HTTPConnection(*address(server), timeout=20, source_address=(source, 0))
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    return time.monotonic() - start


def is_closed(connection, seconds):
    """Whether the server closes the connection within this time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def sent_until_closed(connection, block, pause):
    """How many blocks are sent before the server closes the connection, at most 1000."""
    for count in range(1000):
        try:
            connection.sendall(block)
        except OSError:
            return count
        time.sleep(pause)
    return 1000


@pytest.mark.slow
def test_another_peer_is_served_while_one_holds_hundreds_of_silent_connections(server):
    """320 silent connections exhausted the files of the process."""
    silent = [socket.create_connection(address(server)) for _ in range(320)]
    try:
        assert max(probe(server) for _ in range(5)) < 2
        assert all(is_closed(connection, 15) for connection in silent)
    finally:
        for connection in silent:
            connection.close()
    assert probe(server, "127.0.0.1") < 2


@pytest.mark.parametrize(
    "start", [b"GET /", b"GET / HTTP/1.1\r\na", b"GET / HTTP/1.1\r\na: ", b"GET / HTTP/1.1\r\n", b""]
)
def test_an_endless_header_is_cut_off(start, server):
    line = b"b: c\r\n" if start.endswith(b"\n") else b"xxxxxx" if start else b"\r\n"
    with socket.create_connection(address(server)) as connection:
        connection.settimeout(5)
        connection.sendall(start)
        blocks = sent_until_closed(connection, line * 10_000, 0)
        assert blocks < 1000  # what the buffers of the sockets hold
    assert probe(server) < 2


@pytest.mark.slow
def test_a_header_that_arrives_byte_by_byte_ends_at_the_timeout(server):
    start = time.monotonic()
    with socket.create_connection(address(server)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert sent_until_closed(connection, b"a", 0.5) < 40
    assert time.monotonic() - start < 15


def test_connections_are_kept_alive_between_requests(server):
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        first = connection.sock
        time.sleep(0.2)
        assert connection.sock is first
    connection.close()


def test_idle_connections_make_room_for_new_ones(server):
    """The server may hold 108 connections, 81 of one peer."""
    idle = []
    try:
        for _ in range(120):
            connection = http.client.HTTPConnection(*address(server), timeout=20)
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
            idle.append(connection)
        assert is_closed(idle[0].sock, 5)
        idle[-1].request("GET", "/healthz")
        assert idle[-1].getresponse().status == 200
    finally:
        for connection in idle:
            connection.close()


def test_a_large_valid_body_is_accepted(server):
    text = "x" * 2_000_000
    status = server.request("POST", "/tokenize", {"prompt": text[:100_000]})[0]
    assert status == 200
