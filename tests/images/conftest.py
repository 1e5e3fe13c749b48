"""Fixtures that run containers of the images and remove them at the end, and a model store for them."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from containers import IMAGES, connected, image_of
from docker.models.containers import Container
from docker.models.images import Image

from entrypoints.chat_format.prompt import PromptFormat
from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.quantization.gguf_writer import write_gguf


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the Docker engine."""
    client = connected(300)
    yield client
    client.close()


@pytest.fixture(params=IMAGES)
def image(engine: docker.DockerClient, request: pytest.FixtureRequest) -> Image:
    """Each of the images."""
    return image_of(engine, request.param)


@pytest.fixture
def start(engine: docker.DockerClient) -> Iterator[Callable[..., Container]]:
    """Start a container in the background; all containers are removed at the end, also after a failure."""
    started: list[Container] = []

    def begin(name: str, *arguments: str, **options) -> Container:
        started.append(engine.containers.run(image_of(engine, name), list(arguments), detach=True, **options))
        return started[-1]

    yield begin
    for container in started:
        container.remove(force=True, v=True)


@pytest.fixture
def finish(start: Callable[..., Container]) -> Callable[..., tuple[int, str]]:
    """Run a container until it exits; returns the exit code and the output."""

    def run(name: str, *arguments: str, seconds: int = 240, **options) -> tuple[int, str]:
        container = start(name, *arguments, **options)
        code = container.wait(timeout=seconds)["StatusCode"]
        return code, container.logs().decode()

    return run


@pytest.fixture(scope="session")
def models(toy_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store that any user can read: the demo model as a folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    convert_to_native(toy_original, folder / "tiny", PromptFormat())
    write_gguf(folder / "tiny", folder / "tiny-q4_0.gguf", "q4_0")
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder
