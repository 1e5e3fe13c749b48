"""Server processes of tests, terminated by process id."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from entrypoints.settings import Settings

SUPPORT = Path(__file__).parent
SETTING_NAMES = {f.name.upper() for f in fields(Settings)}  # not inherited: each test sets what it needs
PAGE_KEY = "sk-page"
SLOW_KEYS = {"gradio": "sk-slow-gradio", "streamlit": "sk-slow-streamlit"}  # limited to one request per minute


def ports() -> Iterator[int]:
    """The ports of this pytest-xdist worker, below the kernel's ephemeral range, in an order that no seed determines.

    Training in the test process seeds `random`, on each worker with the same number. Two workers that then draw the
    same port within the seconds that a server needs to start both take the first server for their own.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    own = range(20_000 + worker, 32_000, workers)
    return itertools.cycle(random.SystemRandom().sample(own, len(own)))


PORTS = ports()


def free_port() -> int:
    """A free port that neither an outgoing connection nor another worker takes before the server listens on it."""
    return next(filter(is_free, PORTS))


def is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Process:
    """One Python process; its output goes to the file `log`."""

    def __init__(self, command: list[object], log: Path, **environment: str) -> None:
        self.log = log
        clean = {name: value for name, value in os.environ.items() if name not in SETTING_NAMES}
        with log.open("ab") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=stream,
                stderr=stream,
                env={**clean, **environment},
                cwd=log.parent,
            )

    def wait_for(self, url: str, seconds: float = 120) -> None:
        """Wait for any HTTP response; raises AssertionError when the process exits or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.popen.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no response from {url}\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        """Send the signal and wait; returns the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal_number)
            try:
                self.popen.wait(60)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait()


def glm(*arguments: object) -> list[object]:
    """Arguments of Python that run the command `glm`."""
    return ["-m", "entrypoints", *arguments]
