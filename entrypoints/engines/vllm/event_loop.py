"""An event loop in a thread of its own, for blocking callers in other threads."""

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable, Coroutine
from multiprocessing import resource_tracker
from typing import Any, ParamSpec, TypeVar

CLOSED = "the engine was closed"
P = ParamSpec("P")
T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for other threads until it is closed."""

    def __init__(self, name: str) -> None:
        self.closed = False
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Start `function(...)` in the loop; cancelling the future cancels it. Raises RuntimeError if closed."""
        with self._lock:
            if self.closed:
                raise RuntimeError(CLOSED)
            return asyncio.run_coroutine_threadsafe(self._tracked(function, *args, **kwargs), self._loop)

    @staticmethod
    def result(future: concurrent.futures.Future[T]) -> T:
        """Wait for the result; raises the coroutine's error, or RuntimeError if `close` cancelled it."""
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise RuntimeError(CLOSED) from error

    def close(self, cleanup: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel all tasks, wait for them, run `cleanup()` and end the thread; a second call does nothing."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            ending = asyncio.run_coroutine_threadsafe(self._shut_down(cleanup), self._loop)
        try:
            ending.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        # Processes that this thread starts inherit the signal mask. Ctrl-C reaches every process of a terminal, and
        # these must continue while running answers finish. Python's resource tracker would reset the mask if it were
        # started later.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _tracked(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.current_task()
        assert task is not None  # it runs in the loop
        self._tasks.add(task)
        try:
            return await function(*args, **kwargs)
        finally:
            self._tasks.discard(task)

    async def _shut_down(self, cleanup: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await cleanup()
