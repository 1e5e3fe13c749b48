"""Uvicorn with the application: the first signal drains, the second exits at once, a failed load stops the process."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from entrypoints.api.app import create_app
from entrypoints.api.connections import BACKLOG, LimitedProtocol
from entrypoints.api.state import Models, ServerState

logger = logging.getLogger(__name__)
FINAL_RESPONSE_SECONDS = 5  # after the drain, for the errors that cancelled requests receive


class _DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, state: ServerState, drain_seconds: int) -> None:
        super().__init__(config)
        self.state = state
        self.drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain. Unlike uvicorn, do not raise the signal again at the end: a drained server exits with 0."""
        if self.should_exit:
            logger.warning("%s received again: exiting now", signal.Signals(sig).name)
            os._exit(128 + sig)  # a forward pass may take long, and the interpreter would wait for its thread
        admission = self.state.admission
        unfinished = sum(one.running + one.waiting for one in (admission, self.state.embedding_queue))
        logger.info("%s received: no new requests are accepted; %d still running", signal.Signals(sig).name, unfinished)
        admission.draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, at most `drain_seconds`."""
        asyncio.get_running_loop().call_later(self.drain_seconds, self.state.admission.drain_expired.set)
        await super().shutdown(sockets)


def serve(
    state: ServerState, load: Callable[[], Models], listener: socket.socket, drain_seconds: int, keep_alive_seconds: int
) -> None:
    """Serve until a signal; raises the exception of a failed load.

    If the model is still loading, the process exits here with 0: the interpreter does not wait for that thread, and
    PyTorch aborts a process that exits while one of its threads works (pytorch#38228).
    """
    config = uvicorn.Config(
        create_app(state),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http=LimitedProtocol,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=keep_alive_seconds,
        timeout_graceful_shutdown=drain_seconds + FINAL_RESPONSE_SECONDS,
    )
    server = _DrainingServer(config, state, drain_seconds)

    def stop() -> None:
        server.should_exit = True

    state.start_loading(load, stop)
    try:
        server.run(sockets=[listener])
    finally:
        was_loading = state.is_loading  # a model that is loaded later than this is not closed
        state.close()
    if state.load_error:
        raise state.load_error
    if was_loading:
        logger.info("exiting before the model is loaded")
        logging.shutdown()
        os._exit(0)
