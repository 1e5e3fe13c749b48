"""Memory and CPUs that a process may use in a container: cgroup v1 and v2."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from entrypoints.hardware import resources
from entrypoints.hardware.resources import GC_THRESHOLD, LLAMACPP_SPIN_COUNT, OPENMP_SPIN_COUNT, limit_openmp_spinning


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Write a file of the simulated cgroup; the machine has 8 CPUs and 100 bytes of free memory."""
    (tmp_path / "membership").write_text("4:memory:/\n1:cpu,cpuacct:/\n0::/\n")
    monkeypatch.setattr(resources, "CGROUP_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(resources, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100, total=1000))

    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")

    return write


def test_without_a_cgroup_the_machine_is_the_limit(cgroup):
    assert (resources.available_cpus(), resources.available_memory()) == (8, 100)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 8)],
)
def test_a_cpu_quota_is_rounded_down(content, expected, cgroup):
    cgroup("cpu.max", content)
    assert resources.available_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("200000", 2), ("150000", 1)])
def test_the_cpu_quota_of_cgroup_v1_counts(quota, expected, cgroup):
    cgroup("cpu/cpu.cfs_quota_us", quota)
    cgroup("cpu/cpu.cfs_period_us", "100000")
    assert resources.available_cpus() == expected


def test_the_smallest_limit_of_the_own_cgroup_and_those_above_counts(cgroup):
    """As nested by systemd, with an unrelated cgroup beside."""
    cgroup("membership", "0::/user.slice/mine.scope")
    for name, memory, quota in (("user.slice", 90, 5), ("user.slice/mine.scope", 60, 3), ("other.slice", 1, 1)):
        cgroup(f"{name}/memory.max", memory)
        cgroup(f"{name}/memory.current", 10)
        cgroup(f"{name}/cpu.max", f"{quota}00000 100000")
    assert (resources.available_memory(), resources.memory_limit(), resources.available_cpus()) == (50, 60, 3)
    cgroup("user.slice/mine.scope/memory.max", "max")
    assert (resources.available_memory(), resources.memory_limit()) == (80, 90)


def test_inside_a_container_the_topmost_folder_counts_if_the_path_of_the_host_is_missing(cgroup):
    cgroup("membership", "4:memory:/docker/0123\n1:cpu,cpuacct:/docker/0123")
    cgroup("memory/memory.limit_in_bytes", 70)
    cgroup("memory/memory.usage_in_bytes", 10)
    cgroup("cpu/cpu.cfs_quota_us", "200000")
    assert (resources.available_memory(), resources.memory_limit(), resources.available_cpus()) == (60, 70, 2)


@pytest.mark.parametrize("text", ["max", "9223372036854771712"])
def test_no_limit_is_none(text, cgroup):
    """Cgroup v1 has the largest number of whole pages in place of `max`."""
    cgroup("memory.max" if text == "max" else "memory/memory.limit_in_bytes", text)
    cgroup("memory/memory.usage_in_bytes", 10)
    assert resources.memory_limit() is None


def test_a_system_without_cgroups_has_no_limits(cgroup, monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "CGROUP_MEMBERSHIP", tmp_path / "absent")
    assert (resources.available_memory(), resources.memory_limit(), resources.available_cpus()) == (100, None, 8)


def test_affinity_limits_more_than_the_quota(cgroup, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5})
    cgroup("cpu.max", "400000 100000")
    assert resources.available_cpus() == 2


@pytest.mark.parametrize(("limit", "expected"), [("max", 100), ("90", 50), ("30", 0), ("9000", 100)])
def test_a_memory_limit_does_not_count_the_page_cache_as_used(limit, expected, cgroup):
    cgroup("memory.max", limit)
    cgroup("memory.current", "60")
    cgroup("memory.stat", "anon 40\ninactive_file 15\nactive_file 5")
    assert resources.available_memory() == expected


def test_the_memory_limit_of_cgroup_v1_counts(cgroup):
    cgroup("memory/memory.limit_in_bytes", "90")
    cgroup("memory/memory.usage_in_bytes", "60")
    cgroup("memory/memory.stat", "total_inactive_file 20\ninactive_file 7")
    assert resources.available_memory() == 50


# posix_memalign, as torch allocates on the CPU; without torch, whose import leaves threads and arenas behind. Before a
# thread has freed eight blocks, glibc may keep what alignment cuts off behind each of them, so that they do not merge.
ALLOCATIONS = """
import ctypes, resource, threading
from entrypoints.hardware.resources import retain_freed_memory
libc = ctypes.CDLL(None)
block, size = ctypes.c_void_p(), ctypes.c_size_t(96 << 20)
def mebibytes_from_system():
    for number in range(12):
        if number == 8:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), size) == 0
        libc.memset(block, 1, size)
        libc.free(block)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
mebibytes_from_system()
with retain_freed_memory():
    mebibytes_from_system()
    thread = threading.Thread(target=mebibytes_from_system)
    thread.start()
    thread.join()
mebibytes_from_system()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_retained_memory_is_not_requested_from_the_system_again():
    """MiB that the kernel has to provide for four allocations of 96 MiB: all of it, or nothing, in every thread."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_", "LD_"))}
    done = subprocess.run([sys.executable, "-c", ALLOCATIONS], capture_output=True, text=True, check=True, env=env)
    before, main, thread, after = map(int, done.stdout.split())
    assert before > 360
    assert main < 96
    assert thread < 96
    assert after > 360


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, OPENMP_SPIN_COUNT),
        ({"MODEL_PATH": "/models/mine.gguf"}, LLAMACPP_SPIN_COUNT),
        ({"MODEL_PATH": "/models/mine"}, OPENMP_SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7", "MODEL_PATH": "mine.gguf"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_openmp_spins_shortly_unless_the_user_decided_otherwise(given, spins):
    env = dict(given)
    limit_openmp_spinning(env, ["serve"])
    assert env == given | ({"GOMP_SPINCOUNT": spins} if spins else {})


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "xllamacpp"])
def test_every_command_limits_the_spinning_before_it_loads_a_library(library, toy_native, toy_gguf, tmp_path):
    """The OpenMP library reads the variable when it is loaded."""
    program = (
        "import os, runpy, sys\n"
        "library, *sys.argv[1:] = sys.argv[1:]\n"
        "loaded = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == library: loaded.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try: runpy.run_module('entrypoints', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*set(loaded))\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    model = toy_native if library == "torch" else toy_gguf
    flags = ["chat", "--model", model, "--prompt", "你好", "--max-new-tokens", "1"]
    done = subprocess.run([sys.executable, "-c", program, library, *flags], capture_output=True, text=True, env=env)
    expected = OPENMP_SPIN_COUNT if library == "torch" else LLAMACPP_SPIN_COUNT
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize("limited", [True, False])
def test_a_command_visits_its_objects_rarely_and_not_at_its_exit(limited):
    program = (
        "import gc, sys\n"
        "from entrypoints.hardware.resources import limit_garbage_collection\n"
        "class Cycle:\n"
        "    def __init__(self): self.own = self\n"
        "    def __del__(self): print('collected')\n"
        f"if {limited}: limit_garbage_collection(), limit_garbage_collection()\n"
        "Cycle()\n"
        "print(gc.get_threshold()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ([f"{GC_THRESHOLD}"] if limited else ["700", "collected"])
