"""`docker compose` over this repository, with a project of its own and nothing of the developer's environment."""

import json
import os
import re
import shutil
import subprocess

from containers import REPOSITORY, missing
from processes import free_port

PROFILES = ("cpu", "gpu", "gpu-int4", "train", "train-multi", "eval", "monitoring", "proxy")
PORTS = ("API_PORT", "WEB_PORT", "WEB_STREAMLIT_PORT", "WEB_TRAINING_PORT")
FILES = sorted([REPOSITORY / "compose.yaml", *(REPOSITORY / "compose").glob("*.yaml")])
VARIABLE = re.compile(r"\$\{([A-Z_]+)")
KEPT = {"PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT"}


def variables() -> set[str]:
    """All that the Compose files take from .env, named or handed to a build."""
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    named = {name for text in texts for name in VARIABLE.findall(text)}
    handed = re.compile(r"\b(BASE_IMAGE|PIP_INDEX_URL|TORCH_INDEX|TORCH_FLAVOUR|LLAMACPP_CPU|DEBIAN_MIRROR)\b")
    built = {name for text in texts for name in handed.findall(text)}
    return named | built


class Project:
    """One Compose project; `environment` is what a user would write into .env."""

    def __init__(self, name: str, profiles: tuple[str, ...] = (), **environment: object) -> None:
        if (
            not shutil.which("docker")
            or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        ):
            missing("engine", "no docker client with its compose plugin")
        self.name = name
        self.profiles = profiles
        self.environment = {key: str(value) for key, value in environment.items()}

    def compose(self, *words: str, check: bool = True, seconds: int = 280) -> subprocess.CompletedProcess:
        flags = [flag for profile in self.profiles for flag in ("--profile", profile)]
        kept = {key: value for key, value in os.environ.items() if key in KEPT}
        done = subprocess.run(
            ["docker", "compose", "--env-file", "/dev/null", "-p", self.name, *flags, *words],
            cwd=REPOSITORY,
            env={**kept, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def config(self) -> dict:
        """What Compose makes of the files."""
        return json.loads(self.compose("config", "--format", "json").stdout)

    def logs(self, *services: str) -> str:
        said = self.compose("logs", "--no-color", "--no-log-prefix", *services, check=False).stdout
        return said.replace("\x1b[2K", "")  # Compose 2.26 clears a line before each, on a terminal or not

    def exit_code(self, service: str) -> int:
        listed = self.compose("ps", "--all", "--format", "json", service).stdout.splitlines()
        return json.loads(listed[0])["ExitCode"]

    def remove(self) -> None:
        """All of it, volumes too; never fails, so that the next test starts clean."""
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "5", "--remove-orphans", check=False)


def ports() -> dict[str, int]:
    """Free ports for the services of a project."""
    return {name: free_port() for name in PORTS}
