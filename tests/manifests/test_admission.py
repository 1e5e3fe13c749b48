"""An API server accepts every object without a warning, and every reference is resolved."""

import copy

import pytest
import yaml
from admission import find_problems, references, selects
from manifest_uses import SETTINGS, STORAGE, USES
from manifests import OVERLAYS, arguments, containers, environment, objects, one, pods, render

from entrypoints.__main__ import parse_arguments

# created by the user with the commands in k8s/README.md
CREATED_BY_USER = {("Secret", name) for name in ("api-keys", "pages", "page-users", "hub", "tls")}
CREATED_FOR_COMPONENTS = CREATED_BY_USER | {("PersistentVolumeClaim", "mirror"), ("ConfigMap", "warm")}
BROKEN = {
    "duplicate variable LOG_FORMAT": lambda api: api["env"].append({"name": "LOG_FORMAT", "value": "text"}),
    "duplicate port 8000": lambda api: api["ports"].append({"name": "more", "containerPort": 8000}),
    "invalid port name HTTP": lambda api: api["ports"][0].update(name="HTTP"),
    "duplicate mount path /tmp": lambda api: api["volumeMounts"].append({"name": "home", "mountPath": "/tmp"}),
    "unknown volume nowhere": lambda api: api["volumeMounts"].append({"name": "nowhere", "mountPath": "/x"}),
    "the value of MODEL is not a string": lambda api: next(e for e in api["env"] if e["name"] == "MODEL").update(
        value=6
    ),
    "invalid quantity of bytes 1500m": lambda api: api["resources"]["limits"].update(memory="1500m"),
}


def test_no_object_has_a_problem(every):
    assert len(every) >= 250
    assert [problem for manifest in every for problem in find_problems(manifest)] == []


@pytest.mark.parametrize("problem", BROKEN)
def test_the_check_finds_each_kind_of_problem(problem):
    deployment = copy.deepcopy(one(objects("demo"), "Deployment", "api"))
    (api,) = deployment["spec"]["template"]["spec"]["containers"]
    BROKEN[problem](api)
    assert find_problems(deployment) == [f"Deployment/api: api: {problem}"]


def test_every_reference_of_an_overlay_is_in_it_or_is_a_secret_that_the_user_creates():
    for overlay in OVERLAYS:
        present = {(each["kind"], each["metadata"]["name"]) for each in objects(overlay)}
        assert references(objects(overlay)) - present <= CREATED_BY_USER, overlay
    assert not references(objects("demo")) & CREATED_BY_USER - {("Secret", "hub")}  # optional


def test_every_reference_of_a_component_is_resolved_or_created_by_the_user(used):
    for name in USES:
        present = {(each["kind"], each["metadata"]["name"]) for each in used(name)}
        assert references(used(name)) - present <= CREATED_FOR_COMPONENTS, name


def test_ports_of_services_and_policies_exist_in_the_selected_pods(every):
    overlays = [objects(overlay) for overlay in OVERLAYS]
    checked = 0
    for manifests in overlays:
        templates = [template for _, template in pods(manifests)]
        for manifest in manifests:
            spec = manifest.get("spec", {})
            if manifest["kind"] == "Service":
                selector, ports = {"matchLabels": spec["selector"]}, [port["targetPort"] for port in spec["ports"]]
            elif manifest["kind"] == "NetworkPolicy" and "Ingress" in spec["policyTypes"]:
                selector = spec["podSelector"]
                ports = [port["port"] for rule in spec.get("ingress", ()) for port in rule.get("ports", ())]
            else:
                continue
            for template in (each for each in templates if selects(selector, each)):
                open_ports = {
                    value
                    for each in template["spec"]["containers"]
                    for port in each.get("ports", ())
                    for value in (port["name"], port["containerPort"])
                }
                assert {*ports} <= open_ports, (manifest["metadata"]["name"], template["metadata"]["labels"])
                checked += 1
    assert checked >= 20


def test_claims_can_be_mounted_on_several_nodes_except_in_the_demo(every):
    shared = 0
    for overlay in OVERLAYS:
        modes = [t["spec"]["accessModes"] for t in objects(overlay) if t["kind"] == "PersistentVolumeClaim"]
        assert modes == ([["ReadWriteOnce"]] if overlay == "demo" else [["ReadWriteMany"]] * len(modes)), overlay
        shared += len(modes)
    assert shared == 12


def test_the_namespace_is_first_and_dependencies_of_pods_come_before_them():
    for overlay in OVERLAYS:
        kinds = [manifest["kind"] for manifest in objects(overlay)]
        first = kinds.index("Deployment")
        assert kinds[0] == "Namespace"
        assert {"ServiceAccount", "PersistentVolumeClaim"} <= {*kinds[:first]}


def test_settings_change_no_immutable_field():
    """Otherwise a second apply would fail halfway; tests/cluster applies every change to an API server."""

    def immutable_fields(settings: dict[str, str]) -> dict:
        bases = [*STORAGE, "model-store", "serve", "web", "train", "evaluate"]
        chosen = ["vllm", "settings-model", "settings-training", "settings-evaluation", "gpu/memory", "cpu-nodes"]
        manifests = list(yaml.safe_load_all(render(bases, chosen, settings).stdout))
        return {
            (manifest["kind"], manifest["metadata"]["name"]): {
                "Deployment": lambda spec: spec["selector"],
                "PersistentVolumeClaim": lambda spec: spec,
                "Service": lambda spec: (spec.get("clusterIP"), spec["selector"]),
            }[manifest["kind"]](manifest["spec"])
            for manifest in manifests
            if manifest["kind"] in ("Deployment", "PersistentVolumeClaim", "Service")
        }

    other = immutable_fields(
        {name: "30000" if name.startswith("GPU") else f"{value}-other" for name, value in SETTINGS.items()}
    )
    assert immutable_fields(SETTINGS) == other
    assert len(other) == 11


def test_every_command_parses(templates):
    commands = set()
    for _, template in templates:
        for each in (each for each in containers(template) if "command" not in each):
            assert "$(" not in f"{arguments(each)}", environment(each)
            parse_arguments(arguments(each))  # exits with 2 at an unknown flag
            commands.add(each["args"][0])
    assert commands == {"prepare", "verify", "serve", "web", "train", "evaluate"}
