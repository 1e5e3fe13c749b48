"""The images in a real engine: names, confinement, and what a missing engine or image means to a test.

REQUIRE_IMAGES="infer-cpu ..." turns those skips into failures: CI must not pass by leaving them out.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import docker
import pytest
from docker.models.images import Image

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = ("infer-cpu", "infer-cuda", "infer-quantized", "train-cuda")
REQUIRED = os.environ.get("REQUIRE_IMAGES", "").split()
VERSION = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
# What the manifests give every container, and a user id that no passwd entry knows.
CONFINED = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "", "/home/glm": ""},
    "user": "12345:0",
    "network_mode": "none",
}


def missing(name: str, reason: str) -> None:
    """Skip, or fail where CI asked for it."""
    if name in REQUIRED or (name == "engine" and REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def connected(timeout: int) -> docker.DockerClient:
    """A client of the Docker engine; seconds."""
    # asked by the command: the client leaves its socket open where nothing listens
    if not shutil.which("docker") or subprocess.run(["docker", "version"], capture_output=True).returncode:
        missing("engine", "no Docker engine answers; .ci/docker-engine starts one on Debian")
    return docker.from_env(timeout=timeout)


def image_of(engine: docker.DockerClient, name: str) -> Image:
    """The built image."""
    try:
        return engine.images.get(f"glm-{name}:{VERSION}")
    except docker.errors.ImageNotFound:
        missing(name, f"glm-{name}:{VERSION} is not built: make image/{name}")


def wait_until(happened: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Ask again and again; raises AssertionError with `what()` when the time is over."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)
