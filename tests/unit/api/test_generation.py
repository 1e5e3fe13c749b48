"""The way from an engine's thread to the event loop."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from asgi import run
from scripted_engine import ScriptedEngine, wait_until

from entrypoints.api.generation import Task, generate, merged
from entrypoints.sampling import Sampling


@pytest.fixture
def engine(toy_tokenizer):
    return ScriptedEngine(toy_tokenizer)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def task(engine, script, most=100, **fields):
    return Task(engine.tokenizer.encode(script), Sampling(max_new_tokens=most), chat=False, **fields)


async def collected(pieces):
    return [piece async for piece in pieces]


def test_the_last_piece_alone_has_a_finish_reason(engine, pool):
    for script, most, reason in (("count 5", 100, "stop"), ("count 5", 5, "length"), ("count 5", 3, "length")):
        pieces = run(collected(generate(engine, pool, task(engine, script, most))))
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
        assert "".join(piece.text for piece in pieces) == "01234"[: min(most, 5)]
        assert sum(len(piece.tokens) for piece in pieces) == min(most, 5)


def test_an_exception_of_the_engine_is_raised_where_it_is_awaited(engine, pool):
    with pytest.raises(RuntimeError, match="the script says so"):
        run(collected(generate(engine, pool, task(engine, "fail 3"))))
    assert engine.running == 0


def test_leaving_waits_until_the_engine_has_stopped(engine, pool):
    """Otherwise the slot would be given on while the model still runs."""

    async def scene():
        async with contextlib.aclosing(generate(engine, pool, task(engine, "count 100 0.01"))) as pieces:
            async for _ in pieces:
                break
        assert engine.running == 0

    run(scene())


def test_cancelling_reaches_an_engine_that_has_no_token_yet(engine, pool):
    async def scene():
        work = asyncio.create_task(collected(generate(engine, pool, task(engine, "count 1 300"))))
        while not engine.running:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(work, 60)
        assert engine.running == 0

    run(scene())


def test_the_engine_runs_beside_the_event_loop(engine, pool):
    async def scene():
        threads = set()
        real = engine.generate

        def spied(*args):
            threads.add(threading.current_thread())
            return real(*args)

        engine.generate = spied
        await collected(generate(engine, pool, task(engine, "count 3")))
        assert threads
        assert threading.current_thread() not in threads

    run(scene())


def test_merged_answers_keep_their_numbers_and_order(engine, pool):
    async def scene():
        parts = [generate(engine, pool, task(engine, f"count {length} 0.001")) for length in (3, 5)]
        found = {0: "", 1: ""}
        async for number, piece in merged(parts):
            found[number] += piece.text
        assert found == {0: "012", 1: "01234"}

    run(scene())


def test_a_failure_of_one_closes_the_others_before_it_is_raised(engine, pool):
    async def scene():
        parts = [generate(engine, pool, task(engine, script)) for script in ("fail 2", "count 1000 0.01")]
        with pytest.raises(RuntimeError, match="the script says so"):
            await collected(merged(parts))
        assert engine.running == 0

    run(scene())


def test_closing_the_merge_closes_every_answer(engine, pool):
    async def scene():
        parts = [generate(engine, pool, task(engine, "count 1000 0.2", 1000)) for _ in range(2)]
        async with contextlib.aclosing(merged(parts)) as pieces:
            async for _ in pieces:
                break

    run(scene())
    wait_until(lambda: engine.running == 0)  # 200 s by themselves
