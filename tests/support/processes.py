"""Servers of a test as processes, ended by their own id."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path

from entrypoints.settings import Settings

SUPPORT = Path(__file__).parent
OURS = {f.name.upper() for f in fields(Settings)}  # a test says itself what is set
PAGE_KEY = "sk-page"
SLOW_KEYS = {"gradio": "sk-slow-gradio", "streamlit": "sk-slow-streamlit"}  # may ask once a minute


def free_port() -> int:
    """A port nobody has; below those that the kernel lends to connections, one of which might take it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Process:
    """One command; its output goes into `log`."""

    def __init__(self, command: list[object], log: Path, **environment: str) -> None:
        self.log = log
        clean = {name: value for name, value in os.environ.items() if name not in OURS}
        with log.open("ab") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=stream,
                stderr=stream,
                env={**clean, **environment},
                cwd=log.parent,
            )

    def wait_for(self, url: str, seconds: float = 120) -> None:
        """Until the address answers, whatever it says; AssertionError if the process ends or the time does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.popen.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no answer from {url}\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self, how: int = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
            try:
                self.popen.wait(60)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        return self.popen.wait()


def glm(*words: object) -> list[object]:
    return ["-m", "entrypoints", *words]
