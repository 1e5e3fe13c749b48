"""Health check of a container: its GPUs can be opened and its server is ready.

`health.py [--no-server] [URL]` prints one line with the reason; exit code 0 or 1. When systemd on the host rewrites the
control groups, a container loses its GPUs for good; an API whose engine failed never serves again. Docker leaves an
unhealthy container alone: the check then terminates the first process, so that the restart policy starts it again.
"""

import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

READY = "http://127.0.0.1:8000/readyz"
ALIVE = "http://127.0.0.1:8000/healthz"
TIMEOUT_SECONDS = 4


def lost_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPU devices of this container that cannot be opened."""
    lost = []
    for device in sorted(devices.glob("nvidia[0-9]*")):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError:
            lost.append(device.name)
    return lost


def readiness_error(url: str) -> str:
    """Reason why the server at `url` is not ready; empty if it is."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS):
            return ""
    except (OSError, urllib.error.URLError) as error:
        return f"{url}: {error}"


def has_failed(url: str) -> bool:
    """Whether the API responds with 503 at `url`: only after a fatal error, not while it loads, drains or is full."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 503
    except OSError:
        return False


def terminate(reason: str) -> int:
    """Print the reason and end the container; returns the exit code."""
    print(f"{reason}, terminating this container")
    os.kill(1, signal.SIGTERM)
    return 1


def main(arguments: list[str]) -> int:
    """Print the state; returns the exit code."""
    if lost := lost_gpus():
        return terminate(f"{', '.join(lost)} cannot be opened: the host removed the GPUs")
    if "--no-server" in arguments:
        return 0
    error = readiness_error(arguments[0] if arguments else READY)
    if error and not arguments and has_failed(ALIVE):
        return terminate(f"{ALIVE}: the engine failed")
    print(error or "ready")
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
