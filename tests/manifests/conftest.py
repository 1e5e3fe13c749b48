"""Renderings of the components that no overlay uses."""

from collections.abc import Callable

import pytest
from manifest_uses import SETTINGS, STORAGE, USES
from manifests import OVERLAYS, objects, parse, pods, render


@pytest.fixture(scope="session")
def used() -> Callable[[str], list[dict]]:
    """The objects of an example overlay with the component (manifest_uses)."""
    rendered: dict[str, list[dict]] = {}

    def render_use(name: str) -> list[dict]:
        if name not in rendered:
            resources, components = USES[name]
            components = [*components, *(() if "cpu-nodes" in components else ("cpu-nodes",)), "images"]
            done = render([*STORAGE, *resources], components, SETTINGS)
            assert done.returncode == 0, done.stderr
            rendered[name] = parse(done.stdout)
        return rendered[name]

    return render_use


@pytest.fixture(scope="session")
def every(used) -> list[dict]:
    """The objects of all overlays and of all example overlays."""
    from_overlays = [manifest for overlay in OVERLAYS for manifest in objects(overlay)]
    return from_overlays + [manifest for name in USES for manifest in used(name)]


@pytest.fixture(scope="session")
def templates(every) -> list[tuple[str, dict]]:
    found = list(pods(every))
    assert len(found) >= 60
    return found
