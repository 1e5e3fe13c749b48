"""Admission control: engine slots, a bounded queue in front of them, and the limits of each API key."""

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

from entrypoints.api.auth import ApiKey
from entrypoints.api.usage import UsageLedger


class RequestRejected(Exception):
    """A request that cannot run now: HTTP status 429 or 503, error code, and `retry_after` in seconds."""

    def __init__(self, status: int, code: str, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass
class AdmittedRequest:
    """One admitted request; `waiting` of its choices have no slot yet."""

    waiting: int


class Admission:
    """Runs up to `slots` choices and queues up to `queue` more. Belongs to one event loop."""

    def __init__(self, slots: int, queue: int, usage: UsageLedger | None = None) -> None:
        self._usage = usage or UsageLedger()
        self._free_slots = asyncio.Semaphore(slots)
        self._capacity = slots + queue
        self._rate_limiter = MovingWindowRateLimiter(MemoryStorage())
        self._requests_by_key: Counter[str] = Counter()
        self.waiting = 0
        self.running = 0
        self.draining = False
        self.drain_expired = asyncio.Event()  # set when --drain-seconds have passed: running requests are cancelled

    def check_rate_limit(self, key: ApiKey) -> None:
        """Count a request against the rate limit of its key; raises RequestRejected (429) above the limit."""
        if key.requests_per_minute is None:
            return
        rate = RateLimitItemPerMinute(key.requests_per_minute)
        if not self._rate_limiter.hit(rate, key.name):
            seconds = self._rate_limiter.get_window_stats(rate, key.name).reset_time - time.time()
            raise RequestRejected(
                429,
                "rate_limit_exceeded",
                f"key {key.name} is limited to {key.requests_per_minute} requests per minute",
                max(1, math.ceil(seconds)),
            )

    @contextlib.contextmanager
    def admit(self, key: ApiKey, choices: int) -> Iterator[AdmittedRequest]:
        """Reserve capacity for the choices of a request until the context ends.

        Raises RequestRejected: 503 while draining; 429 when the key has used its tokens of the day or is at its
        concurrency limit, or the queue is full.
        A request with more choices than the whole capacity is admitted only when nothing else runs or waits.
        """
        if self.draining:
            raise RequestRejected(503, "shutting_down", "the server is shutting down", 5)
        self._check_quota(key)
        if key.concurrent is not None and self._requests_by_key[key.name] >= key.concurrent:
            message = f"key {key.name} is limited to {key.concurrent} concurrent requests"
            raise RequestRejected(429, "concurrency_limit_exceeded", message, 1)
        used = self.running + self.waiting
        if used and used + choices > self._capacity:
            message = f"the queue is full: {self.running} running, {self.waiting} waiting"
            raise RequestRejected(429, "queue_full", message, 2)
        admitted = AdmittedRequest(choices)
        self.waiting += choices
        self._requests_by_key[key.name] += 1
        try:
            yield admitted
        finally:
            self.waiting -= admitted.waiting
            self._requests_by_key[key.name] -= 1

    def _check_quota(self, key: ApiKey) -> None:
        """Raise RequestRejected (429) if the requests of a key that finished today used up its tokens."""
        limit = key.tokens_per_day
        if limit is None or (used := self._usage.tokens_today(key.name)) < limit:
            return
        opens = f"{self._usage.next_day():%Y-%m-%dT%H:%M:%SZ}"
        message = f"key {key.name} has used {used} of {limit} tokens today; requests are accepted again at {opens}"
        raise RequestRejected(429, "insufficient_quota", message, math.ceil(self._usage.seconds_to_next_day()))

    @contextlib.asynccontextmanager
    async def slot(self, admitted: AdmittedRequest) -> AsyncIterator[None]:
        """Wait for a slot for one choice of an admitted request, and hold it."""
        await self._free_slots.acquire()
        admitted.waiting -= 1
        self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free_slots.release()
