"""Two machines, each a network namespace of its own with one cable between them; neither sees the other's loopback."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from entrypoints.training import checkpoints

pytestmark = pytest.mark.timeout(900)
NAMES = ("glm-first", "glm-second")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Names of the two namespaces."""
    if not shutil.which("ip"):
        pytest.skip("no `ip` here (Debian: iproute2)")
    made = ip("netns", "add", NAMES[0])
    if made.returncode:
        pytest.skip(f"only root can make network namespaces ({made.stderr.strip()})")
    try:
        steps = [("netns", "add", NAMES[1])]
        steps.append(("-n", NAMES[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", NAMES[1]))
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            steps += [("-n", name, "addr", "add", f"{address}/24", "dev", "cable")]
            steps += [("-n", name, "link", "set", device, "up") for device in ("cable", "lo")]
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, (step, done.stderr)
        yield NAMES
    finally:
        for name in NAMES:
            ip("netns", "delete", name)


@pytest.fixture
def together(start, machines):
    """Start `glm train` on both; the second one knows the first by its address alone."""

    def begin(output, *words):
        place = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "cable"}
        return [
            start(
                output, "--per-device-train-batch-size", 2, *words,
                inside=("ip", "netns", "exec", name), extra=place | {"NODE_RANK": f"{number}"},
            )
            for number, name in enumerate(machines)
        ]  # fmt: skip

    return begin


def test_a_lost_machine_ends_the_run_in_words_and_both_go_on_from_the_last_checkpoint(together, wait_for, tmp_path):
    output, steady = tmp_path / "out", ("--save-steps", 1, "--lr-scheduler-type", "constant")
    first, second = together(output, *steady, "--max-steps", 2000)
    wait_for(output / "checkpoint-2" / "checkpoint.json", first)
    inside = ip("netns", "pids", NAMES[1]).stdout.split()
    assert len(inside) >= 2  # the launcher and its process
    for number in map(int, inside):
        os.kill(number, signal.SIGKILL)  # the power is cut
    out, err = first.communicate(timeout=200)
    second.communicate(timeout=60)
    assert (first.returncode, out) == (1, ""), err
    assert "glm: another process of the run went away" in err
    assert "start all of them again with --resume auto" in err
    assert "Traceback" not in err
    saved = checkpoints.to_resume("auto", output).step
    again = together(output, *steady, "--max-steps", saved + 2, "--resume", "auto")
    ends = [machine.communicate(timeout=280) for machine in again]
    assert [machine.returncode for machine in again] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{output}\n", ""]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, saved + 3))
