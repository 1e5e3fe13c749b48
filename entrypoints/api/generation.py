"""From an engine's thread to the event loop: one answer as pieces of text, with stop strings, log probabilities and
tool calls. Cancelling the iterator stops the engine before the slot is given on."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import anyio

from entrypoints.answer import AnswerReader, TextStream, ToolCall
from entrypoints.engines.base import Engine, Token
from entrypoints.sampling import Sampling

END = object()


@dataclass(frozen=True)
class Task:
    """One answer to generate; `opening` are ids that the answer is made to begin with."""

    prompt: list[int]
    sampling: Sampling
    adapter: str | None = None
    stops: Sequence[str] = ()
    tools: Sequence[str] = ()
    opening: tuple[int, ...] = ()
    chat: bool = True  # False: a plain continuation, not read as an answer


@dataclass
class Piece:
    """What one step added; the last piece has a `finish_reason`."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None


class StopStrings:
    """Cuts a growing text at the stop string that is complete first, also one that arrives in parts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that cannot belong to a stop string any more."""
        if not self._stops:
            return text
        self._held += text
        places = ((self._held.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in places if start >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


class _Plain:
    """A continuation read like an answer, without header or calls."""

    def __init__(self, engine: Engine) -> None:
        stream = TextStream(engine.tokenizer, continues=True)
        self.feed, self.finish = stream.feed, stream.finish
        self.calls: list[ToolCall] = []


async def generate(engine: Engine, pool: ThreadPoolExecutor, task: Task) -> AsyncIterator[Piece]:
    """Yield pieces as they come; an error of the engine is raised here."""
    reader = AnswerReader(engine.tokenizer, task.tools) if task.chat else _Plain(engine)
    stops, count = StopStrings(task.stops), 0
    for id_ in task.opening:
        reader.feed(id_)
    async with contextlib.aclosing(_tokens(engine, pool, task)) as tokens:
        async for token in tokens:
            count += 1
            piece = Piece(stops.feed(reader.feed(token)), [token])
            if stops.found:
                piece.finish_reason = "stop"
                yield piece
                return
            yield piece
    last = Piece(stops.feed(reader.finish()))
    if not stops.found:
        last.text += stops.finish()
    last.calls = reader.answer.tool_calls if task.chat else []
    cut = count >= task.sampling.max_new_tokens and not stops.found
    last.finish_reason = "tool_calls" if last.calls else "length" if cut else "stop"
    yield last


async def _tokens(engine: Engine, pool: ThreadPoolExecutor, task: Task) -> AsyncIterator[Token]:
    loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def hand_over(item: object) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        """Hand every token over, then END or what failed."""
        try:
            with contextlib.closing(engine.generate(task.prompt, task.sampling, task.adapter, gone)) as tokens:
                for token in tokens:
                    if gone.is_set():
                        break
                    hand_over(token)
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting request
            hand_over(error)
        else:
            hand_over(END)

    worker = loop.run_in_executor(pool, work)
    try:
        while (item := await queue.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        gone.set()
        with anyio.CancelScope(shield=True):
            await worker


async def merged(iterators: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several answers as they come, each with its answer's number; an error of one ends all."""
    queue: asyncio.Queue = asyncio.Queue()

    async def pump(number: int, pieces: AsyncIterator[Piece]) -> None:
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    queue.put_nowait((number, piece))
        except Exception as error:  # noqa: BLE001 - raised again below
            queue.put_nowait((number, error))
        queue.put_nowait((number, END))

    pumps = [asyncio.create_task(pump(number, pieces)) for number, pieces in enumerate(iterators)]
    try:
        running = len(pumps)
        while running:
            number, item = await queue.get()
            if item is END:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in pumps:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*pumps, return_exceptions=True)
