"""Every component on an API server, and the traffic that the live NetworkPolicies allow."""

from collections.abc import Iterator

import pytest
import yaml
from manifest_uses import SETTINGS, STORAGE, USES
from manifests import parse, render

BUILT_IN = ("apps", "batch", "networking.k8s.io", "autoscaling", "policy", "resource.k8s.io", "v1")


@pytest.fixture(scope="module")
def namespace(cluster) -> Iterator[str]:
    """The namespace of the examples."""
    cluster.kubectl("apply", "-f", "-", data=render(["namespace"], [], SETTINGS).stdout)
    yield "glm-test"
    cluster.kubectl("delete", "namespace", "glm-test", "--wait=false")


@pytest.mark.parametrize("name", USES)
def test_a_component_is_accepted_without_a_warning(name, cluster, namespace):
    resources, components = USES[name]
    done = render([*STORAGE, *resources], [*components, "images"], SETTINGS)
    assert done.returncode == 0, done.stderr
    objects = [each for each in parse(done.stdout) if each["apiVersion"].partition("/")[0] in BUILT_IN]
    assert len(objects) >= 6
    applied = cluster.kubectl("apply", "--dry-run=server", "-f", "-", data=yaml.safe_dump_all(objects))
    assert not applied.stderr


def allows(policy: dict, namespace_labels: dict, labels: dict) -> bool:
    """Whether the first ingress rule of a live policy admits a pod with these labels."""

    def matches(selector: dict | None, found: dict) -> bool:
        if selector is None:
            return True
        wanted = selector.get("matchLabels", {}).items() <= found.items()
        return wanted and all(found.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))

    return any(
        matches(source.get("namespaceSelector"), namespace_labels) and matches(source.get("podSelector"), labels)
        for source in policy["spec"]["ingress"][0]["from"]
    )


def test_only_the_named_clients_of_another_namespace_reach_the_api(cluster, namespace):
    resources, components = USES["clients"]
    done = render([*STORAGE, *resources], [*components, "images"], SETTINGS)
    cluster.kubectl("apply", "-f", "-", data=done.stdout)
    cluster.kubectl("create", "namespace", SETTINGS["CLIENT_NAMESPACE"])
    live = cluster.get(f"/api/v1/namespaces/{SETTINGS['CLIENT_NAMESPACE']}")["metadata"]["labels"]
    policy = cluster.get(f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/from-clients")
    client = {SETTINGS["CLIENT_LABEL"]: SETTINGS["CLIENT_LABEL_VALUE"]}
    assert allows(policy, live, client)
    assert not allows(policy, live, {"app": "other"})
    assert not allows(policy, {"kubernetes.io/metadata.name": "default"}, client)
    pages = cluster.get(f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/api")
    assert not allows(pages, {}, client)
    cluster.kubectl("delete", "namespace", SETTINGS["CLIENT_NAMESPACE"], "--wait=false")


@pytest.fixture
def devices(cluster) -> Iterator[None]:
    """What a DRA driver publishes: two A10 on one node, a T4 on another."""
    gpus = {"cluster-a10": ("gpu-a10", "NVIDIA A10G", 23028, 2), "cluster-t4": ("gpu-t4", "Tesla T4", 15360, 1)}
    expression = "device.driver == 'gpu.nvidia.com' && device.attributes['gpu.nvidia.com'].type == 'gpu'"
    created = [
        {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "DeviceClass",
            "metadata": {"name": "gpu.nvidia.com"},
            "spec": {"selectors": [{"cel": {"expression": expression}}]},
        }
    ]
    for name, (node, product, memory, count) in gpus.items():
        listed = [
            {
                "name": f"gpu-{number}",
                "attributes": {"type": {"string": "gpu"}, "productName": {"string": product}},
                "capacity": {"memory": {"value": f"{memory}Mi"}},
            }
            for number in range(count)
        ]
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        spec = {"driver": "gpu.nvidia.com", "nodeName": node, "pool": pool, "devices": listed}
        created.append(
            {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": name}, "spec": spec}
        )
    text = yaml.safe_dump_all(created)
    cluster.kubectl("apply", "-f", "-", data=text)
    yield
    cluster.kubectl("delete", "-f", "-", data=text)


def claiming_nodes(cluster, namespace: str) -> list[str]:
    """Nodes of the scheduled pods that claim a device."""
    claiming = [pod["spec"] for pod in cluster.pods(namespace) if pod["spec"].get("resourceClaims")]
    return [spec["nodeName"] for spec in claiming if "nodeName" in spec]


def test_the_scheduler_allocates_a_device_by_its_memory_and_leaves_a_smaller_one(cluster, namespace, devices):
    resources, components = USES["gpu/dra"]
    done = render([*STORAGE, *resources], [*components, "images"], SETTINGS)
    cluster.kubectl("apply", "-f", "-", data=done.stdout)
    cluster.wait(lambda: claiming_nodes(cluster, namespace), "the pod is scheduled")
    assert claiming_nodes(cluster, namespace) == ["gpu-a10"]
    (claim,) = cluster.get(f"/apis/resource.k8s.io/v1/namespaces/{namespace}/resourceclaims")["items"]
    (device,) = claim["status"]["allocation"]["devices"]["results"]
    assert (device["driver"], device["pool"]) == ("gpu.nvidia.com", "gpu-a10")
