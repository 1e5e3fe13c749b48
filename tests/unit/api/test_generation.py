"""Deltas from an engine's thread to the event loop."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from asgi import run
from scripted_engine import ScriptedEngine, wait_until

from entrypoints.api.generation import GenerationTask, generate, merge
from entrypoints.chat_format.sampling import Sampling


@pytest.fixture
def engine(toy_tokenizer):
    return ScriptedEngine(toy_tokenizer)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def task(engine, script, max_new_tokens=100, **fields):
    return GenerationTask(
        engine.tokenizer.encode(script), Sampling(max_new_tokens=max_new_tokens), is_chat=False, **fields
    )


async def collect(deltas):
    return [delta async for delta in deltas]


def test_only_the_last_delta_has_a_finish_reason(engine, pool):
    for script, limit, reason in (("count 5", 100, "stop"), ("count 5", 5, "length"), ("count 5", 3, "length")):
        deltas = run(collect(generate(engine, pool, task(engine, script, limit))))
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [reason]
        assert "".join(delta.text for delta in deltas) == "01234"[: min(limit, 5)]
        assert sum(len(delta.tokens) for delta in deltas) == min(limit, 5)


def test_an_exception_of_the_engine_is_raised_in_the_event_loop(engine, pool):
    with pytest.raises(RuntimeError, match="the script says so"):
        run(collect(generate(engine, pool, task(engine, "fail 3"))))
    assert engine.running == 0


def test_closing_waits_until_the_engine_has_stopped(engine, pool):
    """Otherwise the slot would be reused while the model still runs."""

    async def scenario():
        async with contextlib.aclosing(generate(engine, pool, task(engine, "count 100 0.01"))) as deltas:
            async for _ in deltas:
                break
        assert engine.running == 0

    run(scenario())


def test_cancellation_stops_an_engine_before_its_first_token(engine, pool):
    async def scenario():
        work = asyncio.create_task(collect(generate(engine, pool, task(engine, "count 1 300"))))
        while not engine.running:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(work, 60)
        assert engine.running == 0

    run(scenario())


def test_the_engine_runs_in_another_thread(engine, pool):
    async def scenario():
        threads = set()
        real = engine.generate

        def spied(*args):
            threads.add(threading.current_thread())
            return real(*args)

        engine.generate = spied
        await collect(generate(engine, pool, task(engine, "count 3")))
        assert threads
        assert threading.current_thread() not in threads

    run(scenario())


def test_merged_choices_keep_their_index_and_order(engine, pool):
    async def scenario():
        parts = [generate(engine, pool, task(engine, f"count {length} 0.001")) for length in (3, 5)]
        found = {0: "", 1: ""}
        async for index, delta in merge(parts):
            found[index] += delta.text
        assert found == {0: "012", 1: "01234"}

    run(scenario())


def test_a_failed_choice_stops_the_others_before_the_exception_is_raised(engine, pool):
    async def scenario():
        parts = [generate(engine, pool, task(engine, script)) for script in ("fail 2", "count 1000 0.01")]
        with pytest.raises(RuntimeError, match="the script says so"):
            await collect(merge(parts))
        assert engine.running == 0

    run(scenario())


def test_closing_the_merge_stops_every_choice(engine, pool):
    async def scenario():
        parts = [generate(engine, pool, task(engine, "count 1000 0.2", 1000)) for _ in range(2)]
        async with contextlib.aclosing(merge(parts)) as deltas:
            async for _ in deltas:
                break

    run(scenario())
    wait_until(lambda: engine.running == 0)  # it would take 200 s without cancellation
