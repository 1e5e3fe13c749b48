"""Every overlay on an API server: accepted, placed, applied again, changed and removed."""

import pytest
from cluster_overlays import settings_of, write_overlay
from manifests import OVERLAYS

CHANGED = {"GPU_MEMORY_ABOVE_MIB": "30000", "HOST": "other.example.com", "MODEL_SOURCE": "other", "RUN": "second"}
# kubectl sends the selector of a PodDisruptionBudget with every client-side apply, although it is the same
ALWAYS_SENT = "poddisruptionbudget.policy/api configured"


@pytest.fixture(scope="class", params=OVERLAYS)
def overlay(request, cluster) -> str:
    """An applied overlay; its namespace is deleted afterwards."""
    name = request.param
    storage = cluster.kubectl("apply", "-k", f"k8s/overlays/{name}/storage")
    applied = cluster.kubectl("apply", "-k", f"k8s/overlays/{name}")
    assert not storage.stderr + applied.stderr, "the API server warns about an object"
    yield name
    cluster.kubectl("delete", "namespace", f"glm-{name}", "--wait=false")


def available(cluster, overlay: str) -> bool:
    deployments = cluster.get(f"/apis/apps/v1/namespaces/glm-{overlay}/deployments")["items"]
    return all(
        each["status"].get("observedGeneration") == each["metadata"]["generation"]
        and {each["status"].get(f"{kind}eplicas") for kind in ("r", "updatedR", "readyR")} == {each["spec"]["replicas"]}
        for each in deployments
    )


class TestEveryOverlay:
    """In this order, because an overlay is applied once."""

    def test_all_pods_run_on_their_kind_of_node(self, cluster, overlay):
        cluster.wait(lambda: available(cluster, overlay), "all Deployments are available")
        pods = cluster.pods(f"glm-{overlay}")
        assert len(pods) >= 2
        for pod in pods:
            gpus = [each["resources"]["limits"].get("nvidia.com/gpu") for each in pod["spec"]["containers"]]
            assert pod["spec"]["nodeName"].startswith("gpu-" if any(gpus) else "cpu-"), pod["metadata"]["name"]
            assert pod["spec"]["nodeName"] != "gpu-t4"

    def test_an_identical_apply_changes_nothing(self, cluster, overlay):
        again = cluster.kubectl("apply", "-k", f"k8s/overlays/{overlay}").stdout.splitlines()
        again += cluster.kubectl("apply", "-k", f"k8s/overlays/{overlay}/storage").stdout.splitlines()
        assert [line for line in again if not line.endswith(" unchanged")] in ([], [ALWAYS_SENT])

    def test_a_sync_by_server_side_apply_has_no_drift(self, cluster, overlay):
        """As Argo CD and Flux apply."""
        flags = ("--server-side", "--force-conflicts", "--field-manager=sync")
        cluster.kubectl("apply", "-k", f"k8s/overlays/{overlay}", *flags)
        drift = cluster.kubectl("diff", "-k", f"k8s/overlays/{overlay}", *flags, check=False)
        assert (drift.returncode, drift.stdout) == (0, "")

    def test_every_setting_and_the_image_tag_can_be_changed(self, cluster, overlay, tmp_path):
        changes = [
            {name: CHANGED.get(name, f"other-{name.lower().replace('_', '-')}")} for name in settings_of(overlay)
        ]
        for number, change in enumerate(changes):
            cluster.kubectl("apply", "-k", write_overlay(tmp_path / f"{number}", overlay, change))
        cluster.kubectl("apply", "-k", write_overlay(tmp_path / "tag", overlay, {}, tag="9.9.9"))
        assert len(changes) >= 2

    def test_removing_the_overlay_keeps_its_claims_and_its_namespace(self, cluster, overlay):
        path = f"/api/v1/namespaces/glm-{overlay}/persistentvolumeclaims"
        before = {each["metadata"]["uid"] for each in cluster.get(path)["items"]}
        cluster.kubectl("delete", "-k", f"k8s/overlays/{overlay}", "--wait=false")
        cluster.wait(lambda: not cluster.pods(f"glm-{overlay}"), "the pods are gone")
        claims = cluster.get(path)["items"]
        assert {each["metadata"]["uid"] for each in claims} == before
        assert {each["metadata"]["name"] for each in claims} >= {"models"}
        assert not [each for each in claims if each["metadata"].get("deletionTimestamp")]
        cluster.kubectl("apply", "-k", f"k8s/overlays/{overlay}")
