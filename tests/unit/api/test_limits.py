import asyncio

import pytest

from entrypoints.api.auth import ANONYMOUS, Key
from entrypoints.api.limits import Admission, Refused

ANNA = Key("anna", "", requests_per_minute=3, concurrent=2)
BEN = Key("ben", "", requests_per_minute=3, concurrent=2)


def refusal(action):
    with pytest.raises(Refused) as caught:
        action()
    return caught.value


def enter(admission, key=ANONYMOUS, answers=1):
    """Let a request in and leave it there; its context manager."""
    admitted = admission.admit(key, answers)
    admitted.__enter__()
    admission.inside = [*getattr(admission, "inside", []), admitted]  # one that nobody holds would leave by itself
    return admitted


def leave(admitted):
    admitted.__exit__(None, None, None)


def test_a_key_has_its_own_rate_and_is_told_when_to_come_back():
    admission = Admission(1, 0)
    for _ in range(3):
        admission.count(ANNA)
    refused = refusal(lambda: admission.count(ANNA))
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert "anna may ask 3 times a minute" in str(refused)
    assert 55 <= refused.retry_after <= 60
    admission.count(BEN)


def test_the_anonymous_caller_has_no_rate():
    admission = Admission(1, 0)
    for _ in range(2000):
        admission.count(ANONYMOUS)


def test_a_key_may_run_so_many_at_a_time():
    admission = Admission(8, 8)
    first, _ = enter(admission, ANNA), enter(admission, ANNA)
    refused = refusal(lambda: enter(admission, ANNA))
    assert (refused.status, refused.code, refused.retry_after) == (429, "concurrency_limit_exceeded", 1)
    enter(admission, BEN)
    leave(first)
    enter(admission, ANNA)


def test_the_queue_is_full_to_the_answer():
    """Requests that come in the same moment count before any of them runs: a burst cannot slip in."""
    admission = Admission(slots=2, queue=3)
    inside = [enter(admission) for _ in range(5)]
    refused = refusal(lambda: enter(admission))
    assert (refused.status, refused.code) == (429, "queue_full")
    assert refused.retry_after >= 1
    leave(inside.pop())
    enter(admission)


def test_a_request_counts_with_all_its_answers():
    admission = Admission(slots=2, queue=3)
    enter(admission, answers=4)
    assert refusal(lambda: enter(admission, answers=2)).code == "queue_full"
    enter(admission, answers=1)


def test_a_request_larger_than_the_queue_runs_when_it_is_alone():
    admission = Admission(slots=1, queue=0)
    large = enter(admission, answers=8)
    assert refusal(lambda: enter(admission)).code == "queue_full"
    leave(large)
    small = enter(admission)
    assert refusal(lambda: enter(admission, answers=8)).code == "queue_full"
    leave(small)
    assert admission.waiting == 0


def test_while_draining_nobody_new_is_let_in():
    admission = Admission(2, 2)
    admission.draining = True
    refused = refusal(lambda: enter(admission))
    assert (refused.status, refused.code) == (503, "shutting_down")
    assert refused.retry_after >= 1


def test_slots_are_given_in_turn_and_counted_to_the_end():
    async def scene():
        admission, order = Admission(slots=2, queue=10), []

        async def answer(number, ticket):
            async with admission.slot(ticket):
                order.append(number)
                assert admission.running <= 2
                await asyncio.sleep(0.01)

        with admission.admit(ANONYMOUS, 6) as ticket:
            assert (admission.waiting, admission.running) == (6, 0)
            await asyncio.gather(*(answer(number, ticket) for number in range(6)))
        assert order == list(range(6))
        assert (admission.waiting, admission.running) == (0, 0)

    asyncio.run(scene())


def test_a_cancelled_wait_loses_no_slot():
    async def scene():
        admission = Admission(slots=1, queue=10)

        async def answer():
            with admission.admit(ANONYMOUS, 1) as ticket:
                async with admission.slot(ticket):
                    await asyncio.sleep(10)

        for _ in range(20):
            tasks = [asyncio.create_task(answer()) for _ in range(5)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (admission.running, admission.waiting) == (1, 4)
            for task in tasks[::-1]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(scene())
