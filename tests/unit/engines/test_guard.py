import subprocess
import sys
import time

import psutil

from entrypoints.engines.guard import INTERVAL_SECONDS

PROGRAM = """
import subprocess, sys, time
from entrypoints.engines.guard import Guard
guard = Guard()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
time.sleep({wait})
if {dismissed}:
    guard.dismiss()
    guard.dismiss()
print(child.pid, flush=True)
time.sleep(300)
"""


def killed(dismissed: bool, looks: int = 2) -> tuple[psutil.Process, list[psutil.Process]]:
    """Kill a program with a child, and a guard that had time for so many looks; the child, and all that was started."""
    source = PROGRAM.format(wait=looks * INTERVAL_SECONDS, dismissed=dismissed)
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as program:
        child = psutil.Process(int(program.stdout.readline()))
        started = psutil.Process(program.pid).children(recursive=True)
        program.kill()
    return child, started


def test_what_a_killed_process_started_ends_and_the_guard_with_it():
    child, started = killed(dismissed=False, looks=5)
    assert child in started
    assert len(started) == 2
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_a_dismissed_guard_kills_nothing():
    child, started = killed(dismissed=True)
    try:
        assert started == [child]
        time.sleep(1)
        assert child.is_running()
    finally:
        child.kill()
