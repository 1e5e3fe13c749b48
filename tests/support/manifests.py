"""Kubernetes manifests as a test sees them: rendered by kubectl, read as plain objects."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(folder.parent.name for folder in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(
    f"{folder.parent.relative_to(K8S / 'components')}" for folder in K8S.glob("components/**/kustomization.yaml")
)
POD_TEMPLATES = {
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "JobSet": ("spec", "replicatedJobs", 0, "template", "spec", "template"),
    "TrainingRuntime": ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template"),
}


def kubectl() -> str:
    """Its path; without one the test is skipped, and in CI it fails."""
    found = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no kubectl in PATH (or name one in KUBECTL)")
    return found


def kustomize(folder: Path) -> subprocess.CompletedProcess:
    """What `kubectl kustomize` says to a folder."""
    return subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, timeout=60)


@functools.cache
def text(overlay: str) -> str:
    """One of our overlays, rendered."""
    done = kustomize(K8S / "overlays" / overlay)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def objects(overlay: str) -> tuple[dict, ...]:
    """Its objects."""
    return tuple(yaml.safe_load_all(text(overlay)))


def composed(resources: list[str], components: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess:
    """Render an overlay that somebody else could write: bases and components of ours, and its settings."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        lead = Path(os.path.relpath(K8S, here))
        annotations = {"config.kubernetes.io/local-config": "true"}
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", "annotations": annotations}}
        (here / "settings.yaml").write_text(yaml.safe_dump(config | {"data": settings}))
        overlay = {
            "namespace": "glm-test",
            "resources": ["settings.yaml", *(f"{lead}/base/{name}" for name in resources)],
            "components": [f"{lead}/components/{name}" for name in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        return kustomize(here)


def pod_template(thing: dict) -> dict | None:
    """The template of the pods that an object makes, if it makes any."""
    path = POD_TEMPLATES.get(thing["kind"])
    if path is None:
        return None
    found = thing
    for step in path:
        found = found[step]
    return found


def pods(things: tuple[dict, ...] | list[dict]) -> Iterator[tuple[str, dict]]:
    """Kind/name and pod template of every object that makes pods."""
    for thing in things:
        template = pod_template(thing)
        if template is not None:
            yield f"{thing['kind']}/{thing['metadata']['name']}", template


def containers(template: dict) -> list[dict]:
    """Init containers first."""
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def one(things: tuple[dict, ...] | list[dict], kind: str, name: str) -> dict:
    """The object of that kind and name."""
    (found,) = (thing for thing in things if thing["kind"] == kind and thing["metadata"]["name"] == name)
    return found


def container(template: dict, name: str) -> dict:
    """The container of that name."""
    (found,) = (each for each in containers(template) if each["name"] == name)
    return found


def environment(container: dict) -> dict[str, str]:
    """The values of its variables as the kubelet fills them in: a variable sees those before it."""
    filled: dict[str, str] = {}
    for entry in container.get("env", ()):
        if "value" in entry:
            filled[entry["name"]] = expand(entry["value"], filled)
        elif "fieldRef" in entry.get("valueFrom", {}):
            filled[entry["name"]] = f"of-{entry['name'].lower()}"  # the pod's own, known when it runs
    return filled


def expand(value: str, variables: dict[str, str]) -> str:
    """$(NAME) as the kubelet reads it; an unknown name stays as it is."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: variables.get(found[1], found[0]), value)


def words(container: dict) -> list[str]:
    """Its args, filled in."""
    return [expand(word, environment(container)) for word in container["args"]]


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "": 1, "Mi": 1 << 20, "Gi": 1 << 30}
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", f"{quantity}").groups()
    return float(number) * units[unit]
