"""Everything under k8s/ renders, as reviewed; what is missing stops the rendering with its name."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from manifest_uses import SETTINGS, USES
from manifests import COMPONENTS, K8S, OVERLAYS, REPOSITORY, composed, kubectl, objects, text

RENDERED = Path(__file__).parent / "rendered"
NAMES = ["demo", "production", "serve-gpu", "serve-quantized", "train-multi", "train-single"]
PARTS = (
    "canary/copy",
    "jobset/copy",
    "settings-given",
    "settings-given/copy",
    "trainjob/copy",
)  # of the component above them


def kustomization(folder: Path) -> dict:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def chosen(overlay: str) -> set[str]:
    return {
        Path(path).as_posix().removeprefix("../../components/")
        for path in kustomization(K8S / "overlays" / overlay)["components"]
    }


def test_the_overlays_are_those_of_the_readme():
    assert OVERLAYS == NAMES


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_renders_as_it_was_reviewed(overlay):
    """After a change: make k8s-rendered, and read the difference."""
    assert text(overlay) == (RENDERED / f"{overlay}.yaml").read_text()


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_only_selects(overlay):
    """Its namespace, what it takes, and no patch of its own."""
    assert set(kustomization(K8S / "overlays" / overlay)) == {"namespace", "resources", "components"}


def test_each_component_is_in_an_overlay_or_in_a_test_of_its_own():
    in_overlays = set().union(*(chosen(overlay) for overlay in NAMES))
    in_tests = {name for _, components in USES.values() for name in components}
    assert len(COMPONENTS) == 41
    assert in_overlays | in_tests | set(PARTS) == set(COMPONENTS)


@pytest.mark.parametrize("name", USES)
def test_a_component_renders_with_what_it_is_meant_for(name, used):
    assert len(used(name)) >= 6
    assert "set-by-settings" not in yaml.safe_dump_all(used(name))


@pytest.mark.parametrize("overlay", NAMES)
def test_no_placeholder_is_left_in_an_overlay(overlay):
    assert "set-by-settings" not in text(overlay)


def test_each_setting_that_is_missing_stops_the_rendering_with_its_name():
    for overlay in NAMES:
        folder = kustomization(K8S / "overlays" / overlay)
        bases = [path.removeprefix("../../base/") for path in folder["resources"] if path.startswith("../")]
        components = [path.removeprefix("../../components/") for path in folder["components"]]
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        assert settings
        for name in settings:
            done = composed(bases, components, {key: value for key, value in settings.items() if key != name})
            assert done.returncode == 1, (overlay, name)
            assert f"`data.{name}` is missing" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_empty_stops_the_rendering_with_its_name(name):
    """Though the field that takes it might be empty, as an Ingress without a host answers for all hosts."""
    done = composed(["namespace", "model-store", "serve"], ["settings-model"], SETTINGS | {name: ""})
    assert done.returncode == 1 and not done.stdout
    problem = "is no number above 0" if name.startswith("GPU") else "is empty"
    assert f"/{name} {problem} in settings.yaml" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", ["80GB", "22000 MiB", "-1", "0"])
def test_a_memory_that_is_no_number_stops_the_rendering(value):
    """The scheduler would compare it with no node, and the pod would wait for ever."""
    done = composed(["namespace", "serve"], ["settings-model"], SETTINGS | {"GPU_MEMORY_ABOVE_MIB": value})
    assert done.returncode == 1
    assert "/GPU_MEMORY_ABOVE_MIB is no number above 0 in settings.yaml" in done.stderr.splitlines()[-1]


def test_every_overlay_checks_its_settings():
    assert all("settings-model" in chosen(overlay) for overlay in NAMES)
    listed = (K8S / "components" / "settings-given" / "kustomization.yaml").read_text()
    assert set(re.findall(r"labelSelector: (\w+)", listed)) == set(SETTINGS)


def test_settings_of_an_overlay_are_those_that_its_components_read():
    """A setting that nothing reads would be a promise that nothing keeps."""
    for overlay in NAMES:
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        read = {
            name
            for component in chosen(overlay)
            for name in re.findall(
                r"fieldPath: data\.(\w+)", (K8S / "components" / component / "kustomization.yaml").read_text()
            )
        }
        assert set(settings) == read


def test_make_puts_a_registry_in_front_of_our_images():
    command = ["make", "--silent", "k8s/production", "IMAGE_PREFIX=registry.example.com/llm/"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"KUBECTL": kubectl()}
    )
    assert done.returncode == 0, done.stderr
    images = re.findall(r"image: (\S+)", done.stdout)
    assert len(images) == 6
    assert all(image.startswith("registry.example.com/llm/glm-") for image in images)


def test_all_bases_and_components_are_listed_in_both_readmes():
    names = [*COMPONENTS, *(folder.name for folder in (K8S / "base").iterdir())]
    for readme in ("README.md", "README.zh-CN.md"):
        listed = (K8S / readme).read_text()
        assert not [name for name in names if name not in PARTS and f"`{name}`" not in listed], readme


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_overlay_of_the_readme_makes_the_claims_of_the_run_and_a_pod_that_takes_rows(readme):
    (block,) = re.findall(r"```yaml\n(.*?)```", (K8S / readme).read_text(encoding="utf-8"), re.DOTALL)
    written = yaml.safe_load(block)
    bases = [path.removeprefix("../../base/") for path in written["resources"]]
    components = [path.removeprefix("../../components/") for path in written["components"]]
    done = composed(bases, components, SETTINGS)
    assert done.returncode == 0, done.stderr
    made = {(thing["kind"], thing["metadata"]["name"]): thing for thing in yaml.safe_load_all(done.stdout)}
    run = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects("train-single")}
    assert written["namespace"] == run[("Job", "train")]["metadata"]["namespace"]
    assert set(made) - set(run) == {("Job", "upload"), ("Namespace", "glm-test")}
    for name in ("data", "outputs"):
        assert made[("PersistentVolumeClaim", name)]["spec"] == run[("PersistentVolumeClaim", name)]["spec"]


def test_settings_of_tests_are_all_settings_there_are():
    read = {
        name
        for file in (K8S / "components").rglob("kustomization.yaml")
        for name in re.findall(r"fieldPath: data\.(\w+)", file.read_text())
    }
    assert read == set(SETTINGS)
