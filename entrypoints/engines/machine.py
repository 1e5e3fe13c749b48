"""What this process may use of its machine: memory and processors, inside a container that container's share."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# of the newer and the older kind of control group: limit, what counts against it, and how memory.stat names the whole
MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
PROCESSOR = Path("/proc/cpuinfo")
# glibc's M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX: to keep what is freed, and their defaults
MALLOC = ((-1, -1, 128 << 10), (-4, 0, 65536), (-8, 1, 0))


def available_memory() -> int:
    """Bytes of host memory that this process may still take: the machine's, or its control group's if that is less.

    A control group counts files that were read or written as used, though they give way: a model just made is one.
    """
    available = psutil.virtual_memory().available
    for level in _levels("memory"):
        for limit, used, prefix in MEMORY_FILES:
            text = _content(level / limit)
            if text and text != "max":
                counts = dict(line.split() for line in _content(level / "memory.stat").splitlines())
                files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                available = min(available, max(0, int(text) - int(_content(level / used)) + files))
    return available


def memory_limit() -> int | None:
    """Bytes that the control groups around this process let it take in all; None where the machine is the limit."""
    texts = [_content(level / limit) for level in _levels("memory") for limit, _, _ in MEMORY_FILES]
    limits = [int(text) for text in texts if text and text != "max"]
    return min((limit for limit in limits if limit < psutil.virtual_memory().total), default=None)


def available_cpus() -> int:
    """Processors that this process may use, at least 1: those it may run on, or its control group's quota if less.

    A quota of 2.5 counts as 2: a third thread would spend most of its time stopped, and the others wait for it.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for level in _levels("cpu"):
        quota, period = (_content(level / "cpu.max") or "max").partition(" ")[::2]
        if quota == "max":  # no limit, or the older kind of control group
            quota, period = _content(level / "cpu.cfs_quota_us") or "-1", _content(level / "cpu.cfs_period_us")
        if int(quota) > 0:
            count = min(count, int(quota) // int(period or 100_000))
    return max(1, count)


def processor_flags() -> set[str]:
    """What the processor can do, as Linux calls it on x86 and Arm; empty where it does not say."""
    if not PROCESSOR.is_file():
        return set()
    lines = PROCESSOR.read_text().splitlines()
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have this process keep what it frees for its next use, until the end; nothing changes where there is no glibc.

    glibc gives large pieces back to the system at once. Work that takes the same ones again and again, as each step of
    training without a GPU or each tensor of a file, then waits for the system to clear every page anew: a quarter of
    the time of a small model's training and of llama.cpp's loading. One arena, as the others hold nothing large.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, TypeError):  # not glibc; not even Unix
        yield
        return
    for option, kept, _ in MALLOC:
        mallopt(option, kept)
    try:
        yield
    finally:
        for option, _, usual in MALLOC:
            mallopt(option, usual)
        libc.malloc_trim(0)


def _levels(controller: str) -> Iterator[Path]:
    """Folders with this process's limits: those of its own control group and of each above it, as every limit counts.

    Inside a container the topmost folder is the container's; what /proc names may be its path on the host then.
    """
    if not MEMBERSHIP.is_file():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        root = CONTROL_GROUP / controller if kinds else CONTROL_GROUP  # the newer kind has all in one tree
        own = root / path.lstrip("/")
        yield from (level for level in (own, *own.parents) if level.is_relative_to(root))


def _content(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
