"""Everything under k8s/ renders as reviewed; a missing setting stops the rendering with its name."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from manifest_uses import SETTINGS, USES
from manifests import COMPONENTS, K8S, OVERLAYS, REPOSITORY, kubectl, kustomize, objects, one, render, text

RENDERED = Path(__file__).parent / "rendered"
NAMES = ["demo", "production", "serve-gpu", "serve-quantized", "train-multi", "train-single"]
PARTS = (
    "canary/copy",
    "gpus/check",
    "jobset/copy",
    "settings-given",
    "settings-given/copy",
    "trainjob/copy",
)  # parts of the component in the parent folder


def kustomization(folder: Path) -> dict:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def components_of(overlay: str) -> set[str]:
    return {
        Path(path).as_posix().removeprefix("../../components/")
        for path in kustomization(K8S / "overlays" / overlay)["components"]
    }


def test_there_are_six_overlays():
    assert OVERLAYS == NAMES


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_renders_as_reviewed(overlay):
    """After a change: make k8s-rendered, and review the diff."""
    assert text(overlay) == (RENDERED / f"{overlay}.yaml").read_text()


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_only_selects(overlay):
    """It has a namespace, resources and components, and no patches."""
    assert set(kustomization(K8S / "overlays" / overlay)) == {"namespace", "resources", "components"}


def test_each_component_is_in_an_overlay_or_in_an_example():
    in_overlays = set().union(*(components_of(overlay) for overlay in NAMES))
    in_examples = {name for _, components in USES.values() for name in components}
    assert len(COMPONENTS) == 59
    assert in_overlays | in_examples | set(PARTS) == set(COMPONENTS)


@pytest.mark.parametrize("name", USES)
def test_a_component_renders_in_its_example(name, used):
    assert len(used(name)) >= 6
    assert "set-by-settings" not in yaml.safe_dump_all(used(name))


@pytest.mark.parametrize("overlay", NAMES)
def test_no_placeholder_remains_in_an_overlay(overlay):
    assert "set-by-settings" not in text(overlay)


def test_each_missing_setting_stops_the_rendering_with_its_name():
    for overlay in NAMES:
        folder = kustomization(K8S / "overlays" / overlay)
        bases = [path.removeprefix("../../base/") for path in folder["resources"] if path.startswith("../")]
        components = [path.removeprefix("../../components/") for path in folder["components"]]
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        assert settings
        for name in settings:
            done = render(bases, components, {key: value for key, value in settings.items() if key != name})
            assert done.returncode == 1, (overlay, name)
            assert f"`data.{name}` is missing" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", SETTINGS)
def test_an_empty_setting_stops_the_rendering_with_its_name(name):
    """Even where the field could be empty: an Ingress without a host accepts requests for all hosts."""
    done = render(["namespace", "model-store", "serve"], ["settings-model"], SETTINGS | {name: ""})
    assert done.returncode == 1
    assert not done.stdout
    problem = "is not a positive integer" if name.startswith("GPU") else "is empty"
    assert f"/{name} {problem} in settings.yaml" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", ["80GB", "22000 MiB", "-1", "0"])
def test_an_invalid_memory_size_stops_the_rendering(value):
    """Otherwise no node would match, and the pod would stay pending."""
    done = render(["namespace", "serve"], ["settings-model"], SETTINGS | {"GPU_MEMORY_ABOVE_MIB": value})
    assert done.returncode == 1
    assert "/GPU_MEMORY_ABOVE_MIB is not a positive integer in settings.yaml" in done.stderr.splitlines()[-1]


def test_every_overlay_checks_its_settings():
    assert all("settings-model" in components_of(overlay) for overlay in NAMES)
    listed = (K8S / "components" / "settings-given" / "kustomization.yaml").read_text()
    assert set(re.findall(r"labelSelector: (\w+)", listed)) == set(SETTINGS)


def test_the_settings_of_an_overlay_are_those_that_its_components_read():
    """A setting that nothing reads would have no effect."""
    for overlay in NAMES:
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        read = {
            name
            for component in components_of(overlay)
            for name in re.findall(
                r"fieldPath: data\.(\w+)", (K8S / "components" / component / "kustomization.yaml").read_text()
            )
        }
        assert set(settings) == read


def test_make_prefixes_the_images_with_a_registry():
    command = ["make", "--silent", "k8s/production", "IMAGE_PREFIX=registry.example.com/llm/"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"KUBECTL": kubectl()}
    )
    assert done.returncode == 0, done.stderr
    images = re.findall(r"image: (\S+)", done.stdout)
    assert len(images) == 7
    assert all(image.startswith("registry.example.com/llm/glm-") for image in images)


def test_all_bases_and_components_are_listed_in_both_readmes():
    names = [*COMPONENTS, *(folder.name for folder in (K8S / "base").iterdir())]
    for readme in ("README.md", "README.zh-CN.md"):
        listed = (K8S / readme).read_text()
        assert not [name for name in names if name not in PARTS and f"`{name}`" not in listed], readme


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_overlays_of_the_readme_upload_a_file_and_serve_a_run_in_the_namespace_of_the_run(readme):
    blocks = re.findall(r"```yaml\n(.*?)```", (K8S / readme).read_text(encoding="utf-8"), re.DOTALL)
    created = []
    for overlay in (each for each in map(yaml.safe_load, blocks) if "components" in each):
        assert overlay["namespace"] == one(objects("train-single"), "CronJob", "train")["metadata"]["namespace"]
        bases = [path for path in overlay.get("resources", ()) if path.startswith("../../base/")]
        components = [path.removeprefix("../../components/") for path in overlay["components"]]
        done = render([path.removeprefix("../../base/") for path in bases], components, SETTINGS)
        assert done.returncode == 0, done.stderr
        created.append({(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)})
    upload, serving = created
    assert set(upload) == {("Job", "upload")}
    prepare = serving[("Deployment", "model-init")]["spec"]["template"]["spec"]
    assert prepare["initContainers"][0]["args"][-2:] == ["--look-in", "/outputs"]
    assert {"name": "outputs", "mountPath": "/outputs", "readOnly": True} in prepare["initContainers"][0][
        "volumeMounts"
    ]
    claims = {each["metadata"]["name"] for each in objects("train-single") if each["kind"] == "PersistentVolumeClaim"}
    used = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in prepare["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert set(used) <= claims


SERVING = ["model-store", "serve"]


@pytest.mark.parametrize(
    ("bases", "components", "reason"),
    [
        (SERVING, ["int4", "vllm", "settings-model"], "list vllm before int4"),
        (SERVING, ["model-on-node", "settings-model"], "list vllm before model-on-node"),
        (SERVING, ["gpu/memory", "vllm", "settings-model"], "list vllm before gpu/*"),
        (SERVING, ["gpu/t4", "vllm", "settings-model"], "list vllm before int4"),
        (SERVING, ["no-keys", "vllm", "settings-model"], "list vllm before no-keys, ingress, gateway and usage"),
        (SERVING, ["ingress", "vllm", "settings-model"], "list vllm before no-keys, ingress, gateway and usage"),
        (SERVING, ["usage", "vllm", "settings-model"], "list vllm before no-keys, ingress, gateway and usage"),
        (SERVING, ["prefix-cache", "vllm", "settings-model"], "omit prefix-cache with vllm"),
        (SERVING, ["vllm", "prefix-cache", "settings-model"], "omit prefix-cache with vllm"),
        (SERVING, ["embeddings", "ingress", "settings-model"], "list ingress before embeddings"),
        (SERVING, ["embeddings", "gateway", "settings-model"], "list gateway before embeddings"),
        (SERVING, ["gpus/2", "vllm", "settings-model"], "list vllm before gpus/*"),
        (SERVING, ["vllm", "gpu/memory", "gpus/2", "settings-model"], "list gpus/* before gpu/*"),
        (SERVING, ["vllm", "gpus/2", "gpu/dra", "settings-model"], "omit gpus/* with gpu/dra"),
        (SERVING, ["vllm", "gpus/2", "int4", "settings-model"], "omit gpus/* with int4 and gpu/t4"),
        (SERVING, ["vllm"], "list settings-model after the components that it configures"),
        (SERVING, ["vllm", "settings-model", "model-on-node"], "list settings-model after"),
        (["train"], ["settings-model"], "list settings-training after"),
        (["evaluate"], ["settings-model"], "list settings-evaluation after"),
    ],
)
def test_an_order_of_components_that_would_have_no_effect_stops_the_rendering(bases, components, reason):
    done = render(bases, [*components, "images"], SETTINGS)
    assert done.returncode == 1
    assert reason in done.stderr.splitlines()[-1]


def test_make_writes_a_registry_that_apply_uses(tmp_path):
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    shutil.copytree(REPOSITORY / "images" / "scripts", tmp_path / "images" / "scripts")

    def images(prefix: str) -> list[str]:
        command = ["make", "--silent", "k8s-registry", f"IMAGE_PREFIX={prefix}"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return re.findall(r"image: (\S+)", kustomize(tmp_path / "k8s" / "overlays" / "demo").stdout)

    for prefix in ("registry.example.com:5000/llm/", "other.example.com/", ""):
        found = images(prefix)
        assert len(found) == 5
        assert all(image.startswith(f"{prefix}glm-") for image in found)


def test_the_settings_of_the_tests_are_complete():
    read = {
        name
        for file in (K8S / "components").rglob("kustomization.yaml")
        for name in re.findall(r"fieldPath: data\.(\w+)", file.read_text())
    }
    assert read == set(SETTINGS)
