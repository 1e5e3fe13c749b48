"""Training runs: started by one command, untouched by an apply, stopped by a configuration error."""

import json
from collections.abc import Iterator

import pytest
from cluster_overlays import write_overlay

NAMESPACE = "glm-train-multi"


@pytest.fixture(scope="module", autouse=True)
def overlay(cluster) -> Iterator[None]:
    """The overlay train-multi."""
    cluster.kubectl("wait", "--for=delete", f"namespace/{NAMESPACE}", "--timeout=100s")
    cluster.kubectl("apply", "-k", "k8s/overlays/train-multi/storage")
    cluster.kubectl("apply", "-k", "k8s/overlays/train-multi")
    yield
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def held(cluster) -> Iterator[None]:
    """Pods of runs keep running."""
    cluster.hold = lambda pod: (
        pod["metadata"]["labels"].get("app.kubernetes.io/name") == "train" and (pod["status"].get("phase") == "Running")
    )
    yield
    cluster.hold = lambda _: False


def job(cluster, name: str) -> dict:
    return cluster.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/{name}")


def conditions(cluster, name: str) -> dict[str, str]:
    """Condition -> reason."""
    found = job(cluster, name).get("status", {}).get("conditions", ())
    return {each["type"]: each["reason"] for each in found if each["status"] == "True"}


def start(cluster, name: str) -> None:
    cluster.kubectl("-n", NAMESPACE, "create", "job", name, "--from=cronjob/train")


def run_pods(cluster, name: str) -> list[dict]:
    return [
        pod for pod in cluster.pods(NAMESPACE) if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == name
    ]


def test_an_apply_starts_no_run(cluster):
    cluster.wait(lambda: len(cluster.pods(NAMESPACE)) >= 3, "the other pods exist")
    assert not cluster.get(f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs")["items"]


def test_a_run_starts_on_two_whole_nodes_and_no_apply_touches_it(cluster, held, tmp_path):
    start(cluster, "first")
    cluster.wait(lambda: [pod["status"].get("phase") for pod in run_pods(cluster, "first")] == ["Running"] * 2, "runs")
    pods = {pod["spec"]["hostname"]: pod for pod in run_pods(cluster, "first")}
    assert sorted(pods) == ["first-0", "first-1"]  # MASTER_ADDR is first-0.train
    assert sorted(pod["spec"]["nodeName"] for pod in pods.values()) == ["gpu-a100-0", "gpu-a100-1"]
    before = job(cluster, "first")["metadata"]["generation"], {pod["metadata"]["uid"] for pod in pods.values()}
    cluster.kubectl("apply", "-k", "k8s/overlays/train-multi")
    change = write_overlay(tmp_path / "change", "train-multi", {"TRAIN_FILE": "other.jsonl"}, tag="9.9.9")
    cluster.kubectl("apply", "-k", change)
    after = (
        job(cluster, "first")["metadata"]["generation"],
        {pod["metadata"]["uid"] for pod in run_pods(cluster, "first")},
    )
    assert after == before
    cluster.kubectl("apply", "-k", "k8s/overlays/train-multi")
    cluster.kubectl("-n", NAMESPACE, "delete", "job", "first")


def test_a_configuration_error_ends_a_run_at_once_and_the_same_name_starts_again(cluster):
    cluster.exit_code = lambda _: 2
    try:
        start(cluster, "wrong")
        cluster.wait(lambda: "Failed" in conditions(cluster, "wrong"), "the run fails")
        assert conditions(cluster, "wrong")["Failed"] == "PodFailurePolicy"
    finally:
        cluster.exit_code = lambda _: 0
    cluster.kubectl("-n", NAMESPACE, "delete", "job", "wrong")
    start(cluster, "wrong")
    cluster.wait(lambda: "Complete" in conditions(cluster, "wrong"), "the run completes")


def test_an_apply_does_not_resume_or_suspend_a_run_that_kueue_controls(cluster, held, tmp_path):
    """Kueue's webhook suspends a new Job with this label, and its controller resumes it; here kubectl does both."""
    overlay = write_overlay(tmp_path / "kueue", "train-multi", {}, ["kueue"])
    rendered = cluster.kubectl("kustomize", overlay).stdout
    without_queue = "\n---\n".join(text for text in rendered.split("\n---\n") if "kind: LocalQueue" not in text)
    cluster.kubectl("apply", "-f", "-", data=without_queue)
    start(cluster, "queued")
    assert job(cluster, "queued")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "train"
    for suspend in (True, False):
        patch = json.dumps({"spec": {"suspend": suspend}})
        cluster.kubectl("-n", NAMESPACE, "patch", "job", "queued", "--type=merge", "-p", patch)
        cluster.kubectl("apply", "-f", "-", data=without_queue)
        assert job(cluster, "queued")["spec"]["suspend"] is suspend
    cluster.kubectl("-n", NAMESPACE, "delete", "job", "queued")
