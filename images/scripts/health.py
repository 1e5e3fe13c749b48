"""Health check of a container: the GPUs it was given answer, and its server is ready.

`health.py [--no-server] [URL]`; exit code 0 or 1, one line that says why. A container loses its GPUs when the host's
systemd rewrites the control groups, and never gets them back: then the first process is told to end, so that the
restart policy starts the container anew.
"""

import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

READY = "http://127.0.0.1:8000/readyz"
TIMEOUT_SECONDS = 4


def lost_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPU devices in this container that can no longer be opened."""
    lost = []
    for device in sorted(devices.glob("nvidia[0-9]*")):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError:
            lost.append(device.name)
    return lost


def not_ready(url: str) -> str:
    """Why the server at `url` takes no requests; empty when it does."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS):
            return ""
    except (OSError, urllib.error.URLError) as error:
        return f"{url}: {error}"


def main(words: list[str]) -> int:
    """Print why the container is not well; returns the exit code."""
    if lost := lost_gpus():
        print(f"{', '.join(lost)} can no longer be opened: the host took the GPUs away, this container ends")
        os.kill(1, signal.SIGTERM)
        return 1
    if "--no-server" in words:
        return 0
    why = not_ready(words[0] if words else READY)
    print(why or "ready")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
