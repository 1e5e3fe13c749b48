"""A small disk for one command, in a mount namespace of its own: gone with the command, even if tests are killed."""

import subprocess
from pathlib import Path

import pytest

NAMESPACE = ("unshare", "--map-root-user", "--mount")


def with_small_disk(folder: Path, megabytes: int) -> list[str]:
    """Words to put before a command, which then finds the disk at `folder`; skips where none may be mounted."""
    mount = 'mount -t tmpfs -o "size=$0" none "$1" && shift && exec "$@"'
    words = [*NAMESPACE, "sh", "-c", mount, f"{megabytes}m", str(folder)]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here ({tried.stderr.strip()})")
    return words
