"""What an API server says to an object beyond its schema: warnings, forms of names, and what else it names."""

import re
from collections import Counter
from collections.abc import Iterator

from manifests import containers, pod_template, pods

LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")  # a DNS label
SUBDOMAIN = re.compile(r"^(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
PORT = re.compile(r"^(?=.{1,15}$)(?=.*[a-z])[a-z0-9]([a-z0-9]|-(?!-))*(?<!-)$")
VALUE = re.compile(r"^(|[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$")
KEY = re.compile(r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
OLD = re.compile(
    r"beta\.kubernetes\.io|failure-domain|kubernetes\.io/ingress\.class|seccomp\.security|apparmor\.security"
)


def complaints(thing: dict) -> list[str]:
    """Warnings and refusals of one object; empty for a good one."""
    name, kind, template = thing["metadata"]["name"], thing["kind"], pod_template(thing)
    found = [f"{kind}/{name}: {problem}" for problem in (*_metadata(thing["metadata"]), *_of_its_kind(thing))]
    if template:
        found += [f"{kind}/{name}: {problem}" for problem in _pod(template)]
    if OLD.search(str(thing)):
        found.append(f"{kind}/{name}: a deprecated label or annotation")
    return found


def _metadata(metadata: dict) -> Iterator[str]:
    if not SUBDOMAIN.match(metadata["name"]):
        yield f"the name {metadata['name']}"
    for key, value in metadata.get("labels", {}).items():
        if not KEY.match(key) or not isinstance(value, str) or not VALUE.match(value):
            yield f"the label {key}={value}"


def _of_its_kind(thing: dict) -> Iterator[str]:
    spec, kind, name = thing.get("spec", {}), thing["kind"], thing["metadata"]["name"]
    makes_pods = pod_template(thing) is not None
    if (makes_pods or kind == "Service") and not LABEL.match(name):
        yield "its pods' names come from it, so it should be a DNS label"
    if kind == "CronJob" and len(name) > 52:
        yield "no room for the number of a Job behind the name"
    if kind == "Service":
        if spec.get("clusterIP") == "None" and spec.get("sessionAffinity", "None") != "None":
            yield "sessionAffinity means nothing without an address"
        if {"externalIPs", "loadBalancerIP"} & {*spec}:
            yield "a deprecated field of Service"
        for port in spec["ports"]:
            if not LABEL.match(port["name"]):
                yield f"the port {port['name']}"
    selector = spec.get("selector", {}).get("matchLabels", {}) if kind in ("Deployment", "ReplicaSet") else {}
    if not selector.items() <= (pod_template(thing) or {"metadata": {"labels": {}}})["metadata"]["labels"].items():
        yield "its selector does not find its own pods"


def _pod(template: dict) -> Iterator[str]:
    spec = template["spec"]
    for volume in _twice(each["name"] for each in spec["volumes"]):
        yield f"two volumes {volume}"
    for container in _twice(each["name"] for each in containers(template)):
        yield f"two containers {container}"
    terms = [*spec.get("topologySpreadConstraints", ())]
    for side in ("podAffinity", "podAntiAffinity"):
        wishes = spec.get("affinity", {}).get(side, {}).get("preferredDuringSchedulingIgnoredDuringExecution", ())
        terms += [wish["podAffinityTerm"] for wish in wishes]
    if any("labelSelector" not in term for term in terms):
        yield "a term without a labelSelector finds no pod"
    for each in containers(template):
        yield from (f"{each['name']}: {problem}" for problem in _container(each, {v["name"] for v in spec["volumes"]}))


def _container(container: dict, volumes: set[str]) -> Iterator[str]:
    for name in _twice(entry["name"] for entry in container["env"]):
        yield f"a second {name} hides the first"
    for entry in container["env"]:
        if not isinstance(entry.get("value", ""), str):
            yield f"{entry['name']} is no text"
    for port in container.get("ports", ()):
        if not PORT.match(port["name"]):
            yield f"the port {port['name']}"
    for port in _twice(each["containerPort"] for each in container.get("ports", ())):
        yield f"port {port} twice"
    mounts = container["volumeMounts"]
    for path in _twice(mount["mountPath"] for mount in mounts):
        yield f"two mounts at {path}"
    for mount in mounts:
        if mount["name"] not in volumes:
            yield f"no volume {mount['name']}"
    for side in ("requests", "limits"):
        for resource in ("memory", "ephemeral-storage"):
            if not re.fullmatch(r"\d+(Mi|Gi)", f"{container['resources'][side][resource]}"):
                yield f"a fraction of a byte, or an odd unit: {container['resources'][side][resource]}"


def _twice(names: Iterator) -> list:
    return [name for name, count in Counter(names).items() if count > 1]


def named(things: list[dict]) -> set[tuple[str, str]]:
    """Kind and name of every object that the pods, scalers and routes of an overlay speak of."""
    found = set()
    for _, template in pods(things):
        spec = template["spec"]
        found.add(("ServiceAccount", spec["serviceAccountName"]))
        if "priorityClassName" in spec:
            found.add(("PriorityClass", spec["priorityClassName"]))
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "configMap" in volume:
                found.add(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume:
                found.add(("Secret", volume["secret"]["secretName"]))
        for source in (source for each in containers(template) for source in each.get("envFrom", ())):
            found |= {(key.removesuffix("Ref").capitalize(), ref["name"]) for key, ref in source.items()}
    for thing in things:
        found |= set(_aims(thing))
    return found


def _aims(thing: dict) -> Iterator[tuple[str, str]]:
    spec = thing.get("spec", {})
    if thing["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
        target = spec["scaleTargetRef"]
        yield target.get("kind", "Deployment"), target["name"]
    if thing["kind"] == "Ingress":
        for rule in spec["rules"]:
            yield from (("Service", path["backend"]["service"]["name"]) for path in rule["http"]["paths"])
        yield from (("Secret", entry["secretName"]) for entry in spec["tls"])
    if thing["kind"] == "HTTPRoute":
        yield from (("Service", ref["name"]) for rule in spec["rules"] for ref in rule["backendRefs"])
    if thing["kind"] == "TrainJob":
        yield spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]


def finds(selector: dict, template: dict) -> bool:
    """Does a label selector of a policy, budget or service find these pods?"""
    labels = template["metadata"]["labels"]
    plain = selector.get("matchLabels", {})
    rules = selector.get("matchExpressions", ())
    assert all(rule["operator"] == "In" for rule in rules)
    return plain.items() <= labels.items() and all(labels.get(rule["key"]) in rule["values"] for rule in rules)
