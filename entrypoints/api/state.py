"""The state of one server: its engine and how it loads, API keys, admission, metrics. No routes."""

import gc
import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import anyio

from entrypoints.api.admission import Admission, RequestRejected
from entrypoints.api.auth import KeyRing
from entrypoints.api.errors import ApiError
from entrypoints.api.metrics import Metrics
from entrypoints.api.usage import UsageLedger, UsageRecord
from entrypoints.engines.base import Engine
from entrypoints.engines.llamacpp.embeddings import EmbeddingEngine

logger = logging.getLogger(__name__)
MAX_PARALLEL_VALIDATIONS = 1  # the JSON parser stops all other threads: the event loop would wait for several
EMBEDDING_SLOTS = 4  # embedding requests that run at the same time, and inputs of one request


@dataclass(frozen=True)
class Models:
    """The loaded models of a server; at least one."""

    engine: Engine | None = None
    embedder: EmbeddingEngine | None = None


@dataclass(frozen=True)
class ServerOptions:
    """Options of `glm serve` that the application needs."""

    model: str | None  # name in /v1/models; None: no chat model
    slots: int  # choices generated at the same time
    embeddings: str | None = None  # name of the embedding model in /v1/models; None: there is none
    queue: int = 64  # choices that may wait for a slot; also embedding requests
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None  # names in the Host header; None: any
    max_body_bytes: int = 4 << 20
    log_prompts: bool = False
    metrics_need_key: bool = False  # where requests need one
    root_path: str = ""


class ServerState:
    """One server. The engine loads in a thread, so that /healthz responds from the first second."""

    def __init__(
        self, options: ServerOptions, keys: KeyRing, engine_name: str, usage: UsageLedger | None = None
    ) -> None:
        self.options = options
        self.keys = keys
        self.engine: Engine | None = None
        self.embedder: EmbeddingEngine | None = None
        self.load_error: BaseException | None = None
        self._loader: threading.Thread | None = None
        self.usage = usage or UsageLedger()
        self.admission = Admission(options.slots, options.queue, self.usage)
        self.embedding_queue = Admission(EMBEDDING_SLOTS, options.queue)
        self.validations = anyio.CapacityLimiter(MAX_PARALLEL_VALIDATIONS)
        self.metrics = Metrics((self.admission, self.embedding_queue), self.usage)
        if options.model is not None:
            self.metrics.info.labels(engine_name, options.model).set(1)
        if options.embeddings is not None:
            self.metrics.info.labels("llamacpp", options.embeddings).set(1)
        # one thread per running choice; a waiting choice holds none
        self.pool = ThreadPoolExecutor(options.slots, thread_name_prefix="generate")
        self.embedding_pool = ThreadPoolExecutor(EMBEDDING_SLOTS, thread_name_prefix="embed")

    def start_loading(self, load: Callable[[], Models], on_failure: Callable[[], None]) -> None:
        """Load the models in the background; `on_failure` is called after `load_error` is set."""

        def work() -> None:
            """Load the models, or keep the error for the main thread."""
            try:
                models = load()
                # otherwise each full collection visits 400,000 objects of the libraries, and stops the server for 0.2 s
                gc.collect()
                gc.freeze()
                self.engine, self.embedder = models.engine, models.embedder
                names = [name for name in (self.options.model, self.options.embeddings) if name is not None]
                logger.info("ready: %s on %s", " and ".join(names), self.engine.name if self.engine else "llamacpp")
            except BaseException as error:  # noqa: BLE001 - raised again by the command in the main thread
                self.load_error = error
                on_failure()

        self._loader = threading.Thread(target=work, name="load", daemon=True)
        self._loader.start()

    def require_engine(self) -> Engine:
        """The loaded engine; raises RequestRejected (503) while it is not ready, ApiError (404) if there is none."""
        if self.options.model is None:
            raise ApiError(404, "this server has no chat model; start it with --model", "model", "model_not_found")
        if self.engine is None:
            raise RequestRejected(503, "loading", "the model is loading", 5)
        if self.engine.fatal_error:
            raise RequestRejected(503, "broken", self.engine.fatal_error, 30)
        return self.engine

    def require_embedder(self) -> tuple[str, EmbeddingEngine]:
        """Name and engine of the embedding model; raises as `require_engine`."""
        name = self.options.embeddings
        if name is None:
            message = "this server has no embedding model; start it with --embeddings FILE.gguf"
            raise ApiError(404, message, "model", "model_not_found")
        if self.embedder is None:
            raise RequestRejected(503, "loading", "the model is loading", 5)
        return name, self.embedder

    @property
    def is_loading(self) -> bool:
        """Whether the thread that loads the models is still running."""
        return self._loader is not None and self._loader.is_alive()

    @property
    def fatal_error(self) -> str | None:
        """Why the process must be restarted; None while the engine works."""
        return self.engine.fatal_error if self.engine else None

    @property
    def ready(self) -> bool:
        """Whether the server accepts requests."""
        wanted = ((self.options.model, self.engine), (self.options.embeddings, self.embedder))
        is_loaded = all(name is None or engine is not None for name, engine in wanted)
        return is_loaded and self.fatal_error is None and not self.admission.draining

    def models(self) -> dict[str, str | None]:
        """Names of chat models, each with the name of its adapter; None is the base model."""
        if self.options.model is None:
            return {}
        adapters = self.engine.adapters if self.engine else {}
        return {self.options.model: None, **{name: name for name in adapters}}

    def model_not_found(self, name: str, available: Collection[str]) -> ApiError:
        """The error (404) of a request that names another model than the available ones."""
        message = f"model {name!r} not found; available models: {', '.join(available)}"
        return ApiError(404, message, "model", "model_not_found")

    def count_usage(self, record: UsageRecord) -> None:
        """Count a finished request in the metrics and in the ledger."""
        self.metrics.count_usage(record)
        self.usage.add(record)

    def close(self) -> None:
        """Release the models, the threads and the ledger."""
        self.usage.close()
        for pool in (self.pool, self.embedding_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for engine in (self.engine, self.embedder):
            if engine:
                engine.close()
