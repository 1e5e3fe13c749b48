"""Overlays that use the components which no overlay of ours has."""

from collections.abc import Callable

import pytest
import yaml
from manifest_uses import SETTINGS, USES
from manifests import OVERLAYS, composed, objects, pods


@pytest.fixture(scope="session")
def used() -> Callable[[str], list[dict]]:
    """The objects of an overlay that uses a component as its README says."""
    rendered: dict[str, list[dict]] = {}

    def render(name: str) -> list[dict]:
        if name not in rendered:
            resources, components = USES[name]
            components = [*components, *(() if "cpu-nodes" in components else ("cpu-nodes",)), "images"]
            done = composed(resources, components, SETTINGS)
            assert done.returncode == 0, done.stderr
            rendered[name] = list(yaml.safe_load_all(done.stdout))
        return rendered[name]

    return render


@pytest.fixture(scope="session")
def every(used) -> list[dict]:
    """The objects of all overlays and of all uses of components."""
    return [thing for overlay in OVERLAYS for thing in objects(overlay)] + [
        each for name in USES for each in used(name)
    ]


@pytest.fixture(scope="session")
def templates(every) -> list[tuple[str, dict]]:
    found = list(pods(every))
    assert len(found) >= 60
    return found
