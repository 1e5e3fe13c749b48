"""Saves the KV cache of a slot to a file, and restores it, through the socket of llama.cpp's own server.

xllamacpp has no function for it. The socket is in a folder that only this user can enter, and the server answers only
to a random key that never leaves this process.
"""

import http.client
import json
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Any

SOCKET_NAME = "llama.sock"
TIMEOUT_SECONDS = 300.0


class SlotFiles:
    """The slots of one server, which write their files to `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket_folder = tempfile.TemporaryDirectory(prefix="glm-")  # mode 0700
        self._key = secrets.token_urlsafe(32)

    @property
    def socket_folder(self) -> Path:
        """The folder in which the server has to create its socket."""
        return Path(self._socket_folder.name)

    def configure(self, params: Any) -> None:
        """Set the key and the folder in the xllamacpp.CommonParams of the server."""
        params.api_keys = [self._key]
        params.slot_save_path = f"{self._folder}/"

    def save(self, slot: int, name: str) -> int:
        """Write the file `name`; returns its number of tokens.

        Raises RuntimeError, as `restore` and `erase`: llama.cpp fails.
        """
        return int(self._request(slot, "save", {"filename": name})["n_saved"])

    def restore(self, slot: int, name: str) -> None:
        """Read the file `name`; after an error of llama.cpp the slot is empty."""
        self._request(slot, "restore", {"filename": name})

    def erase(self, slot: int) -> None:
        """Empty the slot."""
        self._request(slot, "erase", {})

    def close(self) -> None:
        """Remove the socket."""
        self._socket_folder.cleanup()

    def _request(self, slot: int, action: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = _SocketFileConnection(self.socket_folder / SOCKET_NAME)
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        try:
            connection.request("POST", f"/slots/{slot}?action={action}", json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except OSError as error:
            raise RuntimeError(f"llama.cpp cannot {action} slot {slot}: {error}") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp cannot {action} slot {slot}: {content[:200]!r}")
        return dict(json.loads(content))


class _SocketFileConnection(http.client.HTTPConnection):
    def __init__(self, file: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._file = file

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(str(self._file))
