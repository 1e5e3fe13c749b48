"""Two nodes: network namespaces with a virtual cable between them; neither can reach the loopback of the other."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from compose import Project
from entrypoints.training.checkpoints import store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("glm-first", "glm-second")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *args], capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Names of the two namespaces."""
    if not shutil.which("ip"):
        pytest.skip("`ip` is not installed (Debian: iproute2)")
    added = ip("netns", "add", NAMES[0])
    if added.returncode:
        pytest.skip(f"only root can create network namespaces ({added.stderr.strip()})")
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


def test_the_service_of_compose_trains_on_two_machines_that_only_know_the_address_of_the_first(
    start, machines, wait_for, tmp_path
):
    """Its environment and command as Compose computes them, in the network of each machine, as `network_mode: host`."""
    nodes = []
    for number, machine in enumerate(machines):
        project = Project(
            "glm-test", ("train-node",),
            NODE_RANK=number, MASTER_ADDR=ADDRESSES[0], NETWORK_INTERFACE="cable", OUTPUTS_DIR=tmp_path,
        )  # fmt: skip
        service = project.config()["services"]["train-node"]
        assert service["network_mode"] == "host"
        assert "networks" not in service
        flags = service["command"][service["command"].index("--resume") :]
        assert flags == ["--resume", "auto", "--deepspeed", "zero2"]
        nodes.append(
            start(
                tmp_path / "out", *flags, "--max-steps", 2, "--per-device-train-batch-size", 2,
                inside=("ip", "netns", "exec", machine), extra=service["environment"],
            )
        )  # fmt: skip
    ends = [node.communicate(timeout=280) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{tmp_path / 'out'}\n", ""]


@pytest.fixture
def together(start, machines):
    """Start `glm train` on both; the second node knows the first only by its address."""

    def begin(output, *flags):
        variables = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "cable"}
        return [
            start(
                output, "--per-device-train-batch-size", 2, *flags,
                inside=("ip", "netns", "exec", name), extra=variables | {"NODE_RANK": f"{number}"},
            )
            for number, name in enumerate(machines)
        ]  # fmt: skip

    return begin


def test_if_a_node_fails_the_run_stops_with_an_error_message_and_both_resume_from_the_last_checkpoint(
    together, wait_for, tmp_path
):
    output = tmp_path / "out"
    steady = ("--save-steps", 1, "--save-total-limit", 50, "--lr-scheduler-type", "constant")
    first, second = together(output, *steady, "--max-steps", 2000)
    wait_for(output / "checkpoint-2" / "checkpoint.json", first)
    inside = ip("netns", "pids", NAMES[1]).stdout.split()
    assert len(inside) >= 2  # the launcher and its worker
    for number in map(int, inside):
        os.kill(number, signal.SIGKILL)  # as a power failure would
    out, err = first.communicate(timeout=200)
    second.communicate(timeout=60)
    assert (first.returncode, out) == (1, ""), err
    assert "glm: another process of the run died" in err
    assert "restart all processes with --resume auto" in err
    assert "Traceback" not in err
    saved = store.find_checkpoint("auto", output).step
    again = together(output, *steady, "--max-steps", saved + 2, "--resume", "auto")
    ends = [machine.communicate(timeout=280) for machine in again]
    assert [machine.returncode for machine in again] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{output}\n", ""]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, saved + 3))
