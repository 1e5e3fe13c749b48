import asyncio
import concurrent.futures
import threading

import pytest

from entrypoints.engines.background import BackgroundLoop


async def nothing() -> None:
    pass


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def failing() -> None:
    raise ValueError("no")


def test_a_result_comes_back_from_the_loops_thread():
    loop = BackgroundLoop("test")
    assert loop.result(loop.submit(twice, 21)) == 42
    loop.close(nothing)


def test_an_error_comes_back_as_it_is():
    loop = BackgroundLoop("test")
    with pytest.raises(ValueError, match="no"):
        loop.result(loop.submit(failing))
    loop.close(nothing)


def test_closing_ends_what_runs_then_runs_the_last_and_ends_the_thread():
    loop, order, running = BackgroundLoop("closing"), [], threading.Event()

    async def long() -> None:
        try:
            running.set()
            await asyncio.sleep(300)
        finally:
            order.append("ended")

    async def last() -> None:
        order.append("last")

    future = loop.submit(long)
    assert running.wait(60)
    loop.close(last)
    assert order == ["ended", "last"]
    with pytest.raises(RuntimeError, match="the engine was closed"):
        loop.result(future)
    assert "closing" not in {thread.name for thread in threading.enumerate()}


def test_nothing_can_be_started_after_closing_and_closing_again_does_nothing():
    loop = BackgroundLoop("test")
    loop.close(nothing)
    loop.close(failing)
    with pytest.raises(RuntimeError, match="the engine was closed"):
        loop.submit(twice, 1)


def test_an_error_of_the_last_call_still_ends_the_thread():
    loop = BackgroundLoop("failing")
    with pytest.raises(ValueError, match="no"):
        loop.close(failing)
    assert "failing" not in {thread.name for thread in threading.enumerate()}


def test_cancelling_the_future_cancels_the_coroutine():
    loop, ended, running = BackgroundLoop("test"), threading.Event(), threading.Event()

    async def long() -> None:
        try:
            running.set()
            await asyncio.sleep(300)
        finally:
            ended.set()

    future = loop.submit(long)
    assert running.wait(60)
    future.cancel()
    assert ended.wait(60)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    loop.close(nothing)
