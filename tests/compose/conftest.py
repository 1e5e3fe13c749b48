"""A Compose project for all tests of a module; it is removed at the end, also after a failure."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import browsing
import pytest
from containers import connected, image_of

from compose import Project, ports

browser, new_page = browsing.browser, browsing.new_page  # fixtures


@pytest.fixture(scope="session")
def images() -> None:
    """Skip without a Docker engine or the images that the tests start."""
    engine = connected(60)
    for name in ("infer-cpu", "infer-quantized", "train-cuda"):
        image_of(engine, name)
    engine.close()


@pytest.fixture(scope="module")
def make_project(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Project]]:
    """Projects with the same name and volumes, an empty model folder and free ports."""
    name = f"glm-test-{ports()['API_PORT']}"
    folders = tmp_path_factory.mktemp("folders")
    folders.chmod(0o755)  # pytest creates folders that only this user can read
    environment = {**ports(), "FOLDERS_DIR": folders}
    projects: list[Project] = []

    def make(*profiles: str, **more: object) -> Project:
        projects.append(Project(name, profiles, **{**environment, **more}))
        return projects[-1]

    yield make
    if projects:
        projects[-1].remove()


@pytest.fixture
def small_models(toy_native: Path, tmp_path: Path) -> Path:
    """A folder with the untrained demo model as `tiny`, readable for everybody."""
    folder = shutil.copytree(toy_native, tmp_path / "folders" / "tiny")
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder.parent
