"""A minimal Kubernetes scheduler with the filters that the manifests use: labels, taints and free resources."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from manifests import amount

OPERATORS: dict[str, Callable[[str | None, Any], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, values: value is not None,
    "DoesNotExist": lambda value, values: value is None,
    "Gt": lambda value, values: value is not None and int(value) > int(values[0]),
}


@dataclass
class Node:
    """Allocatable resources of a node; `requested` is the sum of the requests of its pods."""

    name: str
    allocatable: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    tainted: bool = False
    requested: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def has_gpu(self) -> bool:
        return "nvidia.com/gpu" in self.allocatable


@dataclass(frozen=True)
class Gpus:
    """GPUs of a node as GPU Feature Discovery labels them."""

    product: str
    memory_mib: int
    count: int = 1
    sharing: str = "none"
    mig_slices: int = 0


def cpu_node(name: str, cpu: float, memory_gib: float) -> Node:
    """A node without a GPU; the kubelet reserves a part of it for the system."""
    allocatable = {"cpu": cpu - 0.1, "memory": (memory_gib - 0.6) * 2**30, "ephemeral-storage": 40 * 2**30}
    return Node(name, allocatable)


def gpu_node(name: str, gpus: Gpus, cpu: float, memory_gib: float, *, tainted: bool = True) -> Node:
    """A node with GPUs and their labels."""
    node = cpu_node(name, cpu, memory_gib)
    node.allocatable["nvidia.com/gpu"] = gpus.count
    node.labels = {
        "nvidia.com/gpu.product": gpus.product,
        "nvidia.com/gpu.memory": f"{gpus.memory_mib}",
        "nvidia.com/gpu.count": f"{gpus.count}",
        "nvidia.com/gpu.sharing-strategy": gpus.sharing,
        "nvidia.com/mig.strategy": "single",  # the GPU operator's default, with or without MIG slices
    }
    if gpus.mig_slices:
        node.labels["nvidia.com/gpu.slices.gi"] = f"{gpus.mig_slices}"
    node.tainted = tainted
    return node


def requests(template: dict[str, Any]) -> dict[str, float]:
    """The scheduler's sum: all containers together, or the largest init container."""
    total: dict[str, float] = defaultdict(float)
    for container in template["spec"]["containers"]:
        for name, quantity in container["resources"]["requests"].items():
            total[name] += amount(quantity)
    for container in template["spec"].get("initContainers", ()):
        for name, quantity in container["resources"]["requests"].items():
            total[name] = max(total[name], amount(quantity))
    return total


def fits(template: dict[str, Any], node: Node) -> bool:
    """Do labels, taints and free resources of the node allow the pod?"""
    spec = template["spec"]
    tolerates = any(
        each.get("key") == "nvidia.com/gpu" and each["operator"] == "Exists" for each in spec.get("tolerations", ())
    )
    required = spec.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = required["nodeSelectorTerms"] if required else [{"matchExpressions": []}]
    matches = any(
        all(
            OPERATORS[rule["operator"]](node.labels.get(rule["key"]), rule.get("values"))
            for rule in term["matchExpressions"]
        )
        for term in terms
    )
    has_resources = all(
        node.requested[name] + need <= node.allocatable.get(name, 0) for name, need in requests(template).items()
    )
    return matches and has_resources and (tolerates or not node.tainted)


def schedule(template: dict[str, Any], nodes: list[Node]) -> Node | None:
    """Bind the pod to the least loaded node that fits; None if it stays pending."""
    candidates = [node for node in nodes if fits(template, node)]
    if not candidates:
        return None
    best = min(candidates, key=lambda node: node.requested["cpu"] / node.allocatable["cpu"])
    for name, need in requests(template).items():
        best.requested[name] += need
    return best
