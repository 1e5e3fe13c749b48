"""Missing permission, also for root: a mode that denies everything, in a thread that cannot override it."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

VERSION = 0x20080522  # of the kernel's interface: two words for each set of capabilities
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("thread", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _call(name: str, sets: ctypes.Array) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(_Header(VERSION, 0)), sets):
        raise OSError(ctypes.get_errno(), name)


@contextlib.contextmanager
def denied(path: Path) -> Iterator[None]:
    """Within the block this thread may neither read nor write `path`, nor enter it, if it is a folder."""
    mode = path.stat().st_mode
    sets = (_Sets * 2)()
    _call("capget", sets)
    before = sets[0].effective
    try:
        path.chmod(0)
        sets[0].effective = before & ~OVERRIDES
        _call("capset", sets)
        yield
    finally:
        sets[0].effective = before
        _call("capset", sets)
        path.chmod(mode)
