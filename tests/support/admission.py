"""Checks of an API server beyond the schema: warnings, name formats, and references between objects."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

from manifests import Manifest, containers, pod_template, pods

DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
DNS_SUBDOMAIN = re.compile(r"^(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
PORT_NAME = re.compile(r"^(?=.{1,15}$)(?=.*[a-z])[a-z0-9]([a-z0-9]|-(?!-))*(?<!-)$")
LABEL_VALUE = re.compile(r"^(|[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$")
LABEL_KEY = re.compile(r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
DEPRECATED = re.compile(
    r"beta\.kubernetes\.io|failure-domain|kubernetes\.io/ingress\.class|seccomp\.security|apparmor\.security"
)


def find_problems(manifest: Manifest) -> list[str]:
    """Warnings and errors for one object; empty if it is valid."""
    name, kind, template = manifest["metadata"]["name"], manifest["kind"], pod_template(manifest)
    found = [f"{kind}/{name}: {problem}" for problem in (*_metadata(manifest["metadata"]), *_kind_specific(manifest))]
    if template:
        found += [f"{kind}/{name}: {problem}" for problem in _pod(template)]
    if DEPRECATED.search(str(manifest)):
        found.append(f"{kind}/{name}: deprecated label or annotation")
    return found


def _metadata(metadata: Manifest) -> Iterator[str]:
    if not DNS_SUBDOMAIN.match(metadata["name"]):
        yield f"invalid name {metadata['name']}"
    for key, value in metadata.get("labels", {}).items():
        if not LABEL_KEY.match(key) or not isinstance(value, str) or not LABEL_VALUE.match(value):
            yield f"invalid label {key}={value}"


def _kind_specific(manifest: Manifest) -> Iterator[str]:
    spec, kind, name = manifest.get("spec", {}), manifest["kind"], manifest["metadata"]["name"]
    template = pod_template(manifest)
    if (template or kind == "Service") and not DNS_LABEL.match(name):
        yield "the name is not a DNS label, and pod names derive from it"
    if kind == "CronJob" and len(name) > 52:
        yield "the name is longer than 52 characters, which the suffix of a Job needs"
    if kind == "Service":
        if spec.get("clusterIP") == "None" and spec.get("sessionAffinity", "None") != "None":
            yield "sessionAffinity has no effect without a cluster IP"
        if {"externalIPs", "loadBalancerIP"} & {*spec}:
            yield "deprecated field of Service"
        for port in spec["ports"]:
            if not DNS_LABEL.match(port["name"]):
                yield f"invalid port name {port['name']}"
    selector = spec.get("selector", {}).get("matchLabels", {}) if kind in ("Deployment", "ReplicaSet") else {}
    labels = template["metadata"]["labels"] if template else {}
    if not selector.items() <= labels.items():
        yield "the selector does not match the object's own pods"


def _pod(template: Manifest) -> Iterator[str]:
    spec = template["spec"]
    for volume in _duplicates(each["name"] for each in spec["volumes"]):
        yield f"duplicate volume {volume}"
    for container in _duplicates(each["name"] for each in containers(template)):
        yield f"duplicate container {container}"
    terms = [*spec.get("topologySpreadConstraints", ())]
    for side in ("podAffinity", "podAntiAffinity"):
        preferred = spec.get("affinity", {}).get(side, {}).get("preferredDuringSchedulingIgnoredDuringExecution", ())
        terms += [each["podAffinityTerm"] for each in preferred]
    if any("labelSelector" not in term for term in terms):
        yield "a term without a labelSelector matches no pod"
    for each in containers(template):
        yield from (f"{each['name']}: {problem}" for problem in _container(each, {v["name"] for v in spec["volumes"]}))


def _container(container: Manifest, volumes: set[str]) -> Iterator[str]:
    for name in _duplicates(entry["name"] for entry in container["env"]):
        yield f"duplicate variable {name}"
    for entry in container["env"]:
        if not isinstance(entry.get("value", ""), str):
            yield f"the value of {entry['name']} is not a string"
    yield from _ports(container)
    yield from _mounts(container, volumes)
    for side in ("requests", "limits"):
        for resource in ("memory", "ephemeral-storage"):
            if not re.fullmatch(r"\d+(Mi|Gi)", f"{container['resources'][side][resource]}"):
                yield f"invalid quantity of bytes {container['resources'][side][resource]}"


def _ports(container: Manifest) -> Iterator[str]:
    for port in container.get("ports", ()):
        if not PORT_NAME.match(port["name"]):
            yield f"invalid port name {port['name']}"
    for port in _duplicates(each["containerPort"] for each in container.get("ports", ())):
        yield f"duplicate port {port}"


def _mounts(container: Manifest, volumes: set[str]) -> Iterator[str]:
    mounts = container["volumeMounts"]
    for path in _duplicates(mount["mountPath"] for mount in mounts):
        yield f"duplicate mount path {path}"
    for mount in mounts:
        if mount["name"] not in volumes:
            yield f"unknown volume {mount['name']}"


def _duplicates(names: Iterable[Hashable]) -> list[Hashable]:
    return [name for name, count in Counter(names).items() if count > 1]


def references(manifests: Sequence[Manifest]) -> set[tuple[str, str]]:
    """Kind and name of every object that the pods, autoscalers and routes of an overlay reference."""
    found = set()
    for _, template in pods(manifests):
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
    for manifest in manifests:
        found |= set(_targets(manifest))
    return found


def _targets(manifest: Manifest) -> Iterator[tuple[str, str]]:
    spec, kind = manifest.get("spec", {}), manifest["kind"]
    if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        target = spec["scaleTargetRef"]
        yield target.get("kind", "Deployment"), target["name"]
    if kind == "Ingress":
        for rule in spec["rules"]:
            yield from (("Service", path["backend"]["service"]["name"]) for path in rule["http"]["paths"])
        yield from (("Secret", entry["secretName"]) for entry in spec["tls"])
    if kind == "HTTPRoute":
        yield from (("Service", ref["name"]) for rule in spec["rules"] for ref in rule["backendRefs"])
    if kind == "TrainJob":
        yield spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]


def selects(selector: Manifest, template: Manifest) -> bool:
    """Does a label selector match these pods?"""
    labels = template["metadata"]["labels"]
    plain = selector.get("matchLabels", {})
    rules = selector.get("matchExpressions", ())
    assert all(rule["operator"] == "In" for rule in rules)
    return plain.items() <= labels.items() and all(labels.get(rule["key"]) in rule["values"] for rule in rules)
