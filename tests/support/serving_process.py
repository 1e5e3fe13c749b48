"""A real server in its own process, and plain sockets to talk to it: a test sees what a client sees."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

GLM = (sys.executable, "-m", "entrypoints")
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_server.py")))
LISTENING = re.compile(r"listening on http://\S+:(\d+)")


class Server:
    """`glm serve ...` on a free port; `log` is its stderr so far.

    It runs on one CPU by default: two threads of a tiny model wait for each other when another process needs a CPU.
    """

    def __init__(
        self, argv: Sequence[str | Path], log: Path, env: dict[str, str] | None = None, one_cpu: bool = True
    ) -> None:
        self._log = log
        clean = {name: value for name, value in os.environ.items() if name not in ("API_KEY", "API_KEYS_FILE")}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**clean, "LOG_LEVEL": "info", **(env or {})},
                preexec_fn=pin_to_one_cpu if one_cpu else None,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def port(self) -> int:
        """The port it listens on; waits until it listens."""
        return int(self.wait_for(LISTENING)[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern: str | re.Pattern, seconds: float = 120) -> re.Match:
        """The first match in its log; raises AssertionError if the process exits or the time is over before."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None, f"the server exited with {self.process.returncode}: {self.log}"
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return found

    def wait_ready(self, seconds: float = 180) -> "Server":
        """Return when /readyz returns 200."""
        deadline = time.monotonic() + seconds
        while self.request("GET", "/readyz")[0] != 200:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        return self

    def request(
        self, method: str, path: str, body: object = None, headers: dict | None = None, seconds: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of one request on a new connection."""
        with contextlib.closing(self.connect(seconds)) as connection:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def post(self, path: str, body: object, headers: dict | None = None) -> dict:
        """The JSON of a response, whatever its status."""
        return json.loads(self.request("POST", path, body, headers)[2])

    def connect(self, seconds: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def send_and_disconnect(self, path: str, body: dict, seconds: float) -> None:
        """Send a request and disconnect after `seconds` without reading a byte."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
            time.sleep(seconds)

    @contextlib.contextmanager
    def stream(self, path: str, body: dict, headers: dict | None = None) -> Iterator[http.client.HTTPResponse]:
        """A response that is still streaming; leaving the context disconnects."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(
                "POST", path, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
            )
            yield connection.getresponse()

    def metric(self, line: str) -> float:
        """Value of one line of /metrics; 0 if it is missing."""
        text = self.request("GET", "/metrics")[2].decode()
        return next((float(row.split()[-1]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 90) -> int:
        """Exit code."""
        return self.process.wait(seconds)


def pin_to_one_cpu() -> None:
    """Pin this process to the last CPU that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@contextlib.contextmanager
def serving(
    argv: Sequence[str | Path], log: Path, env: dict[str, str] | None = None, one_cpu: bool = True
) -> Iterator[Server]:
    """A server that is stopped afterwards in every case."""
    server = Server([*argv, *(() if "--port" in argv else ("--port", "0"))], log, env, one_cpu)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()
