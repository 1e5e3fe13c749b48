"""The nodes of a control plane in tests, and a thread that acts as the kubelet of all of them.

Containers do not run: a pod that is bound to a node becomes ready at once, unless a test holds it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

Object = dict[str, Any]
MERGE = {"content-type": "application/merge-patch+json"}
READY = ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready")
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
# name -> cores, memory in GiB, GPUs, product, memory of a GPU in MiB; the labels are those of GPU Feature Discovery
NODES = {
    "cpu-0": (16, 64, 0, "", 0),
    "cpu-1": (16, 64, 0, "", 0),
    "gpu-a10": (8, 32, 2, "NVIDIA-A10G", 23028),
    "gpu-t4": (8, 32, 1, "Tesla-T4", 15360),
    "gpu-a100-0": (96, 1000, 8, "NVIDIA-A100-SXM4-80GB", 81920),
    "gpu-a100-1": (96, 1000, 8, "NVIDIA-A100-SXM4-80GB", 81920),
}


@dataclass(kw_only=True)
class Nodes:
    """What the kubelet does, which tests change."""

    client: httpx.Client
    hold: Callable[[Object], bool] = lambda _: False  # pods that do not become ready
    exit_code: Callable[[Object], int] = lambda _: 0  # of the pods of a Job
    lost: set[str] = field(default_factory=set)  # nodes whose kubelet does not respond
    stop: threading.Event = field(default_factory=threading.Event)

    def get(self, path: str) -> Object:
        """An object or a list of objects by its API path; {} if it does not exist."""
        response = self.client.get(path)
        return {} if response.status_code == 404 else response.raise_for_status().json()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def create_node(client: httpx.Client, number: int, name: str) -> None:
    """Register a ready node, as its kubelet does."""
    cores, memory, gpus, product, gpu_memory = NODES[name]
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    amounts = {"cpu": f"{cores}", "memory": f"{memory}Gi", "pods": "110", "ephemeral-storage": "500Gi"}
    if gpus:
        facts = {"present": "true", "product": product, "memory": f"{gpu_memory}", "count": f"{gpus}"}
        labels |= {f"nvidia.com/gpu.{key}": value for key, value in facts.items()}
        amounts["nvidia.com/gpu"] = f"{gpus}"
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": f"10.244.{number}.0/24", "taints": [GPU_TAINT] if gpus else []},
    }
    client.post("/api/v1/nodes", json=node).raise_for_status()
    condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastTransitionTime": now()}
    status = {"capacity": amounts, "allocatable": amounts, "conditions": [condition | {"lastHeartbeatTime": now()}]}
    path = f"/api/v1/nodes/{name}"
    client.patch(f"{path}/status", json={"status": status}, headers=MERGE).raise_for_status()
    # the controller adds this taint to new nodes and removes it later
    client.patch(path, json={"spec": {"taints": [GPU_TAINT] if gpus else []}}, headers=MERGE).raise_for_status()


def act_as_kubelet(nodes: Nodes) -> None:
    """Report pods as ready, end pods of Jobs, finish deletions, renew leases of nodes, create volumes for claims."""
    renewed = 0.0
    while not nodes.stop.wait(0.2):
        try:
            if time.monotonic() - renewed > 5:
                _renew_leases(nodes)
                renewed = time.monotonic()
            for pod in nodes.get("/api/v1/pods?fieldSelector=spec.nodeName!=")["items"]:
                if pod["spec"]["nodeName"] not in nodes.lost:
                    _report(nodes, pod)
            for claim in nodes.get("/api/v1/persistentvolumeclaims")["items"]:
                if claim["status"].get("phase") == "Pending":
                    _provide_volume(nodes.client, claim)
        except httpx.HTTPError:
            nodes.stop.wait(0.5)  # the API server restarts, or the object is gone


def _renew_leases(nodes: Nodes) -> None:
    client = nodes.client
    base = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
    for name in NODES.keys() - nodes.lost:
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now().replace("Z", ".000000Z")}
        body = {"metadata": {"name": name}, "spec": spec}
        if client.patch(f"{base}/{name}", json=body, headers=MERGE).status_code == 404:
            client.post(base, json={"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"} | body)


def _report(nodes: Nodes, pod: Object) -> None:
    meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
    of_job = any(owner["kind"] == "Job" for owner in meta.get("ownerReferences", ()))
    if meta.get("deletionTimestamp"):
        if of_job and status.get("phase") not in ("Succeeded", "Failed"):
            nodes.client.patch(f"{path}/status", json={"status": {"phase": "Failed"}}, headers=MERGE)
        nodes.client.request("DELETE", path, json={"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}})
    elif status.get("phase") == "Pending" and not nodes.hold(pod):
        running = {"running": {"startedAt": now()}}
        conditions = [{"type": kind, "status": "True", "lastTransitionTime": now()} for kind in READY]
        address = f"10.244.{[*NODES].index(spec['nodeName'])}.{2 + int(meta['uid'][:6], 16) % 250}"
        states = [_state(each, running) for each in spec["containers"]]
        body = {"phase": "Running", "startTime": now(), "podIP": address, "podIPs": [{"ip": address}]}
        body |= {"conditions": conditions, "containerStatuses": states}
        nodes.client.patch(f"{path}/status", json={"status": body}, headers=MERGE)
    elif of_job and status.get("phase") == "Running" and not nodes.hold(pod):
        code = nodes.exit_code(pod)
        ended = {"terminated": {"exitCode": code, "startedAt": status["startTime"], "finishedAt": now()}}
        conditions = [{"type": kind, "status": "False", "lastTransitionTime": now()} for kind in READY[2:]]
        states = [{**_state(each, ended), "ready": False} for each in spec["containers"]]
        body = {"phase": "Failed" if code else "Succeeded", "conditions": conditions, "containerStatuses": states}
        nodes.client.patch(f"{path}/status", json={"status": body}, headers=MERGE)


def _state(container: Object, state: Object) -> Object:
    name, image = container["name"], container["image"]
    return {"name": name, "image": image, "imageID": image, "ready": True, "restartCount": 0, "state": state}


def _provide_volume(client: httpx.Client, claim: Object) -> None:
    meta, spec = claim["metadata"], claim["spec"]
    reference = {"kind": "PersistentVolumeClaim", "namespace": meta["namespace"], "name": meta["name"]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"pv-{meta['uid']}"},
        "spec": {
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "accessModes": spec["accessModes"],
            "storageClassName": spec.get("storageClassName", ""),
            "hostPath": {"path": f"/volumes/{meta['uid']}"},
            "claimRef": reference | {"apiVersion": "v1", "uid": meta["uid"]},
        },
    }
    client.post("/api/v1/persistentvolumes", json=volume)  # 409 while the controller binds it
