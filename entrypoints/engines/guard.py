"""Ends the processes that this one started should it be killed: others would keep their memory, on the GPU too.

A container does that by itself. Run as a program, this file waits beside the process that it guards.
"""

import contextlib
import os
import select
import subprocess
import sys

import psutil

INTERVAL_SECONDS = 2  # how soon a process that was started is known to the guard


class Guard:
    """Watches over this process from now on; `dismiss` it when what was started has ended well."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,  # closed by the system, however this process ends
            start_new_session=True,  # Ctrl-C is not for it
        )

    def dismiss(self) -> None:
        """Let it go; a second call does nothing."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.communicate(b"well")


def watch(guarded: psutil.Process) -> None:
    """Wait for a word or the end of stdin; after an end without a word, kill all that the guarded process started."""
    started: list[psutil.Process] = []
    while not select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
        with contextlib.suppress(psutil.Error):
            started = [child for child in guarded.children(recursive=True) if _is_to_end(child)] or started
    if os.read(sys.stdin.fileno(), 1):
        return
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()  # unless its number belongs to another process now


def _is_to_end(child: psutil.Process) -> bool:
    """Not a guard, and not Python's own tracker: that removes shared memory, and then ends."""
    line = " ".join(child.cmdline())
    return "resource_tracker" not in line and __file__ not in line


if __name__ == "__main__":
    watch(psutil.Process(int(sys.argv[1])))
