"""What a process may use inside a container: both kinds of control groups."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from entrypoints.engines import machine


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Write a file of the control group; the machine around it has 8 processors and 100 bytes of free memory."""
    (tmp_path / "membership").write_text("4:memory:/\n1:cpu,cpuacct:/\n0::/\n")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100, total=1000))

    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")

    return write


def test_without_a_control_group_all_is_free(group):
    assert (machine.available_cpus(), machine.available_memory()) == (8, 100)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 8)],
)
def test_a_quota_of_processors_counts_whole_ones(content, expected, group):
    group("cpu.max", content)
    assert machine.available_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("200000", 2), ("150000", 1)])
def test_the_older_kind_of_quota_counts_too(quota, expected, group):
    group("cpu/cpu.cfs_quota_us", quota)
    group("cpu/cpu.cfs_period_us", "100000")
    assert machine.available_cpus() == expected


def test_the_smallest_limit_counts_of_ones_own_group_and_those_above(group):
    """As systemd nests them, with another group beside; a group of groups has no processes of its own."""
    group("membership", "0::/user.slice/mine.scope")
    for name, memory, quota in (("user.slice", 90, 5), ("user.slice/mine.scope", 60, 3), ("other.slice", 1, 1)):
        group(f"{name}/memory.max", memory)
        group(f"{name}/memory.current", 10)
        group(f"{name}/cpu.max", f"{quota}00000 100000")
    assert (machine.available_memory(), machine.memory_limit(), machine.available_cpus()) == (50, 60, 3)
    group("user.slice/mine.scope/memory.max", "max")
    assert (machine.available_memory(), machine.memory_limit()) == (80, 90)


def test_inside_a_container_the_hosts_path_is_not_there_and_the_top_counts(group):
    group("membership", "4:memory:/docker/0123\n1:cpu,cpuacct:/docker/0123")
    group("memory/memory.limit_in_bytes", 70)
    group("memory/memory.usage_in_bytes", 10)
    group("cpu/cpu.cfs_quota_us", "200000")
    assert (machine.available_memory(), machine.memory_limit(), machine.available_cpus()) == (60, 70, 2)


@pytest.mark.parametrize("text", ["max", "9223372036854771712"])
def test_no_limit_is_none(text, group):
    """The older kind writes the largest number of whole pages."""
    group("memory.max" if text == "max" else "memory/memory.limit_in_bytes", text)
    group("memory/memory.usage_in_bytes", 10)
    assert machine.memory_limit() is None


def test_a_system_without_control_groups_has_no_limits(group, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "absent")
    assert (machine.available_memory(), machine.memory_limit(), machine.available_cpus()) == (100, None, 8)


def test_affinity_counts_before_the_quota(group, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5})
    group("cpu.max", "400000 100000")
    assert machine.available_cpus() == 2


@pytest.mark.parametrize(("limit", "expected"), [("max", 100), ("90", 50), ("30", 0), ("9000", 100)])
def test_a_limit_of_memory_counts_without_cached_files(limit, expected, group):
    group("memory.max", limit)
    group("memory.current", "60")
    group("memory.stat", "anon 40\ninactive_file 15\nactive_file 5")
    assert machine.available_memory() == expected


def test_the_older_kind_of_limit_counts_too(group):
    group("memory/memory.limit_in_bytes", "90")
    group("memory/memory.usage_in_bytes", "60")
    group("memory/memory.stat", "total_inactive_file 20\ninactive_file 7")
    assert machine.available_memory() == 50


PASSES = """
import resource, threading, torch
from entrypoints.engines.machine import freed_memory_kept
def taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(96 << 20, dtype=torch.uint8).fill_(1)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
taken()
with freed_memory_kept():
    taken()
    taken()
    thread = threading.Thread(target=taken)
    thread.start()
    thread.join()
taken()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_memory_that_is_kept_is_not_taken_from_the_system_again():
    """MiB that the system has to hand out for ten pieces of 96: each anew, or one for all, whichever thread asks."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True, check=True, env=env)
    before, first, second, thread, after = map(int, done.stdout.split())
    assert before > 900 and first < 192 and second < 96 and thread < 96 and after > 900
