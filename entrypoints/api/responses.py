"""From deltas to OpenAI's response bodies and stream events; both are built from the same deltas, so they agree."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entrypoints.api.admission import AdmittedRequest
from entrypoints.api.generation import Delta, GenerationTask, generate, merge
from entrypoints.api.state import ServerState
from entrypoints.api.tools import to_openai
from entrypoints.api.usage import UsageRecord
from entrypoints.chat_format.tool_calls import ToolCall
from entrypoints.checkpoint.tokenizer import Tokenizer
from entrypoints.engines.base import Engine, Token

Json = dict[str, Any]


@dataclass
class CompletionRun:
    """The choices of one request while they are generated, with usage and metrics.

    `key` and `admitted` must be set before the first delta is read.
    """

    state: ServerState
    tasks: list[GenerationTask]
    model: str
    n: int  # choices per prompt
    id_prefix: str
    logprobs: bool
    include_usage: bool  # send a last event with the usage
    start: float = field(default_factory=time.monotonic)
    completion_tokens: int = 0
    admitted: AdmittedRequest = field(init=False)
    key: str = field(init=False)  # name of the API key

    def __post_init__(self) -> None:
        self.engine: Engine = self.state.require_engine()
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._read_prompts: set[int] = set()  # numbers of the prompts that the engine got
        self._is_counted = False

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of all choices as they arrive, each with the index of its choice; counted and timed."""
        metrics = self.state.metrics
        last_token: dict[int, float] = {}  # by choice: time of its latest token
        outcome = "aborted"
        generators = [self._generate(index, task) for index, task in enumerate(self.tasks)]
        try:
            async with contextlib.aclosing(merge(generators)) as deltas:
                async for index, delta in deltas:
                    if delta.tokens:
                        now = time.monotonic()
                        timer = metrics.time_per_token if index in last_token else metrics.time_to_first_token
                        timer.labels(self.model).observe(now - last_token.get(index, self.start))
                        last_token[index] = now
                        self.completion_tokens += len(delta.tokens)
                        metrics.completion_tokens.labels(self.model).inc(len(delta.tokens))
                    yield index, delta
            outcome = "completed"
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.count_usage(outcome)

    async def _generate(self, index: int, task: GenerationTask) -> AsyncGenerator[Delta, None]:
        """One choice, from the moment it has a slot."""
        sampling = replace(task.sampling, cache_salt=self.key)
        generated = generate(self.engine, self.state.pool, replace(task, sampling=sampling))
        async with self.state.admission.slot(self.admitted), contextlib.aclosing(generated) as deltas:
            self._count_prompt(index)
            async for delta in deltas:
                yield delta

    def _count_prompt(self, index: int) -> None:
        """Count the prompt of a choice, once for all of its choices."""
        if (number := index // self.n) not in self._read_prompts:
            self._read_prompts.add(number)
            self.state.metrics.prompt_tokens.labels(self.model).inc(_prompt_tokens(self.tasks[index]))

    def count_usage(self, outcome: str) -> None:
        """Count the request for its key, the first time that this is called."""
        if self._is_counted:
            return
        self._is_counted = True
        record = UsageRecord(
            time=self.state.usage.timestamp(),
            id=self.id,
            key=self.key,
            model=self.model,
            outcome=outcome,
            prompt_tokens=sum(_prompt_tokens(self.tasks[number * self.n]) for number in self._read_prompts),
            completion_tokens=self.completion_tokens,
            seconds=round(time.monotonic() - self.start, 3),
        )
        self.state.count_usage(record)

    async def collect(self) -> list[Delta]:
        """Every choice as one delta."""
        choices = [Delta() for _ in self.tasks]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                choice = choices[index]
                choice.text += delta.text
                choice.tokens += [*delta.echoed, *delta.tokens]
                choice.tool_calls += delta.tool_calls
                choice.finish_reason = delta.finish_reason or choice.finish_reason
        return choices

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and choices; a prompt with n choices counts once."""
        prompt_tokens = sum(_prompt_tokens(task) for task in self.tasks[:: self.n])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    def body(self, kind: str, choices: list[Json]) -> Json:
        """A complete response."""
        return {**self._header(kind), "choices": choices, "usage": self.usage()}

    def event(self, kind: str, choice: Json) -> Json:
        """An event with a part of one choice."""
        return {**self._header(kind), "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def usage_event(self, kind: str) -> Json:
        """The last event, if usage is requested."""
        return {**self._header(kind), "choices": [], "usage": self.usage()}

    def _header(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def chat_result(run: CompletionRun) -> Json:
    """The body of a chat completion that is not streamed."""
    choices = []
    for index, choice in enumerate(await run.collect()):
        message: Json = {"role": "assistant", "content": choice.text or (None if choice.tool_calls else "")}
        if choice.tool_calls:
            message["tool_calls"] = _tool_calls(choice.tool_calls)
        choices.append(
            {
                "index": index,
                "message": message,
                "finish_reason": choice.finish_reason,
                "logprobs": chat_logprobs(run, choice.tokens) if run.logprobs else None,
            }
        )
    return run.body("chat.completion", choices)


async def chat_events(run: CompletionRun) -> AsyncGenerator[Json, None]:
    """The events of a streamed chat completion."""
    kind = "chat.completion.chunk"

    def event(index: int, delta: Json, finish_reason: str | None = None, tokens: Sequence[Token] = ()) -> Json:
        logprobs = chat_logprobs(run, tokens) if run.logprobs and tokens else None
        return run.event(kind, {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs})

    for index in range(len(run.tasks)):
        yield event(index, {"role": "assistant", "content": ""})
    # tokens of each choice that have not been sent yet: a token may add no text, such as half a character
    pending: list[list[Token]] = [[] for _ in run.tasks]
    async with contextlib.aclosing(run.deltas()) as deltas:
        async for index, delta in deltas:
            pending[index] += delta.tokens
            for number, call in enumerate(_tool_calls(delta.tool_calls)):  # some clients read only the first
                yield event(index, {"tool_calls": [{"index": number, **call}]})
            if delta.text:
                yield event(index, {"content": delta.text}, tokens=pending[index])
                pending[index] = []
            if delta.finish_reason:
                yield event(index, {}, delta.finish_reason, pending[index])
    if run.include_usage:
        yield run.usage_event(kind)


async def completion_result(run: CompletionRun) -> Json:
    """The body of a text completion that is not streamed."""
    choices = [_completion_choice(run, index, choice) for index, choice in enumerate(await run.collect())]
    return run.body("text_completion", choices)


async def completion_events(run: CompletionRun) -> AsyncGenerator[Json, None]:
    """The events of a streamed text completion."""
    pending: list[list[Token]] = [[] for _ in run.tasks]
    async with contextlib.aclosing(run.deltas()) as deltas:
        async for index, delta in deltas:
            pending[index] += [*delta.echoed, *delta.tokens]
            if delta.text or delta.finish_reason:
                delta.tokens, pending[index] = pending[index], []
                yield run.event("text_completion", _completion_choice(run, index, delta))
    if run.include_usage:
        yield run.usage_event("text_completion")


def _prompt_tokens(task: GenerationTask) -> int:
    return len(task.prompt)


def _completion_choice(run: CompletionRun, index: int, delta: Delta) -> Json:
    tokenizer = run.engine.tokenizer
    logprobs = None
    if run.logprobs:
        logprobs = {
            "tokens": [_token_text(token, tokenizer) for token in delta.tokens],
            "token_logprobs": [token.logprob for token in delta.tokens],
            "top_logprobs": [
                None if token.logprob is None else {_token_text(id_, tokenizer): value for id_, value in token.top}
                for token in delta.tokens
            ],
        }
    return {"index": index, "text": delta.text, "finish_reason": delta.finish_reason, "logprobs": logprobs}


def chat_logprobs(run: CompletionRun, tokens: Sequence[Token]) -> Json:
    """The `logprobs` of a chat choice."""
    tokenizer = run.engine.tokenizer

    def entry(id_: int, logprob: float | None) -> Json:
        return {
            "token": _token_text(id_, tokenizer), "logprob": logprob, "bytes": list(tokenizer.token_bytes(id_))
        }  # fmt: skip

    return {
        "content": [
            {**entry(token, token.logprob), "top_logprobs": [entry(id_, value) for id_, value in token.top]}
            for token in tokens
        ]
    }


def _tool_calls(calls: list[ToolCall]) -> list[Json]:
    """Tool calls with new ids."""
    return [to_openai(call, f"call_{uuid.uuid4().hex[:24]}") for call in calls]


def _token_text(id_: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(id_).decode("utf-8", "replace")
