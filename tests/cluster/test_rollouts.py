"""Changes while the API serves: another model, a model that never becomes ready, a canary, an eviction."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cluster_overlays import write_overlay


@pytest.fixture(scope="module", autouse=True)
def namespaces(cluster) -> Iterator[None]:
    """Namespaces and claims of the overlays used here."""
    names = ("serve-quantized", "production")
    for name in names:
        cluster.kubectl("wait", "--for=delete", f"namespace/glm-{name}", "--timeout=100s")  # of another module
        cluster.kubectl("apply", "-k", f"k8s/overlays/{name}/storage")
    yield
    for name in names:
        cluster.kubectl("delete", "namespace", f"glm-{name}", "--wait=false")


@contextmanager
def without_a_gap(cluster, namespace: str) -> Iterator[None]:
    """Fail if no ready pod is behind the Service at any moment of the block."""
    over, gaps = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.02):
            if not cluster.ready_pods(namespace):
                gaps.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert not gaps


def model_of(pod: dict) -> str:
    return next(each["value"] for each in pod["spec"]["containers"][0]["env"] if each["name"] == "MODEL")


def served_models(cluster, namespace: str) -> list[str]:
    """The models of the ready pods behind the Service."""
    pods = {pod["metadata"]["name"]: pod for pod in cluster.pods(namespace)}
    return sorted(model_of(pods[name]) for name in cluster.ready_pods(namespace) if name in pods)


def test_another_model_replaces_the_old_one_without_a_gap_once_it_is_ready(cluster, tmp_path):
    namespace = "glm-serve-quantized"
    cluster.kubectl("apply", "-k", "k8s/overlays/serve-quantized")
    cluster.wait(lambda: served_models(cluster, namespace) == ["THUDM/chatglm3-6b"], "the API serves")
    held = threading.Event()
    cluster.hold = lambda pod: (
        pod["metadata"]["name"].startswith("api") and model_of(pod) == "tuned" and not held.is_set()
    )
    change = write_overlay(tmp_path / "change", "serve-quantized", {"MODEL_SOURCE": "tuned", "MODEL": "tuned"})
    try:
        with without_a_gap(cluster, namespace):
            cluster.kubectl("apply", "-k", change)
            waiting = lambda: [pod for pod in cluster.pods(namespace) if pod["metadata"]["name"].startswith("api")]  # noqa: E731
            cluster.wait(lambda: len(waiting()) == 2, "the new pod waits beside the old one")
            assert served_models(cluster, namespace) == ["THUDM/chatglm3-6b"]
            held.set()
            cluster.wait(lambda: served_models(cluster, namespace) == ["tuned"], "the new model is served")
    finally:
        cluster.hold = lambda _: False


def images_of(cluster, namespace: str) -> set[str]:
    """Images of the API's pods that are not being deleted."""
    pods = [pod for pod in cluster.pods(namespace) if pod["metadata"]["name"].startswith("api-")]
    return {pod["spec"]["containers"][0]["image"] for pod in pods if not pod["metadata"].get("deletionTimestamp")}


def test_an_upgrade_and_the_way_back_serve_throughout_and_keep_the_claims(cluster, tmp_path):
    """The commands of the upgrade notes, in checkouts of two versions."""
    namespace, old = "glm-serve-quantized", "k8s/overlays/serve-quantized"
    new = write_overlay(tmp_path / "new", "serve-quantized", {}, tag="9.9.9")
    cluster.kubectl("apply", "-k", old)
    cluster.wait(lambda: len(images_of(cluster, namespace)) == 1 and cluster.ready_pods(namespace), "the API serves")
    claims = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    before = [(each["metadata"]["name"], each["metadata"]["uid"]) for each in cluster.get(claims)["items"]]
    images = images_of(cluster, namespace)
    with without_a_gap(cluster, namespace):
        for version, expected in ((new, {"glm-infer-quantized:9.9.9"}), (old, images)):
            assert cluster.kubectl("diff", "-k", version, check=False).returncode == 1
            cluster.kubectl("apply", "-k", "k8s/overlays/serve-quantized/storage")
            cluster.kubectl("apply", "-k", version)
            cluster.kubectl("-n", namespace, "rollout", "status", "deployment", "--timeout=100s")
            cluster.wait(lambda expected=expected: images_of(cluster, namespace) == expected, "the version serves")
            assert cluster.kubectl("diff", "-k", version, check=False).returncode == 0
    assert before == [(each["metadata"]["name"], each["metadata"]["uid"]) for each in cluster.get(claims)["items"]]
    assert len(before) >= 1


def test_without_surge_the_old_pod_stops_first(cluster, tmp_path):
    """For clusters without a free GPU; k8s/README.md says that nothing serves meanwhile."""
    namespace = "glm-serve-quantized"
    cluster.kubectl("apply", "-k", write_overlay(tmp_path / "first", "serve-quantized", {}, ["no-surge"]))
    cluster.wait(lambda: served_models(cluster, namespace) == ["THUDM/chatglm3-6b"], "the API serves")
    cluster.hold = lambda pod: pod["metadata"]["name"].startswith("api") and model_of(pod) == "next"
    try:
        change = write_overlay(tmp_path / "second", "serve-quantized", {"MODEL": "next"}, ["no-surge"])
        cluster.kubectl("apply", "-k", change)
        cluster.wait(lambda: not cluster.ready_pods(namespace), "the old pod has stopped")
    finally:
        cluster.hold = lambda _: False


def test_a_canary_joins_the_service_leaves_it_and_is_promoted_under_the_same_name(cluster, tmp_path):
    namespace, base = "glm-production", "THUDM/chatglm3-6b"
    cluster.kubectl("apply", "-k", "k8s/overlays/production")
    cluster.wait(lambda: served_models(cluster, namespace) == [base], "the API serves")
    canary = write_overlay(tmp_path / "canary", "production", {"CANARY_MODEL": "tuned"}, ["canary"])
    with without_a_gap(cluster, namespace):
        cluster.kubectl("apply", "-k", canary)
        cluster.wait(lambda: served_models(cluster, namespace) == [base, "tuned"], "the canary serves")
        cluster.kubectl("-n", namespace, "delete", "deployment", "-l", "glm/canary")
        cluster.wait(lambda: served_models(cluster, namespace) == [base], "the canary is removed")
        promoted = write_overlay(tmp_path / "promoted", "production", {"MODEL_SOURCE": "tuned", "MODEL": "tuned"})
        cluster.kubectl("apply", "-k", promoted)
        cluster.wait(lambda: set(served_models(cluster, namespace)) == {"tuned"}, "the canary's model is promoted")
    names = {
        entry["value"]
        for pod in cluster.pods(namespace)
        if pod["metadata"]["name"].startswith("api")
        for entry in pod["spec"]["containers"][0]["env"]
        if entry["name"] == "SERVED_NAME"
    }
    assert names == {"chatglm3-6b"}


def test_a_drained_node_takes_one_replica_at_a_time(cluster):
    """The autoscaler has no metric here, so that the minimum of two replicas is set by hand."""
    namespace = "glm-production"
    cluster.kubectl("apply", "-k", "k8s/overlays/production")
    cluster.kubectl("-n", namespace, "scale", "deployment/api", "--replicas=2")
    cluster.kubectl("-n", namespace, "rollout", "status", "deployment/api", "--timeout=100s")
    budget = f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/api"
    cluster.wait(lambda: cluster.get(budget)["status"].get("disruptionsAllowed") == 1, "one replica may be evicted")
    cluster.wait(lambda: len(cluster.ready_pods(namespace)) == 2, "two replicas serve")
    cluster.hold = lambda pod: pod["metadata"]["name"].startswith("api")
    try:
        answers = []
        for name in sorted(cluster.ready_pods(namespace)):
            eviction = {
                "apiVersion": "policy/v1",
                "kind": "Eviction",
                "metadata": {"name": name, "namespace": namespace},
            }
            path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
            answers.append(cluster.client.post(path, json=eviction).status_code)
        assert answers == [201, 429]  # the second is refused until the first pod is replaced
        assert len(cluster.ready_pods(namespace)) >= 1
    finally:
        cluster.hold = lambda _: False
