import asyncio

import pytest

from entrypoints.api.admission import Admission, RequestRejected
from entrypoints.api.auth import ANONYMOUS, ApiKey

ANNA = ApiKey("anna", "", requests_per_minute=3, concurrent=2)
BEN = ApiKey("ben", "", requests_per_minute=3, concurrent=2)


def rejection(action):
    with pytest.raises(RequestRejected) as caught:
        action()
    return caught.value


def admit(admission, key=ANONYMOUS, choices=1):
    """Admit a request that stays until `release`; returns its context manager."""
    admitted = admission.admit(key, choices)
    admitted.__enter__()
    admission.admitted = [*getattr(admission, "admitted", []), admitted]  # garbage collection would release it
    return admitted


def release(admitted):
    admitted.__exit__(None, None, None)


def test_each_key_has_its_own_rate_limit_with_retry_after():
    admission = Admission(1, 0)
    for _ in range(3):
        admission.check_rate_limit(ANNA)
    rejected = rejection(lambda: admission.check_rate_limit(ANNA))
    assert (rejected.status, rejected.code) == (429, "rate_limit_exceeded")
    assert "key anna is limited to 3 requests per minute" in str(rejected)
    assert 55 <= rejected.retry_after <= 60
    admission.check_rate_limit(BEN)


def test_the_anonymous_client_has_no_rate_limit():
    admission = Admission(1, 0)
    for _ in range(2000):
        admission.check_rate_limit(ANONYMOUS)


def test_a_key_has_a_concurrency_limit():
    admission = Admission(8, 8)
    first, _ = admit(admission, ANNA), admit(admission, ANNA)
    rejected = rejection(lambda: admit(admission, ANNA))
    assert (rejected.status, rejected.code, rejected.retry_after) == (429, "concurrency_limit_exceeded", 1)
    admit(admission, BEN)
    release(first)
    admit(admission, ANNA)


def test_the_queue_limit_is_exact():
    """Requests that arrive together count before any of them runs, so a burst cannot exceed the limit."""
    admission = Admission(slots=2, queue=3)
    inside = [admit(admission) for _ in range(5)]
    rejected = rejection(lambda: admit(admission))
    assert (rejected.status, rejected.code) == (429, "queue_full")
    assert rejected.retry_after >= 1
    release(inside.pop())
    admit(admission)


def test_a_request_counts_with_all_its_choices():
    admission = Admission(slots=2, queue=3)
    admit(admission, choices=4)
    assert rejection(lambda: admit(admission, choices=2)).code == "queue_full"
    admit(admission, choices=1)


def test_a_request_larger_than_the_capacity_is_admitted_only_alone():
    admission = Admission(slots=1, queue=0)
    large = admit(admission, choices=8)
    assert rejection(lambda: admit(admission)).code == "queue_full"
    release(large)
    small = admit(admission)
    assert rejection(lambda: admit(admission, choices=8)).code == "queue_full"
    release(small)
    assert admission.waiting == 0


def test_no_request_is_admitted_while_draining():
    admission = Admission(2, 2)
    admission.draining = True
    rejected = rejection(lambda: admit(admission))
    assert (rejected.status, rejected.code) == (503, "shutting_down")
    assert rejected.retry_after >= 1


def test_slots_are_assigned_in_order_and_counted():
    async def scenario():
        admission, order = Admission(slots=2, queue=10), []

        async def generate(number, admitted):
            async with admission.slot(admitted):
                order.append(number)
                assert admission.running <= 2
                await asyncio.sleep(0.01)

        with admission.admit(ANONYMOUS, 6) as admitted:
            assert (admission.waiting, admission.running) == (6, 0)
            await asyncio.gather(*(generate(number, admitted) for number in range(6)))
        assert order == list(range(6))
        assert (admission.waiting, admission.running) == (0, 0)

    asyncio.run(scenario())


def test_cancelled_waiters_do_not_leak_slots():
    async def scenario():
        admission = Admission(slots=1, queue=10)

        async def generate():
            with admission.admit(ANONYMOUS, 1) as admitted:
                async with admission.slot(admitted):
                    await asyncio.sleep(10)

        for _ in range(20):
            tasks = [asyncio.create_task(generate()) for _ in range(5)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (admission.running, admission.waiting) == (1, 4)
            for task in tasks[::-1]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(scenario())
