"""A small disk for one command, in its own mount namespace: removed with the command, even if tests are killed."""

import subprocess
from pathlib import Path

import pytest

NAMESPACE = ("unshare", "--map-root-user", "--mount")


def with_small_disk(folder: Path, megabytes: int) -> list[str]:
    """Prefix of a command line, which then has the disk at `folder`; skips if mounting is not permitted."""
    mount = 'mount -t tmpfs -o "size=$0" none "$1" && shift && exec "$@"'
    prefix = [*NAMESPACE, "sh", "-c", mount, f"{megabytes}m", str(folder)]
    attempt = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if attempt.returncode:
        pytest.skip(f"cannot mount a disk on this machine ({attempt.stderr.strip()})")
    return prefix
