"""Containers of the images, each removed at the end, and a model store for them."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from containers import IMAGES, connected, image_of
from docker.models.containers import Container
from docker.models.images import Image

from entrypoints.checkpoint.conversion import convert_to_native
from entrypoints.checkpoint.gguf_writing import write_gguf
from entrypoints.prompt import PromptFormat


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the Docker engine."""
    client = connected(300)
    yield client
    client.close()


@pytest.fixture(params=IMAGES)
def image(engine: docker.DockerClient, request: pytest.FixtureRequest) -> Image:
    """Each image in turn."""
    return image_of(engine, request.param)


@pytest.fixture
def start(engine: docker.DockerClient) -> Iterator[Callable[..., Container]]:
    """Start a container in the background; all are removed at the end, whatever happens."""
    started: list[Container] = []

    def begin(name: str, *words: str, **options) -> Container:
        started.append(engine.containers.run(image_of(engine, name), list(words), detach=True, **options))
        return started[-1]

    yield begin
    for container in started:
        container.remove(force=True, v=True)


@pytest.fixture
def finish(start: Callable[..., Container]) -> Callable[..., tuple[int, str]]:
    """Run a container to its end; its exit code and all it printed."""

    def run(name: str, *words: str, seconds: int = 240, **options) -> tuple[int, str]:
        container = start(name, *words, **options)
        code = container.wait(timeout=seconds)["StatusCode"]
        return code, container.logs().decode()

    return run


@pytest.fixture(scope="session")
def models(toy_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store that any user may read: the toy as a folder and as one file."""
    folder = tmp_path_factory.mktemp("models")
    convert_to_native(toy_original, folder / "toy", PromptFormat())
    write_gguf(folder / "toy", folder / "toy-q4_0.gguf", "q4_0")
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder
