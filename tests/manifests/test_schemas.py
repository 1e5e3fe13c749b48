"""Every object is what the API of its kind takes, strictly, in every Kubernetes from 1.29 on."""

import copy

import kubernetes_validate
import pytest
from crd_schemas import BY_KIND
from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import all_versions
from manifest_uses import USES
from manifests import OVERLAYS, objects, one, pod_template

VERSIONS = sorted({v for v in all_versions() if int(v.split(".")[1]) >= 29}, key=lambda v: int(v.split(".")[1]))
SINCE = {"model-image": 31}  # image volumes, of which older schemas know nothing
CUSTOM = {
    "ServiceMonitor",
    "PrometheusRule",
    "ScaledObject",
    "JobSet",
    "TrainJob",
    "TrainingRuntime",
    "LocalQueue",
    "HTTPRoute",
}
# served since, and not deprecated in the newest: an API server would warn of any other
CURRENT = {
    "v1", "apps/v1", "batch/v1", "networking.k8s.io/v1", "policy/v1", "autoscaling/v2",
    *(schema["properties"]["apiVersion"]["const"] for schema in BY_KIND.values()),
}  # fmt: skip


def check(thing: dict, version: str) -> None:
    """Raises ValidationError; of a custom resource also for the pods that it makes."""
    if thing["kind"] in BY_KIND:
        Draft202012Validator(BY_KIND[thing["kind"]]).validate(thing)
        for job in jobs(thing):
            check(job, version)
        return
    kubernetes_validate.validate(thing, version, strict=True)


def jobs(thing: dict) -> list[dict]:
    """The Jobs that a JobSet or a runtime makes."""
    spec = thing["spec"]["template"]["spec"] if thing["kind"] == "TrainingRuntime" else thing["spec"]
    replicated = spec.get("replicatedJobs", ()) if thing["kind"] in ("JobSet", "TrainingRuntime") else ()
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": job["template"]["spec"]}
        for job in replicated
    ]


def test_the_versions_reach_from_1_29_to_the_newest():
    assert len(VERSIONS) >= 9
    assert VERSIONS[0] == "1.29.0"
    assert VERSIONS[-1] == kubernetes_validate.latest_version()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_of_every_overlay_is_valid(version):
    things = [thing for overlay in OVERLAYS for thing in objects(overlay)]
    assert len(things) >= 80
    for thing in things:
        check(thing, version)


@pytest.mark.parametrize("name", USES)
def test_every_object_that_a_component_adds_or_changes_is_valid(name, used):
    versions = [version for version in VERSIONS if int(version.split(".")[1]) >= SINCE.get(name, 29)]
    assert len(versions) >= 7
    for version in versions:
        for thing in used(name):
            check(thing, version)


def test_every_kind_of_custom_resource_is_checked(used):
    kinds = {thing["kind"] for name in USES for thing in used(name)}
    assert set(BY_KIND) == CUSTOM
    assert kinds >= CUSTOM


def test_no_overlay_needs_a_custom_resource():
    """kubectl apply ends with `no matches for kind` where the operator is not installed."""
    kinds = {thing["kind"] for overlay in OVERLAYS for thing in objects(overlay)}
    assert not kinds & CUSTOM
    assert len(kinds) >= 12


def test_no_api_is_deprecated(used):
    things = [thing for overlay in OVERLAYS for thing in objects(overlay)]
    things += [thing for name in USES for thing in used(name)]
    assert {thing["apiVersion"] for thing in things} == CURRENT


@pytest.mark.parametrize("wrong", [("spec", "replicas", "two"), ("spec", "replica", 2), ("metadata", "label", {})])
def test_the_schemas_do_refuse(wrong):
    thing = next(each for each in objects("demo") if each["kind"] == "Deployment")
    part, field, value = wrong
    broken = {**thing, part: {**thing[part], field: value}}
    with pytest.raises(ValidationError):
        check(broken, VERSIONS[-1])


def test_a_custom_resource_with_an_unknown_field_is_refused(used):
    jobset = copy.deepcopy(one(used("jobset"), "JobSet", "train"))
    assert pod_template(jobset)["spec"]["containers"]
    with pytest.raises(ValidationError):
        check({**jobset, "spec": {**jobset["spec"], "completions": 2}}, VERSIONS[-1])
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodes"] = 2
    with pytest.raises(ValidationError):
        check(jobset, VERSIONS[-1])
