"""One control plane for all tests of this folder."""

from collections.abc import Iterator

import pytest
from control_plane import Cluster, control_plane, program_folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Kubernetes control plane with six nodes."""
    folder = tmp_path_factory.mktemp("cluster")
    with control_plane(folder, program_folder(folder / "programs")) as running:
        yield running
