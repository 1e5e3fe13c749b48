"""From pieces to OpenAI's answers: whole ones and streamed ones, of the same pieces, so that they cannot differ."""

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from entrypoints.answer import ToolCall
from entrypoints.api.generation import Piece, Task, generate, merged
from entrypoints.api.limits import Ticket
from entrypoints.api.server import Serving
from entrypoints.api.tools import to_openai
from entrypoints.engines.base import Token


@dataclass
class Choices:
    """The answers of one request while they run; counts what it used. Needs its `ticket` before the first piece."""

    serving: Serving
    tasks: list[Task]
    repeats: int  # answers to each prompt
    model: str | None
    prefix: str
    start: float = field(default_factory=time.monotonic)
    completion_tokens: int = 0
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        self.model = self.model or self.serving.options.model
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers as they come, counted and timed."""
        metrics, last = self.serving.metrics, {}  # last: when each answer had its latest token
        metrics.prompt_tokens.labels(self.model).inc(self._prompt_tokens())
        async with contextlib.aclosing(merged([self._one(task) for task in self.tasks])) as pieces:
            async for number, piece in pieces:
                if piece.tokens:
                    now = time.monotonic()
                    timer = metrics.each if number in last else metrics.first
                    timer.labels(self.model).observe(now - last.get(number, self.start))
                    last[number] = now
                    self.completion_tokens += len(piece.tokens)
                    metrics.completion_tokens.labels(self.model).inc(len(piece.tokens))
                yield number, piece

    async def _one(self, task: Task) -> AsyncIterator[Piece]:
        generated = generate(self.serving.engine, self.serving.pool, task)
        async with self.serving.admission.slot(self.ticket), contextlib.aclosing(generated) as pieces:
            async for piece in pieces:
                yield piece

    def usage(self) -> dict:
        """Tokens read and written; a prompt asked n times counts once."""
        read = self._prompt_tokens()
        return {
            "prompt_tokens": read,
            "completion_tokens": self.completion_tokens,
            "total_tokens": read + self.completion_tokens,
        }

    def _prompt_tokens(self) -> int:
        return sum(len(task.prompt) - len(task.opening) for task in self.tasks[:: self.repeats])

    def envelope(self, kind: str) -> dict:
        """What every answer and event begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def calls(self, found: list[ToolCall]) -> list[dict]:
        """Tool calls with fresh ids."""
        return [to_openai(call, f"call_{uuid.uuid4().hex[:24]}") for call in found]


async def _whole(choices: Choices) -> list[Piece]:
    """Every answer as one piece."""
    wholes = [Piece() for _ in choices.tasks]
    async with contextlib.aclosing(choices.pieces()) as pieces:
        async for number, piece in pieces:
            whole = wholes[number]
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.calls += piece.calls
            whole.finish_reason = piece.finish_reason or whole.finish_reason
    return wholes


async def chat_result(choices: Choices, logprobs: bool) -> dict:
    """The body of an answer that is not streamed."""
    found = []
    for number, whole in enumerate(await _whole(choices)):
        message = {"role": "assistant", "content": whole.text or (None if whole.calls else "")}
        if whole.calls:
            message["tool_calls"] = choices.calls(whole.calls)
        found.append(
            {
                "index": number,
                "message": message,
                "finish_reason": whole.finish_reason,
                "logprobs": _chat_logprobs(choices, whole.tokens) if logprobs else None,
            }
        )
    return {**choices.envelope("chat.completion"), "choices": found, "usage": choices.usage()}


async def chat_events(choices: Choices, usage: bool, logprobs: bool) -> AsyncIterator[dict]:
    """The events of a streamed answer."""

    def event(number: int, delta: dict, finish: str | None = None, tokens: list[Token] | None = None) -> dict:
        choice = {"index": number, "delta": delta, "finish_reason": finish}
        choice["logprobs"] = _chat_logprobs(choices, tokens) if logprobs and tokens else None
        return {**choices.envelope("chat.completion.chunk"), "choices": [choice], **({"usage": None} if usage else {})}

    for number in range(len(choices.tasks)):
        yield event(number, {"role": "assistant", "content": ""})
    held: dict[int, list[Token]] = {number: [] for number in range(len(choices.tasks))}
    async with contextlib.aclosing(choices.pieces()) as pieces:
        async for number, piece in pieces:
            held[number] += piece.tokens
            if piece.calls:
                calls = [{"index": index, **call} for index, call in enumerate(choices.calls(piece.calls))]
                yield event(number, {"tool_calls": calls})
            if piece.text:
                yield event(number, {"content": piece.text}, tokens=held[number])
                held[number] = []
            if piece.finish_reason:
                yield event(number, {}, piece.finish_reason, held[number])
    if usage:
        yield {**choices.envelope("chat.completion.chunk"), "choices": [], "usage": choices.usage()}


async def completion_result(choices: Choices, logprobs: bool) -> dict:
    """The body of a continuation that is not streamed."""
    found = [_completion(choices, number, whole, logprobs) for number, whole in enumerate(await _whole(choices))]
    return {**choices.envelope("text_completion"), "choices": found, "usage": choices.usage()}


async def completion_events(choices: Choices, usage: bool, logprobs: bool) -> AsyncIterator[dict]:
    """The events of a streamed continuation."""
    held: dict[int, list[Token]] = {number: [] for number in range(len(choices.tasks))}
    async with contextlib.aclosing(choices.pieces()) as pieces:
        async for number, piece in pieces:
            held[number] += piece.tokens
            if piece.text or piece.finish_reason:
                piece.tokens, held[number] = held[number], []
                choice = _completion(choices, number, piece, logprobs)
                yield {**choices.envelope("text_completion"), "choices": [choice], **({"usage": None} if usage else {})}
    if usage:
        yield {**choices.envelope("text_completion"), "choices": [], "usage": choices.usage()}


def _completion(choices: Choices, number: int, piece: Piece, logprobs: bool) -> dict:
    codec = choices.serving.engine.tokenizer
    table = None
    if logprobs:
        table = {
            "tokens": [_text(token, codec) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{_text(id_, codec): value for id_, value in token.top} for token in piece.tokens],
        }
    return {"index": number, "text": piece.text, "finish_reason": piece.finish_reason, "logprobs": table}


def _chat_logprobs(choices: Choices, tokens: list[Token]) -> dict:
    codec = choices.serving.engine.tokenizer

    def entry(id_: int, logprob: float | None) -> dict:
        return {"token": _text(id_, codec), "logprob": logprob, "bytes": list(codec.piece(id_))}

    return {
        "content": [
            {**entry(token, token.logprob), "top_logprobs": [entry(id_, value) for id_, value in token.top]}
            for token in tokens
        ]
    }


def _text(id_: int, codec: object) -> str:
    return codec.piece(id_).decode("utf-8", "replace")
