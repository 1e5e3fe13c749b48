"""One project of containers for all tests of a module, removed at the end whatever happens."""

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
    """The engine, and the images that the tests start."""
    engine = connected(60)
    for name in ("infer-cpu", "infer-quantized", "train-cuda"):
        image_of(engine, name)
    engine.close()


@pytest.fixture(scope="module")
def make_project(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Project]]:
    """Projects of one name, which share their volumes; with an empty folder of models and free ports."""
    name = f"glm-test-{ports()['API_PORT']}"
    folders = tmp_path_factory.mktemp("folders")
    folders.chmod(0o755)  # pytest's are for this user alone
    environment = {**ports(), "FOLDERS_DIR": folders}
    made: list[Project] = []

    def make(*profiles: str, **more: object) -> Project:
        made.append(Project(name, profiles, **{**environment, **more}))
        return made[-1]

    yield make
    if made:
        made[-1].remove()


@pytest.fixture
def small_models(toy_native: Path, tmp_path: Path) -> Path:
    """A folder with the untrained toy as `toy`, which anybody may read."""
    folder = shutil.copytree(toy_native, tmp_path / "folders" / "toy")
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder.parent
