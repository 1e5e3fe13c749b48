"""What this process may use of its machine: memory and processors, inside a container that container's share."""

import os
from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes of host memory that this process may still take: the machine's, or its control group's if that is less.

    A control group counts files that were read or written as used, though they give way: a model just made is one.
    """
    available = psutil.virtual_memory().available
    for limit, used, detail, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        text = _content(limit)
        if text and text != "max":
            counts = dict(line.split() for line in _content(detail).splitlines())
            files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            available = min(available, max(0, int(text) - int(_content(used)) + files))
    return available


def available_cpus() -> int:
    """Processors that this process may use, at least 1: those it may run on, or its control group's quota if less.

    A quota of 2.5 counts as 2: a third thread would spend most of its time stopped, and the others wait for it.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_content("cpu.max") or "max").partition(" ")[::2]
    if quota == "max":  # no limit, or the older kind of control group
        quota, period = _content("cpu/cpu.cfs_quota_us") or "-1", _content("cpu/cpu.cfs_period_us") or "100000"
    if int(quota) > 0:
        count = min(count, int(quota) // int(period))
    return max(1, count)


def _content(name: str) -> str:
    file = CONTROL_GROUP / name
    return file.read_text().strip() if file.is_file() else ""
