"""Who may run now: slots of the engine, a bounded queue before them, and the limits of each key."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from entrypoints.api.auth import Key


class Refused(Exception):
    """A request that may not run now; `status` 429 or 503, `code` for the error body, seconds until it may be tried."""

    def __init__(self, status: int, code: str, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Admission:
    """Lets `slots` answers run and `queue` more wait. Belongs to one event loop."""

    def __init__(self, slots: int, queue: int) -> None:
        self._free = asyncio.Semaphore(slots)
        self._queue = queue
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._of_key: Counter[str] = Counter()
        self.waiting = 0
        self.running = 0
        self.draining = False

    @contextlib.contextmanager
    def of_key(self, key: Key) -> "contextlib.AbstractContextManager[None]":
        """Count a request against its key; raises Refused (429) beyond its limits."""
        rate = RateLimitItemPerMinute(key.requests_per_minute)
        if not self._rates.hit(rate, key.name):
            until = self._rates.get_window_stats(rate, key.name).reset_time - time.time()
            raise Refused(
                429,
                "rate_limit_exceeded",
                f"key {key.name} may ask {key.requests_per_minute} times a minute",
                max(1, math.ceil(until)),
            )
        if self._of_key[key.name] >= key.concurrent:
            raise Refused(429, "concurrency_limit_exceeded", f"key {key.name} may run {key.concurrent} at a time", 1)
        self._of_key[key.name] += 1
        try:
            yield
        finally:
            self._of_key[key.name] -= 1

    def check(self, wanted: int = 1) -> None:
        """Raise Refused when the server is draining (503) or the queue has no room for `wanted` more answers (429)."""
        if self.draining:
            raise Refused(503, "shutting_down", "the server is shutting down", 5)
        busy = self._free.locked() or self.waiting
        if busy and self.waiting + wanted > self._queue:
            raise Refused(429, "queue_full", f"{self.waiting} requests wait already", 2)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
