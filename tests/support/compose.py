"""`docker compose` on this repository with a separate project, isolated from the developer's environment."""

import functools
import json
import os
import re
import shutil
import subprocess
from typing import Any

from containers import REPOSITORY, skip_or_fail
from processes import free_port

PROFILES = (
    "cpu", "gpu", "gpu-int4", "embeddings", "train", "train-multi", "train-node", "eval", "backup", "monitoring",
    "proxy",
)  # fmt: skip
PORTS = ("API_PORT", "EMBEDDINGS_PORT", "WEB_PORT", "WEB_STREAMLIT_PORT", "WEB_TRAINING_PORT")
FILES = sorted([REPOSITORY / "compose.yaml", *(REPOSITORY / "compose").glob("*.yaml")])
VARIABLE = re.compile(r"\$\{([A-Z_]+)")
BUILD_ARGUMENTS = ("BASE_IMAGE", "PIP_INDEX_URL", "TORCH_INDEX", "TORCH_FLAVOR", "DEBIAN_MIRROR")
KEPT = {"PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT"}


def variables() -> set[str]:
    """All variables that the Compose files read from .env: interpolated, or passed to a build."""
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    interpolated = {name for text in texts for name in VARIABLE.findall(text)}
    passed = re.compile(rf"\b({'|'.join(BUILD_ARGUMENTS)})\b")
    return interpolated | {name for text in texts for name in passed.findall(text)}


@functools.cache
def has_compose() -> bool:
    """Is the docker client with its compose plugin installed?"""
    command = ["docker", "compose", "version"]
    return bool(shutil.which("docker")) and not subprocess.run(command, capture_output=True).returncode


class Project:
    """One Compose project; `environment` has the values that a user would write into .env."""

    def __init__(self, name: str, profiles: tuple[str, ...] = (), **environment: object) -> None:
        if not has_compose():
            skip_or_fail("engine", "the docker client with its compose plugin is not installed")
        self.name = name
        self.profiles = profiles
        self.environment = {key: str(value) for key, value in environment.items()}

    def compose(self, *arguments: str, check: bool = True, seconds: int = 280) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENTS`; fails the test on a nonzero exit code unless `check` is false."""
        flags = [flag for profile in self.profiles for flag in ("--profile", profile)]
        kept = {key: value for key, value in os.environ.items() if key in KEPT}
        done = subprocess.run(
            ["docker", "compose", "--env-file", "/dev/null", "-p", self.name, *flags, *arguments],
            cwd=REPOSITORY,
            env={**kept, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def config(self) -> dict[str, Any]:
        """The configuration that Compose computes from the files."""
        config: dict[str, Any] = json.loads(self.compose("config", "--format", "json").stdout)
        return config

    def logs(self, *services: str) -> str:
        output = self.compose("logs", "--no-color", "--no-log-prefix", *services, check=False).stdout
        return output.replace(
            "\x1b[2K", ""
        )  # Compose 2.26 writes this escape before each line, even without a terminal

    def exit_code(self, service: str) -> int:
        listed = self.compose("ps", "--all", "--format", "json", service).stdout.splitlines()
        return int(json.loads(listed[0])["ExitCode"])

    def remove(self) -> None:
        """Remove everything, volumes included; never fails, so that the next test starts clean."""
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "5", "--remove-orphans", check=False)


def ports() -> dict[str, int]:
    """A free port for each published service of a project."""
    return {name: free_port() for name in PORTS}
