import asyncio
import concurrent.futures
import threading

import pytest

from entrypoints.engines.vllm.event_loop import BackgroundLoop


async def nothing() -> None:
    pass


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def failing() -> None:
    raise ValueError("no")


def test_a_result_is_returned_from_the_thread_of_the_loop():
    loop = BackgroundLoop("test")
    assert loop.result(loop.submit(twice, 21)) == 42
    loop.close(nothing)


def test_an_error_is_raised_unchanged():
    loop = BackgroundLoop("test")
    with pytest.raises(ValueError, match="no"):
        loop.result(loop.submit(failing))
    loop.close(nothing)


def test_closing_cancels_all_tasks_then_runs_the_cleanup_and_ends_the_thread():
    loop, order, running = BackgroundLoop("closing"), [], threading.Event()

    async def long() -> None:
        try:
            running.set()
            await asyncio.sleep(300)
        finally:
            order.append("ended")

    async def cleanup() -> None:
        order.append("cleanup")

    future = loop.submit(long)
    assert running.wait(60)
    loop.close(cleanup)
    assert order == ["ended", "cleanup"]
    with pytest.raises(RuntimeError, match="the engine was closed"):
        loop.result(future)
    assert "closing" not in {thread.name for thread in threading.enumerate()}


def test_nothing_can_be_started_after_closing_and_closing_again_does_nothing():
    loop = BackgroundLoop("test")
    loop.close(nothing)
    loop.close(failing)
    with pytest.raises(RuntimeError, match="the engine was closed"):
        loop.submit(twice, 1)


def test_an_error_of_the_cleanup_still_ends_the_thread():
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
