"""The state of one server: its engine and how it came up, who may ask, what runs; no route is here."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from entrypoints.api.auth import KeyRing
from entrypoints.api.limits import Admission
from entrypoints.api.metrics import Metrics
from entrypoints.engines.base import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What `glm serve` is told; sizes in bytes and requests."""

    model: str  # name in /v1/models
    slots: int
    queue: int = 64
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    log_prompts: bool = False
    root_path: str = ""


class Serving:
    """One server. `load` runs in a thread, so that /healthz answers from the first second."""

    def __init__(self, options: Options, keys: KeyRing, engine_name: str) -> None:
        self.options = options
        self.keys = keys
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.admission = Admission(options.slots, options.queue)
        self.metrics = Metrics(self.admission, engine_name, options.model)
        # one thread an answer: a waiting request holds none
        self.pool = ThreadPoolExecutor(options.slots, thread_name_prefix="answer")

    def start(self, load: Callable[[], Engine], failed: Callable[[], None]) -> None:
        """Load the engine in the background; `failed` is called after `error` is set."""

        def work() -> None:
            try:
                self.engine = load()
                logger.info("ready: %s on %s", self.options.model, self.engine.name)
            except BaseException as error:  # noqa: BLE001 - the command raises it in its own thread
                self.error = error
                failed()

        threading.Thread(target=work, name="load", daemon=True).start()

    @property
    def broken(self) -> str | None:
        """Why the process should be replaced, if it should."""
        return self.engine.broken if self.engine else None

    @property
    def ready(self) -> bool:
        """May requests come?"""
        return self.engine is not None and self.broken is None and not self.admission.draining

    def models(self) -> dict[str, str | None]:
        """Names to ask for, and the adapter each stands for; None is the model itself."""
        adapters = self.engine.adapters if self.engine else {}
        return {self.options.model: None, **{name: name for name in adapters}}

    def close(self) -> None:
        """Give engine and threads back."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.engine:
            self.engine.close()
