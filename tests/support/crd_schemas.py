"""JSON schemas of the custom resources that the components use, written from their documentation.

They contain only the fields that the manifests set and reject all others. Pod templates inside are validated separately
with the schemas of Kubernetes.
"""

from typing import Any

Schema = dict[str, Any]


TEXT, NUMBER, BOOLEAN = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRING_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
ANY_OBJECT = {"type": "object"}


def record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def array(items: Schema) -> Schema:
    """A non-empty array."""
    return {"type": "array", "items": items, "minItems": 1}


def choice(*values: str) -> Schema:
    """One of the strings."""
    return {"enum": [*values]}


def resource(api: str, kind: str, spec: Schema) -> Schema:
    """A namespaced object."""
    metadata = record(("name", "namespace"), name=TEXT, namespace=TEXT, labels=STRING_MAP, annotations=STRING_MAP)
    fields = {"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return record(("apiVersion", "kind", "metadata", "spec"), **fields)


MATCH = record(matchLabels=STRING_MAP)
REPLICATED_JOB = record(
    ("name", "template"),
    name=TEXT,
    replicas=NUMBER,
    template=record(("spec",), metadata=record(labels=STRING_MAP), spec=ANY_OBJECT),  # the spec of a Job
)
FAILURE_RULE = record(
    ("name", "action"),
    name=TEXT,
    action=choice("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    onJobFailureReasons=array(choice("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy")),
    targetReplicatedJobs=array(TEXT),
)
JOBSET_SPEC = record(
    ("replicatedJobs",),
    replicatedJobs=array(REPLICATED_JOB),
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=NUMBER,
    network=record(enableDNSHostnames=BOOLEAN, subdomain=TEXT, publishNotReadyAddresses=BOOLEAN),
    failurePolicy=record(maxRestarts=NUMBER, rules=array(FAILURE_RULE)),
)
TRAINER = "trainer.kubeflow.org/v1alpha1"
ALERT = record(
    ("alert", "expr"),
    alert=TEXT,
    expr=TEXT,
    labels=STRING_MAP,
    annotations=STRING_MAP,
    **{"for": {"type": "string", "pattern": r"^\d+[smh]$"}},
)
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
ROUTE_RULE = record(
    matches=array(record(path=record(type=choice("Exact", "PathPrefix", "RegularExpression"), value=TEXT))),
    timeouts=record(request=DURATION, backendRequest=DURATION),
    backendRefs=array(record(("name", "port"), name=TEXT, port=NUMBER, weight=NUMBER)),
)
TRIGGER = record(
    ("type", "metadata"),
    type=choice("prometheus"),
    metadata=record(("serverAddress", "query", "threshold"), serverAddress=TEXT, query=TEXT, threshold=TEXT),
)

SCHEMAS = [
    resource(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        record(
            ("selector", "endpoints"),
            jobLabel=TEXT,
            selector=MATCH,
            endpoints=array(record(("port",), port=TEXT, path=TEXT, interval={"type": "string", "pattern": r"^\d+s$"})),
        ),
    ),
    resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        record(("groups",), groups=array(record(("name", "rules"), name=TEXT, rules=array(ALERT)))),
    ),
    resource(
        "keda.sh/v1alpha1",
        "ScaledObject",
        record(
            ("scaleTargetRef", "triggers"),
            scaleTargetRef=record(("name",), name=TEXT),
            minReplicaCount=NUMBER,
            maxReplicaCount=NUMBER,
            cooldownPeriod=NUMBER,
            triggers=array(TRIGGER),
            advanced=record(horizontalPodAutoscalerConfig=record(behavior=ANY_OBJECT)),
        ),
    ),
    resource("jobset.x-k8s.io/v1alpha2", "JobSet", JOBSET_SPEC),
    resource(
        TRAINER,
        "TrainJob",
        record(
            ("runtimeRef",),
            runtimeRef=record(
                ("name",), apiGroup=TEXT, kind=choice("TrainingRuntime", "ClusterTrainingRuntime"), name=TEXT
            ),
            trainer=record(numNodes=NUMBER),
            suspend=BOOLEAN,
        ),
    ),
    resource(
        TRAINER,
        "TrainingRuntime",
        record(
            ("template",),
            mlPolicy=record(numNodes=NUMBER, torch=record(numProcPerNode={"type": ["string", "integer"]})),
            template=record(("spec",), spec=JOBSET_SPEC),
        ),
    ),
    resource("kueue.x-k8s.io/v1beta2", "LocalQueue", record(("clusterQueue",), clusterQueue=TEXT)),
    resource(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        record(
            parentRefs=array(record(("name",), name=TEXT, namespace=TEXT)),
            hostnames=array(TEXT),
            rules=array(ROUTE_RULE),
        ),
    ),
]
BY_KIND = {schema["properties"]["kind"]["const"]: schema for schema in SCHEMAS}
