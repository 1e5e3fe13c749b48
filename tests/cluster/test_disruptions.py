"""A node stops responding, or the control plane restarts, while pods serve or train.

The waiting times are shortened; the defaults are minutes.
"""

from collections.abc import Iterator

import pytest
from cluster_nodes import NODES, create_node


@pytest.fixture(scope="module", autouse=True)
def namespaces(cluster) -> Iterator[None]:
    """The overlays used here."""
    names = ("serve-quantized", "train-multi")
    for name in names:
        cluster.kubectl("wait", "--for=delete", f"namespace/glm-{name}", "--timeout=100s")
        cluster.kubectl("apply", "-k", f"k8s/overlays/{name}/storage")
        cluster.kubectl("apply", "-k", f"k8s/overlays/{name}")
    yield
    for name in names:
        cluster.kubectl("delete", "namespace", f"glm-{name}", "--wait=false")


@pytest.fixture
def return_nodes(cluster) -> Iterator[None]:
    """Lost nodes come back after the test."""
    yield
    lost, cluster.lost = cluster.lost, set()
    for name in lost:
        if not cluster.get(f"/api/v1/nodes/{name}"):
            create_node(cluster.client, [*NODES].index(name), name)
        status = {"conditions": [{"type": "Ready", "status": "True"}]}
        headers = {"content-type": "application/strategic-merge-patch+json"}
        cluster.client.patch(f"/api/v1/nodes/{name}/status", json={"status": status}, headers=headers)


def nodes_of(cluster, namespace: str, name: str) -> dict[str, str]:
    """Node of each pod that is not being deleted, by the pod's name."""
    return {
        pod["metadata"]["name"]: pod["spec"].get("nodeName", "")
        for pod in cluster.pods(namespace)
        if pod["metadata"]["labels"].get("app.kubernetes.io/name") == name
        and not pod["metadata"].get("deletionTimestamp")
    }


def test_the_api_moves_to_another_node(cluster, return_nodes):
    namespace = "glm-serve-quantized"
    cluster.wait(lambda: len(cluster.ready_pods(namespace)) == 1, "the API serves")
    (old,) = nodes_of(cluster, namespace, "api").values()
    cluster.lost = {old}
    other = ({"cpu-0", "cpu-1"} - {old}).pop()
    cluster.wait(lambda: [*nodes_of(cluster, namespace, "api").values()] == [other], "another node has the pod", 90)
    cluster.wait(lambda: cluster.ready_pods(namespace) == [*nodes_of(cluster, namespace, "api")], "it serves")


def test_a_run_continues_on_another_node_once_the_lost_node_is_deleted(cluster, return_nodes):
    """Before that, the lost pod may still run and write, and two pods with one rank would damage the run."""
    namespace = "glm-train-multi"
    cluster.hold = lambda pod: pod["status"].get("phase") == "Running"
    try:
        cluster.kubectl("-n", namespace, "create", "job", "first", "--from=cronjob/train")
        cluster.wait(lambda: len([*filter(None, nodes_of(cluster, namespace, "train").values())]) == 2, "both run")
        pods = nodes_of(cluster, namespace, "train")
        (lost_pod,) = (name for name, node in pods.items() if node == "gpu-a100-1")
        cluster.lost = {"gpu-a100-1"}
        cluster.wait(lambda: lost_pod not in nodes_of(cluster, namespace, "train"), "the pod is terminating", 90)
        assert len(nodes_of(cluster, namespace, "train")) == 1  # not replaced yet
        cluster.kubectl("delete", "node", "gpu-a100-1")
        replaced = lambda: len(nodes_of(cluster, namespace, "train")) == 2  # noqa: E731
        cluster.wait(replaced, "a new pod takes its place", 120)
    finally:
        cluster.hold = lambda _: False


def test_a_crash_of_the_api_server_or_of_its_store_leaves_the_api_and_a_run_alone(cluster):
    """Nodes act on their own meanwhile; afterwards the run ends and a change is rolled out as usual."""
    serving, training = "glm-serve-quantized", "glm-train-multi"
    cluster.wait(lambda: len(cluster.ready_pods(serving)) == 1, "the API serves")
    cluster.hold = lambda pod: pod["status"].get("phase") == "Running"
    try:
        cluster.kubectl("-n", training, "create", "job", "second", "--from=cronjob/train")
        cluster.wait(lambda: len([*filter(None, nodes_of(cluster, training, "train").values())]) == 2, "the run runs")
        ready, run = cluster.ready_pods(serving), nodes_of(cluster, training, "train")
        for name in ("kube-apiserver", "etcd"):
            cluster.restart(name)
            cluster.kubectl("apply", "-k", "k8s/overlays/serve-quantized")
            assert cluster.ready_pods(serving) == ready
            assert nodes_of(cluster, training, "train") == run
    finally:
        cluster.hold = lambda _: False
    job = f"/apis/batch/v1/namespaces/{training}/jobs/second"
    cluster.wait(lambda: cluster.get(job)["status"].get("succeeded") == 2, "the run completes", 120)
    cluster.kubectl("-n", serving, "rollout", "restart", "deployment/api")
    cluster.kubectl("-n", serving, "rollout", "status", "deployment/api", "--timeout=100s")
    assert cluster.ready_pods(serving) != ready
