"""Every object is valid for the strict schema of its kind, in every Kubernetes version from 1.29 on."""

import copy
import functools
import json

import kubernetes_validate
import pytest
from crd_schemas import BY_KIND
from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import all_versions
from manifest_uses import USES
from manifests import OVERLAYS, objects, one, pod_template

VERSIONS = sorted({v for v in all_versions() if int(v.split(".")[1]) >= 29}, key=lambda v: int(v.split(".")[1]))
SINCE = {"model-image": 31, "gpu/dra": 34}  # image volumes and device claims are unknown to older schemas
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
# not deprecated in the newest version; an API server would warn of any other
CURRENT = {
    "v1", "apps/v1", "batch/v1", "networking.k8s.io/v1", "policy/v1", "autoscaling/v2",
    "resource.k8s.io/v1",
    *(schema["properties"]["apiVersion"]["const"] for schema in BY_KIND.values()),
}  # fmt: skip


def check(manifest: dict, version: str) -> None:
    """Raises ValidationError; validates the Jobs inside a custom resource too."""
    if manifest["kind"] in BY_KIND:
        Draft202012Validator(BY_KIND[manifest["kind"]]).validate(manifest)
        for job in jobs(manifest):
            check_once(json.dumps(job), version)
        return
    kubernetes_validate.validate(manifest, version, strict=True)


@functools.cache
def check_once(serialized: str, version: str) -> None:
    """`check` for an object as JSON; many overlays contain the same objects."""
    check(json.loads(serialized), version)


def jobs(manifest: dict) -> list[dict]:
    """The Jobs that a JobSet or a TrainingRuntime creates."""
    spec = manifest["spec"]["template"]["spec"] if manifest["kind"] == "TrainingRuntime" else manifest["spec"]
    replicated = spec.get("replicatedJobs", ()) if manifest["kind"] in ("JobSet", "TrainingRuntime") else ()
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": job["template"]["spec"]}
        for job in replicated
    ]


def test_the_tested_versions_range_from_1_29_to_the_newest():
    assert len(VERSIONS) >= 9
    assert VERSIONS[0] == "1.29.0"
    assert VERSIONS[-1] == kubernetes_validate.latest_version()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_of_every_overlay_is_valid(version):
    manifests = [manifest for overlay in OVERLAYS for manifest in objects(overlay)]
    assert len(manifests) >= 80
    for manifest in manifests:
        check_once(json.dumps(manifest), version)


@pytest.mark.parametrize("name", USES)
def test_every_object_that_a_component_adds_or_changes_is_valid(name, used):
    versions = [version for version in VERSIONS if int(version.split(".")[1]) >= SINCE.get(name, 29)]
    assert len(versions) >= (1 if name in SINCE else 9)
    for version in versions:
        for manifest in used(name):
            check_once(json.dumps(manifest), version)


def test_every_kind_of_custom_resource_has_a_schema_and_is_used(used):
    kinds = {manifest["kind"] for name in USES for manifest in used(name)}
    assert set(BY_KIND) == CUSTOM
    assert kinds >= CUSTOM


def test_no_overlay_needs_a_custom_resource():
    """Kubectl apply fails with `no matches for kind` if the operator is not installed."""
    kinds = {manifest["kind"] for overlay in OVERLAYS for manifest in objects(overlay)}
    assert not kinds & CUSTOM
    assert len(kinds) >= 11


def test_no_api_is_deprecated(used):
    manifests = [manifest for overlay in OVERLAYS for manifest in objects(overlay)]
    manifests += [manifest for name in USES for manifest in used(name)]
    assert {manifest["apiVersion"] for manifest in manifests} == CURRENT


@pytest.mark.parametrize("wrong", [("spec", "replicas", "two"), ("spec", "replica", 2), ("metadata", "label", {})])
def test_the_schemas_reject_errors(wrong):
    manifest = next(each for each in objects("demo") if each["kind"] == "Deployment")
    part, field, value = wrong
    broken = {**manifest, part: {**manifest[part], field: value}}
    with pytest.raises(ValidationError):
        check(broken, VERSIONS[-1])


def test_a_custom_resource_with_an_unknown_field_is_rejected(used):
    jobset = copy.deepcopy(one(used("jobset"), "JobSet", "first"))
    assert pod_template(jobset)["spec"]["containers"]
    with pytest.raises(ValidationError):
        check({**jobset, "spec": {**jobset["spec"], "completions": 2}}, VERSIONS[-1])
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodes"] = 2
    with pytest.raises(ValidationError):
        check(jobset, VERSIONS[-1])
