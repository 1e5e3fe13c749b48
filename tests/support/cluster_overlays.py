"""Overlays with changed settings, as an administrator edits them, for tests against an API server."""

import os
from collections.abc import Iterable
from pathlib import Path

import yaml
from manifests import K8S


def settings_of(overlay: str) -> dict[str, str]:
    """The settings of an overlay."""
    return yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]


def write_overlay(
    folder: Path, overlay: str, settings: dict[str, str], components: Iterable[str] = (), tag: str = ""
) -> str:
    """Write a copy of an overlay with other settings, more components before `images`, or another image tag.

    Returns:
        The folder of the copy, for `kubectl apply -k`.
    """
    source = K8S / "overlays" / overlay
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(os.path.relpath(K8S, folder.resolve()))
    content = yaml.safe_load((source / "kustomization.yaml").read_text())
    resources = [path.replace("../..", f"{here}") for path in content["resources"]]
    listed = [path.replace("../..", f"{here}") for path in content["components"]]
    listed[-1:-1] = [f"{here}/components/{name}" for name in components]
    config = yaml.safe_load((source / "settings.yaml").read_text())
    config["data"] |= settings
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    if tag:
        names = ("infer-cpu", "infer-cuda", "infer-quantized", "train-cuda")
        content["images"] = [{"name": f"glm-{name}", "newTag": tag} for name in names]
    content |= {"resources": resources, "components": listed}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return f"{folder}"
