"""An event loop in a thread of its own, for blocking callers in other threads."""

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Awaitable, Callable
from multiprocessing import resource_tracker
from typing import Any

CLOSED = "the engine was closed"


class BackgroundLoop:
    """Runs coroutines for other threads until it is closed."""

    def __init__(self, name: str) -> None:
        self.closed = False
        self._loop = asyncio.new_event_loop()
        self._guard = threading.Lock()
        self._tasks: set[asyncio.Task] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Awaitable], *arguments: Any) -> concurrent.futures.Future:
        """Start `function(*arguments)` in the loop; cancelling the future cancels it. Raises RuntimeError if closed."""
        with self._guard:
            if self.closed:
                raise RuntimeError(CLOSED)
            return asyncio.run_coroutine_threadsafe(self._tracked(function, *arguments), self._loop)

    @staticmethod
    def result(future: concurrent.futures.Future) -> Any:
        """Wait for its result; raises its error, or RuntimeError when `close` ended it."""
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise RuntimeError(CLOSED) from error

    def close(self, last: Callable[[], Awaitable]) -> None:
        """Cancel what runs, wait for that, run `last()`, end the thread; a second call does nothing."""
        with self._guard:
            if self.closed:
                return
            self.closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end(last), self._loop)
        try:
            ending.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        # Processes started in this thread inherit the mask. Ctrl-C reaches all processes of a terminal, and those must
        # go on while this one lets running answers finish. Starting Python's tracker later would lift the mask again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _tracked(self, function: Callable[..., Awaitable], *arguments: Any) -> Any:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            return await function(*arguments)
        finally:
            self._tasks.discard(task)

    async def _end(self, last: Callable[[], Awaitable]) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await last()
