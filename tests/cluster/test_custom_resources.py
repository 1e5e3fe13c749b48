"""JobSet and TrainJob under Kueue, as the API server stores them: what an apply changes, without their controllers.

Their definitions have only what decides about an apply: `replicatedJobs` is a map by name, all else is kept as sent.
"""

import json

import pytest
import yaml
from cluster_overlays import write_overlay

NAMESPACE = "glm-train-multi"
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
REPLICATED_JOBS = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["name"],
    "items": {**ANYTHING, "required": ["name"], "properties": {"name": {"type": "string"}}},
}
JOBSET_SPEC = {**ANYTHING, "properties": {"replicatedJobs": REPLICATED_JOBS}}
DEFINITIONS = {
    ("jobset.x-k8s.io", "v1alpha2", "JobSet"): JOBSET_SPEC,
    ("trainer.kubeflow.org", "v1alpha1", "TrainJob"): ANYTHING,
    ("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime"): ANYTHING,
    ("kueue.x-k8s.io", "v1beta2", "LocalQueue"): ANYTHING,
}
SERVER_SIDE = ("--server-side", "--force-conflicts", "--field-manager=sync")
KINDS = {"jobset": "JobSet", "trainjob": "TrainJob"}


def definition(group: str, version: str, kind: str, spec: dict) -> dict:
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {**ANYTHING, "properties": {"spec": spec}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster):
    cluster.kubectl("wait", "--for=delete", f"namespace/{NAMESPACE}", "--timeout=100s")
    crds = [definition(*key, spec) for key, spec in DEFINITIONS.items()]
    cluster.kubectl("apply", "-f", "-", data=json.dumps({"apiVersion": "v1", "kind": "List", "items": crds}))
    cluster.kubectl("wait", "--for=condition=Established", "crd", *(crd["metadata"]["name"] for crd in crds))
    cluster.kubectl("create", "namespace", NAMESPACE)
    yield
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    cluster.kubectl("delete", "crd", *(crd["metadata"]["name"] for crd in crds))


@pytest.fixture
def rendered(cluster, tmp_path):
    """The custom resources of train-multi with a component and Kueue."""

    def render(component: str, **settings: str) -> str:
        folder = tmp_path / "-".join((component, *settings.values()))
        text = cluster.kubectl("kustomize", write_overlay(folder, "train-multi", settings, [component, "kueue"])).stdout
        kinds = {kind for _, _, kind in DEFINITIONS}
        return "\n---\n".join(part for part in text.split("\n---\n") if yaml.safe_load(part)["kind"] in kinds)

    return render


def runs(cluster, component: str) -> dict[str, dict]:
    """The JobSets or TrainJobs by name."""
    found = cluster.kubectl("-n", NAMESPACE, "get", KINDS[component], "-o", "json").stdout
    return {item["metadata"]["name"]: item for item in json.loads(found)["items"]}


def state(run: dict) -> tuple:
    return run["metadata"]["uid"], run["metadata"]["generation"], run["spec"]


@pytest.mark.parametrize("component", KINDS)
def test_an_identical_apply_changes_nothing_of_a_run_that_kueue_suspends_or_resumes(component, rendered, cluster):
    objects = rendered(component)
    cluster.kubectl("apply", "-f", "-", data=objects)
    for flags in ((), SERVER_SIDE):
        for suspend in (True, False):
            patch = json.dumps({"spec": {"suspend": suspend}})
            cluster.kubectl("-n", NAMESPACE, "patch", KINDS[component], "first", "--type=merge", "-p", patch)
            before = state(runs(cluster, component)["first"])
            again = cluster.kubectl("apply", *flags, "-f", "-", data=objects).stdout.splitlines()
            assert [line for line in again if line.endswith((" configured", " created"))] == []
            assert state(runs(cluster, component)["first"]) == before
            assert before[-1]["suspend"] is suspend


@pytest.mark.parametrize("component", KINDS)
def test_another_run_is_created_beside_the_first_one_which_no_setting_of_it_changes(component, rendered, cluster):
    cluster.kubectl("apply", "-f", "-", data=rendered(component))
    before = state(runs(cluster, component)["first"])
    cluster.kubectl("apply", "-f", "-", data=rendered(component, RUN="second", TRAIN_FILE="other.jsonl"))
    after = runs(cluster, component)
    assert set(after) == {"first", "second"}
    assert state(after["first"]) == before
    if component == "trainjob":
        assert after["second"]["spec"]["runtimeRef"]["name"] == "second"
        found = cluster.kubectl("-n", NAMESPACE, "get", "trainingruntimes", "-o", "json").stdout
        texts = {item["metadata"]["name"]: json.dumps(item["spec"]) for item in json.loads(found)["items"]}
        assert {name: "other.jsonl" in text for name, text in texts.items()} == {"first": False, "second": True}


def test_a_server_side_apply_keeps_the_node_selector_that_kueue_adds_to_a_jobset(rendered, cluster):
    """A client-side apply would send the whole list, and JobSet rejects a change of a run that is not suspended."""
    objects = rendered("jobset")
    cluster.kubectl("apply", *SERVER_SIDE, "-f", "-", data=objects)
    selector = "/spec/replicatedJobs/0/template/spec/template/spec/nodeSelector"
    patch = json.dumps([{"op": "add", "path": selector, "value": {"pool": "a"}}])
    cluster.kubectl("-n", NAMESPACE, "patch", "jobset", "first", "--type=json", "-p", patch)
    before = state(runs(cluster, "jobset")["first"])
    cluster.kubectl("apply", *SERVER_SIDE, "-f", "-", data=objects)
    assert state(runs(cluster, "jobset")["first"]) == before
