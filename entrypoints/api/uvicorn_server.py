"""Uvicorn around the application: the first signal drains, the second ends at once, a failed load ends the process."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from entrypoints.api.app import create_app
from entrypoints.api.server import Serving
from entrypoints.engines.base import Engine

logger = logging.getLogger(__name__)
LAST_SECONDS = 5  # for answers that the end of the drain cuts to tell their callers


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, serving: Serving, drain_seconds: int) -> None:
        super().__init__(config)
        self.serving = serving
        self.drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's own, not raised again at the end: a drained server has ended well."""
        if self.should_exit:
            logger.warning("%s again: ending at once", signal.Signals(sig).name)
            os._exit(128 + sig)  # a model's step may last, and the interpreter would wait for its thread
        admission = self.serving.admission
        unfinished = admission.running + admission.waiting
        logger.info("%s: no new requests; %d answers go on", signal.Signals(sig).name, unfinished)
        admission.draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running answers, but not for ever."""
        asyncio.get_running_loop().call_later(self.drain_seconds, self.serving.admission.over.set)
        await super().shutdown(sockets)


def serve(serving: Serving, load: Callable[[], Engine], listener: socket.socket, drain_seconds: int) -> None:
    """Serve until a signal; raises what the loading raised, if it failed."""
    config = uvicorn.Config(
        create_app(serving),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=drain_seconds + LAST_SECONDS,
    )
    server = _Server(config, serving, drain_seconds)

    def failed() -> None:
        server.should_exit = True

    serving.start(load, failed)
    try:
        server.run(sockets=[listener])
    finally:
        serving.close()
    if serving.error:
        raise serving.error
