"""JSON schemas of the custom resources that our components use, written from their documentation.

Strict where we write something: an unknown field is refused. A pod template inside one is checked as Kubernetes' own.
"""

TEXT, NUMBER, TRUTH = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
ANYTHING = {"type": "object"}


def record(required: tuple[str, ...] = (), **properties: dict) -> dict:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def array(items: dict) -> dict:
    """At least one of them."""
    return {"type": "array", "items": items, "minItems": 1}


def choice(*values: str) -> dict:
    return {"enum": [*values]}


def resource(api: str, kind: str, spec: dict) -> dict:
    """A whole object in a namespace."""
    metadata = record(("name", "namespace"), name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    fields = {"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return record(("apiVersion", "kind", "metadata", "spec"), **fields)


MATCH = record(matchLabels=TEXTS)
REPLICATED_JOB = record(
    ("name", "template"),
    name=TEXT,
    replicas=NUMBER,
    template=record(("spec",), metadata=record(labels=TEXTS), spec=ANYTHING),  # the spec of a Job
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
    suspend=TRUTH,
    ttlSecondsAfterFinished=NUMBER,
    network=record(enableDNSHostnames=TRUTH, subdomain=TEXT, publishNotReadyAddresses=TRUTH),
    failurePolicy=record(maxRestarts=NUMBER, rules=array(FAILURE_RULE)),
)
TRAINER = "trainer.kubeflow.org/v1alpha1"
ALERT = record(
    ("alert", "expr"),
    alert=TEXT,
    expr=TEXT,
    labels=TEXTS,
    annotations=TEXTS,
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
            advanced=record(horizontalPodAutoscalerConfig=record(behavior=ANYTHING)),
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
            suspend=TRUTH,
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
