"""Kills the child processes of this process if it is killed; otherwise they would keep their memory, also on the GPU.

A container does the same by itself. Run as a program, this file is the watchdog process.
"""

import contextlib
import os
import select
import subprocess
import sys

import psutil

INTERVAL_SECONDS = 2  # how often the watchdog lists the child processes


class ChildWatchdog:
    """Watches this process until `dismiss` is called after its children have ended."""

    def __init__(self, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(os.getpid()), str(interval_seconds)],
            stdin=subprocess.PIPE,  # closed by the system, however this process ends
            start_new_session=True,  # Ctrl-C does not reach it
        )

    def dismiss(self) -> None:
        """End the watchdog; a second call does nothing."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.communicate(b"dismiss")


def watch(parent: psutil.Process, interval_seconds: float) -> None:
    """Wait for data or the end of stdin; at the end without data, kill the children of the parent process."""
    children: list[psutil.Process] = []
    while not select.select([sys.stdin], [], [], interval_seconds)[0]:
        with contextlib.suppress(psutil.Error):
            children = [child for child in parent.children(recursive=True) if _must_be_killed(child)] or children
    if os.read(sys.stdin.fileno(), 1):
        return
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()  # psutil checks that the process id has not been reused


def _must_be_killed(child: psutil.Process) -> bool:
    """False for a watchdog and for Python's resource tracker, which removes shared memory and then ends."""
    command = " ".join(child.cmdline())
    return "resource_tracker" not in command and __file__ not in command


if __name__ == "__main__":
    watch(psutil.Process(int(sys.argv[1])), float(sys.argv[2]))
