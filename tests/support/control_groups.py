"""A real cgroup with a memory limit, for processes of a test; needs root, so tests often skip."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrypoints.hardware import resources


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[list[str]]:
    """Prefix of a command line, which then runs with `limit` bytes; skips if no cgroup can be created."""
    cgroup, file = _cgroup_and_limit_file()
    try:
        cgroup.mkdir()
        (cgroup / file).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        pytest.skip(f"cannot create a cgroup with a memory limit on this machine ({error})")
    try:
        yield ["sh", "-c", f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"', "sh"]
    finally:
        cgroup.rmdir()


def _cgroup_and_limit_file() -> tuple[Path, str]:
    """A cgroup beside or below that of this process, v1 or v2."""
    name = f"glm-test-{os.getpid()}"
    v1 = resources.CGROUP_ROOT / "memory"
    if v1.is_dir():
        own = next((line.split(":", 2)[2] for line in _memberships() if ":memory:" in line), "/")
        parent = v1 / own.lstrip("/")
        return (parent if parent.is_dir() else v1) / name, "memory.limit_in_bytes"
    return resources.CGROUP_ROOT / name, "memory.max"


def _memberships() -> list[str]:
    return resources.CGROUP_MEMBERSHIP.read_text().splitlines() if resources.CGROUP_MEMBERSHIP.is_file() else []
