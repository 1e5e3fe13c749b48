"""On the PYTHONPATH of a process: writes every outside host that it looks up or connects to into $OUTSIDE_FILE."""

import os
import socket
from pathlib import Path

HERE = ("127.", "::1", "localhost", "0.0.0.0")


def _note(host: object) -> None:
    host = host.decode() if isinstance(host, bytes) else str(host)
    if not host.startswith(HERE) and not host.startswith("/") and host not in ("None", ""):
        with Path(os.environ["OUTSIDE_FILE"]).open("a", encoding="utf-8") as stream:
            stream.write(f"{host}\n")


class _Socket(socket.socket):
    def connect(self, address):
        _note(address[0] if isinstance(address, tuple) else address)
        return super().connect(address)

    def connect_ex(self, address):
        _note(address[0] if isinstance(address, tuple) else address)
        return super().connect_ex(address)


def _looked_up(original):
    def lookup(host, *args, **options):
        _note(host)
        return original(host, *args, **options)

    return lookup


if "OUTSIDE_FILE" in os.environ:
    socket.getaddrinfo = _looked_up(socket.getaddrinfo)
    socket.gethostbyname = _looked_up(socket.gethostbyname)
    socket.socket = _Socket
