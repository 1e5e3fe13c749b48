"""Memory and CPUs available to this process: those of the machine, or of its container if that is less."""

import atexit
import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
# cgroup v2 and v1: file of the limit, file of the usage, prefix of totals in memory.stat
MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
# Of GNU OpenMP, which the PyTorch wheels contain and llama.cpp uses. llama.cpp waits more often and for less time: with
# 1000 it would lose 4 to 8 % on a quiet machine, with 10000 it loses 1 to 3 %.
OPENMP_SPIN_COUNT, LLAMACPP_SPIN_COUNT = "1000", "10000"
GC_THRESHOLD = 10_000  # new objects between two collections; Python's default is 700
CPUINFO_FILE = Path("/proc/cpuinfo")
# glibc's M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX: option, value that retains freed memory, default
MALLOC_OPTIONS = ((-1, -1, 128 << 10), (-4, 0, 65536), (-8, 1, 0))


def available_memory() -> int:
    """Bytes of host memory that this process may still allocate: of the machine, or of its cgroup if that is less.

    A cgroup counts the page cache as used although it is reclaimable, including a model that was just written.
    """
    available: int = psutil.virtual_memory().available
    for level in _cgroup_levels("memory"):
        for limit, used, prefix in MEMORY_FILES:
            text = _content(level / limit)
            if text and text != "max":
                stat = dict(line.split() for line in _content(level / "memory.stat").splitlines())
                page_cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                available = min(available, max(0, int(text) - int(_content(level / used)) + page_cache))
    return available


def memory_limit() -> int | None:
    """Smallest memory limit of the cgroups of this process in bytes; None if only the machine limits it."""
    texts = [_content(level / limit) for level in _cgroup_levels("memory") for limit, _, _ in MEMORY_FILES]
    limits = [int(text) for text in texts if text and text != "max"]
    return min((limit for limit in limits if limit < psutil.virtual_memory().total), default=None)


def available_cpus() -> int:
    """CPUs that this process may use, at least 1: by its affinity, or by its cgroup's quota if that is less.

    A quota of 2.5 counts as 2: a third thread would be throttled most of the time, and the others wait for it.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for level in _cgroup_levels("cpu"):
        quota, period = (_content(level / "cpu.max") or "max").partition(" ")[::2]
        if quota == "max":  # no limit, or cgroup v1
            quota, period = _content(level / "cpu.cfs_quota_us") or "-1", _content(level / "cpu.cfs_period_us")
        if int(quota) > 0:
            count = min(count, int(quota) // int(period or 100_000))
    return max(1, count)


def cpu_flags() -> set[str]:
    """CPU features as named by Linux on x86 and Arm; empty if they are unknown."""
    if not CPUINFO_FILE.is_file():
        return set()
    lines = CPUINFO_FILE.read_text().splitlines()
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


@contextlib.contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process for its next allocation, until the block ends; no effect without glibc.

    glibc returns large blocks to the system at once. Work that allocates the same sizes repeatedly, such as every
    training step on the CPU or every tensor of a file, then waits for the kernel to zero each page again: a quarter of
    the time of training a small model and of llama.cpp's loading. One arena suffices: the others hold nothing large.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, TypeError):  # not glibc, or not Unix
        yield
        return
    for option, retaining, _ in MALLOC_OPTIONS:
        mallopt(option, retaining)
    try:
        yield
    finally:
        for option, _, default in MALLOC_OPTIONS:
            mallopt(option, default)
        libc.malloc_trim(0)


def _cgroup_levels(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of all cgroups above it: each may set a limit.

    Inside a container the topmost folder belongs to the container, while /proc may name the path on the host.
    """
    if not CGROUP_MEMBERSHIP.is_file():
        return
    for line in CGROUP_MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT  # cgroup v2 has one tree
        own = root / path.lstrip("/")
        yield from (level for level in (own, *own.parents) if level.is_relative_to(root))


def _content(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def limit_openmp_spinning(env: MutableMapping[str, str], command_line: Sequence[str] = ()) -> None:
    """Let waiting OpenMP threads sleep soon, unless the user decided otherwise; call it before torch is imported.

    A command that names a GGUF file computes in llama.cpp. By default the threads spin so long that beside other busy
    processes, or under a CPU limit, most of the time is lost.
    """
    if "OMP_WAIT_POLICY" not in env:
        uses_llamacpp = any(word.endswith(".gguf") for word in (*command_line, env.get("MODEL_PATH", "")))
        env.setdefault("GOMP_SPINCOUNT", LLAMACPP_SPIN_COUNT if uses_llamacpp else OPENMP_SPIN_COUNT)


def limit_garbage_collection() -> None:
    """Collect less often, and not at the exit of the process; call it before large libraries are imported.

    They create hundreds of thousands of objects that exist until the end. Visiting these again and again took a fifth
    of the CPU time of importing what `glm train` imports and exiting (11.1 s and 8.9 s).
    """
    gc.set_threshold(GC_THRESHOLD)
    atexit.unregister(gc.freeze)  # once, although the function may be called again
    atexit.register(gc.freeze)
