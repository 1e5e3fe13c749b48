"""A real control group with a limit of memory, for processes of a test; needs root, so many machines have none."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrypoints.engines import machine


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[list[str]]:
    """Words to put before a command, which then runs with `limit` bytes; skips where no group can be made."""
    group, file = _place()
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a limit of memory can be made here ({error})")
    try:
        yield ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"]
    finally:
        group.rmdir()


def _place() -> tuple[Path, str]:
    """A group beside or below this process's own, of whichever kind this system has."""
    name = f"glm-test-{os.getpid()}"
    old = machine.CONTROL_GROUP / "memory"
    if old.is_dir():
        own = next((line.split(":", 2)[2] for line in _memberships() if ":memory:" in line), "/")
        parent = old / own.lstrip("/")
        return (parent if parent.is_dir() else old) / name, "memory.limit_in_bytes"
    return machine.CONTROL_GROUP / name, "memory.max"


def _memberships() -> list[str]:
    return machine.MEMBERSHIP.read_text().splitlines() if machine.MEMBERSHIP.is_file() else []
