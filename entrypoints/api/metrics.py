"""Prometheus metrics of one server; no name and no label contains text of a prompt or an answer."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from entrypoints.api.admission import Admission
from entrypoints.api.usage import UsageLedger, UsageRecord

TIME_TO_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
TIME_PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2)  # seconds


MAX_KEY_LABELS = 200  # further keys are counted together as "other"


class Metrics:
    """One registry per server, so that two servers in a process stay separate."""

    def __init__(self, admissions: Sequence[Admission], usage: UsageLedger | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        by_model = ("model",)
        self.requests = Counter("glm_requests", "Requests by path and status", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("glm_prompt_tokens", "Prompt tokens", by_model, registry=registry)
        self.completion_tokens = Counter("glm_completion_tokens", "Generated tokens", by_model, registry=registry)
        self.time_to_first_token = Histogram(
            "glm_time_to_first_token_seconds",
            "Time from the request to the first token",
            by_model,
            registry=registry,
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
        )
        self.time_per_token = Histogram(
            "glm_time_per_token_seconds",
            "Time between two tokens of a response",
            by_model,
            registry=registry,
            buckets=TIME_PER_TOKEN_BUCKETS,
        )
        self.info = Gauge("glm_engine_info", "Engine and model of this server", ("engine", "model"), registry=registry)
        waiting = Gauge("glm_queue_length", "Responses waiting for a slot", registry=registry)
        waiting.set_function(lambda: sum(admission.waiting for admission in admissions))
        running = Gauge("glm_running", "Responses being generated", registry=registry)
        running.set_function(lambda: sum(admission.running for admission in admissions))

        self._add_usage(usage or UsageLedger())

    def _add_usage(self, usage: UsageLedger) -> None:
        by_key, registry = ("key", "model"), self.registry
        self._key_labels: set[str] = set()
        self._key_requests = Counter(
            "glm_key_requests", "Finished requests by key and outcome", (*by_key, "outcome"), registry=registry
        )
        self._key_prompt_tokens = Counter(
            "glm_key_prompt_tokens", "Prompt tokens of finished requests by key", by_key, registry=registry
        )
        self._key_completion_tokens = Counter(
            "glm_key_completion_tokens", "Generated tokens of finished requests by key", by_key, registry=registry
        )
        self._key_seconds = Counter(
            "glm_key_seconds", "Duration of finished requests by key, in seconds", by_key, registry=registry
        )
        unwritten = Gauge("glm_usage_unwritten", "Lines of usage that wait for the disk", registry=registry)
        unwritten.set_function(lambda: usage.unwritten)
        lost = Gauge("glm_usage_lost", "Lines of usage that were dropped while the disk failed", registry=registry)
        lost.set_function(lambda: usage.lost)

    def count_usage(self, record: UsageRecord) -> None:
        """Count a finished request of a key."""
        key = record.key
        if key not in self._key_labels:
            if len(self._key_labels) >= MAX_KEY_LABELS:
                key = "other"
            else:
                self._key_labels.add(key)
        self._key_requests.labels(key, record.model, record.outcome).inc()
        self._key_prompt_tokens.labels(key, record.model).inc(record.prompt_tokens)
        self._key_completion_tokens.labels(key, record.model).inc(record.completion_tokens)
        self._key_seconds.labels(key, record.model).inc(record.seconds)

    def text(self) -> bytes:
        """The metrics in the Prometheus exposition format."""
        return generate_latest(self.registry)
