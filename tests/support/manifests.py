"""Kubernetes manifests, rendered by kubectl and parsed into plain objects."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(folder.parent.name for folder in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(
    f"{folder.parent.relative_to(K8S / 'components')}" for folder in K8S.glob("components/**/kustomization.yaml")
)
POD_TEMPLATES: dict[str, tuple[str | int, ...]] = {
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "JobSet": ("spec", "replicatedJobs", 0, "template", "spec", "template"),
    "TrainingRuntime": ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template"),
}


def kubectl() -> str:
    """Path of kubectl; without it the test is skipped, or fails in CI."""
    found = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "kubectl is not in PATH; install it, or set KUBECTL to its path"
        )
    return found


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `kubectl kustomize FOLDER`."""
    return subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, timeout=60)


@functools.cache
def text(overlay: str) -> str:
    """The rendered YAML of an overlay, or of its namespace and claims: OVERLAY/storage."""
    done = kustomize(K8S / "overlays" / overlay)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(text: str) -> list[Manifest]:
    """The objects of a YAML stream; the C parser is several times faster than the default."""
    return list(yaml.load_all(text, yaml.CSafeLoader))


@functools.cache
def objects(overlay: str) -> tuple[Manifest, ...]:
    """The objects of an overlay, with its namespace and claims."""
    return tuple(parse(text(f"{overlay}/storage")) + parse(text(overlay)))


def render(resources: list[str], components: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Render an overlay such as a user would write, from bases, components and settings."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        k8s = Path(os.path.relpath(K8S, here))
        annotations = {"config.kubernetes.io/local-config": "true"}
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", "annotations": annotations}}
        (here / "settings.yaml").write_text(yaml.safe_dump(config | {"data": settings}))
        overlay = {
            "namespace": "glm-test",
            "resources": ["settings.yaml", *(f"{k8s}/base/{name}" for name in resources)],
            "components": [f"{k8s}/components/{name}" for name in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        return kustomize(here)


def pod_template(manifest: Manifest) -> Manifest | None:
    """The pod template of an object that creates pods; None for other kinds."""
    path = POD_TEMPLATES.get(manifest["kind"])
    if path is None:
        return None
    template = manifest
    for step in path:
        template = template[step]  # type: ignore[index]  # a step is a key of a mapping or an index of a list
    return template


def pods(manifests: Iterable[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Kind/name and pod template of every object that creates pods."""
    for manifest in manifests:
        template = pod_template(manifest)
        if template is not None:
            yield f"{manifest['kind']}/{manifest['metadata']['name']}", template


def containers(template: Manifest) -> list[Manifest]:
    """All containers of a pod template, init containers first."""
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def one(manifests: Iterable[Manifest], kind: str, name: str) -> Manifest:
    """The only object with this kind and name."""
    (found,) = (each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def container(template: Manifest, name: str) -> Manifest:
    """The container with this name."""
    (found,) = (each for each in containers(template) if each["name"] == name)
    return found


def environment(container: Manifest) -> dict[str, str]:
    """Variables as the kubelet expands them: a variable can reference those before it."""
    values: dict[str, str] = {}
    for entry in container.get("env", ()):
        if "value" in entry:
            values[entry["name"]] = expand(entry["value"], values)
        elif "fieldRef" in entry.get("valueFrom", {}):
            values[entry["name"]] = f"of-{entry['name'].lower()}"  # a field of the pod, known only at run time
    return values


def expand(value: str, variables: dict[str, str]) -> str:
    """Expand $(NAME) as the kubelet does: unknown names stay unchanged."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: variables.get(found[1], found[0]), value)


def arguments(container: Manifest) -> list[str]:
    """The expanded args of a container."""
    return [expand(argument, environment(container)) for argument in container["args"]]


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "": 1, "Mi": 1 << 20, "Gi": 1 << 30}
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", f"{quantity}")
    assert match, quantity
    return float(match[1]) * units[match[2]]
