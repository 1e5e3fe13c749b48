import subprocess
import sys
import time

import psutil
import pytest

INTERVAL_SECONDS = 0.2  # shorter than the default, to save time
PROGRAM = """
import subprocess, sys, time
from entrypoints.engines.vllm.child_watchdog import ChildWatchdog
watchdog = ChildWatchdog({interval})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
time.sleep({wait})
if {dismissed}:
    watchdog.dismiss()
    watchdog.dismiss()
print(child.pid, flush=True)
time.sleep(300)
"""


def killed(dismissed: bool, wait: float) -> tuple[psutil.Process, list[psutil.Process]]:
    """Kill a program with a child and a watchdog after `wait` seconds; returns the child, and all child processes."""
    source = PROGRAM.format(interval=INTERVAL_SECONDS, wait=wait, dismissed=dismissed)
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as program:
        child = psutil.Process(int(program.stdout.readline()))
        started = psutil.Process(program.pid).children(recursive=True)
        program.kill()
    return child, started


@pytest.mark.slow
def test_the_children_of_a_killed_process_end_and_the_watchdog_with_them():
    child, started = killed(dismissed=False, wait=6)
    assert child in started
    assert len(started) == 2
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_a_dismissed_watchdog_kills_nothing():
    child, started = killed(dismissed=True, wait=1)
    try:
        assert started == [child]
        time.sleep(1)
        assert child.is_running()
    finally:
        child.kill()
