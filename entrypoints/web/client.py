"""The pages' way to the API, with the official client: the models, and an answer that grows in the background."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_SECONDS = 5
FAILURES = (openai.OpenAIError, httpx2.HTTPError)  # the latter where a connection breaks midway
READ_SECONDS = 600  # a slow machine reads a long prompt before its first token


@dataclass(frozen=True)
class Problem:
    """Why there is no answer; `key` is one of web.texts."""

    key: str
    values: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model or adapter of /v1/models; `window` in tokens, None where the server does not say."""

    name: str
    window: int | None = None
    parent: str | None = None


@dataclass
class Growth:
    """An answer while it grows; written by one thread, read by another."""

    text: str = ""
    calls: list[dict] = field(default_factory=list)  # as OpenAI's tool_calls
    pieces: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    dropped: int = 0  # oldest rounds left out, so that the prompt fits the window
    problem: Problem | None = None
    seconds: float = 0.0

    def tokens(self) -> int:
        """Tokens of the answer; about as many as pieces where the server was not asked to the end."""
        return self.pieces if self.completion_tokens is None else self.completion_tokens


@dataclass(frozen=True)
class Api:
    """An OpenAI-compatible server; `url` ends in /v1."""

    url: str
    key: str = field(default="", repr=False)

    def with_key(self, key: str) -> "Api":
        """The same server for a visitor with a key of their own."""
        return Api(self.url, key.strip() or self.key)

    def models(self) -> list[Model] | Problem:
        """Its models, or why there are none to see."""
        return asyncio.run(self._models())

    async def _models(self) -> list[Model] | Problem:
        try:
            async with self._client() as client:
                found = (await client.models.list()).data
        except FAILURES as error:
            return problem_of(error, self.url)
        return [Model(m.id, getattr(m, "max_model_len", None), getattr(m, "parent", None)) for m in found]

    async def answer(self, messages: list[dict], options: dict[str, Any], growth: Growth) -> None:
        """Let `growth` grow until the answer ends; oldest rounds that do not fit the window are left out."""
        start = time.monotonic()
        try:
            async with self._client() as client:
                while not await self._tried(client, messages, options, growth, start):
                    messages = without_oldest_round(messages)
                    growth.dropped += 1
        except FAILURES as error:
            growth.problem = problem_of(error, self.url)
        finally:
            growth.seconds = time.monotonic() - start

    async def _tried(
        self, client: AsyncOpenAI, messages: list[dict], options: dict[str, Any], growth: Growth, start: float
    ) -> bool:
        """False when the prompt is too long and a shorter one can be tried."""
        try:
            stream = await client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **options
            )
        except openai.BadRequestError as error:
            if error.code == "context_length_exceeded" and without_oldest_round(messages):
                return False
            raise
        async with stream:
            async for chunk in stream:
                _add(growth, chunk)
                growth.seconds = time.monotonic() - start
        return True

    def _client(self) -> AsyncOpenAI:
        # a proxy in the environment must not come between a page and its server on the same machine
        direct = urlsplit(self.url).hostname in LOOPBACK
        timeout = openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        web = DefaultAsyncHttpxClient(trust_env=not direct, timeout=timeout)
        return AsyncOpenAI(base_url=self.url, api_key=self.key or "none", max_retries=0, http_client=web)


def _add(growth: Growth, chunk: Any) -> None:
    if chunk.usage:
        growth.prompt_tokens, growth.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    for choice in chunk.choices:
        if choice.delta.content:
            growth.text += choice.delta.content
            growth.pieces += 1
        growth.calls += [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in choice.delta.tool_calls or ()
        ]
        growth.finish_reason = choice.finish_reason or growth.finish_reason


class Answering:
    """One answer in a thread of its own. `stop` drops the connection at once, which also stops the model."""

    def __init__(self, api: Api, messages: list[dict], options: dict[str, Any]) -> None:
        self.growth = Growth()
        self.stopped = False
        self.done = threading.Event()
        self.taking = threading.Lock()  # held by the one thread that makes the answer a turn
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None
        work = self._watched(api.answer(messages, options, self.growth))
        threading.Thread(target=asyncio.run, args=(work,), name="answering", daemon=True).start()

    def stop(self) -> None:
        """Give the answer up; safe from any thread, and when it has ended."""
        with self._lock:
            if not self.done.is_set():
                self.stopped = True
            if self._cancel:
                self._cancel()

    async def _watched(self, work: Coroutine) -> None:
        task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
        with self._lock:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.stopped:
                task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except BaseException:
            self.growth.problem = Problem("failed", {"detail": "internal error"})  # the log has the traceback
            raise
        finally:
            with self._lock:
                self._cancel = None
                self.done.set()


def without_oldest_round(messages: list[dict]) -> list[dict] | None:
    """Drop the oldest question with all that answers it; None when only the last question is left."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return messages[: questions[0]] + messages[questions[1] :]


def problem_of(error: Exception, url: str) -> Problem:
    """What a visitor should know of a failed request."""
    if not isinstance(error, openai.APIStatusError):
        lost = isinstance(error, (openai.APIConnectionError, httpx2.HTTPError))
        return Problem("down", {"detail": url}) if lost else Problem("failed", {"detail": str(error)})
    body = error.body if isinstance(error.body, dict) else {}
    detail = {"detail": body.get("message") or f"HTTP {error.status_code}"}
    wait = {"seconds": error.response.headers.get("retry-after", "5")}
    if error.status_code in (401, 403):
        return Problem("needs_key")
    if error.status_code == 429:
        return Problem("busy", wait)
    if error.code == "loading":
        return Problem("loading", wait)
    if error.code == "context_length_exceeded":
        return Problem("too_long", detail)
    return Problem("refused" if error.status_code < 500 else "failed", detail)
