"""Prometheus metrics of one server; names and labels hold nothing of what was asked or answered."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from entrypoints.api.limits import Admission

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2)


class Metrics:
    """One registry, so that two servers in a process do not mix."""

    def __init__(self, admission: Admission, engine: str, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("glm_requests", "Requests by path and status", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("glm_prompt_tokens", "Tokens read", ("model",), registry=registry)
        self.completion_tokens = Counter("glm_completion_tokens", "Tokens written", ("model",), registry=registry)
        self.first = Histogram(
            "glm_time_to_first_token_seconds",
            "From request to first token",
            ("model",),
            registry=registry,
            buckets=FIRST,
        )
        self.each = Histogram(
            "glm_time_per_token_seconds", "Between tokens", ("model",), registry=registry, buckets=EACH
        )
        info = Gauge("glm_engine_info", "Engine and model that serve", ("engine", "model"), registry=registry)
        info.labels(engine, model).set(1)
        waiting = Gauge("glm_queue_length", "Answers that wait for a slot", registry=registry)
        waiting.set_function(lambda: admission.waiting)
        running = Gauge("glm_running", "Answers that are generated now", registry=registry)
        running.set_function(lambda: admission.running)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
