"""An API server takes every object as it is and warns of none; what an object names is there or in the README."""

import copy

import pytest
import yaml
from admission import complaints, finds, named
from manifest_uses import SETTINGS, USES
from manifests import K8S, OVERLAYS, composed, containers, environment, objects, one, pods, words

from entrypoints.__main__ import _parse

# made by hand, with the command in k8s/README.md
BY_HAND = {("Secret", "api-keys"), ("Secret", "pages"), ("Secret", "hub"), ("Secret", "tls")}
SECRETS_AND_CLAIMS = BY_HAND | {("PersistentVolumeClaim", "mirror")}
BROKEN = {
    "a second LOG_FORMAT hides the first": lambda api: api["env"].append({"name": "LOG_FORMAT", "value": "text"}),
    "port 8000 twice": lambda api: api["ports"].append({"name": "more", "containerPort": 8000}),
    "the port HTTP": lambda api: api["ports"][0].update(name="HTTP"),
    "two mounts at /tmp": lambda api: api["volumeMounts"].append({"name": "home", "mountPath": "/tmp"}),
    "no volume nowhere": lambda api: api["volumeMounts"].append({"name": "nowhere", "mountPath": "/x"}),
    "MODEL is no text": lambda api: next(e for e in api["env"] if e["name"] == "MODEL").update(value=6),
    "a fraction of a byte, or an odd unit: 1500m": lambda api: api["resources"]["limits"].update(memory="1500m"),
}


def test_an_api_server_would_warn_of_nothing(every):
    assert len(every) >= 250
    assert [problem for thing in every for problem in complaints(thing)] == []


@pytest.mark.parametrize("problem", BROKEN)
def test_the_check_does_find_what_an_api_server_warns_of(problem):
    deployment = copy.deepcopy(one(objects("demo"), "Deployment", "api"))
    (api,) = deployment["spec"]["template"]["spec"]["containers"]
    BROKEN[problem](api)
    assert complaints(deployment) == [f"Deployment/api: api: {problem}"]


def test_what_an_overlay_names_is_in_it_or_is_a_secret_that_the_readme_makes():
    for overlay in OVERLAYS:
        there = {(thing["kind"], thing["metadata"]["name"]) for thing in objects(overlay)}
        assert named(objects(overlay)) - there <= BY_HAND, overlay
    assert not named(objects("demo")) & BY_HAND - {("Secret", "hub")}  # which is optional


def test_what_a_component_names_is_in_it_or_in_what_it_is_meant_for(used):
    for name in USES:
        there = {(thing["kind"], thing["metadata"]["name"]) for thing in used(name)}
        assert named(used(name)) - there <= SECRETS_AND_CLAIMS, name


def test_named_ports_are_ports_of_the_pods_that_are_meant(every):
    overlays = [objects(overlay) for overlay in OVERLAYS]
    checked = 0
    for things in overlays:
        templates = [template for _, template in pods(things)]
        for thing in things:
            spec = thing.get("spec", {})
            if thing["kind"] == "Service":
                meant, ports = {"matchLabels": spec["selector"]}, [port["targetPort"] for port in spec["ports"]]
            elif thing["kind"] == "NetworkPolicy" and "Ingress" in spec["policyTypes"]:
                meant = spec["podSelector"]
                ports = [port["port"] for rule in spec.get("ingress", ()) for port in rule.get("ports", ())]
            else:
                continue
            for template in (each for each in templates if finds(meant, each)):
                open_ports = {
                    value
                    for each in template["spec"]["containers"]
                    for port in each.get("ports", ())
                    for value in (port["name"], port["containerPort"])
                }
                assert {*ports} <= open_ports, (thing["metadata"]["name"], template["metadata"]["labels"])
                checked += 1
    assert checked >= 20


def test_a_claim_that_pods_on_several_nodes_mount_is_read_by_many(every):
    shared = 0
    for overlay in OVERLAYS:
        modes = [t["spec"]["accessModes"] for t in objects(overlay) if t["kind"] == "PersistentVolumeClaim"]
        assert modes == ([["ReadWriteOnce"]] if overlay == "demo" else [["ReadWriteMany"]] * len(modes)), overlay
        shared += len(modes)
    assert shared == 12


def test_the_namespace_comes_first_and_what_pods_need_before_them():
    for overlay in OVERLAYS:
        kinds = [thing["kind"] for thing in objects(overlay)]
        first = min(kinds.index(kind) for kind in ("Deployment", "Job"))
        assert kinds[0] == "Namespace" and {"ServiceAccount", "PersistentVolumeClaim"} <= {*kinds[:first]}


def test_other_settings_change_no_field_that_cannot_change_but_in_jobs():
    """A Job's template cannot change either: k8s/README.md says to delete it first."""

    def fixed(settings: dict[str, str]) -> dict:
        bases = ["namespace", "model-store", "outputs", "serve", "web", "train", "evaluate"]
        chosen = ["vllm", "settings-model", "settings-training", "settings-evaluation", "gpu/memory", "cpu-nodes"]
        things = list(yaml.safe_load_all(composed(bases, chosen, settings).stdout))
        return {
            (thing["kind"], thing["metadata"]["name"]): {
                "Deployment": lambda spec: spec["selector"],
                "PersistentVolumeClaim": lambda spec: spec,
                "Service": lambda spec: (spec.get("clusterIP"), spec["selector"]),
            }[thing["kind"]](thing["spec"])
            for thing in things
            if thing["kind"] in ("Deployment", "PersistentVolumeClaim", "Service")
        }

    other = fixed({name: "30000" if name.startswith("GPU") else f"{value}-other" for name, value in SETTINGS.items()})
    assert fixed(SETTINGS) == other
    assert len(other) == 8
    for readme in ("README.md", "README.zh-CN.md"):
        said = (K8S / readme).read_text(encoding="utf-8")
        assert "delete job model-init" in said and "delete job train" in said


def test_every_command_is_one_that_glm_takes(templates):
    jobs = set()
    for _, template in templates:
        for each in (each for each in containers(template) if "command" not in each):
            assert "$(" not in f"{words(each)}", environment(each)
            _parse(words(each))  # ends with 2 at a flag that is not there
            jobs.add(each["args"][0])
    assert jobs == {"prepare", "verify", "serve", "web", "train", "data", "evaluate"}
