"""Who may run now: slots of the engine, a bounded queue before them, and the limits of each key."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

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


@dataclass
class Ticket:
    """One request that was let in; `waiting` of its answers have no slot yet."""

    waiting: int


class Admission:
    """Lets `slots` answers run and `queue` more wait. Belongs to one event loop."""

    def __init__(self, slots: int, queue: int) -> None:
        self._free = asyncio.Semaphore(slots)
        self._room = slots + queue
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._of_key: Counter[str] = Counter()
        self.waiting = 0
        self.running = 0
        self.draining = False
        self.over = asyncio.Event()  # the drain has lasted long enough: running answers end now

    def count(self, key: Key) -> None:
        """Count a request against its key's rate; raises Refused (429) beyond it."""
        if key.requests_per_minute is None:
            return
        rate = RateLimitItemPerMinute(key.requests_per_minute)
        if not self._rates.hit(rate, key.name):
            until = self._rates.get_window_stats(rate, key.name).reset_time - time.time()
            raise Refused(
                429,
                "rate_limit_exceeded",
                f"key {key.name} may ask {key.requests_per_minute} times a minute",
                max(1, math.ceil(until)),
            )

    @contextlib.contextmanager
    def admit(self, key: Key, answers: int) -> Iterator[Ticket]:
        """Keep room for a request's answers, from now until its end.

        Raises Refused: 503 while draining; 429 when the key runs as much as it may, or the queue has no room. A request
        for more answers than there is room for is let in when nothing else is there.
        """
        if self.draining:
            raise Refused(503, "shutting_down", "the server is shutting down", 5)
        if key.concurrent is not None and self._of_key[key.name] >= key.concurrent:
            raise Refused(429, "concurrency_limit_exceeded", f"key {key.name} may run {key.concurrent} at a time", 1)
        taken = self.running + self.waiting
        if taken and taken + answers > self._room:
            raise Refused(429, "queue_full", f"{self.running} answers run and {self.waiting} wait already", 2)
        ticket = Ticket(answers)
        self.waiting += answers
        self._of_key[key.name] += 1
        try:
            yield ticket
        finally:
            self.waiting -= ticket.waiting
            self._of_key[key.name] -= 1

    @contextlib.asynccontextmanager
    async def slot(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a slot for one answer of an admitted request, and hold it."""
        await self._free.acquire()
        ticket.waiting -= 1
        self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
