"""Images and containers of a real Docker engine, and the skip when the engine or an image is missing.

REQUIRE_IMAGES="infer-cpu ..." turns that skip into a failure, so that CI cannot pass without these tests.
"""

import json
import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import docker
import pytest
from docker.models.images import Image

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "images" / "Dockerfile"
IMAGES = ("infer-cpu", "infer-cuda", "infer-quantized", "train-cuda")
REQUIRED = os.environ.get("REQUIRE_IMAGES", "").split()
VERSION: str = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
# The restrictions of the manifests, and a user id without a passwd entry.
CONFINED = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "", "/home/glm": ""},
    "user": "12345:0",
    "network_mode": "none",
}

# Printed inside a container: what the kernel lets its processes do, and the mounts in which the user can write, without
# devices: a secret that is not set is /dev/null.
PROBE = """
import json, os, stat
lines = open("/proc/1/status").read().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
points = [line.split()[1] for line in open("/proc/self/mounts")]
points = [point for point in points if not (point.startswith("/proc") or stat.S_ISCHR(os.stat(point).st_mode))]
writable = sorted({point for point in points if os.access(point, os.W_OK)})
print(json.dumps({**status, "writable": writable}))
"""
# Docker mounts both in every container; they are in memory and private.
ALWAYS_WRITABLE = {"/dev/shm", "/dev/mqueue"}


def check_restrictions(probed: str, writable: set[str]) -> None:
    """Compare the output of PROBE: no capability, no new privileges, not root, and these writable mounts only."""
    found = json.loads(probed)
    assert {name: int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
    }
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert "0" not in found["Uid"].split()
    assert {"/tmp", "/home/glm"} <= set(found["writable"]) <= writable | ALWAYS_WRITABLE


def skip_or_fail(name: str, reason: str) -> NoReturn:
    """Skip, or fail if REQUIRE_IMAGES lists the image."""
    if name in REQUIRED or (name == "engine" and REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def connected(timeout: int) -> docker.DockerClient:
    """A client of the Docker engine; `timeout` in seconds."""
    # probed with the command, because the client leaks its socket when nothing listens
    if not shutil.which("docker") or subprocess.run(["docker", "version"], capture_output=True).returncode:
        skip_or_fail("engine", "no Docker engine answers; .ci/docker-engine starts one on Debian")
    return docker.from_env(timeout=timeout)


def image_of(engine: docker.DockerClient, name: str) -> Image:
    """The built image."""
    try:
        return engine.images.get(f"glm-{name}:{VERSION}")
    except docker.errors.ImageNotFound:
        skip_or_fail(name, f"glm-{name}:{VERSION} is not built: make image/{name}")


def wait_until(condition: Callable[[], bool], seconds: float, failure: Callable[[], str]) -> None:
    """Poll until the condition holds; raises AssertionError with `failure()` after the time limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.5)
