"""The scheduler's filters, as far as our manifests use them: labels, taints and room."""

from collections import Counter
from dataclasses import dataclass, field

from manifests import amount

OPERATORS = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, values: value is not None,
    "DoesNotExist": lambda value, values: value is None,
    "Gt": lambda value, values: value is not None and int(value) > int(values[0]),
}


@dataclass
class Node:
    """What a machine offers; `taken` is what the pods on it have asked for."""

    name: str
    room: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    tainted: bool = False
    taken: Counter = field(default_factory=Counter)

    @property
    def has_gpu(self) -> bool:
        return "nvidia.com/gpu" in self.room


def machine(name: str, cpu: float, gibibytes: float) -> Node:
    """A machine without a GPU, with what a kubelet leaves of it for pods."""
    room = {"cpu": cpu - 0.1, "memory": (gibibytes - 0.6) * 2**30, "ephemeral-storage": 40 * 2**30}
    return Node(name, room)


def gpu_machine(name: str, product: str, mebibytes: int, count: int, cpu: float, gibibytes: float, **more) -> Node:
    """One with GPUs, labelled as GPU Feature Discovery labels it."""
    node = machine(name, cpu, gibibytes)
    node.room["nvidia.com/gpu"] = count
    node.labels = {
        "nvidia.com/gpu.product": product,
        "nvidia.com/gpu.memory": f"{mebibytes}",
        "nvidia.com/gpu.count": f"{count}",
        "nvidia.com/gpu.sharing-strategy": more.get("sharing", "none"),
        "nvidia.com/mig.strategy": "single",  # the GPU operator's default, sliced or not
    }
    if more.get("slices"):
        node.labels["nvidia.com/gpu.slices.gi"] = f"{more['slices']}"
    node.tainted = more.get("tainted", True)
    return node


def requests(template: dict) -> Counter:
    """What the scheduler counts: the containers together, or the largest init container."""
    total: Counter = Counter()
    for container in template["spec"]["containers"]:
        for name, quantity in container["resources"]["requests"].items():
            total[name] += amount(quantity)
    for container in template["spec"].get("initContainers", ()):
        for name, quantity in container["resources"]["requests"].items():
            total[name] = max(total[name], amount(quantity))
    return total


def may_run(template: dict, node: Node) -> bool:
    """By labels, taints and what is left of the node."""
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
    fits = all(node.taken[name] + need <= node.room.get(name, 0) for name, need in requests(template).items())
    return matches and fits and (tolerates or not node.tainted)


def place(template: dict, nodes: list[Node]) -> Node | None:
    """The emptiest node that may run the pod, whose room it then takes; None: it stays pending."""
    found = [node for node in nodes if may_run(template, node)]
    if not found:
        return None
    best = min(found, key=lambda node: node.taken["cpu"] / node.room["cpu"])
    best.taken.update(requests(template))
    return best
