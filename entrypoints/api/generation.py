"""From an engine's thread to the event loop: one choice as a sequence of deltas.

Stop strings, log probabilities and tool calls are handled here. Cancelling the iterator stops the engine before the
slot is released.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from entrypoints.chat_format.answer_parser import AnswerParser, IncrementalDetokenizer, decode
from entrypoints.chat_format.sampling import Sampling
from entrypoints.chat_format.tool_calls import ToolCall
from entrypoints.engines.base import Engine, Token


@dataclass(frozen=True)
class GenerationTask:
    """One choice to generate."""

    prompt: list[int]
    sampling: Sampling
    adapter: str | None = None
    stop: Sequence[str] = ()
    tools: Sequence[str] = ()
    single_call: bool = False  # the answer ends after its first tool call
    is_chat: bool = True  # False: a text completion, which is not parsed as a chat answer
    echo_from: int | None = None  # the response starts with the prompt from this id on
    continues: bool = True  # False: nothing is generated after the prompt


@dataclass
class Delta:
    """What one step added to a choice; the last delta has a `finish_reason`."""

    text: str = ""
    echoed: list[Token] = field(default_factory=list)  # ids of the prompt with their log probabilities
    tokens: list[Token] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None


class StopStrings:
    """Cuts a growing text before the stop string that is completed first, even one that spans several deltas."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can no longer be part of a stop string."""
        if not self._stop:
            return text
        self._held += text
        matches = ((self._held.find(stop), len(stop)) for stop in self._stop)
        ends = [(start + length, start) for start, length in matches if start >= 0]
        if ends:
            self.found = True
            released, self._held = self._held[: min(ends)[1]], ""
            return released
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def finish(self) -> str:
        """The held-back text, which did not become a stop string."""
        released, self._held = self._held, ""
        return released

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text are a prefix of this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


class _TextReader(Protocol):
    """Turns ids into text for the client."""

    def feed(self, id_: int, /) -> str: ...

    def finish(self) -> str: ...


async def generate(engine: Engine, pool: ThreadPoolExecutor, task: GenerationTask) -> AsyncGenerator[Delta, None]:
    """Yield deltas as they are generated; an exception of the engine is raised here."""
    parser = AnswerParser(engine.tokenizer, task.tools) if task.is_chat else None
    reader: _TextReader = parser or IncrementalDetokenizer(engine.tokenizer, continues=True)
    stop, count = StopStrings(task.stop), 0
    if task.echo_from is not None:
        yield await _echo(engine, pool, task)
    if not task.continues:
        yield Delta(finish_reason="length")
        return
    async with contextlib.aclosing(_tokens(engine, pool, task)) as tokens:
        async for token in tokens:
            count += 1
            delta = Delta(stop.feed(reader.feed(token)), tokens=[token])
            if stop.found:
                delta.finish_reason = "stop"
                yield delta
                return
            yield delta
            if task.single_call and parser and parser.answer.tool_calls:
                break
    is_cut = count >= task.sampling.max_new_tokens
    last = Delta(stop.feed(parser.finish(is_cut) if parser else reader.finish()))
    if not stop.found:
        last.text += stop.finish()
    last.tool_calls = parser.answer.tool_calls if parser else []
    last.finish_reason = "tool_calls" if last.tool_calls else "length" if is_cut and not stop.found else "stop"
    yield last


async def _echo(engine: Engine, pool: ThreadPoolExecutor, task: GenerationTask) -> Delta:
    """The prompt as a part of the response, with log probabilities if they are requested."""
    prompt, top_logprobs = task.prompt, task.sampling.top_logprobs
    text = decode(prompt[task.echo_from :], engine.tokenizer)
    if top_logprobs is None:
        return Delta(text)
    cancelled = threading.Event()
    loop = asyncio.get_running_loop()
    worker = loop.run_in_executor(pool, engine.score, prompt, top_logprobs, task.adapter, cancelled)
    try:
        await asyncio.wait([worker])
    finally:
        cancelled.set()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([worker])
    return Delta(text, worker.result()[task.echo_from :])


async def _tokens(engine: Engine, pool: ThreadPoolExecutor, task: GenerationTask) -> AsyncGenerator[Token, None]:
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()  # None: end of the answer

    def put(item: Token | BaseException | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def run_engine() -> None:
        """Put every token into the queue, then None or the exception."""
        try:
            with contextlib.closing(engine.generate(task.prompt, task.sampling, task.adapter, cancelled)) as tokens:
                for token in tokens:
                    if cancelled.is_set():
                        break
                    put(token)
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting request
            put(error)
        else:
            put(None)

    worker = loop.run_in_executor(pool, run_engine)
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancelled.set()
        with anyio.CancelScope(shield=True):
            await worker


async def merge(generators: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of several choices as they arrive, each with the index of its choice; an error in one cancels all."""
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()  # None: end of this choice

    async def pump(index: int, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except Exception as error:  # noqa: BLE001 - raised again below
            queue.put_nowait((index, error))
        queue.put_nowait((index, None))

    pumps = [asyncio.create_task(pump(index, deltas)) for index, deltas in enumerate(generators)]
    try:
        running = len(pumps)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*pumps, return_exceptions=True)
